"""The rules of `edgecl report diff`."""

from __future__ import annotations

import pytest

from edgecl.reports.rules import RuleError, parse_rules


@pytest.mark.parametrize(
    ("text", "old", "new", "broken"),
    [
        ("p50>+5%", 1.0, 1.0500001, True),
        ("p50>+5%", 1.0, 1.05, False),  # 100 * (1.05 - 1) is a little more than 5 in floats
        ("p50>+5%", 1.0, 0.5, False),
        ("p50>-10%", 1.0, 0.95, True),  # asks for a speed-up of 10 %
        ("p50>-10%", 1.0, 0.85, False),
        ("p50>+0.2", 1.0, 1.3, True),
        ("p50>+0.2", 1.0, 1.2, False),
        ("p50>2.0", 5.0, 1.9, False),
        ("p50>2.0", 1.0, 2.1, True),
        ("p50>2.0", None, 2.1, True),
        ("top1<-0.5", 70.0, 69.4, True),
        ("top1<-0.5", 70.0, 69.5, False),
        ("top1<-0.5", 70.0, 75.0, False),
        ("top1<70", 80.0, 69.9, True),
        ("top1<-1%", 50.0, 49.6, False),
        ("top1<-1%", 50.0, 49.4, True),
        ("throughput<-5%", 100.0, 94.0, True),
        ("macs>+0%", 100.0, 100.0, False),
        ("macs>+0%", 100.0, 101.0, True),
        ("macs>+5%", 0.0, 1.0, True),
        ("macs>+5%", 0.0, 0.0, False),
    ],
)
def test_rule_is_broken_exactly_beyond_its_limit(text, old, new, broken):
    (rule,) = parse_rules(text)
    assert rule.broken(old, new) is broken


def test_rules_are_parted_by_commas_and_spaces_do_not_matter():
    rules = parse_rules("p50 > +5% , top1<-0.5,")
    assert [(rule.metric.name, rule.above, rule.limit, rule.kind) for rule in rules] == [
        ("p50", True, 5.0, "percent"),
        ("top1", False, -0.5, "difference"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no rule in ''; write METRIC>LIMIT or METRIC<LIMIT"),
        ("p50", "'p50' is not a rule; write METRIC>LIMIT or METRIC<LIMIT, such as p50>\\+5%"),
        ("p50>=5", "'p50>=5' is not a rule"),
        ("p50>nan", "'p50>nan' is not a rule"),
        (" , ", "there is no rule"),
        ("p50>+5%;top1<-1", "is not a rule"),
        ("p55>+5%", "'p55>\\+5%' is about 'p55', which no report knows; did you mean 'p50'"),
        (
            "speed>+5%",
            "'speed>\\+5%' is about 'speed', which no report knows; known: few_label, j_per_inference",
        ),
        ("p50>5%", "'p50>5%' has a percentage without a sign; write 'p50>\\+5%' or 'p50>-5%'"),
    ],
)
def test_rule_that_cannot_be_read_says_how_to_write_it(text, words):
    with pytest.raises(RuleError, match=words):
        parse_rules(text)
