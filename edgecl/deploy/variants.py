"""The net in each precision, in four passes: make the variants, check each against its source, evaluate, and finish them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgecl.config.target import Precision, Target, Tolerance
from edgecl.data.loading import eval_image, normalize
from edgecl.data.source import ImageSource
from edgecl.deploy.accuracy import Evaluator, cosines
from edgecl.deploy.calibrate import calibrate
from edgecl.deploy.decision import Quantize, search_int8, unevaluated
from edgecl.deploy.ends import with_ends
from edgecl.deploy.fp16 import half
from edgecl.deploy.graph_index import quantizable
from edgecl.deploy.int8 import quantize
from edgecl.deploy.onnx import onnx_from_net
from edgecl.deploy.parity import (
    LAYER_IMAGES,
    Layers,
    breaches,
    check_parity,
    check_tolerance,
    first_outside,
    onnx_layers,
    torch_layers,
)
from edgecl.deploy.session import Run, session_of
from edgecl.nets.fake_quant import without_fake_quant
from edgecl.onboard.bundle import onnx_name
from edgecl.onboard.pictures import as_input, decode, fit
from edgecl.onboard.predict import softmax
from edgecl.storage.records import (
    Accuracy,
    Decision,
    InputForm,
    Json,
    ModelRecord,
    ParityCheck,
    Preprocessing,
)

Array = NDArray[Any]

PARITY_IMAGES = 64
# The first of them, by which a bundle is verified on a device.
REFERENCE_IMAGES = 16
# Whole files, photographs of several megabytes among them.
JPEG_FILES = 32
# On which what overflows fp16 is looked for, each time a graph is quantized.
FP16_IMAGES = 16
# Half of them to search on, half to report on; with fewer, a point of accuracy is less than one image.
LEAST_EVALUATED = 200


@dataclass(frozen=True)
class Source:
    """What the variants are made from.

    The net is in evaluation mode, with the fake quantization it may have been trained with; the (N, 3, H, W) uint8 pixels
    are of real images, resized and cropped, in a random order, the labels of the net's classes; the JPEGs are files.
    """

    net: nn.Module
    record: ModelRecord
    pixels: Tensor
    labels: Tensor | None
    jpegs: list[bytes]
    target: Target
    preprocessing: Preprocessing
    evaluator: Evaluator | None
    say: Callable[[str], None]

    @cached_property
    def images(self) -> Tensor:
        """The pixels normalized, as the net between the ends takes them."""
        return normalize(self.pixels, self.preprocessing.mean, self.preprocessing.std)

    @cached_property
    def plain(self) -> nn.Module:
        """The net without fake quantization."""
        return without_fake_quant(self.net) if self.record.quantization else self.net

    @property
    def features(self) -> bool:
        """Whether the net has no classifier."""
        return self.record.classes is None

    def tolerance(self, precision: Precision) -> Tolerance:
        """Return the tolerance of a precision."""
        return self.target.tolerance_of(precision, features=self.features)

    def graph_of(self, net: nn.Module) -> onnx.ModelProto:
        """Export the net, or the net without fake quantization."""
        about = {key: getattr(self.record, key) for key in ("classes", "label_sets", "arch")}
        metadata = {**self.preprocessing.to_json(), **about}
        shape = (3, self.images.shape[2], self.images.shape[3])
        return onnx_from_net(net, graph=self.target.graph, shape=shape, metadata=metadata)

    def outputs(self, model: onnx.ModelProto, form: str) -> Array:
        """Return the outputs of a variant for the images of the parity check."""
        run = session_of(model, runtime=self.target.runtime, form=form)
        return run_in_parts(run, self.images[:PARITY_IMAGES].numpy())


@dataclass
class Variant:
    """The net in one precision, on its way into a bundle.

    Its form is the manifest's name for it, such as 'int8-trt'; the checks of the parity report are those before its own, and
    its own. Only INT8 has a decision.
    """

    model: onnx.ModelProto
    form: str
    about: Json = field(default_factory=dict)
    earlier: list[ParityCheck] = field(default_factory=list)
    parity: ParityCheck | None = None
    accuracy: Accuracy | None = None
    decision: Decision | None = None


Variants = dict[Precision, Variant]


class Reference(NamedTuple):
    """Inputs as the nets of a bundle take them, and what torch makes of them."""

    inputs: Array
    outputs: Array


def run_in_parts(run: Run, inputs: Array, size: int = 16) -> Array:
    """Return the (N, F) outputs for any number of images."""
    return numpy.concatenate([run(inputs[start : start + size]) for start in range(0, len(inputs), size)])


def torch_outputs(net: nn.Module, images: Tensor) -> Array:
    """Return the (N, F) outputs of a net in evaluation mode."""
    with torch.no_grad():
        outputs: Array = torch.cat([net(part) for part in images.split(16)]).numpy()
    return outputs


def make_variants(source: Source) -> Variants:
    """Make the net in fp32 and in every precision of the target."""
    target, say = source.target, source.say
    say("fp32: exporting")
    fp32 = source.graph_of(source.plain)
    variants: Variants = {"fp32": Variant(fp32, "fp32")}
    if "fp16" in target.precisions:
        say("fp16: converting")
        model, about = half(fp32, images=source.images[:PARITY_IMAGES].numpy())
        variants["fp16"] = Variant(model, "fp16", about)
    if "int8" in target.precisions:
        trained = source.record.quantization is not None and target.graph.int8 != "int8-cpu"
        variants["int8"] = (_trained_int8 if trained else _calibrated_int8)(source, fp32)
    return variants


def _trained_int8(source: Source, fp32: onnx.ModelProto) -> Variant:
    """Export the scales that a net was trained with: there is nothing to choose and nothing to search."""
    source.say("INT8: exporting the scales it was trained with")
    form, images = source.target.graph.int8, source.images[:PARITY_IMAGES]
    exported = source.graph_of(source.net)
    trained = check_parity(
        "torch net with fake quantization",
        "ONNX int8-trt",
        source.outputs(exported, "int8-trt"),
        torch_outputs(source.net, images),
    )
    model = half(exported, images=images.numpy())[0] if form == "int8-trt-fp16" else exported
    chosen = {"form": form, "method": "trained", "trained_for_int8": True}
    run_fp32 = session_of(fp32, runtime=source.target.runtime)
    _, decision = _decide(source, lambda kept: model, [], fp32=run_fp32, chosen=chosen)
    return Variant(model, form, earlier=[trained], decision=decision)


def _calibrated_int8(source: Source, fp32: onnx.ModelProto) -> Variant:
    """Quantize a net by the best of the target's methods, and find what must stay in higher precision."""
    target, settings, form = source.target, source.target.quantization, source.target.graph.int8
    count = min(settings.calibration_images, len(source.images) // 2)
    others = slice(count, count + settings.holdout_images)
    calibration, holdout = source.images[:count].numpy(), source.images[others].numpy()
    labels = None if source.labels is None else source.labels[others]
    source.say(f"INT8: calibrating on {len(calibration)} images")
    ranges = calibrate(fp32, calibration, settings.methods)
    few = calibration[:FP16_IMAGES]
    run_fp32 = session_of(fp32, runtime=target.runtime)
    expected = _outputs(run_fp32, holdout)
    compared: dict[str, dict[str, float]] = {}
    for method in settings.methods:
        model = quantize(fp32, form=form, ranges=ranges[method], images=few)
        found = _outputs(session_of(model, runtime=target.runtime, form=form), holdout)
        compared[method] = {"mean_cosine": float(cosines(found, expected).mean())}
        if labels is not None:
            compared[method]["top1"] = 100 * float((found.argmax(1) == labels).double().mean())
    # The more telling number first; of equal methods the one named first in the target.
    method = max(
        settings.methods, key=lambda name: (compared[name].get("top1", 0.0), compared[name]["mean_cosine"])
    )
    chosen = {
        "form": form,
        "method": method,
        "methods": compared,
        "calibration_images": len(calibration),
        "holdout_images": len(holdout),
        "trained_for_int8": source.record.quantization is not None,
    }

    def keep(kept: Collection[str]) -> onnx.ModelProto:
        return quantize(fp32, form=form, ranges=ranges[method], keep=kept, images=few)

    candidates = quantizable(fp32, form)
    model, decision = _decide(source, keep, candidates, fp32=run_fp32, chosen=chosen)
    return Variant(model, form, decision=decision)


def _outputs(run: Run, images: Array) -> Tensor:
    return torch.from_numpy(run_in_parts(run, images, size=32))


def _decide(
    source: Source, quantize: Quantize, candidates: Sequence[str], *, fp32: Run, chosen: Json
) -> tuple[onnx.ModelProto, Decision]:
    """Search the nodes to keep where there are images for it, and return the net and the decision with what was chosen."""
    obstacle, target = _obstacle_to_evaluation(source), source.target
    if source.evaluator is None or obstacle:
        return quantize(()), unevaluated(obstacle or "").model_copy(update=chosen)
    model, decision = search_int8(
        quantize,
        candidates,
        evaluator=source.evaluator,
        fp32=fp32,
        open_run=lambda found: session_of(found, runtime=target.runtime, form=target.graph.int8),
        settings=target.quantization,
        features=source.features,
        say=source.say,
    )
    return model, decision.model_copy(update=chosen)


def _obstacle_to_evaluation(source: Source) -> str | None:
    """Return why no decision can be had, or None."""
    evaluator = source.evaluator
    if evaluator is None:
        return "no images to evaluate on"
    if evaluator.metric == "mean_cosine" and not source.features:
        return "no images labelled with the net's classes; name some with --eval URI"
    if len(evaluator) < LEAST_EVALUATED:
        return f"{len(evaluator)} images are too few for a decision, {LEAST_EVALUATED} are needed; name more with --eval URI"
    return None


def check_variants(variants: Variants, source: Source) -> list[ParityCheck]:
    """Compare fp32 with torch, and every other variant with fp32.

    Returns:
        the checks of the parity report.

    Raises:
        ParityError: fp32 or fp16 outside its tolerance. INT8 outside it is left to the decision.
    """
    fp32, few = variants["fp32"].model, source.images[:LAYER_IMAGES]
    in_torch = torch_layers(source.plain, few)
    layers = onnx_layers(fp32, few.numpy(), names=list(in_torch))
    outputs = source.outputs(fp32, "fp32")
    step = check_parity(
        "carved torch net", "ONNX fp32", outputs, torch_outputs(source.plain, source.images[:PARITY_IMAGES])
    )
    step.first_diverging_layer = first_outside(layers, in_torch, source.tolerance("fp32"))
    check_tolerance(step, source.tolerance("fp32"))
    variants["fp32"].parity = step
    steps = [step]
    for precision, variant in variants.items():
        steps += variant.earlier
        if precision != "fp32":
            steps.append(_check_variant(variant, precision, source, outputs, layers))
    return steps


def _check_variant(
    variant: Variant, precision: Precision, source: Source, fp32_outputs: Array, fp32_layers: Layers
) -> ParityCheck:
    tolerance, few = source.tolerance(precision), source.images[:LAYER_IMAGES].numpy()
    outputs = source.outputs(variant.model, variant.form)
    step = check_parity("ONNX fp32", f"ONNX {precision}", outputs, fp32_outputs)
    found = onnx_layers(variant.model, few, names=list(fp32_layers))
    step.first_diverging_layer = first_outside(found, fp32_layers, tolerance)
    variant.parity = step
    # On all images, and on those by which a device is verified.
    few_outputs = outputs[:REFERENCE_IMAGES], fp32_outputs[:REFERENCE_IMAGES]
    _settle(variant, tolerance, step, check_parity(step.source, step.variant, *few_outputs))
    return step


def _settle(variant: Variant, tolerance: Tolerance, *steps: ParityCheck) -> None:
    """Refuse checks outside the tolerance; of INT8 the decision takes them, and the file stays here.

    A net that does not survive INT8 is no wrong graph.
    """
    for step in steps:
        if variant.decision is None:
            check_tolerance(step, tolerance)
        elif problems := breaches(step, tolerance):
            variant.decision = variant.decision.model_copy(
                update={"kept": False, "outside_tolerance": problems}
            )
            return


def finish_variants(
    variants: Variants, source: Source, form: InputForm
) -> tuple[list[ParityCheck], Reference]:
    """Give every variant the input and output of the target, and take JPEG files through torch and through each.

    The files are decoded, resized and cropped for torch as all images of the host are, and for the variants as
    `edgecl.onboard.predict` does it on a device.

    Returns:
        the last checks of the parity report, and the images by which devices verify the bundle.

    Raises:
        ParityError: fp32 or fp16 gives another answer than torch within its tolerance. INT8 is left to the decision.
    """
    preprocessing, steps = source.preprocessing, []
    size = {"resize_size": preprocessing.resize_size, "image_size": preprocessing.image_size}
    files = ImageSource("", "", len(source.jpegs), None, str, reader=source.jpegs.__getitem__)
    pictures = torch.stack([eval_image(files.read(index), **size) for index in range(len(files))])
    expected = _torch_answers(source, normalize(pictures, preprocessing.mean, preprocessing.std))
    squares = numpy.stack([fit(decode(content).picture, **size) for content in source.jpegs])

    def as_inputs(squares: Array) -> Array:
        return as_input(squares, form.to_json(), preprocessing.to_json())

    reference = Reference(
        as_inputs(source.pixels[:REFERENCE_IMAGES].permute(0, 2, 3, 1).numpy()),
        _torch_answers(source, source.images[:REFERENCE_IMAGES]),
    )
    for precision, variant in variants.items():
        variant.model = with_ends(variant.model, graph=source.target.graph, preprocessing=preprocessing)
        run = session_of(variant.model, runtime=source.target.runtime, form=variant.form)
        file = onnx_name(precision)
        step = check_parity(
            "JPEG file through torch",
            f"JPEG file through {file}",
            run_in_parts(run, as_inputs(squares)),
            expected,
        )
        known = check_parity("torch", file, run_in_parts(run, reference.inputs), reference.outputs)
        _settle(variant, source.tolerance(precision), step, known)
        steps.append(step)
    return steps, reference


def _torch_answers(source: Source, images: Tensor) -> Array:
    """Return what a finished variant should give for preprocessed images: (N, F) features, logits or probabilities."""
    outputs = torch_outputs(source.plain, images)
    return softmax(outputs) if source.target.graph.softmax else outputs


def evaluate_variants(variants: Variants, source: Source) -> None:
    """Measure the accuracy of every variant, where there are images to evaluate on."""
    evaluator, runtime = source.evaluator, source.target.runtime
    if evaluator is None:
        return
    source.say("evaluating every precision")
    reference = evaluator.outputs(session_of(variants["fp32"].model, runtime=runtime))
    for variant in variants.values():
        run = session_of(variant.model, runtime=runtime, form=variant.form)
        variant.accuracy = evaluator.accuracy(evaluator.outputs(run), reference)
