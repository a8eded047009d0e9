"""The verb `pretrain`: a recipe and images in, a run directory out, in one process or many."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Literal

import accelerate
import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from edgecl import __version__
from edgecl.config.recipe import Recipe, flatten
from edgecl.data.loading import TrainingImages
from edgecl.data.sources import folder_of, open_source
from edgecl.distributed import processes
from edgecl.errors import (
    DataError,
    DeviceError,
    EdgeclError,
    Preempted,
    RecipeError,
    first_line,
    tell,
)
from edgecl.nets.build import create_slimmable, start_from
from edgecl.nets.given import GivenNet, load_start
from edgecl.storage.directories import RunDir
from edgecl.storage.lock import NAME as LOCK
from edgecl.storage.lock import hold
from edgecl.storage.outputs import refuse_existing, refuse_own_input
from edgecl.storage.record_files import write_record
from edgecl.storage.records import RunRecord, command_line
from edgecl.storage.redaction import record_without_secrets
from edgecl.storage.writing import clear_directory, disk_errors
from edgecl.train.allocator import keep_freed_memory
from edgecl.train.loop import Training, create_training
from edgecl.train.preemption import StopRequest
from edgecl.train.resume import (
    check_allowed,
    check_images,
    check_recipe,
    check_rests_on,
    check_source,
    newest_checkpoint,
    other_surroundings,
)
from edgecl.train.run_file import RunFile, State, describe_run, what_it_rests_on

# Of a view: three channels of float32.
_BYTES_PER_PIXEL = 3 * 4


def pretrain(
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    data: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: bool = False,
    allow: Sequence[str] = (),
    force: bool = False,
    download: bool = False,
) -> RunRecord:
    """Pretrain a host and the slim nets inside it from unlabelled images.

    Under torchrun or `accelerate launch` every process calls this with the same arguments; the first one writes.
    `edgecl.api.pretrain` says what they are.

    Raises:
        RecipeError: no data named, a resumed run had another recipe, processes have different ones, the net does not
            take pictures of the recipe's sizes, or a step's views do not fit into memory.
        SliceError: a slim net is not a prefix of the host, or the host cannot begin as its slim nets.
        DataError: no images, too few for a batch, or too many unreadable.
        ArtifactError: the output exists or is in use, or the disk is full.
        CollapseError, NonFiniteError: the run must not go on.
        DeviceError: no such device, or a tracker that is not installed.
        ProcessError: another process of the run is gone or silent.
        Preempted: SIGTERM or Ctrl-C; the run has saved where it is.
    """
    check_allowed(allow, recipe)
    if allow and not resume:
        raise RecipeError(
            "settings may be allowed to differ only from an earlier run's", hint="add --resume to --allow"
        )
    uri = data or recipe.data.uri
    if uri is None:
        raise RecipeError(
            f"the recipe '{recipe_name}' names no images", hint="say which with --data URI, e.g. a folder"
        )
    processes.check_device(device)
    processes.join(device)
    with processes.explain_lost_peers(), contextlib.ExitStack() as stack:
        _check_shares(recipe)
        run_dir, init = RunDir(out), recipe.host.init
        main = processes.is_main()
        changes: list[str] = []
        if main:
            # A launcher that starts failed processes again cannot add --resume.
            resume = resume or (
                processes.started_again()
                and run_dir.record_file.exists()
                and run_dir.read().launch == processes.launch()
            )
            if _only_traces(out):
                resume = False
                _refuse_inside(run_dir, uri)
            elif resume:
                changes = check_recipe(run_dir, recipe, allowed=allow)
            else:
                refuse_existing(out, force=force, kind=RunDir.KIND)
                if init is not None:
                    refuse_own_input(out, Path(init))
                _refuse_inside(run_dir, uri)
        resume = processes.from_main(resume)
        if main:
            stack.enter_context(_hold(run_dir))
        # Before anything is read for hours, and before anything is removed.
        processes.agree({"version of edgecl": __version__, **_settings_of(recipe)})
        stack.enter_context(_threads(recipe.run.threads))
        start = None
        if init is not None:
            start = load_start(init, host=recipe.host, width=recipe.slim.width, data=recipe.data)
        rests_on = what_it_rests_on(recipe, start)
        if main and resume:
            check_rests_on(run_dir, rests_on)
        processes.agree(rests_on)
        training, more_changes = _build(
            recipe,
            start,
            run_dir=run_dir,
            uri=uri,
            device=device,
            resume=resume,
            allow=allow,
            download=download,
        )
        record = describe_run(
            recipe, training, rests_on=rests_on, start=start, recipe_name=recipe_name, uri=uri
        )
        if main:
            _open_run_dir(training, record, resume=resume, changes=[*changes, *more_changes])
        return _train(training, record, trackers=bool(recipe.run.trackers))


def _build(
    recipe: Recipe,
    start: GivenNet | None,
    *,
    run_dir: RunDir,
    uri: str,
    device: str,
    resume: bool,
    allow: Sequence[str],
    download: bool,
) -> tuple[Training, list[str]]:
    """Build a run, at the step where it goes on.

    Returns:
        the run; and what of its images changed, where that is allowed.
    """
    accelerator = create_accelerator(recipe, device=device, out=run_dir.path)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    going_on = resume and accelerator.is_main_process
    # Before the images are read, which can take hours: what the recipe asks for may not be possible.
    _check_memory(recipe, accelerator.device)
    torch.manual_seed(recipe.run.seed)
    net = create_slimmable(recipe)
    if start:
        start_from(net, start)
    source = open_source(uri, split="train", download=download, index_dir=run_dir.beside)
    if recipe.method.needs_labels and source.labels is None:
        raise DataError(
            f"'method.name' {recipe.method.name} learns from classes, and '{source.uri}' has none",
            hint="sort the images into one folder per class, or choose another method: `edgecl ls methods`",
        )
    changes = check_source(run_dir, source, allowed=allow) if going_on else []
    left_out = run_dir.read().data.skipped if going_on and not changes else []
    data = recipe.data
    images = TrainingImages(
        source,
        decode_size=data.decode_size or data.image_size,
        cache_mib=data.cache_mib,
        max_bad_fraction=data.max_bad_fraction,
        workers=data.workers,
        limit=data.limit,
        decode=data.decode,
        read_timeout_s=data.read_timeout_s,
        left_out=processes.from_main(left_out),
    ).to(accelerator.device)
    if going_on and not changes:
        changes = check_images(run_dir, images, allowed=allow)
    processes.agree({"images": f"{len(images)} with the fingerprint {source.fingerprint[:16]}"})
    checkpoint = processes.from_main(newest_checkpoint(run_dir) if going_on else None)
    training = create_training(
        recipe, net=net, images=images, source=source, accelerator=accelerator, run_dir=run_dir
    )
    if checkpoint:
        training.restore(checkpoint)
        if training.step > training.total_steps:
            raise RecipeError(
                f"with run.epochs = {recipe.run.epochs} the run would end at step {training.total_steps}, "
                f"and it is at step {training.step} already",
                where={"run": run_dir.path},
                hint=f"set run.epochs to {ceil(training.step / training.steps_per_epoch)} or more, "
                "or start a new run in another --out",
            )
    return training, changes


def _open_run_dir(training: Training, record: RunRecord, *, resume: bool, changes: list[str]) -> None:
    """Write the record of a run that begins or goes on, into a directory of its own."""
    run_dir, net = training.run_dir, training.net
    if net.host_skips:
        skips = [
            f"{block} adds its input to its first {channels} channels only"
            if channels
            else f"{block} has none"
            for block, channels in net.host_skips.items()
        ]
        tell(f"nested start: the host's skip connections are made like the slim net's; {', '.join(skips)}")
    if not resume:
        if init := record.recipe["host"]["init"]:
            left_out = f"; without its classifier: {', '.join(record.left_out)}" if record.left_out else ""
            tell(f"the slim net starts from '{init}'{left_out}")
        _start_run_dir(run_dir, record)
        return
    earlier = run_dir.read()
    surroundings = other_surroundings(earlier, record)
    for change in changes:
        tell(f"resuming with a change: {change}")
    if surroundings:
        tell(f"resuming elsewhere: {'; '.join(surroundings)}; results agree to rounding, not bit for bit")
    tell(f"going on from step {training.step} of {training.total_steps}")
    record.wall_s = earlier.wall_s
    record.resumed_with, record.command = record.command, earlier.command
    record.changes = [*earlier.changes, *changes, *surroundings]
    write_record(run_dir.record_file, record)


def _train(training: Training, record: RunRecord, *, trackers: bool) -> RunRecord:
    """Train to the last step, and keep the record of how far it is.

    Raises:
        Preempted: a signal ended it before.
    """
    training.accelerator.wait_for_everyone()
    if trackers:
        # Not before the run directory stands: trackers write into it.
        training.accelerator.init_trackers("edgecl")
    file = RunFile(record, training)
    state: State = "stopped"
    error = None
    try:
        with StopRequest() as stop, processes.explain_lost_peers():
            stopped_by = training.fit(stop=stop, on_checkpoint=file.keep)
        state = "stopped" if stopped_by else "done"
    except Exception as exc:
        state, error = "failed", _in_one_line(exc)
        raise
    finally:
        for tracker in training.accelerator.trackers:
            tracker.finish()
        file.end(state, error=error)
    if stopped_by:
        raise Preempted(
            f"stopped by {'Ctrl-C' if stopped_by == signal.SIGINT else 'SIGTERM'} after step {training.step} of "
            f"{training.total_steps}, and saved; {_how_to_go_on()}",
            signal=stopped_by,
        )
    return record


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_one_line(problem: Exception) -> str:
    first = first_line(problem)
    return first if isinstance(problem, EdgeclError) else f"{type(problem).__name__}: {first}"


def _check_shares(recipe: Recipe) -> None:
    """Refuse a batch that cannot be shared evenly, before any image is read."""
    batch, world, parts = recipe.data.batch_size, processes.world_size(), recipe.run.accumulate
    if batch % world:
        raise DataError(
            f"a batch of {batch} cannot be shared evenly by {world} processes",
            hint=f"set [data] batch_size to a multiple of {world}",
        )
    if batch // world < 2:
        raise DataError(
            f"a batch of {batch} leaves each of {world} processes one image, and a correlation needs two",
            hint=f"set [data] batch_size to {2 * world} or more, or start fewer processes",
        )
    if batch // world % parts or batch // world // parts < 2:
        raise DataError(
            f"a share of {batch // world} images cannot be cut into {parts} equal parts of two or more",
            hint="set [run] accumulate to "
            + (" or ".join(str(n) for n in range(1, batch // world // 2 + 1) if batch // world % n == 0)),
        )


def _check_memory(recipe: Recipe, device: torch.device) -> None:
    """Refuse a step whose views alone do not fit into the memory of the device they are made on."""
    specs, share = recipe.view_specs, recipe.data.batch_size // processes.world_size()
    needed = share * sum(spec.count * spec.size**2 for spec in specs) * _BYTES_PER_PIXEL
    if device.type == "cuda":
        there, holds = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        there, holds = psutil.virtual_memory().total, "this machine"
    if needed > there:
        raise RecipeError(
            f"the {share} x {sum(spec.count for spec in specs)} views of one step take {needed / 2**30:.1f} GiB, "
            f"and {holds} has {there / 2**30:.1f} GiB of memory",
            hint="lower [data] batch_size or image_size"
            + (", or [views] local_count or local_size" if recipe.views.local_count else ""),
        )


def _refuse_inside(run_dir: RunDir, uri: str) -> None:
    """Refuse to write among the images: the pictures a run writes would count as images from the next start on."""
    folder = folder_of(uri)
    if folder and run_dir.path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"the output '{run_dir.path}' would lie among the images of '{uri}'",
            hint="choose an --out outside that folder: pictures that a run writes would count as images",
        )


def _settings_of(recipe: Recipe) -> dict[str, str]:
    settings = flatten(record_without_secrets(recipe.model_dump(mode="json")))
    return {f"setting {name}": json.dumps(value) for name, value in settings.items()}


def create_accelerator(recipe: Recipe, *, device: str, out: Path) -> Accelerator:
    """Set up device, precision, processes and trackers; after the processes have met.

    Raises:
        DeviceError: a tracker that is not installed.
    """
    for tracker in recipe.run.trackers:
        if not getattr(accelerate.utils, f"is_{tracker}_available")():
            raise DeviceError(
                f"the tracker '{tracker}' is not installed", hint=f"pip install 'edgecl[{tracker}]'"
            )
    # accelerate keeps the settings of the first run of a process for ever; a second run has its own.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # 1 x 1 convolutions are channels-last and contiguous at once; which of the two costs nothing worth a warning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return Accelerator(
        # Told of no GPU, accelerate looks for other processes only when it is to use the CPU.
        cpu=device == "cpu" or (processes.world_size() > 1 and not torch.cuda.is_available()),
        mixed_precision="no" if recipe.run.precision == "fp32" else recipe.run.precision,
        log_with=list(recipe.run.trackers) or None,
        project_dir=str(out) if recipe.run.trackers else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=recipe.method.has_idle_parameters(recipe))
        ],
    )


@contextlib.contextmanager
def _hold(run_dir: RunDir) -> Iterator[None]:
    """Hold the run directory; a start that is refused leaves none of the directories it made."""
    index = run_dir.beside
    alone = not index.parent.exists()
    with hold(run_dir.path, what="run directory"):
        try:
            yield
        finally:
            if alone and not run_dir.record_file.exists():
                shutil.rmtree(index, ignore_errors=True)


def _only_traces(out: Path) -> bool:
    """Return whether there is nothing, or no more than what a run killed in its first moments leaves."""
    if not out.exists():
        return True
    return out.is_dir() and all(path.name.startswith((LOCK, ".run.json.")) for path in out.iterdir())


def _start_run_dir(run_dir: RunDir, record: RunRecord) -> None:
    """Write a new record where an earlier run may stand, then remove what is left of that run.

    Killed at any moment, the directory never holds one run's record with the other's checkpoints.
    """
    with disk_errors(run_dir.path):
        aside = run_dir.path / ".checkpoints.old"
        if aside.exists():  # left by one that was killed right here
            shutil.rmtree(aside)
        if run_dir.checkpoints.exists():
            run_dir.checkpoints.replace(aside)
        run_dir.metrics_file.unlink(missing_ok=True)
        write_record(run_dir.record_file, record)
        clear_directory(run_dir.path, keep={LOCK, RunDir.RECORD})
        run_dir.checkpoints.mkdir()


def _how_to_go_on() -> str:
    words = [word for word in command_line().split(" ") if word not in ("--force", "--resume")]
    command = " ".join([*words, "--resume"])
    world = processes.world_size()
    if world == 1:
        return f"go on with: {command}"
    if torch.distributed.is_torchelastic_launched() and os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        return f"go on with: torchrun --standalone --nproc-per-node {world} -m {command}"
    return f"go on, in every process as it was launched, with: {command}"
