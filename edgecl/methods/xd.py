"""XD only: Barlow Twins, and each view's dimensions decorrelated among themselves; SACL-XD's cross distillation in one net.

Between equal encoders the frozen targets are the projections themselves, so that the diagonal of their correlation is 1
and what is left of the distillation is decorrelation. It costs no further pass.

Source: Meng et al., NeurIPS 2023 (SACL-XD), the rows "XD only (1x)".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from edgecl.config.recipe import Panel
from edgecl.config.settings import Factor, Fraction, Weight
from edgecl.methods.losses import cross_correlation_loss, mean_of
from edgecl.methods.method import Embeddings, RatedConfig, Terms
from edgecl.methods.pairs import PairMethod


class Config(RatedConfig):
    """L = s (alpha BT(z_A, z_B) + (1 - alpha) (BT(z_A, [z_A]) + BT(z_B, [z_B])) / 2) - w R."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("Loss terms", {"loss": "total", "cross_correlation": "Barlow Twins", "xd": "XD"}, log=True),
    )

    label: ClassVar[str] = "XD only"
    name: Literal["xd"] = "xd"
    alpha: Fraction = 0.95
    off_diagonal: Weight = 0.0051
    """Barlow Twins: weight of the redundancy term."""
    scale: Factor = 0.1


class Xd(PairMethod):
    """Views "view_0" and "view_1", and any local ones, each against "view_0"; the two whole ones against themselves."""

    config: Config

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step.

        Its terms are "cross_correlation", between views, and "xd", within each; "coding_rate"; "diagonal" and
        "off_diagonal_rms" of the correlation of the two whole views.
        """
        config = self.config
        z, *others = embeddings.learnt.values()
        between = [cross_correlation_loss(z, other, off_diagonal=config.off_diagonal) for other in others]
        compared = mean_of([one.total for one in between])
        within = mean_of(
            [
                cross_correlation_loss(view, view.detach(), off_diagonal=config.off_diagonal).total
                for view in (z, others[0])
            ]
        )
        total, rate = self.less_rate(
            config.scale * (config.alpha * compared + (1 - config.alpha) * within), [z, others[0]], step
        )
        return total, {
            "cross_correlation": compared.detach(),
            "xd": within.detach(),
            "coding_rate": rate,
            "diagonal": between[0].diagonal,
            "off_diagonal_rms": between[0].off_diagonal_rms,
        }


METHOD = Xd
