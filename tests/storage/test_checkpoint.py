"""Checkpoints: bit for bit, held to their hashes, and nothing unpickled."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import flip
from torch import nn

from edgecl.config.recipe import Optim
from edgecl.errors import ArtifactError
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.checkpoint import (
    has_checkpoint,
    read_best,
    read_newest,
    read_sealed,
    restore_optimizer,
    write_checkpoint,
)
from edgecl.storage.directories import RunDir
from edgecl.storage.records import Quality
from edgecl.train.optim import create_optimizer

NO_OPTIMIZER = {"state": {}, "param_groups": []}
FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    return net.to(memory_format=torch.channels_last)


def train(net, optimizer, steps, *, start=0):
    for step in range(start, start + steps):
        images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        net(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def write(run_dir, step, *, value=0.0, quality=None, **options):
    return write_checkpoint(
        run_dir,
        step=step,
        epoch=step // 10,
        model={"weight": torch.full((4, 4), value or float(step))},
        optimizer={
            "state": {0: {"step": torch.tensor(float(step)), "none": None}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        quality=None if quality is None else {"name": "knn_top1_slim", "value": quality},
        **options,
    )


# --- exact ---

OPTIMIZERS = [
    Optim(name="adamw", lr=1e-2),
    Optim(name="sgd", lr=1e-2),
    Optim(name="sgd", lr=1e-2, momentum=0.0),
    Optim(name="lars", lr=1e-1),
]


@pytest.mark.parametrize(
    "settings", OPTIMIZERS, ids=lambda settings: f"{settings.name}-{settings.momentum:g}"
)
def test_training_goes_on_bit_for_bit(run_dir, settings):
    net = make_net()
    optimizer = create_optimizer(net, settings, batch_size=6)
    train(net, optimizer, 3)
    write_checkpoint(run_dir, epoch=1, step=3, model=net.state_dict(), optimizer=optimizer.state_dict())
    train(net, optimizer, 3, start=3)

    other = make_net()
    other_optimizer = create_optimizer(other, settings, batch_size=6)
    checkpoint = read_newest(run_dir)
    other.load_state_dict(checkpoint.model)
    restore_optimizer(other_optimizer, checkpoint.optimizer)
    train(other, other_optimizer, 3, start=3)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_options_of_an_optimizer_come_back_as_they_were(run_dir):
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]

    def make(lr):
        groups = [{"params": parameters[:1], "lr": lr}, {"params": parameters[1:], "lr": torch.tensor(0.3)}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, capturable=False)

    rate = 0.1 + 0.2  # no short decimal
    optimizer = make(rate)
    write_checkpoint(run_dir, step=1, epoch=0, model={}, optimizer=optimizer.state_dict())
    other = make(1.0)
    other.param_groups[1]["lr"].fill_(9.0)
    restore_optimizer(other, read_newest(run_dir).optimizer)
    first, second = other.param_groups
    assert first["lr"] == rate
    assert second["lr"].dtype == torch.float32
    assert torch.equal(second["lr"], torch.tensor(0.3))
    assert first["betas"] == (0.9, 0.95)
    assert isinstance(first["betas"], tuple)


def test_numbers_of_numpy_and_torch_are_kept_as_pythons_own(run_dir):
    groups = [{"lr": np.float64(0.1), "eps": np.float32(0.1), "params": [0]}]
    write_checkpoint(
        run_dir,
        step=np.int64(7),
        epoch=np.int32(2),
        model={},
        optimizer={"state": {0: {"ratio": np.float32(1 / 3)}}, "param_groups": groups},
        state={"scaler": {"scale": torch.tensor(65536.0), "tracker": np.int64(3), "on": np.bool_(True)}},
        quality={"name": "rankme_slim", "value": np.float32(0.7)},
    )
    found = read_newest(run_dir)
    assert (found.step, found.epoch) == (7, 2)
    assert found.optimizer["param_groups"] == [{"lr": 0.1, "eps": float(np.float32(0.1)), "params": [0]}]
    assert found.optimizer["state"] == {0: {"ratio": float(np.float32(1 / 3))}}
    assert found.state == {"scaler": {"scale": 65536.0, "tracker": 3, "on": True}}
    assert type(found.state["scaler"]["tracker"]) is int
    assert found.quality == Quality(name="rankme_slim", value=float(np.float32(0.7)))


def test_what_a_run_keeps_besides_comes_back_exactly(run_dir):
    random = np.random.default_rng(0)
    state = {
        "floats": [5e-324, 1.7976931348623157e308, 0.1 + 0.2, -0.0, *random.normal(size=50).tolist()],
        "large": 2**63 + 1,
        "empty": {},
        "none": None,
        "text": "\u2028 \ud800 ü",
        "infinite": [math.inf, -math.inf],
    }
    write(run_dir, 1, state={**state, "nan": math.nan})
    found = dict(read_newest(run_dir).state)
    assert math.isnan(found.pop("nan"))
    assert found == state
    assert math.copysign(1, found["floats"][3]) == -1
    assert "NaN" not in (run_dir.checkpoint_file(1) / "state.json").read_text()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"guard": {"seen": {1, 2}}}, "state.guard.seen is a set, which JSON cannot hold exactly"),
        ({"guard": [0, torch.zeros(2)]}, "state.guard[1] is a Tensor, which JSON cannot hold exactly"),
        ({"guard": {3: "a"}}, "state.guard has the key 3, and JSON knows only texts"),
        ({"size": np.zeros(2)}, "state.size is a ndarray, which JSON cannot hold exactly"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_name(run_dir, state, text):
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        write(run_dir, 1, state=state)
    assert not has_checkpoint(run_dir)


def test_every_sort_of_tensor_survives(run_dir):
    weight = torch.randn(4, 6)
    model = {
        "weight": weight,
        "tied": weight,
        "rows": weight[1:3],
        "columns": weight[:, 2:4],
        "turned": weight.t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "parameter": nn.Parameter(torch.randn(3)),
        "count": torch.tensor(2**40),
        "nothing": torch.zeros(0, 3),
        "half": torch.randn(5).bfloat16(),
        "not finite": torch.tensor([math.nan, math.inf, -0.0]),
    }
    write_checkpoint(run_dir, step=1, epoch=0, model=model, optimizer=NO_OPTIMIZER)
    found = read_newest(run_dir).model
    assert found.keys() == model.keys()
    for name, tensor in model.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(7.0), tensor.detach().nan_to_num(7.0)), name
    found["weight"].zero_()  # each its own
    assert torch.equal(found["tied"], weight)


def test_a_checkpoint_is_found_again_by_its_hash(run_dir):
    hashes = [sha256_of_file(write(run_dir, step) / "state.json") for step in (1, 2)]
    assert [read_sealed(run_dir, sha256).step for sha256 in hashes] == [1, 2]
    assert read_newest(run_dir).sha256 == hashes[1]
    assert read_sealed(run_dir, "0" * 64) is None
    flip(run_dir.checkpoint_file(1) / "model.safetensors")
    assert read_sealed(run_dir, hashes[0]) is None


# --- whole ---


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "{name} does not match its hash"),
        (partial(flip, at=0), "{name} does not match its hash"),
        (cut, "{name} has "),
        (Path.unlink, "unreadable ([Errno 2] No such file or directory: "),
    ],
)
def test_a_damaged_file_passes_a_checkpoint_over(run_dir, capsys, name, damage, words):
    write(run_dir, 1)
    damage(write(run_dir, 2) / name)
    assert read_newest(run_dir).step == 1
    said = capsys.readouterr().err
    assert said.startswith(f"edgecl: checkpoint step-000000002 passed over: {words.format(name=name)}")
    assert name in said


def test_no_flipped_byte_of_the_state_goes_unseen(run_dir, capsys):
    write(run_dir, 1)
    file = write(run_dir, 2) / "state.json"
    content = file.read_bytes()
    for at in range(0, len(content) - 1, 7):  # the last is a line feed
        file.write_bytes(content)
        flip(file, at=at)
        assert read_newest(run_dir).step == 1, content[max(0, at - 20) : at + 20]
        assert capsys.readouterr().err.startswith("edgecl: checkpoint step-000000002 passed over: ")


@pytest.mark.parametrize("content", [None, "", '{"epoch": 2', "[]", "\x00\xff", "[" * 100_000, "3"])
def test_a_torn_or_missing_state_passes_a_checkpoint_over(run_dir, capsys, content):
    write(run_dir, 1)
    file = write(run_dir, 2) / "state.json"
    file.unlink() if content is None else file.write_text(content, encoding="latin-1")
    assert read_newest(run_dir).step == 1
    assert "step-000000002 passed over: unreadable (" in capsys.readouterr().err


def test_no_whole_checkpoint_is_an_error(run_dir, capsys):
    written = [write(run_dir, step, keep=3) for step in (1, 2, 3)]
    for path, name in zip(written, FILES, strict=True):
        (path / name).write_bytes(b"")
    assert has_checkpoint(run_dir)
    with pytest.raises(ArtifactError, match="has 3 checkpoints, and none is whole") as caught:
        read_newest(run_dir)
    assert caught.value.where == {"torn": "step-000000001, step-000000002, step-000000003"}
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in said] == [f"step-{step:09d}" for step in (3, 2, 1)]


@pytest.mark.parametrize("read", [read_newest, read_best])
def test_a_run_without_checkpoints_says_so(tmp_path, read):
    run_dir = RunDir(tmp_path / "nothing")
    assert not has_checkpoint(run_dir)
    with pytest.raises(ArtifactError, match="has no checkpoint") as caught:
        read(run_dir)
    assert "[run] checkpoint_epochs" in caught.value.hint
