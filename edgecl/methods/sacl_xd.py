"""SACL-XD: two views, a host and the slim net inside it -> named losses. Its settings give every arm.

| settings                        | method       | passes                                   |
| ------------------------------- | ------------ | ---------------------------------------- |
| slim width = host width, a = 1  | Barlow Twins | host(A), host(B)                         |
| slim width = host width, a < 1  | XD only      | the same; the frozen passes equal them   |
| slim width < host width, a = 1  | SACL only    | host(A), slim(B)                         |
| slim width < host width, a < 1  | SACL-XD      | host(A), slim(B), [slim(A)], [host(B)]   |

Source: Meng, Yang, Lee, Shin, Fan, Seo, "Slimmed Asymmetrical Contrastive Learning and Cross Distillation for
Lightweight Model Training", NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from edgecl.methods.losses import cross_correlation_loss, cross_distillation_loss
from edgecl.nets.slimming import SlimmableNet


class Losses(NamedTuple):
    """The terms of one step.

    Attributes:
        total: () what is minimised.
        sacl: () contrastive term L_SACL, unscaled, detached.
        xd_host: () L_D(z_A, [z_A]), which moves the encoder of view A (the host); None when there is none.
        xd_slim: () L_D(z_B, [z_B]), which moves the encoder of view B (the slim net); None when there is none.
        diagonal: () mean diagonal of the correlation of the two views.
        off_diagonal_rms: () root mean square off its diagonal.
    """

    total: Tensor
    sacl: Tensor
    xd_host: Tensor | None
    xd_slim: Tensor | None
    diagonal: Tensor
    off_diagonal_rms: Tensor


class Projections(NamedTuple):
    """(N, D) projections of one step; the frozen ones carry no gradient and are None when nothing needs them."""

    host_a: Tensor
    slim_b: Tensor
    frozen_slim_a: Tensor | None
    frozen_host_b: Tensor | None


@dataclass(frozen=True)
class SaclXd:
    """L = alpha L_SACL(z_A, z_B) + (1 - alpha) (L_D(z_A, [z_A]) + L_D(z_B, [z_B])) / 2.

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
        self, net: SlimmableNet, view_a: Tensor, view_b: Tensor, *, dense: bool = False
    ) -> Projections:
        """Run the passes this arm needs.

        Args:
            net: host and slim net.
            view_a: (N, 3, H, W) for the host.
            view_b: (N, 3, H, W) for the slim net.
            dense: both views through the host (slow start).
        """
        one_net = dense or not net.has_slim
        host_a = net.forward_host(view_a)
        slim_b = net.forward_host(view_b) if one_net else net.forward_slim(view_b)
        if not self.distils:
            return Projections(host_a, slim_b, None, None)
        pulls_host = self.xd_direction == "both"
        if one_net:
            # The frozen passes of equal encoders are the passes just made: 6 forward-units, as Barlow Twins.
            return Projections(host_a, slim_b, host_a.detach() if pulls_host else None, slim_b.detach())
        with net.frozen():
            return Projections(
                host_a,
                slim_b,
                net.forward_slim(view_a) if pulls_host else None,
                net.forward_host(view_b),
            )

    def losses(self, projections: Projections) -> Losses:
        """Compute the loss terms of one step.

        Raises:
            ShapeError: projections of different shapes, or fewer than 2 samples.
        """
        host_a, slim_b, frozen_slim_a, frozen_host_b = projections
        sacl = cross_correlation_loss(host_a, slim_b, off_diagonal=self.off_diagonal)
        xd_host = xd_slim = None
        total = sacl.total
        if self.distils:
            assert frozen_host_b is not None
            xd_slim = cross_distillation_loss(slim_b, frozen_host_b, off_diagonal=self.off_diagonal)
            distillation = xd_slim
            if frozen_slim_a is not None:
                xd_host = cross_distillation_loss(host_a, frozen_slim_a, off_diagonal=self.off_diagonal)
                distillation = (xd_host + xd_slim) / 2
            total = self.alpha * sacl.total + (1 - self.alpha) * distillation
        return Losses(
            total=self.scale * total,
            sacl=sacl.total.detach(),
            xd_host=None if xd_host is None else xd_host.detach(),
            xd_slim=None if xd_slim is None else xd_slim.detach(),
            diagonal=sacl.diagonal,
            off_diagonal_rms=sacl.off_diagonal_rms,
        )


class Passes(nn.Module):
    """The passes of one step as one module call, which is what data-parallel training wraps."""

    def __init__(self, net: SlimmableNet, method: SaclXd):
        super().__init__()
        self.net = net
        self.method = method

    def forward(self, view_a: Tensor, view_b: Tensor, dense: bool = False) -> Projections:
        """Return the projections of two views."""
        return self.method.project(self.net, view_a, view_b, dense=dense)


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
