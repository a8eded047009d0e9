"""What every drawing shares: sizes, colors, axes, and turning matplotlib's SVG into a part of a page.

matplotlib draws in placeholder colors. `inlined` turns those into CSS variables, so that one drawing serves light and
dark, and makes ids from a prefix of its own, so that the drawings of a page stay apart.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

# Placeholder color -> CSS variable. page.css gives each a value for light and for dark.
INK, MUTED, RULE, PAPER = "#0e0001", "#0e0002", "#0e0003", "#0e0004"
BLUE, ORANGE, PURPLE, GREEN = "#0e0005", "#0e0006", "#0e0007", "#0e0008"
_VARIABLES = {
    "#000000": "ink",  # whatever matplotlib was not told the color of
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

# Sizes are in the picture's own units; pictures are 340 to 480 wide, so that text stays legible on a phone.
TEXT = 12.0
SMALL = 11.0
# Mean advance of a letter in the widest sans serif a browser may fall back to.
LETTER = 0.60

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def spread(axes: Axes, values: list[float], gap: float) -> list[float]:
    """Return where to write labels of these values: at least `gap` points apart and inside the axes."""
    if not values:
        return []
    box, to_pixels = axes.get_window_extent(), axes.transData
    order = sorted(range(len(values)), key=lambda index: values[index])
    heights = [float(to_pixels.transform((axes.get_xlim()[1], values[index]))[1]) for index in order]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + gap)
    heights[-1] = min(heights[-1], box.y1)
    for place in range(len(heights) - 2, -1, -1):
        heights[place] = min(heights[place], heights[place + 1] - gap)
    shift = max(0.0, box.y0 - heights[0])
    result = list(values)
    for index, height in zip(order, heights, strict=True):
        found = float(to_pixels.inverted().transform((box.x1, height + shift))[1])
        result[index] = found if math.isfinite(found) else values[index]
    return result


def new_axes(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """Return a figure and its axes, sizes in the picture's own units, points and pixels, with the look that charts share."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(which="both", bottom=False, left=False, labelsize=TEXT, labelcolor=MUTED, pad=6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return figure, axes


def log_ticks() -> LogLocator:
    """Return ticks at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8)


def grid(axes: Axes, which: Literal["x", "y", "both"]) -> None:
    """Draw pale lines at the ticks of one axis or both."""
    axes.grid(visible=True, axis=which, which="major", color=RULE, linewidth=0.8)


def beside(axes: Axes, text: str, point: tuple[float, float], shift: tuple[float, float], **how: Any) -> None:
    """Write small pale text, vertically centered, unless told otherwise, so many points away from a place in the axes."""
    look = {"va": "center", "color": MUTED, "fontsize": SMALL, **how}
    axes.annotate(text, point, xytext=shift, textcoords="offset points", **look)


def inlined(figure: Figure, *, prefix: str, title: str) -> str:
    """Return the figure as an <svg> element for the inside of a page: same bytes for the same figure."""
    import matplotlib
    from matplotlib.text import Text

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: it takes the page's font and colors, and can be searched
        "svg.hashsalt": prefix,  # ids are the same in every drawing of this figure, and others in every other figure
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
            # The time of drawing, and a rule that would apply to the whole page.
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.tag == "g":
            element.attrib.pop("id", None)  # the same in every figure
        if link := element.attrib.pop(_LINK, None):
            element.set("href", link)
        for name, change in (("style", _page_style), ("d", lambda path: " ".join(path.split()))):
            if value := element.get(name):
                element.set(name, change(value))
        if element.text and not element.text.strip():
            element.text = None
        element.tail = None
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"class": "chart", "role": "img", "aria-label": title})
    return ElementTree.tostring(root, encoding="unicode")


def _page_style(style: str) -> str:
    """Turn placeholder colors into CSS variables and leave the font's family to the page."""
    declarations = []
    for declaration in style.split(";"):
        name, _, value = declaration.strip().partition(":")
        name, value = name.strip(), value.strip()
        if name == "font-family" or not name:
            continue
        if name == "font":  # older matplotlib writes the shorthand: [weight] size family
            weight, size = re.search(r"\b(bold|[1-9]00)\b", value), re.search(r"[\d.]+px", value)
            declarations += [f"font-weight: {weight[1]}"] if weight else []
            declarations += [f"font-size: {size[0]}"] if size else []
            continue
        variable = _VARIABLES.get(value.lower())
        declarations.append(f"{name}: {f'var(--{variable})' if variable else value}")
    return "; ".join(declarations)
