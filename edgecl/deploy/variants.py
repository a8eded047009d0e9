"""The net in each precision, each form made from the one above it and held to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgecl.config.target import PRECISIONS, Precision, Target, Tolerance
from edgecl.deploy.accuracy import Evaluator, session_of
from edgecl.deploy.fp16 import half
from edgecl.deploy.int8 import evaluate_trained, make_int8
from edgecl.deploy.onnx import onnx_from_net
from edgecl.deploy.parity import (
    LAYER_IMAGES,
    breaches,
    check_parity,
    first_outside,
    hold,
    onnx_layers,
    torch_layers,
)
from edgecl.nets.fake_quant import without_fake_quant

Array = NDArray[numpy.float32]

PARITY_IMAGES = 64
# The first of them, by which a bundle is verified on a device.
REFERENCE_IMAGES = 16


@dataclass
class Form:
    """The net in one precision, on its way into a bundle.

    Attributes:
        model: as ONNX.
        form: what the manifest calls it, such as 'int8-trt'.
        parity: its check of the parity report.
        about: more for the manifest.
        accuracy: on the evaluator's images, or None without an evaluator.
        decision: of INT8.
    """

    model: onnx.ModelProto
    form: str
    parity: dict[str, Any]
    about: dict[str, Any]
    accuracy: dict[str, Any] | None = None
    decision: dict[str, Any] | None = None


def float_net(net: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Return a model's net without the fake quantization it may have been trained with."""
    return without_fake_quant(net) if record.get("quantization") else net


def torch_outputs(net: nn.Module, images: Tensor) -> Array:
    """Return the (N, F) outputs of a net in evaluation mode."""
    with torch.no_grad():
        outputs: Array = torch.cat([net(part) for part in images.split(16)]).numpy()
    return outputs


def make_variants(
    net: nn.Module,
    record: dict[str, Any],
    images: Tensor,
    labels: Tensor | None,
    *,
    target: Target,
    preprocessing: dict[str, Any],
    evaluator: Evaluator | None,
    say: Callable[[str], None],
) -> tuple[dict[Precision, Form], list[dict[str, Any]]]:
    """Make the net in fp32 and in every precision of the target.

    Args:
        net: in evaluation mode; fake quantization it was trained with becomes its INT8 form.
        record: of the model.
        images: (N, 3, H, W) real images after preprocessing, in a random order.
        labels: (N,) of the net's classes, or None.
        target: decides the forms.
        preprocessing: written into the graphs.
        evaluator: the images on which accuracy is counted, or None.
        say: told how far it is.

    Returns:
        the forms, and the checks of the parity report.

    Raises:
        ParityError: fp32 or fp16 outside its tolerance. INT8 outside it is left to the decision.
    """
    say("fp32: exporting")
    metadata = {**preprocessing, "classes": record["classes"], "arch": record["arch"]}
    shape = (3, images.shape[2], images.shape[3])
    plain = float_net(net, record)
    features = record["classes"] is None
    tolerances = {name: target.tolerance_of(name, features=features) for name in PRECISIONS}
    fp32 = onnx_from_net(plain, graph=target.graph, shape=shape, metadata=metadata)
    seen, few = images[:PARITY_IMAGES], images[:LAYER_IMAGES]
    in_torch = torch_layers(plain, few)
    names = list(in_torch)
    fp32_layers = onnx_layers(fp32, few.numpy(), names=names)
    fp32_outputs = _run_all(fp32, "fp32", seen, target)
    step = check_parity("carved torch net", "ONNX fp32", fp32_outputs, torch_outputs(plain, seen))
    step["first_diverging_layer"] = first_outside(fp32_layers, in_torch, tolerances["fp32"])
    hold(step, tolerances["fp32"])
    forms: dict[Precision, Form] = {"fp32": Form(fp32, "fp32", step, {})}
    steps = [step]
    if "fp16" in target.precisions:
        say("fp16: converting")
        model, about = half(fp32, images=seen.numpy())
        forms["fp16"] = Form(model, "fp16", {}, about)
    if "int8" in target.precisions:
        if record.get("quantization") and target.graph.int8 != "int8-cpu":
            say("INT8: exporting the scales it was trained with")
            model = onnx_from_net(net, graph=target.graph, shape=shape, metadata=metadata)
            steps.append(
                check_parity(
                    "torch net with fake quantization",
                    "ONNX int8-trt",
                    _run_all(model, "int8-trt", seen, target),
                    torch_outputs(net, seen),
                )
            )
            if target.graph.int8 == "int8-trt-fp16":
                model, _ = half(model, images=seen.numpy())
            decision = evaluate_trained(
                model, fp32, target=target, evaluator=evaluator, features=features, say=say
            )
        else:
            model, decision = _quantize(
                fp32, images, labels, target=target, evaluator=evaluator, features=features, say=say
            )
        decision["trained_for_int8"] = bool(record.get("quantization"))
        forms["int8"] = Form(model, target.graph.int8, {}, {}, decision=decision)
    smaller: tuple[Precision, ...] = ("fp16", "int8")
    for precision in smaller:
        if precision not in forms:
            continue
        form, tolerance = forms[precision], tolerances[precision]
        outputs = _run_all(form.model, form.form, seen, target)
        step = check_parity("ONNX fp32", f"ONNX {precision}", outputs, fp32_outputs)
        layers = onnx_layers(form.model, few.numpy(), names=names)
        step["first_diverging_layer"] = first_outside(layers, fp32_layers, tolerance)
        form.parity = step
        steps.append(step)
        if precision != "int8":
            hold(step, tolerance)
        elif form.decision is not None and (
            problems := _int8_breaches(step, outputs, fp32_outputs, tolerance)
        ):
            # A net that does not survive INT8 is no wrong graph: the decision says so, and the file stays here.
            form.decision.update(kept=False, outside_tolerance=problems)
    if evaluator is not None:
        say("judging every precision")
        reference = evaluator.outputs(session_of(fp32, runtime=target.runtime))
        for form in forms.values():
            run = session_of(form.model, runtime=target.runtime, form=form.form)
            form.accuracy = evaluator.accuracy(evaluator.outputs(run), reference)
    return forms, steps


def _int8_breaches(step: dict[str, Any], outputs: Array, expected: Array, tolerance: Tolerance) -> list[str]:
    """Say in which ways INT8 leaves its tolerance, on all images or on those that a device will be held to."""
    reference = check_parity(
        step["from"], step["to"], outputs[:REFERENCE_IMAGES], expected[:REFERENCE_IMAGES]
    )
    return breaches(step, tolerance) or breaches(reference, tolerance)


def _run_all(model: onnx.ModelProto, form: str, images: Tensor, target: Target) -> Array:
    run = session_of(model, runtime=target.runtime, form=form)
    return numpy.concatenate([run(part.numpy()) for part in images.split(16)])


def _quantize(
    fp32: onnx.ModelProto,
    images: Tensor,
    labels: Tensor | None,
    *,
    target: Target,
    evaluator: Evaluator | None,
    features: bool,
    say: Callable[[str], None],
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    settings = target.quantization
    count = min(settings.calibration_images, len(images) // 2)
    holdout = slice(count, count + settings.holdout_images)
    return make_int8(
        fp32,
        target=target,
        calibration=images[:count].numpy(),
        holdout=images[holdout].numpy(),
        holdout_labels=None if labels is None else labels[holdout],
        evaluator=evaluator,
        features=features,
        say=say,
    )
