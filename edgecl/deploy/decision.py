"""The INT8 decision: what INT8 costs in accuracy, which nodes must stay in higher precision, and whether it is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy
import onnx
from numpy.typing import NDArray

from edgecl.config.target import Quantization
from edgecl.deploy.accuracy import METRICS, Evaluator, Outputs, cosines
from edgecl.deploy.session import Run
from edgecl.errors import counted
from edgecl.storage.records import Attempt, Budget, Decision, Speed

Array = NDArray[numpy.float32]
Quantize = Callable[[Collection[str]], onnx.ModelProto]
Open = Callable[[onnx.ModelProto], Run]
Say = Callable[[str], None]

WAY_OUT = "`edgecl finetune --quantize int8` trains a classifier for INT8"
# How many images tell which nodes hurt.
SENSITIVITY_IMAGES = 32


@dataclass(frozen=True)
class Loss:
    """What a form of the net loses against fp32.

    The points of accuracy are positive where it is worse, None without labels; their interval is that of the paired
    differences per image, the cosine the mean similarity with the fp32 outputs.
    """

    points: float | None
    ci95: tuple[float, float] | None
    cosine: float

    def excess(self, settings: Quantization, *, features: bool) -> float:
        """Return by how much the budget is exceeded, 0 or less within it."""
        parts = [] if self.points is None else [self.points - settings.max_loss_points]
        if features:
            parts.append(100 * (settings.min_cosine - self.cosine))
        return max(parts)


def measure_loss(evaluator: Evaluator, outputs: Outputs, fp32: Outputs) -> Loss:
    """Compare a form with fp32 on the same images."""
    cosine = float(cosines(outputs.queries, fp32.queries).mean())
    if evaluator.metric == "mean_cosine":
        return Loss(None, None, cosine)
    lost = evaluator.scores(fp32, fp32) - evaluator.scores(outputs, fp32)
    points = float(lost.mean())
    half = 1.96 * float(lost.std()) / len(lost) ** 0.5
    return Loss(points, (points - half, points + half), cosine)


def search_int8(
    quantize: Quantize,
    candidates: Sequence[str],
    *,
    evaluator: Evaluator,
    fp32: Run,
    open_run: Open,
    settings: Quantization,
    features: bool,
    say: Say,
) -> tuple[onnx.ModelProto, Decision]:
    """Find the smallest set of nodes to keep in higher precision so that the loss stays within the budget.

    Nodes are ranked by how much the net's outputs change when each alone is quantized. The set is searched on
    one half of the evaluator's images, by bisection over the ranking; the loss that is reported and decides is
    that on the other half.

    Args:
        quantize: the nodes to keep -> the net in INT8.
        candidates: nodes that can be quantized.
        features: the net has no classifier, so that its outputs themselves matter.
    """
    search, report = evaluator.halves()
    fp32_search, fp32_report = search.outputs(fp32), report.outputs(fp32)
    tried: list[Attempt] = []

    def attempt(kept: Sequence[str]) -> tuple[onnx.ModelProto, float]:
        model = quantize(kept)
        loss = measure_loss(search, search.outputs(open_run(model)), fp32_search)
        tried.append(Attempt(kept_nodes=len(kept), loss_points=loss.points, mean_cosine=loss.cosine))
        return model, loss.excess(settings, features=features)

    say("INT8: choosing the nodes to keep")
    model, excess = attempt(())
    kept: list[str] = []
    if excess > 0 and candidates:
        ranking = _rank(quantize, candidates, evaluator=evaluator, fp32=fp32, open_run=open_run, say=say)
        most = int(len(candidates) * settings.max_kept_fraction)
        say(f"INT8: {excess:.2f} over the budget; looking for nodes to keep in higher precision")
        low, high = 0, most  # the net fails with `low` nodes kept and passes with `high`
        found, excess = attempt(ranking[:most]) if most else (model, excess)
        if excess <= 0:
            model, kept = found, ranking[:most]
            while high - low > 1:
                middle = (low + high) // 2
                found, excess = attempt(ranking[:middle])
                if excess <= 0:
                    model, kept, high = found, ranking[:middle], middle
                else:
                    low = middle
    loss = measure_loss(report, report.outputs(open_run(model)), fp32_report)
    return model, Decision(
        kept=loss.excess(settings, features=features) <= 0,
        kept_nodes=kept,
        candidates=len(candidates),
        metric=evaluator.metric,
        loss_points=loss.points,
        loss_ci95=None if loss.ci95 is None else list(loss.ci95),
        mean_cosine=loss.cosine,
        budget=Budget(
            max_loss_points=settings.max_loss_points, min_cosine=settings.min_cosine if features else None
        ),
        images=len(report),
        searched_on=len(search),
        tried=tried,
        data=evaluator.data,
    )


def _rank(
    quantize: Quantize,
    candidates: Sequence[str],
    *,
    evaluator: Evaluator,
    fp32: Run,
    open_run: Open,
    say: Say,
) -> list[str]:
    """Order nodes by the error of the net's outputs when each alone is quantized, the worst first."""
    few = evaluator.first(SENSITIVITY_IMAGES)
    expected = few.queries(fp32).double()
    errors: dict[str, float] = {}
    for place, name in enumerate(candidates):
        if place % 10 == 0:
            say(f"INT8: node {place + 1} of {len(candidates)}")
        others = [other for other in candidates if other != name]
        found = few.queries(open_run(quantize(others))).double()
        errors[name] = float((found - expected).square().mean())
    return sorted(candidates, key=lambda name: -errors[name])


def conclude(decision: Decision, *, speed: Speed | None, higher: str) -> Decision:
    """Decide whether INT8 is kept, in words and numbers.

    The speed is against another precision on this machine, None where it cannot be measured here; kept nodes are in the
    precision `higher`.
    """
    budget = decision.budget
    cost = decision.words if budget is None else _cost(decision, budget)
    way_out = "it was trained for INT8 already" if decision.trained_for_int8 else WAY_OUT
    if decision.outside_tolerance:
        too_far = "; ".join(decision.outside_tolerance)
        words = f"rejected because its outputs are too far from fp32's: {too_far}; {cost}; {way_out}"
        return decision.model_copy(update={"kept": False, "speed": speed, "words": words})
    if budget is None:  # of `unevaluated`
        return decision.model_copy(update={"speed": speed})
    pace = "speed not measured here"
    if speed is not None:
        pace = f"{100 * (speed.ratio - 1):+.0f} % speed against {speed.against}"
        pace += f" with {counted(speed.threads, 'thread')}" if speed.threads else ""
    slower = speed is not None and speed.ratio <= 1.0
    kept = bool(decision.kept) and not slower
    nodes = len(decision.kept_nodes)
    if kept:
        how = f"kept with {nodes} of {decision.candidates} nodes in {higher}" if nodes else "kept"
        words = f"{how}: {cost}, for {pace}"
    elif decision.kept:
        words = f"rejected because it is slower: {pace}; {cost}"
    else:
        words = f"rejected because it costs too much: {cost}, for {pace}; {way_out}"
    return decision.model_copy(update={"kept": kept, "speed": speed, "words": words})


def _cost(decision: Decision, budget: Budget) -> str:
    parts = []
    if decision.loss_points is not None and decision.loss_ci95 is not None:
        points, (low, high) = round(decision.loss_points, 2), decision.loss_ci95
        what = f"{abs(points):.2f} points of {METRICS[decision.metric]}"
        parts.append(
            f"{what} gained [{0 - high:.2f}, {0 - low:.2f}], a loss of {budget.max_loss_points:g} allowed"
            if points < 0
            else f"{what} lost [{low:.2f}, {high:.2f}], {budget.max_loss_points:g} allowed"
        )
        if low <= budget.max_loss_points < high:
            parts[-1] += " (more images would tell better)"
    if budget.min_cosine is not None:
        parts.append(
            f"cosine similarity with fp32 {decision.mean_cosine:.4f}, at least {budget.min_cosine:g}"
        )
    return ", ".join(parts) + f" (on {decision.images:,} images)"


def unevaluated(reason: str) -> Decision:
    """Return the decision of an INT8 net that nothing was measured on: it is never a default."""
    return Decision(kept=False, words=f"not evaluated: {reason}")
