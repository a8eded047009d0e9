"""Which rows nothing beats: the Pareto front of accuracy and latency, for each way of timing, or of accuracy and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecl.reports.rows import (
    Row,
    comparable_accuracies,
    conditions_key,
    gain_of,
    is_rejected,
    is_timed,
)

# What a net costs wherever it runs, the closer to its latency first.
SIZES = {"macs": "MACs", "params": "parameters"}


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
        `cost` ("latency"), `accuracy` (a key of ACCURACIES), `label`, and `groups`: conditions, indices of rows, and
        those on the front. None when no row has both an accuracy and a latency.
    """
    timed = [index for index, row in enumerate(rows) if is_timed(row)]
    names = comparable_accuracies(rows)
    counts = {
        key: (
            sum(1 for index in timed if gain_of(rows[index], key)),
            # Of two that equally many rows have, the one that was measured on the exported files.
            sum(1 for index in timed if gain_of(rows[index], key) not in (None, rows[index][key])),
        )
        for key in names
    }
    best = max(counts, key=lambda key: counts[key], default=None)
    if best is None or counts[best][0] == 0:
        return None
    label = names[best]
    if best == "finetuned" and counts[best][1]:
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
    return {"cost": "latency", "accuracy": best, "label": label, "groups": result}


def _point(row: Row, key: str) -> tuple[float, float]:
    gain = gain_of(row, key)
    assert gain is not None
    return row["latency_ms"]["p50"], gain["top1"]


def size_trade_off(rows: Sequence[Row], families: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Choose the accuracy and the size to set side by side for the nets of one run, for want of a latency.

    MACs where every net of the families has them, else parameters. Other nets with the same numbers are shown, too.

    Args:
        rows: of the report.
        families: what `families_of` returns.

    Returns:
        As `trade_off`, with "macs" or "params" as `cost` and one group, which has `families`: lines as of `lines_of`.
        None when no family has two widths with an accuracy and a size.
    """
    nets: dict[str, int] = {}
    for index, row in enumerate(rows):
        if row["model_dir"] is not None:
            nets.setdefault(row["model_dir"], index)
    members = [[index for index in family["rows"] if index in nets.values()] for family in families]
    of_families = [index for indices in members for index in indices]
    names = comparable_accuracies([rows[index] for index in nets.values()])
    counts = {key: sum(1 for index in of_families if rows[index][key]) for key in names}
    best = max(counts, key=lambda key: counts[key])
    accurate = [index for index in of_families if rows[index][best]]
    cost = next((key for key in SIZES if all(rows[index][key] is not None for index in accurate)), None)
    if cost is None:
        return None
    shown = [index for index in nets.values() if rows[index][best] and rows[index][cost] is not None]
    lines: list[dict[str, Any]] = [
        {
            "family": place,
            "rows": sorted(set(indices) & set(shown), key=lambda index: rows[index]["width"]),
        }
        for place, indices in enumerate(members)
    ]
    lines = [line for line in lines if len({rows[index]["width"] for index in line["rows"]}) > 1]
    if not lines:
        return None
    front = pareto_front([(rows[index][cost], rows[index][best]["top1"]) for index in shown])
    group = {"rows": shown, "front": [shown[place] for place in front], "families": lines}
    return {"cost": cost, "accuracy": best, "label": names[best], "groups": [group]}
