"""Accuracy over latency, with the Pareto front of each way of timing; or over MACs or parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgecl.reports.families import Family
from edgecl.reports.figures.drawing import (
    INK,
    LETTER,
    MUTED,
    PAPER,
    SERIES,
    SMALL,
    TEXT,
    beside,
    grid,
    inlined,
    log_ticks,
    new_axes,
    spread,
)
from edgecl.reports.notation import milliseconds, percent, shortened
from edgecl.reports.pareto import SIZES, Group, TradeOff
from edgecl.reports.rows import Row, row_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

_MARKERS = {"fp32": "o", "fp16": "s", "int8": "D"}
# One for each family, since color says how a point was timed. The front's line is dashed.
_FAMILY_LINES: tuple[Literal["-", ":", "-."], ...] = ("-", ":", "-.")
_LEGEND_LINE = 16.0
_LEFT = 56.0
# The unit of an axis, and how a value in it is written.
_UNITS = ((1e9, "billions", "G"), (1e6, "millions", "M"), (1e3, "thousands", "k"), (1.0, "each", ""))


class _Range(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Plot:
    """What is drawn: the rows' places on both axes."""

    rows: Sequence[Row]
    trade: TradeOff
    costs: dict[int, _Range]
    gains: dict[int, _Range]
    axis: str
    unit: str
    untimed: list[int]
    """Rows with the same kind of accuracy that were never timed: ticks at the right edge."""

    def place(self, index: int) -> tuple[float, float]:
        return self.costs[index].value, self.gains[index].value

    def color(self, group: int) -> str:
        return SERIES[group % len(SERIES)]

    def untimed_label(self, index: int) -> str:
        return shortened(row_label(self.rows[index], self.rows), 16) + ", not timed"


def scatter_figure(
    rows: Sequence[Row], trade: TradeOff, *, families: Sequence[Family] = (), prefix: str
) -> str:
    """Draw accuracy over median latency, MACs or parameters with 95 % intervals and the Pareto front of each group.

    The shape of a point shows its precision; a cross was rejected. What has the same kind of accuracy but was
    never timed is a tick at the right edge. A line joins the nets of one run, and a legend names it.
    """
    plot = _plot(rows, trade)
    drawn = sorted({line.family for line in trade.lines})
    height, right, top = 330.0, 20.0, 14.0
    if plot.untimed:
        right = 12.0 + LETTER * SMALL * max(len(plot.untimed_label(index)) for index in plot.untimed)
    if drawn:
        legend = _LEGEND_LINE * len(drawn) + 6
        height, top = height + legend, top + legend
    figure, axes = new_axes(480.0, height, left=_LEFT, right=right, top=top, bottom=48.0)
    _set_axes(axes, plot)
    for place, family in enumerate(drawn):
        _name_family(figure, plot, families[family], family, down=12 + _LEGEND_LINE * place)
    for place, group in enumerate(trade.groups):
        _draw_lines(axes, plot, group, plot.color(place))
        for index in group.rows:
            _draw_point(axes, plot, index, plot.color(place), on_front=index in group.front)
    _label_points(axes, plot)
    _draw_untimed(axes, plot)
    points = "; ".join(
        f"{row_label(rows[index], rows)} {milliseconds(plot.costs[index].value)} {plot.unit}, "
        f"{percent(plot.gains[index].value)} %{', rejected' if rows[index].is_rejected else ''}"
        for index in trade.members
    )
    return inlined(
        figure, prefix=prefix, title=f"{trade.label} over {plot.axis.rpartition(',')[0]}: {points}"
    )


def _plot(rows: Sequence[Row], trade: TradeOff) -> _Plot:
    members, by_latency = trade.members, trade.cost == "latency"
    untimed = [i for i, row in enumerate(rows) if row.gain(trade.accuracy) and not row.is_timed]
    gains = {}
    for index in [*members, *untimed]:
        if found := rows[index].gain(trade.accuracy):
            gains[index] = _range(found.top1, found.ci95)
    if by_latency:
        costs = {
            index: _range(trade.cost_of(rows[index]), latency.ci95_p50 if latency else None)
            for index in members
            for latency in [rows[index].latency_ms]
        }
        return _Plot(rows, trade, costs, gains, "median latency, ms", "ms", untimed)
    most = max(trade.cost_of(rows[index]) for index in members)
    limit, words, unit = next(one for one in _UNITS if most >= one[0] or one[0] == 1)
    costs = {index: _range(trade.cost_of(rows[index]) / limit, None) for index in members}
    return _Plot(rows, trade, costs, gains, f"{SIZES[trade.cost]}, {words}", unit, [])


def _range(value: float, interval: Sequence[float] | None) -> _Range:
    low, high = interval or (value, value)
    return _Range(value, min(low, value), max(high, value))


def _set_axes(axes: Axes, plot: _Plot) -> None:
    low, high = min(cost.low for cost in plot.costs.values()), max(cost.high for cost in plot.costs.values())
    if high > 8 * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(log_ticks())
        axes.set_xlim(low / 1.5, high * 1.8)
    else:
        pad = max(0.25 * (high - low), 0.12 * high)
        axes.set_xlim(max(0.0, low - pad), high + 1.4 * pad)
    shown = [plot.gains[index] for index in [*plot.costs, *plot.untimed]]
    low, high = min(gain.low for gain in shown), max(gain.high for gain in shown)
    pad = max(0.12 * (high - low), 1.5)
    axes.set_ylim(max(0.0, low - pad), min(100.0, high + pad))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(plot.axis, color=MUTED, fontsize=TEXT)
    axes.set_ylabel(plot.trade.label + ", %", color=MUTED, fontsize=TEXT)
    grid(axes, "both")


def _name_family(figure: Figure, plot: _Plot, family: Family, place: int, *, down: float) -> None:
    """Write a line of the legend over the chart: a piece of the family's line, and its name."""
    from matplotlib.lines import Line2D

    drawn = [index for line in plot.trade.lines if line.family == place for index in line.rows]
    widths = [width for index in drawn if (width := plot.rows[index].width) is not None]
    name = f"{shortened(family.name, 30)}, one run: widths {min(widths):g} to {max(widths):g}"
    width, height = figure.get_size_inches() * 72
    level = 1 - down / height
    figure.add_artist(
        Line2D(
            [_LEFT / width, (_LEFT + 26) / width],
            [level, level],
            color=SERIES[0] if len(plot.trade.groups) == 1 else INK,
            linestyle=_FAMILY_LINES[place % len(_FAMILY_LINES)],
            linewidth=1.8,
        )
    )
    figure.text((_LEFT + 32) / width, level, name, va="center", color=INK, fontsize=SMALL)


def _draw_lines(axes: Axes, plot: _Plot, group: Group, color: str) -> None:
    for line in group.families:
        style = _FAMILY_LINES[line.family % len(_FAMILY_LINES)]
        xs, ys = zip(*map(plot.place, line.rows), strict=True)
        axes.plot(xs, ys, color=color, linestyle=style, linewidth=1.8, zorder=2)
    if group.front:
        # A staircase: between two nets, the slower one's accuracy is not yet to be had.
        xs, ys = zip(*map(plot.place, group.front), strict=True)
        xs, ys = (*xs, axes.get_xlim()[1]), (*ys, ys[-1])
        axes.step(xs, ys, where="post", color=color, linewidth=1.4, dashes=(4, 3), alpha=0.7, zorder=1)


def _draw_point(axes: Axes, plot: _Plot, index: int, color: str, *, on_front: bool) -> None:
    row, cost, gain = plot.rows[index], plot.costs[index], plot.gains[index]
    bar = 1 if row.is_rejected else 2
    axes.plot([cost.low, cost.high], [gain.value, gain.value], color=color, linewidth=bar, zorder=3)
    axes.plot([cost.value, cost.value], [gain.low, gain.high], color=color, linewidth=bar, zorder=3)
    axes.plot(
        *([cost.value], [gain.value]),
        color=color,
        marker="X" if row.is_rejected else _MARKERS.get(row.precision or "", "o"),
        markersize=12 if row.is_rejected else 8 if row.precision == "int8" else 9,
        markerfacecolor=color if row.is_rejected or on_front else PAPER,
        markeredgecolor=PAPER if row.is_rejected else color,
        markeredgewidth=bar,
        zorder=4,
    )


def _draw_untimed(axes: Axes, plot: _Plot) -> None:
    gains = [plot.gains[index].value for index in plot.untimed]
    for index, gain, shown in zip(plot.untimed, gains, spread(axes, gains, SMALL + 3), strict=True):
        across = axes.get_yaxis_transform()
        axes.plot([0.985, 1], [gain, gain], transform=across, color=MUTED, linewidth=2, zorder=3)
        beside(axes, plot.untimed_label(index), (1, shown), (5, 0), xycoords=("axes fraction", "data"))


def _spots() -> Iterator[tuple[float, float, str]]:
    """Yield where a point's name may be, in points from it, the best first."""
    for x, y in ((8.0, 10.0), (8.0, -10.0), (10.0, 0.0)):
        yield x, y, "left"
        yield -x, y, "right"
    yield 0.0, 14.0, "center"
    yield 0.0, -14.0, "center"
    for reach in (18.0, 30.0, 50.0, 75.0):
        for y in (reach, -reach):
            yield 10.0, y, "left"
            yield -10.0, y, "right"


def _label_points(axes: Axes, plot: _Plot) -> None:
    """Write each point's name beside it, at the first place where it touches no name, point, bar or line."""
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    lines, names = _obstacles(axes, plot), list[Bbox]()
    several = len(plot.trade.groups) > 1
    for group, index in [(group, index) for group, one in enumerate(plot.trade.groups) for index in one.rows]:
        without = ("device", "threads", "batch") if several else ()
        text = shortened(row_label(plot.rows[index], plot.rows, without=without), 26)
        x, y = axes.transData.transform(plot.place(index))
        wide, high = LETTER * SMALL * len(text), SMALL * 1.25
        for right, up, align in _spots():
            left = x + right - {"left": 0.0, "right": wide, "center": wide / 2}[align]
            area = Bbox.from_bounds(left, y + up - high / 2, wide, high)
            inside = frame.contains(*area.min) and frame.contains(*area.max)
            on_line = any(line.intersects_bbox(area.padded(2), filled=False) for line in lines)
            if inside and not on_line and not area.count_overlaps(names):
                break
        else:
            continue  # no room: the table names it
        names.append(area)
        color = plot.color(group) if several else INK
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "alpha": 0.6, "shrinkB": 5}
        look = {"ha": align, "color": color, "zorder": 5, "arrowprops": arrow if abs(up) > 14 else None}
        beside(axes, text, plot.place(index), (right, up), **look)


def _obstacles(axes: Axes, plot: _Plot) -> list[Path]:
    """Return what a name may not cover: points, bars, fronts and families' lines, in pixels."""
    from matplotlib.path import Path

    def path(*points: tuple[float, float], reach: tuple[float, float] = (0, 0)) -> Path:
        """Return a line through the data, longer at its ends by so much."""
        pixels = axes.transData.transform(points)
        pixels[0] -= reach
        pixels[-1] += reach
        return Path(pixels)

    paths = []
    for index in plot.trade.members:
        (x, left, right), (y, bottom, top) = plot.costs[index], plot.gains[index]
        # A point has a width, also where its interval has none.
        paths += [path((left, y), (right, y), reach=(4, 0)), path((x, bottom), (x, top), reach=(0, 4))]
    for group in plot.trade.groups:
        stairs = [plot.place(index) for index in group.front]
        stairs += [(axes.get_xlim()[1], y) for _, y in stairs[-1:]]
        paths += [
            path((x, y), (x_next, y), (x_next, y_next)) for (x, y), (x_next, y_next) in pairwise(stairs)
        ]
        paths += [path(*(plot.place(index) for index in line.rows)) for line in group.families]
    return paths
