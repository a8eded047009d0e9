"""The training loop: from the step a run is at to its last, with metrics, checkpoints and ways back."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from edgecl.config.recipe import Data, Recipe, Run
from edgecl.config.views import ViewSpec
from edgecl.data.loading import Batch, TrainingImages
from edgecl.data.source import ImageSource
from edgecl.data.views import make_views, write_views_grid
from edgecl.distributed import processes
from edgecl.errors import DataError, counted, tell
from edgecl.methods.method import Method, create_method
from edgecl.metrics.collapse import spread
from edgecl.nets.build import create_slimmable
from edgecl.nets.slimming import SlimmableNet
from edgecl.progress import Progress
from edgecl.storage.checkpoint import Checkpoint, restore_optimizer
from edgecl.storage.directories import RunDir
from edgecl.train.guard import Guard
from edgecl.train.monitor import CollapseAlarm, MetricsFile, read_metrics
from edgecl.train.plateau import RECORDS, PlateauAlarm
from edgecl.train.preemption import StopRequest
from edgecl.train.quality import QualityWatch, quality_of
from edgecl.train.resume import newest_checkpoint
from edgecl.train.saver import Saver
from edgecl.train.step import Outcome, Step, create_step


class Training:
    """One run in memory: what is trained, from what, and how far it is; `create_training` builds one from a recipe.

    Args:
        known: what the method knows of each picture beside its views, (len(images), ...); None for nothing.
        fresh: builds the method anew, as it was before the first step.
        trained: whether the net starts from given weights: it is looked at as it is, and saved before the first step too.
    """

    def __init__(
        self,
        *,
        step: Step,
        images: TrainingImages,
        quality: QualityWatch,
        specs: Sequence[ViewSpec],
        data: Data,
        run: Run,
        known: Tensor | None,
        fresh: Callable[[], Method],
        trained: bool,
        accelerator: Accelerator,
        run_dir: RunDir,
    ):
        self.accelerator = accelerator
        self.images = images
        self.run_dir = run_dir
        self.stepper = step
        self.quality = quality
        self.net = step.net
        self.steps_per_epoch = images.steps_per_epoch(data.batch_size)
        self.total_steps = self.steps_per_epoch * run.epochs
        self.step = 0
        self._specs = specs
        self._data = data
        self._run = run
        self._known = known
        self._fresh = fresh
        self._trained = trained
        self.guard = Guard(max_skipped=run.max_skipped)
        self.alarm = CollapseAlarm(run=run_dir.path, warn=_warn)
        self.plateau = PlateauAlarm(warn=_warn)
        # A tenth of the way: late enough for the records that the alarm asks for.
        self._early_look = max(-(-self.total_steps // 10), RECORDS * run.log_every)
        if self._early_look >= min(run.quality_epochs * self.steps_per_epoch, self.total_steps):
            self._early_look = 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was written."""
        self.stepper.method.load_tensors(checkpoint.model)
        restore_optimizer(self.stepper.optimizer, checkpoint.optimizer)
        self.stepper.restore(checkpoint.state)
        self.guard.restore(checkpoint.state.get("guard", {}))
        self.alarm.restore(checkpoint.state.get("alarm", {}))
        self.plateau.restore(checkpoint.state.get("plateau", {}))
        self.step = checkpoint.step

    def fit(self, *, stop: StopRequest, on_checkpoint: Callable[[int], None]) -> int:
        """Train to the last step.

        Args:
            stop: looked at between steps; when any process was asked to end, all save and return.
            on_checkpoint: called with its step, in another thread, when a checkpoint is on the disk.

        Returns:
            0, or the signal that ended it before the last step.

        Raises:
            NonFiniteError: too many losses that are not finite, also after going back once.
            CollapseError: the embedding lost its dimensions.
            ArtifactError: the disk is full; the checkpoints before are whole.
            DataError: too many images cannot be read, or one keeps the run waiting; where it is is saved.
        """
        run = self._run
        main = self.accelerator.is_main_process
        with contextlib.ExitStack() as open_files:
            self.metrics = self.saver = None
            if main:
                self.metrics = open_files.enter_context(
                    contextlib.closing(MetricsFile(self.run_dir.metrics_file, after_step=self.step))
                )
                self.saver = open_files.enter_context(
                    Saver(self.run_dir, keep=run.keep_checkpoints, keep_best=run.keep_best)
                )
            progress = open_files.enter_context(
                Progress("pretrain", total=self.total_steps, unit="steps", done=self.step)
            )
            # A checkpoint from before the run went back cannot know of it.
            self.guard.went_back |= processes.from_main(self._went_back_before())
            while self.step < self.total_steps:
                # Left early when the run goes back to a checkpoint: the order starts again from there.
                try:
                    stopped = self._train_epoch(stop, on_checkpoint, progress)
                except DataError:
                    # The net is sound: once the images are back, no step is lost.
                    if self._broken_weight() is None:
                        self._save(on_checkpoint)
                    raise
                if stopped:
                    return stopped
        return 0

    def _train_epoch(
        self, stop: StopRequest, on_checkpoint: Callable[[int], None], progress: Progress
    ) -> int:
        """Train to the end of the epoch; return the signal that ends the run before, or 0."""
        run, batch_size = self._run, self._data.batch_size
        epoch, done = divmod(self.step, self.steps_per_epoch)
        if self.step == 0:
            looks = self.quality.measure(self.net, untrained=not self._trained)
            self._record_quality(looks)
            if self._trained:
                self._save(on_checkpoint, quality=quality_of(looks))
        batches = self.images.batches(
            run.seed,
            epoch,
            batch_size=batch_size,
            start_step=done,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        clock, since = time.monotonic(), self.step
        with contextlib.closing(cast(Generator[Batch, None, None], batches)):
            for batch in batches:
                views = self._views(batch, epoch)
                due = (self.step + 1) % run.log_every == 0 or self.step + 1 == self.total_steps
                self.stepper.rate_factor = self.guard.rate_factor
                outcome = self.stepper(
                    views,
                    number=self.step,
                    watch=due,
                    stop=stop.asked,
                )
                self.step += 1
                if not outcome.finite and self._left_out(outcome):
                    self._go_back(because=f"{counted(len(self.guard.skipped), 'step')} without a finite loss")
                    return 0
                if due:
                    now = time.monotonic()
                    rate = (self.step - since) * batch_size / max(now - clock, 1e-9)
                    clock, since = now, self.step
                    self._record_step(outcome, progress, images_per_s=rate)
                progress.advance()
                if not self._end_step(outcome, on_checkpoint):
                    self._go_back(because="a net that is not finite")
                    return 0
                if outcome.stop and self.step < self.total_steps:
                    return outcome.stop
        return 0

    def _views(self, batch: Batch, epoch: int) -> list[Tensor]:
        data = self._data
        specs = [spec for spec in self._specs if not spec.teacher or self._known is None]
        views = make_views(batch, specs, mean=data.mean, std=data.std, seed=self._run.seed, epoch=epoch)
        if self.step == 0 and self.accelerator.is_main_process:
            write_views_grid(self.run_dir.views_file, batch, views, mean=data.mean, std=data.std)
        if self._known is not None:
            views.append(self._known[torch.from_numpy(batch.indices)].to(views[0].device))
        return views

    def _left_out(self, outcome: Outcome) -> bool:
        """Record a step whose loss is not finite; return whether the run must go back."""
        terms = {"loss": outcome.loss.detach(), **outcome.terms}
        text = ", ".join(f"{name} {float(term):g}" for name, term in terms.items() if term is not None)
        self._record_event("left out", because=text, rate=self.stepper.rate)
        return self.guard.must_go_back(
            self.step, terms=f"{text}, learning rate {self.stepper.rate:.3g}", where=self._where
        )

    def _go_back(self, *, because: str) -> None:
        """Start again from the last checkpoint, or from the first step, with a smaller rate."""
        left_out, broke_at = list(self.guard.skipped), self.step
        if self.saver:
            self.saver.flush()
        checkpoint = processes.from_main(
            newest_checkpoint(self.run_dir) if self.accelerator.is_main_process else None
        )
        if checkpoint:
            self.restore(checkpoint)
        else:
            self._start_anew()
        self.guard.go_back()
        if self.metrics:
            self.metrics.keep_until(self.step)
        self._record_event(
            "went back",
            because=because,
            from_step=broke_at,
            left_out=left_out,
            rate_factor=self.guard.rate_factor,
        )
        if self.metrics:
            self.metrics.sync()  # it is what a resumed run knows it by
        if self.accelerator.is_main_process:
            _warn(
                f"step {broke_at}: the loss or the net is not finite; back to step {self.step} with "
                f"{self.guard.rate_factor:g} of the learning rate"
            )

    def _went_back_before(self) -> bool:
        return self.metrics is not None and any(
            record.get("event") == "went back" for record in read_metrics(self.run_dir.metrics_file)
        )

    def _start_anew(self) -> None:
        """Return to the weights of the first step: functions of the seed alone."""
        self.stepper.method.load_state_dict(self._fresh().state_dict())
        self.stepper.optimizer.state.clear()
        self.alarm.restore({})
        self.plateau.restore({})
        self.step = 0

    def _record_step(self, outcome: Outcome, progress: Progress, *, images_per_s: float) -> None:
        # Of the global batch, like the losses.
        watched = self.stepper.method.watched(outcome.embeddings)
        embeddings = self.accelerator.gather(watched.detach().contiguous())
        record = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": float(outcome.loss.detach()),
            **{name: None if term is None else float(term) for name, term in outcome.terms.items()},
            "std": float(spread(embeddings)),
            **outcome.gradient_norms,
            "lr": self.stepper.rate,
            "images_per_s": images_per_s,
        }
        if self.metrics:
            self.metrics.append(record)
        self.accelerator.log(
            {key: value for key, value in record.items() if value is not None}, step=self.step
        )
        self._warned(self.alarm.check(record))
        self._record_plateau(self.plateau.check(record))
        diagonal = record.get("diagonal")
        note = f"loss {record['loss']:.3g}"
        progress.advance(0, note=note if diagonal is None else f"{note}, diagonal {diagonal:.2f}")

    def _end_step(self, outcome: Outcome, on_checkpoint: Callable[[int], None]) -> bool:
        """Do what is due after a step; return False when its weights are broken and the run must go back."""
        run = self._run
        epoch, within = divmod(self.step, self.steps_per_epoch)
        last = self.step == self.total_steps
        save = within == 0 and (last or epoch % run.checkpoint_epochs == 0)
        save = save or (run.checkpoint_steps is not None and self.step % run.checkpoint_steps == 0)
        scheduled = save
        save = save or outcome.stop != 0
        regular = within == 0 and (last or epoch % run.quality_epochs == 0)
        measure = regular or self.step == self._early_look
        if not (save or measure):
            return True
        # Norms that are not synchronized differ between processes; what would be written decides for all.
        broken = processes.from_main(self._broken_weight())
        looks = self.quality.measure(self.net) if measure and broken is None else {}
        if any(value is not None and math.isnan(value) for value in looks.values()):
            broken = "the features"
        if broken is not None:
            self.guard.net_broke(broken, where=self._where)
            return False
        quality = None
        if measure:
            quality = quality_of(looks)
            record = self._record_quality(looks)
            if regular:
                self._warned(self.alarm.check_quality(record))
        if scheduled:
            self.guard.start_anew()
        if save:
            self._save(on_checkpoint, quality=quality)
        return True

    def _record_quality(self, looks: dict[str, float | None]) -> dict[str, float | None]:
        record = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **looks}
        if self.metrics:
            self.metrics.append(record)
        images, features = self.quality.shape
        self._record_plateau(self.plateau.check_quality(record, images=images, features=features))
        return record

    def _save(
        self, on_checkpoint: Callable[[int], None], *, quality: Mapping[str, Any] | None = None
    ) -> None:
        """Begin to write a checkpoint, in the main process."""
        if not (self.saver and self.metrics):
            return
        self.metrics.sync()
        self.saver.save(
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            model=self.stepper.method.tensors(),
            optimizer=self.stepper.optimizer.state_dict(),
            state={
                **self.stepper.state(),
                "guard": self.guard.state(),
                "alarm": self.alarm.state(),
                "plateau": self.plateau.state(),
            },
            quality=quality,
            on_written=partial(on_checkpoint, self.step),
        )

    def _broken_weight(self) -> str | None:
        """Name a tensor of the net that is not finite: no checkpoint may hold one."""
        for name, tensor in self.stepper.method.tensors().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"the weights '{name}'"
        return None

    def _record_event(self, event: str, **what: Any) -> None:
        if self.metrics:
            epoch = self.step / self.steps_per_epoch
            self.metrics.append({"step": self.step, "epoch": epoch, "event": event, **what})

    def _warned(self, cause: str | None) -> None:
        if cause:
            self._record_event("warning", because=cause)

    def _record_plateau(self, words: str | None) -> None:
        if words:
            self._record_event("warning", because="plateau", words=words)

    @property
    def _where(self) -> dict[str, object]:
        return {"run": self.run_dir.path, "step": self.step}


def create_training(
    recipe: Recipe,
    *,
    net: SlimmableNet,
    images: TrainingImages,
    source: ImageSource,
    accelerator: Accelerator,
    run_dir: RunDir,
) -> Training:
    """Build what a recipe asks for; the quality watch reads images of its own from the source."""
    steps_per_epoch = images.steps_per_epoch(recipe.data.batch_size)

    def fresh() -> Method:
        torch.manual_seed(recipe.run.seed)
        return create_method(recipe, create_slimmable(recipe), steps_per_epoch=steps_per_epoch)

    step = create_step(recipe, net, accelerator=accelerator, steps_per_epoch=steps_per_epoch)
    return Training(
        step=step,
        images=images,
        quality=QualityWatch(
            source, images=len(images), data=recipe.data, host=recipe.host, accelerator=accelerator
        ),
        specs=recipe.view_specs,
        data=recipe.data,
        run=recipe.run,
        known=step.method.look_up(images, cache=run_dir.beside),
        fresh=fresh,
        trained=recipe.host.init is not None,
        accelerator=accelerator,
        run_dir=run_dir,
    )


def _warn(text: str) -> None:
    if processes.is_main():
        tell(text)
