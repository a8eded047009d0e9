"""The training loop: a recipe and images in, a run directory out."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import accelerate
import numpy
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from edgecl.artifacts import RunDir, record_header, refuse_existing, write_json
from edgecl.checkpoint import (
    Checkpoint,
    has_checkpoint,
    read_newest,
    restore_optimizer,
    write_checkpoint,
)
from edgecl.data.loading import Batch, TrainingImages, load_eval_images, normalise, say_skipped
from edgecl.data.randomness import uniforms
from edgecl.data.sources import ImageSource, absolute_uri, open_source
from edgecl.data.views import make_views, write_views_grid
from edgecl.errors import ArtifactError, DeviceError, NonFiniteError, RecipeError
from edgecl.methods.sacl_xd import Losses, Passes, Projections, SaclXd
from edgecl.nets.backbone import count_parameters
from edgecl.nets.carving import create_slimmable
from edgecl.nets.slimming import SlimmableNet
from edgecl.progress import Progress
from edgecl.quality import extract_features, knn_top1, rank_me, spread
from edgecl.recipe import Recipe, recipe_from_tables
from edgecl.train.monitor import CollapseAlarm, MetricsFile, gradient_norms
from edgecl.train.optim import create_optimizer, create_schedule

QUALITY_IMAGES = 2048


def pretrain(
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    data: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: bool = False,
    force: bool = False,
    download: bool = False,
) -> dict[str, Any]:
    """Pretrain a host and the slim net inside it from unlabelled images.

    Args:
        recipe: what to train and how.
        recipe_name: for the record.
        out: the run directory to write.
        data: a data URI in place of the recipe's.
        device: 'auto' takes a GPU when there is one.
        resume: continue the run in `out` from its newest whole checkpoint.
        force: replace an earlier run.
        download: let torchvision fetch a data set that is not on the disk.

    Returns:
        the record in run.json.

    Raises:
        RecipeError: no data named, or a resumed run had another recipe.
        DataError: no images, too few for a batch, or too many unreadable.
        ArtifactError: the output exists, nothing to resume, or the disk is full.
        CollapseError, NonFiniteError: the run must not go on.
        DeviceError: no such device, or a tracker that is not installed.
    """
    uri = data or recipe.data.uri
    if uri is None:
        raise RecipeError(
            f"the recipe '{recipe_name}' names no images", hint="say which with --data URI, e.g. a folder"
        )
    run_dir = RunDir(out)
    checkpoint = _checkpoint_to_resume(run_dir, recipe) if resume else None
    if not resume:
        refuse_existing(out, force=force, kind=RunDir.KIND)
    accelerator = _create_accelerator(recipe, device=device, out=out)
    source = open_source(uri, split="train", download=download)
    if checkpoint:
        _refuse_other_images(run_dir, source)
    images = TrainingImages(
        source,
        canvas_size=recipe.data.canvas_size or recipe.data.image_size,
        cache_mib=recipe.data.cache_mib,
        max_bad_fraction=recipe.data.max_bad_fraction,
        workers=recipe.data.workers,
        limit=recipe.data.limit,
    ).to(accelerator.device)
    torch.manual_seed(recipe.run.seed)
    net = create_slimmable(recipe)
    training = Training(recipe, net=net, images=images, source=source, accelerator=accelerator)
    if checkpoint:
        training.restore(checkpoint)
    record = {
        **record_header(RunDir.KIND, made_from=source.fingerprint),
        "recipe_name": recipe_name,
        "recipe": recipe.model_dump(mode="json"),
        "arm": recipe.arm,
        "data": {
            "uri": absolute_uri(uri),
            "images": len(images),
            "fingerprint": source.fingerprint,
            "skipped": list(images.skipped),
        },
        "seed": recipe.run.seed,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "steps_per_epoch": training.steps_per_epoch,
        "total_steps": training.total_steps,
        "params": {"host": count_parameters(net.host), "slim": _count_slim(net)},
        "versions": _versions(),
        "state": "running",
        "wall_s": 0.0,
    }
    before_s = 0.0
    if accelerator.is_main_process:
        if checkpoint:
            earlier = run_dir.read()
            before_s = float(earlier["wall_s"])
            record["resumed_with"] = record["command"]
            record["command"] = earlier["command"]
        else:
            _start_run_dir(run_dir)
        write_json(run_dir.record_file, {**record, "wall_s": before_s})
    accelerator.wait_for_everyone()
    if recipe.run.trackers:
        # Not before the run directory stands: trackers write into it.
        accelerator.init_trackers("edgecl")
    started = time.monotonic()
    try:
        record["state"] = "stopped"
        training.fit(
            run_dir,
            # A run that is killed keeps the time up to its last checkpoint.
            on_checkpoint=lambda: write_json(
                run_dir.record_file,
                {**record, "state": "running", "wall_s": round(before_s + time.monotonic() - started, 3)},
            ),
        )
        record["state"] = "done"
    finally:
        accelerator.end_training()
        if accelerator.is_main_process:
            record["wall_s"] = round(before_s + time.monotonic() - started, 3)
            record["data"]["skipped"] = list(images.skipped)
            if not images.is_cached:
                # Met on the way; images held in memory were counted without them.
                record["data"]["images"] = len(images) - len(images.skipped)
                say_skipped(images.skipped, uri)
            write_json(run_dir.record_file, record)
    return record


@dataclass(frozen=True)
class QualityImages:
    """A fixed set of unaugmented training images on which quality is watched: no test image is ever touched."""

    images: Tensor
    labels: Tensor | None


class Training:
    """One run in memory: what is trained, from what, and how far it is."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        net: SlimmableNet,
        images: TrainingImages,
        source: ImageSource,
        accelerator: Accelerator,
    ):
        data = recipe.data
        self.recipe = recipe
        self.accelerator = accelerator
        self.images = images
        self.net = net
        self.steps_per_epoch = images.steps_per_epoch(data.batch_size)
        self.total_steps = self.steps_per_epoch * recipe.run.epochs
        self.epoch = 0
        self.step = 0
        self.method = SaclXd(
            alpha=recipe.loss.alpha,
            off_diagonal=recipe.loss.off_diagonal,
            scale=recipe.loss.scale,
            xd_direction=recipe.loss.xd_direction,
        )
        if recipe.run.channels_last:
            net.to(memory_format=torch.channels_last)
        net.to(accelerator.device)
        optimizer = create_optimizer(net, recipe.optim, batch_size=data.batch_size)
        self.passes, self.optimizer = accelerator.prepare(Passes(net, self.method), optimizer)
        self.schedule = create_schedule(
            optimizer,
            recipe.optim,
            batch_size=data.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        self.quality_images = self._load_quality_images(source)

    def _load_quality_images(self, source: ImageSource) -> QualityImages:
        data = self.recipe.data
        loaded = load_eval_images(
            source,
            resize_size=data.resize_size or data.image_size,
            image_size=data.image_size,
            # The whole of the data is held to what is allowed; a part of it may have more.
            max_bad_fraction=1.0,
            limit=min(QUALITY_IMAGES, len(self.images)),
        )
        return QualityImages(loaded.images, loaded.labels)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was written."""
        self.net.load_state_dict(checkpoint.model)
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.epoch, self.step = checkpoint.epoch, checkpoint.step

    def fit(self, run_dir: RunDir, *, on_checkpoint: Callable[[], None]) -> None:
        """Train to the last epoch, with metrics and checkpoints on the way."""
        main = self.accelerator.is_main_process
        metrics = MetricsFile(run_dir.metrics_file, after_step=self.step) if main else None
        alarm = CollapseAlarm(run=run_dir.path)
        run = self.recipe.run
        try:
            with Progress("pretrain", total=self.total_steps, unit="steps", done=self.step) as progress:
                while self.epoch < run.epochs:
                    self._train_epoch(run_dir, metrics, alarm, progress)
                    self.epoch += 1
                    last = self.epoch == run.epochs
                    self._refuse_broken_weights(run_dir)
                    if main and metrics and (last or self.epoch % run.quality_epochs == 0):
                        metrics.append(self._quality_record())
                    if main and (last or self.epoch % run.checkpoint_epochs == 0):
                        write_checkpoint(
                            run_dir,
                            epoch=self.epoch,
                            step=self.step,
                            model=self.net.state_dict(),
                            optimizer=self.optimizer.state_dict(),
                        )
                        on_checkpoint()
                    self.accelerator.wait_for_everyone()
        finally:
            if metrics:
                metrics.close()

    def _refuse_broken_weights(self, run_dir: RunDir) -> None:
        """Let no checkpoint be replaced by one that cannot go on: records may be epochs apart."""
        for name, tensor in self.net.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"'{name}' holds numbers that are not finite after epoch {self.epoch}",
                    where={"run": run_dir.path, "step": self.step},
                    hint="lower [optim] lr, lengthen [optim] warmup_epochs, or train in fp32 or bf16",
                )

    def _train_epoch(
        self, run_dir: RunDir, metrics: MetricsFile | None, alarm: CollapseAlarm, progress: Progress
    ) -> None:
        self.passes.train()
        recipe = self.recipe
        dense = self.epoch < recipe.slim.slow_start * recipe.run.epochs
        batches = self.images.batches(
            recipe.run.seed,
            self.epoch,
            batch_size=recipe.data.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        clock, since = time.monotonic(), self.step
        for batch in batches:
            view_a, view_b = self._views(batch, run_dir)
            due = (self.step + 1) % recipe.run.log_every == 0 or self.step + 1 == self.total_steps
            self.net.watched = {} if due else None
            losses, projections = self._step(view_a, view_b, dense=dense)
            self.step += 1
            if due:
                now = time.monotonic()
                rate = (self.step - since) * recipe.data.batch_size / max(now - clock, 1e-9)
                clock, since = now, self.step
                record = self._step_record(losses, projections, images_per_s=rate)
                if metrics:
                    metrics.append(record)
                self.accelerator.log(
                    {key: value for key, value in record.items() if value is not None}, step=self.step
                )
                alarm.check(record)
                progress.advance(0, note=f"loss {record['loss']:.3g}, diagonal {record['diagonal']:.2f}")
            progress.advance()

    def _views(self, batch: Batch, run_dir: RunDir) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        view_a, view_b = make_views(
            batch,
            recipe.views,
            image_size=recipe.data.image_size,
            mean=recipe.data.mean,
            std=recipe.data.std,
            seed=recipe.run.seed,
            epoch=self.epoch,
        )
        if self.step == 0 and self.accelerator.is_main_process:
            write_views_grid(
                run_dir.views_file, batch, view_a, view_b, mean=recipe.data.mean, std=recipe.data.std
            )
        # Decided once for the global batch, so that every process swaps alike.
        draw = uniforms(recipe.run.seed, 0, numpy.array([self.step]), stream="swap-views", count=1)[0, 0]
        if draw < recipe.loss.swap_views:
            view_a, view_b = view_b, view_a
        if recipe.run.channels_last:
            view_a = view_a.contiguous(memory_format=torch.channels_last)
            view_b = view_b.contiguous(memory_format=torch.channels_last)
        return view_a, view_b

    def _step(self, view_a: Tensor, view_b: Tensor, *, dense: bool) -> tuple[Losses, Projections]:
        with self.accelerator.autocast():
            projections = self.passes(view_a, view_b, dense)
        losses = self.method.losses(projections)
        self.accelerator.backward(losses.total)
        if self.accelerator.num_processes > 1:
            # Parameters' gradients are averaged over processes by now, those of the slices are not.
            for part in (self.net.watched or {}).values():
                if part.grad is not None:
                    part.grad = self.accelerator.reduce(part.grad, reduction="mean")
        scaler = self.accelerator.scaler
        self._gradient_norms = (
            gradient_norms(self.net, self.net.watched, scale=scaler.get_scale() if scaler else 1.0)
            if self.net.watched is not None
            else {}
        )
        if self.recipe.optim.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.passes.parameters(), self.recipe.optim.clip_norm)
        self.schedule.step_update(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses, projections

    def _step_record(
        self, losses: Losses, projections: Projections, *, images_per_s: float
    ) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": float(losses.total.detach()),
            "sacl": float(losses.sacl),
            "xd_host": None if losses.xd_host is None else float(losses.xd_host),
            "xd_slim": None if losses.xd_slim is None else float(losses.xd_slim),
            "diagonal": float(losses.diagonal),
            "off_diagonal_rms": float(losses.off_diagonal_rms),
            "std": float(spread(projections.slim_b)),
            **self._gradient_norms,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "images_per_s": images_per_s,
        }

    def _quality_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"step": self.step, "epoch": float(self.epoch)}
        for name in ("host", "slim"):
            features = self._quality_features(name) if name == "host" or self.net.has_slim else None
            record[f"rankme_{name}"] = None if features is None else rank_me(features)
            record[f"knn_top1_{name}"] = None if features is None else self._quality_knn(features)
        return record

    def _quality_features(self, name: str) -> Tensor:
        """Run one of the two nets as it will be carved: evaluation mode, backbone only."""
        from edgecl.nets.backbone import create_backbone
        from edgecl.nets.carving import backbone_tensors

        host = self.recipe.host
        width = self.net.host_width if name == "host" else self.net.slim_width
        with torch.random.fork_rng():
            backbone = create_backbone(host.arch, width=width, stem_stride=host.stem_stride)
        backbone.load_state_dict(backbone_tensors(self.net, width=width))
        backbone.to(self.accelerator.device)
        data = self.recipe.data
        return extract_features(
            backbone, self.quality_images.images, normalise=lambda part: normalise(part, data.mean, data.std)
        )

    def _quality_knn(self, features: Tensor) -> float | None:
        """Classify every other image by its neighbours among the rest."""
        labels = self.quality_images.labels
        if labels is None:
            return None
        return knn_top1(features[::2], labels[::2], features[1::2], labels[1::2])


def _create_accelerator(recipe: Recipe, *, device: str, out: Path) -> Accelerator:
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available", hint="use --device auto or --device cpu")
    for tracker in recipe.run.trackers:
        if not getattr(accelerate.utils, f"is_{tracker}_available")():
            raise DeviceError(
                f"the tracker '{tracker}' is not installed", hint=f"pip install 'edgecl[{tracker}]'"
            )
    # accelerate keeps the settings of the first run of a process for ever; a second run has its own.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if recipe.run.precision == "fp32" else recipe.run.precision,
        log_with=list(recipe.run.trackers) or None,
        project_dir=str(out) if recipe.run.trackers else None,
        # In a slow start the slim net's norms take no part.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.slim.slow_start > 0)],
    )


def _checkpoint_to_resume(run_dir: RunDir, recipe: Recipe) -> Checkpoint | None:
    """Read the checkpoint a run goes on from; None when it was stopped before its first.

    Raises:
        ArtifactError: no run directory.
        RecipeError: the run had another recipe.
    """
    record = run_dir.read()
    before = recipe_from_tables(record["recipe"], source=str(run_dir.record_file))
    changed = _differences(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if changed:
        raise RecipeError(
            "cannot resume with another recipe: " + "; ".join(changed),
            where={"run": run_dir.path},
            hint="repeat the command the run was started with, or start a new run in another --out",
        )
    return read_newest(run_dir) if has_checkpoint(run_dir) else None


def _refuse_other_images(run_dir: RunDir, source: ImageSource) -> None:
    before = run_dir.read()["data"]
    if before["fingerprint"] != source.fingerprint:
        raise RecipeError(
            "cannot resume with other images",
            where={"run": run_dir.path, "was": before["uri"], "now": source.uri},
            hint="name the same --data, unchanged, or start a new run in another --out",
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{table}.{key} was {before[table][key]!r}, now {value!r}"
        for table, values in now.items()
        for key, value in values.items()
        if before[table][key] != value
    ]


def _start_run_dir(run_dir: RunDir) -> None:
    if run_dir.path.exists():
        shutil.rmtree(run_dir.path)
    try:
        run_dir.checkpoints.mkdir(parents=True)
    except OSError as complaint:
        raise ArtifactError(
            f"cannot write the run directory '{run_dir.path}': {complaint.strerror}"
        ) from complaint


def _count_slim(net: SlimmableNet) -> int:
    learned = {id(parameter) for parameter in net.parameters()}
    return sum(
        tensor.numel()
        for name, tensor in net.slim_tensors().items()
        if tensor.requires_grad or id(tensor) in learned
    )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "numpy": numpy.__version__,
    }
