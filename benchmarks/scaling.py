"""Measure one training step by 1, 2 and 4 processes, and count what they send; a table and one JSON line.

    python benchmarks/scaling.py                     # gloo processes pinned to one core each, as many as there are cores
    python benchmarks/scaling.py --force             # four, even where they share cores: bytes only, the times say nothing
    python benchmarks/scaling.py --paper             # on paper: 8, 64 and 512 GPUs (docs/scaling.md); measures nothing

Every number of processes is a job of its own, started by torchrun, in which each process is pinned to one core and
computes with one thread. The jobs take turns, a block of steps each, so that whatever else the machine does meets all.
Weak scaling gives every process --batch images; strong scaling divides --batch images among them. Efficiency is the
images per second of N processes over N times those of one. Beside the clock stands the processor time per image, which
leaves out waiting: for other work on the machine, but for the other processes, too.

Bytes are what a process hands to all-reduces in one step, counted by the profiler: gradients by DDP's communication hook,
the rest are correlation matrices, means and variances. A formula must give the same number.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timing import Server, conditions_of, in_turns, options_of, ratio_of
from torch import nn

FLOAT_BYTES = 4
# What the step sums besides: whether its loss is finite, and whether to stop.
VOTE_BYTES = 2 * FLOAT_BYTES


# --- what is sent: formulae ---


@dataclass(frozen=True)
class Arm:
    """The correlation losses of one step of an arm.

    Attributes:
        losses: how many.
        learning_sides: how many of their sides learn.
        settings: the recipe's, by which the arm is chosen.
    """

    losses: int
    learning_sides: int
    settings: dict[str, dict[str, object]]


# L_SACL(z_A, z_B); L_D(z_A, [z_A]) and L_D(z_B, [z_B]), in each of which one side is frozen.
ARMS = {
    "SACL-XD": Arm(3, 4, {}),
    "SACL-XD, slim_only": Arm(2, 3, {"method": {"xd_direction": "slim_only"}}),
    "XD only": Arm(3, 4, {"host": {"width": 1.0}}),
    "SACL only": Arm(1, 2, {"method": {"alpha": 1.0}}),
    "Barlow Twins": Arm(1, 2, {"host": {"width": 1.0}, "method": {"alpha": 1.0}}),
}
HOST_WIDTH, SLIM_WIDTH = 1.5, 1.0


def loss_bytes(dimensions: int, arm: str = "SACL-XD") -> dict[str, int]:
    """Return what the losses of one step hand to all-reduces, in bytes and in calls.

    Args:
        dimensions: D, width of the projector's last layer.
        arm: one of ARMS.

    A loss sums its matrix (D^2) and, for each of its two sides, a mean and a variance (D each). Where the backward
    pass reaches a mean or a variance, its gradient is summed again. That of the matrix is the same in every process, so
    it is multiplied and not summed.
    """
    of = ARMS[arm]
    matrices = of.losses
    vectors = 2 * (2 * of.losses + of.learning_sides)
    return {
        "matrices": FLOAT_BYTES * matrices * dimensions**2,
        "vectors": FLOAT_BYTES * vectors * dimensions,
        "calls": matrices + vectors,
    }


def changed_parameters(arch: str, projector: list[int], *, host_width: float = HOST_WIDTH) -> int:
    """Count the numbers whose gradients are summed: the host's, and those of the slim net's own norms."""
    from edgecl.nets.backbone import count_parameters, is_norm
    from edgecl.nets.heads import Projector

    host, slim = backbone(arch, host_width), backbone(arch, SLIM_WIDTH)
    with torch.device("meta"):
        head = Projector(host.features, projector)
    own = slim.norm_parameters + sum(count_parameters(module) for module in head.modules() if is_norm(module))
    return host.parameters + count_parameters(head) + (own if host_width > SLIM_WIDTH else 0)


@dataclass(frozen=True)
class Backbone:
    """What the formulae need of a backbone: F, its parameters, and those of its batch norms."""

    features: int
    parameters: int
    norm_parameters: int


@functools.cache
def backbone(arch: str, width: float) -> Backbone:
    """Build a backbone without memory, and count."""
    from edgecl.nets.backbone import count_parameters, create_backbone, feature_count, is_norm

    with torch.device("meta"):
        net = create_backbone(arch, width=width)
    norms = sum(count_parameters(module) for module in net.modules() if is_norm(module))
    return Backbone(feature_count(net), count_parameters(net), norms)


# --- on paper ---

PAPER_NETS = ("mobilenetv1_100", "mobilenetv3_large_100", "efficientnet_b0")
PAPER_PROJECTORS = (128, 2048, 4096, 8192)
IMAGE_SIZE = 224
LAUNCH_S = 10e-6
"""Assumed: what a collective costs however little it sends and however few take part."""
HOP_S = 2e-6
"""Assumed: latency of one hop of a ring or tree."""
SUSTAINED_FLOPS = 50e12
"""Assumed: FLOP/s a GPU sustains on these nets in bf16, about a twentieth of an H100's peak."""


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    Attributes:
        gpus: W.
        bytes_per_s: what a ring all-reduce moves into and out of each GPU; between nodes all rings of a node share its
            network, so this is the node's bandwidth, not a GPU's share of it.
        network: in words.
    """

    gpus: int
    bytes_per_s: float
    network: str


NVLINK = 300e9
CLUSTERS = (
    Cluster(8, NVLINK, "one node, NVLink"),
    Cluster(64, NVLINK, "3.2 Tb/s per node"),  # 400 GB/s, more than NVLink carries
    Cluster(512, NVLINK, "3.2 Tb/s per node"),
    Cluster(64, 50e9, "400 Gb/s per node"),
    Cluster(512, 50e9, "400 Gb/s per node"),
    Cluster(64, 12.5e9, "100 Gb/s per node"),
    Cluster(512, 12.5e9, "100 Gb/s per node"),
)
GLOBAL_BATCH = 4096
TIMES_OF = "mobilenetv3_large_100"


def ring_s(sent: float, cluster: Cluster) -> float:
    """Return the time of ring all-reduces of so many bytes together: each GPU sends 2 (W - 1) / W of them."""
    return 2 * (cluster.gpus - 1) / cluster.gpus * sent / cluster.bytes_per_s


def latency_s(calls: int, cluster: Cluster) -> float:
    """Return what so many all-reduces cost whatever they send: a start, and a tree up and down."""
    return calls * (LAUNCH_S + 2 * math.ceil(math.log2(cluster.gpus)) * HOP_S)


def paper(timed: Sequence[str] = PAPER_NETS) -> dict:
    """Compute the tables of docs/scaling.md.

    Args:
        timed: nets whose times are computed, too, for which their FLOPs must be counted.
    """
    nets = []
    for arch in PAPER_NETS:
        for d in PAPER_PROJECTORS:
            gradients = FLOAT_BYTES * changed_parameters(arch, [d] * 3)
            sent = loss_bytes(d)
            correlations = sent["matrices"] + sent["vectors"]
            nets.append(
                {
                    "arch": arch,
                    "projector": d,
                    "gradient_bytes": gradients,
                    "correlation_bytes": correlations,
                    "correlation_over_gradient": correlations / gradients,
                    "calls": sent["calls"],
                }
            )
    backbone_flops = {arch: flops_per_image(arch) for arch in timed}
    times = []
    for net in nets:
        if net["arch"] not in timed:
            continue
        d = net["projector"]
        # Four forward-units of each net and its projector, and seven products for the three losses.
        flops = backbone_flops[net["arch"]] + 14.0 * d**2
        for width in (HOST_WIDTH, SLIM_WIDTH):
            flops += 4 * 2 * (backbone(net["arch"], width).features * d + 2 * d**2)
        image_s = flops / SUSTAINED_FLOPS
        for cluster in CLUSTERS:
            matrices = ring_s(net["correlation_bytes"], cluster)
            latency = latency_s(net["calls"], cluster)
            gradients = ring_s(net["gradient_bytes"], cluster)
            computing = GLOBAL_BATCH / cluster.gpus * image_s
            # The losses' sums come between forward and backward and hide behind nothing; gradients hide behind the
            # backward passes, which are half of a step: two of the four forward-units of each net.
            waiting = matrices + latency + max(0.0, gradients - computing / 2)
            images = math.ceil(9 * (matrices + latency) / image_s)
            times.append(
                {
                    "arch": net["arch"],
                    "projector": net["projector"],
                    "flops_per_image": flops,
                    "gpus": cluster.gpus,
                    "network": cluster.network,
                    "correlation_ms": 1e3 * matrices,
                    "latency_ms": 1e3 * latency,
                    "gradient_ms": 1e3 * gradients,
                    "efficiency": computing / (computing + waiting),
                    "images_per_gpu_for_90_percent": images,
                }
            )
    crossover = {arch: crossover_dimensions(arch) for arch in PAPER_NETS}
    return {"benchmark": "scaling, on paper", "nets": nets, "times": times, "crossover_dimensions": crossover}


def flops_per_image(arch: str) -> float:
    """Return the FLOPs of an image in SACL-XD, projector apart: METHOD section 2b's 4 (H + S)."""
    from edgecl.evaluate.cost import forward_cost
    from edgecl.nets.backbone import create_backbone

    shape = (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    nets = (create_backbone(arch, width=width) for width in (HOST_WIDTH, SLIM_WIDTH))
    return 4.0 * sum(forward_cost(net, shape).training_flops for net in nets)


def crossover_dimensions(arch: str) -> int:
    """Return the smallest D from which on the correlations are more bytes than the gradients."""

    def surplus(d: int) -> int:
        sent = loss_bytes(d)
        changed = changed_parameters(arch, [d] * 3)
        return sent["matrices"] + sent["vectors"] - FLOAT_BYTES * changed

    low, high = 1, 16384
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if surplus(middle) > 0 else (middle, high)
    return high


def print_paper(tables: dict) -> None:
    """Print what docs/scaling.md holds."""
    print(
        f"Per step and GPU, host {HOST_WIDTH:g}x, slim {SLIM_WIDTH:g}x, float32: bytes handed to all-reduces\n\n"
        "| net | projector | gradients | correlations | correlations / gradients | all-reduces of the losses |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for row in tables["nets"]:
        print(
            f"| {row['arch']} | {row['projector']} x 3 | {row['gradient_bytes'] / 1e6:.1f} MB | "
            f"{row['correlation_bytes'] / 1e6:.1f} MB | {row['correlation_over_gradient']:.2f} | {row['calls']} |"
        )
    for arch, d in tables["crossover_dimensions"].items():
        print(f"\n{arch}: the correlations are more than the gradients from D = {d} on", end="")
    print(
        f"\n\n{TIMES_OF}, ms per step\n\n| projector | GPUs, network | correlations | their latency | gradients | "
        f"efficiency at a global batch of {GLOBAL_BATCH} | images per GPU for 90 % |\n" + "| --- " * 7 + "|"
    )
    for row in tables["times"]:
        if row["arch"] == TIMES_OF:
            print(
                f"| {row['projector']} x 3 | {row['gpus']}, {row['network']} | {row['correlation_ms']:.2f} | "
                f"{row['latency_ms']:.2f} | {row['gradient_ms']:.2f} | {100 * row['efficiency']:.0f} % | "
                f"{row['images_per_gpu_for_90_percent']} |"
            )


# --- measured ---


def serve(given: argparse.Namespace) -> None:
    """One process of a job: run a block of steps for every line that process 0 reads; the first line counts bytes."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[local % len(cores)]})
    torch.set_num_threads(1)
    from edgecl.distributed import processes
    from edgecl.train.allocator import keep_freed_memory

    keep_freed_memory()  # as pretrain does
    processes.join("cpu")
    world = processes.world_size()
    run, sums = stepping(given)

    share = {"weak": given.batch, "strong": max(given.batch // world, 2)}
    for order in orders():
        if order == "count":
            answer = count_bytes(run, sums, batch=share["strong"])
        else:
            if world > 1:
                torch.distributed.barrier()
            started, processor = time.perf_counter(), time.process_time()
            run(share[order], given.steps)
            if world > 1:
                torch.distributed.barrier()
            spent = torch.tensor([time.process_time() - processor])
            if world > 1:
                torch.distributed.all_reduce(spent)
            images = share[order] * world * given.steps
            seconds = time.perf_counter() - started
            answer = {"images_per_s": images / seconds, "processor_s_per_image": float(spent) / images}
        if processes.is_main():
            print(json.dumps(answer), flush=True)
    processes.leave()


def stepping(
    given: argparse.Namespace, arm: str = "SACL-XD"
) -> tuple[Callable[[int, int], None], GradientSums]:
    """Build edgecl's step for the processes that have met; called with this process's batch and a number of steps.

    Returns:
        what makes the steps, and what counts the gradients they send.
    """
    from accelerate import Accelerator

    from edgecl.config.recipe import recipe_from_tables
    from edgecl.distributed import processes
    from edgecl.nets.build import create_slimmable
    from edgecl.train.step import create_step

    tables: dict[str, dict[str, object]] = {
        "host": {"arch": given.net, "width": HOST_WIDTH},
        "slim": {"width": SLIM_WIDTH},
        "projector": {"sizes": given.projector},
        "data": {"image_size": given.size, "batch_size": given.batch},
        "optim": {"lr": 0.1},
        "run": {"epochs": 1000},
    }
    for table, settings in ARMS[arm].settings.items():
        tables[table] = {**tables.get(table, {}), **settings}
    recipe = recipe_from_tables(tables, source="benchmarks/scaling.py")
    torch.manual_seed(0)
    step = create_step(
        recipe, create_slimmable(recipe), accelerator=Accelerator(cpu=True), steps_per_epoch=1000
    )
    generator = torch.Generator().manual_seed(processes.rank())
    done = 0

    def run(batch: int, steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            views = torch.randn(2, batch, 3, given.size, given.size, generator=generator)
            step(list(views), number=done)
            done += 1

    return run, GradientSums(step.passes)


def count_bytes(run: Callable[[int, int], None], sums: GradientSums, *, batch: int) -> dict[str, int]:
    """Count what this process sends in one step."""
    run(batch, 2)  # DDP arranges its buckets anew after the first step.
    sums.bytes = 0
    total, calls = count_sums(lambda: run(batch, 1))
    return {"gradients": sums.bytes, "losses": total - sums.bytes, "calls": calls}


def orders() -> Iterator[str]:
    """Give every process the lines that process 0 reads, to the end of its input."""
    from edgecl.distributed import processes

    while True:
        line = sys.stdin.readline().strip() if processes.is_main() else ""
        line = processes.from_main(line)
        if not line:
            return
        yield line


class GradientSums:
    """Counts what DDP hands to its all-reduces."""

    def __init__(self, passes: nn.Module):
        self.bytes = 0
        if isinstance(passes, nn.parallel.DistributedDataParallel):
            passes.register_comm_hook(None, self._sum)

    def _sum(self, state, bucket):  # torch reads annotations here, and wants classes
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.bytes += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(None, bucket)


def count_sums(make: Callable[[], None]) -> tuple[int, int]:
    """Return bytes and number of the all-reduces of a call, gradients among them; all of them are float32."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profiler:
        make()
    sums = [event for event in profiler.events() if event.name == "gloo:all_reduce"]
    return sum(FLOAT_BYTES * math.prod(event.input_shapes[0]) for event in sums), len(sums)


def job_of(processes: int, given: argparse.Namespace) -> Server:
    """Start the processes of one run, the first of them listening."""
    words = ["--net", given.net, "--size", given.size, "--batch", given.batch, "--steps", given.steps]
    words += ["--projector", *given.projector, "--serve"]
    # One process is the ordinary command: under a launcher even one would sum its gradients with itself.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return Server(*(launcher if processes > 1 else []), __file__, *words)


def measure(given: argparse.Namespace, worlds: list[int]) -> dict[int, dict]:
    """Time all worlds in turns."""
    jobs: dict[int, Server] = {}
    try:
        for world in worlds:
            jobs[world] = job_of(world, given)
        counted = {world: job.ask("count") for world, job in jobs.items()}
        blocks: dict[int, dict[str, list[dict]]] = {world: {"weak": [], "strong": []} for world in worlds}
        for _, world in in_turns(worlds, given.rounds):
            for mode, answers in blocks[world].items():
                answers.append(jobs[world].ask(mode))
    finally:
        for job in jobs.values():
            job.close()
    parameters = changed_parameters(given.net, given.projector)
    expected = loss_bytes(given.projector[-1])
    results = {}
    for world in worlds:
        alone = world == 1
        result = {
            "bytes": {key: counted[world][key] for key in ("gradients", "losses")},
            "all_reduces": counted[world]["calls"],
            "expected_bytes": {
                "gradients": 0 if alone else FLOAT_BYTES * parameters,
                "losses": 0 if alone else expected["matrices"] + expected["vectors"] + VOTE_BYTES,
            },
        }
        for mode in ("weak", "strong"):
            ours, base = blocks[world][mode], blocks[worlds[0]][mode]
            rates = (
                [one["images_per_s"] * worlds[0] / world for one in ours],
                [one["images_per_s"] for one in base],
            )
            work = ([one["processor_s_per_image"] for one in both] for both in (ours, base))
            result[mode] = {
                "images_per_s": statistics.median(one["images_per_s"] for one in ours),
                **ratio_of(rates[1], rates[0], "efficiency"),
                "efficiency_by_processor_time": ratio_of(*work, "median")["median"],
            }
        results[world] = result
    return results


def print_measured(results: dict[int, dict], conditions: dict) -> None:
    """Print conditions and one row per number of processes."""
    print(
        f"{conditions['name']}, {conditions['cores']} cores, gloo, one core and one thread per process; {conditions['net']} "
        f"1.5x-1x, {conditions['image_size']} px, batch {conditions['batch']}, projector "
        f"{'-'.join(map(str, conditions['projector']))}, fp32, torch {conditions['versions']['torch']}; "
        f"load {conditions['load_before']} before, {conditions['load_after']} after\n"
    )
    for words in conditions["left_out"]:
        print(f"{words}\n")
    print(
        "| processes | weak: images/s, efficiency | by processor time | strong: images/s, efficiency | "
        "by processor time | gradients | losses | by the formula |\n" + "| --- " * 8 + "|"
    )
    for world, result in results.items():
        cells = []
        for mode in ("weak", "strong"):
            one = result[mode]
            low, high = one["range"]
            cells.append(f"{one['images_per_s']:.1f}, {one['efficiency']:.2f} [{low:.2f}, {high:.2f}]")
            cells.append(f"{one['efficiency_by_processor_time']:.2f}")
        for found in (result["bytes"], result["expected_bytes"]):
            cells += [f"{found['gradients']:,} B", f"{found['losses']:,} B"]
        print(f"| {world} | " + " | ".join(cells[:6]) + " | " + " and ".join(cells[6:]) + " |")
    for world, result in results.items():
        same = result["bytes"] == result["expected_bytes"]
        print(f"{world} process(es): the bytes are {'' if same else 'NOT '}those of the formula")


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--paper", action="store_true", help="compute docs/scaling.md's tables instead")
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument(
        "--force", action="store_true", help="start more processes than there are cores, too"
    )
    options.add_argument("--net", default="mobilenetv3_large_100")
    options.add_argument("--size", type=int, default=96)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--projector", type=int, nargs="+", default=[512, 512, 512])
    options.add_argument("--steps", type=int, default=2, help="per block")
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        serve(given)
        return
    if given.paper:
        tables = paper()
        print_paper(tables)
        print(json.dumps(tables))
        return
    cores = len(os.sched_getaffinity(0))
    worlds = [world for world in sorted(set(given.processes)) if given.force or world <= cores]
    left_out = [
        f"{world} processes are left out: there are {cores} cores, and processes that share one measure the sharing"
        for world in sorted(set(given.processes) - set(worlds))
    ]
    load_before = os.getloadavg()[0]
    results = measure(given, worlds)
    conditions = conditions_of(
        load_before,
        ["torch"],
        threads=1,
        net=given.net,
        image_size=given.size,
        batch=given.batch,
        projector=given.projector,
        steps_per_block=given.steps,
        rounds=given.rounds,
        backend="gloo",
        left_out=left_out,
    )
    print_measured(results, conditions)
    print(json.dumps({"benchmark": "scaling", "conditions": conditions, "results": results}))


if __name__ == "__main__":
    main()
