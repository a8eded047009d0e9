"""What the record of a run says, and that a start which is refused leaves nothing behind."""

from __future__ import annotations

import errno
import threading

import pytest
import torch

from edgecl.artifacts import RunDir, disk_errors
from edgecl.checkpoint import read_newest, write_checkpoint
from edgecl.data import index
from edgecl.errors import ArtifactError, DataError, RecipeError, SliceError
from edgecl.nets.backbone import count_parameters, create_backbone
from edgecl.train import loop, pretrain, saver

from .conftest import train

# --- a start that is refused ---


@pytest.fixture(autouse=True)
def index_at_once(monkeypatch):
    """Keep an index of a folder also when it has just been written."""
    monkeypatch.setattr(index, "_RACY_NS", 0)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["data.batch_size=64"], DataError),
        (["host.arch=resnet18", "host.width=1.5", "slim.width=1.0"], SliceError),
        (["host.arch=nothing"], RecipeError),
    ],
)
def test_refused_start_leaves_none_of_the_directories_it_made(
    tmp_path, make_recipe, pictures, settings, error
):
    with pytest.raises(error):
        train(make_recipe(*settings), tmp_path / "a" / "b" / "run", pictures)
    assert list(tmp_path.iterdir()) == []


def test_refused_start_without_pictures_leaves_nothing(tmp_path, make_recipe):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in the folder"):
        train(make_recipe(), tmp_path / "a" / "run", tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_refused_start_keeps_what_was_there(tmp_path, make_recipe, pictures):
    (tmp_path / "runs" / ".edgecl").mkdir(parents=True)
    with pytest.raises(DataError):
        train(make_recipe("data.batch_size=64"), tmp_path / "runs" / "new" / "run", pictures)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".edgecl"]


# --- the record ---


def test_parameters_of_every_width_are_in_the_record(tmp_path, make_recipe, pictures):
    recipe = make_recipe("slim.widths=[0.35, 0.4, 0.5]", "run.epochs=1")
    params = train(recipe, tmp_path / "run", pictures)["params"]
    with torch.device("meta"):
        expected = {
            name: count_parameters(create_backbone(recipe.host.arch, width=width))
            for name, width in (("host", 0.75), ("slim", 0.5), ("slim_at_0.4", 0.4), ("slim_at_0.35", 0.35))
        }
    assert params == expected


def test_full_disk_fails_the_run_at_its_last_whole_checkpoint(tmp_path, make_recipe, pictures, monkeypatch):
    out = tmp_path / "run"

    def write(run_dir, *, step, **what):
        with disk_errors(run_dir.checkpoint_file(step)):
            if step > 5:
                raise OSError(errno.ENOSPC, "")
            write_checkpoint(run_dir, step=step, **what)

    monkeypatch.setattr(saver, "write_checkpoint", write)
    with pytest.raises(ArtifactError, match="no room on the disk") as caught:
        train(make_recipe("run.epochs=3"), out, pictures)
    record = RunDir(out).read()
    assert (record["state"], record["step"], record["error"]) == ("failed", 5, caught.value.problem)
    assert read_newest(RunDir(out)).step == 5


def test_error_of_a_run_is_shown_though_its_record_finds_no_room(
    tmp_path, make_recipe, pictures, monkeypatch
):
    write = pretrain.write_json

    def no_room(path, record):
        if record["state"] == "failed":
            raise ArtifactError("no room on the disk to write 'run.json'")
        write(path, record)

    monkeypatch.setattr(pretrain, "write_json", no_room)
    monkeypatch.setattr(loop, "make_views", lambda *words, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(make_recipe(), tmp_path / "run", pictures)
    assert RunDir(tmp_path / "run").read()["state"] == "running"


def test_failed_run_goes_on_and_forgets_its_error(tmp_path, make_recipe, pictures):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_views", lambda *words, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_recipe("run.epochs=1"), out, pictures)
    record = RunDir(out).read()
    assert (record["state"], record["error"]) == ("failed", "ZeroDivisionError: division by zero")
    record = train(make_recipe("run.epochs=1"), out, pictures, resume=True)
    assert (record["state"], record["step"]) == ("done", 5)
    assert "error" not in RunDir(out).read()


def test_a_checkpoint_that_is_written_when_the_run_has_ended_leaves_its_state(
    tmp_path, make_recipe, labelled_pictures, monkeypatch
):
    """Ctrl-C may end the wait for the writing thread, which then still says that its checkpoint stands."""
    over, late = threading.Event(), []

    def fit(self, *, stop, on_checkpoint):
        def write():
            over.wait()
            on_checkpoint(3)

        late.append(threading.Thread(target=write))
        late[0].start()
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(), tmp_path / "run", labelled_pictures)
    over.set()
    late[0].join()
    record = RunDir(tmp_path / "run").read()
    assert (record["state"], record["step"]) == ("stopped", 3)
