"""The Pareto front, and which rows compete on it."""

from __future__ import annotations

import pytest

from edgecl.report.report import report
from edgecl.report.rows import pareto_front


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


def test_devices_do_not_compete(make, tmp_path):
    dirs = nets(make, tmp_path / "a", [(50.0, 1.0)], device="laptop")
    dirs += nets(make, tmp_path / "b", [(49.0, 9.0)], device="board")
    record = report(dirs, out=tmp_path / "report")
    assert [row["on_pareto_front"] for row in record["rows"]] == [True, True]


def test_net_timed_on_two_devices_is_two_rows_named_apart(make, tmp_path):
    dirs = nets(make, tmp_path, [(50.0, 1.0)], device="laptop")
    make.bench(dirs[1], p50=8.0, p99=None, device="board")
    record = report(dirs, out=tmp_path / "report")
    assert [(row["device"], row["latency_ms"]["p50"]) for row in record["rows"]] == [
        ("board", 8.0),
        ("laptop", 1.0),
    ]
    assert "net-0 · board" in (tmp_path / "report" / "report.html").read_text()


def test_untimed_net_is_no_point_but_a_tick(make, tmp_path):
    dirs = nets(make, tmp_path, [(50.0, 1.0)])
    dirs.append(make.model(tmp_path / "other"))
    record = report(dirs, out=tmp_path / "report")
    assert record["rows"][1]["on_pareto_front"] is None
    assert "other, not timed" in (tmp_path / "report" / "report.html").read_text()


def test_few_label_accuracies_at_different_label_counts_are_not_set_side_by_side(make, tmp_path):
    import json

    dirs = nets(make, tmp_path, [(50.0, 1.0), (60.0, 2.0)])
    probe = dirs[0] / "probe.json"
    content = json.loads(probe.read_text())
    content["few_label_top1"]["labels_per_class"] = 1
    probe.write_text(json.dumps(content))
    assert report(dirs, out=tmp_path / "report")["trade_off"]["accuracy"] == "linear"
