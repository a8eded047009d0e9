"""One optimizer step: views in, a host and its slim nets changed; the host process never waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from edgecl.config.recipe import Recipe
from edgecl.data.randomness import random_uint64
from edgecl.distributed import processes
from edgecl.methods.method import Embeddings, Method, Terms, create_method
from edgecl.nets.slimming import SlimmableNet
from edgecl.nets.sync_norms import synchronize_heads, synchronize_norms
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


_Learnt = tuple[Tensor, Terms, Embeddings, Callable[[], tuple[bool, int]]]
"""Loss, terms, embeddings, and the vote of `_cast_vote`."""


class Step:
    """The moving parts of training: method, optimizer and schedule; `create_step` builds one from a recipe.

    `passes` and `optimizer` are wrapped for the accelerator's processes; so many `parts` of this process's share go
    through the net one after another.
    """

    def __init__(
        self,
        method: Method,
        *,
        passes: nn.Module,
        optimizer: AcceleratedOptimizer,
        schedule: CosineLRScheduler,
        accelerator: Accelerator,
        seed: int,
        parts: int,
        clip_norm: float | None,
        memory_format: torch.memory_format,
    ):
        self.method = method
        self.net = method.net
        self.passes = passes
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.rate_factor = 1.0
        """What the schedule's rate is multiplied by."""
        self._schedule = schedule
        self._seed = seed
        self._parts = parts
        self._clip_norm = clip_norm
        self._memory_format = memory_format
        self._statistics = _Statistics(method)

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
            views: (n, 3, size, size) for each view that the method asked for, and (n, ...) of what it knows of each
                picture; this process's share of the batch.
            number: steps taken before this one.
            watch: also measure gradient norms, for which the host process waits.
            stop: the signal by which this process was asked to end; 0 when it was not.
        """
        if not self.passes.training:  # to set it takes a walk over all modules
            self.passes.train()
        self._statistics.remember()
        views = [
            view.contiguous(memory_format=self._memory_format) if view.ndim == 4 else view for view in views
        ]
        self.net.watched = {} if watch else None
        learn = self._whole if self._parts == 1 else self._in_parts
        loss, terms, embeddings, vote = learn(views, number, stop)
        watched, self.net.watched = self.net.watched or {}, None
        norms = self._gradient_norms(watched) if watch else {}
        # By now the device is busy with the backward pass; the vote was cast before it.
        broken, stop = vote()
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

    def _whole(self, views: list[Tensor], number: int, stop: int) -> _Learnt:
        self._seed_layers(number, part=0)
        with self.accelerator.autocast():
            embeddings: Embeddings = self.passes(views, number)
        return self._pull(embeddings, number, stop)

    def _in_parts(self, views: list[Tensor], number: int, stop: int) -> _Learnt:
        """Compute the gradient of the whole batch's loss with one part of it in memory at a time.

        The loss couples all samples, so parts cannot be summed. All embeddings are computed first, without a graph;
        the loss of the whole gives the gradient for each embedding; then each part is run again, with a graph, and
        its embeddings pull with their gradients.

        Source: Gao et al. 2021 (GradCache), arXiv:2101.06983, section 3.
        """
        parts = list(zip(*(view.chunk(self._parts) for view in views), strict=True))
        ahead: list[Embeddings] = []
        for part, of_part in enumerate(parts):
            self._seed_layers(number, part=part)
            with self.net.frozen(), self.accelerator.autocast():
                ahead.append(self.method(of_part, number))
        embeddings = _joined(ahead)
        learned = self._pull(embeddings, number, stop)
        pulls = {
            name: leaf.grad.chunk(self._parts)
            for name, leaf in embeddings.learnt.items()
            if leaf.grad is not None
        }
        for part, of_part in enumerate(parts):
            last = part == self._parts - 1
            self._seed_layers(number, part=part)
            # Gradients travel once, with the last part.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.passes):
                with self.accelerator.autocast():
                    learnt = self.passes(of_part, number, True).learnt
                torch.autograd.backward(
                    [learnt[name] for name in pulls], [pull[part] for pull in pulls.values()]
                )
        return learned

    def _pull(self, embeddings: Embeddings, number: int, stop: int) -> _Learnt:
        """Compute the loss, cast the vote on it and run the loss's backward pass."""
        loss, terms = self.method.loss(embeddings, number)
        vote = _cast_vote(loss, stop=stop)
        self.accelerator.backward(loss)
        return loss, terms, embeddings, vote

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

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps besides weights and the optimizer's tensors: the scaling of fp16's loss."""
        scaler = self.accelerator.scaler
        return {"scaler": scaler.state_dict() if scaler else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        scaler = self.accelerator.scaler
        if scaler and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])


def create_step(recipe: Recipe, net: SlimmableNet, *, accelerator: Accelerator, steps_per_epoch: int) -> Step:
    """Build what a recipe trains with; the net is moved to the accelerator's device and wrapped for its processes."""
    run, optim, device = recipe.run, recipe.optim, accelerator.device
    memory_format = torch.channels_last if run.channels_last else torch.contiguous_format
    net.to(memory_format=memory_format)
    synchronize_norms(net, which=run.sync_norms, device=device)
    net.to(device)
    method = create_method(recipe, net, steps_per_epoch=steps_per_epoch)
    synchronize_heads(method, which=run.sync_norms, device=device)
    if run.compile:
        net.compile_passes()
    bare = create_optimizer(method, optim, batch_size=recipe.data.batch_size)
    passes, optimizer = accelerator.prepare(method, bare)
    schedule = create_schedule(
        bare,
        optim,
        batch_size=recipe.data.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=method.total_steps,
    )
    return Step(
        method,
        passes=passes,
        optimizer=optimizer,
        schedule=schedule,
        accelerator=accelerator,
        seed=run.seed,
        parts=run.accumulate,
        clip_norm=optim.clip_norm,
        memory_format=memory_format,
    )


def _joined(parts: list[Embeddings]) -> Embeddings:
    """Join parts of a batch; the embeddings that learn become leaves that collect gradients."""
    learnt, targets = (
        {name: torch.cat([part[name] for part in sets]) for name in sets[0]}
        for sets in zip(*parts, strict=True)
    )
    return Embeddings({name: z.requires_grad_() for name, z in learnt.items()}, targets)


def _cast_vote(loss: Tensor, *, stop: int) -> Callable[[], tuple[bool, int]]:
    """Ask all processes whether their loss is finite and by which signal to stop; the answer is read later.

    On a GPU it is copied while the backward pass runs, so that reading it does not drain the device's queue.

    Returns:
        what returns (the loss is not finite, the signal by which a process was asked to stop).
    """
    answer = torch.stack(
        [(~torch.isfinite(loss.detach())).float(), torch.full_like(loss.detach(), float(stop)).float()]
    )
    if processes.world_size() > 1:
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
    copied = None
    if answer.is_cuda:
        answer = torch.empty(answer.shape, pin_memory=True).copy_(answer, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def read() -> tuple[bool, int]:
        if copied is not None:
            copied.synchronize()
        broken, asked = answer.numpy()
        return bool(broken), int(asked)

    return read


class _Statistics:
    """The running statistics of all batch norms, to be put back when a step is left out: its forward passes changed them."""

    def __init__(self, method: nn.Module):
        self._groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for buffer in method.buffers():
            live, kept = self._groups.setdefault(buffer.dtype, ([], []))
            live.append(buffer)
            kept.append(torch.empty_like(buffer))

    @torch.no_grad()
    def remember(self) -> None:
        """Copy them aside."""
        for live, kept in self._groups.values():
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore them."""
        for live, kept in self._groups.values():
            torch._foreach_copy_(live, kept)
