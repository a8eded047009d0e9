"""A model directory -> a bundle: the net in each precision, every variant proven before any of it is written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from edgecl.config.target import GraphInput, Target, read_target, target_name
from edgecl.data.loading import split_holdout
from edgecl.data.randomness import permutation
from edgecl.data.sources import has_test_split, open_source
from edgecl.deploy import extras
from edgecl.deploy.accuracy import HOLDOUT, Evaluator, open_evaluator, read_images, read_jpegs
from edgecl.deploy.decision import conclude
from edgecl.deploy.device import verify
from edgecl.deploy.graph import opset_of
from edgecl.deploy.handover import write_handover
from edgecl.deploy.onboard_zip import write_onboard
from edgecl.deploy.onnx import INPUT, OUTPUT
from edgecl.deploy.parity import slim_view_check
from edgecl.deploy.process import run_here
from edgecl.deploy.readme import bundle_readme
from edgecl.deploy.variants import (
    JPEG_FILES,
    PARITY_IMAGES,
    REFERENCE_IMAGES,
    Source,
    Variants,
    check_variants,
    evaluate_variants,
    finish_variants,
    make_variants,
)
from edgecl.errors import DataError, ParityError, TargetError
from edgecl.nets.model_dir import load_model
from edgecl.onboard.bundle import onnx_name, sha256_of_file
from edgecl.onboard.runtimes import RUNTIMES
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.outputs import new_directory, refuse_existing, refuse_own_input
from edgecl.storage.record_files import read_record, write_record
from edgecl.storage.records import (
    BenchRecord,
    BundlePrecision,
    EvaluationRecord,
    ExportedNet,
    InputForm,
    LeftOut,
    Manifest,
    ModelRecord,
    OutputForm,
    ParityCheck,
    Preprocessing,
    Speed,
    Tolerance,
)
from edgecl.storage.writing import write_bytes

LEAST_CALIBRATION_IMAGES = 64
SPEED_S = 2.0


def export(
    model: Path,
    *,
    target: str,
    out: Path,
    precisions: Sequence[str] | None = None,
    calibration: str | None = None,
    eval_uri: str | None = None,
    run: Path | None = None,
    input: GraphInput | None = None,  # noqa: A002 - as on the command line
    softmax: bool = False,
    force: bool = False,
    download: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Export a model directory for a target and prove that every variant computes what torch computes.

    `edgecl.export` tells arguments, result and errors.
    """
    asked = {**({"input": input} if input else {}), **({"softmax": True} if softmax else {})}
    chosen = read_target(target, precisions=precisions, graph=asked)
    refuse_own_input(out, model)
    refuse_existing(out, force=force, kind=Bundle.KIND)
    net, record = load_model(model)
    if chosen.graph.softmax and (record.classes is None or record.label_sets):
        what = "gives features" if record.classes is None else "names several classes for a picture"
        raise TargetError(
            f"softmax needs a classifier of one class for each picture, and this net {what}",
            where={"model": model},
            hint="leave softmax out, also of [graph] in the target",
        )
    uri = calibration or record.data
    if uri is None:
        raise DataError(
            "this model does not say which images it was made from",
            where={"model": model},
            hint="name real images for the comparison with --calibration URI",
        )
    source = _gather(net, record, chosen, model=model, uri=uri, eval_uri=eval_uri, download=download, say=say)
    parity = [slim_view_check(net, record, run, source.images[:PARITY_IMAGES])] if run else []
    with new_directory(out, kind=Bundle.KIND, force=force) as aside:
        bundle = Bundle(aside)
        variants = make_variants(source)
        parity += check_variants(variants, source)
        evaluate_variants(variants, source)
        form = _input_form(source)
        last, reference = finish_variants(variants, source, form)
        parity += last
        numpy.savez(bundle.reference_file, inputs=reference.inputs, outputs=reference.outputs)
        manifest = _manifest(
            source,
            parity,
            form,
            target=target_name(target),
            model=ModelDir(model),
            outputs=reference.outputs.shape[1],
            uri=uri,
        )
        _write_variants(bundle, manifest, variants, source)
        return _finish(bundle, manifest, target=chosen, say=say)


def _gather(
    net: torch.nn.Module,
    record: ModelRecord,
    target: Target,
    *,
    model: Path,
    uri: str,
    eval_uri: str | None,
    download: bool,
    say: Callable[[str], None],
) -> Source:
    """Read the images to compare, to calibrate and to evaluate on."""
    preprocessing = _preprocessing(record.preprocessing, target.graph.image_size)
    tested_on = _tested_on(ModelDir(model))
    # Images named to evaluate on leave all of the others to calibrate on.
    images, labels, jpegs = _read_images(
        uri, target, record, preprocessing, hold_out=not (eval_uri or tested_on), download=download
    )
    evaluator: Evaluator | None = None
    if len(target.precisions) > 1 or "int8" in target.precisions or eval_uri:
        evaluator = open_evaluator(
            record,
            uri=eval_uri or tested_on,
            fallback=record.data or uri,
            preprocessing=preprocessing,
            download=download,
        )
    return Source(net, record, images, labels, jpegs, target, preprocessing, evaluator, say)


def _tested_on(model: ModelDir) -> str | None:
    """Return the held-out images that fine-tuning was given, which the net has not seen."""
    if not model.evaluation_file.exists():
        return None
    return read_record(model.evaluation_file, EvaluationRecord).test_uri


def _preprocessing(own: Preprocessing, image_size: int | None) -> Preprocessing:
    """Return a net's preprocessing at the size the target asks for, the picture cut out in the same proportion."""
    if image_size is None:
        return own
    resize = max(image_size, round(own.resize_size * image_size / own.image_size))
    return own.model_copy(update={"image_size": image_size, "resize_size": resize})


def _read_images(
    uri: str,
    target: Target,
    record: ModelRecord,
    preprocessing: Preprocessing,
    *,
    hold_out: bool,
    download: bool,
) -> tuple[Tensor, Tensor | None, list[bytes]]:
    """Read real images to compare and to calibrate on, none of them from what is held out for the evaluator.

    Returns:
        (N, 3, H, W) uint8 of the net's size, in a random order, (N,) labels of the net's classes or None, and some of
        them as JPEG files.
    """
    settings = target.quantization
    wanted = PARITY_IMAGES
    if "int8" in target.precisions:
        wanted = max(wanted, settings.calibration_images + settings.holdout_images)
    source = open_source(uri, split="train", download=download)
    source_length = len(source)
    if hold_out and source.strata is not None and not has_test_split(uri):
        stay = split_holdout(source.strata, HOLDOUT, seed=0)[0]
        source = source.take(stay)
    images, labels = read_images(source, uri, preprocessing, limit=wanted)
    aside = " beside the fifth that is held out" if hold_out and len(source) < source_length else ""
    if len(images) < REFERENCE_IMAGES:
        raise DataError(
            f"a bundle needs {REFERENCE_IMAGES} real images, there are {len(images)}{aside}",
            where={"data": uri},
            hint="name more with --calibration URI; they need no labels",
        )
    if "int8" in target.precisions and len(images) < LEAST_CALIBRATION_IMAGES:
        raise DataError(
            f"INT8 needs at least {LEAST_CALIBRATION_IMAGES} images to calibrate on, "
            f"there are {len(images)}{aside}",
            where={"data": uri},
            hint="name more with --calibration URI, or leave INT8 out, e.g. --precision "
            + (",".join(name for name in target.precisions if name != "int8") or "fp32"),
        )
    order = torch.from_numpy(permutation(0, 0, len(images), stream="calibration"))
    fits = record.classes is not None and list(source.classes or ()) == record.classes
    one_each = labels is not None and labels.ndim == 1
    labels = labels[order] if labels is not None and one_each and fits else None
    return images[order], labels, read_jpegs(source, count=JPEG_FILES)


def _input_form(source: Source) -> InputForm:
    graph, side = source.target.graph, source.preprocessing.image_size
    raw, last = graph.input != "float32", graph.input == "uint8"
    return InputForm(
        name=INPUT,
        shape=[graph.batch, side, side, 3] if last else [graph.batch, 3, side, side],
        dtype="uint8" if raw else "float32",
        layout="nhwc" if last else "nchw",
        normalization="inside" if raw else "outside",
        dynamic_batch=graph.dynamic_batch,
        max_batch=graph.max_batch if graph.dynamic_batch else graph.batch,
    )


def _manifest(
    source: Source,
    parity: list[ParityCheck],
    form: InputForm,
    *,
    target: str,
    model: ModelDir,
    outputs: int,
    uri: str,
) -> Manifest:
    """Return the manifest as far as it is known before the files are written."""
    record, graph = source.record, source.target.graph
    net = record.model_dump(include=set(ExportedNet.model_fields) - {"model_sha256"})
    return Manifest(
        made_from=model.sha256,
        target_name=target,
        target=source.target.model_dump(mode="json"),
        runtime=source.target.runtime,
        precision="fp32",
        precisions={},
        input=form,
        output=OutputForm(name=OUTPUT, shape=[graph.batch, outputs], softmax=graph.softmax),
        net=ExportedNet(**net, model_sha256=model.sha256),
        preprocessing=source.preprocessing,
        classes=record.classes,
        parity=parity,
        images_from=uri,
        versions=_versions(source.target),
        files={},
    )


def _write_variants(bundle: Bundle, manifest: Manifest, variants: Variants, source: Source) -> None:
    """Write every variant into the bundle and describe it in the manifest, the preferred precision first."""
    target = source.target
    order = [*target.precisions, *(name for name in variants if name not in target.precisions)]
    for precision in order:
        variant = variants[precision]
        if variant.decision and variant.decision.outside_tolerance:
            manifest.left_out[precision] = LeftOut(decision=variant.decision, parity=variant.parity)
            continue
        file = bundle.path / onnx_name(precision)
        file.write_bytes(variant.model.SerializeToString())
        manifest.precisions[precision] = BundlePrecision(
            model=file.name,
            form=variant.form,
            opset=opset_of(variant.model),
            tolerance=Tolerance(**source.tolerance(precision).model_dump()),
            parity=variant.parity,
            accuracy=variant.accuracy,
            decision=variant.decision,
            **variant.about,
        )
        if target.runtime in extras.OF_PRECISION:
            source.say(f"{precision}: adding what {RUNTIMES[target.runtime].title} needs")
            extras.OF_PRECISION[target.runtime](file, precision, manifest, target)


def _finish(bundle: Bundle, manifest: Manifest, *, target: Target, say: Callable[[str], None]) -> Manifest:
    """Measure the speed of INT8 where this machine can, choose the default, and seal the bundle once it verifies."""
    write_onboard(bundle.onboard_file)
    int8 = manifest.precisions.get("int8")
    if int8 and int8.decision:
        speed = None
        if runs_here(target):
            say("INT8: measuring its speed")
            _seal(bundle, manifest)
            speed = _speed(bundle, against=_preferred(manifest, target, besides="int8"))
        higher = "fp32" if RUNTIMES[target.runtime].on_host else "fp16"
        int8.decision = conclude(int8.decision, speed=speed, higher=higher)
    for about in manifest.left_out.values():
        if about.decision:
            about.decision = conclude(about.decision, speed=None, higher="fp16")
    manifest.precision = _preferred(manifest, target)
    handover = write_handover(bundle, manifest)
    write_bytes(bundle.readme_file, bundle_readme(manifest, handover).encode())
    sealed = _seal(bundle, manifest)
    say("verifying the bundle")
    try:
        verify(bundle.path, runtime=None if runs_here(target) else "onnxruntime")
    except ParityError as error:
        raise ParityError(error.problem, hint="no bundle was written") from error
    bundle.verify_file.unlink(missing_ok=True)
    return sealed


def runs_here(target: Target) -> bool:
    """Return whether this machine has the runtime of a target."""
    runtime = RUNTIMES[target.runtime]
    return runtime.on_host and importlib.util.find_spec(runtime.module) is not None


def _preferred(manifest: Manifest, target: Target, *, besides: str | None = None) -> str:
    """Return the first precision of the target that may be a default: INT8 only with a passing decision."""
    for precision in (*target.precisions, "fp32"):
        about = manifest.precisions.get(precision)
        if about and precision != besides and (about.decision is None or about.decision.kept):
            return precision
    raise AssertionError("a bundle always holds fp32")


def _speed(bundle: Bundle, *, against: str) -> Speed:
    verb = ["bench", str(bundle.path), "--precision", against, "--precision", "int8", "--no-power"]
    found = run_here([*verb, "--duration-s", str(SPEED_S), "--threads", "1"], threads=1, report=None)
    record = BenchRecord.model_validate({"made_from": None, **found})
    return Speed(
        against=against,
        ratio=record.ratios[0].p50_ratio,
        ci95=record.ratios[0].ci95,
        device=record.device.name,
        runtime=record.runtime,
        threads=record.threads,
    )


def _seal(bundle: Bundle, manifest: Manifest) -> Manifest:
    """Hash every file of the bundle and write the manifest."""
    files = sorted(
        path
        for path in bundle.path.iterdir()
        if path.is_file() and path not in (bundle.record_file, bundle.verify_file)
    )
    manifest.files = {path.name: sha256_of_file(path) for path in files}
    manifest.size_bytes = {path.name: path.stat().st_size for path in files}
    return write_record(bundle.record_file, manifest)


def _versions(target: Target) -> dict[str, str]:
    runtime = RUNTIMES[target.runtime]
    packages = {"torch", "onnx", "onnxruntime", *([runtime.module] if runtime.on_host else [])}
    versions = {
        name: importlib.metadata.version(name) for name in sorted(packages) if importlib.util.find_spec(name)
    }
    return {**versions, "python": platform.python_version()}
