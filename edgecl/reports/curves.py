"""Training curves, thinned to what a chart can show without hiding the spread."""

from __future__ import annotations

from typing import Any

from edgecl.reports.notation import finite

Curve = dict[str, list[float]]

MOST_POINTS = 240


def curve(lines: list[dict[str, Any]], key: str) -> Curve | None:
    """Return one quantity over epochs, or None when no line has it.

    Returns:
        `epoch`, `mean`, `low` and `high`, equally long and at most MOST_POINTS: neighboring steps are put
        together in equal shares, with their mean and their extremes, so that a spike stays visible.
    """
    pairs = [(finite(line.get("epoch")), finite(line.get(key))) for line in lines]
    known = [(epoch, value) for epoch, value in pairs if epoch is not None and value is not None]
    if not known:
        return None
    share = -(-len(known) // MOST_POINTS)
    result: Curve = {"epoch": [], "mean": [], "low": [], "high": []}
    for start in range(0, len(known), share):
        part = known[start : start + share]
        values = [value for _, value in part]
        result["epoch"].append(sum(epoch for epoch, _ in part) / len(part))
        result["mean"].append(sum(values) / len(values))
        result["low"].append(min(values))
        result["high"].append(max(values))
    # Six digits are more than any chart shows, and keep report.json small.
    return {name: [float(f"{value:.6g}") for value in values] for name, values in result.items()}


def curves(lines: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Curve]:
    """Return those of several quantities that the lines hold."""
    found = {key: curve(lines, key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}
