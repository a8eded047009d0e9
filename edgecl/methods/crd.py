"""CRD: which pair of student's and teacher's embeddings is of one picture, and which of two, is to be told.

Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699, equations 17 to 19,
without its term for labels; the negatives are the batch's other pictures instead of a memory of all. (A queue of the last
steps does not do: both last layers learn, and old embeddings are told from new ones by their age.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from edgecl.config.recipe import Panel, Recipe
from edgecl.config.views import ViewSpec
from edgecl.methods.losses import check_pair, correlation_of, mean_of, of_all_processes, wide
from edgecl.methods.method import Embeddings, RunContext, Terms
from edgecl.methods.teacher import TaughtConfig, TaughtMethod
from edgecl.nets.heads import Projector
from edgecl.nets.slimming import SlimmableNet


class Config(TaughtConfig):
    """L = -log h(t, s) - sum over others s' of log(1 - h(t, s')), and the same over others t'; h = e / (e + N),
    e = exp(cos / tau), N others. The paper has N / M there, of M pictures, and its public code divides e by M times its
    mean in the first batch, which makes N of it where embeddings are unrelated at first."""

    panels: ClassVar[tuple[Panel, ...]] = (Panel("Loss", {"loss": "NCE"}, unit="nats", log=True),)

    label: ClassVar[str] = "CRD"
    name: Literal["crd"] = "crd"
    temperature: float = Field(0.07, gt=0, le=100)
    """tau; the public code's."""
    dimensions: int = Field(128, ge=1, le=32_768)
    """Of the space in which student and teacher are compared; the paper's."""

    def view_specs(self, recipe: Recipe) -> tuple[ViewSpec, ...]:
        """Return one whole view, which both see, and the local ones."""
        return self.with_plain(recipe, recipe.views.specs(recipe.data.image_size, whole=1))


class Crd(TaughtMethod):
    """Its embeddings, all of which learn: the student's "view_0" and "local_0" and on, and the teacher's "teacher_0"."""

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        self.adapter = Projector(context.dimensions, [config.dimensions])
        self.teachers_adapter = Projector(self.teacher.features, [config.dimensions])

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the student, and the teacher, whose last layer learns."""
        students = {name: self.adapter(z) for name, z in super().embed(self.own(views), step).items()}
        return {**students, "teacher_0": self.teachers_adapter(self.features_of(views, 1)[0])}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are those of the correlation of student's and teacher's embedding."""
        students = dict(embeddings.learnt)
        teacher = students.pop("teacher_0")
        temperature = self.config.temperature
        total = mean_of(
            [nce_loss(student, teacher, temperature=temperature) for student in students.values()]
        )
        total, rate = self.less_rate(total, [students["view_0"]], step)
        return total, {"coding_rate": rate, **correlation_of(students["view_0"], teacher)}


METHOD = Crd


def nce_loss(students: Tensor, teachers: Tensor, *, temperature: float) -> Tensor:
    """Tell, one by one, the pairs of embeddings of one picture from those of two.

    Args:
        students: (N, D) embeddings; any scale.
        teachers: (N, D) of the same pictures; any scale.
        temperature: of the cosines, > 0.

    Returns:
        () mean over the global batch, nats; float32 even under autocast.
    """
    check_pair(students, teachers)
    with torch.autocast(device_type=students.device.type, enabled=False):
        s, t = (of_all_processes(functional.normalize(wide(z), dim=1)) for z in (students, teachers))
        # log h = log sigmoid(cos / tau - log N), and log(1 - h) that of its negative.
        distance = s @ t.T / temperature - torch.tensor(len(s) - 1, dtype=s.dtype, device=s.device).log()
        same = torch.eye(len(s), dtype=torch.bool, device=s.device)
        told = functional.logsigmoid(torch.where(same, distance, -distance))
        # Each pair counts twice: with the student for an anchor, and with the teacher.
        return -2 * told.sum() / len(s)
