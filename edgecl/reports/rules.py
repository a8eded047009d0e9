"""The rules of `edgecl report diff`: what counts as a regression, as in "p50>+5%,top1<-0.5"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from edgecl.errors import near_matches
from edgecl.reports.notation import megabytes, milliseconds, per_second, percent, scaled
from edgecl.reports.rows import Row
from edgecl.storage.records import Interval

# A float's last digits must not decide whether 1.05 ms is more than 5 % above 1 ms.
_SLACK = 1e-9


@dataclass(frozen=True)
class Metric:
    """One number of a row that a rule may be about."""

    name: str
    unit: str
    write: Callable[[float | None], str]
    read: Callable[[Row], float | None]
    interval: Callable[[Row], Interval | None] = lambda row: None
    timed: bool = False
    """Whether it holds for one device and way of timing only."""


def _latency(key: str) -> Metric:
    def read(name: str) -> Callable[[Row], Any]:
        return lambda row: getattr(row.latency_ms, name, None)

    return Metric(key, "ms", milliseconds, read(key), read(f"ci95_{key}"), timed=True)


def _accuracy(name: str, key: str) -> Metric:
    def read(part: str) -> Callable[[Row], Any]:
        return lambda row: getattr(row.gain(key), part, None)

    return Metric(name, "%", percent, read("top1"), read("ci95"))


METRICS = {
    metric.name: metric
    for metric in (
        *map(_latency, ("p50", "p90", "p99", "mean")),
        Metric("throughput", "images/s", per_second, attrgetter("throughput_per_s"), timed=True),
        Metric("j_per_inference", "J", milliseconds, attrgetter("j_per_inference"), timed=True),
        _accuracy("top1", "finetuned"),
        *(_accuracy(name, name) for name in ("knn", "linear", "few_label")),
        Metric(
            "size",
            "MB",
            lambda value: megabytes(None if value is None else 1e6 * value),
            lambda row: None if row.onnx_bytes is None else row.onnx_bytes / 1e6,
        ),
        Metric("macs", "MACs", scaled, attrgetter("macs")),
        Metric("params", "parameters", scaled, attrgetter("params")),
    )
}


class RuleError(ValueError):
    """A rule that cannot be read."""


@dataclass(frozen=True)
class Rule:
    """One rule, such as p50>+5%: it is broken where the comparison holds."""

    text: str
    metric: Metric
    above: bool
    """Broken above the limit; else below it."""
    limit: float
    kind: str
    """`value`: of NEW itself; `difference`: of NEW minus OLD; `percent`: of that in percent of OLD."""

    @property
    def relative(self) -> bool:
        """Whether the rule needs OLD."""
        return self.kind != "value"

    def broken(self, old: float | None, new: float) -> bool:
        """Return whether a pair of values breaks the rule; a relative one needs the old value."""
        value = new
        if self.relative:
            assert old is not None
            value = new - old if self.kind == "difference" else change_percent(old, new)
        slack = _SLACK * max(1.0, abs(self.limit))
        return value > self.limit + slack if self.above else value < self.limit - slack


def change_percent(old: float, new: float) -> float:
    """Return the change in percent of the old value; infinite where that is zero and the new one is not."""
    if old == 0:
        return 0.0 if new == 0 else float("inf") if new > 0 else float("-inf")
    return 100 * (new - old) / abs(old)


_RULE = re.compile(
    r"(?P<metric>[a-z0-9_]+)\s*(?P<sign>[<>])\s*(?P<limit>[+-]?\d+(?:\.\d+)?)\s*(?P<percent>%?)"
)

GRAMMAR = "METRIC>LIMIT or METRIC<LIMIT, such as p50>+5%, top1<-0.5 or p50>2.0"


def parse_rules(text: str) -> list[Rule]:
    """Read rules separated by commas; a limit without a sign is a value of NEW itself.

    Raises:
        RuleError: no rule, or one that cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise RuleError(f"there is no rule in '{text}'; write {GRAMMAR}")
    return [_parse_rule(part) for part in parts if part]


def _parse_rule(part: str) -> Rule:
    match = _RULE.fullmatch(part)
    if match is None:
        raise RuleError(f"'{part}' is not a rule; write {GRAMMAR}")
    name, limit = match["metric"], match["limit"]
    if name not in METRICS:
        raise RuleError(f"'{part}' is about '{name}', which no report knows; {near_matches(name, METRICS)}")
    signed = limit[0] in "+-"
    if match["percent"] and not signed:
        raise RuleError(
            f"'{part}' has a percentage without a sign; write '{name}{match['sign']}+{limit}%' or "
            f"'{name}{match['sign']}-{limit}%' for a change, or leave out the % for a value of NEW itself"
        )
    kind = "percent" if match["percent"] else "difference" if signed else "value"
    return Rule(part, METRICS[name], match["sign"] == ">", float(limit), kind)
