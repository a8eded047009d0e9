"""What changed between two reports, and which changes break a rule."""

from __future__ import annotations

import pytest

from edgecl.errors import ArtifactError
from edgecl.reports.diff import diff as compare
from edgecl.reports.rules import parse_rules
from reports.conftest import report


def diff(*sides, rules=()):
    """What `edgecl report diff --json` prints."""
    return compare(*sides, rules=rules).to_json()


def bundle_of(make, path, times, **how):
    """A bundle with measured precisions: name -> (p50 in ms, top-1)."""
    precisions = {name: make.precision(name, accuracy=make.top1(top1)) for name, (_, top1) in times.items()}
    bundle = make.bundle(path, model=None, p50=None, precisions=precisions)
    measurements = [make.measurement(name, p50) for name, (p50, _) in times.items() if p50 is not None]
    if measurements:
        make.bench(bundle, device=how.pop("device", "board"), measurements=measurements, **how)
    return bundle


def evaluated(record):
    return {
        (row["label"].split(" · ")[-1], check["rule"]): (check["broken"], check["words"])
        for row in record["rows"]
        for check in row["checks"]
    }


def test_each_precision_is_held_to_each_rule(make, tmp_path):
    old = bundle_of(make, tmp_path / "old", {"fp32": (2.0, 77.0), "int8": (1.0, 76.5)})
    new = bundle_of(make, tmp_path / "new", {"fp32": (2.02, 77.2), "int8": (1.2, 75.9)})
    record = diff(old, new, rules=parse_rules("p50>+5%,top1<-0.5"))
    assert evaluated(record) == {
        ("fp32", "p50>+5%"): (False, "holds, within the intervals"),
        ("fp32", "top1<-0.5"): (False, "holds, within the intervals"),
        ("int8", "p50>+5%"): (True, "fails"),
        ("int8", "top1<-0.5"): (True, "fails, within the intervals"),
    }
    assert (record["checked"], record["broken"], record["regression"]) == (4, 2, True)
    assert record["summary"] == "regression: 2 of 4 checks fail"


def test_reports_their_files_and_what_they_are_made_from_all_compare(make, tmp_path):
    old = bundle_of(make, tmp_path / "old", {"fp32": (2.0, 77.0)})
    new = bundle_of(make, tmp_path / "new", {"fp32": (3.0, 77.0)})
    for name in ("old", "new"):
        report([tmp_path / name], out=tmp_path / f"{name}-report")
    rules = parse_rules("p50>+5%")
    expected = diff(old, new, rules=rules)["rows"]
    assert expected[0]["checks"][0]["change_percent"] == pytest.approx(50)
    assert diff(tmp_path / "old-report", tmp_path / "new-report", rules=rules)["rows"] == expected
    assert diff(tmp_path / "old-report" / "report.json", new, rules=rules)["rows"] == expected


def test_report_against_itself_is_no_regression(make, tmp_path):
    bundle = make.compiled(tmp_path / "bundle", model=None)
    record = diff(bundle, bundle, rules=parse_rules("p50>+0%,p99>+0%,top1<-0,size>+0,j_per_inference>+0%"))
    assert (record["broken"], record["checked"]) == (0, 15)
    assert all(row["differ"] == [] for row in record["rows"])


def test_precision_that_vanished_breaks_every_rule_about_it(make, tmp_path):
    old = bundle_of(make, tmp_path / "old", {"fp32": (2.0, 77.0), "int8": (1.0, 76.5)})
    new = bundle_of(make, tmp_path / "new", {"fp32": (2.0, 77.0)})
    record = diff(old, new, rules=parse_rules("p50>+5%,top1<1"))
    assert evaluated(record)["int8", "p50>+5%"] == (True, "fails: no row of NEW matches it")
    assert evaluated(record)["int8", "top1<1"] == (True, "fails: no row of NEW matches it")
    assert [row["state"] for row in record["rows"]] == ["in both", "only in OLD"]


def test_number_that_vanished_breaks_the_rules_about_it_only(make, tmp_path):
    old = bundle_of(make, tmp_path / "old", {"fp32": (2.0, 77.0)})
    new = bundle_of(make, tmp_path / "new", {"fp32": (None, 77.0)})
    record = diff(old, new, rules=parse_rules("p50>+5%,top1<-0.5"))
    assert evaluated(record) == {
        ("fp32", "p50>+5%"): (True, "fails: NEW has no p50"),
        ("fp32", "top1<-0.5"): (False, "holds, within the intervals"),
    }


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"threads": 2}, "threads 1 → 2"),
        ({"device": "other"}, "device board → other"),
        ({"runtime": "openvino 2026.4"}, "runtime onnxruntime 1.31.1 CPUExecutionProvider → openvino 2026.4"),
    ],
)
def test_latency_measured_under_other_conditions_fails_by_name_and_accuracy_still_compares(
    make, tmp_path, how, words
):
    old = bundle_of(make, tmp_path / "old", {"fp32": (2.0, 77.0)})
    new = bundle_of(make, tmp_path / "new", {"fp32": (1.0, 77.0)}, **how)
    record = diff(old, new, rules=parse_rules("p50>+5%,top1<-0.5"))
    assert evaluated(record)["fp32", "p50>+5%"] == (True, f"fails: not comparable, {words}")
    assert evaluated(record)["fp32", "top1<-0.5"][0] is False
    check = record["rows"][0]["checks"][0]
    assert (check["change"], check["resolved"]) == (None, None)


def test_other_version_or_power_mode_is_named_and_compared(make, tmp_path):
    old = bundle_of(make, tmp_path / "old", {"fp32": (2.0, 77.0)}, power_mode="15W")
    new = bundle_of(
        make,
        tmp_path / "new",
        {"fp32": (1.0, 77.0)},
        power_mode="MAXN",
        runtime="onnxruntime 1.32.0 CPUExecutionProvider",
    )
    record = diff(old, new, rules=parse_rules("p50>+5%"))
    assert [(one["condition"], one["old"], one["new"]) for one in record["rows"][0]["differ"]] == [
        ("power mode", "15W", "MAXN"),
        ("runtime", "onnxruntime 1.31.1 CPUExecutionProvider", "onnxruntime 1.32.0 CPUExecutionProvider"),
    ]
    assert record["broken"] == 0


def test_accuracies_of_different_pictures_are_named(make, tmp_path):
    bundles = []
    for name, data in (("old", "held-out/"), ("new", "train/")):
        precisions = {"fp32": make.precision("fp32", accuracy={**make.top1(77.0), "data": data})}
        bundles.append(make.bundle(tmp_path / name, model=None, p50=None, precisions=precisions))
    record = diff(*bundles, rules=parse_rules("top1<-0.5"))
    assert record["rows"][0]["differ"] == [
        {"condition": "test images", "old": "held-out/", "new": "train/", "breaks_timing": False}
    ]


def test_decision_that_changed_is_named(make, tmp_path):
    old = make.compiled(tmp_path / "old", model=None)
    new = make.compiled(tmp_path / "new", model=None, reject=True)
    record = diff(old, new)
    assert [one for row in record["rows"] for one in row["differ"]] == [
        {"condition": "decision", "old": "kept in part", "new": "rejected", "breaks_timing": False}
    ]


def test_two_bundles_that_are_alike_are_told_apart_by_name_or_not_paired(make, tmp_path):
    for side, names in (("old", "ab"), ("new", "ab"), ("renamed", "dc")):
        for place, name in enumerate(names):
            bundle_of(make, tmp_path / side / name, {"fp32": (1.0 + place, 77.0)})
        report([tmp_path / side / name for name in sorted(names)], out=tmp_path / side / "report")
    old, new, renamed = (tmp_path / side / "report" for side in ("old", "new", "renamed"))
    assert diff(old, new, rules=parse_rules("p50>+1%"))["broken"] == 0
    with pytest.raises(ArtifactError, match=r"no row of '.*' has a partner in '.*'"):
        diff(old, renamed, rules=parse_rules("p50>+1%"))


def test_nothing_in_common_is_an_error(make, tmp_path):
    old = bundle_of(make, tmp_path / "old", {"fp32": (2.0, 77.0)})
    new = bundle_of(make, tmp_path / "new", {"int8": (2.0, 77.0)})
    with pytest.raises(
        ArtifactError, match=r"no row of(.|\n)*old, mobilenetv1_100, 0\.25, pretrained, ort-cpu, fp32"
    ):
        diff(old, new)


def test_rule_that_concerns_no_row_is_an_error(make, tmp_path):
    bundle = bundle_of(make, tmp_path / "bundle", {"fp32": (2.0, 77.0)})
    with pytest.raises(ArtifactError, match="concerns no row: OLD knows no j_per_inference"):
        diff(bundle, bundle, rules=parse_rules("p50>+5%,j_per_inference>+5%"))


def test_accuracy_of_the_net_is_not_taken_for_that_of_int8(make, tmp_path):
    net = make.model(tmp_path / "net", top1=77.0)
    int8 = {"int8": make.precision("int8")}
    bundle = make.bundle(tmp_path / "bundle", model=net, precisions=int8, p50=None)
    report([net, bundle], out=tmp_path / "report")
    with pytest.raises(ArtifactError, match=r"the rule 'top1<-0.5' concerns no row"):
        diff(tmp_path / "report", tmp_path / "report", rules=parse_rules("top1<-0.5"))


def test_file_that_is_no_report_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArtifactError, match="report"):
        diff(tmp_path / "x.json", tmp_path / "x.json")
