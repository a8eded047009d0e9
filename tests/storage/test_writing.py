"""What lies on the disk is whole or not there, and a record that is not ours is refused with its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disks import flip, largest_file
from sealed import header

from edgecl.errors import ArtifactError
from edgecl.storage.directories import Bundle, ModelDir, PipelineDir, ReportDir, RunDir
from edgecl.storage.outputs import new_directory, refuse_existing
from edgecl.storage.record_files import kind_of
from edgecl.storage.records import command_line
from edgecl.storage.writing import write_bytes, write_json

KINDS = (RunDir, ModelDir, Bundle, ReportDir, PipelineDir)
REPOSITORY = Path(__file__).parents[2]


def make(path, kind, **more):
    """Write the smallest directory of a kind; of a run alone more than the kind is read."""
    path.mkdir(parents=True)
    run = {"recipe_name": None, "recipe": {}, "data": {"uri": "x", "fingerprint": "x"}}
    write_json(path / kind.RECORD, {**header(kind.KIND), **(run if kind is RunDir else {}), **more})
    return path


def names(directory):
    """Everything in a directory, hidden files too."""
    return sorted(path.name for path in directory.iterdir())


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- a directory appears whole ---


def test_directory_is_not_there_while_it_is_written(tmp_path):
    with new_directory(tmp_path / "out", kind="model") as aside:
        (aside / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_exception_inside_leaves_the_earlier_directory_as_it_was(tmp_path):
    make(tmp_path / "out", ModelDir, mark="earlier")
    with pytest.raises(ValueError, match="no"), new_directory(tmp_path / "out", kind="model", force=True):
        raise ValueError("no")
    assert names(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "model.json").read_text())["mark"] == "earlier"


def test_kill_inside_a_replacement_leaves_the_earlier_directory(tmp_path):
    make(tmp_path / "out", ModelDir, mark="earlier")
    process = python(
        """
        import os, signal, sys
        from pathlib import Path
        from edgecl.storage.outputs import new_directory
        with new_directory(Path(sys.argv[1]), kind="model", force=True) as aside:
            (aside / "model.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path / "out",
    )
    process.communicate()
    assert json.loads((tmp_path / "out" / "model.json").read_text())["mark"] == "earlier"


# --- what may be replaced ---


@pytest.mark.parametrize(
    ("kind", "more", "go_on"),
    [
        (RunDir, {"state": "stopped"}, True),
        (RunDir, {"state": "failed"}, True),
        (RunDir, {"state": "running"}, True),
        (RunDir, {"state": "done"}, False),
        (PipelineDir, {"stages": {}}, True),
    ],
)
def test_what_can_go_on_is_said_to(tmp_path, kind, more, go_on):
    make(tmp_path / "out", kind, **more)
    with pytest.raises(ArtifactError) as caught:
        refuse_existing(tmp_path / "out", force=False, kind=kind.KIND)
    assert ("--resume" in caught.value.hint) == go_on
    with pytest.raises(ArtifactError) as caught:  # another verb cannot go on with it
        refuse_existing(tmp_path / "out", force=False, kind="model")
    assert "--resume" not in caught.value.hint


def test_pipeline_with_a_report_is_done(tmp_path):
    make(tmp_path / "out", PipelineDir)
    make(tmp_path / "out" / "report", ReportDir)
    with pytest.raises(ArtifactError) as caught:
        refuse_existing(tmp_path / "out", force=False, kind="pipeline")
    assert "--resume" not in caught.value.hint


def test_force_replaces_a_directory_of_the_same_kind(tmp_path):
    make(tmp_path / "out", ModelDir, mark="earlier")
    (tmp_path / "out" / "probe.json").write_text("{}")
    with new_directory(tmp_path / "out", kind="model", force=True) as aside:
        write_json(aside / "model.json", {"mark": "later"})
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model.json"]


@pytest.mark.parametrize("other", [kind for kind in KINDS if kind is not ModelDir])
def test_force_refuses_a_directory_of_another_kind(tmp_path, other):
    make(tmp_path / "out", other)
    with pytest.raises(ArtifactError, match=r"--force replaces only a model directory"):
        refuse_existing(tmp_path / "out", force=True, kind="model")


def test_force_says_that_a_record_is_broken(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"its run\.json is not the record"):
        refuse_existing(tmp_path, force=True, kind="run")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ['{"name": "my web application"}', "[]", "not JSON", ""])
def test_force_refuses_a_users_folder_with_a_file_of_the_same_name(tmp_path, kind, content):
    (tmp_path / kind.RECORD).write_text(content)
    with pytest.raises(ArtifactError, match="--force replaces only"):
        refuse_existing(tmp_path, force=True, kind=kind.KIND)


def test_force_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("notes")
    with pytest.raises(ArtifactError, match="--force replaces only"):
        refuse_existing(tmp_path / "out", force=True, kind="model")


def test_output_below_a_file_is_a_named_error(tmp_path):
    (tmp_path / "notes").write_text("x")
    with (
        pytest.raises(ArtifactError, match="cannot write 'out': ") as caught,
        new_directory(tmp_path / "notes" / "out", kind="model"),
    ):
        pass
    assert caught.value.where == {"directory": tmp_path / "notes"}


# --- a file appears whole ---


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"value": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert names(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1}


def test_reader_never_sees_a_part_of_a_json_file(tmp_path):
    """A second process writes the file again and again, long and short; every reading is whole."""
    path = tmp_path / "a.json"
    write_json(path, {"text": ""})
    process = python(
        """
        import sys
        from pathlib import Path
        from edgecl.storage.writing import write_json
        for round in range(300):
            write_json(Path(sys.argv[1]), {"text": "x" * (200_000 * (round % 2))})
        """,
        path,
    )
    seen = set()
    while process.poll() is None:
        seen.add(len(json.loads(path.read_text())["text"]))
    process.communicate()
    assert process.returncode == 0
    assert seen == {0, 200_000}
    assert names(tmp_path) == ["a.json"]


def test_threads_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_bytes(tmp_path / "a", content), contents))
    assert (tmp_path / "a").read_bytes() in contents
    assert names(tmp_path) == ["a"]


# --- a full disk ---


def test_full_disk_leaves_the_earlier_file(tmp_path):
    write_json(tmp_path / "out", {"value": 1})
    with (
        largest_file(50_000),
        pytest.raises(ArtifactError, match="no room on the disk to write 'out'") as caught,
    ):
        write_json(tmp_path / "out", {"text": "x" * 300_000})
    assert caught.value.where == {"directory": tmp_path}
    assert names(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out").read_text()) == {"value": 1}


def test_export_onto_a_full_disk_leaves_no_bundle(tmp_path, carved_model):
    from edgecl.deploy.export import export

    with largest_file(200_000), pytest.raises(ArtifactError, match="no room on the disk to write 'bundle'"):
        export(carved_model, target="ort-cpu", out=tmp_path / "bundle")
    assert names(tmp_path) == []


# --- records ---


def test_command_is_written_as_one_would_type_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/edgecl", "carve", "my run", "--out", "x"])
    assert command_line() == "edgecl carve 'my run' --out x"


def test_directory_of_another_kind_is_named_as_what_it_is(tmp_path):
    make(tmp_path / "run", RunDir)
    with pytest.raises(ArtifactError, match=f"'{tmp_path / 'run'}' .*model directory but a run") as caught:
        ModelDir(tmp_path / "run").read()
    assert "`edgecl carve` and `edgecl finetune`" in caught.value.hint


@pytest.mark.parametrize("content", [b'{"schema": 1, "ki', b"", b"\xff\xfe\x00"])
def test_torn_record_is_named(tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"'model\.json' is not valid JSON") as caught:
        ModelDir(tmp_path).read()
    assert caught.value.where == {"file": tmp_path / "model.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_a_directory_is_what_its_record_says(tmp_path, kind):
    assert kind_of(make(tmp_path / "out", kind)) == kind.KIND


# --- weights ---


def test_model_whose_weights_changed_is_refused_with_both_hashes(tmp_path, carved_model):
    model = shutil.copytree(carved_model, tmp_path / "m")
    flip(model / "weights.safetensors")
    expected = json.loads((model / "model.json").read_text())["weights_sha256"][:12]
    with pytest.raises(ArtifactError, match=rf"not match their hash: .* {expected}…, the file"):
        ModelDir(model).read()


def test_model_without_its_weights_is_refused(tmp_path, carved_model):
    model = shutil.copytree(carved_model, tmp_path / "m")
    (model / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match="the model's weights are missing"):
        ModelDir(model).read()
