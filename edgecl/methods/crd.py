"""CRD: which pair of student's and teacher's embeddings is of one picture, and which of two, is to be told.

Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699, equations 17 to 19,
without its term for labels; the negatives are the pictures of the last steps instead of a memory of all.
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
from edgecl.methods.losses import check_pair, correlation_of, mean_of, mean_over_batch, wide
from edgecl.methods.method import Embeddings, RunContext, Terms
from edgecl.methods.momentum import Queue
from edgecl.methods.teacher import TaughtConfig, TaughtMethod
from edgecl.nets.heads import Projector
from edgecl.nets.slimming import SlimmableNet


class Config(TaughtConfig):
    """L = -log h(t, s) - sum over others s' of log(1 - h(t, s')), and the same over others t'; h = e / (e + N),
    e = exp(cos / tau), N others. The paper has N / M there, of M pictures, and its public code divides e by M times its
    mean in the first batch, which makes N of it where pictures are as good as unrelated at first."""

    panels: ClassVar[tuple[Panel, ...]] = (Panel("Loss", {"loss": "NCE"}, unit="nats", log=True),)

    label: ClassVar[str] = "CRD"
    name: Literal["crd"] = "crd"
    temperature: float = Field(0.07, gt=0, le=100)
    """tau; the public code's."""
    queue_steps: int = Field(4, ge=1, le=100_000)
    """The pictures of so many last steps stand for all others; 16,384 from a memory of all in the paper."""
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
        dimensions, queue = config.dimensions, config.queue_steps * context.data.batch_size
        self.adapter = Projector(context.dimensions, [dimensions])
        self.teachers_adapter = Projector(self.teacher.features, [dimensions])
        self.students, self.teachers = Queue(queue, dimensions), Queue(queue, dimensions)

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the student, and the teacher, whose last layer learns."""
        students = {name: self.adapter(z) for name, z in super().embed(self.own(views), step).items()}
        return {**students, "teacher_0": self.teachers_adapter(self.features_of(views, 1)[0])}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step; its terms are those of the correlation of student's and teacher's embedding."""
        students = dict(embeddings.learnt)
        teacher = students.pop("teacher_0")

        def told(anchor: Tensor, positive: Tensor, others: Tensor) -> Tensor:
            return nce_loss(anchor, positive, others, temperature=self.config.temperature)

        total = mean_of(
            [
                told(student, teacher, self.teachers.rows) + told(teacher, student, self.students.rows)
                for student in students.values()
            ]
        )
        total, rate = self.less_rate(total, [students["view_0"]], step)
        self.students.hold(students["view_0"])
        self.teachers.hold(teacher)
        return total, {"coding_rate": rate, **correlation_of(students["view_0"], teacher)}

    def after_step(self, step: int) -> None:
        """Put both embeddings into their queues."""
        self.students.push()
        self.teachers.push()


METHOD = Crd


def nce_loss(anchors: Tensor, positives: Tensor, others: Tensor, *, temperature: float) -> Tensor:
    """Tell the embedding of the same picture from those of others, one by one.

    Args:
        anchors: (N, D) embeddings; any scale.
        positives: (N, D) of the same pictures; any scale.
        others: (K, D) of others, without gradient; any scale.
        temperature: of the cosines, > 0.

    Returns:
        () mean over the global batch, nats; float32 even under autocast.

    Raises:
        ShapeError: shapes differ, or N < 2.
    """
    check_pair(anchors, positives)
    with torch.autocast(device_type=anchors.device.type, enabled=False):
        a, p, o = (functional.normalize(wide(z), dim=1) for z in (anchors, positives, others))
        # log h = log sigmoid(cos / tau - log N), and log(1 - h) that of its negative.
        offset = torch.tensor(len(o), dtype=a.dtype, device=a.device).log()
        same = functional.logsigmoid((a * p).sum(1) / temperature - offset)
        other = functional.logsigmoid(offset - a @ o.T / temperature)
        return mean_over_batch(-same - other.sum(1))
