"""What every method is: views in, named embeddings out, a loss of those of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgecl.config.recipe import Data, ForwardPasses, MethodConfig, Recipe, Slim, find_method
from edgecl.config.views import ViewSpec
from edgecl.data.loading import TrainingImages
from edgecl.methods.losses import CodingRate
from edgecl.nets.slimming import SlimmableNet
from edgecl.storage.checkpoint import METHODS_OWN

Terms = dict[str, Tensor | None]
"""What is logged of a loss: its parts and what to watch beside them, () each, detached; None where there is none."""


class Embeddings(NamedTuple):
    """(N, D) embeddings of one step by name, in the order in which the method made them.

    Attributes:
        learnt: those that carry gradient.
        targets: those that carry none.
    """

    learnt: dict[str, Tensor]
    targets: dict[str, Tensor]


class RatedConfig(MethodConfig):
    """A method of one encoder, with the coding rate beside its loss: L less w R of the whole views that learn."""

    coding_rate: CodingRate = CodingRate()

    def check(self, recipe: Recipe) -> None:
        """Refuse the coding rate of two images, and what a method of one encoder does not take."""
        super().check(recipe)
        self.coding_rate.check(recipe)

    def rated_views(self, recipe: Recipe) -> int:
        """Count the views of a picture that the coding rate is taken of."""
        return self.count_views(recipe, local=False)

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return those of one encoder through which every view learns, and of the coding rate."""
        return (
            super()
            .forward_passes(recipe)
            ._replace(
                coding_rates=self.rated_views(recipe) if self.coding_rate.weight else 0.0,
                coding_rate_share=self.coding_rate.until or 1.0,
            )
        )


class RunContext(NamedTuple):
    """What a method knows of the run that it is part of.

    Attributes:
        views: of each picture, in the order in which the method is given them.
        projector: the widths of its layers, the last D.
    """

    views: tuple[ViewSpec, ...]
    data: Data
    slim: Slim
    projector: tuple[int, ...]
    epochs: int
    steps_per_epoch: int
    seed: int

    @property
    def dimensions(self) -> int:
        """D, the length of an embedding."""
        return self.projector[-1]


class Method(nn.Module):
    """A way to train host and slim nets without labels; what data-parallel training wraps.

    A method derives this class in edgecl/methods/NAME.py and writes `loss`, and `embed` where not every view goes through
    one encoder. The file also has its [method] table, `Config`, and names the class as `METHOD`. A method's own modules
    and buffers are trained, kept in checkpoints and restored with the net.

    Whatever it draws must be a function of seed and step, so that a resumed run repeats the one that was not stopped.

    Its config is the recipe's [method] table, of the class `Config` in the method's file.
    """

    config: MethodConfig

    def __init__(self, config: MethodConfig, net: SlimmableNet, context: RunContext):
        super().__init__()
        self.net = net
        self.config = config
        self.whole_views = sum(view.count for view in context.views if not (view.local or view.teacher))
        self.seed = context.seed
        self.total_steps = context.steps_per_epoch * context.epochs

    def forward(self, views: Sequence[Tensor], step: int, learning_only: bool = False) -> Embeddings:
        """Embed the views of this process's share, or of a part of it.

        Args:
            views: (n, 3, size, size) for each view that the method asked for, in its order.
            step: steps taken before this one.
            learning_only: leave the targets out.
        """
        learnt = self.embed(views, step)
        if learning_only:
            return Embeddings(learnt, {})
        with self.net.frozen():
            return Embeddings(learnt, self.embed_targets(views, step))

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Return the embeddings that carry gradient; here every view's through the one encoder.

        Returns:
            name -> (n, D), of the same names in every part of a batch.
        """
        count = self.whole_views
        whole = {f"view_{number}": self.net.forward_host(view) for number, view in enumerate(views[:count])}
        return {**whole, **self.embed_local(views[count:])}

    def embed_local(self, views: Sequence[Tensor], *, slim: bool = False) -> dict[str, Tensor]:
        """Return the embeddings of local views, "local_0" and so on, through the host or the slim net.

        They leave running statistics alone: those are for whole pictures, which a net sees when it is used.
        """
        if not views:
            return {}
        embed = self.net.forward_slim if slim else self.net.forward_host
        with self.net.untracked():
            return {f"local_{number}": embed(view) for number, view in enumerate(views)}

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Return the embeddings that carry no gradient; called without a graph, the running statistics left alone."""
        return {}

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Return what is minimized, and what is logged.

        Terms "diagonal" and "off_diagonal_rms", of the correlation of two views, also feed the alarms of collapse and
        plateau (`edgecl.methods.losses.correlation_of`).

        Args:
            embeddings: of this process's whole share; its losses take the global batch's statistics.

        Returns:
            the () total, differentiable, and the terms.
        """
        raise NotImplementedError

    def less_rate(self, total: Tensor, views: Sequence[Tensor], step: int) -> tuple[Tensor, Tensor | None]:
        """Return a loss less the coding rate of (N, D) embeddings, and the rate, of a method whose config is rated."""
        assert isinstance(self.config, RatedConfig)
        return self.config.coding_rate.take_off(total, [views], step, total_steps=self.total_steps)

    def look_up(self, images: TrainingImages, *, cache: Path) -> Tensor | None:
        """Return what the method knows of each picture beside its views; called once, before the first step.

        Args:
            cache: a folder beside the run, for what takes long to find.

        Returns:
            (len(images), ...) in the order of `Batch.indices`, of which the rows of a batch are given after its views;
            None for nothing.
        """
        return None

    def after_step(self, step: int) -> None:
        """Do what follows an optimizer's step, e.g. move a target network; not called for a step left out."""

    def watched(self, embeddings: Embeddings) -> Tensor:
        """Return the embeddings whose spread is logged as "std": those of the net that will be deployed."""
        return next(iter(embeddings.learnt.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: the net's tensors by its own names, the method's under "method."."""
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("net.")}
        return {**self.net.state_dict(), **{f"{METHODS_OWN}{name}": tensor for name, tensor in own.items()}}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what a checkpoint kept."""
        names = {
            name: name.removeprefix(METHODS_OWN) if name.startswith(METHODS_OWN) else f"net.{name}"
            for name in tensors
        }
        self.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})


def create_method(recipe: Recipe, net: SlimmableNet, *, steps_per_epoch: int) -> Method:
    """Build the method a recipe names; what it draws for its own modules is a function of the seed alone."""
    context = RunContext(
        recipe.view_specs,
        recipe.data,
        recipe.slim,
        recipe.projector.sizes,
        recipe.run.epochs,
        steps_per_epoch,
        recipe.run.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        method: Method = find_method(recipe.method.name).METHOD(recipe.method, net, context)
    # The first is the net's, whose device and precision the method's own modules take.
    like = next(method.parameters(), None)
    return method if like is None else method.to(like.device, like.dtype)
