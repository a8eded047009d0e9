"""XD with a teacher: SACL-XD whose frozen targets are a teacher's features instead of the other encoder's projections.

Source: Meng et al., NeurIPS 2023 (SACL-XD), for everything but the teacher; the correlation loss as distillation from a
larger net is also RoB's (Duval et al. 2023, arXiv:2301.09451).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from edgecl.config.recipe import ForwardPasses, Panel, Recipe
from edgecl.config.settings import Factor, Fraction, Weight
from edgecl.methods.losses import cross_correlation_loss, mean_of
from edgecl.methods.method import Embeddings, Terms
from edgecl.methods.teacher import TaughtConfig, TaughtMethod


class Config(TaughtConfig):
    """L = s (alpha BT(z_A, z_B) + (1 - alpha) (BT(g(z_A), [t_A]) + BT(g(z_B), [t_B])) / 2) - w R, g a layer that learns."""

    has_host: ClassVar[bool] = True
    panels: ClassVar[tuple[Panel, ...]] = (
        Panel(
            "Loss terms",
            {"loss": "total", "sacl": "SACL", "xd_host": "XD host", "xd_slim": "XD slim"},
            log=True,
        ),
    )

    label: ClassVar[str] = "XD with a teacher"
    name: Literal["xd-teacher"] = "xd-teacher"
    alpha: Fraction = 0.5
    off_diagonal: Weight = 0.0051
    """Barlow Twins: weight of the redundancy term."""
    scale: Factor = 0.1
    """s."""

    def check(self, recipe: Recipe) -> None:
        """Refuse further widths and a slow start."""
        super().check(recipe)
        if len(recipe.slim.all_widths) > 1 or recipe.slim.slow_start:
            raise ValueError(
                "'method.name' xd-teacher trains one slim width: leave out 'slim.widths' and 'slim.slow_start'"
            )

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return a learning pass of view A through the host, of view B through the slim net, and the teacher's."""
        host, slim, passes = recipe.host.width, recipe.slim.width, super().forward_passes(recipe)
        whole = {host: 6.0} if host == slim else {host: 3.0, slim: 3.0}
        return passes._replace(
            whole=whole,
            local={host: 0.0, slim: 3.0 * self.count_views(recipe, local=True)},
        )


class XdTeacher(TaughtMethod):
    """Its embeddings: "host_a", "slim_b" and "local_0" and on, guesses "guess_a" and "guess_b" of the teacher's features;
    targets "teacher_a" and "teacher_b"."""

    config: Config

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run host and slim net."""
        host_a, slim_b = self.net.forward_host(views[0]), self.net.forward_slim(views[1])
        return {
            "host_a": host_a,
            "slim_b": slim_b,
            **self.embed_local(self.own(views)[2:], slim=True),
            "guess_a": self.adapter(host_a),
            "guess_b": self.adapter(slim_b),
        }

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the teacher."""
        teacher_a, teacher_b = self.features_of(views, 2)
        return {"teacher_a": teacher_a, "teacher_b": teacher_b}

    def watched(self, embeddings: Embeddings) -> Tensor:
        """Return those of the slim net."""
        return embeddings.learnt["slim_b"]

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step.

        Its terms are "sacl", "xd_host", "xd_slim", "coding_rate", and those of the correlation of the two views.
        """
        config, (learnt, targets) = self.config, embeddings
        host_a, slim_b = learnt["host_a"], learnt["slim_b"]
        local = [z for name, z in learnt.items() if name.startswith("local")]
        compared = [
            cross_correlation_loss(host_a, z, off_diagonal=config.off_diagonal) for z in (slim_b, *local)
        ]
        sacl = mean_of([one.total for one in compared])
        xd_host, xd_slim = (
            cross_correlation_loss(
                learnt[f"guess_{view}"], targets[f"teacher_{view}"], off_diagonal=config.off_diagonal
            ).total
            for view in "ab"
        )
        total, rate = self.less_rate(
            config.scale * (config.alpha * sacl + (1 - config.alpha) * (xd_host + xd_slim) / 2),
            [host_a, slim_b],
            step,
        )
        return total, {
            "sacl": sacl.detach(),
            "xd_host": xd_host.detach(),
            "xd_slim": xd_slim.detach(),
            "coding_rate": rate,
            "diagonal": compared[0].diagonal,
            "off_diagonal_rms": compared[0].off_diagonal_rms,
        }


METHOD = XdTeacher
