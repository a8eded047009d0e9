"""Runs that go on when their images, their place or their surroundings are no longer what they were."""

import shutil
from pathlib import Path

import pytest
import torch

from edgecl.errors import ArtifactError, DataError, RecipeError
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.train import loop

from .conftest import steps_of, train, train_until, write_pictures

pytestmark = pytest.mark.usefixtures("index_at_once")


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 pictures that a test may damage."""
    return write_pictures(tmp_path / "photos", 40)


def blank(path):
    """Make a picture unreadable and leave its size."""
    path.write_bytes(bytes(path.stat().st_size))


def losses(out):
    return [record["loss"] for record in steps_of(out)]


def test_a_picture_in_memory_that_became_unreadable_is_named_and_may_be_allowed(
    tmp_path, make_recipe, photos, capsys
):
    out = tmp_path / "run"
    recipe = make_recipe("run.checkpoint_steps=2", "data.max_bad_fraction=0.2", "data.batch_size=4")
    train_until(4, recipe, out, photos)
    for name in ("007.png", "011.png"):
        blank(photos / name)
    with pytest.raises(RecipeError) as caught:
        train(recipe, out, photos, resume=True)
    assert "cannot resume: 2 of the run's images" in caught.value.problem
    assert caught.value.where["unreadable"].replace(str(photos), "") == "/007.png, /011.png"
    assert "repair them" in caught.value.hint
    assert "--allow data" in caught.value.hint
    assert RunDir(out).read().step == 4
    record = train(recipe, out, photos, resume=True, allow=["data"])
    assert (record.state, record.steps_per_epoch, record.data.images) == ("done", 9, 38)
    assert "the images lost 2" in record.changes[0]
    said = capsys.readouterr().err
    assert "resuming with a change: the images lost 2" in said
    assert "going on from step 4 of 18" in said


def test_what_was_left_out_at_first_stays_left_out(tmp_path, make_recipe, photos):
    """Else a repaired picture would move all others in the order."""
    good = (photos / "007.png").read_bytes()
    blank(photos / "007.png")
    recipe = make_recipe("run.checkpoint_steps=2", "data.max_bad_fraction=0.2", "data.batch_size=4")
    train(recipe, tmp_path / "whole", photos)
    train_until(4, recipe, tmp_path / "run", photos)
    shutil.rmtree(tmp_path / ".edgecl")
    (photos / "007.png").write_bytes(good)
    train(recipe, tmp_path / "run", photos, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_other_images_are_counted_and_may_be_allowed(tmp_path, make_recipe, photos):
    out, recipe = tmp_path / "run", make_recipe("run.checkpoint_steps=2", "data.batch_size=4")
    train_until(4, recipe, out, photos)
    (photos / "007.png").unlink()
    with pytest.raises(RecipeError) as caught:
        train(recipe, out, photos, resume=True)
    assert "other images" in caught.value.problem
    assert caught.value.where["was"] == f"{photos} with 40 images"
    assert caught.value.where["now"] == f"{photos} with 39 images"
    record = train(recipe, out, photos, resume=True, allow=["data"])
    assert record.changes == [f"the images were {photos} with 40 images, now {photos} with 39 images"]
    assert (record.state, record.steps_per_epoch) == ("done", 9)


def test_images_that_fail_cost_no_step(tmp_path, make_recipe, photos):
    """Too many are unreadable in the middle of an epoch: what was learnt until then is on the disk."""
    recipe = make_recipe("data.cache_mib=0", "data.workers=0", "run.checkpoint_epochs=2")
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(recipe, whole, photos)
    shutil.copytree(photos, tmp_path / "kept")
    record_step = loop.Training._record_step

    def and_damage(self, outcome, progress, **settings):
        record_step(self, outcome, progress, **settings)
        if self.step == 7:
            for path in photos.glob("*.png"):
                blank(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "_record_step", and_damage)
        with pytest.raises(DataError):
            train(recipe, out, photos)
    assert read_newest(RunDir(out)).step == 7
    assert (RunDir(out).read().state, RunDir(out).read().step) == ("failed", 7)
    shutil.copytree(tmp_path / "kept", photos, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / ".edgecl")
    train(recipe, out, photos, resume=True)
    assert losses(out) == losses(whole)


def test_checkpoints_that_are_gone_are_missed(tmp_path, make_recipe, photos):
    out = tmp_path / "run"
    train(make_recipe(), out, photos)
    metrics = RunDir(out).metrics_file.read_bytes()
    (out / "checkpoints").rename(tmp_path / "unmounted")
    with pytest.raises(ArtifactError, match=r"step 10, .*checkpoints are gone") as caught:
        train(make_recipe(), out, photos, resume=True)
    assert "mounted" in caught.value.hint
    assert RunDir(out).metrics_file.read_bytes() == metrics


def test_other_surroundings_are_said_and_kept(tmp_path, make_recipe, photos, capsys):
    out, recipe = tmp_path / "run", make_recipe("run.checkpoint_steps=2")
    train_until(4, recipe, out, photos)
    capsys.readouterr()
    torch.set_num_threads(2)
    record = train(recipe, out, photos, resume=True)
    said = capsys.readouterr().err
    assert "resuming elsewhere: threads was 1, now 2" in said
    assert "edgecl: going on from step 4 of 10" in said
    assert record.changes == ["threads was 1, now 2"]


@pytest.mark.parametrize("inside", ["run", "runs/tiny"])
def test_a_run_is_not_written_among_its_images(make_recipe, photos, inside, monkeypatch):
    with pytest.raises(DataError) as caught:
        train(make_recipe(), photos / inside, photos)
    assert f"among the images of '{photos}'" in caught.value.problem
    assert "--out" in caught.value.hint
    assert len(list(photos.rglob("*"))) == 40
    monkeypatch.chdir(photos)
    with pytest.raises(DataError, match="would lie among the images"):
        train(make_recipe(), Path(inside), ".")


def test_the_demo_images_are_no_folder(tmp_path, make_recipe, monkeypatch):
    """A folder that happens to be called `demo`, such as the one `edgecl demo` writes, holds none of them."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    record = train(make_recipe("data.limit=16", "run.epochs=1"), Path("demo") / "run", "demo")
    assert record.state == "done"
