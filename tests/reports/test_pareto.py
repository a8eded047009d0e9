"""The Pareto front, and which rows compete on it."""

from __future__ import annotations

import json

import pytest

from edgecl.reports.pareto import pareto_front
from reports.conftest import report


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 50.0)], [0]),
        ([(1.0, 50.0), (2.0, 60.0)], [0, 1]),
        ([(2.0, 50.0), (1.0, 60.0)], [1]),
        ([(3.0, 70.0), (1.0, 50.0), (2.0, 49.0), (2.0, 60.0), (2.5, 60.0)], [1, 3, 0]),
        ([(1.0, 50.0), (1.0, 50.0)], [0, 1]),
        ([(1.0, 50.0), (1.0, 51.0)], [1]),
        ([], []),
    ],
)
def test_pareto_front_holds_what_nothing_beats(points, front):
    assert pareto_front(points) == front


def nets(make, base, numbers, **bench):
    dirs = []
    for place, (accuracy, p50) in enumerate(numbers):
        net = make.model(
            base / f"net-{place}", draws=[accuracy - 1, accuracy, accuracy + 1], width=0.25 + place
        )
        dirs += [net, make.bundle(base / f"bundle-{place}", model=net, p50=p50, **bench)]
    return dirs


def test_rows_know_whether_they_are_on_the_front(make, tmp_path):
    dirs = nets(make, tmp_path, [(50.0, 1.0), (60.0, 2.0), (55.0, 3.0)])
    record = report(dirs, out=tmp_path / "report")
    assert [row["on_pareto_front"] for row in record["rows"]] == [True, True, False]
    assert record["trade_off"]["label"] == "few-label top-1, 5 labels per class"


def test_untimed_net_is_no_point_but_a_tick(make, tmp_path):
    dirs = nets(make, tmp_path, [(50.0, 1.0)])
    dirs.append(make.model(tmp_path / "other"))
    record = report(dirs, out=tmp_path / "report")
    assert record["rows"][1]["on_pareto_front"] is None
    assert "other, not timed" in (tmp_path / "report" / "report.html").read_text()


def test_few_label_accuracies_at_different_label_counts_are_not_set_side_by_side(make, tmp_path):
    dirs = nets(make, tmp_path, [(50.0, 1.0), (60.0, 2.0)])
    probe = dirs[0] / "probe.json"
    content = json.loads(probe.read_text())
    content["few_label_top1"]["labels_per_class"] = 1
    probe.write_text(json.dumps(content))
    assert report(dirs, out=tmp_path / "report")["trade_off"]["accuracy"] == "linear"


def test_precisions_of_one_device_compete_and_a_rejected_one_is_on_no_front(make, tmp_path):
    precisions = {
        "fp32": make.precision("fp32", accuracy=make.top1(77.0)),
        "fp16": make.precision("fp16", accuracy=make.top1(76.0)),
        "int8": make.precision(
            "int8", accuracy=make.top1(72.0), decision={"kept": False, "words": "rejected", "kept_nodes": []}
        ),
    }
    bundle = make.bundle(tmp_path / "bundle", model=None, p50=None, precisions=precisions)
    times = [make.measurement("fp32", 2.0), make.measurement("fp16", 1.0), make.measurement("int8", 0.5)]
    make.bench(bundle, device="board", measurements=times)
    record = report([bundle], out=tmp_path / "report")
    assert {row["precision"]: row["on_pareto_front"] for row in record["rows"]} == {
        "fp32": True,
        "fp16": True,
        "int8": False,
    }
    assert record["trade_off"]["label"] == "top-1"


def test_front_of_nothing_but_rejected_precisions_is_empty_and_still_drawn(make, tmp_path):
    bad = make.precision("int8", accuracy=make.top1(60.0), decision={"kept": False, "words": "rejected"})
    bundle = make.bundle(tmp_path / "bundle", model=None, p50=None, precisions={"int8": bad})
    make.bench(bundle, device="board", measurements=[make.measurement("int8", 0.5)])
    record = report([bundle], out=tmp_path / "report")
    assert [group["front"] for group in record["trade_off"]["groups"]] == [[]]
    assert (
        "A cross is a precision whose decision is rejected"
        in (tmp_path / "report" / "report.html").read_text()
    )


@pytest.mark.parametrize(
    ("devices", "modes"),
    [(("board", "board"), ("compute", "with transfers")), (("laptop", "board"), ("compute", "compute"))],
)
def test_devices_and_modes_that_time_other_things_do_not_compete(make, tmp_path, devices, modes):
    for place, (device, mode) in enumerate(zip(devices, modes, strict=True)):
        bundle = make.bundle(
            tmp_path / f"b{place}",
            model=None,
            p50=None,
            precisions={"fp32": make.precision("fp32", accuracy=make.top1(70.0 - place))},
        )
        make.bench(bundle, device=device, measurements=[make.measurement("fp32", 1.0 + place, mode=mode)])
    record = report([tmp_path / "b0", tmp_path / "b1"], out=tmp_path / "report")
    assert [row["on_pareto_front"] for row in record["rows"]] == [True, True]


def test_accuracy_measured_on_the_files_is_charted_before_the_nets_own(make, tmp_path):
    net = make.model(tmp_path / "net")
    accuracy = make.top1(61.0, metric="knn_top1")
    bundle = make.bundle(
        tmp_path / "bundle", model=net, precisions={"fp32": make.precision("fp32", accuracy=accuracy)}
    )
    record = report([net, bundle], out=tmp_path / "report")
    assert record["trade_off"]["accuracy"] == "knn"
