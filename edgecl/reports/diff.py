"""Compare two reports row by row, and check the changes against rules: for a build server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Literal

from edgecl.errors import ArtifactError, counted, printable
from edgecl.reports.collect import collect, read_cleaned
from edgecl.reports.content import Report, report_of
from edgecl.reports.notation import MINUS, MISSING, between, fixed
from edgecl.reports.precisions import Part
from edgecl.reports.rows import Row, row_label
from edgecl.reports.rules import METRICS, Metric, Rule, change_percent
from edgecl.reports.tables import Column, Table
from edgecl.storage.directories import ReportDir
from edgecl.storage.record_files import kind_of
from edgecl.storage.records import Count, Interval, Record, Text, command_line

# A comparison goes on over a change of these, and names it.
_NAMED = {
    "device": "device",
    "power_mode": "power mode",
    "runtime": "runtime",
    "mode": "mode",
    "threads": "threads",
    "batch": "batch",
}
# Latencies under different ones of these do not compare.
_TIMING = ("device", "threads", "batch", "mode")
# What is shown where no rule says what matters.
_SHOWN = ("p50", "p99", "top1", "knn", "j_per_inference", "size")

Pair = tuple[Row, Row]


class Change(Part):
    """A condition that is not the same on both sides."""

    condition: str
    old: str | int | None
    new: str | int | None
    breaks_timing: bool
    """Whether latencies no longer compare."""

    @property
    def in_words(self) -> str:
        """The condition with both its values."""
        was, now = (MISSING if value is None else value for value in (self.old, self.new))
        return f"{self.condition} {was} → {now}"


class Check(Part):
    """One number of OLD and of NEW, and whether it breaks a rule."""

    metric: str
    unit: str
    rule: str | None
    old: float | None
    new: float | None
    old_ci95: Interval | None
    new_ci95: Interval | None
    change: float | None = None
    change_percent: float | None = None
    resolved: bool | None = None
    """Whether the intervals lie apart."""
    broken: bool = False
    words: str = ""


class ComparedRow(Part):
    """A row of OLD and its partner in NEW."""

    label: str
    state: str
    """`in both`, `only in OLD` or `only in NEW`."""
    differ: list[Change]
    checks: list[Check]


class Diff(Record):
    """What `report diff --json` prints: two reports compared."""

    KIND = "report-diff"
    FILE = "report-diff.json"

    kind: Literal["report-diff"] = "report-diff"
    old: Text
    new: Text
    rules: list[Text]
    rows: list[ComparedRow]
    """Each with its checks, and the conditions that differ."""
    checked: Count
    broken: Count
    """How many checks fail."""
    regression: bool
    summary: Text

    @property
    def lines(self) -> list[str]:
        """The rows that only one side has, and the conditions that differ between the two."""
        lines = []
        for row in self.rows:
            if row.state != "in both":
                lines.append(f"{row.state}: {row.label}")
            lines += [f"{row.label}: {change.in_words}" for change in row.differ]
        return lines

    @property
    def table(self) -> Table:
        """One row per number that was compared."""
        headings = ["row", "rule" if self.rules else "metric", "OLD", "NEW", "", "change", ""]
        table = Table("Changes", [Column(heading) for heading in headings])
        for row in self.rows:
            for check in row.checks:
                write = METRICS[check.metric].write
                table.add(
                    row.label,
                    check.rule or check.metric,
                    f"{write(check.old)} {between(check.old_ci95, write)}".strip(),
                    f"{write(check.new)} {between(check.new_ci95, write)}".strip(),
                    check.unit,
                    _change_in_words(check),
                    check.words
                    or {True: "resolved", False: "within the intervals", None: ""}[check.resolved],
                )
        return table


def _change_in_words(check: Check) -> str:
    if check.change is None:
        return MISSING
    if check.unit == "%":
        return f"{_signed(check.change, lambda value: fixed(value, 2))} points"
    if check.change_percent is not None:
        return f"{_signed(check.change_percent, fixed)} %"
    return _signed(check.change, METRICS[check.metric].write)


def _signed(value: float, write: Callable[[float], str]) -> str:
    text = write(abs(value))
    return (MINUS if value < 0 and any(digit in text for digit in "123456789") else "+") + text


def diff(old: Path, new: Path, *, rules: Sequence[Rule] = ()) -> Diff:
    """Compare two reports, or what reports are made of, and name the rules that the changes break.

    Rows are the same where net, target, precision, device, runtime, threads, batch and mode are; names decide
    between several. Rows that then remain are paired by net, target and precision alone where that leaves no
    choice: their accuracy and size compare, their latency does not. A rule is broken by the point estimate;
    whether the intervals of the two overlap is written beside it. A row or value that OLD has and NEW lacks
    breaks every rule that concerns it. Without rules the changes are only shown.

    Raises:
        ArtifactError: nothing to compare, no row of OLD that has a partner in NEW, or a rule that concerns
            no row.
    """
    sides = [_rows_of_side(path) for path in (old, new)]
    for path, rows in zip((old, new), sides, strict=True):
        if not rows:
            raise ArtifactError(
                f"'{path}' holds no net and no bundle to compare",
                hint="give reports, model or bundle directories",
            )
    pairs, only_old, only_new = match(*sides)
    if not pairs:
        raise ArtifactError(
            f"no row of '{old}' has a partner in '{new}'",
            where={"old": _all_labels(sides[0]), "new": _all_labels(sides[1])},
            hint="a pair has the same architecture, width, origin, target and precision",
        )
    labels = _labels(pairs, only_old, only_new)
    sides_by_side = [*pairs, *((row, None) for row in only_old), *((None, row) for row in only_new)]
    compared = [_compared(labels, before, after, rules) for before, after in sides_by_side]
    for rule in rules:
        if not any(check.rule == rule.text for row in compared for check in row.checks):
            side = "OLD" if rule.relative else "NEW"
            raise ArtifactError(
                f"the rule '{rule.text}' concerns no row: {side} knows no {rule.metric.name}",
                where={"old": old, "new": new},
                hint="measure it, or leave the rule out: a check that looks at nothing cannot fail",
            )
    checks = [check for row in compared for check in row.checks if check.rule]
    broken = sum(check.broken for check in checks)
    return Diff(
        made_from=None,
        command=printable(command_line()),
        old=printable(old),
        new=printable(new),
        rules=[rule.text for rule in rules],
        rows=compared,
        checked=len(checks),
        broken=broken,
        regression=broken > 0,
        summary=_summary(rules, len(checks), broken, len(pairs)),
    )


def _summary(rules: Sequence[Rule], checked: int, broken: int, pairs: int) -> str:
    checks = counted(checked, "check")
    if not rules:
        return f"no rule was given: {counted(pairs, 'row')} compared, nothing evaluated"
    if broken:
        return f"regression: {broken} of {checks} {'fails' if broken == 1 else 'fail'}"
    return f"no regression: {checks} {'holds' if checked == 1 else 'hold'}"


def _rows_of_side(path: Path) -> list[Row]:
    if path.is_dir() and kind_of(path) != ReportDir.KIND:
        return report_of(collect([path])).rows
    if not path.exists():
        raise ArtifactError(f"there is no directory '{path}'")
    file = ReportDir(path).record_file if path.is_dir() else path
    return read_cleaned(file, Report).rows


def _library(row: Row) -> str:
    """Return the runtime without its version, which may well be what changed."""
    return (row.runtime or "").partition(" ")[0]


def match(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[Pair], list[Row], list[Row]]:
    """Pair the rows of two reports, from the strictest likeness to the loosest, and return those without a partner."""

    def net(row: Row) -> Hashable:
        return (row.arch, row.width, row.origin, row.target, row.precision)

    def timing(row: Row) -> Hashable:
        return (_library(row), row.device, row.threads, row.batch, row.mode)

    likenesses: list[Callable[[Row], Hashable]] = [
        lambda row: (row.name, row.bundle, net(row), timing(row), row.power_mode),
        lambda row: (row.name, net(row), timing(row), row.power_mode),
        lambda row: (row.name, net(row), timing(row)),
        lambda row: (net(row), timing(row)),
        lambda row: (row.name, net(row)),
        net,
    ]
    left, right = list(range(len(old))), list(range(len(new)))
    partner: dict[int, int] = {}
    for place, likeness in enumerate(likenesses):
        groups: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index in left:
            groups[likeness(old[index])][0].append(index)
        for index in right:
            groups[likeness(new[index])][1].append(index)
        for mine, theirs in groups.values():
            # Of several that are alike, only repeated measurements are paired, in their order.
            if len(mine) == len(theirs) and (len(mine) == 1 or place == 0):
                partner.update(zip(mine, theirs, strict=True))
        left = [index for index in left if index not in partner]
        right = [index for index in right if index not in partner.values()]
    pairs = [(old[index], new[partner[index]]) for index in sorted(partner)]
    return pairs, [old[index] for index in left], [new[index] for index in right]


def _labels(pairs: Sequence[Pair], only_old: Sequence[Row], only_new: Sequence[Row]) -> dict[int, str]:
    """Name each row so that it differs from every other one of either side."""
    olds = [*(before for before, _ in pairs), *only_old]
    labels = {id(row): _label(row, olds) for row in olds}
    labels |= {id(after): labels[id(before)] for before, after in pairs}
    news = [*(after for _, after in pairs), *only_new]
    return labels | {id(row): _label(row, news) for row in only_new}


def _label(row: Row, rows: Sequence[Row]) -> str:
    label = row_label(row, rows)
    precision = row.precision
    return f"{label} · {precision}" if precision and precision not in label.split(" · ") else label


def _all_labels(rows: Sequence[Row]) -> str:
    about = [(row.name, row.arch, row.width, row.origin, row.target, row.precision) for row in rows[:4]]
    parts = [", ".join(str(value) for value in one if value is not None) for one in about]
    return "; ".join(parts) + ("; …" if len(rows) > 4 else "")


def _compared(labels: dict[int, str], old: Row | None, new: Row | None, rules: Sequence[Rule]) -> ComparedRow:
    differ = _differing(old, new) if old is not None and new is not None else []
    apart = ", ".join(change.in_words for change in differ if change.breaks_timing)
    wanted: list[tuple[Metric, Rule | None]] = [(rule.metric, rule) for rule in rules]
    if not rules:
        wanted = [(METRICS[name], None) for name in _SHOWN]
    checks = [_check(metric, rule, old, new, apart) for metric, rule in wanted]
    return ComparedRow(
        label=labels[id(new if old is None else old)],
        state="only in OLD" if new is None else "only in NEW" if old is None else "in both",
        differ=differ,
        checks=[check for check in checks if check],
    )


def _differing(old: Row, new: Row) -> list[Change]:
    """Return the conditions that are not the same, and whether latencies still compare."""
    found = []
    for key, name in _NAMED.items():
        a, b = getattr(old, key), getattr(new, key)
        if a != b and old.latency_ms and new.latency_ms:
            breaks = key in _TIMING or (key == "runtime" and _library(old) != _library(new))
            found.append(Change(condition=name, old=a, new=b, breaks_timing=breaks))
    states = [row.decision.state if row.decision else None for row in (old, new)]
    if states[0] != states[1]:
        found.append(Change(condition="decision", old=states[0], new=states[1], breaks_timing=False))
    data = [row.accuracy.data if row.accuracy else None for row in (old, new)]
    if all(data) and data[0] != data[1]:
        found.append(Change(condition="test images", old=data[0], new=data[1], breaks_timing=False))
    return found


def _check(metric: Metric, rule: Rule | None, old: Row | None, new: Row | None, apart: str) -> Check | None:
    """Compare one number of a pair and check it against a rule; None where the rule does not concern the pair.

    Latencies that do not compare are `apart`, for reasons in words.
    """
    before, after = (None if row is None else metric.read(row) for row in (old, new))
    if before is None and (after is None or (rule and rule.relative)):
        return None
    a, b = (None if row is None else metric.interval(row) for row in (old, new))
    check = Check(
        metric=metric.name,
        unit=metric.unit,
        rule=rule.text if rule else None,
        old=before,
        new=after,
        old_ci95=a,
        new_ci95=b,
    )
    if not metric.timed:
        apart = ""
    if before is not None and after is not None and not apart:
        percent = change_percent(before, after)
        check.change = after - before
        check.change_percent = percent if abs(percent) != float("inf") else None
        check.resolved = (a[1] < b[0] or b[1] < a[0]) if a and b else None
    if rule is None:
        check.words = apart
        return check
    check.broken, check.words = _evaluated(rule, before, after, new, apart)
    if rule.relative and check.resolved is False:
        check.words += ", within the intervals"
    return check


def _evaluated(
    rule: Rule, before: float | None, after: float | None, new: Row | None, apart: str
) -> tuple[bool, str]:
    if new is None:
        return True, "fails: no row of NEW matches it"
    if after is None:
        return True, f"fails: NEW has no {rule.metric.name}"
    if rule.relative and apart:
        return True, f"fails: not comparable, {apart}"
    broken = rule.broken(before, after)
    return broken, "fails" if broken else "holds"
