"""A run small enough to make many of: 40 pictures of 32 pixels, a net of five blocks, two epochs of five steps."""

import numpy as np
import pytest
import torch
from PIL import Image

from edgecl.config.recipe import recipe_from_tables
from edgecl.config.settings import override
from edgecl.errors import Preempted
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.train.monitor import read_metrics
from edgecl.train.pretrain import pretrain
from edgecl.train.step import Step


@pytest.fixture(autouse=True)
def one_thread():
    """Keep to one thread, so that sums are taken in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def index_at_once(monkeypatch):
    """Keep an index of a folder also when it has just been written."""
    monkeypatch.setattr("edgecl.data.index._RACY_NS", 0)


TABLES = {
    "host": {"arch": "test_efficientnet", "width": 0.75, "stem_stride": 2},
    "slim": {"width": 0.5},
    "projector": {"sizes": [16, 16]},
    "method": {"alpha": 0.9, "off_diagonal": 0.05},
    "data": {"image_size": 32, "batch_size": 8},
    "optim": {"name": "adamw", "lr": 1e-3, "warmup_epochs": 0.5},
    "run": {"epochs": 2, "log_every": 1, "quality_epochs": 1},
}

ARMS = {
    "Barlow Twins": ["host.width=0.5", "method.alpha=1.0"],
    "XD only": ["host.width=0.5"],
    "SACL only": ["method.alpha=1.0"],
    "SACL-XD": [],
}


@pytest.fixture(scope="session")
def tables():
    return TABLES


@pytest.fixture(scope="session")
def arm_settings():
    return ARMS


@pytest.fixture(scope="session")
def make_recipe():
    """Make the tiny recipe with assignments as `--set` takes them."""

    def make(*assignments):
        from edgecl.errors import RecipeError

        return recipe_from_tables(override(TABLES, list(assignments), error=RecipeError), source="test")

    return make


def train(recipe, out, data, **settings):
    return pretrain(recipe, recipe_name="tiny", out=out, data=str(data), device="cpu", **settings)


def train_until(step, recipe, out, data):
    """Train until SIGTERM comes during a step, which is the last one then."""
    take = Step.__call__

    def stopped(self, views, *, number, watch=False, stop=0):
        return take(self, views, number=number, watch=watch, stop=15 if number + 1 == step else stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", stopped)
        with pytest.raises(Preempted, match=rf"stopped by SIGTERM after step {step} of \d+, and saved"):
            train(recipe, out, data)


def steps_of(path):
    return [record for record in read_metrics(path / "metrics.jsonl") if "loss" in record]


def looks_of(path):
    return [record for record in read_metrics(path / "metrics.jsonl") if "rankme_host" in record]


def events_of(path):
    return [record for record in read_metrics(path / "metrics.jsonl") if "event" in record]


def without_clock(path):
    return [
        {key: value for key, value in record.items() if key != "images_per_s"}
        for record in read_metrics(path / "metrics.jsonl")
    ]


def assert_same_run(one, other):
    """Hold two runs to the same weights, moments and metrics, bit for bit."""
    first, second = (read_newest(RunDir(path)) for path in (one, other))
    assert (first.step, first.epoch, first.state) == (second.step, second.epoch, second.state)
    assert_same_state(first, second)
    assert without_clock(one) == without_clock(other)


def assert_same_state(first, second):
    """Hold two checkpoints to the same weights and moments, bit for bit."""
    assert first.model.keys() == second.model.keys()
    assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)
    assert first.optimizer["param_groups"] == second.optimizer["param_groups"]
    for index, entries in first.optimizer["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, second.optimizer["state"][index][key])


def gradients_of(step, views):
    """Take a step in evaluation, where parts see what the whole sees; give its outcome and every gradient."""
    step.method.eval()
    step.passes.train = lambda mode=True: step.passes
    seen = {}
    step.optimizer.step = lambda: seen.update(
        {key: one.grad.clone() for key, one in step.method.named_parameters() if one.grad is not None}
    )
    return step(views, number=0, watch=True), seen


def assert_close_gradients(found, expected, *, rtol, atol):
    """Hold gradients to others; what is absolute is relative to the largest."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=rtol, atol=atol * largest, msg=key)


def write_pictures(root, count, classes=()):
    random = np.random.default_rng(0)
    for index in range(count):
        place = root / classes[index % len(classes)] if classes else root
        place.mkdir(parents=True, exist_ok=True)
        corners = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((32, 32)).save(place / f"{index:03}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 pictures without labels."""
    return write_pictures(tmp_path_factory.mktemp("data") / "plain", 40)


@pytest.fixture(scope="session")
def labelled_pictures(tmp_path_factory):
    """A folder of 40 pictures in two classes."""
    return write_pictures(tmp_path_factory.mktemp("data") / "classes", 40, ("cat", "dog"))
