"""Nets of several widths from one checkpoint: which rows are one family, its table and its lines in the chart."""

from __future__ import annotations

from collections.abc import Sequence

from edgecl.errors import counted
from edgecl.reports.collect import Collection, Source
from edgecl.reports.notation import MISSING, between, milliseconds, percent, scaled
from edgecl.reports.pareto import SIZES, Group, Line, line_of
from edgecl.reports.precisions import Part, joined
from edgecl.reports.rows import ACCURACIES, ORIGINS, Row, comparable_accuracies, nets_of
from edgecl.reports.tables import Column, Table
from edgecl.storage.records import ModelRecord, Record


class Family(Part):
    """Nets from one checkpoint, at two widths or more."""

    name: str
    arch: str | None
    origin: str | None
    checkpoint: str
    """Its hash."""
    widths: list[float]
    """Narrowest first."""
    rows: list[int]


def families_of(collection: Collection, rows: Sequence[Row]) -> list[Family]:
    """Find the nets that came from one checkpoint at two widths or more.

    Fine-tuned nets are a family of their own; where they came from shows only with the carved nets beside them.
    """
    models = {model.shown: model for model in collection.of(ModelRecord)}
    found: dict[tuple[str, str | None, str | None, str], list[int]] = {}
    for index, row in enumerate(rows):
        model = models.get(row.model_dir or "")
        checkpoint = _checkpoint_of(model, collection) if model else None
        if model and checkpoint and row.width is not None:
            name = model.record.recipe_name or str(row.arch)
            found.setdefault((checkpoint, row.arch, row.origin, name), []).append(index)
    families = []
    for (checkpoint, arch, origin, name), members in found.items():
        widths = sorted({width for index in members if (width := rows[index].width) is not None})
        if origin != "pretrained":
            name = f"{name}, {ORIGINS.get(origin or '', origin)}"
        if len(widths) > 1:
            family = Family(
                name=name, arch=arch, origin=origin, checkpoint=checkpoint, widths=widths, rows=members
            )
            families.append(family)
    names = [family.name for family in families]
    for family in families:
        if names.count(family.name) > 1:
            family.name += f" ({family.checkpoint[:8]})"
    return families


def _checkpoint_of(model: Source[Record], collection: Collection) -> str | None:
    """Return the hash of the checkpoint a net came from, through the nets it was fine-tuned from."""
    for _ in collection.sources:
        maker = collection.maker_of(model)
        if maker is None or not isinstance(maker.record, ModelRecord):
            break
        model = maker
    return model.record.made_from or None


def lines_in(group: Group, families: Sequence[Family], rows: Sequence[Row]) -> list[Line]:
    """Return the lines of a chart's points: one family's nets by width, in one precision and runtime.

    A rejected precision has no line.
    """
    alike: dict[tuple[int, str | None, str | None, str | None], list[int]] = {}
    for place, family in enumerate(families):
        for index in family.rows:
            row = rows[index]
            if index in group.rows and not row.is_rejected:
                alike.setdefault((place, row.precision, row.runtime, row.target), []).append(index)
    return [line for (place, *_), members in alike.items() for line in line_of(rows, place, members)]


def family_tables(families: Sequence[Family], rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a report's families: one for each way of timing, or one without latency."""
    tables = []
    for family in families:
        members = [rows[index] for index in family.rows]
        title = f"{family.name}: {counted(len(family.widths), 'width')} of one run"
        ways = {row.key: row.in_words for row in members if row.is_timed}
        for way, words in ways.items():
            timed = [row for row in members if row.is_timed and row.key == way]
            tables.append(_table(f"{title}, on {words}", _by_width(members), timed))
        if not ways:
            tables.append(_table(title, _by_width(members), []))
    return tables


def _by_width(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each net, narrowest first."""
    return sorted(nets_of(rows), key=lambda row: row.width or 0.0)


def _table(title: str, nets: Sequence[Row], timed: Sequence[Row]) -> Table:
    known = {
        key: name.removesuffix(" top-1")
        for key, name in ACCURACIES.items()
        if any(net.of_net(key) for net in nets)
    }
    several = len({row.runtime for row in timed}) > 1
    files = list(dict.fromkeys((row.precision, row.runtime) for row in timed))
    columns = ["width", "params", "MACs", *(f"{name}, %" for name in known.values())]
    columns += [f"{precision} p50, ms" + (f", {runtime}" if several else "") for precision, runtime in files]
    table = Table(title, [Column(heading) for heading in columns])
    for net in nets:
        cells = [f"{net.width:g}×", scaled(net.params), scaled(net.macs)]
        for key in known:
            one = net.of_net(key)
            cells.append(joined(percent(one.top1), between(one.ci95), by=" ") if one else MISSING)
        for file in files:
            times = [
                milliseconds(row.p50) + (" (rejected)" if row.is_rejected else "")
                for row in timed
                if (row.precision, row.runtime) == file and row.model_dir == net.model_dir
            ]
            cells.append(", ".join(times) or MISSING)
        table.add(*cells)
    return table


def family_in_words(family: Family, rows: Sequence[Row]) -> str:
    """Return what one run gave: how many nets, and widths, accuracies and sizes from end to end."""
    nets = _by_width([rows[index] for index in family.rows])
    parts = []
    for key in comparable_accuracies(nets):
        gains = [(net.width or 0.0, found.top1) for net in nets if (found := net.of_net(key))]
        if len(gains) == len(nets):
            parts.append(_gains_in_words(gains, ACCURACIES[key]))
            break
    for key, name in SIZES.items():
        sizes = [getattr(net, key) for net in nets]
        if None not in sizes:
            parts.append(f"{scaled(sizes[0])} to {scaled(sizes[-1])} {name}")
            break
    low, high = family.widths[0], family.widths[-1]
    return (
        f"One run gave {counted(len(nets), 'net')} ({family.name}), from width {low:g} to {high:g}"
        + (f": {', '.join(parts)}" if parts else "")
        + "."
    )


def _gains_in_words(gains: Sequence[tuple[float, float]], name: str) -> str:
    """Return the accuracy at the narrowest and the widest width, and what lies beyond both between them."""
    (_, first), *inner, (_, last) = gains
    text = f"{percent(first)} to {percent(last)} % {name}"
    beyond = []
    for end, word in ((min, "as low as"), (max, "up to")):
        width, gain = end(gains, key=lambda one: one[1])
        # As written: what rounds to the same is not beyond.
        if (width, gain) in inner and percent(gain) not in (percent(first), percent(last)):
            beyond.append(f"{word} {percent(gain)} % at {width:g}")
    return f"{text} ({', '.join(beyond)})" if beyond else text
