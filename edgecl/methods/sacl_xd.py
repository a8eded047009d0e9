"""SACL-XD: views, a host and the slim net inside it -> named losses. Its settings give every arm.

| settings                        | method       | passes                                   |
| ------------------------------- | ------------ | ---------------------------------------- |
| slim width = host width, a = 1  | Barlow Twins | host(A), host(B)                         |
| slim width = host width, a < 1  | XD only      | the same; the frozen passes equal them   |
| slim width < host width, a = 1  | SACL only    | host(A), slim(B)                         |
| slim width < host width, a < 1  | SACL-XD      | host(A), slim(B), [slim(A)], [host(B)]   |

Barlow Twins' loss is one of three (`Comparison`): SimCLR's or the bare alignment may stand in its place in every arm, and
the coding rate beside any of them.

Several slim widths train in one run by the sandwich rule: each step, view B goes through the widest, the narrowest
and one other, and all of them learn from the same host(A) and [host(B)].

Source: Meng, Yang, Lee, Shin, Fan, Seo, "Slimmed Asymmetrical Contrastive Learning and Cross Distillation for
Lightweight Model Training", NeurIPS 2023. Sandwich rule: Yu and Huang, "Universally Slimmable Networks and Improved
Training Techniques", ICCV 2019, arXiv:1903.05134.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from edgecl.data.randomness import uniforms
from edgecl.methods.losses import (
    CorrelationLoss,
    alignment_loss,
    coding_rate,
    contrastive_loss,
    cross_correlation_loss,
)
from edgecl.nets.slimming import SlimmableNet


class Losses(NamedTuple):
    """The terms of one step.

    Attributes:
        total: () what is minimised.
        sacl: () contrastive term L_SACL, unscaled, detached; the mean over its pairs of projections.
        xd_host: () L_D(z_A, [z_A]), which moves the encoder of view A (the host); None when there is none.
        xd_slim: () L_D(z_B, [z_B]), which moves the encoder of view B (the slim net); None when there is none;
            with several widths the mean.
        coding_rate: () mean coding rate of the encoders that it is asked of, nats; None when its weight is 0.
        diagonal: () mean diagonal of the correlation of the two views, view B through the slim width.
        off_diagonal_rms: () root mean square off its diagonal.
    """

    total: Tensor
    sacl: Tensor
    xd_host: Tensor | None
    xd_slim: Tensor | None
    coding_rate: Tensor | None
    diagonal: Tensor
    off_diagonal_rms: Tensor


class Projections(NamedTuple):
    """(N, D) projections of one step.

    Attributes:
        host_a: view A through the host.
        slim_b: view B through each width of the step, the slim width first; in a slow start through the host alone.
        slim_a: view A through the slim width; None when nothing needs it, or where one net takes both views. Frozen
            unless the method's four passes learn.
        host_b: view B through the host; None and frozen as slim_a.
        local: each small local view through the slim width, in a slow start through the host.
    """

    host_a: Tensor
    slim_b: tuple[Tensor, ...]
    slim_a: Tensor | None = None
    host_b: Tensor | None = None
    local: tuple[Tensor, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Return all of them, in a fixed order."""
        targets = [z for z in (self.slim_a, self.host_b) if z is not None]
        return [self.host_a, *self.slim_b, *self.local, *targets]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Projections:
        """Return the same projections with other tensors in the order of `tensors`."""
        left = iter(tensors)
        return Projections(
            host_a=next(left),
            slim_b=tuple(next(left) for _ in self.slim_b),
            local=tuple(next(left) for _ in self.local),
            slim_a=None if self.slim_a is None else next(left),
            host_b=None if self.host_b is None else next(left),
        )


@dataclass(frozen=True)
class Comparison:
    """How two sets of projections are compared: the loss inside every term.

    Args:
        name: 'barlow-twins' decorrelates, 'simclr' contrasts, 'cosine' only aligns and needs the coding rate.
        off_diagonal: Barlow Twins: weight of the redundancy term, >= 0.
        temperature: SimCLR: of its softmax, > 0.
    """

    name: Literal["barlow-twins", "simclr", "cosine"] = "barlow-twins"
    off_diagonal: float = 0.0051
    temperature: float = 0.2

    def __call__(self, z: Tensor, other: Tensor) -> Tensor:
        """Return the () loss between (N, D) projections of the same images."""
        if self.name == "simclr":
            return contrastive_loss(z, other, temperature=self.temperature)
        if self.name == "cosine":
            return alignment_loss(z, other)
        return self.correlation(z, other).total

    def correlation(self, z: Tensor, other: Tensor) -> CorrelationLoss:
        """Return Barlow Twins' loss with what to watch of the correlation."""
        return cross_correlation_loss(z, other, off_diagonal=self.off_diagonal)


@dataclass(frozen=True)
class SaclXd:
    """L = alpha L_SACL(z_A, z_B) + (1 - alpha) (L_D(z_A, [z_A]) + L_D(z_B, [z_B])) / 2 - w R.

    With several widths, every term in z_B is the mean over the widths of the step; local views stand beside z_B in L_SACL.

    Args:
        alpha: weight of the contrastive term, 0..1.
        comparison: the loss inside L_SACL and L_D.
        scale: multiplies L_SACL and L_D, > 0.
        xd_direction: 'both' as published; 'slim_only' leaves out L_D(z_A, [z_A]), which pulls the host towards
            the frozen slim net, and gives its weight to L_D(z_B, [z_B]).
        symmetric: both views learn through both encoders: (host(B), slim(A)) is one more pair of L_SACL, and L_D pulls
            slim(A) towards host(A) and host(B) towards slim(B), too. Changes nothing where one net takes both views.
        learn_targets: gradient flows into [z] too.
        rate_epsilon: epsilon of the coding rate R, > 0.
        rate_encoders: whose projections R is the mean of.
    """

    alpha: float
    comparison: Comparison
    scale: float = 1.0
    xd_direction: Literal["both", "slim_only"] = "both"
    symmetric: bool = False
    learn_targets: bool = False
    rate_epsilon: float = 0.5
    rate_encoders: Literal["both", "host", "slim"] = "both"

    @property
    def distils(self) -> bool:
        """Whether there is a distillation term."""
        return self.alpha < 1

    @property
    def four_learn(self) -> bool:
        """Whether the passes of slim(A) and host(B) carry gradient."""
        return self.symmetric or (self.distils and self.learn_targets)

    def project(
        self,
        net: SlimmableNet,
        view_a: Tensor,
        view_b: Tensor,
        *,
        local: Sequence[Tensor] = (),
        dense: bool = False,
        widths: Sequence[float] | None = None,
    ) -> Projections:
        """Run the passes this arm needs.

        Args:
            net: host and slim nets.
            view_a: (N, 3, H, W) for the host.
            view_b: (N, 3, H, W) for the slim nets.
            local: further views, (N, 3, h, w) each, for the slim net.
            dense: all views through the host (slow start).
            widths: slim widths of this step; None means all. The slim width is always among them.

        Raises:
            SliceError: the net has no such slim width.
        """
        learnt = self.learning_passes(net, view_a, view_b, local=local, dense=dense, widths=widths)
        if self.four_learn:
            return learnt
        slim_a, host_b = self.frozen_passes(net, view_a, view_b, dense=dense)
        return learnt._replace(slim_a=slim_a, host_b=host_b)

    def learning_passes(
        self,
        net: SlimmableNet,
        view_a: Tensor,
        view_b: Tensor,
        *,
        local: Sequence[Tensor] = (),
        dense: bool = False,
        widths: Sequence[float] | None = None,
    ) -> Projections:
        """Run the passes that carry gradient; arguments as for project. What is frozen is None."""
        host_a = net.forward_host(view_a)
        if dense:
            slim_b: tuple[Tensor, ...] = (net.forward_host(view_b),)
        else:
            chosen = dict.fromkeys([net.slim_width, *(net.slim_widths if widths is None else widths)])
            slim_b = tuple(net.forward_slim(view_b, width) for width in chosen)
        learnt = Projections(host_a, slim_b, local=self._local_passes(net, local, dense=dense))
        if not self.four_learn or dense or not net.has_slim:
            return learnt
        wants_slim_a = self.symmetric or self.xd_direction == "both"
        return learnt._replace(
            slim_a=net.forward_slim(view_a) if wants_slim_a else None, host_b=net.forward_host(view_b)
        )

    @staticmethod
    def _local_passes(net: SlimmableNet, local: Sequence[Tensor], *, dense: bool) -> tuple[Tensor, ...]:
        if not local:
            return ()
        # Running statistics are for whole pictures, which the nets will see when they are used.
        with net.untracked():
            return tuple(map(net.forward_host if dense else net.forward_slim, local))

    def frozen_passes(
        self,
        net: SlimmableNet,
        view_a: Tensor,
        view_b: Tensor,
        *,
        dense: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the passes that only give targets; arguments as for project.

        Returns:
            slim_a and host_b of Projections.
        """
        # The targets of one net are its own projections: 6 forward-units, as Barlow Twins.
        if not self.distils or dense or not net.has_slim:
            return None, None
        with net.frozen():
            slim_a = net.forward_slim(view_a) if self.xd_direction == "both" else None
            return slim_a, net.forward_host(view_b)

    def losses(self, projections: Projections, *, rate_weight: float = 0.0) -> Losses:
        """Compute the loss terms of one step.

        Args:
            projections: what project returned.
            rate_weight: w, the weight of the coding rate in this step, >= 0.

        Raises:
            ShapeError: projections of different shapes, or fewer than 2 samples.
        """
        host_a, slim_b = projections.host_a, projections.slim_b
        watched = self._watch(host_a, slim_b[0])
        barlow = self.comparison.name == "barlow-twins"
        first = watched.total if barlow else self.comparison(host_a, slim_b[0])
        pairs = [first, *(self.comparison(host_a, z) for z in (*slim_b[1:], *projections.local))]
        if self.symmetric and projections.host_b is not None and projections.slim_a is not None:
            pairs.append(self.comparison(projections.host_b, projections.slim_a))
        sacl = _mean(pairs)
        xd_host, xd_slim = self._distillation(projections)
        total = sacl
        if xd_slim is not None:
            distillation = xd_slim if xd_host is None else (xd_host + xd_slim) / 2
            total = self.alpha * sacl + (1 - self.alpha) * distillation
        total = self.scale * total
        rate = self._coding_rate(projections) if rate_weight > 0 else None
        if rate is not None:
            total = total - rate_weight * rate
        return Losses(
            total=total,
            sacl=sacl.detach(),
            xd_host=None if xd_host is None else xd_host.detach(),
            xd_slim=None if xd_slim is None else xd_slim.detach(),
            coding_rate=None if rate is None else rate.detach(),
            diagonal=watched.diagonal,
            off_diagonal_rms=watched.off_diagonal_rms,
        )

    def _watch(self, host_a: Tensor, slim_b: Tensor) -> CorrelationLoss:
        """Correlate the two views: part of Barlow Twins' loss, and for every other what the alarms look at."""
        with contextlib.nullcontext() if self.comparison.name == "barlow-twins" else torch.no_grad():
            return self.comparison.correlation(host_a, slim_b)

    def _distillation(self, projections: Projections) -> tuple[Tensor | None, Tensor | None]:
        """Return L_D(z_A, [z_A]) and L_D(z_B, [z_B]); None for what this arm has not."""
        host_a, slim_b, slim_a, host_b, _ = projections
        if not self.distils:
            return None, None
        two_views_learn = self.symmetric and host_b is not None
        if host_b is None:  # one net: its targets are its own projections
            slim_a, host_b = host_a, slim_b[0]
        slim_pairs, host_pairs = [(z, host_b) for z in slim_b], []
        if slim_a is not None:
            host_pairs.append((host_a, slim_a))
            if two_views_learn:
                slim_pairs.append((slim_a, host_a))
                host_pairs.append((host_b, slim_b[0]))
        return self._pull(host_pairs if self.xd_direction == "both" else []), self._pull(slim_pairs)

    def _pull(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Return the mean loss that pulls the first of each pair to the second, the target."""
        if not pairs:
            return None
        return _mean(
            [self.comparison(z, target if self.learn_targets else target.detach()) for z, target in pairs]
        )

    def _coding_rate(self, projections: Projections) -> Tensor:
        """Return the mean over the encoders that learn, and within an encoder over its whole views and widths."""
        host, slim = [projections.host_a], list(projections.slim_b)
        if self.four_learn:
            host += [z for z in (projections.host_b,) if z is not None]
            slim += [z for z in (projections.slim_a,) if z is not None]
        asked = {"host": [host], "slim": [slim], "both": [host, slim]}[self.rate_encoders]
        return _mean([_mean([coding_rate(z, epsilon=self.rate_epsilon) for z in sets]) for sets in asked])


def _mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


class Passes(nn.Module):
    """The passes of one step as one module call, which is what data-parallel training wraps."""

    def __init__(self, net: SlimmableNet, method: SaclXd):
        super().__init__()
        self.net = net
        self.method = method

    def forward(
        self,
        views: Sequence[Tensor],
        dense: bool = False,
        widths: Sequence[float] | None = None,
        learning_only: bool = False,
    ) -> Projections:
        """Return the projections of view A, view B and any local views; with learning_only, the frozen ones are None."""
        view_a, view_b, *local = views
        run: Callable[..., Projections] = (
            self.method.learning_passes if learning_only else self.method.project
        )
        return run(self.net, view_a, view_b, local=local, dense=dense, widths=widths)


def sandwich(widths: Sequence[float], *, seed: int, step: int) -> tuple[float, ...]:
    """Choose the slim widths of a step: the widest, the narrowest and one of those between.

    Args:
        widths: every slim width of the run.
        seed: of the run.
        step: 0-based.

    Returns:
        at most three widths, widest first; the same for a step whichever process asks.
    """
    ordered = sorted(set(widths), reverse=True)
    between = ordered[1:-1]
    if len(between) > 1:
        draw = float(uniforms(seed, 0, numpy.array([step]), stream="widths", count=1)[0, 0])
        between = [between[int(draw * len(between))]]
    return (ordered[0], *between, *ordered[1:][-1:])


def forward_units(
    *,
    slim_only: bool,
    distils: bool,
    xd_direction: str = "both",
    symmetric: bool = False,
    learn_targets: bool = False,
    slow_start: float = 0.0,
) -> dict[str, float]:
    """Return the cost of one image in forward passes of host and slim net; a backward pass counts as two.

    Args:
        slim_only: the slim net is as wide as the host, so that there is one net.
        distils, xd_direction, symmetric, learn_targets: as in SaclXd.
        slow_start: fraction of the epochs in which the host takes both views.

    Returns:
        {"host": units, "slim": units}; SACL-XD is 4 and 4, XD only and Barlow Twins 6 of their one net. Local views
        are not among them.

    Source: METHOD section 2b, the rule that reproduces the paper's training-FLOPs column.
    """
    dense = {"host": 6.0, "slim": 0.0}
    if slim_only:
        return dense
    # What the second pass of each encoder costs: with gradient 3, as a frozen target 1.
    second = 3.0 if symmetric or learn_targets else 1.0
    paired = {"host": 3.0, "slim": 3.0}
    if symmetric or distils:
        paired["host"] += second
        paired["slim"] += second if symmetric or xd_direction == "both" else 0.0
    return {net: slow_start * dense[net] + (1 - slow_start) * paired[net] for net in dense}


def other_width_units(widths: Sequence[float], *, slow_start: float = 0.0) -> dict[float, float]:
    """Return how often one image passes each slim width but the widest, in forward passes of that width.

    Args:
        widths: every slim width of the run.
        slow_start: fraction of the epochs in which the slim nets rest.

    Returns:
        width -> units: 3 for the narrowest, and 3 shared by those between, of which a step draws one.
    """
    others = sorted(set(widths), reverse=True)[1:]
    between = len(others) - 1
    return {width: (1 - slow_start) * 3.0 / (1 if width == others[-1] else between) for width in others}
