"""Whether training is exact under many processes: a step of every variant, against one process with the whole batch.

Everything is what `edgecl pretrain` trains with: the net of a recipe, its synchronized norms, the step, accelerate's
data-parallel wrapper and, between the processes, the network and the libraries of the user's own machines. Numbers are
float64, in which rounding stays below 1e-9. In float32 a step that is summed in another order differs by 2e-5 in half of
the tensors and by 4e-3 in the worst, behind thirty batch norms, and would hide real mistakes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from pydantic import ValidationError
from torch import Tensor

import edgecl
from edgecl.config.recipe import DEFAULT_METHOD, Recipe, find_method, list_methods, recipe_from_tables
from edgecl.distributed import processes
from edgecl.errors import DeviceError, ProcessError, RecipeError, near_matches
from edgecl.nets.build import create_slimmable
from edgecl.nets.slimming import SlimmableNet
from edgecl.storage.records import SelftestReport, VariantDifferences
from edgecl.train.pretrain import create_accelerator
from edgecl.train.step import Step, create_step

TOLERANCE = 1e-5
KINDS = ("loss", "gradients", "statistics")

# A tensor is measured by its own largest number, or by this part of the largest of its kind if it has none so large:
# gradients that are zero but for rounding, such as those of a bias in front of a norm, are not measured by themselves.
_FLOOR = 1e-6
STATUS = "selftest: "
"""What a line of progress begins with where another process reads it."""
_LAST_LINES = 200
_PATIENCE_S = 30.0
_HOME = Path(edgecl.__file__).parent.parent

Report = Callable[[str], None]
Results = dict[str, Tensor]


class Variant(NamedTuple):
    """One way to train: settings of a recipe."""

    name: str
    settings: Mapping[str, Mapping[str, object]]


def _variant_of(name: str) -> Variant:
    """Return a method by its own settings, with a local view, and an untrained teacher where it has one."""
    taught = "teacher" in find_method(name).Config.model_fields
    teacher = {"teacher": {"arch": "test_efficientnet", "weights": "untrained"}} if taught else {}
    method = {"name": name, **teacher}
    return Variant(name, {"host": {"width": 1.0}, "views": {"local_count": 1}, "method": method})


VARIANTS = (
    Variant("Barlow Twins", {"host": {"width": 1.0}, "method": {"alpha": 1.0}}),
    Variant("XD only", {"host": {"width": 1.0}}),
    Variant("SACL only", {"method": {"alpha": 1.0}}),
    Variant("SACL-XD", {}),
    Variant("SACL-XD, slim_only", {"method": {"xd_direction": "slim_only"}}),
    Variant("SACL-XD, slow start", {"slim": {"slow_start": 1.0}}),
    Variant("SACL-XD, 4 widths", {"slim": {"widths": [1.0, 0.75, 0.6, 0.5]}}),
    Variant("SACL-XD, 2 parts", {"run": {"accumulate": 2}}),
    Variant("SACL-XD, coding rate", {"method": {"coding_rate": {"weight": 0.3}}}),
    Variant("SACL-XD, symmetric", {"method": {"symmetric": True, "learn_targets": True}}),
    Variant("SACL-XD, local views", {"views": {"local_count": 2}}),
    Variant("SimCLR", {"host": {"width": 1.0}, "method": {"loss": "simclr", "alpha": 1.0}}),
    *(_variant_of(name) for name in list_methods() if name != DEFAULT_METHOD),
)


def recipe_of(variant: Variant, *, batch_size: int) -> Recipe:
    """Return the recipe a variant is tried with: a net of few layers, and every kind that a convolutional net nests by."""
    tables: dict[str, Mapping[str, object]] = {
        "host": {"arch": "test_efficientnet", "width": 1.5, "stem_stride": 1},
        "slim": {"width": 1.0},
        "projector": {"sizes": [32, 32, 16]},
        "method": {"alpha": 0.7, "off_diagonal": 0.05, "scale": 1.0},
        "data": {"image_size": 32, "batch_size": batch_size},
        "optim": {"name": "sgd", "momentum": 0.0},
        "run": {"sync_norms": "all", "epochs": 1},
    }
    for name, settings in variant.settings.items():
        # Another method has other settings.
        tables[name] = settings if "name" in settings else {**tables.get(name, {}), **settings}
    return recipe_from_tables(tables, source="selftest")


def batch_size_for(world_size: int) -> int:
    """Return the smallest batch of 16 or more of which every process has a share of two parts of two."""
    return 4 * world_size * -(-4 // world_size)


def run_variants(
    *,
    device: str,
    world_size: int,
    rank: int,
    shares: int,
    report: Report,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Results]:
    """Run one step with every variant, from the same weights and images wherever it runs.

    Args:
        world_size: processes that share the batch.
        rank: which share is taken.
        shares: for how many processes the batch is laid out. One process that takes it in parts takes as its first part
            the first parts of all shares.

    Returns:
        variant -> name -> tensor on the CPU: the loss, every parameter's gradient as the optimizer is given it with the
        norms that training watches; and afterwards what moves otherwise: running statistics, queues, copies that follow.
    """
    results = {}
    for variant in variants:
        report(variant.name)
        recipe = recipe_of(variant, batch_size=batch_size_for(shares))
        accelerator = create_accelerator(recipe, device=device, out=Path())
        net = copy.deepcopy(fresh_net(recipe.host.width, recipe.slim.all_widths))
        # More than one step, or timm remarks that the rate's schedule is none.
        step = create_step(recipe, net, accelerator=accelerator, steps_per_epoch=2)
        parts = recipe.run.accumulate if world_size == 1 else 1
        views = [
            _laid_out(view, shares=shares, parts=parts).chunk(world_size)[rank].to(accelerator.device)
            for view in _views(recipe)
        ]
        results[variant.name] = _take(step, views)
    return results


@lru_cache
def fresh_net(host_width: float, slim_widths: tuple[float, ...]) -> SlimmableNet:
    """Return the net of these widths before its first step, to be copied."""
    slim = {"width": slim_widths[0], "widths": slim_widths}
    recipe = recipe_of(Variant("", {"host": {"width": host_width}, "slim": slim}), batch_size=2)
    torch.manual_seed(0)
    return create_slimmable(recipe).double()


def _views(recipe: Recipe) -> list[Tensor]:
    batch_size, generator = recipe.data.batch_size, torch.Generator().manual_seed(0)

    def varied(view: Tensor) -> Tensor:
        return view + 0.5 * torch.randn(view.shape, generator=generator, dtype=torch.float64)

    view_a = torch.randn(batch_size, 3, 32, 32, generator=generator, dtype=torch.float64)
    # No two shares are alike in mean and scale, so that statistics of one share are wrong for the whole.
    ramp = torch.linspace(0, 2, batch_size, dtype=torch.float64).view(-1, 1, 1, 1)
    view_a = view_a * (1 + ramp) + ramp
    sizes = [spec.size for spec in recipe.view_specs for _ in spec.names]
    labels = [torch.arange(batch_size) % 3] if recipe.method.needs_labels else []
    return [view_a, *(varied(view_a[..., :size, :size]) for size in sizes[1:]), *labels]


def _laid_out(view: Tensor, *, shares: int, parts: int) -> Tensor:
    """Reorder the first parts of all shares to the front, then the second: (N, …) as one process takes them."""
    return view.view(shares, parts, -1, *view.shape[1:]).transpose(0, 1).reshape(view.shape)


def _take(step: Step, views: Sequence[Tensor]) -> Results:
    found: Results = {}

    def keep_gradients(*_: Any) -> None:
        for name, parameter in step.method.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[f"gradients/{name.removeprefix('net.')}"] = gradient.detach().cpu().clone()

    step.optimizer.optimizer.register_step_pre_hook(keep_gradients)
    outcome = step(views, number=0, watch=True)
    found["loss/total"] = outcome.loss.detach().cpu()
    for name, norm in outcome.gradient_norms.items():
        if norm is not None:
            found[f"gradients/{name}"] = torch.tensor(norm, dtype=torch.float64)
    frozen = [(name, one) for name, one in step.method.named_parameters() if not one.requires_grad]
    for name, tensor in [*step.method.named_buffers(), *frozen]:
        found[f"statistics/{name.removeprefix('net.')}"] = tensor.detach().cpu().double()
    return found


def difference(found: Results, expected: Results, *, kind: str) -> float:
    """Return the largest relative difference between the tensors of one of KINDS; infinite where one is no number."""
    names = [name for name in expected if name.startswith(f"{kind}/")]
    if not names or any(name not in found for name in names):
        return float("inf")  # a step whose loss is no number gives no gradients
    largest = {name: float(expected[name].abs().max()) for name in names}
    floor = max(_FLOOR * max(largest.values()), torch.finfo(torch.float64).tiny)
    worst = torch.stack(
        [(found[name] - expected[name]).abs().max() / max(largest[name], floor) for name in names]
    ).max()
    return float(worst) if bool(torch.isfinite(worst)) else float("inf")


def chosen_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Return the variants of these names, all for none.

    Raises:
        RecipeError: no such variant.
    """
    known = {variant.name: variant for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no variant '{name}'", hint=near_matches(name, known))
    return tuple(known[name] for name in dict.fromkeys(names)) or VARIANTS


def compare(*, device: str, report: Report, names: Sequence[str] = ()) -> SelftestReport:
    """Compare this run's processes, one of which calls this, with one process that has the whole batch.

    Every process computes the whole for itself before it joins the others, and compares its own results
    with it; the decision is of the worst of all processes and is the same in all of them.

    Raises:
        DeviceError: no GPU for this process.
        ProcessError: the other processes did not come, or are gone.
        RecipeError: no such variant.
    """
    variants = chosen_variants(names)
    world_size, rank = processes.world_size(), processes.rank()
    processes.check_device(device)
    if device != "cpu" and torch.cuda.is_available():
        # Before joining, so that not all processes of a machine compute the whole on its first GPU.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    def run(who: str, count: int, number: int) -> dict[str, Results]:
        return run_variants(
            device=device,
            world_size=count,
            rank=number,
            shares=world_size,
            report=lambda variant: report(f"{who}: {variant}"),
            variants=variants,
        )

    with _alone():
        expected = run("one process", 1, 0)
    processes.join(device)
    with processes.explain_lost_peers():
        found = run(f"{world_size} processes", world_size, rank)
        hosts = sorted(set(gather_object([os.uname().nodename])))
        differences = torch.tensor(
            [
                [difference(found[variant.name], expected[variant.name], kind=kind) for kind in KINDS]
                for variant in variants
            ],
            dtype=torch.float64,
        )
        if world_size > 1:
            # The group has gloo for the CPU beside whatever it has for GPUs.
            torch.distributed.all_reduce(differences, op=torch.distributed.ReduceOp.MAX)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    rows = [
        VariantDifferences(
            variant=variant.name,
            # JSON knows no infinity.
            **{kind: value if math.isfinite(value) else None for kind, value in zip(KINDS, row, strict=True)},
            exact=max(row) <= TOLERANCE,
        )
        for variant, row in zip(variants, differences.tolist(), strict=True)
    ]
    return SelftestReport(
        exact=all(row.exact for row in rows),
        processes=world_size,
        hosts=hosts,
        device="cuda" if on_gpu else "cpu",
        backend="nccl" if on_gpu else "gloo",
        batch_size=batch_size_for(world_size),
        tolerance=TOLERANCE,
        torch=torch.__version__,
        variants=rows,
    )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide from torch and accelerate that a launcher started this process together with others."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
        # accelerate would otherwise go on without the others.
        AcceleratorState._reset_state(reset_partial_state=True)


def launch(*, count: int | None, device: str, report: Report, names: Sequence[str] = ()) -> SelftestReport:
    """Start the processes on this machine, as torchrun does, and return their record.

    Args:
        count: how many; None means one for each GPU, and two on the CPU where there are fewer than two GPUs.
        device: 'auto' takes the GPUs when there is one for each process.

    Raises:
        RecipeError: no such variant.
        DeviceError: more processes than GPUs.
        ProcessError: they ended without a record.
    """
    chosen_names = [variant.name for variant in chosen_variants(names)]
    processes.wait_s()  # refuses what the environment says, before anything is started
    processes.check_device(device)
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    count = count or (gpus if gpus > 1 or device == "cuda" else 2)
    if device == "cuda" and gpus < count:
        raise DeviceError(
            f"{count} processes need as many GPUs, this machine has {gpus}",
            hint="use --processes with the number of GPUs, or --device cpu",
        )
    chosen = "cuda" if gpus >= count else "cpu"
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "edgecl", "selftest", "ddp", "--device", chosen, "--json"]
    command += [word for name in chosen_names for word in ("--variant", name)]
    words: deque[str] = deque(maxlen=_LAST_LINES)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            # So that neither the caller's directory nor an editable install decides which edgecl is tried.
            cwd=_HOME,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        ) as process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    if line.startswith(STATUS):
                        report(line.removeprefix(STATUS).rstrip())
                    else:
                        words.append(line.rstrip())
                status = process.wait()
            except BaseException:
                # torchrun ends the processes it started when it is asked to, not when it is killed.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE_S)
                process.kill()
                raise
        answer.seek(0)
        text = answer.read()
    try:
        return SelftestReport.model_validate_json(text)
    except ValidationError:
        raise _error_among(list(words), status) from None


def _error_among(lines: list[str], status: int) -> ProcessError:
    """Return the error that one of the processes told of, or else what was said last."""
    for first, line in enumerate(lines):
        if line.startswith("edgecl: "):
            rest = itertools.takewhile(lambda following: following.startswith("  "), lines[first + 1 :])
            return ProcessError("\n".join([line.removeprefix("edgecl: "), *rest]))
    return ProcessError(
        f"the processes ended with exit status {status} and no result",
        where={"they said": " | ".join(filter(None, lines[-8:])) or "nothing"},
    )
