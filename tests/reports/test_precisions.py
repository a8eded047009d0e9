"""What a report says of a bundle's precisions: decisions, modes, ratios, the parity report."""

from __future__ import annotations

import pytest

from reports.conftest import report
from reports.test_report import page_of


@pytest.fixture(scope="module")
def kept(make, tmp_path_factory):
    base = tmp_path_factory.mktemp("kept")
    record = report([make.compiled(base / "bundle", model=None)], out=base / "report")
    return record, page_of(base / "report"), (base / "report" / "report.md").read_text()


@pytest.fixture(scope="module")
def rejected(make, tmp_path_factory):
    base = tmp_path_factory.mktemp("rejected")
    record = report([make.compiled(base / "bundle", model=None, reject=True)], out=base / "report")
    return record, page_of(base / "report"), (base / "report" / "report.html").read_text()


def test_decision_stands_in_the_summary_in_words(kept, rejected):
    assert (
        "int8 kept: loses 0.4 points of top-1 within the budget of 1.0, and is 1.37x as fast as fp32."
        in kept[0]["support"]
    )
    assert "int8 rejected because it costs 5.1 points of top-1 for 4 % of speed." in rejected[0]["support"]


def test_decision_of_a_row_tells_kept_from_kept_in_part_from_rejected(make, tmp_path, kept, rejected):
    assert [row["decision"] for row in kept[0]["rows"][:2]] == [None, None]
    decision = kept[0]["rows"][2]["decision"]
    assert (decision["state"], decision["nodes"]) == ("kept in part", 1)
    assert rejected[0]["rows"][2]["decision"]["state"] == "rejected"
    whole = make.precision("int8", decision={"kept": True, "words": "", "kept_nodes": []})
    bundle = make.bundle(tmp_path / "b", model=None, precisions={"int8": whole}, p50=None)
    record = report([bundle], out=tmp_path / "report")
    assert record["rows"][0]["decision"]["state"] == "kept"
    assert record["support"][0] == "int8 kept."


def test_rejected_precision_is_the_fastest_but_never_named_as_best(rejected):
    record, _, _ = rejected
    assert min(record["rows"], key=lambda row: row["latency_ms"]["p50"])["precision"] == "int8"
    assert record["decision"] == (
        "2 median latencies were measured, from 0.710 ms (bundle · fp16 on Orin Nano) to 1.37 ms "
        "(bundle · fp32 on Orin Nano); 1 of rejected precisions does not count."
    )


def test_of_two_timed_precisions_the_rejected_one_is_told_last_and_as_such(make, tmp_path):
    bad = make.precision("int8", decision={"kept": False, "words": "rejected because it is slower"})
    bundle = make.bundle(
        tmp_path / "b", model=None, p50=None, precisions={"int8": bad, "fp32": make.precision("fp32")}
    )
    times = [make.measurement("int8", 0.5), make.measurement("fp32", 1.0)]
    make.bench(bundle, device="box", measurements=times)
    record = report([bundle], out=tmp_path / "report")
    assert record["decision"].startswith("b · fp32 takes 1.00 ms")
    assert record["support"][0].startswith("b · int8 (rejected) takes 0.500 ms")


def test_ratios_of_precisions_timed_in_turns_are_told_with_their_interval(kept, rejected):
    assert "int8 is 1.37x [1.35, 1.39] as fast as fp16." in kept[0]["support"]
    assert "int8 is 1.37x [1.35, 1.39] as fast as fp16 on Orin Nano, tensorrt 10.3.0" in kept[1].text
    assert "int8 (rejected) is 1.37x [1.35, 1.39] as fast as fp16." in rejected[0]["support"]


def test_ratio_whose_interval_holds_one_is_not_resolved(make, tmp_path):
    bundle = make.bundle(tmp_path / "b", model=None, p50=None)
    ratio = {"a": "fp32", "b": "fp16", "p50_ratio": 1.004, "ci95": [0.99, 1.02]}
    make.bench(bundle, device="box", measurements=[make.measurement("fp32", 1.0)], ratios=[ratio])
    record = report([bundle], out=tmp_path / "report")
    assert record["bundles"][0]["ratios"][0]["words"] == (
        "fp16 is 1.00x [0.99, 1.02] as fast as fp32, not resolved: the interval includes 1"
    )


def test_every_mode_stands_in_the_detail_table(kept):
    _, page, markdown = kept
    for mode in ("compute, CUDA graph", "compute", "with transfers, CUDA graph", "with transfers"):
        assert f"| fp16, {mode} |" in markdown
        assert f"fp16, {mode}" in page.text
    assert "tensorrt 10.3.0, Orin Nano, MAXN\\_SUPER, batch 1, 1 thread:" in markdown


def test_energy_is_told_with_its_rails_and_its_idle(kept):
    assert "Energy of int8, compute, CUDA graph: 4.31 W idle, 7.92 W under load; rails VDD_IN" in kept[1].text
    assert "read from ina3221; 10 times a second." in kept[1].text


def test_parity_report_names_the_first_layer_out_of_tolerance(kept):
    _, page, markdown = kept
    assert "Parity report" in page.text
    assert "| carved torch → ONNX fp32 | 2.1e−6 | 3.5e−7 | 8.7e−7 | 100.0 | 1.00000 | 64 | none |" in markdown
    assert (
        "| fp16 → int8 | 3.1e−1 | 5.2e−2 | 1.3e−1 | 95.3 | 0.99380 | 64 | blocks.2.0.conv\\_dw |" in markdown
    )


def test_precision_that_was_left_out_of_the_bundle_has_its_decision(make, tmp_path):
    int8 = make.precision("int8", decision={"kept": False, "words": "rejected because it is too far"})
    bundle = make.bundle(
        tmp_path / "b",
        model=None,
        left_out={"int8": {"decision": int8["decision"], "parity": int8["parity"]}},
    )
    record = report([bundle], out=tmp_path / "report")
    assert "int8 rejected because it is too far." in record["support"]
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "| int8 (left out) | – | – | – | 3.5e−2 | 93.8 | – | rejected |" in markdown
    assert page_of(tmp_path / "report").text.count("int8 (left out)") == 1


def test_accuracies_of_different_data_are_said_not_to_compare(make, tmp_path):
    for place, data in enumerate(("a", "b")):
        accuracy = make.top1(70.0, data=data)
        make.bundle(
            tmp_path / f"b{place}", model=None, precisions={"fp32": make.precision("fp32", accuracy=accuracy)}
        )
    record = report([tmp_path / "b0", tmp_path / "b1"], out=tmp_path / "report")
    assert any("evaluated on different data (a, b)" in note for note in record["notes"])


def test_cosine_is_written_as_a_cosine(make, tmp_path):
    accuracy = make.top1(0.98765, metric="mean_cosine", half=0.0005)
    bundle = make.bundle(
        tmp_path / "b", model=None, precisions={"int8": make.precision("int8", accuracy=accuracy)}, p50=None
    )
    report([bundle], out=tmp_path / "report")
    assert "| 0.9877 [0.9872, 0.9881] cosine |" in (tmp_path / "report" / "report.md").read_text()
