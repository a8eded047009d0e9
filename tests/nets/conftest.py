"""Host and slim net for the tests of slimming and carving, warmed up so that no norm is at its start."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

from edgecl.config.recipe import recipe_from_tables
from edgecl.nets.build import create_slimmable
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import SlimmableNet
from edgecl.storage.checkpoint import write_checkpoint
from edgecl.storage.directories import RunDir
from edgecl.storage.record_files import write_record
from edgecl.storage.records import ImagesRead, RunRecord

NO_OPTIMIZER = {"state": {}, "param_groups": []}


def slim_encoder(arch, host_width, *widths, projector=(8, 4)):
    """Build a host with slim nets of these widths, the widest first; always the same."""
    torch.manual_seed(0)
    return SlimmableNet(
        lambda width: Encoder(arch, width=width, projector=projector),
        host_width=host_width,
        slim_width=widths[0],
        other_widths=widths[1:],
    )


def make_slimmable(arch, *, host_width, slim_width):
    """Build an encoder whose norms differ everywhere: between widths, channels and layers."""
    net = slim_encoder(arch, host_width, slim_width)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(drawn + 0.5 if "var" in name or "weight" in name else 0.2 * (drawn - 0.5))
    return net


@pytest.fixture(scope="session")
def slimmable():
    """Make a SlimmableNet, once per session: tests that train one must take a small one of their own."""
    # The large ones would fill the memory if all were kept.
    return lru_cache(maxsize=1)(make_slimmable)


@pytest.fixture
def write_run(tmp_path):
    """Write tmp_path/run with one checkpoint of an untrained net, or of one that `train` has changed; return the net."""

    def write(tables, *, data="nowhere", train=None):
        recipe = recipe_from_tables(tables, source="test")
        torch.manual_seed(4)
        net = create_slimmable(recipe)
        if train:
            train(net)
        run_dir = RunDir(tmp_path / "run")
        run_dir.checkpoints.mkdir(parents=True)
        write_checkpoint(run_dir, epoch=3, step=30, model=net.state_dict(), optimizer=NO_OPTIMIZER)
        record = RunRecord(
            made_from=None,
            recipe_name="tiny",
            recipe=recipe.model_dump(mode="json"),
            data=ImagesRead(uri=str(data), fingerprint="f" * 64),
        )
        write_record(run_dir.record_file, record)
        return net

    return write


@pytest.fixture
def write_pictures(tmp_path):
    """Write so many random PNGs into tmp_path/pictures."""

    def write(count, *, side=48):
        root = tmp_path / "pictures"
        root.mkdir()
        random = np.random.default_rng(0)
        for index in range(count):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{index:03}.png")
        return root

    return write
