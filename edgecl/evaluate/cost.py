"""What a net costs: MACs and parameters by fvcore, and the FLOPs of training it."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from edgecl.config.recipe import Recipe
from edgecl.config.settings import Config, parse_toml
from edgecl.errors import RecipeError
from edgecl.methods.teacher import TaughtConfig, load_teacher
from edgecl.nets.backbone import count_parameters, create_backbone, feature_count, taking_pictures
from edgecl.nets.folding import fuse_branches
from edgecl.storage.directories import ModelDir
from edgecl.storage.reading import reading
from edgecl.storage.record_files import write_record
from edgecl.storage.records import (
    CostRecord,
    NetCost,
    PublishedCost,
    RecipeCost,
    RecipeTraining,
    WidthCost,
)

IMAGENET_IMAGES = 1_281_167

# One multiply-add per element. fvcore leaves these uncounted; the paper's column is met only with them.
_ELEMENTWISE = ("relu", "hardtanh", "hardswish", "silu", "sigmoid", "hardsigmoid", "gelu", "add", "mul")


@dataclass(frozen=True)
class ForwardCost:
    """The cost of one forward pass of one image.

    Attributes:
        macs: multiply-adds as fvcore counts them (its "flops"): convolutions, linear layers, two per element of a
            batch norm, pooling.
        elementwise: one per element of activations, additions, gates and means, which fvcore leaves out.
        uncounted: operator -> calls that neither counts.
    """

    macs: int
    elementwise: int
    by_operator: dict[str, int]
    uncounted: dict[str, int]

    @property
    def training_flops(self) -> int:
        """FLOPs of the forward pass with everything counted, as training is priced; one MAC is two FLOPs."""
        return 2 * (self.macs + self.elementwise)


def forward_cost(net: nn.Module, shape: tuple[int, ...]) -> ForwardCost:
    """Count one forward pass in evaluation mode.

    Args:
        shape: of its input with batch 1, e.g. (1, 3, 224, 224).

    Raises:
        RecipeError: it does not take such an input.

    Source: fvcore.nn.FlopCountAnalysis, which counts one fused multiply-add as one "flop".
    """
    was_training = net.training
    net.eval()
    try:
        hint = "set [data] image_size to a size that it takes"
        with warnings.catch_warnings(), torch.no_grad(), taking_pictures("the net", *shape[2:], hint=hint):
            # fvcore traces with torch.jit, which newer torch calls deprecated.
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis

            logging.getLogger("fvcore").setLevel(logging.ERROR)
            analysis: Any = FlopCountAnalysis(net, torch.zeros(shape)).tracer_warnings("none")
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            for name in _ELEMENTWISE:
                for spelling in (f"aten::{name}", f"aten::{name}_"):
                    analysis.set_op_handle(spelling, _count_elements(name, of_output=True))
            analysis.set_op_handle("aten::mean", _count_elements("mean", of_output=False))
            counted = {name: int(count) for name, count in analysis.by_operator().items()}
            by_operator = {
                name: count for name, count in counted.items() if name not in (*_ELEMENTWISE, "mean")
            }
            macs = sum(by_operator.values())
            return ForwardCost(
                macs=macs,
                elementwise=sum(counted.values()) - macs,
                by_operator=by_operator,
                uncounted={name: int(count) for name, count in analysis.unsupported_ops().items()},
            )
    finally:
        net.train(was_training)


def _count_elements(name: str, *, of_output: bool) -> Callable[[list[Any], list[Any]], Counter[str]]:
    return lambda inputs, outputs: Counter({name: prod((outputs if of_output else inputs)[0].type().sizes())})


@dataclass(frozen=True)
class TrainingCost:
    """What pretraining costs, as METHOD section 2b prices it: a backward pass is two forward passes.

    Attributes:
        host_flops: one host forward pass of one image, H.
        slim_flops: one slim forward pass, S, at the widest slim width.
        passes: of one image, in forward passes of each slim width; of one as wide as the host they are the host's.
        flops_per_image: all passes of one image, projector and losses apart.
        others_flops_per_image: the part of the slim nets below the widest: what they add to a run of the widest alone.
        local_flops_per_image: the part of its local views, three forward passes each.
        projector_flops: the projector's share per image, not in flops_per_image, as the paper leaves it out.
        rate_flops: FLOPs of one image's share of the coding rate, backward included, in a step that takes it; not in
            flops_per_image, as the projector.
        rate_share: of the steps that take it.
        teacher_flops: one forward pass of one image through the teacher, where there is one.
        teacher_passes: of one image in an epoch.
        teacher_passes_once: of one image in the run, where its features are kept.
    """

    host_flops: int
    slim_flops: int
    passes: dict[float, float]
    flops_per_image: float
    others_flops_per_image: float
    local_flops_per_image: float
    projector_flops: float
    images: int
    epochs: int
    rate_flops: float
    rate_share: float
    teacher_flops: int
    teacher_passes: float
    teacher_passes_once: float

    @property
    def total_flops(self) -> float:
        """FLOPs of the whole run, projector apart."""
        once = self.teacher_passes_once * self.teacher_flops * self.images
        return self.flops_per_image * self.images * self.epochs + once

    @property
    def teacher_total_flops(self) -> float:
        """FLOPs of the teacher's passes in the whole run, a part of total_flops."""
        return (
            (self.teacher_passes * self.epochs + self.teacher_passes_once) * self.teacher_flops * self.images
        )

    @property
    def forward_units(self) -> float:
        """Cost of one image in forward passes of the widest slim net."""
        return self.flops_per_image / self.slim_flops


def training_cost(recipe: Recipe, *, images: int) -> TrainingCost:
    """Price a recipe.

    The method says how many forward passes there are; a local view's are at its own size. The coding rate costs, for each
    of the S sets of (N, D) embeddings that it is taken of, one product of m x m numbers, m = min(N, D), and its Cholesky
    factor, and twice that backward: 3 S (2 N D m + m^3 / 3) FLOPs a step of N images. (Many processes take the D x D product
    whatever N is.)

    Args:
        images: images per epoch.
    """
    size = recipe.data.image_size
    counted = {
        width: _count(recipe, width, size)
        for width in dict.fromkeys([recipe.host.width, *recipe.slim.all_widths])
    }
    flops = {width: one.trained.training_flops for width, one in counted.items()}
    heads = {
        width: 2 * sum(a * b for a, b in pairwise([one.features, *recipe.projector.sizes]))
        for width, one in counted.items()
    }
    passes = recipe.method.forward_passes(recipe)
    # A slim net as wide as the host is the host, and so are its passes.
    pair, others = dict.fromkeys([recipe.host.width, recipe.slim.width]), recipe.slim.all_widths[1:]

    def of_passes(cost: dict[float, int], widths: Iterable[float]) -> float:
        return sum(passes.whole[width] * cost[width] for width in widths)

    others_flops, local_flops = of_passes(flops, others), _local_flops(recipe, passes.local)
    teacher_flops = _teacher_flops(recipe, size)
    return TrainingCost(
        host_flops=flops[recipe.host.width],
        slim_flops=flops[recipe.slim.width],
        passes={width: passes.whole[width] for width in recipe.slim.all_widths},
        flops_per_image=of_passes(flops, pair) + others_flops + local_flops + passes.teacher * teacher_flops,
        others_flops_per_image=others_flops,
        local_flops_per_image=local_flops,
        projector_flops=of_passes(heads, pair)
        + of_passes(heads, others)
        + sum(count * heads[width] for width, count in passes.local.items()),
        images=images,
        epochs=recipe.run.epochs,
        rate_flops=passes.coding_rates * _coding_rate_flops(recipe),
        rate_share=passes.coding_rate_share,
        teacher_flops=teacher_flops,
        teacher_passes=passes.teacher,
        teacher_passes_once=passes.teacher_once,
    )


def _teacher_flops(recipe: Recipe, size: int) -> int:
    """Return the FLOPs of a forward pass of the method's teacher, 0 where it has none; its weights need not be there."""
    if not isinstance(recipe.method, TaughtConfig):
        return 0
    settings = recipe.method.teacher
    if settings.arch is None or Path(settings.weights or "").exists():
        return forward_cost(load_teacher(settings).net, (1, 3, size, size)).training_flops
    return _count_timm(settings.arch, 1.0, None, size).trained.training_flops


def _local_flops(recipe: Recipe, passes: dict[float, float]) -> float:
    """Return one image's FLOPs for its local views, which share the passes of each width evenly."""
    count = recipe.method.count_views(recipe, local=True)
    return sum(
        passes[width] * (spec.count / count) * _count(recipe, width, spec.size).trained.training_flops
        for width in passes
        for spec in recipe.view_specs
        if spec.local and passes[width]
    )


def _coding_rate_flops(recipe: Recipe) -> float:
    """Return one image's share of the coding rate of one set of embeddings."""
    count, dimensions = recipe.data.batch_size, recipe.projector.sizes[-1]
    less = min(count, dimensions)
    return 3 * (2 * count * dimensions * less + less**3 / 3) / count


def cost(model: Path) -> CostRecord:
    """Count the net of a model directory and write cost.json into it.

    Raises:
        ArtifactError: not a model directory.
    """
    from edgecl.nets.model_dir import load_model

    net, record = load_model(model)
    size = record.preprocessing.image_size
    shape = (1, 3, size, size)
    with reading(ModelDir(model).record_file, AssertionError):  # a net may not take pictures of that size
        fused = fuse_branches(net)
        counted = _net_cost(fused, shape, forward_cost(fused, shape))
    result = CostRecord(made_from=ModelDir(model).sha256, **dict(counted))
    return write_record(ModelDir(model).cost_file, result)


def cost_of_recipe(recipe: Recipe, *, recipe_name: str, images: int | None = None) -> RecipeCost:
    """Count the slim nets of a recipe and price its training.

    Args:
        images: images per epoch; None counts those of the recipe's own data URI, or takes ImageNet-1K's number
            for a recipe that names none.

    Raises:
        RecipeError: fewer images than a batch.
    """
    if images is None:
        images = _images_of(recipe)
    if images < recipe.data.batch_size:
        raise RecipeError(
            f"'{recipe_name}' has {images} images, fewer than its batch of {recipe.data.batch_size}"
        )
    size = recipe.data.image_size
    nets = {width: _count(recipe, width, size).deployed for width in recipe.slim.all_widths}
    priced = training_cost(recipe, images=images)
    return RecipeCost(
        **dict(nets[recipe.slim.width]),
        widths=[
            WidthCost(
                width=width,
                macs=net.macs,
                params=net.params,
                forward_flops=2 * (net.macs + net.elementwise),
                forward_passes=priced.passes[width],
            )
            for width, net in nets.items()
        ],
        training=RecipeTraining(
            method=recipe.title,
            forward_units=round(priced.forward_units, 4),
            flops_per_image=round(priced.flops_per_image),
            total_flops=float(priced.total_flops),
            further_widths_flops_per_image=round(priced.others_flops_per_image),
            further_widths_total_flops=float(priced.others_flops_per_image * images * priced.epochs),
            local_views_flops_per_image=round(priced.local_flops_per_image),
            coding_rate_flops_per_image=round(priced.rate_flops),
            coding_rate_total_flops=float(priced.rate_flops * priced.rate_share * images * priced.epochs),
            teacher_forward_flops=priced.teacher_flops,
            teacher_total_flops=float(priced.teacher_total_flops),
            teacher_training_flops=recipe.method.teacher.training_flops
            if isinstance(recipe.method, TaughtConfig)
            else 0.0,
            images=images,
            epochs=priced.epochs,
            host_forward_flops=priced.host_flops,
            slim_forward_flops=priced.slim_flops,
            projector_flops_per_image=round(priced.projector_flops),
            projector_total_flops=float(priced.projector_flops * images * priced.epochs),
        ),
    )


def _images_of(recipe: Recipe) -> int:
    found = IMAGENET_IMAGES
    if recipe.data.uri is not None:
        from edgecl.data.sources import open_source

        found = len(open_source(recipe.data.uri, split="train"))
    return min(found, recipe.data.limit or found)


class _Counted(NamedTuple):
    features: int
    trained: ForwardCost
    deployed: NetCost
    """Its branches fused."""


def _count(recipe: Recipe, width: float, size: int) -> _Counted:
    return _count_timm(recipe.host.arch, width, recipe.host.stem_stride, size)


@cache  # a recipe asks for one net several times, and the arms of a campaign for the same few
def _count_timm(arch: str, width: float, stem_stride: int | None, size: int) -> _Counted:
    net, shape = create_backbone(arch, width=width, stem_stride=stem_stride), (1, 3, size, size)
    fused, trained = fuse_branches(net), forward_cost(net, shape)
    deployed = trained if fused is net else forward_cost(fused, shape)
    return _Counted(feature_count(net), trained, _net_cost(fused, shape, deployed))


def _net_cost(fused: nn.Module, shape: tuple[int, ...], counted: ForwardCost) -> NetCost:
    return NetCost(
        macs=counted.macs,
        flops=2 * counted.macs,
        params=count_parameters(fused),
        input=list(shape),
        by_operator=counted.by_operator,
        elementwise=counted.elementwise,
        uncounted=counted.uncounted,
    )


class PublishedRow(Config):
    """A row of the paper's training-cost column, and the rule that should give it."""

    method: str
    """As printed."""
    arch: str
    """timm's name of the small net."""
    printed_e17: float
    """As printed, in 1e17 FLOPs."""
    epochs: int
    """Epochs of the small net, as printed."""
    host_units: int = 0
    """Forward passes of the 1.5x host per image."""
    slim_units: int
    """Forward passes of the small net per image."""
    teacher: str | None = None
    """timm's name of the teacher."""
    teacher_units: int = 0
    """Forward passes of the teacher per image, over all its epochs."""
    note: str = ""
    """Why the row does not fit, where it does not."""


def published_rows() -> list[PublishedRow]:
    """Return the rows of the paper's training-cost column, which are data in published_costs.toml."""
    file = Path(__file__).with_name("published_costs.toml")
    tables = parse_toml(file.read_text(encoding="utf-8"), source=str(file), error=RecipeError)
    return [PublishedRow.model_validate(row) for row in tables["rows"]]


def cost_table() -> list[PublishedCost]:
    """Price every row of the paper's training-cost column by one rule, ImageNet-1K at 224 pixels."""

    def of(arch: str, width: float = 1.0) -> int:
        return _count_timm(arch, width, None, 224).trained.training_flops

    rows = []
    for row in published_rows():
        per_image = row.epochs * row.slim_units * of(row.arch)
        if row.host_units:
            per_image += row.epochs * row.host_units * of(row.arch, 1.5)
        if row.teacher:
            per_image += row.teacher_units * of(row.teacher)
        total = float(per_image * IMAGENET_IMAGES)
        printed = row.printed_e17 * 1e17
        rows.append(
            PublishedCost(
                method=row.method,
                arch=row.arch,
                teacher=row.teacher,
                epochs=row.epochs,
                total_flops=total,
                printed_flops=printed,
                difference=total / printed - 1,
                note=row.note,
            )
        )
    return rows
