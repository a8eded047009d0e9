"""Compare a SACL-XD step by prefix slices with one by weight masks and with its bare passes; a table and one JSON line.

    python benchmarks/step.py --core 1                                      # three nets on one core: some ten minutes
    python benchmarks/step.py --device cuda --size 224 --batch 256 --precision bf16 --compile
    python benchmarks/step.py --recipe demo --core 1                        # a recipe's step, convolved in two ways

All ways to make a step live in one process and take turns, one step each per round, every other round backwards, so
that whatever else the machine does meets all of them. On a CPU it is processor time that is compared: on a quiet machine
that is the time on the clock, on a busy one it leaves out the waiting for other processes. A ratio is the median over
rounds of the ratios within a round.

| way          | what it is                                                                                            |
| ------------ | ----------------------------------------------------------------------------------------------------- |
| slices       | edgecl's own step (edgecl.train.step): passes, losses, backward, optimizer and all it watches         |
| compiled     | the same with `run.compile`, when asked for                                                           |
| masks        | the same step as the authors' public fork makes it: the slim net is the host times zeros and ones     |
| plain nets   | the same step by two nets that share nothing: what passes, losses and optimizer cost without edgecl   |
| four passes  | host(A) and slim(B) there and back, slim(A) and host(B) without gradient, one after the other         |
| losses       | the three losses of given projections, there and back                                                 |
| optimizer    | the optimizer's step for given gradients                                                              |
| Barlow Twins | a whole step of the slim net alone                                                                    |

Before anything is timed, slices, masks and plain nets must agree on the loss, and slices and masks on the gradient of
the host and on the loss after the step. Images are random: they decide no speed.

With `--recipe` it is that recipe's step, on a CPU, that is timed in two ways: by torch's convolutions alone, and with
small maps as matrix products (edgecl.nets.small_maps), as edgecl trains. With ONEDNN_MAX_CPU_ISA=AVX2 and
ATEN_CPU_CAPABILITY=avx2 in the environment torch plays a processor without AVX-512.

The exit status is 1 where the ways disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from accelerate import Accelerator
from timing import conditions_of, in_turns, options_of, ratio_of, table
from torch import Tensor, nn
from torch.func import functional_call

from edgecl.config.recipe import Recipe, read_recipe, recipe_from_tables
from edgecl.evaluate.cost import forward_cost
from edgecl.methods.method import Embeddings, create_method
from edgecl.nets.backbone import is_norm
from edgecl.nets.build import create_slimmable
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import SlimmableNet
from edgecl.train.allocator import keep_freed_memory
from edgecl.train.optim import create_optimizer
from edgecl.train.step import create_step

NETS = ("mobilenetv1_100", "mobilenetv3_large_100", "efficientnet_b0")
HOST_WIDTH, SLIM_WIDTH = 1.5, 1.0
# How far the ways may be apart, as fractions: the same sums of float32 or bfloat16 numbers, in other orders.
TOLERANCE = {
    "fp32": {"loss": 1e-3, "gradient": 1e-2, "next loss": 1e-2},
    "bf16": {"loss": 2e-2, "gradient": 0.3, "next loss": 5e-2},
}


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--nets", nargs="+", default=list(NETS))
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--size", type=int, default=96, help="height and width of the images")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--projector", type=int, nargs="+", default=[512, 512, 512])
    options.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options.add_argument("--compile", action="store_true", help="time the compiled step, too")
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument(
        "--default-allocator",
        action="store_true",
        help="leave glibc as it is, which pretrain on a CPU does not",
    )
    options.add_argument(
        "--recipe", help="time this recipe's step with and without small maps' own convolutions"
    )
    options.add_argument("--core", type=int, help="pin to this core [default: leave it to the system]")
    given = options.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    torch.set_num_threads(given.threads)
    if given.device == "cpu" and not given.default_allocator:
        keep_freed_memory()  # as pretrain does
    load_before = os.getloadavg()[0]
    if given.recipe is not None:
        small_maps(given, load_before)
        return
    results = {}
    for arch in given.nets:
        print(f"{arch}: measuring", file=sys.stderr, flush=True)
        results[arch] = measure(arch, given)
    conditions = describe(given, load_before)
    print_tables(results, conditions)
    print(json.dumps({"benchmark": "step", "conditions": conditions, "results": results}))


def recipe_for(arch: str, given: argparse.Namespace, *, compiled: bool = False) -> Recipe:
    """Return the recipe whose step is timed; a long run, so that the rate of learning hardly moves."""
    return recipe_from_tables(
        {
            "host": {"arch": arch, "width": HOST_WIDTH},
            "slim": {"width": SLIM_WIDTH},
            "projector": {"sizes": given.projector},
            # Of random views every order is as good.
            "method": {"swap_views": 0.0},
            "data": {"image_size": given.size, "batch_size": given.batch},
            "optim": {"name": "lars", "lr": 0.1},
            "run": {"precision": given.precision, "compile": compiled, "epochs": 1000},
        },
        source="benchmarks/step.py",
    )


class MaskedNet(nn.Module):
    """The same host and slim net by masks: every pass costs what the host costs.

    The authors' fork multiplies convolutions by zeros and ones and lets norms turn the zeros into their biases.
    Here the slim pass has norms of its own, masked too, so that it computes what the slices compute.
    """

    def __init__(self, net: SlimmableNet):
        super().__init__()
        self.host = copy.deepcopy(net.host)
        self.slim_width, self.slim_widths, self.has_slim = net.slim_width, net.slim_widths, True
        self.norms = nn.ModuleDict()
        slim = net.slim_tensors()
        for name, module in self.host.named_modules():
            if not is_norm(module):
                continue
            norm = copy.deepcopy(module)
            with torch.no_grad():
                for leaf, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                    part = slim[f"{name}.{leaf}"]
                    tensor[tuple(slice(0, size) for size in part.shape)] = part
            self.norms[name.replace(".", "/")] = norm
        self._masks: dict[str, Tensor] = {}
        for name, tensor in self.host.named_parameters():
            if slim[name].shape != tensor.shape:
                mask = torch.zeros_like(tensor)
                mask[tuple(slice(0, size) for size in slim[name].shape)] = 1
                self._masks[name] = mask

    def forward_host(self, images: Tensor) -> Tensor:
        return self.host(images)

    def forward_slim(self, images: Tensor, width: float | None = None) -> Tensor:
        tensors = {**dict(self.host.named_parameters()), **dict(self.host.named_buffers())}
        for key, norm in self.norms.items():
            for leaf, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                tensors[f"{key.replace('/', '.')}.{leaf}"] = tensor
        for name, mask in self._masks.items():
            tensors[name] = tensors[name] * mask
        return functional_call(self.host, tensors, (images,))

    frozen, untracked = SlimmableNet.frozen, SlimmableNet.untracked


class PlainNets(nn.Module):
    """A host, and a slim net with weights of its own."""

    def __init__(
        self, net: SlimmableNet, build: Callable[[float], nn.Module], memory_format: torch.memory_format
    ):
        super().__init__()
        self.host = copy.deepcopy(net.host)
        self.slim_width, self.slim_widths, self.has_slim = net.slim_width, net.slim_widths, True
        self.slim = build(net.slim_width).to(memory_format=memory_format)
        self.slim.load_state_dict(net.slim_tensors())
        # As many tensors as edgecl's step changes.
        self.changed = nn.ModuleList(
            [self.host, *(module for module in self.slim.modules() if is_norm(module))]
        )

    def forward_host(self, images: Tensor) -> Tensor:
        return self.host(images)

    def forward_slim(self, images: Tensor, width: float | None = None) -> Tensor:
        return self.slim(images)

    frozen, untracked = SlimmableNet.frozen, SlimmableNet.untracked


class Ways:
    """Every way to make a step, of one net, from the same weights and images."""

    def __init__(self, arch: str, given: argparse.Namespace):
        self.recipe = recipe_for(arch, given)
        self.device = torch.device(given.device)
        self.precision = given.precision
        torch.manual_seed(0)
        net = create_slimmable(self.recipe)
        twin = copy.deepcopy(net) if given.compile else None
        steps = 1_000_000
        accelerator = Accelerator(
            cpu=given.device == "cpu", mixed_precision="no" if given.precision == "fp32" else given.precision
        )
        self.step = create_step(self.recipe, net, accelerator=accelerator, steps_per_epoch=steps)
        self.compiled = None
        if twin is not None:
            self.compiled = create_step(
                recipe_for(arch, given, compiled=True),
                twin,
                accelerator=accelerator,
                steps_per_epoch=steps,
            )
        layout = torch.channels_last
        self.masked = MaskedNet(net).to(self.device).train()

        def build(width: float) -> nn.Module:
            return Encoder(arch, width=width, projector=given.projector)

        self.plain = PlainNets(net, build, layout).to(self.device).train()
        self.methods = {
            one: create_method(self.recipe, one, steps_per_epoch=steps)
            for one in (net, self.masked, self.plain)
        }
        self.twins = copy.deepcopy(self.plain.slim)
        self._masked_optimizer = self._optimizer(self.masked)
        self._plain_optimizer = self._optimizer(self.plain.changed)
        self._twins_optimizer = self._optimizer(self.twins)
        shape = (given.batch, 3, given.size, given.size)
        self.views = tuple(
            torch.randn(shape).to(self.device).contiguous(memory_format=layout) for _ in range(2)
        )
        self._pull = torch.randn(given.batch, given.projector[-1], device=self.device)
        self._projections = torch.randn(4, *self._pull.shape, device=self.device)
        self._gradients = [torch.randn_like(parameter) for parameter in self.plain.changed.parameters()]
        self.number = 0

    def _optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return create_optimizer(net, self.recipe.optim, batch_size=self.recipe.data.batch_size)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def slices(self) -> Tensor:
        outcome = self.step(self.views, number=self.number)
        self.number += 1
        return outcome.loss.detach()

    def by_compiled(self) -> Tensor:
        assert self.compiled
        return self.compiled(self.views, number=self.number).loss.detach()

    def masks(self) -> Tensor:
        return self._whole(self.masked, self.masked, self._masked_optimizer)

    def plain_nets(self) -> Tensor:
        return self._whole(self.plain, self.plain, self._plain_optimizer)

    def _whole(self, net, module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        loss = self.loss_of(net)
        loss.backward()
        optimizer.step()
        _forget(module)
        return loss.detach()

    def loss_of(self, net) -> Tensor:
        method = self.methods[net]
        with self._autocast():
            embeddings = method(self.views, 0)
        return method.loss(embeddings, 0)[0]

    def four_passes(self) -> None:
        view_a, view_b = self.views
        for run, view in ((self.plain.host, view_a), (self.plain.slim, view_b)):
            with self._autocast():
                projections = run(view)
            projections.backward(self._pull.to(projections.dtype))
        with self.plain.frozen(), self._autocast():
            self.plain.slim(view_a)
            self.plain.host(view_b)
        _forget(self.plain)

    def losses(self) -> None:
        z_a, z_b, frozen_a, frozen_b = (z.clone() for z in self._projections)
        learnt = {"host_a": z_a.requires_grad_(), "slim_b": z_b.requires_grad_()}
        given = Embeddings(learnt, {"slim_a": frozen_a, "host_b": frozen_b})
        self.step.method.loss(given, 0)[0].backward()

    def optimizer(self) -> None:
        for parameter, gradient in zip(self.plain.changed.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        self._plain_optimizer.step()
        _forget(self.plain)

    def barlow_twins(self) -> Tensor:
        with self._autocast():
            z_a, z_b = (self.twins(view) for view in self.views)
        loss = self.recipe.method.scale * self.step.method.compare(z_a, z_b)
        loss.backward()
        self._twins_optimizer.step()
        _forget(self.twins)
        return loss.detach()

    def all(self) -> dict[str, Callable[[], object]]:
        ways: dict[str, Callable[[], object]] = {"slices": self.slices}
        if self.compiled:
            ways["compiled"] = self.by_compiled
        return {
            **ways,
            "masks": self.masks,
            "plain nets": self.plain_nets,
            "four passes": self.four_passes,
            "losses": self.losses,
            "optimizer": self.optimizer,
            "Barlow Twins": self.barlow_twins,
        }


def _forget(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad = None


def check_agreement(ways: Ways) -> dict[str, float]:
    """Hold the ways to computing the same before they are timed; this takes their first step.

    Returns:
        how far they are apart, as fractions.
    """
    net = ways.step.net
    with copies_of_statistics(net, ways.masked, ways.plain):
        losses = {
            name: ways.loss_of(other)
            for name, other in (("slices", net), ("masks", ways.masked), ("plain", ways.plain))
        }
        found = {
            "loss": apart(losses["slices"], losses["masks"]),
            "loss of plain nets": apart(losses["slices"], losses["plain"]),
        }
        losses["slices"].backward()
        losses["masks"].backward()
        ours, theirs = (
            torch.cat(
                [parameter.grad.flatten() for parameter in host.parameters() if parameter.grad is not None]
            )
            for host in (net.host, ways.masked.host)
        )
        found["gradient"] = apart(ours, theirs)
        for module in (net, ways.masked, ways.plain):
            _forget(module)
    ways.slices()
    ways.masks()
    found["next loss"] = apart(ways.slices(), ways.masks())
    allowed = {**TOLERANCE[ways.precision], "loss of plain nets": TOLERANCE[ways.precision]["loss"]}
    for what, difference in found.items():
        if not difference <= allowed[what]:
            raise SystemExit(
                f"slices and masks differ in the {what} by {difference:.2g}, more than {allowed[what]:g}; "
                "masks cannot stand for a slim net whose rounded widths skip where the host's do not"
            )
    return found


def apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / a.norm())


@contextlib.contextmanager
def copies_of_statistics(*nets: nn.Module) -> Iterator[None]:
    """Put the batch norms' running statistics back afterwards."""
    kept = [[buffer.clone() for buffer in net.buffers()] for net in nets]
    yield
    for net, before in zip(nets, kept, strict=True):
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)


def measure(arch: str, given: argparse.Namespace) -> dict:
    """Time all ways in turns."""
    ways = Ways(arch, given)
    agreement = check_agreement(ways)
    named = ways.all()
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    warm_up = 3 if given.device == "cuda" else 1  # compiles, tunes and fills caches
    for index, name in in_turns(named, warm_up + given.rounds):
        one = timed(named[name], ways.device)
        if index >= warm_up:
            spent[name].append(one)
    clock = "wall_s" if given.device == "cuda" else "processor_s"
    found = {
        name: {
            "ms": 1e3 * statistics.median(one[clock] for one in runs),
            "wall_ms": 1e3 * statistics.median(one["wall_s"] for one in runs),
            "page_faults": statistics.median(one["page_faults"] for one in runs),
        }
        for name, runs in spent.items()
    }
    times = {name: [one[clock] for one in runs] for name, runs in spent.items()}
    ratios = {
        name: ratio_of(times["slices"], theirs, "over_slices")
        for name, theirs in times.items()
        if name != "slices"
    }
    for name in ("plain nets", "four passes"):
        ratios[name]["engine_overhead"] = ratio_of(times[name], times["slices"], "median")["median"] - 1
    return {
        "agreement": agreement,
        "times": found,
        "ratios": ratios,
        "images_per_s": given.batch / found["slices"]["wall_ms"] * 1e3,
        "flops_per_step": flops_of_step(arch, given),
    }


def small_maps(given: argparse.Namespace, load_before: float) -> None:
    """Time a recipe's step with torch's convolutions and with small maps as matrix products, in turns."""
    recipe = read_recipe(given.recipe)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(recipe.run.seed)
    with mock.patch("edgecl.nets.heads.speed_up_small_maps"):
        plain = create_slimmable(recipe)
    quick = create_slimmable(recipe)
    quick.load_state_dict(plain.state_dict())
    steps = {
        name: create_step(recipe, net, accelerator=accelerator, steps_per_epoch=1_000_000)
        for name, net in (("torch's convolutions", plain), ("small maps as products", quick))
    }
    size = recipe.data.image_size
    views = [torch.randn(recipe.data.batch_size, 3, size, size) for _ in range(2)]
    spent: dict[str, list[float]] = {name: [] for name in steps}
    losses = []
    for index, name in in_turns(steps, 1 + given.rounds):
        started = time.process_time()
        outcome = steps[name](views, number=index)
        if index == 0:
            losses.append(outcome.loss)
        else:
            spent[name].append(1e3 * (time.process_time() - started))
    if not apart(*losses) <= TOLERANCE["fp32"]["loss"]:
        raise SystemExit(f"the ways differ in the loss of the first step by {apart(*losses):.2g}")
    plain_ms, quick_ms = spent.values()
    environment = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    result = {
        "ms": {name: statistics.median(times) for name, times in spent.items()},
        "least_ms": {name: min(times) for name, times in spent.items()},
        **ratio_of(quick_ms, plain_ms, "ratio"),
    }
    for name, times in spent.items():
        print(f"{name:24} {statistics.median(times):6.1f} ms of processor time, least {min(times):.1f}")
    low, high = result["range"]
    print(f"ratio {result['ratio']:.2f} [{low:.2f}, {high:.2f}] over {given.rounds} rounds")
    conditions = conditions_of(
        load_before,
        ["torch"],
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        environment={key: os.environ[key] for key in environment if key in os.environ},
    )
    print(json.dumps({"benchmark": "small maps", "recipe": given.recipe, "conditions": conditions, **result}))


def timed(make: Callable[[], object], device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    started, processor = time.perf_counter(), time.process_time()
    make()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "wall_s": time.perf_counter() - started,
        "processor_s": time.process_time() - processor,
        "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
    }


def flops_of_step(arch: str, given: argparse.Namespace) -> dict[str, float]:
    """Count a step as METHOD section 2b counts: four forward-units of host and slim net, plus projector and losses.

    A backward pass is two forward passes, one multiply-add two FLOPs. Each of the three losses is one product of
    (D, N) and (N, D), and in the backward pass one per side that learns: 3 + 4 products.
    """
    shape = (1, 3, given.size, given.size)
    nets = {
        width: Encoder(arch, width=width, projector=given.projector) for width in (HOST_WIDTH, SLIM_WIDTH)
    }
    host, slim = (forward_cost(nets[width], shape).training_flops for width in (HOST_WIDTH, SLIM_WIDTH))
    losses = 7 * 2 * given.projector[-1] ** 2
    return {
        "slices": given.batch * (4.0 * (host + slim) + losses),
        "masks": given.batch * (8.0 * host + losses),
        "masks_over_slices": (8.0 * host + losses) / (4.0 * (host + slim) + losses),
    }


def describe(given: argparse.Namespace, load_before: float) -> dict:
    """Say on what, beside what and with which settings it was measured."""
    on_gpu = given.device == "cuda"
    conditions = conditions_of(
        load_before,
        ["torch", "timm"],
        device=given.device,
        pinned_to_core=given.core,
        threads=torch.get_num_threads(),
        image_size=given.size,
        batch=given.batch,
        projector=given.projector,
        precision=given.precision,
        host_width=HOST_WIDTH,
        slim_width=SLIM_WIDTH,
        optimizer="lars",
        rounds=given.rounds,
        keeps_freed_memory=not on_gpu and not given.default_allocator,
        clock="wall" if on_gpu else "processor time",
        environment={
            key: os.environ[key] for key in ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE") if key in os.environ
        },
    )
    return {**conditions, "name": torch.cuda.get_device_name()} if on_gpu else conditions


def print_tables(results: dict[str, dict], conditions: dict) -> None:
    """Print conditions, one row per way, and the goals."""
    print(
        f"{conditions['name']}, {conditions['threads']} thread(s), torch {conditions['versions']['torch']}, timm "
        f"{conditions['versions']['timm']}; {conditions['image_size']} px, batch {conditions['batch']}, "
        f"projector {'-'.join(map(str, conditions['projector']))}, {conditions['precision']}, "
        f"host {HOST_WIDTH:g}x, slim {SLIM_WIDTH:g}x, {conditions['rounds']} rounds; "
        f"load {conditions['load_before']} before, {conditions['load_after']} after\n"
        f"ms per step by {conditions['clock']}, and times the time of slices [range over rounds]\n"
    )
    body = []
    for name in next(iter(results.values()))["times"]:
        cells = [name]
        for result in results.values():
            cell = f"{result['times'][name]['ms']:.1f} ms"
            if name in result["ratios"]:
                low, high = result["ratios"][name]["range"]
                cell += f" {result['ratios'][name]['over_slices']:.2f}x [{low:.2f}, {high:.2f}]"
            cells.append(cell)
        body.append(cells)
    by_flops = [f"{result['flops_per_step']['masks_over_slices']:.2f}x" for result in results.values()]
    faults = [f"{result['times']['slices']['page_faults']:.0f}" for result in results.values()]
    print(
        table(["way", *results], [*body, ["masks, by FLOPs", *by_flops], ["page faults of slices", *faults]])
    )
    print()
    for arch, result in results.items():
        overheads = (
            f"{100 * result['ratios'][name]['engine_overhead']:.1f} % more than {words}"
            for name, words in (
                ("plain nets", "the same step by plain nets"),
                ("four passes", "its four bare passes, losses and optimizer included"),
            )
        )
        print(f"{arch}: the step takes {' and '.join(overheads)}")


if __name__ == "__main__":
    main()
