"""Means with their intervals and draws: the arms of a comparison, and the paired differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgecl.reports.figures.drawing import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    SMALL,
    TEXT,
    grid,
    inlined,
    new_axes,
    new_figure,
)
from edgecl.reports.notation import between, percent, points, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = {"pretrained": BLUE, "random init": MUTED, "from scratch": ORANGE}


def comparison_figure(comparison: dict[str, Any], *, prefix: str) -> str | None:
    """Draw the few-label accuracy of each arm: mean, 95 % interval and the individual draws."""
    arms = [arm for arm in comparison["arms"] if arm["few_label"]]
    if not arms:
        return None
    values = [
        value
        for arm in arms
        for value in (arm["few_label"]["top1"], *(arm["few_label"]["ci95"] or ()), *arm["few_label"]["draws"])
    ]
    chance = comparison["chance"]
    rows = [
        _Dots(
            arm["name"],
            arm["few_label"]["top1"],
            arm["few_label"]["ci95"],
            arm["few_label"]["draws"],
            ARMS.get(arm["name"], PURPLE),
            percent(arm["few_label"]["top1"]),
        )
        for arm in arms
    ]
    return _dot_plot(
        rows,
        values=[*values, chance] if chance is not None else values,
        line=(chance, f"chance {percent(chance)} %") if chance is not None else None,
        x_label="few-label top-1, %",
        bounds=(0.0, 100.0),
        prefix=prefix,
        title="Few-label top-1 accuracy of each arm: "
        + "; ".join(f"{row.label} {row.value}" for row in rows),
    )


def difference_figure(comparison: dict[str, Any], *, prefix: str) -> str | None:
    """Draw the paired differences with their intervals against zero; a hollow dot is not resolved."""
    if not comparison["differences"]:
        return None
    rows = [
        _Dots(
            f"{one['a']}\n{'−'} {one['b']}",
            one["mean"],
            one["ci95"],
            one["draws"],
            INK,
            points(one["mean"]),
            hollow=not one["resolved"],
        )
        for one in comparison["differences"]
    ]
    values = [value for row in rows for value in (row.mean, *(row.interval or ()), *row.draws)]
    return _dot_plot(
        rows,
        values=[*values, 0.0],
        line=(0.0, "no difference"),
        x_label="difference, percentage points",
        bounds=(-100.0, 100.0),
        prefix=prefix,
        title="Paired differences: "
        + "; ".join(
            f"{one['a']} minus {one['b']} {points(one['mean'])} {between(one['ci95'])}"
            for one in comparison["differences"]
        ),
    )


class _Dots:
    def __init__(
        self,
        label: str,
        mean: float,
        interval: list[float] | None,
        draws: list[float],
        color: str,
        value: str,
        *,
        hollow: bool = False,
    ):
        self.label = label
        self.mean = mean
        self.interval = interval
        self.draws = draws
        self.color = color
        self.value = value
        self.hollow = hollow


def _dot_plot(
    rows: list[_Dots],
    *,
    values: list[float],
    line: tuple[float, str] | None,
    x_label: str,
    bounds: tuple[float, float],
    prefix: str,
    title: str,
) -> str:
    width, left, right, top, bottom = 460.0, 122.0, 20.0, 26.0, 44.0
    pitch = 52.0 if len(rows) > 2 else 78.0
    figure = new_figure(width, top + pitch * len(rows) + bottom)
    axes = new_axes(figure, left, right, top, bottom)
    low, high = min(values), max(values)
    pad = max(0.06 * (high - low), 1.0)
    axes.set_xlim(
        max(bounds[0], low - pad) if low > bounds[0] else bounds[0] - pad, min(bounds[1], high + pad)
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel(x_label, color=MUTED, fontsize=TEXT)
    grid(axes, "x")
    if line is not None:
        axes.axvline(line[0], color=MUTED, linewidth=1.2, dashes=(3, 3), zorder=1)
        axes.annotate(
            line[1],
            (line[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(_lean(axes, line[0]) * 1.0, 7),
            textcoords="offset points",
            ha={0: "center", 1: "left", -1: "right"}[_lean(axes, line[0])],
            color=MUTED,
            fontsize=SMALL,
        )
    for place, row in enumerate(rows):
        label = "\n".join(shortened(part, 18) for part in row.label.split("\n"))
        axes.annotate(
            label,
            (0, place),
            xycoords=("axes fraction", "data"),
            xytext=(-10, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=INK,
            fontsize=TEXT,
            linespacing=1.25,
        )
        # Draws lie under their interval, stepped a little so that equal ones stay countable.
        steps = [0.22 + 0.07 * (index % 3) for index in range(len(row.draws))]
        axes.plot(
            row.draws,
            [place + step for step in steps],
            color=row.color,
            linestyle="none",
            marker="o",
            markersize=5,
            markerfacecolor=row.color,
            markeredgecolor="none",
            alpha=0.35,
            zorder=2,
        )
        if row.interval:
            axes.plot(
                row.interval, [place, place], color=row.color, linewidth=2.6, solid_capstyle="butt", zorder=3
            )
        axes.plot(
            [row.mean],
            [place],
            color=row.color,
            marker="o",
            markersize=9,
            markerfacecolor=PAPER if row.hollow else row.color,
            markeredgecolor=row.color,
            markeredgewidth=2.2,
            zorder=4,
        )
        axes.annotate(
            row.value,
            (row.mean, place),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=INK,
            fontsize=TEXT + 1,
            fontweight="bold",
            zorder=5,
        )
    return inlined(figure, prefix=prefix, title=title)


def _lean(axes: Axes, value: float) -> int:
    """Return the side a line's text goes to: 1, right, near the left edge; -1 near the right edge; else 0."""
    low, high = axes.get_xlim()
    share = (value - low) / (high - low)
    return 1 if share < 0.2 else -1 if share > 0.8 else 0
