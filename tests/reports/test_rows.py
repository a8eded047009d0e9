"""Which rows a report has: one per net, bundle, measurement and precision."""

from __future__ import annotations

import json

import pytest

from reports.conftest import report


def test_net_timed_on_two_devices_is_two_rows_named_apart(make, tmp_path):
    net = make.model(tmp_path / "net-0")
    dirs = [net, make.bundle(tmp_path / "bundle", model=net, p50=1.0, device="laptop")]
    make.bench(dirs[1], p50=8.0, p99=None, device="board")
    record = report(dirs, out=tmp_path / "report")
    timed = [(row["device"], row["latency_ms"]["p50"]) for row in record["rows"]]
    assert timed == [("board", 8.0), ("laptop", 1.0)]
    assert "net-0 · board" in (tmp_path / "report" / "report.html").read_text()


def rows_of(record):
    return [
        (row["precision"], row["mode"], row["latency_ms"] and row["latency_ms"]["p50"])
        for row in record["rows"]
    ]


def test_each_precision_is_a_row_in_its_headline_mode(make, tmp_path):
    record = report([make.compiled(tmp_path / "bundle", model=None)], out=tmp_path / "report")
    headline = "compute, CUDA graph"
    assert rows_of(record) == [("fp32", headline, 1.37), ("fp16", headline, 0.71), ("int8", headline, 0.52)]


def test_headline_is_the_one_the_record_says_and_else_the_first(make, tmp_path):
    bundle = make.bundle(
        tmp_path / "bundle",
        model=None,
        p50=None,
        precisions={name: make.precision(name) for name in ("fp32", "fp16")},
    )
    make.bench(
        bundle,
        device="board",
        measurements=[
            make.measurement("fp32", 3.0, mode="compute", headline=False),
            make.measurement("fp32", 2.0, mode="compute, CUDA graph", headline=True),
            make.measurement("fp16", 1.5, mode="compute", headline=False),
            make.measurement("fp16", 1.0, mode="compute, CUDA graph", headline=False),
        ],
    )
    record = report([bundle], out=tmp_path / "report")
    assert rows_of(record) == [("fp32", "compute, CUDA graph", 2.0), ("fp16", "compute", 1.5)]


def test_precision_that_no_bench_timed_is_still_a_row(make, tmp_path):
    precisions = {name: make.precision(name) for name in ("fp32", "int8")}
    record = report(
        [make.bundle(tmp_path / "bundle", model=None, precisions=precisions)], out=tmp_path / "report"
    )
    assert rows_of(record) == [("fp32", "inference", 0.412), ("int8", None, None)]


def test_verify_is_read_for_each_precision(make, tmp_path):
    precisions = {name: make.precision(name) for name in ("fp32", "fp16")}
    bundle = make.bundle(tmp_path / "bundle", model=None, p50=None, precisions=precisions)
    file = bundle / "verify.json"
    content = json.loads(file.read_text())
    content["ok"] = content["precisions"]["fp16"]["ok"] = False
    file.write_text(json.dumps(content))
    record = report([bundle], out=tmp_path / "report")
    assert [row["verified"] for row in record["rows"]] == [True, False]
    content["files_ok"] = False
    file.write_text(json.dumps(content))
    record = report([bundle], out=tmp_path / "report", force=True)
    assert [row["verified"] for row in record["rows"]] == [False, False]


def test_accuracy_of_the_net_stands_in_for_fp16_but_never_for_int8(make, tmp_path):
    net = make.model(tmp_path / "net", top1=77.0)
    precisions = {name: make.precision(name) for name in ("fp32", "fp16", "int8")}
    bundle = make.bundle(tmp_path / "bundle", model=net, p50=None, precisions=precisions)
    record = report([net, bundle], out=tmp_path / "report")
    found = [row["accuracy"] and row["accuracy"]["metric"] for row in record["rows"]]
    assert found == ["net_top1", "net_top1", None]
    assert record["rows"][1]["accuracy"]["value"] == 77.0
    assert any("no accuracy of the int8 file is known" in note for note in record["notes"])


def test_accuracy_of_the_file_comes_before_the_nets(make, tmp_path):
    net = make.model(tmp_path / "net", top1=77.0)
    precisions = {"fp32": make.precision("fp32", accuracy=make.top1(76.8))}
    bundle = make.bundle(tmp_path / "bundle", model=net, precisions=precisions)
    (row,) = report([net, bundle], out=tmp_path / "report")["rows"]
    assert (row["accuracy"]["value"], row["accuracy"]["metric"]) == (76.8, "top1")
    assert row["finetuned"]["top1"] == 77.0


def test_flags_of_the_session_stand_on_every_row_of_it(make, tmp_path):
    bundle = make.bundle(tmp_path / "bundle", model=None, p50=None)
    make.bench(
        bundle,
        device="board",
        measurements=[make.measurement("fp32", 1.0, marks=["drift"])],
        marks=["throttled"],
    )
    (row,) = report([bundle], out=tmp_path / "report")["rows"]
    assert row["flags"] == ["drift", "throttled"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| 1.00 [0.985, 1.01], drift, throttled |" in text
    assert "bundle: the device throttled while it was measured" in text


@pytest.mark.parametrize("joules", [None, 0.0123])
def test_energy_has_a_column_only_where_it_is_known(make, tmp_path, joules):
    bundle = make.bundle(tmp_path / "bundle", model=None, p50=None)
    make.bench(bundle, device="board", measurements=[make.measurement("fp32", 1.0, joules=joules)])
    report([bundle], out=tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert ("J/inference" in text, "| 0.0123 |" in text) == (bool(joules), bool(joules))


def test_power_modes_of_one_board_are_told_apart(make, tmp_path):
    bundle = make.bundle(tmp_path / "bundle", model=None, p50=None)
    modes = ({"id": 0, "name": "15W"}, {"id": 2, "name": "MAXN_SUPER"}, {"id": 7, "name": None})
    for place, mode in enumerate(modes):
        file = make.bench(bundle, device=f"d{place}", p50=1.0 + place)
        content = json.loads(file.read_text())
        content["device"].update(name="Orin Nano", power_mode=mode)
        file.write_text(json.dumps(content))
    report([bundle], out=tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"| bundle · {mode} |" in text for mode in ("15W", "MAXN\\_SUPER", "mode 7"))
