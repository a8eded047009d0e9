"""`edgecl report` and what it prints."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import edgecl.cli.report
from edgecl.report.text import comparison_rows, table_rows


@pytest.fixture
def invoke():
    app = typer.Typer()
    app.command()(edgecl.cli.report.report_command)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_command_prints_the_table_and_where_the_page_is(make, tmp_path, invoke):
    done = invoke(make.pipeline(tmp_path / "demo"), "--out", tmp_path / "report")
    assert done.exit_code == 0
    assert "The pretrained net beats its random initialisation by 21.2 points" in done.stdout
    assert "0.412 [0.406, 0.418]" in done.stdout
    assert done.stdout.rstrip().endswith(f"report: {tmp_path / 'report' / 'report.html'}")


def test_json_is_the_record_and_nothing_else(make, tmp_path, invoke):
    done = invoke(make.run(tmp_path / "run", steps=3), "--out", tmp_path / "report", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "report" / "report.json").read_text())


def test_markup_in_a_name_is_printed_as_it_is(make, tmp_path, invoke):
    done = invoke(make.model(tmp_path / "[bold]net[x]"), "--out", tmp_path / "report")
    assert "[bold]net[x]" in done.stdout


def test_table_of_strings_has_a_heading_for_every_cell(make, tmp_path):
    from edgecl.report.report import report

    record = report([make.pipeline(tmp_path / "demo")], out=tmp_path / "report")
    columns, rows = table_rows(record)
    assert columns[:3] == ["net", "few-label (5/class) %", "kNN %"]
    assert [len(row) for row in rows] == [len(columns)] * 2
    assert comparison_rows(record["comparison"])[1][2] == ["from scratch", "48.5 [44.8, 52.2]", "–", "–"]


def test_command_file_imports_nothing_heavy_at_the_top():
    tree = ast.parse(Path(edgecl.cli.report.__file__).read_text(encoding="utf-8"))
    imported = {
        name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    assert imported <= {"typer", "pathlib", "typing"}
