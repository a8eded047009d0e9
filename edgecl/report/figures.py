"""The charts, as SVG that lives inside a page and takes its colours from the page's style sheet.

Drawn by matplotlib in placeholder colours. `_inlined` turns those into CSS variables, so that one picture
serves light and dark, and gives every id a prefix, so that the pictures of a page stay apart.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from edgecl.report.curves import Curve
from edgecl.report.notation import (
    between,
    finite,
    fixed,
    milliseconds,
    percent,
    points,
    shortened,
)
from edgecl.report.rows import Row, row_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

# Placeholder colour -> CSS variable. page.css gives each a value for light and for dark.
INK, MUTED, RULE, PAPER = "#0e0001", "#0e0002", "#0e0003", "#0e0004"
BLUE, ORANGE, PURPLE, GREEN = "#0e0005", "#0e0006", "#0e0007", "#0e0008"
_VARIABLES = {
    "#000000": "ink",  # whatever matplotlib was not told the colour of
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    BLUE: "blue",
    ORANGE: "orange",
    PURPLE: "purple",
    GREEN: "green",
}
SERIES = (BLUE, ORANGE, PURPLE, GREEN)
ARMS = {"pretrained": BLUE, "random init": MUTED, "from scratch": ORANGE}

# Sizes are in the picture's own units; pictures are 340 to 480 wide, so that text stays legible on a phone.
_TEXT = 12.0
_SMALL = 11.0
# Mean advance of a letter in the widest sans serif a browser may fall back to.
_LETTER = 0.60

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


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
        colour: str,
        value: str,
        *,
        hollow: bool = False,
    ):
        self.label = label
        self.mean = mean
        self.interval = interval
        self.draws = draws
        self.colour = colour
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
    figure = _figure(width, top + pitch * len(rows) + bottom)
    axes = _axes(figure, left, right, top, bottom)
    low, high = min(values), max(values)
    pad = max(0.06 * (high - low), 1.0)
    axes.set_xlim(
        max(bounds[0], low - pad) if low > bounds[0] else bounds[0] - pad, min(bounds[1], high + pad)
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel(x_label, color=MUTED, fontsize=_TEXT)
    _grid(axes, "x")
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
            fontsize=_SMALL,
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
            fontsize=_TEXT,
            linespacing=1.25,
        )
        # Draws lie under their interval, stepped a little so that equal ones stay countable.
        steps = [0.22 + 0.07 * (index % 3) for index in range(len(row.draws))]
        axes.plot(
            row.draws,
            [place + step for step in steps],
            color=row.colour,
            linestyle="none",
            marker="o",
            markersize=5,
            markerfacecolor=row.colour,
            markeredgecolor="none",
            alpha=0.35,
            zorder=2,
        )
        if row.interval:
            axes.plot(
                row.interval, [place, place], color=row.colour, linewidth=2.6, solid_capstyle="butt", zorder=3
            )
        axes.plot(
            [row.mean],
            [place],
            color=row.colour,
            marker="o",
            markersize=9,
            markerfacecolor=PAPER if row.hollow else row.colour,
            markeredgecolor=row.colour,
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
            fontsize=_TEXT + 1,
            fontweight="bold",
            zorder=5,
        )
    return _inlined(figure, prefix=prefix, title=title)


def _lean(axes: Axes, value: float) -> int:
    """Return the side a line's text goes to: 1, right, near the left edge; -1 near the right edge; else 0."""
    low, high = axes.get_xlim()
    share = (value - low) / (high - low)
    return 1 if share < 0.2 else -1 if share > 0.8 else 0


def scatter_figure(rows: Sequence[Row], trade: dict[str, Any], *, prefix: str) -> str:
    """Draw accuracy over median latency with 95 % intervals and the Pareto front of each device.

    Nets of the same kind of accuracy that were never timed are ticks at the right edge.
    """
    key = trade["accuracy"]
    width, height, left, right, top, bottom = 480.0, 330.0, 56.0, 20.0, 14.0, 48.0
    untimed = [
        row for row in rows if row[key] and not (row["latency_ms"] and row["latency_ms"]["p50"] is not None)
    ]
    if untimed:
        right = 12.0 + _LETTER * _SMALL * max(len(_untimed_label(row, rows)) for row in untimed)
    figure = _figure(width, height)
    axes = _axes(figure, left, right, top, bottom)

    members = [
        (group, index) for group in range(len(trade["groups"])) for index in trade["groups"][group]["rows"]
    ]
    times = [_times(rows[index]) for _, index in members]
    gains = [_gains(rows[index][key]) for _, index in members] + [_gains(row[key]) for row in untimed]
    low, high = min(time[1] for time in times), max(time[2] for time in times)
    if high > 8 * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(_log_ticks())
        axes.set_xlim(low / 1.5, high * 1.8)
    else:
        pad = max(0.25 * (high - low), 0.12 * high)
        axes.set_xlim(max(0.0, low - pad), high + 1.4 * pad)
    bottom_gain, top_gain = min(gain[1] for gain in gains), max(gain[2] for gain in gains)
    pad = max(0.12 * (top_gain - bottom_gain), 1.5)
    axes.set_ylim(max(0.0, bottom_gain - pad), min(100.0, top_gain + pad))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("median latency, ms", color=MUTED, fontsize=_TEXT)
    axes.set_ylabel(trade["label"] + ", %", color=MUTED, fontsize=_TEXT)
    _grid(axes, "both")

    for place, group in enumerate(trade["groups"]):
        colour = SERIES[place % len(SERIES)]
        front = [(_times(rows[index])[0], _gains(rows[index][key])[0]) for index in group["front"]]
        # The front is a staircase: between two nets, the slower one's accuracy is not yet to be had.
        axes.step(
            [*(x for x, _ in front), axes.get_xlim()[1]],
            [*(y for _, y in front), front[-1][1]],
            where="post",
            color=colour,
            linewidth=1.4,
            dashes=(4, 3),
            alpha=0.7,
            zorder=1,
        )
        for index in group["rows"]:
            x, x_low, x_high = _times(rows[index])
            y, y_low, y_high = _gains(rows[index][key])
            axes.plot([x_low, x_high], [y, y], color=colour, linewidth=2, zorder=3)
            axes.plot([x, x], [y_low, y_high], color=colour, linewidth=2, zorder=3)
            axes.plot(
                [x],
                [y],
                color=colour,
                marker="o",
                markersize=9,
                markerfacecolor=colour if index in group["front"] else PAPER,
                markeredgecolor=colour,
                markeredgewidth=2,
                zorder=4,
            )
    _label_points(axes, rows, trade, members)
    heights = [_gains(row[key])[0] for row in untimed]
    for row, gain, shown in zip(untimed, heights, _spread(axes, heights, _SMALL + 3), strict=True):
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
            fontsize=_SMALL,
        )
    return _inlined(
        figure,
        prefix=prefix,
        title=f"{trade['label']} over median latency: "
        + "; ".join(
            f"{row_label(rows[index], rows)} {milliseconds(_times(rows[index])[0])} ms, "
            f"{percent(rows[index][key]['top1'])} %"
            for _, index in members
        ),
    )


def _untimed_label(row: Row, rows: Sequence[Row]) -> str:
    return shortened(row_label(row, rows), 16) + ", not timed"


def _times(row: Row) -> tuple[float, float, float]:
    middle = row["latency_ms"]["p50"]
    low, high = row["latency_ms"]["ci95_p50"] or (middle, middle)
    return middle, min(low, middle), max(high, middle)


def _gains(accuracy: dict[str, Any]) -> tuple[float, float, float]:
    middle = accuracy["top1"]
    low, high = accuracy["ci95"] or (middle, middle)
    return middle, min(low, middle), max(high, middle)


def _label_points(
    axes: Axes, rows: Sequence[Row], trade: dict[str, Any], members: list[tuple[int, int]]
) -> None:
    """Write each point's name beside it, at the first place where it touches no name, point, bar or front."""
    key = trade["accuracy"]
    to_pixels = axes.transData.transform
    scale = 72.0 / axes.figure.dpi
    box = axes.get_window_extent()
    frame = (box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale)
    taken: list[tuple[float, float, float, float]] = []
    for _, index in members:
        x, x_low, x_high = _times(rows[index])
        y, y_low, y_high = _gains(rows[index][key])
        (left, bottom), (right, top) = to_pixels((x_low, y_low)) * scale, to_pixels((x_high, y_high)) * scale
        centre = to_pixels((x, y)) * scale
        taken.append((left - 2, centre[1] - 4, right + 2, centre[1] + 4))
        taken.append((centre[0] - 5, bottom - 2, centre[0] + 5, top + 2))
    for front_of in trade["groups"]:
        stairs: list[Any] = [
            to_pixels((_times(rows[index])[0], _gains(rows[index][key])[0])) * scale
            for index in front_of["front"]
        ]
        ends = [*stairs[1:], (frame[2], stairs[-1][1])]
        for (x, y), (x_next, y_next) in zip(stairs, ends, strict=True):
            taken.append((x, y - 1, x_next, y + 1))
            taken.append((x_next - 1, y, x_next + 1, y_next))
    without = ("device", "threads", "batch") if len(trade["groups"]) > 1 else ()
    spots = [(8.0, 10.0, "left"), (-8.0, 10.0, "right"), (8.0, -10.0, "left"), (-8.0, -10.0, "right")]
    spots += [(10.0, 0.0, "left"), (-10.0, 0.0, "right"), (0.0, 14.0, "center"), (0.0, -14.0, "center")]
    for reach in (18.0, 30.0, 50.0, 75.0):
        spots += [(x, y, ha) for y in (reach, -reach) for x, ha in ((10.0, "left"), (-10.0, "right"))]
    for group, index in members:
        text = shortened(row_label(rows[index], rows, without=without), 26)
        point = (_times(rows[index])[0], _gains(rows[index][key])[0])
        centre = to_pixels(point) * scale
        wide, high = _LETTER * _SMALL * len(text), _SMALL * 1.25
        for spot in spots:
            area = _area(centre, spot, wide, high)
            inside = (
                area[0] >= frame[0] and area[2] <= frame[2] and area[1] >= frame[1] and area[3] <= frame[3]
            )
            if inside and not any(_overlap(area, other) for other in taken):
                break
        else:
            continue  # no room: the table names it
        taken.append(area)
        colour = SERIES[group % len(SERIES)] if len(trade["groups"]) > 1 else INK
        far = abs(spot[1]) > 14
        axes.annotate(
            text,
            point,
            xytext=(spot[0], spot[1]),
            textcoords="offset points",
            ha=spot[2],
            va="center",
            color=colour,
            fontsize=_SMALL,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6, "shrinkB": 5}
            if far
            else None,
            zorder=5,
        )


def _area(
    centre: Any, place: tuple[float, float, str], wide: float, high: float
) -> tuple[float, float, float, float]:
    left = centre[0] + place[0] - {"left": 0.0, "right": wide, "center": wide / 2}[place[2]]
    bottom = centre[1] + place[1] - high / 2
    return (left, bottom, left + wide, bottom + high)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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
        series: name, colour and curve of each line.
        title: what is drawn; the page writes it over the picture.
        x_range: where the shared epoch axis begins and ends.
        limits: fixed ends of the value axis, None for an end that follows the data.
        log: draw a logarithmic axis where every value is positive and they span a decade.
        reference: a value to mark with a dashed line.
        prefix: of every id in the picture.
    """
    names = [name for name, _, _ in series]
    right = 16.0 + (_LETTER * _SMALL * max(map(len, names)) if len(names) > 1 else 4.0)
    width, height, left, top, bottom = 340.0, 182.0, 46.0, 8.0, 42.0
    figure = _figure(width, height)
    axes = _axes(figure, left, right, top, bottom)
    low = min(min(one["low"]) for _, _, one in series)
    high = max(max(one["high"]) for _, _, one in series)
    log = log and low > 0 and high > 10 * low
    axes.set_xlim(*x_range)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_log_ticks())
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
    _grid(axes, "y")
    axes.set_xlabel("epoch", color=MUTED, fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=1, dashes=(3, 3), zorder=1)
    end_epoch = max(one["epoch"][-1] for _, _, one in series)
    ends = _spread(axes, [one["mean"][-1] for _, _, one in series], _SMALL + 2)
    for (name, colour, one), end in zip(series, ends, strict=True):
        few = len(one["epoch"]) < 25
        if any(a < b for a, b in zip(one["low"], one["high"], strict=True)):
            axes.fill_between(
                one["epoch"], one["low"], one["high"], color=colour, alpha=0.18, linewidth=0, zorder=2
            )
        axes.plot(
            one["epoch"],
            one["mean"],
            color=colour,
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
                color=colour,
                fontsize=_SMALL,
                fontweight="bold",
            )
    last = "; ".join(f"{name} ends at {one['mean'][-1]:.4g}" for name, _, one in series)
    return _inlined(figure, prefix=prefix, title=f"{title} over epochs: {last}")


def _spread(axes: Axes, values: list[float], gap: float) -> list[float]:
    """Return heights for labels at these values, at least `gap` points apart and inside the axes."""
    if not values:
        return []
    scale = 72.0 / axes.figure.dpi
    box = axes.get_window_extent()
    low, high = box.y0 * scale, box.y1 * scale
    order = sorted(range(len(values)), key=lambda index: values[index])
    heights = [
        float(axes.transData.transform((axes.get_xlim()[1], values[index]))[1]) * scale for index in order
    ]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + gap)
    excess = heights[-1] - high
    if excess > 0:
        heights[-1] -= excess
        for place in range(len(heights) - 2, -1, -1):
            heights[place] = min(heights[place], heights[place + 1] - gap)
    if heights[0] < low:
        heights = [height + low - heights[0] for height in heights]
    result = [0.0] * len(values)
    for index, height in zip(order, heights, strict=True):
        found = finite(float(axes.transData.inverted().transform((box.x1, height / scale))[1]))
        result[index] = values[index] if found is None else found
    return result


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def _axes(figure: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(which="both", bottom=False, left=False, labelsize=_TEXT, labelcolor=MUTED, pad=6)
    axes.set_axisbelow(True)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return axes


def _log_ticks() -> LogLocator:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8)


def _grid(axes: Axes, which: Literal["x", "y", "both"]) -> None:
    axes.grid(visible=True, axis=which, which="major", color=RULE, linewidth=0.8)


def _inlined(figure: Figure, *, prefix: str, title: str) -> str:
    """Return the figure as an <svg> element for the inside of a page: same bytes for the same figure."""
    import matplotlib
    from matplotlib.text import Text

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: it takes the page's font and colours, and can be searched
        "svg.hashsalt": "edgecl",
    }
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The browser draws the text; that matplotlib's font lacks a letter is of no matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            # The style rule in <defs> would apply to the whole page; the metadata holds the time of drawing.
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    source = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | {
        link[1:] for element in root.iter() if (link := element.get(_LINK))
    }
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        identifier = element.attrib.pop("id", None)
        if identifier in used:
            element.set("id", f"{prefix}-{identifier}")
        link = element.attrib.pop(_LINK, None)
        if link:
            element.set("href", f"#{prefix}-{link[1:]}")
        clip = element.get("clip-path")
        if clip:
            element.set("clip-path", clip.replace("url(#", f"url(#{prefix}-"))
        style = element.get("style")
        if style:
            element.set("style", _page_style(style))
        if element.text and not element.text.strip():
            element.text = None
        element.tail = None
        if element.get("d"):
            element.set("d", re.sub(r"\s+", " ", element.attrib["d"]).strip())
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    _drop_bare_groups(root)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _drop_bare_groups(root: ElementTree.Element) -> None:
    for parent in list(root.iter()):
        children: list[ElementTree.Element] = []
        for child in parent:
            children.extend(_unwrapped(child))
        parent[:] = children


def _unwrapped(element: ElementTree.Element) -> list[ElementTree.Element]:
    if element.tag != "g" or element.attrib:
        return [element]
    return [inner for child in element for inner in _unwrapped(child)]


def _page_style(style: str) -> str:
    """Turn placeholder colours into CSS variables and leave the font's family to the page."""
    declarations = []
    for declaration in style.split(";"):
        name, _, value = declaration.strip().partition(":")
        name, value = name.strip(), value.strip()
        if name == "font-family" or not name:
            continue
        if name == "font":  # older matplotlib writes the shorthand: [weight] size family
            weight = re.search(r"\b(bold|[1-9]00)\b", value)
            size = re.search(r"[\d.]+px", value)
            declarations.extend([f"font-weight: {weight[1]}"] if weight else [])
            declarations.extend([f"font-size: {size[0]}"] if size else [])
            continue
        variable = _VARIABLES.get(value.lower())
        declarations.append(f"{name}: {f'var(--{variable})' if variable else value}")
    return "; ".join(declarations)
