"""A net in fp32 -> the same in INT8: calibrated on real images, its method chosen by accuracy, judged on others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecl.config.target import Target
from edgecl.deploy.accuracy import Judge, Run, cosines, runner_of
from edgecl.deploy.calibrate import calibrate_all
from edgecl.deploy.decision import Say, search_int8, unjudged
from edgecl.deploy.graph_index import quantisable
from edgecl.deploy.quantize import quantise

Array = NDArray[numpy.float32]

# On which what overflows fp16 is looked for, each time a graph is quantised.
FP16_IMAGES = 16
# Half of them to search on, half to report on; with fewer, a point of accuracy is less than one image.
LEAST_JUDGED = 200


def make_int8(
    fp32: onnx.ModelProto,
    *,
    target: Target,
    calibration: Array,
    holdout: Array,
    holdout_labels: Tensor | None,
    judge: Judge | None,
    features: bool,
    say: Say,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Quantise a net after training and find what must stay in higher precision.

    Args:
        fp32: the portable net.
        target: the form, the methods and the budget.
        calibration: (N, 3, H, W) real images after preprocessing, whose activations set the ranges.
        holdout: (M, 3, H, W) others, on which the methods are compared.
        holdout_labels: (M,) of a classifier, or None: then the methods are compared by cosine similarity.
        judge: the images of the verdict, or None where nothing can be judged.
        features: the net has no classifier.
        say: told how far it is.

    Returns:
        the net, and the verdict with the method that was chosen.

    Raises:
        DataError: activations that are not finite.
    """
    settings, form = target.quantization, target.graph.int8
    say(f"INT8: calibrating on {len(calibration)} images")
    ranges = calibrate_all(fp32, calibration, settings.methods)

    def open_run(model: onnx.ModelProto) -> Run:
        return runner_of(model, runtime=target.runtime, form=form)

    few = calibration[:FP16_IMAGES]
    run_fp32 = runner_of(fp32, runtime=target.runtime)
    expected = _outputs(run_fp32, holdout)
    compared: dict[str, dict[str, float]] = {}
    for method in settings.methods:
        model = quantise(fp32, form=form, ranges=ranges[method], images=few)
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
        return quantise(fp32, form=form, ranges=ranges[method], keep=kept, images=few)

    obstacle = obstacle_to_judging(judge, features=features)
    if judge is None or obstacle:
        return keep(()), {**unjudged(obstacle or ""), **chosen}
    model, verdict = search_int8(
        keep,
        quantisable(fp32, form),
        judge=judge,
        fp32=run_fp32,
        open_run=open_run,
        settings=settings,
        features=features,
        say=say,
    )
    return model, {**verdict, **chosen}


def obstacle_to_judging(judge: Judge | None, *, features: bool) -> str | None:
    """Say why no verdict can be had from a judge, or None."""
    if judge is None:
        return "no images to judge on"
    if judge.metric == "mean_cosine" and not features:
        return "no images labelled with the net's classes; name some with --eval URI"
    if len(judge) < LEAST_JUDGED:
        return f"{len(judge)} images are too few for a verdict, {LEAST_JUDGED} are needed; name more with --eval URI"
    return None


def judge_trained(
    model: onnx.ModelProto,
    fp32: onnx.ModelProto,
    *,
    target: Target,
    judge: Judge | None,
    features: bool,
    say: Say,
) -> dict[str, Any]:
    """Return the verdict of a net whose scales were trained: there is nothing to choose and nothing to search."""
    chosen = {"form": target.graph.int8, "method": "trained"}
    obstacle = obstacle_to_judging(judge, features=features)
    if judge is None or obstacle:
        return {**unjudged(obstacle or ""), **chosen}
    verdict = search_int8(
        lambda kept: model,
        [],
        judge=judge,
        fp32=runner_of(fp32, runtime=target.runtime),
        open_run=lambda found: runner_of(found, runtime=target.runtime, form=target.graph.int8),
        settings=target.quantization,
        features=features,
        say=say,
    )[1]
    return {**verdict, **chosen}


def _outputs(run: Run, images: Array) -> Tensor:
    size = 32
    return torch.from_numpy(
        numpy.concatenate([run(images[start : start + size]) for start in range(0, len(images), size)])
    )
