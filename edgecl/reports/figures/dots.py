"""Means with their intervals and single values: the nets of a comparison, and the paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgecl.reports.figures.drawing import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    TEXT,
    beside,
    grid,
    inlined,
    new_axes,
)
from edgecl.reports.notation import between, percent, points, shortened
from edgecl.reports.rows import Comparison
from edgecl.storage.records import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {
    "pretrained": BLUE,
    "pretrained further": BLUE,
    "given": INK,
    "random init": MUTED,
    "from scratch": ORANGE,
}


@dataclass(frozen=True)
class _Dots:
    """One line of dots: a mean, its interval, and what it is the mean of."""

    label: str
    mean: float
    interval: Interval | None
    draws: list[float]
    color: str
    value: str
    hollow: bool = False

    @property
    def lines(self) -> list[str]:
        return self.label.replace(", ", "\n").split("\n")

    @property
    def values(self) -> list[float]:
        return [self.mean, *(self.interval or ()), *self.draws]


def comparison_figure(comparison: Comparison, *, prefix: str) -> str | None:
    """Draw the few-label accuracy of each net: mean, 95 % interval and the accuracy with each choice of labels."""
    rows = [
        _Dots(net.name, few.top1, few.ci95, few.draws, _COLORS.get(net.name, PURPLE), percent(few.top1))
        for net in comparison.nets
        for few in [net.few_label]
    ]
    if not rows:
        return None
    chance = comparison.chance
    line = None if chance is None else (chance, f"chance {percent(chance)} %")
    title = "Few-label top-1 accuracy of each net: " + "; ".join(f"{row.label} {row.value}" for row in rows)
    return _dot_plot(rows, "few-label top-1, %", (0.0, 100.0), line, prefix=prefix, title=title)


def difference_figure(comparison: Comparison, *, prefix: str) -> str | None:
    """Draw the paired differences with their intervals against zero; a hollow dot is not resolved."""
    found = comparison.differences
    if not found:
        return None
    rows = [
        _Dots(f"{one.a}\n− {one.b}", one.mean, one.ci95, one.draws, INK, points(one.mean), not one.resolved)
        for one in found
    ]
    title = "Paired differences: " + "; ".join(
        f"{one.a} minus {one.b} {points(one.mean)} {between(one.ci95)}" for one in found
    )
    label, line = "difference, percentage points", (0.0, "no difference")
    return _dot_plot(rows, label, (-100.0, 100.0), line, prefix=prefix, title=title)


def _dot_plot(
    rows: Sequence[_Dots],
    label: str,
    bounds: tuple[float, float],
    line: tuple[float, str] | None,
    *,
    prefix: str,
    title: str,
) -> str:
    lines = max(len(row.lines) for row in rows)
    top, bottom, pitch = 26.0, 44.0, max(52.0 if len(rows) > 2 else 78.0, 18.0 * lines)
    height = top + pitch * len(rows) + bottom
    figure, axes = new_axes(460.0, height, left=122.0, right=20.0, top=top, bottom=bottom)
    values = [value for row in rows for value in row.values] + ([line[0]] if line else [])
    low, high = min(values), max(values)
    pad = max(0.06 * (high - low), 1.0)
    first, last = bounds
    axes.set_xlim(max(first, low - pad) if low > first else first - pad, min(last, high + pad))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel(label, color=MUTED, fontsize=TEXT)
    grid(axes, "x")
    if line is not None:
        _mark(axes, *line)
    for place, row in enumerate(rows):
        _draw(axes, row, place)
    return inlined(figure, prefix=prefix, title=title)


def _mark(axes: Axes, value: float, name: str) -> None:
    """Draw a dashed line at a value, with its name over it, inside the picture."""
    axes.axvline(value, color=MUTED, linewidth=1.2, dashes=(3, 3), zorder=1)
    low, high = axes.get_xlim()
    share = (value - low) / (high - low)
    shift, align = (1, "left") if share < 0.2 else (-1, "right") if share > 0.8 else (0, "center")
    across = ("data", "axes fraction")
    beside(axes, name, (value, 1), (shift, 7), xycoords=across, ha=align, va="baseline")


def _draw(axes: Axes, row: _Dots, place: int) -> None:
    label = "\n".join(shortened(part, 18) for part in row.lines)
    look: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "linespacing": 1.25}
    beside(axes, label, (0, place), (-10, 0), color=INK, fontsize=TEXT, **look)
    # Single values lie under their interval, stepped a little so that equal ones stay countable.
    heights = [place + 0.22 + 0.07 * (index % 3) for index in range(len(row.draws))]
    dot: dict[str, Any] = {"color": row.color, "marker": "o"}
    faint: dict[str, Any] = {"linestyle": "none", "markersize": 5, "markeredgecolor": "none", "alpha": 0.35}
    axes.plot(row.draws, heights, **dot, **faint, zorder=2)
    if row.interval:
        bar: dict[str, Any] = {"color": row.color, "linewidth": 2.6, "solid_capstyle": "butt"}
        axes.plot(row.interval, [place, place], **bar, zorder=3)
    face = PAPER if row.hollow else row.color
    axes.plot([row.mean], [place], **dot, markersize=9, markerfacecolor=face, markeredgewidth=2.2, zorder=4)
    about = {"color": INK, "fontsize": TEXT + 1, "fontweight": "bold", "zorder": 5}
    beside(axes, row.value, (row.mean, place), (0, 8), ha="center", va="bottom", **about)
