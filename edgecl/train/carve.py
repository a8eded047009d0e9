"""The verb `carve`: a run directory in, or given weights, a model directory with one slim net as a plain timm net out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from edgecl.config.recipe import Recipe, read_recipe, recipe_from_tables, width_as_given
from edgecl.data.loading import load_eval_images, normalize
from edgecl.data.sources import absolute_uri, open_source
from edgecl.errors import RecipeError, SliceError, tell
from edgecl.nets.backbone import create_backbone, recalibrate
from edgecl.nets.build import backbone_tensors, create_slimmable
from edgecl.nets.given import load_start
from edgecl.nets.model_dir import write_model
from edgecl.storage.checkpoint import read_best, read_newest
from edgecl.storage.directories import RunDir
from edgecl.storage.outputs import refuse_own_input
from edgecl.storage.reading import reading
from edgecl.storage.records import ImagesRead, ModelRecord, Preprocessing

RECALIBRATION_IMAGES = 4096
RECALIBRATION_BATCH = 64


def carve(
    run: Path,
    *,
    out: Path,
    width: float | None = None,
    checkpoint: Literal["newest", "best"] = "newest",
    recalibrate_norms: bool = True,
    force: bool = False,
) -> ModelRecord:
    """Write a slim net of a run's checkpoint as a model directory.

    `edgecl.api.carve` says what the arguments are and what is raised.
    """
    if run.suffix == ".toml" and not run.is_dir():
        if width is not None or checkpoint == "best":
            raise RecipeError(
                f"'{run}' is a recipe: the weights that it starts from have one width and no checkpoints",
                hint="leave out --width and --best, or name a run directory",
            )
        return _write_start(run, out=out, force=force)
    refuse_own_input(out, run)
    run_dir = RunDir(run)
    record = run_dir.read()
    recipe = recipe_from_tables(record.recipe, source=str(run_dir.record_file))
    read = read_best(run_dir) if checkpoint == "best" else read_newest(run_dir)
    net = create_slimmable(recipe)
    with reading(run_dir.record_file):
        net.load_state_dict(read.net)
    width = recipe.slim.width if width is None else width
    tensors = backbone_tensors(net, width=width)
    if width == net.host_width and net.host_skips:
        raise SliceError(
            f"cannot carve the host: its skip connections are the slim net's, not timm's, in {', '.join(net.host_skips)}",
            hint=f"carve a slim width, {', '.join(map(width_as_given, net.slim_widths))}; only they are for use",
        )
    backbone = create_backbone(recipe.host.arch, width=width, stem_stride=recipe.host.stem_stride)
    backbone.load_state_dict(tensors)
    # Before the first step the norms are those of the weights that the run starts from.
    recalibrate_norms = recalibrate_norms and read.step > 0
    if recalibrate_norms:
        _recalibrate_on_run(backbone, record.data, recipe)
    return write_model(
        out,
        backbone,
        arch=recipe.host.arch,
        width=width,
        stem_stride=recipe.host.stem_stride,
        classes=None,
        preprocessing=preprocessing_of(recipe),
        origin="pretrained",
        made_from=read.sha256,
        data=record.data.uri,
        recalibrated=recalibrate_norms,
        recipe_name=record.recipe_name,
        method=recipe.title,
        epoch=read.epoch,
        step=read.step,
        force=force,
    )


def _write_start(file: Path, *, out: Path, force: bool) -> ModelRecord:
    """Write the weights that a recipe starts from, to be used as they are: prepared for its pictures."""
    recipe = read_recipe(str(file))
    host, data, width = recipe.host, recipe.data, recipe.slim.width
    if host.init is None:
        raise RecipeError(
            "the recipe starts from no given weights",
            where={"file": file},
            hint="name some: `edgecl init --weights`, or [host] init; or carve the directory of a run",
        )
    given = load_start(host.init, host=host, width=width, data=data)
    return write_model(
        out,
        given.net,
        arch=host.arch,
        width=width,
        stem_stride=host.stem_stride,
        classes=None,
        preprocessing=preprocessing_of(recipe),
        origin="given",
        made_from=given.sha256,
        data=data.uri and absolute_uri(data.uri),
        recipe_name=file.stem,
        force=force,
    )


def _recalibrate_on_run(backbone: nn.Module, trained_on: ImagesRead, recipe: Recipe) -> None:
    data = recipe.data
    source = open_source(trained_on.uri, split="train")
    if trained_on.fingerprint not in (None, source.fingerprint):
        tell(
            f"the images of '{source.uri}' are not those that the run was trained on; the norms are re-estimated on what "
            "is there now"
        )
    images = load_eval_images(
        source,
        resize_size=data.resize_size or data.image_size,
        image_size=data.image_size,
        # The run checked this on all of the data; a part of it may have a larger fraction.
        max_bad_fraction=1.0,
        limit=min(RECALIBRATION_IMAGES, data.limit or RECALIBRATION_IMAGES),
    ).images
    recalibrate_on(backbone, images, preprocessing_of(recipe))


def recalibrate_on(net: nn.Module, images: Tensor, preprocessing: Preprocessing) -> None:
    """Re-estimate a net's batch norms on (N, 3, H, W) uint8 images, at most RECALIBRATION_IMAGES spread over them."""
    chosen = images[:: max(1, len(images) // RECALIBRATION_IMAGES)][:RECALIBRATION_IMAGES]
    recalibrate(
        net,
        (
            normalize(batch, preprocessing.mean, preprocessing.std)
            for batch in chosen.split(RECALIBRATION_BATCH)
            if len(batch) > 1
        ),
        device=torch.device("cpu"),
    )


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """Return what a test image goes through."""
    return Preprocessing(
        image_size=recipe.data.image_size,
        resize_size=recipe.data.resize_size or recipe.data.image_size,
        mean=list(recipe.data.mean),
        std=list(recipe.data.std),
    )
