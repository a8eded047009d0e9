"""run.json while a run goes on: what it is, and how far it is."""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from importlib.metadata import version
from typing import Literal

import torch

from edgecl.config.recipe import Recipe
from edgecl.data.sources import absolute_uri
from edgecl.data.unreadable import say_skipped
from edgecl.distributed import processes
from edgecl.errors import ArtifactError
from edgecl.nets.backbone import count_parameters
from edgecl.nets.given import GivenNet
from edgecl.nets.slimming import SlimmableNet
from edgecl.storage.record_files import write_record
from edgecl.storage.records import ImagesRead, RunRecord
from edgecl.train.loop import Training

State = Literal["done", "stopped", "failed"]


class RunFile:
    """The record of a run as it begins or goes on, in its file; the main process writes it."""

    def __init__(self, record: RunRecord, training: Training):
        self._record = record
        self._training = training
        self._before_s = record.wall_s
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def keep(self, step: int) -> None:
        """Write which step was saved, so that a run that is killed keeps its step and its time; any thread may."""
        with self._lock:
            self._record.step = step
            self._write()

    def end(self, state: State, *, error: str | None) -> None:
        """Write how the run ended; a checkpoint that is still on its way when Ctrl-C ends it at once leaves the state.

        Raises:
            ArtifactError: the disk is full, unless the run failed: that error is the one to show.
        """
        images, record = self._training.images, self._record
        record.state, record.error = state, error
        if state == "done":
            record.step = self._training.step
        if not self._training.accelerator.is_main_process:
            return
        record.data.skipped = list(images.skipped)
        if not images.is_cached:
            # Met on the way; images held in memory were counted without them.
            record.data.images = len(images) - len(images.skipped)
            say_skipped(images.skipped, record.data.uri)
        with self._lock, contextlib.suppress(*[ArtifactError] if state == "failed" else []):
            self._write()

    def _write(self) -> None:
        self._record.plateau = self._training.plateau.decision()
        self._record.wall_s = round(self._before_s + time.monotonic() - self._started, 3)
        write_record(self._training.run_dir.record_file, self._record)


def what_it_rests_on(recipe: Recipe, start: GivenNet | None) -> dict[str, str]:
    """Load what a run needs besides pictures; return what it is -> the sha256 of its content.

    Raises:
        EdgeclError: as `MethodConfig.prepare`.
    """
    return {**recipe.method.prepare(recipe), **({"init": start.sha256} if start else {})}


def describe_run(
    recipe: Recipe,
    training: Training,
    *,
    rests_on: dict[str, str],
    start: GivenNet | None,
    recipe_name: str,
    uri: str,
) -> RunRecord:
    """Return the record of a run as it begins."""
    net, images, source = training.net, training.images, training.images.source
    accelerator = training.accelerator
    return RunRecord(
        made_from=source.fingerprint,
        recipe_name=recipe_name,
        recipe=recipe.model_dump(mode="json"),
        method=recipe.title,
        panels=[panel._asdict() for panel in recipe.method.panels],
        data=ImagesRead(
            uri=absolute_uri(uri),
            found=len(source),
            images=len(images),
            fingerprint=source.fingerprint,
            skipped=list(images.skipped),
        ),
        seed=recipe.run.seed,
        # A processor is one device, however many processes it runs; accelerate numbers it.
        device="cpu" if accelerator.device.type == "cpu" else str(accelerator.device),
        processes=accelerator.num_processes,
        threads=torch.get_num_threads(),
        steps_per_epoch=training.steps_per_epoch,
        total_steps=training.total_steps,
        params={
            "host": count_parameters(net.host.get_submodule("backbone")),
            "slim": _count_slim(net, net.slim_width),
            # Named as in the metrics.
            **{f"slim_at_{width:g}": _count_slim(net, width) for width in net.slim_widths[1:]},
        },
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("timm", "accelerate", "numpy")},
        },
        host_skips=net.host_skips,
        rests_on=rests_on,
        left_out=list(start.left_out) if start else [],
        launch=processes.launch(),
        plateau=training.plateau.decision(),
        state="running",
        step=training.step,
    )


def _count_slim(net: SlimmableNet, width: float) -> int:
    learned = {id(parameter) for parameter in net.parameters()}
    return sum(
        tensor.numel()
        for name, tensor in net.slim_tensors(width).items()
        if name.startswith("backbone.") and (tensor.requires_grad or id(tensor) in learned)
    )
