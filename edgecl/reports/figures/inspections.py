"""What a net confuses: classes against classes, and its features in the plane."""

from __future__ import annotations

from collections import Counter

from edgecl.reports.content import Inspection
from edgecl.reports.figures.drawing import (
    BLUE,
    INK,
    LETTER,
    MUTED,
    ORANGE,
    SERIES,
    SMALL,
    inlined,
    new_axes,
)
from edgecl.reports.notation import shortened

MOST_CLASSES = 20
"""How many classes a picture has room for: those with the most mistakes."""
_WITH_COUNTS = 12
_LETTERS = 16
_MARKERS = "os^Dv"


def classes_shown(inspection: Inspection) -> list[int]:
    """Return the classes of the pictures: all, or those that are most often confused, in their order."""
    mistakes: Counter[int] = Counter()
    for pair in inspection.confusion:
        if pair.label != pair.predicted:
            mistakes.update({pair.label: pair.images, pair.predicted: pair.images})
    places = range(len(inspection.classes))
    return sorted(sorted(places, key=lambda place: -mistakes[place])[:MOST_CLASSES])


def confusion_figure(inspection: Inspection, *, prefix: str) -> str:
    """Draw how many images of each class, a row, were taken for which, a column; darker is a larger share of the row."""
    from matplotlib.patches import Rectangle

    shown = classes_shown(inspection)
    place = {label: index for index, label in enumerate(shown)}
    images: Counter[int] = Counter()
    for pair in inspection.confusion:
        images[pair.label] += pair.images
    names = [shortened(inspection.classes[label], _LETTERS) for label in shown]
    margin = 12.0 + LETTER * SMALL * max(len(name) for name in names)
    figure, axes = new_axes(margin + 346.0, margin + 346.0, left=margin, right=26.0, top=margin, bottom=26.0)
    for pair in inspection.confusion:
        if pair.label not in place or pair.predicted not in place:
            continue
        x, y = place[pair.predicted], place[pair.label]
        share = pair.images / images[pair.label]
        color = BLUE if x == y else ORANGE
        axes.add_patch(
            Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, color=color, alpha=0.08 + 0.72 * share, lw=0)
        )
        if len(shown) <= _WITH_COUNTS:
            axes.text(x, y, f"{pair.images:,}", ha="center", va="center", fontsize=SMALL, color=INK)
    axes.set(
        xlim=(-0.5, len(shown) - 0.5),
        ylim=(len(shown) - 0.5, -0.5),
        xticks=range(len(shown)),
        yticks=range(len(shown)),
    )
    axes.xaxis.tick_top()
    axes.set_xticklabels(names, rotation=90, fontsize=SMALL)
    axes.set_yticklabels(names, fontsize=SMALL)
    axes.tick_params(bottom=False, top=False, left=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("predicted", color=MUTED, fontsize=SMALL)
    right = sum(pair.images for pair in inspection.confusion if pair.label == pair.predicted)
    title = f"Classes against predicted classes: {right:,} of {sum(images.values()):,} on the diagonal"
    return inlined(figure, prefix=prefix, title=title)


def map_figure(inspection: Inspection, *, prefix: str) -> str:
    """Draw held-out images as points by their features, each class in its color and shape."""
    points, shown = inspection.map, classes_shown(inspection)
    names = [shortened(inspection.classes[label], _LETTERS) for label in shown]
    right = 44.0 + LETTER * SMALL * max(map(len, names), default=0)
    figure, axes = new_axes(330.0 + right, 372.0, left=8.0, right=right, top=8.0, bottom=30.0)
    for place, (label, name) in enumerate(zip(shown, names, strict=True)):
        of_class = [index for index, one in enumerate(points.label) if one == label]
        x, y = ([values[index] for index in of_class] for values in (points.x, points.y))
        color, marker = SERIES[place % len(SERIES)], _MARKERS[place // len(SERIES) % len(_MARKERS)]
        axes.scatter(x, y, s=14, alpha=0.6, linewidths=0, label=name, color=color, marker=marker)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        markerscale=1.6,
        fontsize=SMALL,
        handletextpad=0.1,
        labelcolor=MUTED,
    )
    axes.set(xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    if points.explained:
        across, up = (f"{100 * share:.0f} %" for share in points.explained)
        axes.set_xlabel(
            f"principal components 1 and 2: {across} and {up} of the variance", color=MUTED, fontsize=SMALL
        )
    title = f"{len(points.x):,} held-out images by their features, {points.made_by}"
    return inlined(figure, prefix=prefix, title=title)
