"""Every method that there is, by the public way: it logs what its panels draw, and parts give the whole's gradient."""

import math

import pytest
import torch
from accelerate import Accelerator

from edgecl.config.recipe import list_methods, recipe_from_tables
from edgecl.nets.build import create_slimmable
from edgecl.storage.directories import RunDir
from edgecl.train.monitor import read_metrics
from edgecl.train.step import create_step

from .conftest import train

COMMON = {"step", "epoch", "loss", "std", "grad_norm_host", "grad_norm_slim", "lr", "images_per_s"}


@pytest.fixture
def recipe_of(tables):
    def make(name, **changed):
        own = {"method": {"name": name}, "host": {**tables["host"], "width": 0.5}}
        return recipe_from_tables({**tables, **own, **changed}, source="test")

    return make


@pytest.mark.parametrize("name", list_methods())
def test_a_run_logs_what_its_panels_draw(tmp_path, recipe_of, pictures, name):
    train(recipe_of(name, views={"local_count": 1}), tmp_path / "run", pictures)
    run = RunDir(tmp_path / "run")
    records = [record for record in read_metrics(run.metrics_file) if "loss" in record]
    assert len(records) == 10
    drawn = {key for panel in run.read().panels for key in panel["lines"]}
    for record in records:
        assert drawn <= record.keys()
        assert {"diagonal", "off_diagonal_rms", "coding_rate"} <= record.keys()
        assert all(math.isfinite(record[key]) for key in COMMON - {"grad_norm_slim"})
    assert (tmp_path / "run" / "views.png").exists()


@pytest.mark.parametrize("name", list_methods())
def test_parts_take_the_whole_batchs_gradient_for_every_method(recipe_of, tables, name):
    """Without batch norm in training mode the parts see what the whole sees."""

    def gradients(parts):
        recipe = recipe_of(name, run={**tables["run"], "accumulate": parts}, views={"local_count": 1})
        torch.manual_seed(0)
        net = create_slimmable(recipe).double()
        step = create_step(recipe, net, accelerator=Accelerator(cpu=True), steps_per_epoch=5)
        step.passes.train = lambda mode=True: step.passes
        step.net.eval()
        seen = {}
        step.optimizer.step = lambda: seen.update(
            {key: one.grad.clone() for key, one in step.method.named_parameters() if one.grad is not None}
        )
        generator = torch.Generator().manual_seed(1)
        whole = torch.randn(step.method.whole_views, 8, 3, 32, 32, generator=generator, dtype=torch.float64)
        step([*whole, whole[0][..., :16, :16]], number=0)
        return seen

    whole, parts = gradients(1), gradients(4)
    assert whole.keys() == parts.keys()
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    assert largest > 0
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, rtol=1e-6, atol=1e-9 * largest, msg=key)
