"""What a report says, held to directories whose numbers are known."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgecl.errors import ArtifactError
from edgecl.reports.content import Report
from edgecl.reports.diff import Diff, diff
from edgecl.storage.record_files import kind_of, read_record
from edgecl.storage.records import parse_record
from reports.conftest import report

HOSTILE = "<script>alert(1)<img src=x onerror=alert(2)>&\"'$x$"


class Reader(HTMLParser):
    """Collects tags, ids and attributes as a browser would read them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, name, value or "") for name, value in attrs)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(out: Path) -> Reader:
    return Reader((out / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    base = tmp_path_factory.mktemp("whole")
    make.pipeline(base / "demo")
    record = report([base / "demo"], out=base / "report")
    return base, record


def test_a_pipeline_stands_for_everything_inside_it(whole):
    _, record = whole
    assert [row["name"] for row in record["rows"]] == ["slim", "random"]
    assert [run["name"] for run in record["runs"]] == ["pretrain"]
    assert record["comparison"]["labels_per_class"] == 5
    assert record["decision"] == (
        "The pretrained net beats its random initialization by 21.2 points [19.7, 22.7] with 5 labels per class."
    )


def test_decision_begins_with_whether_pretraining_given_weights_paid(make, tmp_path):
    file = make.comparison(tmp_path / "out")
    words = "further pretraining gained 2.1 points [0.6, 3.6] for 3.4 hours"
    file.write_text(json.dumps({**json.loads(file.read_text()), "verdict": words}))
    record = report([tmp_path / "out"], out=tmp_path / "report")
    assert record["decision"] == f"F{words[1:]} with 5 labels per class."
    assert record["comparison"]["verdict"] == words


def test_decision_says_not_resolved_when_the_interval_includes_zero(make, tmp_path):
    make.pipeline(tmp_path / "demo", pretrained=[35.0, 34.9, 36.6, 34.3, 36.2])
    record = report([tmp_path / "demo"], out=tmp_path / "report")
    assert record["decision"].startswith(
        "Not resolved: the pretrained net differs from its random initialization by +0.1 points [−0.7, 1.0]"
    )
    assert record["decision"].endswith("with 5 labels per class, and the interval includes zero.")


def test_bundle_joins_its_net_by_hash(whole):
    _, record = whole
    slim, random = record["rows"]
    assert (slim["bundle"], slim["latency_ms"]["p50"], slim["onnx_bytes"]) == ("ort-cpu", 0.412, 934_210)
    assert (slim["macs"], slim["linear"]["top1"]) == (4_712_000, 74.2)
    assert slim["few_label"]["top1"] == pytest.approx(56.46)
    assert (random["bundle"], random["latency_ms"]) == (None, None)


def test_bundle_of_another_net_is_a_row_of_its_own(make, tmp_path):
    net = make.model(tmp_path / "net")
    stranger = make.bundle(tmp_path / "stranger", model=None)
    record = report([net, stranger], out=tmp_path / "report")
    names = [(row["name"], row["bundle"]) for row in record["rows"]]
    assert names == [("net", None), ("stranger", "stranger")]
    assert record["rows"][1]["few_label"] is None


def test_pipeline_and_its_parts_together_give_each_row_once(make, tmp_path):
    demo = make.pipeline(tmp_path / "demo")
    # While it runs it has no record, and is known by its comparison.
    (demo / "pipeline.json").unlink()
    record = report([demo, demo / "slim", demo / "bundles" / "ort-cpu"], out=tmp_path / "report")
    assert len(record["rows"]) == 2


def test_report_inside_a_pipeline_made_again_is_the_same_three_files(make, tmp_path):
    demo = make.pipeline(tmp_path / "demo")
    written = []
    for force in (False, True):
        report([demo], out=demo / "report", force=force)
        written.append({file.name: file.read_bytes() for file in (demo / "report").iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {"report.html", "report.md", "report.json"}
    assert kind_of(demo / "report") == "report"


def test_report_json_is_what_the_docs_schema_describes(whole):
    base, record = whole
    assert read_record(base / "report" / "report.json", Report).to_json() == record
    parse_record(diff(base / "report", base / "demo").to_json(), Diff, path=base / "report-diff.json")


def test_page_asks_the_network_for_nothing(whole):
    text = (whole[0] / "report" / "report.html").read_text()
    reader = Reader(text)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)


def test_charts_take_every_color_from_the_page_and_have_ids_of_their_own(whole):
    text = (whole[0] / "report" / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 12  # comparison, differences, scatter and nine small multiples
    for chart in charts:
        assert not re.search(r"#[0-9a-f]{6}\b", chart)
        assert "<metadata" not in chart


@pytest.mark.parametrize("place", ["directory", "class", "command", "method", "device", "decision", "mode"])
def test_hostile_names_are_shown_and_do_nothing(make, tmp_path, place):
    name = HOSTILE if place == "directory" else "net"
    own = {"class": {"classes": [HOSTILE]}, "command": {"command": HOSTILE}, "method": {"method": HOSTILE}}
    net = make.model(tmp_path / name, **own.get(place, {}))
    words = HOSTILE if place == "decision" else ""
    int8 = make.precision("int8", decision={"kept": True, "words": words})
    bundle = make.bundle(tmp_path / f"b{name}", model=net, precisions={"int8": int8}, p50=None)
    times = make.measurement("int8", 1.0, **({"mode": HOSTILE} if place == "mode" else {}))
    file = make.bench(bundle, device="box", measurements=[times])
    if place == "device":
        content = json.loads(file.read_text())
        content["device"]["name"] = HOSTILE
        file.write_text(json.dumps(content))
    report([net, bundle], out=tmp_path / "report")
    reader = page_of(tmp_path / "report")
    assert not {"script"} & set(reader.tags)
    assert reader.tags.count("img") == 0
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "<script>alert(1)" in reader.text
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert not re.search(r"<script>", re.sub(r"`[^`\n]+`", "", markdown))


def test_name_that_is_no_utf8_and_has_control_characters_is_shown(make, tmp_path):
    net = make.model(tmp_path / "n\x07et 日本語 \udcff")
    report([net], out=tmp_path / "report")
    assert "n\\x07et 日本語 \\udcff" in page_of(tmp_path / "report").text


def test_markdown_has_the_decision_and_the_table(whole):
    base, record = whole
    text = (base / "report" / "report.md").read_text()
    assert f"**{record['decision']}**" in text
    assert [line for line in text.splitlines() if line.startswith("| slim")] == [
        "| slim | 56.5 [54.6, 58.4] | 61.5 [59.6, 63.4] | 74.2 [72.5, 75.9] | – | 4.7 M | 231 k |",
        "| slim | 74.2 % [72.5, 75.9] linear, torch | 0.412 [0.406, 0.418] | 0.461 | 0.533 | 2,356 | 0.93 |",
    ]


def test_conditions_hold_command_device_info_and_versions(whole):
    base, record = whole
    text = page_of(base / "report").text
    for needle in ("edgecl bench", "Platinum 8481C", "1.24.0", "2026-11-22T05:00:00+00:00", "2.11.0"):
        assert needle in text, needle
    makers = {one["title"]: one["made_from_name"] for one in record["conditions"]}
    assert makers["ort-cpu/bench-build-box.json"] == "ort-cpu"
    assert makers["slim/model.json"] == "pretrain"


# Missing pieces give a shorter report.


def test_only_a_bundle(make, tmp_path):
    record = report([make.bundle(tmp_path / "bundle", model=None, p99=None)], out=tmp_path / "report")
    assert record["decision"] == (
        "bundle takes 0.412 ms [0.406, 0.418] at the median on build-box (batch 1, 1 thread), "
        "at 231 k parameters, 0.93 MB of ONNX."
    )
    assert record["trade_off"] is None
    assert record["rows"][0]["latency_ms"]["p99"] is None


def test_bundle_without_bench(make, tmp_path):
    net = make.model(tmp_path / "net")
    record = report([net, make.bundle(tmp_path / "bundle", model=net, p50=None)], out=tmp_path / "report")
    assert len(record["rows"]) == 1
    assert record["decision"] == (
        "net reaches 56.5 % [54.6, 58.4] few-label top-1; nothing was compared and nothing was timed."
    )
    assert record["support"][-1] == f"Next: `edgecl bench {tmp_path / 'bundle'}` for latency."


def test_the_classifier_is_the_net_that_counts(make, tmp_path):
    net, classifier = make.model(tmp_path / "net"), make.model(tmp_path / "classifier", draws=None, top1=71.0)
    record = report([net, classifier], out=tmp_path / "report")
    assert "classifier reaches 71.0 %" in record["decision"]
    assert f"edgecl export {classifier}" in record["support"][-1]


def test_net_without_any_measurement(make, tmp_path):
    net = make.model(tmp_path / "a net", draws=None)
    (net / "cost.json").unlink()
    record = report([net], out=tmp_path / "report")
    assert "no accuracy and no latency" in record["decision"]
    assert record["support"] == [
        f"Next: `edgecl probe '{net}' --data URI` for accuracy; "
        f"`edgecl export '{net}' --target ort-cpu --out BUNDLE` and `edgecl bench BUNDLE` for latency."
    ]
    assert "edgecl probe" in (tmp_path / "report" / "report.md").read_text()


def test_run_that_failed_says_of_what(make, tmp_path):
    run = make.run(tmp_path / "run", steps=200, state="failed", error="the embedding collapsed")
    record = report([run], out=tmp_path / "report")
    assert record["decision"] == "The run run failed: 200 of 1,200 steps; no net was measured."
    assert f"{run}: the run failed: the embedding collapsed." in record["notes"]
    assert ", failed." in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_run_still_running_after_few_steps(make, tmp_path, steps):
    run = make.run(tmp_path / "run", steps=steps, state="running")
    record = report([run], out=tmp_path / "report")
    assert "is not finished" in record["decision"]
    assert any("not finished" in note for note in record["notes"])


def test_terms_of_any_method_are_drawn_as_its_panels_say(make, tmp_path):
    panels = [
        {"title": "Pull <1>", "lines": {"pull": "towards"}, "unit": "nats", "log": True},
        {"title": "Nothing logged", "lines": {"never": "never"}, "unit": "", "log": False},
        {"title": "no lines"},
    ]
    run = make.run(tmp_path / "run", steps=3, panels=panels)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, "pull": 1.5}) + "\n" for line in lines))
    found = report([run], out=tmp_path / "report")["runs"][0]
    titles = [panel["title"] for panel in found["panels"]]
    assert titles[:3] == ["Pull <1>", "Nothing logged", "Diagonal of C"]
    assert found["curves"]["pull"]["mean"] == [1.5, 1.5, 1.5]
    assert "sacl" not in found["curves"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<b>Pull &lt;1&gt;</b> nats" in page
    assert "Nothing logged</b>" not in page


def test_a_run_that_names_no_panels_has_its_loss_drawn(make, tmp_path):
    run = make.run(tmp_path / "run", steps=3, panels=[])
    assert "loss" in report([run], out=tmp_path / "report")["runs"][0]["curves"]


def test_torn_last_line_of_the_metrics_is_left_out_and_said(make, tmp_path):
    run = make.run(tmp_path / "run", steps=100, state="running")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "epo')
    record = report([run], out=tmp_path / "report")
    assert record["runs"][0]["steps"] == 100
    assert any("1 line of metrics.jsonl cannot be read" in note for note in record["notes"])


def test_steps_a_resumed_run_wrote_twice_count_once_and_late(make, tmp_path):
    run = make.run(tmp_path / "run", steps=10)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = json.loads(lines[4]) | {"loss": 1.25}
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    loss = report([run], out=tmp_path / "report")["runs"][0]["curves"]["loss"]
    assert (len(loss["mean"]), loss["mean"][4]) == (10, 1.25)


def test_epoch_axis_of_a_run_that_went_on_from_a_late_checkpoint_begins_there(make, tmp_path):
    run = make.run(tmp_path / "run", steps=1200)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[1000:]))
    record = report([run], out=tmp_path / "report")
    assert (record["runs"][0]["from_epoch"], record["runs"][0]["epochs"]) == (15.0, 18.75)


def test_measurement_of_an_earlier_bundle_is_left_out_and_said(make, tmp_path):
    bundle = make.bundle(tmp_path / "bundle", model=None)
    file = bundle / "bench-build-box.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"made_from": "0" * 64}))
    record = report([bundle], out=tmp_path / "report")
    assert record["rows"][0]["latency_ms"] is None
    assert any("bench-build-box.json was made from 000000000000…" in note for note in record["notes"])


def test_failed_verify_and_doubtful_timing_are_said(make, tmp_path):
    bundle = make.bundle(tmp_path / "bundle", model=None, ok=False, p50=None)
    make.bench(bundle, p50=1.0, p99=None, device="box", steady=False)
    notes = " ".join(report([bundle], out=tmp_path / "report")["notes"])
    assert "verify failed" in notes
    assert "never became steady" in notes


def test_directories_of_one_name_are_told_apart(make, tmp_path):
    nets = [make.model(tmp_path / side / "slim") for side in ("a", "b")]
    assert [row["name"] for row in report(nets, out=tmp_path / "report")["rows"]] == ["a/slim", "b/slim"]


# Bad input gets a named error.


def test_what_is_no_directory_of_edgecl_or_a_report_is_an_error(make, tmp_path):
    (tmp_path / "photos").mkdir()
    report([make.run(tmp_path / "run", steps=1)], out=tmp_path / "one")
    for name, problem in (("photos", "has none of run.json, model.json"), ("one", "is a report itself")):
        with pytest.raises(ArtifactError, match=f"{name}' is .*{problem}|{name}' {problem}"):
            report([tmp_path / name], out=tmp_path / "report")
    assert not (tmp_path / "report").exists()
