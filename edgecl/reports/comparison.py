"""A pipeline's comparison: what its arms reach, and whether their differences are resolved."""

from __future__ import annotations

from typing import Any

from edgecl.errors import printable
from edgecl.reports.collect import Collection, Source
from edgecl.reports.notation import finite, interval_from
from edgecl.reports.precisions import text
from edgecl.reports.rows import few_label_of


def comparison_of(source: Source, collection: Collection) -> dict[str, Any]:
    """Return a pipeline's comparison with everything the page shows of it, in plain numbers."""
    record = source.record
    arms: list[dict[str, Any]] = []
    draws: dict[str, list[float]] = {}
    for arm in record.get("rows") or []:
        few = few_label_of(arm)
        arms.append(
            {
                "name": printable(arm.get("name")),
                "few_label": few,
                "knn_top1": finite(arm.get("knn_top1")),
                "linear_top1": finite(arm.get("linear_top1")),
            }
        )
        if few:
            draws[printable(arm.get("name"))] = few["draws"]
    differences = []
    for difference in record.get("differences") or []:
        a, b = printable(difference.get("a")), printable(difference.get("b"))
        mean, interval = finite(difference.get("mean")), interval_from(difference.get("ci95"))
        if mean is None:
            continue
        clear = interval is not None and (interval[0] > 0 or interval[1] < 0)
        paired = len(draws.get(a, [])) == len(draws.get(b, []))
        differences.append(
            {
                "a": a,
                "b": b,
                "mean": mean,
                "ci95": interval,
                # Never resolved on the record's word alone when its interval says otherwise.
                "resolved": clear and difference.get("resolved") is not False,
                "draws": [x - y for x, y in zip(draws.get(a, []), draws.get(b, []), strict=True)]
                if paired
                else [],
            }
        )
    inside = [
        model for model in collection.of("model") if source.path.resolve() in model.path.resolve().parents
    ]
    return {
        "name": source.name,
        "labels_per_class": record.get("labels_per_class"),
        "draws": record.get("draws"),
        "n_test": record.get("n_test"),
        "test": text(record.get("test")),
        "chance": _chance(inside),
        "arms": arms,
        "differences": differences,
    }


def _chance(models: list[Source]) -> float | None:
    counts = set()
    for model in models:
        classes = model.beside.get("probe.json", {}).get("classes")
        count = len(classes) if isinstance(classes, list) else classes
        if isinstance(count, int) and not isinstance(count, bool) and count > 1:
            counts.add(count)
    return 100.0 / counts.pop() if len(counts) == 1 else None
