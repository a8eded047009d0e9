"""Small multiples of a training run: one quantity over epochs each."""

from __future__ import annotations

from collections.abc import Sequence

from edgecl.reports.curves import Curve
from edgecl.reports.figures.drawing import (
    LETTER,
    MUTED,
    SMALL,
    grid,
    inlined,
    log_ticks,
    new_axes,
    new_figure,
    spread,
)
from edgecl.reports.notation import fixed


def curve_figure(
    series: Sequence[tuple[str, str, Curve]],
    *,
    title: str,
    x_range: tuple[float, float],
    limits: tuple[float | None, float | None] = (None, None),
    log: bool = False,
    reference: float | None = None,
    prefix: str,
) -> str:
    """Draw one small multiple: a quantity over epochs, each line named at its end, extremes as a pale band.

    Args:
        series: name, color and curve of each line.
        title: what is drawn; the page writes it over the picture.
        x_range: where the shared epoch axis begins and ends.
        limits: fixed ends of the value axis, None for an end that follows the data.
        log: draw a logarithmic axis where every value is positive and they span a decade.
        reference: a value to mark with a dashed line.
        prefix: of every id in the picture.
    """
    names = [name for name, _, _ in series]
    right = 16.0 + (LETTER * SMALL * max(map(len, names)) if len(names) > 1 else 4.0)
    width, height, left, top, bottom = 340.0, 182.0, 46.0, 8.0, 42.0
    figure = new_figure(width, height)
    axes = new_axes(figure, left, right, top, bottom)
    low = min(min(one["low"]) for _, _, one in series)
    high = max(max(one["high"]) for _, _, one in series)
    log = log and low > 0 and high > 10 * low
    axes.set_xlim(*x_range)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(log_ticks())
        axes.set_ylim(low / 1.15, high * 1.15)
    else:
        pad = 0.06 * (high - low) or max(abs(high) * 0.1, 0.1)
        axes.set_ylim(
            low - pad if limits[0] is None else min(limits[0], low),
            high + pad if limits[1] is None else max(limits[1], high),
        )
    axes.yaxis.set_major_formatter(
        lambda value, _: fixed(value, 0) if abs(value) >= 1e3 else f"{value:.4g}".replace("-", "−")
    )
    axes.yaxis.set_minor_formatter("")
    grid(axes, "y")
    axes.set_xlabel("epoch", color=MUTED, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=1, dashes=(3, 3), zorder=1)
    end_epoch = max(one["epoch"][-1] for _, _, one in series)
    ends = spread(axes, [one["mean"][-1] for _, _, one in series], SMALL + 2)
    for (name, color, one), end in zip(series, ends, strict=True):
        few = len(one["epoch"]) < 25
        if any(a < b for a, b in zip(one["low"], one["high"], strict=True)):
            axes.fill_between(
                one["epoch"], one["low"], one["high"], color=color, alpha=0.18, linewidth=0, zorder=2
            )
        axes.plot(
            one["epoch"],
            one["mean"],
            color=color,
            linewidth=1.7,
            marker="o" if few else None,
            markersize=4.5,
            markeredgecolor="none",
            solid_joinstyle="round",
            clip_on=not few,
            zorder=3,
        )
        if len(series) > 1:
            axes.annotate(
                name,
                (end_epoch, end),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=SMALL,
                fontweight="bold",
            )
    last = "; ".join(f"{name} ends at {one['mean'][-1]:.4g}" for name, _, one in series)
    return inlined(figure, prefix=prefix, title=f"{title} over epochs: {last}")
