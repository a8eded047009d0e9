"""Compare two reports row by row, and hold the changes to rules: for a build server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgecl.errors import ArtifactError, printable
from edgecl.reports.collect import collect
from edgecl.reports.report import report_record
from edgecl.reports.rows import Row, row_label
from edgecl.reports.rules import METRICS, Metric, Rule, change_percent
from edgecl.storage.directories import ReportDir
from edgecl.storage.raw_records import read_record, record_header
from edgecl.storage.reading import kind_of, read_json

# What a net and its file are called, and under which conditions a latency was measured.
_NET = ("arch", "width", "origin", "target", "precision")
_TIMING = ("device", "threads", "batch", "mode")
# A comparison goes on over a change of these, and names it.
_NAMED = {
    "device": "device",
    "power_mode": "power mode",
    "runtime": "runtime",
    "mode": "mode",
    "threads": "threads",
    "batch": "batch",
}
# What is shown where no rule says what matters.
_SHOWN = ("p50", "p99", "top1", "knn", "j_per_inference", "size")

Pair = tuple[Row, Row]


def diff(old: Path, new: Path, *, rules: Sequence[Rule] = ()) -> dict[str, Any]:
    """Compare two reports, or what reports are made of, and say which rules the changes break.

    Rows are the same where net, target, precision, device, runtime, threads, batch and mode are; names decide
    between several. Rows that then remain are paired by net, target and precision alone where that leaves no
    choice: their accuracy and size compare, their latency does not. A rule is broken by the point estimate;
    whether the intervals of the two overlap is said beside it. A row or value that OLD has and NEW lacks
    breaks every rule that concerns it.

    Args:
        old: a report's directory, its report.json, or a run, model, bundle or pipeline directory.
        new: the same.
        rules: what counts as a regression; none only shows the changes.

    Returns:
        A record: `rows` with their `checks` and the conditions that `differ`, `checked` and `broken` counts,
        `regression`, and `summary` in words.

    Raises:
        ArtifactError: nothing to compare, no row of OLD that has a partner in NEW, or a rule that concerns
            no row.
    """
    sides = [_rows_of_side(path) for path in (old, new)]
    for path, rows in zip((old, new), sides, strict=True):
        if not rows:
            raise ArtifactError(
                f"'{printable(path)}' holds no net and no bundle to compare",
                hint="give reports, model or bundle directories",
            )
    pairs, only_old, only_new = match(*sides)
    if not pairs:
        raise ArtifactError(
            f"no row of '{printable(old)}' has a partner in '{printable(new)}'",
            where={"old": _all_labels(sides[0]), "new": _all_labels(sides[1])},
            hint="a pair has the same architecture, width, origin, target and precision",
        )
    labels = _labels(pairs, only_old, only_new)
    compared = [_compared(labels, before, after, rules) for before, after in pairs]
    compared += [_compared(labels, before, None, rules) for before in only_old]
    compared += [_compared(labels, None, after, rules) for after in only_new]
    for rule in rules:
        if not any(check["rule"] == rule.text for row in compared for check in row["checks"]):
            raise ArtifactError(
                f"the rule '{rule.text}' concerns no row: "
                + (
                    f"OLD knows no {rule.metric.name}"
                    if rule.relative
                    else f"NEW knows no {rule.metric.name}"
                ),
                where={"old": printable(old), "new": printable(new)},
                hint="measure it, or leave the rule out: a check that looks at nothing cannot fail",
            )
    checks = [check for row in compared for check in row["checks"] if check["rule"]]
    broken = sum(check["broken"] for check in checks)
    header = record_header("report-diff", made_from=None)
    return {
        **header,
        "command": printable(header["command"]),
        "old": printable(old),
        "new": printable(new),
        "rules": [rule.text for rule in rules],
        "rows": compared,
        "checked": len(checks),
        "broken": broken,
        "regression": broken > 0,
        "summary": _summary(rules, len(checks), broken, len(pairs)),
    }


def _summary(rules: Sequence[Rule], checked: int, broken: int, pairs: int) -> str:
    checks = "1 check" if checked == 1 else f"{checked} checks"
    if not rules:
        return f"no rule was given: {'1 row' if pairs == 1 else f'{pairs} rows'} compared, nothing evaluated"
    if broken:
        return f"regression: {broken} of {checks} {'fails' if broken == 1 else 'fail'}"
    return f"no regression: {checks} {'holds' if checked == 1 else 'hold'}"


def _rows_of_side(path: Path) -> list[Row]:
    path = Path(path)
    if path.is_file():
        record = read_record(path, kind="report") if _is_report(path) else None
        if record is None:
            raise ArtifactError(
                f"'{printable(path)}' is a file, but not the report.json of a report",
                hint="`edgecl report DIR ... --out DIR` writes one",
            )
    elif path.is_dir() and kind_of(path) == ReportDir.KIND:
        record = read_record(ReportDir(path).record_file, kind="report")
    else:
        record = report_record(collect([path]))
    rows = record.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _is_report(path: Path) -> bool:
    try:
        record = read_json(path)
    except ArtifactError:
        return False
    return isinstance(record, dict) and record.get("kind") == ReportDir.KIND


def _family(row: Row) -> str:
    """Return the runtime without its version, which may well be what changed."""
    return str(row.get("runtime") or "").partition(" ")[0]


def match(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[Pair], list[Row], list[Row]]:
    """Pair the rows of two reports, from the strictest likeness to the loosest.

    Returns:
        The pairs in OLD's order, and the rows of OLD and of NEW without a partner.
    """

    def net(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in _NET)

    def timing(row: Row) -> tuple[Any, ...]:
        return (_family(row), *(row.get(key) for key in _TIMING))

    likenesses: list[Callable[[Row], tuple[Any, ...]]] = [
        lambda row: (row.get("name"), row.get("bundle"), net(row), timing(row), row.get("power_mode")),
        lambda row: (row.get("name"), net(row), timing(row), row.get("power_mode")),
        lambda row: (row.get("name"), net(row), timing(row)),
        lambda row: (net(row), timing(row)),
        lambda row: (row.get("name"), net(row)),
        lambda row: net(row),
    ]
    left, right = list(range(len(old))), list(range(len(new)))
    partner: dict[int, int] = {}
    for place, likeness in enumerate(likenesses):
        groups: dict[tuple[Any, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index in left:
            groups[likeness(old[index])][0].append(index)
        for index in right:
            groups[likeness(new[index])][1].append(index)
        for mine, theirs in groups.values():
            # Two that are alike are never paired by chance, but of measurements that were only repeated, in order.
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
    label = row_label(_whole(row), [_whole(one) for one in rows])
    precision = row.get("precision")
    return f"{label} · {precision}" if precision and precision not in label.split(" · ") else label


def _whole(row: Row) -> Row:
    """Fill in what an earlier edgecl's report.json does not have."""
    keys = ("name", "bundle", "precision", "device", "power_mode", "runtime", "mode", "threads", "batch")
    return {key: row.get(key) for key in keys}


def _all_labels(rows: Sequence[Row]) -> str:
    parts = [
        ", ".join(str(row[key]) for key in ("name", *_NET) if row.get(key) is not None) for row in rows[:4]
    ]
    return "; ".join(parts) + ("; …" if len(rows) > 4 else "")


def _compared(
    labels: dict[int, str], old: Row | None, new: Row | None, rules: Sequence[Rule]
) -> dict[str, Any]:
    row = old if old is not None else new
    assert row is not None
    differ = _differing(old, new) if old is not None and new is not None else []
    apart = [one for one in differ if one["breaks_timing"]]
    wanted: list[tuple[Metric, Rule | None]] = [(rule.metric, rule) for rule in rules]
    if not rules:
        wanted = [(METRICS[name], None) for name in _SHOWN]
    checks = [
        check for metric, rule in wanted if (check := _check(metric, rule, old, new, apart)) is not None
    ]
    state = "only in OLD" if new is None else "only in NEW" if old is None else "in both"
    return {"label": labels[id(row)], "state": state, "differ": differ, "checks": checks}


def _differing(old: Row, new: Row) -> list[dict[str, Any]]:
    """Name the conditions that are not the same, and whether latencies still compare."""
    both_timed = bool(old.get("latency_ms")) and bool(new.get("latency_ms"))
    found = []
    for key, name in _NAMED.items():
        a, b = old.get(key), new.get(key)
        if a == b or not both_timed:
            continue
        breaks = key in _TIMING or (key == "runtime" and _family(old) != _family(new))
        found.append({"condition": name, "old": a, "new": b, "breaks_timing": breaks})
    a, b = ((row.get("decision") or {}).get("state") for row in (old, new))
    if a != b:
        found.append({"condition": "decision", "old": a, "new": b, "breaks_timing": False})
    a, b = ((row.get("accuracy") or {}).get("data") for row in (old, new))
    if a and b and a != b:
        found.append({"condition": "test images", "old": a, "new": b, "breaks_timing": False})
    return found


def _check(
    metric: Metric, rule: Rule | None, old: Row | None, new: Row | None, apart: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Compare one number of a pair, and hold it to a rule; None where the rule does not concern the pair."""
    before = metric.read(old) if old is not None else None
    after = metric.read(new) if new is not None else None
    if before is None and (after is None or (rule and rule.relative)):
        return None
    intervals = [metric.interval(row) if row is not None else None for row in (old, new)]
    check: dict[str, Any] = {
        "metric": metric.name,
        "unit": metric.unit,
        "rule": rule.text if rule else None,
        "old": before,
        "new": after,
        "old_ci95": intervals[0],
        "new_ci95": intervals[1],
        "change": None,
        "change_percent": None,
        "resolved": None,
        "broken": False,
        "words": "",
    }
    comparable = not (metric.timed and apart)
    if before is not None and after is not None and comparable:
        percent = change_percent(before, after)
        check["change"] = after - before
        check["change_percent"] = percent if abs(percent) != float("inf") else None
        check["resolved"] = _resolved(*intervals)
    if rule is None:
        check["words"] = "" if comparable else _apart_in_words(apart)
        return check
    check["broken"], words = _evaluated(rule, before, after, new, comparable, apart)
    noise = {True: "", None: "", False: ", within the intervals"}[check["resolved"]]
    check["words"] = words + (noise if rule.relative else "")
    return check


def _evaluated(
    rule: Rule,
    before: float | None,
    after: float | None,
    new: Row | None,
    comparable: bool,
    apart: Sequence[dict[str, Any]],
) -> tuple[bool, str]:
    if new is None:
        return True, "fails: no row of NEW matches it"
    if after is None:
        return True, f"fails: NEW has no {rule.metric.name}"
    if rule.relative and not comparable:
        return True, f"fails: not comparable, {_apart_in_words(apart)}"
    broken = rule.broken(before, after)
    return broken, "fails" if broken else "holds"


def _apart_in_words(apart: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{one['condition']} {one['old']} → {one['new']}" for one in apart)


def _resolved(a: list[float] | None, b: list[float] | None) -> bool | None:
    """Say whether two intervals lie apart; None where one is not known."""
    if not a or not b:
        return None
    return a[1] < b[0] or b[1] < a[0]
