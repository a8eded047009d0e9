"""DINO for convolutional nets: every view guesses to which prototypes a slowly moving copy assigns the whole views.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv:2104.14294, algorithm
1 and section 3.1. Small nets: Tan et al. 2023 (SSLight), arXiv:2210.02808.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from edgecl.config.recipe import ForwardPasses, Panel, Recipe
from edgecl.config.settings import Fraction
from edgecl.methods.losses import correlation_of, mean_of, mean_over_batch, wide
from edgecl.methods.method import Embeddings, Method, RatedConfig, RunContext, Terms
from edgecl.methods.momentum import Follower, rising_momentum
from edgecl.nets.slimming import SlimmableNet
from edgecl.nets.sync_norms import process_count, sum_over_processes


class Config(RatedConfig):
    """L = mean over whole views t and other views v of H(softmax((g_t - c) / tau_t), softmax(g_v / tau_s))."""

    # The paper's colors, as BYOL's. Of views that differ more, a net that begins tells nothing alike, and targets are noise.
    brings: ClassVar[dict[str, dict[str, Any]]] = {
        "views": {
            "jitter": 0.8,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
            "grayscale": 0.2,
        }
    }
    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("Loss terms", {"loss": "cross-entropy", "target_entropy": "entropy of targets"}, unit="nats"),
    )

    label: ClassVar[str] = "DINO"
    name: Literal["dino"] = "dino"
    prototypes: int = Field(128, ge=2, le=65_536)
    """Directions to which views are assigned; 65,536 in the paper, 4,096 in SSLight."""
    learn_prototypes: bool = False
    """Without, they stay where they begin. The paper holds them for an epoch; where they learn before views agree, they all
    become one, and every guess is as good."""
    student_temperature: float = Field(0.1, gt=0, le=100)
    """tau_s."""
    teacher_temperature: float = Field(0.04, ge=0.02, le=100)
    """tau_t."""
    targets: Literal["even", "centered"] = "even"
    """What keeps one prototype from taking everything: "even" gives each an even share of the batch (Sinkhorn and Knopp, as
    SwAV and DINOv2 do); "centered" takes off c, as the paper does, with which our small nets did not start."""
    center_momentum: Fraction = 0.9
    """Of c, the mean of the targets' assignments."""
    momentum: Fraction = 0.5
    """Of the net that makes the targets, at the first step; it rises to 1. 0.996 in the paper, whose runs are longer; from
    0.9 on, one seed of three did not start (docs/results.md)."""

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return those of the encoder, and one of the target net for each whole view."""
        return super().forward_passes(recipe).with_targets(self.count_views(recipe, local=False))


class Assigner(nn.Module):
    """Compare projections with prototypes: both are directions, those of projections around the batch's mean.

    Of a net that begins, all projections are almost one direction. Without the norm every picture's assignment is then the
    same, and a small net does not get away from it (docs/results.md); SSLight has batch norms in its head, too.
    """

    def __init__(self, dimensions: int, prototypes: int, *, learn: bool):
        super().__init__()
        self.norm = nn.BatchNorm1d(dimensions, affine=False)
        self.weight = nn.Parameter(torch.randn(prototypes, dimensions), requires_grad=learn)

    def forward(self, z: Tensor) -> Tensor:
        """Return (N, K) cosines of (N, D) projections and the prototypes."""
        return functional.normalize(self.norm(z), dim=1) @ functional.normalize(self.weight, dim=1).T


class Dino(Method):
    """Its embeddings: assignments "view_0", "view_1" and "local_0" and on; targets "target_0" and "target_1"."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        self.assigner = Assigner(context.dimensions, config.prototypes, learn=config.learn_prototypes)
        self.target, self.target_assigner = Follower(net.host), Follower(self.assigner)
        self.register_buffer("center", torch.zeros(config.prototypes))
        self.center: Tensor
        self._mean: Tensor | None = None

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Assign each view."""
        return {name: self.assigner(z) for name, z in super().embed(views, step).items()}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Assign the whole views in the net that follows."""
        return {
            f"target_{number}": self.target_assigner(self.target(view))
            for number, view in enumerate(views[: self.whole_views])
        }

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step.

        Its terms are "target_entropy", of the mean target: 0 where one prototype takes everything; and those of the
        correlation of the two whole views.
        """
        config = self.config
        guesses, targets = (list(part.values()) for part in embeddings)
        with torch.autocast(device_type=self.center.device.type, enabled=False):
            aims = [self._aim(target) for target in targets]
            total = mean_of(
                [
                    assignment_loss(guess, aim, temperature=config.student_temperature)
                    for mine, guess in enumerate(guesses)
                    for other, aim in enumerate(aims)
                    if mine != other
                ]
            )
            shares = _mean_of_rows(aims)
            self._mean = _mean_of_rows([wide(target) for target in targets])
        total, rate = self.less_rate(total, guesses[: self.whole_views], step)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
        return total, {
            "target_entropy": entropy,
            "coding_rate": rate,
            **correlation_of(guesses[0], guesses[1]),
        }

    def _aim(self, target: Tensor) -> Tensor:
        temperature = self.config.teacher_temperature
        if self.config.targets == "even":
            return even_codes(target, epsilon=temperature)
        return ((wide(target) - self.center) / temperature).softmax(1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the net that follows, its prototypes and the center."""
        momentum = rising_momentum(self.config.momentum, step, total_steps=self.total_steps)
        self.target.follow(self.net.host, momentum=momentum)
        self.target_assigner.follow(self.assigner, momentum=momentum)
        assert self._mean is not None
        self.center.lerp_(self._mean.to(self.center.dtype), 1 - self.config.center_momentum)
        self._mean = None


METHOD = Dino


def assignment_loss(guess: Tensor, aim: Tensor, *, temperature: float) -> Tensor:
    """Return the () cross-entropy of (N, K) aims, which sum to 1, and guesses, before their softmax; global batch."""
    return mean_over_batch(-(aim * (wide(guess) / temperature).log_softmax(1)).sum(1))


@torch.no_grad()
def _mean_of_rows(sets: Sequence[Tensor]) -> Tensor:
    """Return the (K,) mean row of (N, K) tensors over the global batch."""
    rows = torch.cat(list(sets))
    return sum_over_processes(rows.sum(0)) / (len(rows) * process_count())


@torch.no_grad()
def even_codes(likeness: Tensor, *, epsilon: float, rounds: int = 3) -> Tensor:
    """Assign a batch to prototypes so that each prototype gets an equal share (Sinkhorn and Knopp).

    Args:
        likeness: (N, K) cosines of this process's share.
        epsilon: the larger, the more evenly a picture is spread.

    Returns:
        (N, K) rows that sum to 1, of the global batch's alternation.

    Source: SwAV, arXiv:2006.09882, equation 3 and appendix A.
    """
    with torch.autocast(device_type=likeness.device.type, enabled=False):
        # No cosine is above 1, so nothing overflows; a common factor leaves in the first round.
        shares = ((wide(likeness) - 1) / epsilon).exp()
        count, prototypes = len(shares) * process_count(), shares.shape[1]
        for _ in range(rounds):
            shares = shares / (sum_over_processes(shares.sum(0)) * prototypes)
            shares = shares / (shares.sum(1, keepdim=True) * count)
        return shares * count
