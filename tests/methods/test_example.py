"""The method that docs/method.md shows: from its one file it is trained, resumed, carved, priced and drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reports.conftest import report

import edgecl.methods
from edgecl.config.recipe import read_recipe
from edgecl.errors import Preempted
from edgecl.evaluate.cost import cost_of_recipe
from edgecl.nets.model_dir import load_model
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.train import loop
from edgecl.train.carve import carve
from edgecl.train.monitor import read_metrics
from edgecl.train.pretrain import pretrain

EXAMPLE = Path(__file__).parent / "example"
RECIPE = """
[host]
arch = "mobilenetv3_small_100"
width = 0.5
[slim]
width = 0.5
[projector]
sizes = [16, 16]
[method]
name = "short-byol"
momentum = 0.9
[data]
image_size = 32
batch_size = 8
[optim]
name = "adamw"
lr = 1e-3
[run]
epochs = 2
log_every = 1
quality_epochs = 1
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train the example by its name, as if its file lay in edgecl/methods/."""
    monkeypatch.setattr(edgecl.methods, "__path__", [*edgecl.methods.__path__, str(EXAMPLE)])
    (tmp_path / "short-byol.toml").write_text(RECIPE)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draws = np.random.default_rng(0)
    for number in range(24):
        corners = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((32, 32)).save(pictures / f"{number:02}.png")

    def run(name, *assignments, **settings):
        recipe = read_recipe(str(tmp_path / "short-byol.toml"), list(assignments))
        out = tmp_path / name
        pretrain(recipe, recipe_name="short-byol", out=out, data=str(pictures), device="cpu", **settings)
        return RunDir(out)

    return run


def losses(run):
    return [record["loss"] for record in read_metrics(run.metrics_file) if "loss" in record]


def test_the_docs_show_the_example_as_it_is():
    shown = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    assert f"```python\n{(EXAMPLE / 'short_byol.py').read_text(encoding='utf-8')}```" in shown


def test_the_example_trains_predictor_and_target_and_is_carved_priced_and_drawn(train, tmp_path):
    run = train("run")
    found = losses(run)
    assert len(found) == 6
    assert found[-1] < found[0]
    tensors = read_newest(run).model
    slow, fast = tensors["method.target.backbone.conv_stem.weight"], tensors["host.backbone.conv_stem.weight"]
    assert slow.shape == fast.shape
    assert not torch.equal(slow, fast)
    assert "method.predictor.weight" in tensors

    carve(run.path, out=tmp_path / "model", recalibrate_norms=False)
    net, record = load_model(tmp_path / "model")
    assert torch.equal(net.state_dict()["conv_stem.weight"], fast)
    assert record.method == "short-byol"

    recipe = read_recipe(str(tmp_path / "short-byol.toml"))
    training = cost_of_recipe(recipe, recipe_name="short-byol", images=24).training
    assert (training.method, training.forward_units) == ("short-byol", 6.0)

    page = report([run.path], out=tmp_path / "report")
    assert {"loss", "diagonal"} <= page["runs"][0]["curves"].keys()


def test_the_target_is_the_moving_average_of_the_encoder(train):
    momentum = 0.9
    after_one = read_newest(train("one", "run.epochs=1", "data.limit=8")).model
    start = read_newest(train("start", "run.epochs=1", "data.limit=8", "optim.lr=1e-30")).model
    name = "backbone.conv_stem.weight"
    first, fast = start[f"host.{name}"], after_one[f"host.{name}"]
    expected = momentum * first + (1 - momentum) * fast
    torch.testing.assert_close(after_one[f"method.target.{name}"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_example_goes_on_where_it_was_stopped(train, monkeypatch, parts):
    accumulate = f"run.accumulate={parts}"
    whole = train("whole", accumulate)
    with monkeypatch.context() as patch:
        stepper = loop.Step.__call__

        def stopped(self, given, *, number, watch=False, stop=0):
            return stepper(self, given, number=number, watch=watch, stop=15 if number == 3 else 0)

        patch.setattr(loop.Step, "__call__", stopped)
        with pytest.raises(Preempted):
            train("parts", accumulate)
    run = train("parts", accumulate, resume=True)
    assert losses(run) == losses(whole)
    found, expected = read_newest(run).model, read_newest(whole).model
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.startswith("method.target") for name in expected)
