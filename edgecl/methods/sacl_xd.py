"""SACL-XD: two views, a host and the slim net inside it -> named losses. Its settings give every arm.

| settings                        | method       | passes                                   |
| ------------------------------- | ------------ | ---------------------------------------- |
| slim width = host width, a = 1  | Barlow Twins | host(A), host(B)                         |
| slim width = host width, a < 1  | XD only      | the same; the frozen passes equal them   |
| slim width < host width, a = 1  | SACL only    | host(A), slim(B)                         |
| slim width < host width, a < 1  | SACL-XD      | host(A), slim(B), [slim(A)], [host(B)]   |

Several slim widths train in one run by the sandwich rule: each step, view B goes through the widest, the narrowest
and one other, and all of them learn from the same host(A) and [host(B)].

Source: Meng, Yang, Lee, Shin, Fan, Seo, "Slimmed Asymmetrical Contrastive Learning and Cross Distillation for
Lightweight Model Training", NeurIPS 2023. Sandwich rule: Yu and Huang, "Universally Slimmable Networks and Improved
Training Techniques", ICCV 2019, arXiv:1903.05134.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from edgecl.data.randomness import uniforms
from edgecl.methods.losses import cross_correlation_loss, cross_distillation_loss
from edgecl.nets.slimming import SlimmableNet


class Losses(NamedTuple):
    """The terms of one step.

    Attributes:
        total: () what is minimised.
        sacl: () contrastive term L_SACL, unscaled, detached; with several widths the mean over those of the step.
        xd_host: () L_D(z_A, [z_A]), which moves the encoder of view A (the host); None when there is none.
        xd_slim: () L_D(z_B, [z_B]), which moves the encoder of view B (the slim net); None when there is none;
            with several widths the mean.
        diagonal: () mean diagonal of the correlation of the two views, view B through the slim width.
        off_diagonal_rms: () root mean square off its diagonal.
    """

    total: Tensor
    sacl: Tensor
    xd_host: Tensor | None
    xd_slim: Tensor | None
    diagonal: Tensor
    off_diagonal_rms: Tensor


class Projections(NamedTuple):
    """(N, D) projections of one step.

    Attributes:
        host_a: view A through the host.
        slim_b: view B through each width of the step, the slim width first; in a slow start through the host alone.
        frozen_slim_a: view A through the slim width, without gradient; None when nothing needs it.
        frozen_host_b: view B through the host, without gradient; None when nothing needs it.
    """

    host_a: Tensor
    slim_b: tuple[Tensor, ...]
    frozen_slim_a: Tensor | None
    frozen_host_b: Tensor | None


@dataclass(frozen=True)
class SaclXd:
    """L = alpha L_SACL(z_A, z_B) + (1 - alpha) (L_D(z_A, [z_A]) + L_D(z_B, [z_B])) / 2.

    With several widths, every term in z_B is the mean over the widths of the step.

    Args:
        alpha: weight of the contrastive term, 0..1.
        off_diagonal: weight of the redundancy term in every correlation loss, >= 0.
        scale: multiplies the whole loss, > 0.
        xd_direction: 'both' as published; 'slim_only' leaves out L_D(z_A, [z_A]), which pulls the host towards
            the frozen slim net, and gives its weight to L_D(z_B, [z_B]).
    """

    alpha: float
    off_diagonal: float
    scale: float = 1.0
    xd_direction: Literal["both", "slim_only"] = "both"

    @property
    def distils(self) -> bool:
        """Whether there is a distillation term."""
        return self.alpha < 1

    def project(
        self,
        net: SlimmableNet,
        view_a: Tensor,
        view_b: Tensor,
        *,
        dense: bool = False,
        widths: Sequence[float] | None = None,
    ) -> Projections:
        """Run the passes this arm needs.

        Args:
            net: host and slim nets.
            view_a: (N, 3, H, W) for the host.
            view_b: (N, 3, H, W) for the slim nets.
            dense: both views through the host (slow start).
            widths: slim widths of this step; None means all. The slim width is always among them.

        Raises:
            SliceError: the net has no such slim width.
        """
        learnt = self.learning_passes(net, view_a, view_b, dense=dense, widths=widths)
        frozen = self.frozen_passes(net, view_a, view_b, learnt, dense=dense)
        return Projections(*learnt, *frozen)

    def learning_passes(
        self,
        net: SlimmableNet,
        view_a: Tensor,
        view_b: Tensor,
        *,
        dense: bool = False,
        widths: Sequence[float] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the passes that carry gradient; arguments as for project.

        Returns:
            host_a and slim_b of Projections.
        """
        host_a = net.forward_host(view_a)
        if dense:
            return host_a, (net.forward_host(view_b),)
        chosen = dict.fromkeys([net.slim_width, *(net.slim_widths if widths is None else widths)])
        return host_a, tuple(net.forward_slim(view_b, width) for width in chosen)

    def frozen_passes(
        self,
        net: SlimmableNet,
        view_a: Tensor,
        view_b: Tensor,
        learnt: tuple[Tensor, tuple[Tensor, ...]],
        *,
        dense: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the passes that give targets; view_a, view_b and dense as for project.

        Args:
            learnt: what learning_passes returned for the same views.

        Returns:
            frozen_slim_a and frozen_host_b of Projections.
        """
        if not self.distils:
            return None, None
        pulls_host = self.xd_direction == "both"
        if dense or not net.has_slim:
            # The frozen passes of equal encoders are the passes just made: 6 forward-units, as Barlow Twins.
            host_a, slim_b = learnt
            return host_a.detach() if pulls_host else None, slim_b[0].detach()
        with net.frozen():
            return net.forward_slim(view_a) if pulls_host else None, net.forward_host(view_b)

    def losses(self, projections: Projections) -> Losses:
        """Compute the loss terms of one step.

        Raises:
            ShapeError: projections of different shapes, or fewer than 2 samples.
        """
        host_a, slim_b, frozen_slim_a, frozen_host_b = projections
        correlations = [cross_correlation_loss(host_a, z, off_diagonal=self.off_diagonal) for z in slim_b]
        sacl = _mean([correlation.total for correlation in correlations])
        xd_host = xd_slim = None
        total = sacl
        if self.distils:
            assert frozen_host_b is not None
            xd_slim = _mean(
                [cross_distillation_loss(z, frozen_host_b, off_diagonal=self.off_diagonal) for z in slim_b]
            )
            distillation = xd_slim
            if frozen_slim_a is not None:
                xd_host = cross_distillation_loss(host_a, frozen_slim_a, off_diagonal=self.off_diagonal)
                distillation = (xd_host + xd_slim) / 2
            total = self.alpha * sacl + (1 - self.alpha) * distillation
        return Losses(
            total=self.scale * total,
            sacl=sacl.detach(),
            xd_host=None if xd_host is None else xd_host.detach(),
            xd_slim=None if xd_slim is None else xd_slim.detach(),
            diagonal=correlations[0].diagonal,
            off_diagonal_rms=correlations[0].off_diagonal_rms,
        )


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
        view_a: Tensor,
        view_b: Tensor,
        dense: bool = False,
        widths: Sequence[float] | None = None,
        learning_only: bool = False,
    ) -> Projections:
        """Return the projections of two views; with learning_only, the frozen ones are None."""
        if not learning_only:
            return self.method.project(self.net, view_a, view_b, dense=dense, widths=widths)
        learnt = self.method.learning_passes(self.net, view_a, view_b, dense=dense, widths=widths)
        return Projections(*learnt, None, None)


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


def forward_units(*, arm: str, xd_direction: str, slow_start: float = 0.0) -> dict[str, float]:
    """Return the cost of one image in forward passes of host and slim net; a backward pass counts as two.

    Returns:
        {"host": units, "slim": units}; SACL-XD is 4 and 4, XD only and Barlow Twins 6 of their one net.

    Source: METHOD section 2b, the rule that reproduces the paper's training-FLOPs column.
    """
    dense = {"host": 6.0, "slim": 0.0}
    if arm in ("XD only", "Barlow Twins"):
        return dense
    frozen_host, frozen_slim = 0.0, 0.0
    if arm == "SACL-XD":
        frozen_host, frozen_slim = 1.0, 1.0 if xd_direction == "both" else 0.0
    paired = {"host": 3.0 + frozen_host, "slim": 3.0 + frozen_slim}
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
