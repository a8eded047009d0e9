"""SACL-XD: a wide host and the slim nets inside it learn from each other's embeddings. Its settings give every variant.

| settings                        | method       | passes                                   |
| ------------------------------- | ------------ | ---------------------------------------- |
| slim width = host width, a = 1  | Barlow Twins | host(A), host(B)                         |
| slim width = host width, a < 1  | XD only      | the same; the frozen passes equal them   |
| slim width < host width, a = 1  | SACL only    | host(A), slim(B)                         |
| slim width < host width, a < 1  | SACL-XD      | host(A), slim(B), [slim(A)], [host(B)]   |

Barlow Twins' loss is one of three (`Config.loss`): SimCLR's or the bare alignment may stand in its place in every variant,
and the coding rate beside any of them.

Several slim widths train in one run by the sandwich rule: each step, view B goes through the widest, the narrowest
and one other, and all of them learn from the same host(A) and [host(B)].

Source: Meng, Yang, Lee, Shin, Fan, Seo, "Slimmed Asymmetrical Contrastive Learning and Cross Distillation for
Lightweight Model Training", NeurIPS 2023. Sandwich rule: Yu and Huang, "Universally Slimmable Networks and Improved
Training Techniques", ICCV 2019, arXiv:1903.05134.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import ceil
from typing import ClassVar, Literal

import numpy
import torch
from pydantic import Field
from torch import Tensor

from edgecl.config.recipe import ForwardPasses, MethodConfig, Panel, Recipe, Slim
from edgecl.config.settings import Factor, Fraction, Weight
from edgecl.data.randomness import uniforms
from edgecl.methods.losses import (
    CodingRate,
    CorrelationLoss,
    alignment_loss,
    contrastive_loss,
    cross_correlation_loss,
    mean_of,
)
from edgecl.methods.method import Embeddings, Method, RunContext, Terms
from edgecl.nets.slimming import SlimmableNet

_LOSS_NAMES = {"barlow-twins": "Barlow Twins", "simclr": "SimCLR", "cosine": "cosine and coding rate"}


class EncodersRate(CodingRate):
    """The coding rate R, and of which encoders it is the mean."""

    encoders: Literal["both", "host", "slim"] = "both"
    """Whose projections it is taken of."""


class Config(MethodConfig):
    """L = alpha L_SACL(z_A, z_B) + (1 - alpha) (L_D(z_A, [z_A]) + L_D(z_B, [z_B])) / 2 - w R."""

    has_host: ClassVar[bool] = True
    panels: ClassVar[tuple[Panel, ...]] = (
        Panel(
            "Loss terms",
            {"loss": "total", "sacl": "SACL", "xd_host": "XD host", "xd_slim": "XD slim"},
            log=True,
        ),
    )

    name: Literal["sacl-xd"] = "sacl-xd"
    loss: Literal["barlow-twins", "simclr", "cosine"] = "barlow-twins"
    """The loss inside L_SACL and L_D; cosine only aligns and needs the coding rate."""
    alpha: Fraction = 0.95
    off_diagonal: Weight = 0.0051
    """Barlow Twins: weight of the redundancy term."""
    temperature: float = Field(0.2, gt=0, le=100)
    """SimCLR: temperature of the softmax."""
    scale: Factor = 0.1
    """Multiplies L_SACL and L_D."""
    xd_direction: Literal["both", "slim_only"] = "both"
    """slim_only leaves out L_D(z_A, [z_A]), which pulls the host towards the frozen slim net, and gives its weight to
    L_D(z_B, [z_B])."""
    swap_views: Fraction = 0.5
    """Probability, per step, that the host sees view B and the slim net view A."""
    symmetric: bool = False
    """Both views through both encoders, all four passes with gradient; changes nothing where one net takes both views."""
    learn_targets: bool = False
    """Gradient flows into [z] too, through all four passes."""
    coding_rate: EncodersRate = EncodersRate()

    @property
    def distils(self) -> bool:
        """Whether there is a distillation term."""
        return self.alpha < 1

    @property
    def four_learn(self) -> bool:
        """Whether the passes of slim(A) and host(B) carry gradient."""
        return self.symmetric or (self.distils and self.learn_targets)

    def title(self, recipe: Recipe) -> str:
        """Name the method that widths, alpha and loss amount to; one net narrower than the host makes it slimmed."""
        one_net = recipe.host.width == recipe.slim.all_widths[-1]
        if one_net and not self.distils:
            return _LOSS_NAMES[self.loss]
        name = "XD only" if one_net else "SACL-XD" if self.distils else "SACL only"
        return name if self.loss == "barlow-twins" else f"{name} ({_LOSS_NAMES[self.loss]})"

    def check(self, recipe: Recipe) -> None:
        """Refuse a loss that only aligns without the coding rate, and the coding rate of two images."""
        super().check(recipe)
        if self.loss == "cosine" and self.coding_rate.weight == 0:
            raise ValueError(
                "'method.loss' cosine only pulls views together, and every picture to one point; "
                "set 'method.coding_rate.weight'"
            )
        self.coding_rate.check(recipe)

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return the passes of the epochs of a slow start and of the others, in their shares."""
        host, slim = recipe.host.width, recipe.slim.width
        slow_start = _slow_epochs(recipe.slim, recipe.run.epochs) / recipe.run.epochs
        # The passes of host and widest slim net are those of a run without the narrower ones.
        units = self.forward_units(one_net=host == slim, slow_start=slow_start)
        views, local = self.count_views(recipe, local=True), dict.fromkeys([host, slim], 0.0)
        local[host] += 3 * views * slow_start
        local[slim] += 3 * views * (1 - slow_start)
        return ForwardPasses(
            {
                slim: units["slim"],
                host: units["host"],
                **other_width_units(recipe.slim.all_widths, slow_start=slow_start),
            },
            local,
            self._coding_rates(recipe, slow_start=slow_start),
            self.coding_rate.until or 1.0,
        )

    def forward_units(self, *, one_net: bool, slow_start: float) -> dict[str, float]:
        """Return the cost of one image in forward passes of host and slim net; a backward pass counts as two.

        Args:
            one_net: the slim net is as wide as the host.
            slow_start: fraction of the epochs in which the host takes both views.

        Returns:
            {"host": units, "slim": units}; SACL-XD is 4 and 4, XD only and Barlow Twins 6 of their one net. Local views
            are not among them.

        Source: METHOD section 2b, the rule that reproduces the paper's training-FLOPs column.
        """
        dense = {"host": 6.0, "slim": 0.0}
        if one_net:
            return dense
        # What the second pass of each encoder costs: with gradient 3, as a frozen target 1.
        second = 3.0 if self.symmetric or self.learn_targets else 1.0
        paired = {"host": 3.0, "slim": 3.0}
        if self.symmetric or self.distils:
            paired["host"] += second
            paired["slim"] += second if self.symmetric or self.xd_direction == "both" else 0.0
        return {net: slow_start * dense[net] + (1 - slow_start) * paired[net] for net in dense}

    def _coding_rates(self, recipe: Recipe, *, slow_start: float) -> float:
        if not self.coding_rate.weight:
            return 0.0
        second = self.four_learn and recipe.host.width != recipe.slim.width
        sets = {
            "host": 1 + second,
            "slim": min(3, len(recipe.slim.all_widths))
            + (second and (self.symmetric or self.xd_direction == "both")),
        }
        asked = ["host", "slim"] if self.coding_rate.encoders == "both" else [self.coding_rate.encoders]
        return sum(slow_start + (1 - slow_start) * sets[encoder] for encoder in asked)

    def has_idle_parameters(self, recipe: Recipe) -> bool:
        """Return whether there is a slow start, without the slim nets' norms, or more widths than a step takes."""
        return recipe.slim.slow_start > 0 or len(recipe.slim.all_widths) > 3


class SaclXd(Method):
    """Views A and B cross host and slim net; with several widths, every term in z_B is the mean over those of the step.

    Its embeddings: "host_a"; "slim_b", and "slim_b@0.5" of a further width, in a slow start the host's; "local_0" and
    on, through the slim net, in a slow start through the host; "slim_a" and "host_b", targets unless four passes learn,
    and left out where nothing needs them or one net takes both views.
    """

    config: Config

    def __init__(self, config: Config, net: SlimmableNet, context: RunContext):
        super().__init__(config, net, context)
        self._slow_steps = _slow_epochs(context.slim, context.epochs) * context.steps_per_epoch

    def embed(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the passes that carry gradient."""
        net, slow = self.net, step < self._slow_steps
        view_a, view_b, *local = self._swapped(views, step)
        learnt = {"host_a": net.forward_host(view_a)}
        if slow:
            learnt["slim_b"] = net.forward_host(view_b)
        else:
            for width in sandwich(net.slim_widths, seed=self.seed, step=step):
                learnt[_slim_b(width, net)] = net.forward_slim(view_b, width)
        learnt |= self.embed_local(local, slim=not slow)
        if self.config.four_learn and net.has_slim and not slow:
            if self.config.symmetric or self.config.xd_direction == "both":
                learnt["slim_a"] = net.forward_slim(view_a)
            learnt["host_b"] = net.forward_host(view_b)
        return learnt

    def embed_targets(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Run the frozen passes. The targets of one net are its own projections: 6 forward-units, as Barlow Twins."""
        config = self.config
        if config.four_learn or not config.distils or not self.net.has_slim or step < self._slow_steps:
            return {}
        view_a, view_b, *_ = self._swapped(views, step)
        targets = {"slim_a": self.net.forward_slim(view_a)} if config.xd_direction == "both" else {}
        return {**targets, "host_b": self.net.forward_host(view_b)}

    def _swapped(self, views: Sequence[Tensor], step: int) -> Sequence[Tensor]:
        """Swap views A and B, or not: a function of the step, so that every process does alike."""
        draw = uniforms(self.seed, 0, numpy.array([step]), stream="swap-views", count=1)[0, 0]
        return [views[1], views[0], *views[2:]] if draw < self.config.swap_views else views

    def watched(self, embeddings: Embeddings) -> Tensor:
        """Return those of the slim net."""
        return embeddings.learnt["slim_b"]

    def loss(self, embeddings: Embeddings, step: int) -> tuple[Tensor, Terms]:
        """Compute the loss of one step.

        Returns:
            the total, and the terms "sacl", L_SACL before it is scaled; "xd_host" and "xd_slim", L_D(z_A, [z_A]) and
            L_D(z_B, [z_B]), which move the encoders of view A and of view B; "coding_rate"; "diagonal" and
            "off_diagonal_rms" of the correlation of view A and of view B through the slim width.
        """
        config, (learnt, targets) = self.config, embeddings
        host_a, slim_a, host_b = (
            ({**learnt, **targets}).get(name) for name in ("host_a", "slim_a", "host_b")
        )
        assert host_a is not None
        slim_b = [z for name, z in learnt.items() if name.startswith("slim_b")]
        local = [z for name, z in learnt.items() if name.startswith("local")]
        watched = self._watch(host_a, slim_b[0])
        first = watched.total if config.loss == "barlow-twins" else self.compare(host_a, slim_b[0])
        pairs = [first, *(self.compare(host_a, z) for z in (*slim_b[1:], *local))]
        if config.symmetric and host_b is not None and slim_a is not None:
            pairs.append(self.compare(host_b, slim_a))
        total = sacl = mean_of(pairs)
        xd_host, xd_slim = self._distillation(host_a, slim_b, slim_a, host_b)
        if xd_slim is not None:
            distillation = xd_slim if xd_host is None else (xd_host + xd_slim) / 2
            total = config.alpha * sacl + (1 - config.alpha) * distillation
        total, rate = config.coding_rate.take_off(
            config.scale * total, self._rated(learnt, host_a, slim_b), step, total_steps=self.total_steps
        )
        return total, {
            "sacl": sacl.detach(),
            "xd_host": None if xd_host is None else xd_host.detach(),
            "xd_slim": None if xd_slim is None else xd_slim.detach(),
            "coding_rate": rate,
            "diagonal": watched.diagonal,
            "off_diagonal_rms": watched.off_diagonal_rms,
        }

    def compare(self, z: Tensor, other: Tensor) -> Tensor:
        """Return the () loss inside every term, between (N, D) projections of the same images."""
        if self.config.loss == "simclr":
            return contrastive_loss(z, other, temperature=self.config.temperature)
        if self.config.loss == "cosine":
            return alignment_loss(z, other)
        return cross_correlation_loss(z, other, off_diagonal=self.config.off_diagonal).total

    def _watch(self, host_a: Tensor, slim_b: Tensor) -> CorrelationLoss:
        """Correlate the two views: part of Barlow Twins' loss, and for every other what the alarms look at."""
        with contextlib.nullcontext() if self.config.loss == "barlow-twins" else torch.no_grad():
            return cross_correlation_loss(host_a, slim_b, off_diagonal=self.config.off_diagonal)

    def _distillation(
        self, host_a: Tensor, slim_b: list[Tensor], slim_a: Tensor | None, host_b: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return L_D(z_A, [z_A]) and L_D(z_B, [z_B]); None for what this variant has not."""
        if not self.config.distils:
            return None, None
        two_views_learn = self.config.symmetric and host_b is not None
        if host_b is None:  # one net: its targets are its own projections
            slim_a, host_b = host_a, slim_b[0]
        slim_pairs, host_pairs = [(z, host_b) for z in slim_b], []
        if slim_a is not None:
            host_pairs.append((host_a, slim_a))
            if two_views_learn:
                slim_pairs.append((slim_a, host_a))
                host_pairs.append((host_b, slim_b[0]))
        both = self.config.xd_direction == "both"
        return self._pull(host_pairs if both else []), self._pull(slim_pairs)

    def _pull(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Return the mean loss that pulls the first of each pair to the second, the target."""
        if not pairs:
            return None
        learn = self.config.learn_targets
        return mean_of([self.compare(z, target if learn else target.detach()) for z, target in pairs])

    def _rated(self, learnt: dict[str, Tensor], host_a: Tensor, slim_b: list[Tensor]) -> list[list[Tensor]]:
        """Return what the coding rate is taken of: for each encoder that is asked, its whole views and widths."""
        host = [host_a, *(z for name, z in learnt.items() if name == "host_b")]
        slim = [*slim_b, *(z for name, z in learnt.items() if name == "slim_a")]
        return {"host": [host], "slim": [slim], "both": [host, slim]}[self.config.coding_rate.encoders]


METHOD = SaclXd


def _slow_epochs(slim: Slim, epochs: int) -> int:
    """Return how many epochs of a slow start there are: whole ones."""
    return ceil(slim.slow_start * epochs)


def _slim_b(width: float, net: SlimmableNet) -> str:
    return "slim_b" if width == net.slim_width else f"slim_b@{width:g}"


def sandwich(widths: Sequence[float], *, seed: int, step: int) -> tuple[float, ...]:
    """Choose the slim widths of a step, widest first: the widest, the narrowest and one of those between."""
    ordered = sorted(set(widths), reverse=True)
    between = ordered[1:-1]
    if len(between) > 1:
        draw = float(uniforms(seed, 0, numpy.array([step]), stream="widths", count=1)[0, 0])
        between = [between[int(draw * len(between))]]
    return (ordered[0], *between, *ordered[1:][-1:])


def other_width_units(widths: Sequence[float], *, slow_start: float = 0.0) -> dict[float, float]:
    """Return how often one image passes each slim width but the widest, in forward passes of that width.

    Those are 3 for the narrowest, and 3 shared by those between, of which a step draws one; none in the slow start.
    """
    others = sorted(set(widths), reverse=True)[1:]
    between = len(others) - 1
    return {width: (1 - slow_start) * 3.0 / (1 if width == others[-1] else between) for width in others}
