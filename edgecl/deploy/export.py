"""A model directory -> a bundle: ONNX, manifest, reference inputs and outputs, parity proven before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from edgecl.artifacts import (
    Bundle,
    ModelDir,
    new_directory,
    record_header,
    refuse_existing,
    write_sealed,
)
from edgecl.data.loading import load_eval_images, normalise
from edgecl.data.sources import open_source
from edgecl.deploy.onnx import INPUT, OUTPUT, write_onnx
from edgecl.deploy.parity import prove_parity
from edgecl.errors import DataError
from edgecl.nets.carving import load_model
from edgecl.onboard.bundle import sha256_of_file
from edgecl.onboard.runners import open_runner
from edgecl.target import Target, read_target

REFERENCE_IMAGES = 16
PARITY_IMAGES = 64
# Any readable pictures will do to compare on; the verbs that learn from the images hold them to the recipe's limit.
MAX_BAD_FRACTION = 0.5


def export(
    model: Path, *, target: str, out: Path, calibration: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Export a model directory for a target and prove that the exported net computes what torch computes.

    Args:
        model: a model directory.
        target: a packaged target or the path of a TOML file.
        out: the bundle to write.
        calibration: a data URI of real images to compare on; None takes the images the net was made from.
        force: replace an earlier bundle.

    Returns:
        the manifest.

    Raises:
        ArtifactError: not a model directory, the output exists, or the disk is full.
        TargetError: unknown target.
        DataError: no images to compare on.
        ParityError: above the target's tolerance; no bundle is left.
    """
    chosen = read_target(target)
    refuse_existing(out, force=force, kind=Bundle.KIND)
    net, record = load_model(model)
    uri = calibration or record["data"]
    if uri is None:
        raise DataError(
            "this model does not say which images it was made from",
            where={"model": model},
            hint="name real images for the comparison with --calibration URI",
        )
    images = _read_images(uri, record["preprocessing"])
    with new_directory(out, kind=Bundle.KIND, force=force) as aside:
        return _write_bundle(
            Bundle(aside),
            net,
            record,
            images,
            target=chosen,
            target_name=Path(target).stem,
            images_from=uri,
            model_sha256=ModelDir(model).sha256,
        )


def _read_images(uri: str, preprocessing: dict[str, Any]) -> Tensor:
    loaded = load_eval_images(
        open_source(uri, split="train"),
        resize_size=preprocessing["resize_size"],
        image_size=preprocessing["image_size"],
        max_bad_fraction=MAX_BAD_FRACTION,
        limit=PARITY_IMAGES,
    )
    return normalise(loaded.images, preprocessing["mean"], preprocessing["std"])


def _write_bundle(
    bundle: Bundle,
    net: nn.Module,
    record: dict[str, Any],
    images: Tensor,
    *,
    target: Target,
    target_name: str,
    images_from: str,
    model_sha256: str,
) -> dict[str, Any]:
    graph = target.graph
    shape = (3, images.shape[2], images.shape[3])
    description = {
        key: record[key]
        for key in ("arch", "width", "stem_stride", "features", "classes", "origin", "params")
    }
    outputs = write_onnx(
        net,
        bundle.onnx_file,
        graph=graph,
        shape=shape,
        metadata={**record["preprocessing"], "classes": record["classes"], "arch": record["arch"]},
    )
    with torch.no_grad():
        expected = torch.cat([net(part) for part in images.split(16)]).numpy()
    runner_manifest: dict[str, Any] = {
        "runtime": target.runtime,
        "precision": target.precision,
        "model": bundle.onnx_file.name,
        "input": {
            "name": INPUT,
            "shape": [graph.batch, *shape],
            "dtype": "float32",
            "dynamic_batch": graph.dynamic_batch,
            "max_batch": graph.max_batch if graph.dynamic_batch else graph.batch,
        },
        "output": {"name": OUTPUT, "shape": [graph.batch, outputs]},
    }
    parity = prove_parity(
        open_runner(bundle.path, runner_manifest, threads=1),
        images.numpy(),
        expected,
        form=runner_manifest["input"],
        tolerance=target.tolerance,
    )
    numpy.savez(
        bundle.reference_file,
        inputs=images[:REFERENCE_IMAGES].numpy(),
        outputs=expected[:REFERENCE_IMAGES],
    )
    manifest = {
        **record_header(Bundle.KIND, made_from=model_sha256),
        "target_name": target_name,
        "target": target.model_dump(mode="json"),
        **runner_manifest,
        "net": {**description, "model_sha256": model_sha256},
        "preprocessing": record["preprocessing"],
        "tolerance": target.tolerance.model_dump(mode="json"),
        "parity": {**parity, "images_from": images_from},
        "versions": {"torch": torch.__version__, "opset": graph.opset},
        "files": {path.name: sha256_of_file(path) for path in (bundle.onnx_file, bundle.reference_file)},
        "size_bytes": {path.name: path.stat().st_size for path in (bundle.onnx_file, bundle.reference_file)},
    }
    return write_sealed(bundle.record_file, manifest)
