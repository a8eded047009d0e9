"""Which rows nothing beats: the Pareto front of accuracy and latency, for each way of timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecl.report.rows import ACCURACIES, Row, conditions_key, gain_of, is_rejected, is_timed


def pareto_front(points_: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (cost, gain) points no other beats by costing no more and gaining no less.

    Returns:
        Indices, cheapest first; of equal points all are on the front.
    """
    front = [
        index
        for index, (cost, gain) in enumerate(points_)
        if not any(
            other_cost <= cost and other_gain >= gain and (other_cost, other_gain) != (cost, gain)
            for other_cost, other_gain in points_
        )
    ]
    return sorted(front, key=lambda index: points_[index])


def trade_off(rows: list[Row]) -> dict[str, Any] | None:
    """Choose the accuracy to set against latency and mark the rows on each Pareto front.

    Rows compete only with rows timed on the same device in the same mode, at the same batch and thread count.
    A rejected precision is shown, but is on no front. Sets the rows' `on_pareto_front`.

    Returns:
        `accuracy` (a key of ACCURACIES), `label`, and `groups`: conditions, indices of rows, and those on the
        front. None when no row has both an accuracy and a latency.
    """
    timed = [index for index, row in enumerate(rows) if is_timed(row)]
    labels_per_class = {str(row["few_label"]["labels_per_class"]) for row in rows if row["few_label"]}
    counts = {
        key: (
            sum(1 for index in timed if gain_of(rows[index], key)),
            # Of two that equally many rows have, the one that was measured on the exported files.
            sum(1 for index in timed if gain_of(rows[index], key) not in (None, rows[index][key])),
        )
        for key in ACCURACIES
        # Accuracies at different label counts are not like for like.
        if key != "few_label" or len(labels_per_class) < 2
    }
    best = max(counts, key=lambda key: counts[key], default=None)
    if best is None or counts[best][0] == 0:
        return None
    label = ACCURACIES[best]
    if best == "few_label":
        label += f", {labels_per_class.pop()} labels per class"
    elif best == "finetuned" and counts[best][1]:
        label = "top-1"  # of files, with or without a fine-tuned net's own figure beside them
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in timed:
        row = rows[index]
        if gain_of(row, best):
            groups.setdefault(conditions_key(row), []).append(index)
    result = []
    for (device, power_mode, batch, threads, mode), members in groups.items():
        running = [index for index in members if not is_rejected(rows[index])]
        front = pareto_front([_point(rows[index], best) for index in running])
        for index in members:
            rows[index]["on_pareto_front"] = False
        for place in front:
            rows[running[place]]["on_pareto_front"] = True
        result.append(
            {
                "device": device,
                "power_mode": power_mode,
                "batch": batch,
                "threads": threads,
                "mode": mode,
                "rows": members,
                "front": [running[place] for place in front],
            }
        )
    return {"accuracy": best, "label": label, "groups": result}


def _point(row: Row, key: str) -> tuple[float, float]:
    gain = gain_of(row, key)
    assert gain is not None
    return row["latency_ms"]["p50"], gain["top1"]
