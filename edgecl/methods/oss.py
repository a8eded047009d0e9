"""OSS, distilled on the fly: a teacher learns by SwAV beside the student, which follows its slow copy's assignments.

Source: Choi et al., "Unsupervised Representation Transfer for Small Networks: I Believe I Can Distill On-the-Fly", NeurIPS
2021, as we know it from its abstract; the teacher's loss: Caron et al. 2020 (SwAV), arXiv:2006.09882, equations 2 to 5.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from edgecl.config.recipe import ForwardPasses, Panel, Recipe
from edgecl.config.settings import Fraction
from edgecl.methods.dino import Assigner, assignment_loss, even_codes
from edgecl.methods.losses import correlation_of, mean_of, wide
from edgecl.methods.method import Embeddings, Method, RunContext, Terms
from edgecl.methods.momentum import Follower
from edgecl.methods.teacher import TaughtConfig, load_teacher
from edgecl.nets.backbone import feature_count
from edgecl.nets.heads import Projector
from edgecl.nets.slimming import SlimmableNet


class Config(TaughtConfig):
    """L = SwAV(teacher) + mean over views v of H(softmax(C t_v / tau), softmax(C' s_v / tau)), t of the slow copy."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Panel(
            "Loss terms",
            {"loss": "total", "swav": "SwAV", "distillation": "distillation"},
            unit="nats",
            log=True,
        ),
    )

    label: ClassVar[str] = "OSS"
    name: Literal["oss"] = "oss"
    prototypes: int = Field(300, ge=2, le=65_536)
    """Of the teacher and of the student; 3,000 in SwAV, for a thousand classes."""
    learn_prototypes: bool = False
    """Without, they stay where they begin; SwAV holds them for an epoch."""
    temperature: float = Field(0.1, gt=0, le=100)
    """tau; SwAV's."""
    evenness: float = Field(0.05, ge=0.02, le=100)
    """SwAV's epsilon: the larger, the more evenly a picture's assignment is spread."""
    momentum: Fraction = 0.99
    """Of the teacher's slow copy."""

    def check(self, recipe: Recipe) -> None:
        """Refuse what belongs to a teacher that does not learn."""
        super().check(recipe)
        if self.teacher.view == "plain":
            raise ValueError(
                "'method.name' oss has a teacher that learns from the student's views: leave out 'method.teacher.view'"
            )

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return the student's learning passes, and of the teacher three to learn and one of its copy for each view."""
        passes = super().forward_passes(recipe)
        return passes._replace(teacher=4.0 * self.count_views(recipe, local=False))


class Oss(Method):
    """Its embeddings: the student's assignments "view_0", "view_1" and "local_0" and on, and the teacher's "teacher_0" and
    "teacher_1"; targets "target_0" and "target_1"."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        # A copy: what was loaded is kept, for a run that must start anew.
        backbone = copy.deepcopy(load_teacher(config.teacher).net).requires_grad_(True)
        sizes, prototypes = context.projector, config.prototypes
        self.teacher = torch.nn.Sequential(
            backbone,
            Projector(feature_count(backbone), sizes),
            Assigner(sizes[-1], prototypes, learn=config.learn_prototypes),
        )
        self.target = Follower(self.teacher)
        self.assigner = Assigner(sizes[-1], prototypes, learn=config.learn_prototypes)

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Assign each view, by the student and the whole ones by the teacher."""
        students = {name: self.assigner(z) for name, z in super().embed(views, step).items()}
        return {**students, **{f"teacher_{n}": self.teacher(view) for n, view in enumerate(views[:2])}}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Assign the whole views by the teacher's slow copy."""
        return {f"target_{number}": self.target(view) for number, view in enumerate(views[:2])}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step.

        Its terms are "swav", "distillation", and those of the correlation of the student's two whole views.
        """
        config, (learnt, targets) = self.config, embeddings
        teachers = [learnt[f"teacher_{number}"] for number in range(2)]
        codes = [even_codes(one, epsilon=config.evenness) for one in teachers]
        swav = mean_of(
            [
                assignment_loss(one, code, temperature=config.temperature)
                for one, code in zip(teachers, reversed(codes), strict=True)
            ]
        )
        aims = {name: (wide(one) / config.temperature).softmax(1) for name, one in targets.items()}
        distillation = mean_of(
            [
                assignment_loss(
                    one,
                    aims.get(name.replace("view", "target"), aims["target_0"]),
                    temperature=config.temperature,
                )
                for name, one in learnt.items()
                if not name.startswith("teacher")
            ]
        )
        total, rate = self.less_rate(swav + distillation, [learnt["view_0"], learnt["view_1"]], step)
        return total, {
            "swav": swav.detach(),
            "distillation": distillation.detach(),
            "coding_rate": rate,
            **correlation_of(learnt["view_0"], learnt["view_1"]),
        }

    def after_step(self, step: int) -> None:
        """Move the teacher's slow copy."""
        self.target.follow(self.teacher, momentum=self.config.momentum)


METHOD = Oss
