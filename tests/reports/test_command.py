"""`edgecl report` and what it prints."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from edgecl.cli.commands import app
from edgecl.reports.report import report as report_on
from edgecl.reports.tables import comparison_table, report_tables


@pytest.fixture
def invoke():
    def invoke(*words):
        # Names of commands in an error must fit a line.
        return CliRunner(env={"COLUMNS": "300"}).invoke(
            app, ["report", *map(str, words)], catch_exceptions=False, prog_name="edgecl"
        )

    return invoke


def test_command_prints_the_table_and_where_the_page_is(make, tmp_path, invoke):
    done = invoke(make.pipeline(tmp_path / "demo"), "--out", tmp_path / "report")
    assert done.exit_code == 0
    assert "The pretrained net beats its random initialization by 21.2 points" in done.stdout
    assert "0.412 [0.406, 0.418]" in done.stdout
    assert done.stdout.rstrip().endswith(f"report: {tmp_path / 'report' / 'report.html'}")


def test_json_is_the_record_and_nothing_else(make, tmp_path, invoke):
    done = invoke(make.run(tmp_path / "run", steps=3), "--out", tmp_path / "report", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "report" / "report.json").read_text())


def test_markup_in_a_name_is_printed_as_it_is(make, tmp_path, invoke):
    done = invoke(make.model(tmp_path / "[bold]net[x]"), "--out", tmp_path / "report")
    assert "[bold]net[x]" in done.stdout


def test_table_of_strings_has_a_heading_for_every_cell(make, tmp_path):
    report = report_on([make.pipeline(tmp_path / "demo")], out=tmp_path / "report")
    nets, bundles = report_tables(report.rows)
    assert nets.headings[:3] == ["net", "few-label (5/class) %", "kNN %"]
    assert [len(line) for line in nets.lines] == [len(nets.columns)] * 2
    assert bundles.headings[:3] == ["net", "accuracy", "p50 ms"]
    assert [len(line) for line in bundles.lines] == [len(bundles.columns)]
    assert comparison_table(report.comparison).lines[2] == ["from scratch", "48.5 [44.8, 52.2]", "–", "–"]


@pytest.fixture
def bundles(make, tmp_path):
    """An old bundle, and a new one whose fp32 is 10 % slower."""
    for name, p50 in (("old", 1.0), ("new", 1.1)):
        make.bundle(tmp_path / name, model=None, p50=p50)
    return tmp_path / "old", tmp_path / "new"


def test_diff_fails_a_build_server_with_exit_1_and_says_why_last(invoke, bundles):
    done = invoke("diff", *bundles, "--fail-on", "p50>+5%,size>+0%")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["row", "rule", "OLD", "NEW", "change"]
    assert "p50>+5%" in lines[1]
    assert "1.00 [0.985, 1.01]  1.10 [1.08, 1.12]  ms" in lines[1]
    assert lines[1].rstrip().endswith("+10.0 %  fails")
    assert lines[2].rstrip().endswith("+0.0 %  holds")
    assert lines[-1] == "regression: 1 of 2 checks fails"


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (["--fail-on", "p50>+15%"], "no regression: 1 check holds"),
        ([], "no rule was given: 1 row compared, nothing evaluated"),
    ],
)
def test_diff_without_regression_exits_0(invoke, bundles, words, last):
    done = invoke("diff", *bundles, *words)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, last)


def test_diff_prints_one_json_value_also_when_it_fails(invoke, bundles):
    done = invoke("diff", *bundles, "--fail-on", "p50>+5%", "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == 1
    assert (record["kind"], record["regression"], record["broken"]) == ("report-diff", True, 1)
    assert record["rows"][0]["checks"][0]["change_percent"] == pytest.approx(10.0)


@pytest.mark.parametrize("rules", ["p50", " , "])
def test_rule_that_cannot_be_read_is_wrong_usage(invoke, bundles, rules):
    done = invoke("diff", *bundles, "--fail-on", rules)
    assert done.exit_code == 2
    assert "Invalid value for --fail-on" in done.stderr
    assert done.stdout == ""


def test_help_of_both_commands_tells_its_own_words(invoke):
    report_help, diff_help = invoke("--help").stdout, invoke("diff", "--help").stdout
    assert "DIR..." in report_help
    assert "edgecl report diff --help" in " ".join(report_help.split())
    assert "--fail-on" not in report_help
    assert re.search(r"Usage: edgecl report diff \[OPTIONS\] \{?OLD\}? \{?NEW\}?\n", diff_help)
    assert "--fail-on RULES" in diff_help
    for word in ("p50>+5%", "top1<-0.5", "p50>2.0", "few_label", "j_per_inference", "Exit 0"):
        assert word in diff_help


def test_directory_named_diff_is_reported_on_by_its_path(make, tmp_path, invoke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.bundle(tmp_path / "diff", model=None)
    assert invoke("./diff", "--out", "report").exit_code == 0
    done = invoke("diff", "--out", "other")
    assert done.exit_code == 2
