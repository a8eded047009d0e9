"""Targets: the packaged ones, and what a target refuses."""

from __future__ import annotations

import pytest

from edgecl.errors import TargetError
from edgecl.settings import header_comment, packaged_files
from edgecl.target import Target, list_targets, read_target

PACKAGED = packaged_files("export")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_target_parses(name):
    assert isinstance(read_target(name), Target)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_target_has_a_summary(name):
    assert len(header_comment(PACKAGED[name].read_text(encoding="utf-8")).partition("\n")[0]) > 20


def test_ort_cpu_is_static_float32_at_opset_18():
    target = read_target("ort-cpu")
    assert (target.runtime, target.precision) == ("onnxruntime", "fp32")
    assert (target.graph.opset, target.graph.batch, target.graph.dynamic_batch) == (18, 1, False)


def test_list_gives_name_and_summary_of_each():
    assert [entry["name"] for entry in list_targets()] == sorted(PACKAGED)
    assert all(entry.keys() == {"name", "summary"} and entry["summary"] for entry in list_targets())


def test_unknown_name_suggests_a_near_one():
    with pytest.raises(TargetError) as caught:
        read_target("ort-cp")
    assert caught.value.problem == "unknown target 'ort-cp'"
    assert "'ort-cpu'" in caught.value.hint


def test_missing_file_says_where_it_was_looked_for():
    with pytest.raises(TargetError, match=r"no target file at 'nowhere/x\.toml'"):
        read_target("nowhere/x.toml")


def test_unknown_key_suggests_a_near_one(write):
    with pytest.raises(TargetError, match=r"unknown key 'graph\.opst' \(did you mean 'opset'"):
        read_target(write('runtime = "onnxruntime"\n[graph]\nopst = 18\n'))


def test_mistyped_runtime_suggests_the_near_one(write):
    with pytest.raises(
        TargetError,
        match=r"'runtime' is 'onnxruntme', not one of onnxruntime \(did you mean 'onnxruntime'\?\)",
    ):
        read_target(write('runtime = "onnxruntme"\n'))


def test_batch_above_its_limit_is_refused_with_both(write):
    text = 'runtime = "onnxruntime"\n[graph]\nbatch = 32\ndynamic_batch = true\nmax_batch = 8\n'
    with pytest.raises(TargetError, match=r"'graph\.batch' 32 is above 'graph\.max_batch' 8"):
        read_target(write(text))


def test_several_problems_are_reported_at_once(write):
    with pytest.raises(TargetError, match=r"missing key 'runtime'; .*'graph\.opset' is 9"):
        read_target(write("[graph]\nopset = 9\n"))
