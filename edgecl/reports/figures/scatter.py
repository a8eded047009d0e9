"""Accuracy over latency, with the Pareto front of each way of timing; or over MACs or parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from edgecl.reports.figures.drawing import (
    INK,
    LETTER,
    MUTED,
    PAPER,
    SERIES,
    SMALL,
    TEXT,
    grid,
    inlined,
    log_ticks,
    new_axes,
    new_figure,
    spread,
)
from edgecl.reports.notation import milliseconds, percent, shortened
from edgecl.reports.pareto import SIZES
from edgecl.reports.rows import Row, gain_of, is_rejected, is_timed, row_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"fp32": "o", "fp16": "s", "int8": "D"}
REJECTED_MARKER = "X"


# One for each family, since color says how a point was timed. The front's is dashed.
_FAMILY_LINES: tuple[Literal["-", ":", "-."], ...] = ("-", ":", "-.")
_LEGEND_LINE = 16.0


def scatter_figure(
    rows: Sequence[Row], trade: dict[str, Any], *, families: Sequence[dict[str, Any]] = (), prefix: str
) -> str:
    """Draw accuracy over median latency, MACs or parameters with 95 % intervals and the Pareto front of each group.

    The shape of a point says its precision; a cross was rejected. What has the same kind of accuracy but was
    never timed is a tick at the right edge. A line joins the nets of one run, and a legend names it.
    """
    key = trade["accuracy"]
    width, height, left, right, top, bottom = 480.0, 330.0, 56.0, 20.0, 14.0, 48.0
    by_latency = trade["cost"] == "latency"
    untimed = [row for row in rows if gain_of(row, key) and not is_timed(row)] if by_latency else []
    if untimed:
        right = 12.0 + LETTER * SMALL * max(len(_untimed_label(row, rows)) for row in untimed)
    drawn = sorted({line["family"] for group in trade["groups"] for line in group.get("families", ())})
    if drawn:
        legend = _LEGEND_LINE * len(drawn) + 6
        height, top = height + legend, top + legend
    figure = new_figure(width, height)
    axes = new_axes(figure, left, right, top, bottom)

    members = [
        (group, index) for group in range(len(trade["groups"])) for index in trade["groups"][group]["rows"]
    ]
    costs, axis, unit = _costs(rows, trade)
    gains = [_gains(rows[index], key) for _, index in members] + [_gains(row, key) for row in untimed]
    low, high = min(cost[1] for cost in costs.values()), max(cost[2] for cost in costs.values())
    if high > 8 * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(log_ticks())
        axes.set_xlim(low / 1.5, high * 1.8)
    else:
        pad = max(0.25 * (high - low), 0.12 * high)
        axes.set_xlim(max(0.0, low - pad), high + 1.4 * pad)
    bottom_gain, top_gain = min(gain[1] for gain in gains), max(gain[2] for gain in gains)
    pad = max(0.12 * (top_gain - bottom_gain), 1.5)
    axes.set_ylim(max(0.0, bottom_gain - pad), min(100.0, top_gain + pad))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(axis, color=MUTED, fontsize=TEXT)
    axes.set_ylabel(trade["label"] + ", %", color=MUTED, fontsize=TEXT)
    grid(axes, "both")

    alone = SERIES[0] if len(trade["groups"]) == 1 else INK
    for place, family in enumerate(drawn):
        widths = [
            rows[index]["width"]
            for group in trade["groups"]
            for line in group.get("families", ())
            if line["family"] == family
            for index in line["rows"]
        ]
        name = (
            f"{shortened(families[family]['name'], 30)}, one run: widths {min(widths):g} to {max(widths):g}"
        )
        _name_family(figure, name, family, color=alone, left=left, down=12 + _LEGEND_LINE * place)
    for place, group in enumerate(trade["groups"]):
        color = SERIES[place % len(SERIES)]
        for line in group.get("families", ()):
            axes.plot(
                [costs[index][0] for index in line["rows"]],
                [_gains(rows[index], key)[0] for index in line["rows"]],
                color=color,
                linestyle=_FAMILY_LINES[line["family"] % len(_FAMILY_LINES)],
                linewidth=1.8,
                zorder=2,
            )
        front = [(costs[index][0], _gains(rows[index], key)[0]) for index in group["front"]]
        # The front is a staircase: between two nets, the slower one's accuracy is not yet to be had.
        if front:
            axes.step(
                [*(x for x, _ in front), axes.get_xlim()[1]],
                [*(y for _, y in front), front[-1][1]],
                where="post",
                color=color,
                linewidth=1.4,
                dashes=(4, 3),
                alpha=0.7,
                zorder=1,
            )
        for index in group["rows"]:
            x, x_low, x_high = costs[index]
            y, y_low, y_high = _gains(rows[index], key)
            rejected, precision = is_rejected(rows[index]), rows[index]["precision"]
            width_of_bar = 1 if rejected else 2
            axes.plot([x_low, x_high], [y, y], color=color, linewidth=width_of_bar, zorder=3)
            axes.plot([x, x], [y_low, y_high], color=color, linewidth=width_of_bar, zorder=3)
            axes.plot(
                [x],
                [y],
                color=color,
                marker=REJECTED_MARKER if rejected else MARKERS.get(precision, "o"),
                markersize=12 if rejected else 8 if precision == "int8" else 9,
                markerfacecolor=color if rejected or index in group["front"] else PAPER,
                markeredgecolor=PAPER if rejected else color,
                markeredgewidth=1 if rejected else 2,
                zorder=4,
            )
    _label_points(axes, rows, trade, members, costs)
    heights = [_gains(row, key)[0] for row in untimed]
    for row, gain, shown in zip(untimed, heights, spread(axes, heights, SMALL + 3), strict=True):
        axes.plot(
            [0.985, 1], [gain, gain], transform=axes.get_yaxis_transform(), color=MUTED, linewidth=2, zorder=3
        )
        axes.annotate(
            _untimed_label(row, rows),
            (1, shown),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
            fontsize=SMALL,
        )
    return inlined(
        figure,
        prefix=prefix,
        title=f"{trade['label']} over {axis.rpartition(',')[0]}: "
        + "; ".join(
            f"{row_label(rows[index], rows)} {milliseconds(costs[index][0])} {unit}, "
            f"{percent(_gains(rows[index], key)[0])} %"
            f"{', rejected' if is_rejected(rows[index]) else ''}"
            for _, index in members
        ),
    )


def _name_family(figure: Figure, name: str, place: int, *, color: str, left: float, down: float) -> None:
    """Write a line of the legend over the chart: a piece of the family's line, and its name."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches() * 72
    level = 1 - down / height
    figure.add_artist(
        Line2D(
            [left / width, (left + 26) / width],
            [level, level],
            color=color,
            linestyle=_FAMILY_LINES[place % len(_FAMILY_LINES)],
            linewidth=1.8,
        )
    )
    figure.text((left + 32) / width, level, name, va="center", color=INK, fontsize=SMALL)


def _untimed_label(row: Row, rows: Sequence[Row]) -> str:
    return shortened(row_label(row, rows), 16) + ", not timed"


# The unit of an axis, and how a value in it is written.
_UNITS = ((1e9, "billions", "G"), (1e6, "millions", "M"), (1e3, "thousands", "k"), (1.0, "each", ""))


def _costs(
    rows: Sequence[Row], trade: dict[str, Any]
) -> tuple[dict[int, tuple[float, float, float]], str, str]:
    """Return what each point costs (value, low, high), the axis's name, and the unit."""
    members = [index for group in trade["groups"] for index in group["rows"]]
    key = trade["cost"]
    if key == "latency":
        return {index: _times(rows[index]) for index in members}, "median latency, ms", "ms"
    most = max(rows[index][key] for index in members)
    limit, words, unit = next(one for one in _UNITS if most >= one[0] or one[0] == 1)
    sizes = {index: rows[index][key] / limit for index in members}
    return {index: (size, size, size) for index, size in sizes.items()}, f"{SIZES[key]}, {words}", unit


def _times(row: Row) -> tuple[float, float, float]:
    middle = row["latency_ms"]["p50"]
    low, high = row["latency_ms"]["ci95_p50"] or (middle, middle)
    return middle, min(low, middle), max(high, middle)


def _gains(row: Row, key: str) -> tuple[float, float, float]:
    accuracy = gain_of(row, key)
    assert accuracy is not None  # the trade-off's rows and the untimed ones have it
    middle = accuracy["top1"]
    low, high = accuracy["ci95"] or (middle, middle)
    return middle, min(low, middle), max(high, middle)


def _label_points(
    axes: Axes,
    rows: Sequence[Row],
    trade: dict[str, Any],
    members: list[tuple[int, int]],
    costs: dict[int, tuple[float, float, float]],
) -> None:
    """Write each point's name beside it, at the first place where it touches no name, point, bar or front."""
    key = trade["accuracy"]
    to_pixels = axes.transData.transform
    scale = 72.0 / axes.figure.dpi
    box = axes.get_window_extent()
    frame = (box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale)
    taken: list[tuple[float, float, float, float]] = []
    for _, index in members:
        x, x_low, x_high = costs[index]
        y, y_low, y_high = _gains(rows[index], key)
        (left, bottom), (right, top) = to_pixels((x_low, y_low)) * scale, to_pixels((x_high, y_high)) * scale
        center = to_pixels((x, y)) * scale
        taken.append((left - 2, center[1] - 4, right + 2, center[1] + 4))
        taken.append((center[0] - 5, bottom - 2, center[0] + 5, top + 2))
    for front_of in trade["groups"]:
        stairs: list[Any] = [
            to_pixels((costs[index][0], _gains(rows[index], key)[0])) * scale for index in front_of["front"]
        ]
        ends = [*stairs[1:], *((frame[2], y) for _, y in stairs[-1:])]
        for (x, y), (x_next, y_next) in zip(stairs, ends, strict=True):
            taken.append((x, y - 1, x_next, y + 1))
            taken.append((x_next - 1, y, x_next + 1, y_next))
        for line in front_of.get("families", ()):
            joints = [
                to_pixels((costs[index][0], _gains(rows[index], key)[0])) * scale for index in line["rows"]
            ]
            for start, end in pairwise(joints):
                for share in range(21):
                    x, y = start + (end - start) * share / 20
                    taken.append((x - 2, y - 2, x + 2, y + 2))
    without = ("device", "threads", "batch") if len(trade["groups"]) > 1 else ()
    spots = [(8.0, 10.0, "left"), (-8.0, 10.0, "right"), (8.0, -10.0, "left"), (-8.0, -10.0, "right")]
    spots += [(10.0, 0.0, "left"), (-10.0, 0.0, "right"), (0.0, 14.0, "center"), (0.0, -14.0, "center")]
    for reach in (18.0, 30.0, 50.0, 75.0):
        spots += [(x, y, ha) for y in (reach, -reach) for x, ha in ((10.0, "left"), (-10.0, "right"))]
    for group, index in members:
        text = shortened(row_label(rows[index], rows, without=without), 26)
        point = (costs[index][0], _gains(rows[index], key)[0])
        center = to_pixels(point) * scale
        wide, high = LETTER * SMALL * len(text), SMALL * 1.25
        for spot in spots:
            area = _area(center, spot, wide, high)
            inside = (
                area[0] >= frame[0] and area[2] <= frame[2] and area[1] >= frame[1] and area[3] <= frame[3]
            )
            if inside and not any(_overlap(area, other) for other in taken):
                break
        else:
            continue  # no room: the table names it
        taken.append(area)
        color = SERIES[group % len(SERIES)] if len(trade["groups"]) > 1 else INK
        far = abs(spot[1]) > 14
        axes.annotate(
            text,
            point,
            xytext=(spot[0], spot[1]),
            textcoords="offset points",
            ha=spot[2],
            va="center",
            color=color,
            fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "alpha": 0.6, "shrinkB": 5}
            if far
            else None,
            zorder=5,
        )


def _area(
    center: Any, place: tuple[float, float, str], wide: float, high: float
) -> tuple[float, float, float, float]:
    left = center[0] + place[0] - {"left": 0.0, "right": wide, "center": wide / 2}[place[2]]
    bottom = center[1] + place[1] - high / 2
    return (left, bottom, left + wide, bottom + high)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
