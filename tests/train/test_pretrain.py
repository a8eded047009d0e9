"""What the record of a run says, and that a start which is refused leaves nothing behind."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace

import pytest
import torch

from edgecl.errors import ArtifactError, DataError, RecipeError, SliceError
from edgecl.nets.backbone import count_parameters, create_backbone
from edgecl.storage.checkpoint import read_newest, write_checkpoint
from edgecl.storage.directories import RunDir
from edgecl.storage.writing import disk_errors
from edgecl.train import loop, pretrain, run_file, saver

from .conftest import train

pytestmark = pytest.mark.usefixtures("index_at_once")

# --- a start that is refused ---


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


def test_refused_start_keeps_what_was_there(tmp_path, make_recipe, pictures):
    (tmp_path / "runs" / ".edgecl").mkdir(parents=True)
    with pytest.raises(DataError):
        train(make_recipe("data.batch_size=64"), tmp_path / "runs" / "new" / "run", pictures)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".edgecl"]


NESTED = ["host.nested_start=true", "data.batch_size=8"]
IMPOSSIBLE = {
    "a size that the net does not take": (
        ["host.arch=vit_tiny_patch16_224", "host.width=1.0", "slim.width=1.0"],
        RecipeError,
        r"does not take pictures of 32 x 32",
    ),
    "tensors that do not nest": (
        [*NESTED, "host.arch=resnet18", "host.width=1.5", "slim.width=1.0"],
        SliceError,
        r"cannot slice this net",
    ),
    "slim nets that differ in their skips": (
        [
            *NESTED,
            "host.arch=mobilenetv3_large_100",
            "host.width=1.5",
            "slim.widths=[0.5, 1.0]",
            "slim.width=1.0",
        ],
        SliceError,
        r"differ in the skip connection",
    ),
    "more views than memory": (
        ["data.batch_size=100000", "views.local_count=30", "views.local_size=4096"],
        RecipeError,
        r"the 100,?000 x 32 views of one step take \d+\.\d GiB, and this machine has \d+\.\d GiB of memory",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_the_impossible_is_refused_before_the_images_are_read(
    tmp_path, make_recipe, pictures, monkeypatch, case
):
    settings, error, text = IMPOSSIBLE[case]
    monkeypatch.setattr(pretrain, "open_source", None)
    with pytest.raises(error, match=text) as caught:
        train(make_recipe(*settings), tmp_path / "run", pictures)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_views_that_just_fit_are_not_refused(make_recipe, monkeypatch):
    """8 pictures: two views of 32 pixels a side and three of 16, three channels of four bytes."""
    needed = 8 * (2 * 32 * 32 + 3 * 16 * 16) * 12
    recipe = make_recipe("views.local_count=3")
    memory = SimpleNamespace(total=needed)
    monkeypatch.setattr(pretrain.psutil, "virtual_memory", lambda: memory)
    pretrain._check_memory(recipe, torch.device("cpu"))
    memory.total -= 1
    with pytest.raises(RecipeError):
        pretrain._check_memory(recipe, torch.device("cpu"))


# --- the record ---


@pytest.mark.parametrize("nested", [True, False])
def test_skips_that_a_nested_start_changed_are_recorded_and_said_once(
    tmp_path, make_recipe, pictures, capsys, nested
):
    recipe = make_recipe(
        "host.arch=mobilenetv3_small_050",
        "host.width=1.5",
        "slim.width=1.0",
        f"host.nested_start={str(nested).lower()}",
        "run.epochs=1",
    )
    record = train(recipe, tmp_path / "run", pictures)
    said = capsys.readouterr().err
    assert record.host_skips == ({"backbone.blocks.3.0": 24} if nested else {})
    assert RunDir(tmp_path / "run").read().host_skips == record.host_skips
    assert said.count("skip connections") == nested
    assert ("backbone.blocks.3.0 adds its input to its first 24 channels only" in said) == nested


def test_training_takes_the_threads_it_is_given_and_gives_them_back(tmp_path, make_recipe, pictures):
    record = train(make_recipe("run.threads=2", "run.epochs=1"), tmp_path / "run", pictures)
    assert record.threads == 2
    assert torch.get_num_threads() == 1  # the fixture's
    with pytest.raises(DataError):
        train(make_recipe("run.threads=2", "data.batch_size=64"), tmp_path / "other", pictures)
    assert torch.get_num_threads() == 1


def test_parameters_of_every_width_are_in_the_record(tmp_path, make_recipe, pictures):
    recipe = make_recipe("slim.widths=[0.35, 0.4, 0.5]", "run.epochs=1")
    params = train(recipe, tmp_path / "run", pictures).params
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
    assert (record.state, record.step, record.error) == ("failed", 5, caught.value.problem)
    assert read_newest(RunDir(out)).step == 5


def test_error_of_a_run_is_shown_though_its_record_finds_no_room(
    tmp_path, make_recipe, pictures, monkeypatch
):
    write = run_file.write_record

    def no_room(path, record):
        if record.state == "failed":
            raise ArtifactError("no room on the disk to write 'run.json'")
        write(path, record)

    monkeypatch.setattr(run_file, "write_record", no_room)
    monkeypatch.setattr(loop, "make_views", lambda *words, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(make_recipe(), tmp_path / "run", pictures)
    assert RunDir(tmp_path / "run").read().state == "running"


def test_failed_run_goes_on_and_forgets_its_error(tmp_path, make_recipe, pictures):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_views", lambda *words, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_recipe("run.epochs=1"), out, pictures)
    record = RunDir(out).read()
    assert (record.state, record.error) == ("failed", "ZeroDivisionError: division by zero")
    record = train(make_recipe("run.epochs=1"), out, pictures, resume=True)
    assert (record.state, record.step) == ("done", 5)
    assert RunDir(out).read().error is None


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
    assert (record.state, record.step) == ("stopped", 3)
