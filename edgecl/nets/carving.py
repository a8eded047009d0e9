"""A slim net out of its host: from a run directory to a model directory holding a plain timm net."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgecl.config.recipe import Recipe, recipe_from_tables, width_as_given
from edgecl.errors import ArtifactError, RecipeError, SliceError, tell
from edgecl.nets.backbone import count_parameters, create_backbone, feature_count, recalibrate
from edgecl.nets.fake_quant import insert_fake_quant
from edgecl.nets.folding import fold_batch_norm
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import SlimmableNet
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.artifacts import (
    ModelDir,
    RunDir,
    new_directory,
    read_record,
    record_header,
    refuse_own_input,
    write_sealed,
)
from edgecl.storage.checkpoint import read_best, read_newest
from edgecl.storage.reading import reading

RECALIBRATION_IMAGES = 4096
RECALIBRATION_BATCH = 64


def create_slimmable(recipe: Recipe) -> SlimmableNet:
    """Build the encoder a recipe trains, with random weights.

    Raises:
        RecipeError: unknown architecture, or one that does not take pictures of the recipe's sizes.
        SliceError: a slim net is not a prefix of the host, or the host cannot begin as its slim nets.
    """

    def build(width: float) -> nn.Module:
        return Encoder(
            recipe.host.arch,
            width=width,
            projector=recipe.projector.sizes,
            stem_stride=recipe.host.stem_stride,
        )

    net = SlimmableNet(
        build,
        host_width=recipe.host.width,
        slim_width=recipe.slim.width,
        other_widths=recipe.slim.all_widths[1:],
    )
    for size in dict.fromkeys(spec.size for spec in recipe.view_specs):
        _try_image_size(net, recipe.host.arch, size)
    if recipe.host.nested_start:
        net.nest()
    return net


def _try_image_size(net: SlimmableNet, arch: str, size: int) -> None:
    """Run one blank picture: some nets, transformers among them, take one size only."""
    net.eval()
    try:
        with torch.no_grad():
            net.forward_slim(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as exc:
        raise RecipeError(
            f"'{arch}' does not take pictures of {size} x {size}: {str(exc).splitlines()[0]}",
            hint="set [data] image_size or [views] local_size to a size the net takes, or choose another net",
        ) from exc
    finally:
        net.train()


def backbone_tensors(net: SlimmableNet, *, width: float) -> dict[str, Tensor]:
    """Return the backbone of one width as a plain state dict: copies, named as timm names them.

    Args:
        net: host and slim nets.
        width: a slim width or the host's.

    Raises:
        SliceError: the net was not trained at this width.
    """
    if width not in (*net.slim_widths, net.host_width):
        *first, last = map(width_as_given, sorted({*net.slim_widths, net.host_width}))
        trained = f"{', '.join(first)} and {last}" if first else last
        raise SliceError(
            f"cannot carve width {width_as_given(width)}: this run trained {trained}",
            hint="each width has batch norms of its own, so only a trained width can be carved",
        )
    tensors = net.slim_tensors(width) if width in net.slim_widths else net.host.state_dict()
    prefix = "backbone."
    return {
        name.removeprefix(prefix): tensor.detach().clone().contiguous()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def carve(
    run: Path,
    *,
    out: Path,
    width: float | None = None,
    checkpoint: Literal["newest", "best"] = "newest",
    recalibrate_norms: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Write a slim net of a run's checkpoint as a model directory.

    Args:
        run: a run directory.
        out: the model directory to write.
        width: which trained width, the host's among them; None means the widest slim net.
        checkpoint: the newest, or the one at which the slim net's features were evaluated best.
        recalibrate_norms: re-estimate batch-norm statistics on the run's own images, unaugmented. Without it the
            carved net equals the slim net of the checkpoint bit for bit.
        force: replace an earlier model directory.

    Returns:
        the record in model.json.

    Raises:
        ArtifactError: no run directory, no such whole checkpoint in it, or the output exists.
        SliceError: the run was not trained at this width, or it is that of a host with the slim net's skip connections.
        DataError: recalibration needs the run's images and they are gone.
    """
    refuse_own_input(out, run)
    run_dir = RunDir(run)
    record = read_record(run_dir.record_file, kind=RunDir.KIND, whole=True)
    recipe = recipe_from_tables(record["recipe"], source=str(run_dir.record_file))
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
    if recalibrate_norms:
        _recalibrate_on_run(backbone, record["data"], recipe)
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
        data=record["data"]["uri"],
        recalibrated=recalibrate_norms,
        recipe_name=record["recipe_name"],
        arm=recipe.arm,
        epoch=read.epoch,
        step=read.step,
        force=force,
    )


def _recalibrate_on_run(backbone: nn.Module, trained_on: dict[str, Any], recipe: Recipe) -> None:
    from edgecl.data.loading import load_eval_images
    from edgecl.data.sources import open_source

    data = recipe.data
    source = open_source(trained_on["uri"], split="train")
    if source.fingerprint != trained_on.get("fingerprint", source.fingerprint):
        tell(
            f"the images of '{source.uri}' are not those that the run was trained on; the norms are re-estimated on what "
            "is there now"
        )
    images = load_eval_images(
        source,
        resize_size=data.resize_size or data.image_size,
        image_size=data.image_size,
        # The run held the whole of the data to what is allowed; a part of it may have more.
        max_bad_fraction=1.0,
        limit=min(RECALIBRATION_IMAGES, data.limit or RECALIBRATION_IMAGES),
    ).images
    recalibrate_on(backbone, images, preprocessing_of(recipe))


def recalibrate_on(net: nn.Module, images: Tensor, preprocessing: dict[str, Any]) -> None:
    """Re-estimate a net's batch norms on (N, 3, H, W) uint8 images, at most RECALIBRATION_IMAGES spread over them."""
    from edgecl.data.loading import normalize

    chosen = images[:: max(1, len(images) // RECALIBRATION_IMAGES)][:RECALIBRATION_IMAGES]
    recalibrate(
        net,
        (
            normalize(batch, preprocessing["mean"], preprocessing["std"])
            for batch in chosen.split(RECALIBRATION_BATCH)
            if len(batch) > 1
        ),
        device=torch.device("cpu"),
    )


def preprocessing_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a test image goes through, as model.json and a bundle's manifest hold it."""
    return {
        "image_size": recipe.data.image_size,
        "resize_size": recipe.data.resize_size or recipe.data.image_size,
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "interpolation": "bilinear",
    }


def write_model(
    out: Path,
    net: nn.Module,
    *,
    arch: str,
    width: float,
    stem_stride: int | None,
    classes: list[str] | None,
    preprocessing: dict[str, Any],
    origin: str,
    made_from: str | None,
    data: str | None,
    recalibrated: bool = False,
    recipe_name: str | None = None,
    arm: str | None = None,
    epoch: int | None = None,
    step: int | None = None,
    quantization: dict[str, Any] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a net as a model directory: weights that timm loads, and what rebuilds the net around them.

    Args:
        quantization: of a net with fake quantizers: its "precision", and under "keep" the modules that stayed float.
            Its weights are those of the folded net and the scales.

    Raises:
        ArtifactError: the output exists, or the disk is full.
    """
    with new_directory(out, kind=ModelDir.KIND, force=force) as aside:
        directory = ModelDir(aside)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()},
            directory.weights_file,
        )
        record = {
            **record_header(ModelDir.KIND, made_from=made_from),
            "arch": arch,
            "width": width,
            "stem_stride": stem_stride,
            "classes": classes,
            "features": feature_count(net),
            "params": count_parameters(net),
            "preprocessing": preprocessing,
            "origin": origin,
            "recalibrated": recalibrated,
            "recipe_name": recipe_name,
            "arm": arm,
            "epoch": epoch,
            "step": step,
            "quantization": quantization,
            "data": data,
            "weights_sha256": sha256_of_file(directory.weights_file),
        }
        return write_sealed(directory.record_file, record)


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the net of a model directory, in evaluation mode; a quantized net with its fake quantizers.

    Returns:
        the net and its record.

    Raises:
        ArtifactError: not a model directory, or weights that do not match their hash or the net.
    """
    directory = ModelDir(path)
    record = directory.read()
    with reading(directory.record_file):
        net = create_blank(record)
    with reading(directory.weights_file, SafetensorError):
        tensors = load_file(directory.weights_file)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as exc:
        raise ArtifactError(
            f"the weights are not those of '{record['arch']}' at width {record['width']:g}"
            + (", quantized as the record says" if record.get("quantization") else ""),
            where={"file": directory.weights_file},
        ) from exc
    return net.eval(), record


def load_backbone(net: nn.Module, source: nn.Module) -> None:
    """Copy every weight of a net into another of the same architecture, its classifier apart."""
    own = net.state_dict()
    head = {id(tensor) for tensor in cast(Any, net).get_classifier().state_dict(keep_vars=True).values()}
    parameters = dict(net.named_parameters())
    weights = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name in own and id(parameters.get(name)) not in head
    }
    net.load_state_dict({**own, **weights})


def create_blank(record: dict[str, Any]) -> nn.Module:
    """Build the net a model record describes, with random weights; a quantized net with scales of 1."""
    net = create_backbone(
        record["arch"],
        width=record["width"],
        num_classes=len(record["classes"] or ()),
        stem_stride=record["stem_stride"],
    )
    quantization = record.get("quantization")
    if quantization is None:
        return net
    return insert_fake_quant(fold_batch_norm(net), keep=quantization["keep"])
