"""A net in fp32 -> the same in INT8: calibrated on real images, its method chosen by accuracy, evaluated on others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecl.config.target import Target
from edgecl.deploy.accuracy import Evaluator, cosines
from edgecl.deploy.calibrate import calibrate_all
from edgecl.deploy.decision import Say, search_int8, unevaluated
from edgecl.deploy.graph_index import quantizable
from edgecl.deploy.quantize import quantize
from edgecl.deploy.session import Run, session_of

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
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Quantize a net after training and find what must stay in higher precision.

    Args:
        fp32: the portable net.
        target: the form, the methods and the budget.
        calibration: (N, 3, H, W) real images after preprocessing, whose activations set the ranges.
        holdout: (M, 3, H, W) others, on which the methods are compared.
        holdout_labels: (M,) of a classifier, or None: then the methods are compared by cosine similarity.
        evaluator: the images of the decision, or None where nothing can be evaluated.
        features: the net has no classifier.
        say: told how far it is.

    Returns:
        the net, and the decision with the method that was chosen.

    Raises:
        DataError: activations that are not finite.
    """
    settings, form = target.quantization, target.graph.int8
    say(f"INT8: calibrating on {len(calibration)} images")
    ranges = calibrate_all(fp32, calibration, settings.methods)

    def open_run(model: onnx.ModelProto) -> Run:
        return session_of(model, runtime=target.runtime, form=form)

    few = calibration[:FP16_IMAGES]
    run_fp32 = session_of(fp32, runtime=target.runtime)
    expected = _outputs(run_fp32, holdout)
    compared: dict[str, dict[str, float]] = {}
    for method in settings.methods:
        model = quantize(fp32, form=form, ranges=ranges[method], images=few)
        found = _outputs(open_run(model), holdout)
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

    obstacle = obstacle_to_judging(evaluator, features=features)
    if evaluator is None or obstacle:
        return keep(()), {**unevaluated(obstacle or ""), **chosen}
    model, decision = search_int8(
        keep,
        quantizable(fp32, form),
        evaluator=evaluator,
        fp32=run_fp32,
        open_run=open_run,
        settings=settings,
        features=features,
        say=say,
    )
    return model, {**decision, **chosen}


def obstacle_to_judging(evaluator: Evaluator | None, *, features: bool) -> str | None:
    """Say why no decision can be had from an evaluator, or None."""
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
) -> dict[str, Any]:
    """Return the decision of a net whose scales were trained: there is nothing to choose and nothing to search."""
    chosen = {"form": target.graph.int8, "method": "trained"}
    obstacle = obstacle_to_judging(evaluator, features=features)
    if evaluator is None or obstacle:
        return {**unevaluated(obstacle or ""), **chosen}
    decision = search_int8(
        lambda kept: model,
        [],
        evaluator=evaluator,
        fp32=session_of(fp32, runtime=target.runtime),
        open_run=lambda found: session_of(found, runtime=target.runtime, form=target.graph.int8),
        settings=target.quantization,
        features=features,
        say=say,
    )[1]
    return {**decision, **chosen}


def _outputs(run: Run, images: Array) -> Tensor:
    size = 32
    return torch.from_numpy(
        numpy.concatenate([run(images[start : start + size]) for start in range(0, len(images), size)])
    )
