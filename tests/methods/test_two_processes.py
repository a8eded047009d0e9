"""Two processes with half a batch each learn what one process learns from the whole batch."""

import os
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import save_file
from torch import nn

from edgecl.methods.sacl_xd import Passes, SaclXd
from edgecl.nets.slimming import SlimmableNet

ARMS = {
    "Barlow Twins": (1.0, 1.0, "both", False),
    "XD only": (1.0, 0.7, "both", False),
    "SACL only": (2.0, 1.0, "both", False),
    "SACL-XD": (2.0, 0.7, "both", False),
    "SACL-XD slim_only": (2.0, 0.7, "slim_only", False),
    "SACL-XD dense": (2.0, 0.7, "both", True),
}


def encoder(width):
    hidden = int(8 * width)
    pool = nn.AdaptiveAvgPool2d(2)
    # No bias at the end: it moves the mean only, which the loss takes away, and its gradient is rounding.
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, 6, bias=False))


def main(processes, rank):
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(3)
    view_a = torch.randn(24, 3, 4, 4, generator=generator)
    view_b = view_a + 0.5 * torch.randn(view_a.shape, generator=generator)
    # Shares differ in mean and scale, so that statistics of one share are wrong for the whole.
    view_a[12:] = 3 * view_a[12:] + 1
    share = slice(rank * 24 // processes, (rank + 1) * 24 // processes)
    results = {}
    for arm, (width, alpha, direction, dense) in ARMS.items():
        torch.manual_seed(0)
        net = SlimmableNet(encoder, host_width=width, slim_width=1.0)
        method = SaclXd(alpha=alpha, off_diagonal=0.05, xd_direction=direction)
        passes = Passes(net, method)
        run = nn.parallel.DistributedDataParallel(passes) if processes > 1 else passes
        losses = method.losses(run(view_a[share], view_b[share], dense))
        losses.total.backward()
        results[arm + "/loss"] = losses.total.detach()
        results[arm + "/off_diagonal_rms"] = losses.off_diagonal_rms
        if processes == 1:
            results[arm + "/loss of a share"] = method.losses(run(view_a[:12], view_b[:12], dense)).total.detach()
        for name, parameter in net.named_parameters():
            results[f"{arm}/{name}"] = parameter.grad
    save_file(results, f"{sys.argv[1]}/{processes}-{rank}.safetensors")
    if processes > 1:
        torch.distributed.destroy_process_group()


if os.environ["RANK"] == "0":
    main(1, 0)
main(2, int(os.environ["RANK"]))
"""

ARMS = ["Barlow Twins", "XD only", "SACL only", "SACL-XD", "SACL-XD slim_only", "SACL-XD dense"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "processes.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(script), str(folder)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    running = [start(0), start(1)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return {name: load_file(folder / f"{name}.safetensors") for name in ("2-0", "2-1", "1-0")}


def relative_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("rank", ["2-0", "2-1"])
@pytest.mark.parametrize("arm", ARMS)
def test_loss_of_each_process_is_that_of_the_whole_batch(results, arm, rank):
    for name in (f"{arm}/loss", f"{arm}/off_diagonal_rms"):
        assert relative_difference(results[rank][name], results["1-0"][name]) <= 1e-5


@pytest.mark.parametrize("rank", ["2-0", "2-1"])
@pytest.mark.parametrize("arm", ARMS)
def test_gradients_of_each_process_are_those_of_the_whole_batch(results, arm, rank):
    gradients = {name for name in results["1-0"] if name.startswith(f"{arm}/host")}
    assert len(gradients) == 3
    for name in gradients:
        assert relative_difference(results[rank][name], results["1-0"][name]) <= 1e-5


@pytest.mark.parametrize("arm", ARMS)
def test_a_share_alone_has_another_loss(results, arm):
    alone = results["1-0"]
    assert relative_difference(alone[f"{arm}/loss of a share"], alone[f"{arm}/loss"]) > 1e-2
