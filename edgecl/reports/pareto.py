"""Which rows nothing beats: the Pareto front of accuracy and latency, for each way of timing, or of accuracy and size."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from edgecl.reports.precisions import Conditions, Part
from edgecl.reports.rows import Row, comparable_accuracies, nets_of

# What a net costs on every device; the first says more about its latency.
SIZES = {"macs": "MACs", "params": "parameters"}


class Line(Part):
    """The nets of one family in one precision and runtime, narrowest first, as a chart joins them."""

    family: int
    """Index of the family."""
    rows: list[int]


class Group(Conditions):
    """Rows that compete with each other, because they were timed in the same way."""

    rows: list[int]
    front: list[int]
    """Those that no other beats, cheapest first."""
    families: list[Line] = Field(default_factory=list)


class TradeOff(Part):
    """What the chart of accuracy over cost shows."""

    cost: str
    """`latency`, or a key of SIZES."""
    accuracy: str
    """A key of ACCURACIES."""
    label: str
    groups: list[Group]

    def cost_of(self, row: Row) -> float:
        """Return what a row costs."""
        cost = row.p50 if self.cost == "latency" else getattr(row, self.cost)
        assert cost is not None
        return float(cost)

    @property
    def members(self) -> list[int]:
        """The rows of all groups."""
        return [index for group in self.groups for index in group.rows]

    @property
    def lines(self) -> list[Line]:
        """The lines of all groups."""
        return [line for group in self.groups for line in group.families]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of those (cost, gain) points that no other beats by costing no more and gaining no less.

    The cheapest comes first; of equal points all are on the front.
    """

    def is_beaten(cost: float, gain: float) -> bool:
        return any(one <= cost and other >= gain and (one, other) != (cost, gain) for one, other in points)

    front = [index for index, point in enumerate(points) if not is_beaten(*point)]
    return sorted(front, key=lambda index: points[index])


def trade_off(rows: Sequence[Row]) -> TradeOff | None:
    """Choose the accuracy to set against latency, and mark the rows on each Pareto front; None where no row has both.

    Rows compete only with rows timed on the same device in the same mode, at the same batch and thread count.
    A rejected precision is shown, but is on no front. Sets the rows' `on_pareto_front`.
    """
    timed = [index for index, row in enumerate(rows) if row.is_timed]
    names = comparable_accuracies(rows)

    def count(key: str) -> tuple[int, int]:
        gains = [(row.gain(key), row.of_net(key)) for index in timed if (row := rows[index]).gain(key)]
        # Of two that equally many rows have, the one that was measured on the exported files.
        return len(gains), sum(gain is not of_net for gain, of_net in gains)

    best = max(names, key=count)
    number, of_files = count(best)
    if not number:
        return None
    # Of files, with or without a fine-tuned net's own figure beside them.
    label = "top-1" if best == "finetuned" and of_files else names[best]
    ways: dict[tuple[str | int | None, ...], list[int]] = {}
    for index in timed:
        if rows[index].gain(best):
            ways.setdefault(rows[index].key, []).append(index)
    groups = []
    for members in ways.values():
        running = [index for index in members if not rows[index].is_rejected]
        front = [running[place] for place in pareto_front([_point(rows[index], best) for index in running])]
        for index in members:
            rows[index].on_pareto_front = index in front
        how = {name: getattr(rows[members[0]], name) for name in Conditions.model_fields}
        groups.append(Group(**how, rows=members, front=front))
    return TradeOff(cost="latency", accuracy=best, label=label, groups=groups)


def _point(row: Row, key: str) -> tuple[float, float]:
    gain, cost = row.gain(key), row.p50
    assert gain is not None
    assert cost is not None
    return cost, gain.top1


def line_of(rows: Sequence[Row], family: int, members: Sequence[int]) -> list[Line]:
    """Return the line that joins these rows of a family by width, none of a single width."""
    by_width = sorted((rows[index].width or 0.0, index) for index in members)
    if len({width for width, _ in by_width}) < 2:
        return []
    return [Line(family=family, rows=[index for _, index in by_width])]


def size_trade_off(rows: Sequence[Row], families: Sequence[Sequence[int]]) -> TradeOff | None:
    """Choose the accuracy and the size to set side by side for the nets of one run, for want of a latency.

    MACs where every net of the families has them, else parameters. Other nets with the same numbers are shown, too. None
    when no family has two widths with an accuracy and a size.
    """
    nets = [rows.index(net) for net in nets_of(rows)]
    members = [index for found in families for index in found if index in nets]
    names = comparable_accuracies([rows[index] for index in nets])
    best = max(names, key=lambda key: sum(rows[index].of_net(key) is not None for index in members))
    accurate = [rows[index] for index in members if rows[index].of_net(best)]
    cost = next((key for key in SIZES if all(getattr(row, key) is not None for row in accurate)), None)
    if cost is None:
        return None
    shown = [index for index in nets if rows[index].of_net(best) and getattr(rows[index], cost) is not None]
    lines = [
        line
        for family, found in enumerate(families)
        for line in line_of(rows, family, [index for index in found if index in shown])
    ]
    if not lines:
        return None
    points = [
        (getattr(rows[index], cost), gain.top1) for index in shown if (gain := rows[index].of_net(best))
    ]
    front = [shown[place] for place in pareto_front(points)]
    group = Group(rows=shown, front=front, families=lines)
    return TradeOff(cost=cost, accuracy=best, label=names[best], groups=[group])
