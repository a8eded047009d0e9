"""One step: it never waits for the device, compiles to the same, and keeps the memory it freed."""

import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from edgecl.nets.carving import create_slimmable
from edgecl.train.step import Step


def make_step(recipe, steps_per_epoch=5):
    torch.manual_seed(0)
    net = create_slimmable(recipe)
    return Step(recipe, net=net, accelerator=Accelerator(cpu=True), steps_per_epoch=steps_per_epoch)


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


@pytest.mark.parametrize("setting", ["optim.clip_norm=5.0", "run.accumulate=2", "optim.name='lars'"])
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


def test_parts_take_the_whole_batchs_gradient(make_recipe):
    """Without batch norm in training mode the parts see what the whole sees, and the steps are equal."""

    def gradients(setting):
        step = make_step(make_recipe(setting, "optim.name='sgd'"))
        step.passes.train = lambda mode=True: step.passes  # stay in evaluation: fixed statistics
        step.net.eval()
        seen = {}
        step.optimizer.step = lambda: seen.update(
            {name: parameter.grad.clone() for name, parameter in step.net.named_parameters()}
        )
        step(views(), number=0)
        return seen

    whole, parts = gradients("run.accumulate=1"), gradients("run.accumulate=4")
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    assert largest > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_passes_train_alike(make_recipe):
    losses = {}
    for compiled in ("false", "true"):
        step = make_step(make_recipe("optim.name='sgd'", "optim.lr=1e-5", f"run.compile={compiled}"))
        losses[compiled] = [float(step(views(), number=number).losses.total.detach()) for number in range(3)]
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
