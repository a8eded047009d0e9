"""The format of a model directory: write a net, and rebuild it from what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from edgecl.errors import ArtifactError
from edgecl.nets.backbone import count_parameters, create_backbone, feature_count
from edgecl.nets.fake_quant import insert_fake_quant
from edgecl.nets.folding import fold_batch_norm
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.directories import ModelDir
from edgecl.storage.outputs import new_directory
from edgecl.storage.reading import reading
from edgecl.storage.record_files import write_record
from edgecl.storage.records import ModelRecord, Preprocessing, Quantization


def write_model(
    out: Path,
    net: nn.Module,
    *,
    arch: str,
    width: float,
    stem_stride: Literal[1, 2] | None,
    classes: list[str] | None,
    preprocessing: Preprocessing,
    origin: str,
    made_from: str | None,
    data: str | None,
    recalibrated: bool = False,
    recipe_name: str | None = None,
    method: str | None = None,
    epoch: int | None = None,
    step: int | None = None,
    quantization: Quantization | None = None,
    label_sets: bool = False,
    force: bool = False,
) -> ModelRecord:
    """Write a net as a model directory: weights that timm loads, and what rebuilds the net around them.

    Args:
        label_sets: whether its classifier was trained on pictures that may be of several classes.
        quantization: of a net with fake quantizers, whose weights are those of the folded net and the scales.

    Raises:
        ArtifactError: the output exists, or the disk is full.
    """
    with new_directory(out, kind=ModelDir.KIND, force=force) as aside:
        directory = ModelDir(aside)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()},
            directory.weights_file,
        )
        record = ModelRecord(
            made_from=made_from,
            arch=arch,
            width=width,
            stem_stride=stem_stride,
            classes=classes,
            features=feature_count(net),
            params=count_parameters(net),
            preprocessing=preprocessing,
            origin=origin,
            recalibrated=recalibrated,
            recipe_name=recipe_name,
            method=method,
            epoch=epoch,
            step=step,
            quantization=quantization,
            label_sets=label_sets,
            data=data,
            weights_sha256=sha256_of_file(directory.weights_file),
        )
        return write_record(directory.record_file, record)


def load_model(path: Path) -> tuple[nn.Module, ModelRecord]:
    """Rebuild the net of a model directory, in evaluation mode; a quantized net with its fake quantizers.

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
            f"the weights are not those of '{record.arch}' at width {record.width:g}"
            + (", quantized as the record says" if record.quantization else ""),
            where={"file": directory.weights_file},
        ) from exc
    return net.eval(), record


def load_backbone(net: nn.Module, source: nn.Module) -> None:
    """Copy every weight of a net but its classifier's into another of the same architecture."""
    own = net.state_dict()
    head = {id(tensor) for tensor in cast(Any, net).get_classifier().state_dict(keep_vars=True).values()}
    parameters = dict(net.named_parameters())
    weights = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name in own and id(parameters.get(name)) not in head
    }
    net.load_state_dict({**own, **weights})


def create_blank(record: ModelRecord, *, classes: int | None = None) -> nn.Module:
    """Build the net a model record describes, with random weights; a quantized net with scales of 1.

    Args:
        classes: in place of the record's own number of classes; 0 for a net without classifier.
    """
    net = create_backbone(
        record.arch,
        width=record.width,
        num_classes=len(record.classes or ()) if classes is None else classes,
        stem_stride=record.stem_stride,
    )
    if record.quantization is None:
        return net
    return insert_fake_quant(fold_batch_norm(net), keep=record.quantization.keep)
