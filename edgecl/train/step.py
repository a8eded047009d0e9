"""One optimiser step: two views in, a host and its slim nets changed; the host process never waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from edgecl import processes
from edgecl.data.randomness import whole_numbers
from edgecl.methods.sacl_xd import Comparison, Losses, Passes, Projections, SaclXd
from edgecl.nets.slimming import SlimmableNet
from edgecl.nets.sync_norms import synchronise_norms
from edgecl.recipe import CodingRate, Loss, Recipe
from edgecl.train.monitor import gradient_norms
from edgecl.train.optim import create_optimizer, create_schedule


class Outcome(NamedTuple):
    """What came of one step.

    Attributes:
        losses: its loss terms, on the device.
        projections: of this process's share.
        gradient_norms: through the host and through the slim net; empty unless they were watched.
        finite: whether the loss was; if not, nothing was changed.
        stop: the signal by which a process was asked to end; 0 when none was.
    """

    losses: Losses
    projections: Projections
    gradient_norms: dict[str, float | None]
    finite: bool
    stop: int


class Step:
    """The moving parts of training: passes, losses, optimiser and schedule.

    Args:
        recipe: what to train and how.
        net: host and slim nets; moved to the accelerator's device and wrapped for its processes.
        accelerator: device, precision and processes.
        steps_per_epoch: of the run.
    """

    def __init__(self, recipe: Recipe, *, net: SlimmableNet, accelerator: Accelerator, steps_per_epoch: int):
        run = recipe.run
        self.net = net
        self.accelerator = accelerator
        self.method = create_method(recipe.loss, recipe.coding_rate)
        self.rate_factor = 1.0
        """What the schedule's rate is multiplied by."""
        self._seed = run.seed
        self._parts = run.accumulate
        self._clip_norm = recipe.optim.clip_norm
        self._memory_format = torch.channels_last if run.channels_last else torch.contiguous_format
        net.to(memory_format=self._memory_format)
        if run.sync_norms != "none":
            synchronise_norms(net, which=run.sync_norms, device=accelerator.device)
        net.to(accelerator.device)
        if run.compile:
            net.compile_passes()
        optimizer = create_optimizer(net, recipe.optim, batch_size=recipe.data.batch_size)
        self.passes, self.optimizer = accelerator.prepare(Passes(net, self.method), optimizer)
        self._local_passes: Passes = accelerator.unwrap_model(self.passes)
        total_steps = steps_per_epoch * run.epochs
        self._rate_weight = partial(coding_rate_weight, recipe.coding_rate, total_steps=total_steps)
        self._schedule = create_schedule(
            optimizer,
            recipe.optim,
            batch_size=recipe.data.batch_size,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )
        self._statistics = _Statistics(net)

    def __call__(
        self,
        views: Sequence[Tensor],
        *,
        number: int,
        dense: bool = False,
        widths: Sequence[float] | None = None,
        watch: bool = False,
        stop: int = 0,
    ) -> Outcome:
        """Take one step.

        Args:
            views: (n, 3, H, W) for the host, the same for the slim nets, then any local views, (n, 3, h, w) each, for
                the slim net; this process's share of the batch.
            number: steps taken before this one.
            dense: all views through the host (slow start).
            widths: which slim nets take part, the slim width always; None means all.
            watch: also measure gradient norms, for which the host process waits.
            stop: the signal by which this process was asked to end; 0 when it was not.
        """
        self.passes.train()
        self._statistics.remember()
        given = _Input(
            [view.contiguous(memory_format=self._memory_format) for view in views],
            number,
            dense,
            widths,
            watch,
            stop,
        )
        learn = self._whole if self._parts == 1 else self._in_parts
        losses, projections, vote, watched = learn(given)
        norms = self._gradient_norms(watched) if watch else {}
        # By now the device is busy with the backward pass; the vote was cast before it.
        broken, stop = vote.result()
        if broken:
            self._statistics.put_back()
        else:
            if self._clip_norm is not None:
                self.accelerator.clip_grad_norm_(self.passes.parameters(), self._clip_norm)
            self._schedule.step_update(number)
            for group in self.optimizer.param_groups:
                group["lr"] *= self.rate_factor
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(losses, projections, norms, not broken, stop)

    @property
    def rate(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _whole(self, given: _Input) -> _Learnt:
        self.net.watched = {} if given.watch else None
        self._seed_layers(given.number, part=0)
        with self.accelerator.autocast():
            projections = self.passes(given.views, given.dense, given.widths)
        losses = self.method.losses(projections, rate_weight=self._rate_weight(given.number))
        vote = _Vote(losses.total, stop=given.stop)
        self.accelerator.backward(losses.total)
        watched, self.net.watched = self.net.watched or {}, None
        return _Learnt(losses, projections, vote, watched)

    def _in_parts(self, given: _Input) -> _Learnt:
        """Compute the gradient of the whole batch's loss with one part of it in memory at a time.

        The loss couples all samples, so parts cannot be summed. All projections are computed first, without a graph;
        the loss of the whole gives the gradient for each projection; then each part is run again, with a graph, and
        its projections pull with their gradients.

        Source: Gao et al. 2021 (GradCache), arXiv:2101.06983, section 3.
        """
        parts = list(zip(*(view.chunk(self._parts) for view in given.views), strict=True))
        ahead: list[Projections] = []
        for part, views in enumerate(parts):
            self._seed_layers(given.number, part=part)
            with self.net.frozen(), self.accelerator.autocast():
                ahead.append(self._local_passes(views, given.dense, given.widths))
        projections = self._joined(ahead)
        losses = self.method.losses(projections, rate_weight=self._rate_weight(given.number))
        vote = _Vote(losses.total, stop=given.stop)
        self.accelerator.backward(losses.total)
        pulls = [
            leaf.grad.chunk(self._parts)  # type: ignore[union-attr]
            for leaf in projections.tensors()
            if leaf.requires_grad
        ]
        self.net.watched = {} if given.watch else None
        for part, views in enumerate(parts):
            last = part == self._parts - 1
            self._seed_layers(given.number, part=part)
            # Gradients travel once, with the last part.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.passes):
                with self.accelerator.autocast():
                    learnt = self.passes(views, given.dense, given.widths, True)
                torch.autograd.backward(learnt.tensors(), [pull[part] for pull in pulls])
        watched, self.net.watched = self.net.watched or {}, None
        return _Learnt(losses, projections, vote, watched)

    def _joined(self, parts: list[Projections]) -> Projections:
        """Join parts of a batch; the projections that learn become leaves that collect gradients."""
        whole = parts[0].with_tensors(
            [torch.cat(pieces) for pieces in zip(*(part.tensors() for part in parts), strict=True)]
        )
        frozen = [] if self.method.four_learn else [whole.slim_a, whole.host_b]
        for z in whole.tensors():
            z.requires_grad_(all(z is not target for target in frozen))
        return whole

    def _seed_layers(self, number: int, *, part: int) -> None:
        """Seed layers that draw random numbers (dropout, stochastic depth), so that nothing depends on history."""
        key = whole_numbers(self._seed, number, np.array([processes.rank()]), stream="layers", count=part + 1)
        torch.manual_seed(int(key[0, part]))

    def _gradient_norms(self, watched: dict[str, Tensor]) -> dict[str, float | None]:
        if self.accelerator.num_processes > 1:
            # Parameters' gradients are averaged over processes by now, those of the slices are not.
            watched = {
                name: self.accelerator.reduce(piece, reduction="mean") for name, piece in watched.items()
            }
        scaler = self.accelerator.scaler
        return gradient_norms(self.net, watched, scale=scaler.get_scale() if scaler else 1.0)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides weights and the optimiser's tensors: the scaling of fp16's loss."""
        scaler = self.accelerator.scaler
        return {"scaler": scaler.state_dict() if scaler else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint kept."""
        scaler = self.accelerator.scaler
        if scaler and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])


def create_method(loss: Loss, coding_rate: CodingRate) -> SaclXd:
    """Return the method that a recipe's settings describe."""
    return SaclXd(
        alpha=loss.alpha,
        comparison=Comparison(loss.name, off_diagonal=loss.off_diagonal, temperature=loss.temperature),
        scale=loss.scale,
        xd_direction=loss.xd_direction,
        symmetric=loss.symmetric,
        learn_targets=loss.learn_targets,
        rate_epsilon=coding_rate.epsilon,
        rate_encoders=coding_rate.encoders,
    )


def coding_rate_weight(coding_rate: CodingRate, step: int, *, total_steps: int) -> float:
    """Return the weight of the coding rate in a step, 0-based: constant, or falling in a line to 0 at `until`."""
    if coding_rate.until is None:
        return coding_rate.weight
    return coding_rate.weight * max(0.0, 1 - step / (coding_rate.until * total_steps))


class _Input(NamedTuple):
    """What a step is made of, as `Step.__call__` takes it."""

    views: list[Tensor]
    number: int
    dense: bool
    widths: Sequence[float] | None
    watch: bool
    stop: int


class _Learnt(NamedTuple):
    """What the passes of a step leave behind besides the parameters' gradients."""

    losses: Losses
    projections: Projections
    vote: _Vote
    watched: dict[str, Tensor]
    """Gradients of the slim net's slices; empty unless asked for."""


class _Vote:
    """Whether the loss is finite, and by which signal to stop: cast before the backward pass, read after it.

    On a GPU the answer is copied while the backward pass runs, so that reading it does not drain the device's queue.
    """

    def __init__(self, loss: Tensor, *, stop: int):
        answer = torch.stack(
            [(~torch.isfinite(loss.detach())).float(), torch.full_like(loss.detach(), float(stop)).float()]
        )
        if processes.world_size() > 1:
            torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        self._copied: torch.cuda.Event | None = None
        if answer.is_cuda:
            held = torch.empty(answer.shape, pin_memory=True)
            held.copy_(answer, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
            answer = held
        self._answer = answer

    def result(self) -> tuple[bool, int]:
        """Return (the loss is not finite, the signal by which a process was asked to stop)."""
        if self._copied is not None:
            self._copied.synchronize()
        broken, stop = self._answer.numpy()
        return bool(broken), int(stop)


class _Statistics:
    """The running statistics of all batch norms, to be put back when a step is left out: its forward passes changed them."""

    def __init__(self, net: SlimmableNet):
        self._net = net
        self._groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    def _collect(self) -> None:
        for buffer in self._net.buffers():
            live, kept = self._groups.setdefault(buffer.dtype, ([], []))
            live.append(buffer)
            kept.append(torch.empty_like(buffer))

    @torch.no_grad()
    def remember(self) -> None:
        """Copy them aside."""
        if not self._groups:
            self._collect()
        for live, kept in self._groups.values():
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore them."""
        for live, kept in self._groups.values():
            torch._foreach_copy_(live, kept)
