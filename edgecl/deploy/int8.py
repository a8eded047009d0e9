"""A net in fp32 -> the same in INT8, calibrated on real images, its method chosen by accuracy; and the three forms of it.

`int8-trt` is what TensorRT takes: symmetric S8 Q/DQ pairs on the inputs of convolutions, on float32 weights, and on the
skip input of a residual sum, whose other side is fused into the convolution that makes it. `int8-trt-fp16` is the same
with fp16 scales and the rest in fp16, for strongly typed networks, which would run the rest in fp32 otherwise.
`int8-cpu` is what ONNX Runtime fuses: asymmetric U8 activations, S8 weights, int32 biases, and Q/DQ behind every
operator that has an integer kernel. Its weights leave room for the 16-bit sums of processors without VNNI, so that
all processors compute the same. The first two exclude the last: TensorRT refuses U8 and int32, and ONNX Runtime
fuses nothing in a graph without quantized outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecl.config.target import Int8Form, Target
from edgecl.deploy.accuracy import Evaluator, cosines
from edgecl.deploy.calibrate import calibrate
from edgecl.deploy.decision import Quantize, Say, search_int8, unevaluated
from edgecl.deploy.fp16 import half
from edgecl.deploy.graph import opset_of, portable
from edgecl.deploy.graph_index import first_block, quantizable
from edgecl.deploy.qdq import CpuWriter, Ranges, TensorrtWriter
from edgecl.deploy.session import Run, session_of
from edgecl.storage.records import Decision, Json

Array = NDArray[numpy.float32]

# On which what overflows fp16 is looked for, each time a graph is quantized.
FP16_IMAGES = 16
# Half of them to search on, half to report on; with fewer, a point of accuracy is less than one image.
LEAST_EVALUATED = 200


def make_int8(
    fp32: onnx.ModelProto,
    *,
    target: Target,
    calibration: Array,
    holdout: Array,
    holdout_labels: Tensor | None,
    evaluator: Evaluator | None,
    features: bool,
    say: Say,
) -> tuple[onnx.ModelProto, Decision]:
    """Quantize a net after training, by the best of the target's methods, and find what must stay in higher precision.

    Args:
        fp32: the portable net.
        target: the form, the methods and the budget.
        calibration: (N, 3, H, W) real images after preprocessing, whose activations set the ranges.
        holdout: (M, 3, H, W) others, on which the methods are compared.
        holdout_labels: (M,) of a classifier, or None: then the methods are compared by cosine similarity.
        evaluator: the images of the decision, or None where nothing can be evaluated.
        features: the net has no classifier.
        say: told how far it is.
    """
    settings, form = target.quantization, target.graph.int8
    say(f"INT8: calibrating on {len(calibration)} images")
    ranges = calibrate(fp32, calibration, settings.methods)
    few = calibration[:FP16_IMAGES]
    run_fp32 = session_of(fp32, runtime=target.runtime)
    expected = _outputs(run_fp32, holdout)
    compared: dict[str, dict[str, float]] = {}
    for method in settings.methods:
        model = quantize(fp32, form=form, ranges=ranges[method], images=few)
        found = _outputs(session_of(model, runtime=target.runtime, form=form), holdout)
        compared[method] = {"mean_cosine": float(cosines(found, expected).mean())}
        if holdout_labels is not None:
            compared[method]["top1"] = 100 * float((found.argmax(1) == holdout_labels).double().mean())
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
    }

    def keep(kept: Collection[str]) -> onnx.ModelProto:
        return quantize(fp32, form=form, ranges=ranges[method], keep=kept, images=few)

    return _decide(
        keep,
        quantizable(fp32, form),
        chosen=chosen,
        fp32=run_fp32,
        target=target,
        evaluator=evaluator,
        features=features,
        say=say,
    )


def _decide(
    quantize: Quantize,
    candidates: Sequence[str],
    *,
    chosen: Json,
    fp32: Run,
    target: Target,
    evaluator: Evaluator | None,
    features: bool,
    say: Say,
) -> tuple[onnx.ModelProto, Decision]:
    """Search the nodes to keep where there are images for it, and return the net and the decision with what was chosen."""
    obstacle = obstacle_to_evaluation(evaluator, features=features)
    if evaluator is None or obstacle:
        return quantize(()), unevaluated(obstacle or "").model_copy(update=chosen)
    model, decision = search_int8(
        quantize,
        candidates,
        evaluator=evaluator,
        fp32=fp32,
        open_run=lambda found: session_of(found, runtime=target.runtime, form=target.graph.int8),
        settings=target.quantization,
        features=features,
        say=say,
    )
    return model, decision.model_copy(update=chosen)


def obstacle_to_evaluation(evaluator: Evaluator | None, *, features: bool) -> str | None:
    """Return why no decision can be had from an evaluator, or None."""
    if evaluator is None:
        return "no images to evaluate on"
    if evaluator.metric == "mean_cosine" and not features:
        return "no images labelled with the net's classes; name some with --eval URI"
    if len(evaluator) < LEAST_EVALUATED:
        return f"{len(evaluator)} images are too few for a decision, {LEAST_EVALUATED} are needed; name more with --eval URI"
    return None


def evaluate_trained(
    model: onnx.ModelProto,
    fp32: onnx.ModelProto,
    *,
    target: Target,
    evaluator: Evaluator | None,
    features: bool,
    say: Say,
) -> Decision:
    """Return the decision of a net whose scales were trained: there is nothing to choose and nothing to search."""
    return _decide(
        lambda kept: model,
        [],
        chosen={"form": target.graph.int8, "method": "trained", "trained_for_int8": True},
        fp32=session_of(fp32, runtime=target.runtime),
        target=target,
        evaluator=evaluator,
        features=features,
        say=say,
    )[1]


def _outputs(run: Run, images: Array) -> Tensor:
    size = 32
    return torch.from_numpy(
        numpy.concatenate([run(images[start : start + size]) for start in range(0, len(images), size)])
    )


def quantize(
    model: onnx.ModelProto,
    *,
    form: Int8Form,
    ranges: Ranges,
    keep: Collection[str] = (),
    images: Array | None = None,
) -> onnx.ModelProto:
    """Quantize a portable float32 graph.

    Args:
        model: from `edgecl.deploy.graph.portable`; left as it is.
        form: which runtime it is for.
        ranges: tensor -> (least, largest), as `calibrate` measures them on this very graph.
        keep: names of nodes to keep in higher precision, beyond those of `baseline_keep`, which always are.
        images: (N, 3, H, W) after preprocessing; "int8-trt-fp16" needs them, to find what overflows fp16.

    Returns:
        a model that onnx's full check passes, with float32 input and output, and the same bytes each time.
    """
    chosen = set(quantizable(model, form)) - set(keep)
    if form == "int8-cpu":
        # Only HardSigmoid is known below.
        plain = portable(model, opset=opset_of(model), hard_swish="hard_sigmoid")
        kept = {*keep, *first_block(model)}
        quantized = CpuWriter(plain, ranges, chosen=chosen, keep=kept).write()
    else:
        if form == "int8-trt-fp16":
            assert images is not None
            model = half(model, images=images)[0]
        quantized = TensorrtWriter(model, ranges, chosen=chosen, keep=set(keep)).write()
    onnx.checker.check_model(quantized, full_check=True)
    return quantized
