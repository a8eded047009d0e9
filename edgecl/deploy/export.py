"""A model directory -> a bundle: the net in each precision, every form proven before any of it is written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecl.config.target import Precision, Target, read_target, target_name
from edgecl.data.loading import load_eval_images, normalize, split_holdout
from edgecl.data.randomness import permutation
from edgecl.data.sources import has_test_split, open_source
from edgecl.data.unreadable import say_skipped
from edgecl.deploy.accuracy import HOLDOUT, MAX_BAD_FRACTION, open_evaluator
from edgecl.deploy.decision import conclude
from edgecl.deploy.onboard_zip import write_onboard
from edgecl.deploy.onnx import INPUT, OUTPUT, save_onnx
from edgecl.deploy.parity import slim_view_check
from edgecl.deploy.process import run_here
from edgecl.deploy.readme import bundle_readme
from edgecl.deploy.rtx import compile_rtx
from edgecl.deploy.variants import (
    PARITY_IMAGES,
    REFERENCE_IMAGES,
    Form,
    float_net,
    make_variants,
    torch_outputs,
)
from edgecl.deploy.verify import verify
from edgecl.errors import DataError, ParityError, TargetError
from edgecl.nets.model_dir import load_model
from edgecl.onboard import trtexec
from edgecl.onboard.bundle import engine_name, onnx_name, sha256_of_file
from edgecl.onboard.errors import OnboardError
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.raw_records import read_record, record_header, write_sealed
from edgecl.storage.writing import new_directory, refuse_existing, write_bytes

Array = NDArray[numpy.float32]

LEAST_CALIBRATION_IMAGES = 64
SPEED_S = 2.0

# What this machine can run; the others need their device.
_HOST_RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


def export(
    model: Path,
    *,
    target: str,
    out: Path,
    precisions: Sequence[str] | None = None,
    calibration: str | None = None,
    eval_uri: str | None = None,
    run: Path | None = None,
    force: bool = False,
    download: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Export a model directory for a target and prove that every exported form computes what torch computes.

    Args:
        model: a model directory.
        target: a packaged target or the path of a TOML file.
        out: the bundle to write.
        precisions: in place of the target's, the preferred one first.
        calibration: a data URI of real images to calibrate INT8 and to compare on; None takes the images the
            net was made from.
        eval_uri: a data URI of labelled images on which the precisions are evaluated; None takes the held-out part
            of the images the net was made from.
        run: the run directory the model was carved from; its slim view is then the first parity check.
        force: replace an earlier bundle.
        download: let torchvision fetch what is not on the disk.
        say: told how far it is, one line each.

    Returns:
        the manifest.

    Raises:
        ArtifactError: not a model directory, the output exists, or the disk is full.
        TargetError: unknown target, or a precision the target's device lacks.
        DataError: no images to compare on, too few to calibrate on, or images to evaluate on that do not fit.
        ParityError: a form outside the target's tolerance; no bundle is left.
        DeviceError: the target needs a compiler that is not installed.
    """
    chosen = read_target(target, precisions=precisions)
    refuse_existing(out, force=force, kind=Bundle.KIND)
    net, loaded = load_model(model)
    record = loaded.to_json()
    uri = calibration or record["data"]
    if uri is None:
        raise DataError(
            "this model does not say which images it was made from",
            where={"model": model},
            hint="name real images for the comparison with --calibration URI",
        )
    preprocessing = _preprocessing(record["preprocessing"], chosen.graph.image_size)
    tested_on = _tested_on(ModelDir(model))
    # Images named to evaluate on leave all of the others to calibrate on.
    images, labels = _read_images(
        uri, chosen, record, preprocessing, hold_out=not (eval_uri or tested_on), download=download
    )
    evaluator = None
    if len(chosen.precisions) > 1 or "int8" in chosen.precisions or eval_uri:
        evaluator = open_evaluator(
            record,
            uri=eval_uri or tested_on,
            fallback=uri if record["data"] is None else record["data"],
            preprocessing=preprocessing,
            download=download,
        )
    parity = [slim_view_check(net, record, run, images[:PARITY_IMAGES])] if run else []
    with new_directory(out, kind=Bundle.KIND, force=force) as aside:
        bundle = Bundle(aside)
        forms, steps = make_variants(
            net,
            record,
            images,
            labels,
            target=chosen,
            preprocessing=preprocessing,
            evaluator=evaluator,
            say=say,
        )
        expected = torch_outputs(float_net(net, record), images[:REFERENCE_IMAGES])
        numpy.savez(bundle.reference_file, inputs=images[:REFERENCE_IMAGES].numpy(), outputs=expected)
        manifest = {
            **record_header(Bundle.KIND, made_from=ModelDir(model).sha256),
            "target_name": target_name(target),
            "target": chosen.model_dump(mode="json"),
            "runtime": chosen.runtime,
            "precision": "fp32",
            "precisions": {},
            "input": _input_form(chosen, images),
            "output": {"name": OUTPUT, "shape": [chosen.graph.batch, expected.shape[1]]},
            "net": {
                **{
                    key: record[key]
                    for key in ("arch", "width", "stem_stride", "features", "classes", "origin", "params")
                },
                "model_sha256": ModelDir(model).sha256,
            },
            "preprocessing": preprocessing,
            "classes": record["classes"],
            "parity": [*parity, *steps],
            "images_from": uri,
            "versions": _versions(chosen),
        }
        _write_variants(bundle, manifest, forms, target=chosen, say=say)
        return _finish(bundle, manifest, target=chosen, say=say)


def _tested_on(model: ModelDir) -> str | None:
    """Return the held-out images that fine-tuning was given, which the net has not seen."""
    if not model.evaluation_file.exists():
        return None
    uri: str | None = read_record(model.evaluation_file, kind="evaluation").get("test_uri")
    return uri


def _preprocessing(own: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """Return a net's preprocessing at the size the target asks for, the picture cut out in the same proportion."""
    if image_size is None:
        return own
    resize = max(image_size, round(own["resize_size"] * image_size / own["image_size"]))
    return {**own, "image_size": image_size, "resize_size": resize}


def _read_images(
    uri: str,
    target: Target,
    record: dict[str, Any],
    preprocessing: dict[str, Any],
    *,
    hold_out: bool,
    download: bool,
) -> tuple[Tensor, Tensor | None]:
    """Read real images to compare and to calibrate on, none of them from what is held out for the evaluator.

    Returns:
        (N, 3, H, W) after preprocessing, in a random order, and (N,) labels of the net's classes or None.
    """
    settings = target.quantization
    wanted = PARITY_IMAGES
    if "int8" in target.precisions:
        wanted = max(wanted, settings.calibration_images + settings.holdout_images)
    source = open_source(uri, split="train", download=download)
    source_length = len(source)
    if hold_out and source.labels is not None and not has_test_split(uri):
        stay = split_holdout(source.labels, HOLDOUT, seed=0)[0]
        source = source.take(stay)
    loaded = load_eval_images(
        source,
        resize_size=preprocessing["resize_size"],
        image_size=preprocessing["image_size"],
        max_bad_fraction=MAX_BAD_FRACTION,
        limit=wanted,
    )
    say_skipped(loaded.skipped, uri)
    aside = " beside the fifth that is held out" if hold_out and len(source) < source_length else ""
    if len(loaded.images) < REFERENCE_IMAGES:
        raise DataError(
            f"a bundle needs {REFERENCE_IMAGES} real images, there are {len(loaded.images)}{aside}",
            where={"data": uri},
            hint="name more with --calibration URI; they need no labels",
        )
    if "int8" in target.precisions and len(loaded.images) < LEAST_CALIBRATION_IMAGES:
        raise DataError(
            f"INT8 needs at least {LEAST_CALIBRATION_IMAGES} images to calibrate on, "
            f"there are {len(loaded.images)}{aside}",
            where={"data": uri},
            hint="name more with --calibration URI, or leave INT8 out, e.g. --precision "
            + (",".join(name for name in target.precisions if name != "int8") or "fp32"),
        )
    order = torch.from_numpy(permutation(0, 0, len(loaded.images), stream="calibration"))
    images = normalize(loaded.images[order], preprocessing["mean"], preprocessing["std"])
    fits = record["classes"] is not None and list(source.classes or ()) == list(record["classes"])
    return images, loaded.labels[order] if loaded.labels is not None and fits else None


def _input_form(target: Target, images: Tensor) -> dict[str, Any]:
    graph = target.graph
    return {
        "name": INPUT,
        "shape": [graph.batch, *images.shape[1:]],
        "dtype": "float32",
        "dynamic_batch": graph.dynamic_batch,
        "max_batch": graph.max_batch if graph.dynamic_batch else graph.batch,
    }


def _write_variants(
    bundle: Bundle,
    manifest: dict[str, Any],
    forms: dict[Precision, Form],
    *,
    target: Target,
    say: Callable[[str], None],
) -> None:
    """Write every form into the bundle and describe it in the manifest, the preferred precision first."""
    order = [*target.precisions, *(name for name in forms if name not in target.precisions)]
    for precision in order:
        form = forms[precision]
        if form.decision and form.decision.get("outside_tolerance"):
            manifest["left_out"] = {precision: {"decision": form.decision, "parity": form.parity}}
            continue
        file = bundle.path / onnx_name(precision)
        save_onnx(form.model, file)
        about: dict[str, Any] = {
            "model": file.name,
            "form": form.form,
            "opset": next(
                entry.version for entry in form.model.opset_import if entry.domain in ("", "ai.onnx")
            ),
            "tolerance": target.tolerance_of(precision, features=manifest["classes"] is None).model_dump(
                mode="json"
            ),
            "parity": form.parity,
            "accuracy": form.accuracy,
            "decision": form.decision,
            **form.about,
        }
        if target.runtime == "tensorrt_rtx":
            say(f"{precision}: compiling for TensorRT-RTX")
            plan = bundle.path / engine_name(precision, "rtx")
            about["engines"] = {
                plan.name: compile_rtx(
                    file,
                    plan,
                    precision=precision,
                    form=form.form,
                    build=target.build,
                    input_form=manifest["input"],
                )
            }
        if target.runtime == "tensorrt":
            try:
                about["trtexec"] = trtexec.command_lines(
                    target.versions,
                    manifest_input=manifest["input"],
                    build=target.build.model_dump(mode="json"),
                    precision=precision,
                    form=form.form,
                    model=file.name,
                    plan=engine_name(precision, "trtexec"),
                )
            except OnboardError as error:
                raise TargetError(error.problem, hint=error.hint) from error
        manifest["precisions"][precision] = about


def _finish(
    bundle: Bundle, manifest: dict[str, Any], *, target: Target, say: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate the speed of INT8 where this machine can, choose the default, and seal the bundle once it verifies."""
    write_onboard(bundle.onboard_file)
    int8 = manifest["precisions"].get("int8")
    if int8:
        speed = None
        if runs_here(target):
            say("INT8: measuring its speed")
            _seal(bundle, manifest)
            speed = _speed(bundle, against=_preferred(manifest, target, besides="int8"))
        higher = "fp32" if target.graph.int8 == "int8-cpu" or target.runtime == "openvino" else "fp16"
        int8["decision"] = conclude(int8["decision"], speed=speed, higher=higher)
    for about in manifest.get("left_out", {}).values():
        about["decision"] = conclude(about["decision"], speed=None, higher="fp16")
    manifest["precision"] = _preferred(manifest, target)
    if target.runtime == "tensorrt":
        write_bytes(bundle.trtexec_file, trtexec.script(manifest).encode())
        bundle.trtexec_file.chmod(0o755)
    write_bytes(bundle.readme_file, bundle_readme(manifest).encode())
    sealed = _seal(bundle, manifest)
    say("verifying the bundle")
    try:
        verify(bundle.path, runtime=None if runs_here(target) else "onnxruntime")
    except ParityError as error:
        raise ParityError(error.problem, hint="no bundle was written") from error
    bundle.verify_file.unlink(missing_ok=True)
    return sealed


def runs_here(target: Target) -> bool:
    """Say whether this machine has the runtime of a target."""
    module = _HOST_RUNTIMES.get(target.runtime)
    return module is not None and importlib.util.find_spec(module) is not None


def _preferred(manifest: dict[str, Any], target: Target, *, besides: str | None = None) -> str:
    """Return the first precision of the target that may be a default: INT8 only with a passing decision."""
    for precision in (*target.precisions, "fp32"):
        about = manifest["precisions"].get(precision)
        if about and precision != besides and (about["decision"] is None or about["decision"]["kept"]):
            return precision
    raise AssertionError("a bundle always holds fp32")


def _speed(bundle: Bundle, *, against: str) -> dict[str, Any]:
    verb = ["bench", str(bundle.path), "--precision", against, "--precision", "int8", "--no-power"]
    record = run_here([*verb, "--duration-s", str(SPEED_S), "--threads", "1"], threads=1, report=None)
    ratio = record["ratios"][0]
    return {
        "against": against,
        "ratio": ratio["p50_ratio"],
        "ci95": ratio["ci95"],
        "device": record["device"]["name"],
        "runtime": record["runtime"],
        "threads": record["threads"],
    }


def _seal(bundle: Bundle, manifest: dict[str, Any]) -> dict[str, Any]:
    """Hash every file of the bundle and write the manifest."""
    files = sorted(
        path
        for path in bundle.path.iterdir()
        if path.is_file() and path not in (bundle.record_file, bundle.verify_file)
    )
    manifest["files"] = {path.name: sha256_of_file(path) for path in files}
    manifest["size_bytes"] = {path.name: path.stat().st_size for path in files}
    return write_sealed(bundle.record_file, manifest)


def _versions(target: Target) -> dict[str, str]:
    packages = ["torch", "onnx", "onnxruntime", *{"openvino": ["openvino"]}.get(target.runtime, [])]
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    return {**versions, "python": platform.python_version()}
