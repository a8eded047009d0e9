"""Norms over all processes are the same norm over the whole batch, in outputs, gradients and running statistics.

Every process holds the whole batch, runs torch's or timm's own norm on it, and compares its share of the result with what
the synchronized norm makes of its share of the batch. Differences are relative to the largest number of a tensor.
"""

import json

import pytest
import torch
from nets.conftest import slim_encoder
from torch import nn
from worlds import run_script

from edgecl.nets.sync_norms import GlobalBatchNorm, sum_over_processes, synchronize_norms

SCRIPT = """
import copy, json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.jit")
warnings.filterwarnings("ignore", category=DeprecationWarning, message="`torch.jit")
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from worlds import fork_world

from edgecl.distributed import processes
from edgecl.errors import RecipeError
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import SlimmableNet
from edgecl.nets.sync_norms import GlobalBatchNorm, sum_over_processes, synchronize_norms

CHANNELS = 5


def make(name):
    torch.manual_seed(0)
    if name == "1d":
        norm = nn.BatchNorm1d(CHANNELS)
    elif name == "act":
        norm = BatchNormAct2d(CHANNELS, act_layer=nn.Hardswish, drop_layer=None)
    elif name == "weighted act":
        norm = BatchNormAct2d(CHANNELS, act_layer=nn.PReLU)
    elif name == "no act":
        norm = BatchNormAct2d(CHANNELS, apply_act=False)
    elif name == "not affine":
        norm = nn.BatchNorm2d(CHANNELS, affine=False)
    elif name == "average":
        norm = nn.BatchNorm2d(CHANNELS, momentum=None, eps=1e-3)
    else:
        norm = nn.BatchNorm2d(CHANNELS, momentum=0.3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
        norm.running_mean.uniform_(-1, 1)
    if name in ("float64", "offset float64"):
        norm.double()
    if name == "frozen":
        norm.track_running_stats = False
    if name == "evaluation":
        norm.eval()
    return norm


def batch_for(name):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, CHANNELS, *(() if name == "1d" else (3, 3)), generator=generator)
    # Shares differ in mean and scale, so that statistics of one share are wrong for the whole.
    ramp = torch.linspace(0, 3, 24).view(-1, *(1,) * (x.ndim - 1))
    x = x * (1 + ramp) - 2 * ramp
    if "offset" in name:
        x = x + 1000
    if name == "dead channel":
        x[:, 2] = 0
    if "float64" in name:
        x = x.double()
    if name == "bfloat16":
        x = x.bfloat16()
    if name == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randn(x.shape, generator=generator).to(x.dtype)


def run(norm, x, pull):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for _ in range(2):  # the second time, running statistics are not at their start
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            y = norm(x)
    (y * pull).sum().backward()
    return y, x.grad, {name: p.grad for name, p in norm.named_parameters()}, dict(norm.named_buffers())


def difference(found, expected):
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def compare(name, rank, processes_, wrap):
    x, pull = batch_for(name)
    share = slice(rank * 24 // processes_, (rank + 1) * 24 // processes_)
    y, pull_x, pulls, buffers = run(make(name), x, pull)
    norm = wrap(make(name))
    found_y, found_x, found_pulls, found_buffers = run(norm, x[share], pull[share])
    assert found_y.is_contiguous(memory_format=torch.channels_last) or name != "channels last"
    parameters = {}
    for leaf in pulls:
        torch.distributed.all_reduce(found_pulls[leaf])
        parameters[leaf] = difference(found_pulls[leaf], pulls[leaf])
    return {
        "outputs": difference(found_y, y[share]),
        "inputs": difference(found_x, pull_x[share]),
        "parameters": max(parameters.values(), default=0.0),
        "statistics": max(difference(found_buffers[leaf], buffers[leaf]) for leaf in buffers),
        "tracked": difference(found_buffers["running_mean"], make(name).running_mean) > 0,
        "names": list(pulls) == list(found_pulls) and list(buffers) == list(found_buffers),
    }


def build(width):
    return Encoder("mobilenetv3_small_050", width=width, projector=[16, 16, 8], stem_stride=1)


class OddNorm(nn.BatchNorm2d):
    pass


def on_a_net():
    torch.manual_seed(0)
    net = SlimmableNet(build, host_width=1.5, slim_width=1.0, other_widths=[0.75])
    before = net.state_dict(keep_vars=True)
    found = {}
    for which in ("none", "projector", "all"):
        other = copy.deepcopy(net)
        pointers = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
        synchronize_norms(other, which=which, device=torch.device("cpu"))
        after = other.state_dict()
        found[which] = {
            "same tensors in the same places": {n: t.data_ptr() for n, t in after.items()} == pointers,
            "same order": list(after) == list(before),
            "parameters": len(list(other.parameters())) == len(list(net.parameters())),
            "host": sorted(n for n, m in other.host.named_modules() if isinstance(m, GlobalBatchNorm)),
            "slim": sorted(
                name for width in other.slim_widths for name, norm in other.norms_of(width).items()
                if isinstance(norm, GlobalBatchNorm)
            ),
            "norms": sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.host.modules()),
        }
    odd = SlimmableNet(
        lambda width: nn.Sequential(nn.Conv2d(3, 8, 3), OddNorm(8), nn.Flatten(1)), host_width=1.0, slim_width=1.0
    )
    try:
        synchronize_norms(odd, which="all", device=torch.device("cpu"))
    except RecipeError as error:
        found["odd"] = str(error)
    return found


def main():
    processes.join("cpu")
    rank, count = processes.rank(), processes.world_size()
    results = {"sum": sum_over_processes(torch.tensor([1.0 + rank])).tolist()}
    for name in NAMES:
        results[name] = compare(name, rank, count, GlobalBatchNorm)
    results["local"] = compare("2d", rank, count, lambda norm: norm)
    if count == 2:
        results["net"] = on_a_net()
    with open(f"{sys.argv[1]}/{count}-{rank}.json", "w") as file:
        json.dump(results, file)
    processes.leave()


for count in (2, 4):
    fork_world(main, count)
"""

# Name of a case -> what outputs, gradients and statistics may differ by.
FLOAT32, FLOAT64 = 2e-6, 1e-13
CASES = {
    "1d": FLOAT32,
    "2d": FLOAT32,
    "act": FLOAT32,
    "weighted act": FLOAT32,
    "no act": FLOAT32,
    "not affine": FLOAT32,
    "average": FLOAT32,
    "channels last": FLOAT32,
    "dead channel": FLOAT32,
    "frozen": FLOAT32,
    "evaluation": FLOAT32,
    "float64": FLOAT64,
    # Its own rounding: the offset takes three digits off each number before any norm sees it.
    "offset": 1e-3,
    "offset float64": 1e-10,
    # Half a unit in the last of bfloat16's places.
    "bfloat16": 2**-8,
}
RANKS = ["2-0", "2-1", "4-0", "4-1", "4-2", "4-3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("norms")
    script = folder / "norms.py"
    script.write_text(SCRIPT.replace("NAMES", repr(list(CASES))), encoding="utf-8")
    run_script(script, folder)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in RANKS}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_norm_of_a_share_is_the_norm_of_the_whole_batch(results, case, rank):
    found = results[rank][case]
    for what in ("outputs", "inputs", "parameters", "statistics"):
        assert found[what] <= CASES[case], what
    assert found["names"]


@pytest.mark.parametrize("rank", RANKS)
def test_frozen_and_evaluating_norms_leave_the_statistics_alone(results, rank):
    tracked = {case for case in CASES if results[rank][case]["tracked"]}
    assert tracked == CASES.keys() - {"frozen", "evaluation"}


@pytest.mark.parametrize("rank", RANKS)
def test_norm_of_a_share_alone_is_another(results, rank):
    """The comparison would see a norm that is not synchronized."""
    local = results[rank]["local"]
    for what in ("outputs", "inputs", "statistics"):
        assert local[what] > 0.05, what


def test_sum_over_processes(results):
    assert {tuple(results[rank]["sum"]) for rank in RANKS if rank[0] == "2"} == {(3.0,)}
    assert {tuple(results[rank]["sum"]) for rank in RANKS if rank[0] == "4"} == {(10.0,)}


@pytest.mark.parametrize("which", ["none", "projector", "all"])
def test_tensors_of_a_net_keep_their_names_order_and_memory(results, which):
    net = results["2-1"]["net"][which]
    assert net["same tensors in the same places"]
    assert net["same order"]
    assert net["parameters"]


def test_norms_that_were_asked_for_are_synchronized_in_host_and_in_every_width(results):
    net = results["2-0"]["net"]
    assert (net["none"]["host"], net["none"]["slim"]) == ([], [])
    assert net["projector"]["host"] == ["projector.1", "projector.4"]
    assert net["projector"]["slim"] == ["projector/1"] * 2 + ["projector/4"] * 2
    assert len(net["all"]["host"]) == net["all"]["norms"] > 20
    assert len(net["all"]["slim"]) == 2 * net["all"]["norms"]


def test_norm_of_an_unknown_kind_is_named(results):
    assert results["2-0"]["net"]["odd"] == (
        "the norm 'host.1' is a OddNorm, which has no form with statistics over all processes\n"
        "  hint: set run.sync_norms to 'projector' or 'none', or choose another net"
    )


# --- one process ---


def test_alone_nothing_is_replaced():
    net = slim_encoder("mobilenetv3_small_050", 1.0, 1.0)
    synchronize_norms(net, which="all", device=torch.device("cpu"))
    assert not any(isinstance(module, GlobalBatchNorm) for module in net.modules())


def test_alone_the_norm_is_the_one_it_was_made_from():
    x = torch.randn(6, 4, 3, 3)
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4)
    expected, running = plain(x), plain.running_var.clone()
    plain.reset_running_stats()
    norm = GlobalBatchNorm(plain)
    assert torch.equal(norm(x), expected)
    assert torch.equal(plain.running_var, running)
    assert norm.running_var is plain.running_var
    assert sum_over_processes(x) is x
