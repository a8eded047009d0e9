"""One optimizer step: views in, a host and its slim nets changed; the host process never waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgecl.config.recipe import Recipe
from edgecl.data.randomness import random_uint64
from edgecl.distributed import processes
from edgecl.methods.method import Embeddings, Terms, create_method
from edgecl.nets.slimming import SlimmableNet
from edgecl.nets.sync_norms import synchronize_norms
from edgecl.train.monitor import gradient_norms
from edgecl.train.optim import create_optimizer, create_schedule


class Outcome(NamedTuple):
    """What came of one step.

    Attributes:
        loss: () total, on the device.
        terms: what the method logs of it.
        embeddings: of this process's share.
        gradient_norms: through the host and through the slim net; empty unless they were watched.
        finite: whether the loss was; if not, nothing was changed.
        stop: the signal by which a process was asked to end; 0 when none was.
    """

    loss: Tensor
    terms: Terms
    embeddings: Embeddings
    gradient_norms: dict[str, float | None]
    finite: bool
    stop: int


class Step:
    """The moving parts of training: method, optimizer and schedule.

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
        self.rate_factor = 1.0
        """What the schedule's rate is multiplied by."""
        self._seed = run.seed
        self._parts = run.accumulate
        self._clip_norm = recipe.optim.clip_norm
        self._memory_format = torch.channels_last if run.channels_last else torch.contiguous_format
        net.to(memory_format=self._memory_format)
        if run.sync_norms != "none":
            synchronize_norms(net, which=run.sync_norms, device=accelerator.device)
        net.to(accelerator.device)
        if run.compile:
            net.compile_passes()
        self.method = create_method(recipe, net, steps_per_epoch=steps_per_epoch).to(accelerator.device)
        optimizer = create_optimizer(self.method, recipe.optim, batch_size=recipe.data.batch_size)
        self.passes, self.optimizer = accelerator.prepare(self.method, optimizer)
        self._schedule = create_schedule(
            optimizer,
            recipe.optim,
            batch_size=recipe.data.batch_size,
            steps_per_epoch=steps_per_epoch,
            total_steps=self.method.total_steps,
        )
        self._statistics = _Statistics(self.method)

    def __call__(
        self,
        views: Sequence[Tensor],
        *,
        number: int,
        watch: bool = False,
        stop: int = 0,
    ) -> Outcome:
        """Take one step.

        Args:
            views: the whole views, (n, 3, H, W) each, then any local ones, (n, 3, h, w); this process's share of the
                batch.
            number: steps taken before this one.
            watch: also measure gradient norms, for which the host process waits.
            stop: the signal by which this process was asked to end; 0 when it was not.
        """
        if not self.passes.training:  # to set it takes a walk over all modules
            self.passes.train()
        self._statistics.remember()
        given = _Input(
            [view.contiguous(memory_format=self._memory_format) for view in views],
            number,
            watch,
            stop,
        )
        learn = self._whole if self._parts == 1 else self._in_parts
        loss, terms, embeddings, vote, watched = learn(given)
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
            self.method.after_step(number)
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(loss, terms, embeddings, norms, not broken, stop)

    @property
    def rate(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _whole(self, given: _Input) -> _Learnt:
        self.net.watched = {} if given.watch else None
        self._seed_layers(given.number, part=0)
        with self.accelerator.autocast():
            embeddings = self.passes(given.views, given.number)
        loss, terms = self.method.loss(embeddings, given.number)
        vote = _Vote(loss, stop=given.stop)
        self.accelerator.backward(loss)
        watched, self.net.watched = self.net.watched or {}, None
        return _Learnt(loss, terms, embeddings, vote, watched)

    def _in_parts(self, given: _Input) -> _Learnt:
        """Compute the gradient of the whole batch's loss with one part of it in memory at a time.

        The loss couples all samples, so parts cannot be summed. All embeddings are computed first, without a graph;
        the loss of the whole gives the gradient for each embedding; then each part is run again, with a graph, and
        its embeddings pull with their gradients.

        Source: Gao et al. 2021 (GradCache), arXiv:2101.06983, section 3.
        """
        parts = list(zip(*(view.chunk(self._parts) for view in given.views), strict=True))
        ahead: list[Embeddings] = []
        for part, views in enumerate(parts):
            self._seed_layers(given.number, part=part)
            with self.net.frozen(), self.accelerator.autocast():
                ahead.append(self.method(views, given.number))
        embeddings = _joined(ahead)
        loss, terms = self.method.loss(embeddings, given.number)
        vote = _Vote(loss, stop=given.stop)
        self.accelerator.backward(loss)
        pulls = {
            name: leaf.grad.chunk(self._parts)
            for name, leaf in embeddings.learnt.items()
            if leaf.grad is not None
        }
        self.net.watched = {} if given.watch else None
        for part, views in enumerate(parts):
            last = part == self._parts - 1
            self._seed_layers(given.number, part=part)
            # Gradients travel once, with the last part.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.passes):
                with self.accelerator.autocast():
                    learnt = self.passes(views, given.number, True).learnt
                torch.autograd.backward(
                    [learnt[name] for name in pulls], [pull[part] for pull in pulls.values()]
                )
        watched, self.net.watched = self.net.watched or {}, None
        return _Learnt(loss, terms, embeddings, vote, watched)

    def _seed_layers(self, number: int, *, part: int) -> None:
        """Seed layers that draw random numbers (dropout, stochastic depth), so that nothing depends on history."""
        key = random_uint64(self._seed, number, np.array([processes.rank()]), stream="layers", count=part + 1)
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
        """Return what a checkpoint keeps besides weights and the optimizer's tensors: the scaling of fp16's loss."""
        scaler = self.accelerator.scaler
        return {"scaler": scaler.state_dict() if scaler else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint kept."""
        scaler = self.accelerator.scaler
        if scaler and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])


def _joined(parts: list[Embeddings]) -> Embeddings:
    """Join parts of a batch; the embeddings that learn become leaves that collect gradients."""
    learnt, targets = (
        {name: torch.cat([part[name] for part in sets]) for name in sets[0]}
        for sets in zip(*parts, strict=True)
    )
    return Embeddings({name: z.requires_grad_() for name, z in learnt.items()}, targets)


class _Input(NamedTuple):
    """What a step is made of, as `Step.__call__` takes it."""

    views: list[Tensor]
    number: int
    watch: bool
    stop: int


class _Learnt(NamedTuple):
    """What the passes of a step leave behind besides the parameters' gradients."""

    loss: Tensor
    terms: Terms
    embeddings: Embeddings
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

    def __init__(self, method: nn.Module):
        self._method = method
        self._groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    def _collect(self) -> None:
        for buffer in self._method.buffers():
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
