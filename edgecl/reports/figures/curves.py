"""Small multiples of a training run: one quantity over epochs each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgecl.reports.content import Curve, Panel
from edgecl.reports.figures.drawing import (
    LETTER,
    MUTED,
    SMALL,
    beside,
    grid,
    inlined,
    log_ticks,
    new_axes,
    spread,
)
from edgecl.reports.notation import fixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Sequence[tuple[str, str, Curve]]
"""Name, color and curve of each line."""


def panel_figure(series: Series, panel: Panel, *, x_range: tuple[float, float], prefix: str) -> str:
    """Draw a quantity over epochs, each line named at its end, its extremes as a pale band."""
    several = len(series) > 1
    right = 16.0 + (LETTER * SMALL * max(len(name) for name, _, _ in series) if several else 4.0)
    figure, axes = new_axes(340.0, 182.0, left=46.0, right=right, top=8.0, bottom=42.0)
    axes.set_xlim(*x_range)
    _set_value_axis(axes, series, panel)
    grid(axes, "y")
    axes.set_xlabel("epoch", color=MUTED, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=MUTED, linewidth=1, dashes=(3, 3), zorder=1)
    end_epoch = max(one.epoch[-1] for _, _, one in series)
    ends = spread(axes, [one.mean[-1] for _, _, one in series], SMALL + 2)
    for (name, color, one), end in zip(series, ends, strict=True):
        few = len(one.epoch) < 25
        if one.low != one.high:
            axes.fill_between(one.epoch, one.low, one.high, color=color, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(
            one.epoch,
            one.mean,
            color=color,
            linewidth=1.7,
            marker="o" if few else None,
            markersize=4.5,
            markeredgecolor="none",
            solid_joinstyle="round",
            clip_on=not few,
            zorder=3,
        )
        if several:
            beside(axes, name, (end_epoch, end), (6, 0), color=color, fontweight="bold")
    last = "; ".join(f"{name} ends at {one.mean[-1]:.4g}" for name, _, one in series)
    return inlined(figure, prefix=prefix, title=f"{panel.title} over epochs: {last}")


def _set_value_axis(axes: Axes, series: Series, panel: Panel) -> None:
    low = min(min(one.low) for _, _, one in series)
    high = max(max(one.high) for _, _, one in series)
    if panel.log and low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(log_ticks())
        axes.set_ylim(low / 1.15, high * 1.15)
    else:
        pad = 0.06 * (high - low) or max(abs(high) * 0.1, 0.1)
        bottom, top = panel.low, panel.high
        axes.set_ylim(
            low - pad if bottom is None else min(bottom, low), high + pad if top is None else max(top, high)
        )
    axes.yaxis.set_major_formatter(
        lambda value, _: fixed(value, 0) if abs(value) >= 1e3 else f"{value:.4g}".replace("-", "−")
    )
    axes.yaxis.set_minor_formatter("")
