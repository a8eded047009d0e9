"""One step: it never waits for the device, compiles to the same, and keeps the memory it freed."""

import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from edgecl.methods.losses import CodingRate
from edgecl.methods.method import Embeddings
from edgecl.nets.build import create_slimmable
from edgecl.train.step import create_step

from .conftest import assert_close_gradients, gradients_of


def make_step(recipe, steps_per_epoch=5):
    torch.manual_seed(0)
    net = create_slimmable(recipe)
    return create_step(recipe, net, accelerator=Accelerator(cpu=True), steps_per_epoch=steps_per_epoch)


def views(count=8):
    return torch.randn(2, count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class HostReads(TorchDispatchMode):
    """Counts the places where a device's number becomes one of Python's, for which a GPU's queue must drain."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*arguments, **(named or {}))


@pytest.mark.parametrize(
    "setting",
    [
        "optim.clip_norm=5.0",
        "run.accumulate=2",
        "optim.name='lars'",
        "method.coding_rate.weight=0.1",
        "method.loss='simclr'",
    ],
)
def test_no_number_is_read_within_a_step(make_recipe, setting):
    step = make_step(make_recipe(setting))
    step(views(), number=0)
    with HostReads() as reads:
        outcome = step(views(), number=1)
    assert reads.count == 0
    assert outcome.finite
    # The check can fail: a record reads.
    with HostReads() as reads:
        step(views(), number=2, watch=True)
    assert reads.count > 0


EVERYTHING = ["method.coding_rate.weight=0.2", "method.symmetric=true", "method.learn_targets=true"]
WAYS = {
    "SACL-XD": [],
    "coding rate": ["method.coding_rate.weight=0.2"],
    "learnt targets": ["method.learn_targets=true"],
    "symmetric": ["method.symmetric=true"],
    "symmetric, slim_only": ["method.symmetric=true", "method.xd_direction='slim_only'"],
    "all of them": EVERYTHING,
    "one net": ["host.width=0.5", *EVERYTHING],
    "one net, frozen targets": ["host.width=0.5"],
    "slow start": ["slim.slow_start=1.0", *EVERYTHING],
    "SimCLR": ["method.loss='simclr'"],
    "several widths": ["slim.widths=[0.5, 0.35]", *EVERYTHING],
}


@pytest.mark.parametrize("way", WAYS)
def test_parts_take_the_whole_batchs_gradient(make_recipe, way):
    """Without batch norm in training mode the parts see what the whole sees, and the steps are equal."""
    given = [*views(), *(view[..., :16, :16] for view in views())]

    (whole, expected), (parts, found) = (
        gradients_of(make_step(make_recipe(setting, "optim.name='sgd'", *WAYS[way])), given)
        for setting in ("run.accumulate=1", "run.accumulate=4")
    )
    for name, norm in whole.gradient_norms.items():
        assert (parts.gradient_norms[name] or 0.0) == pytest.approx(norm or 0.0, rel=1e-3, abs=1e-4), name
    assert_close_gradients(found, expected, rtol=1e-3, atol=1e-5)


def test_the_norm_of_the_slim_nets_gradient_is_of_all_its_passes(make_recipe):
    """Against differentiating by the slim passes alone: those of view A, view B and the local ones."""
    step = make_step(make_recipe("method.symmetric=true", "method.swap_views=0.0", "optim.name='sgd'"))
    given = [*views(), *(view[..., :16, :16] for view in views())]
    step.optimizer.step = lambda: None
    net = step.net
    net.watched = {}
    step.method.loss(step.method(given, 0), 0)[0].backward()
    watched, net.watched = net.watched, None
    slim = net._views[net.slim_width].index
    net.zero_grad()
    learnt, _ = step.method(given, 0)
    cut = {name: z.detach() if name.startswith("host") else z for name, z in learnt.items()}
    step.method.loss(Embeddings(cut, {}), 0)[0].backward()
    host = dict(net.host.named_parameters())
    for name, gradient in watched.items():
        expected = host[name].grad[slim[name]]
        torch.testing.assert_close(
            gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6, msg=name
        )


@pytest.mark.parametrize(
    ("until", "expected"), [(None, [0.4] * 4), (1.0, [0.4, 0.3, 0.2, 0.1]), (0.5, [0.4, 0.2, 0.0, 0.0])]
)
def test_the_weight_of_the_rate_is_constant_or_falls_in_a_line_to_nothing(until, expected):
    setting = CodingRate(weight=0.4, until=until)
    found = [setting.weight_at(step, total_steps=4) for step in range(4)]
    assert found == pytest.approx(expected)


def test_a_step_takes_the_rate_of_its_number(make_recipe):
    recipe = make_recipe(
        "method.coding_rate.weight=0.5",
        "method.coding_rate.until=0.5",
        "method.swap_views=0.0",
        "optim.lr=1e-9",
    )
    step = make_step(recipe)  # ten steps
    outcomes = [step(views(), number=number) for number in (0, 4, 5)]
    assert outcomes[2].terms["coding_rate"] is None
    plain = float(outcomes[2].loss.detach())
    for outcome, weight in zip(outcomes, (0.5, 0.1), strict=False):
        pulled = weight * float(outcome.terms["coding_rate"])
        assert float(outcome.loss.detach()) == pytest.approx(plain - pulled, abs=1e-4 * pulled)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_passes_train_alike(make_recipe):
    losses = {}
    for compiled in ("false", "true"):
        step = make_step(make_recipe("optim.name='sgd'", "optim.lr=1e-5", f"run.compile={compiled}"))
        losses[compiled] = [float(step(views(), number=number).loss.detach()) for number in range(3)]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)


def faults(*, keep):
    """Count page faults of taking and giving back 64 MiB 20 times, in a process of its own."""
    script = (
        "import resource, torch\n"
        "from edgecl.train.allocator import keep_freed_memory\n"
        f"keep_freed_memory() if {keep} else None\n"
        "take = lambda: torch.ones(1 << 24)\n"
        "for _ in range(10): take()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): take()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_freed_memory_is_kept():
    usual, kept = faults(keep=False), faults(keep=True)
    assert usual > 1000
    assert kept < usual / 10
