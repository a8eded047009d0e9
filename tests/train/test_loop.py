"""The training loop on a run of seconds: what it writes, that it repeats, resumes and stops."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image

from edgecl.errors import ArtifactError, CollapseError, DataError, DeviceError, RecipeError
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.train import loop
from edgecl.train import pretrain as pretraining
from edgecl.train.monitor import read_metrics
from edgecl.train.pretrain import pretrain

from .conftest import assert_same_run, events_of, looks_of, steps_of, train

STEP_KEYS = {
    *("step", "epoch", "lr", "images_per_s", "loss", "sacl", "xd_host", "xd_slim", "coding_rate"),
    *("diagonal", "off_diagonal_rms", "std", "grad_norm_host", "grad_norm_slim"),
}
QUALITY_KEYS = {"step", "epoch", "rankme_host", "rankme_slim", "knn_top1_host", "knn_top1_slim"}
STEPS = 5  # an epoch of 40 pictures in batches of 8


def same_weights(one, other):
    one, other = (read_newest(RunDir(path)) for path in (one, other))
    assert (one.epoch, one.step) == (other.epoch, other.step)
    assert one.model.keys() == other.model.keys()
    return all(torch.equal(one.model[name], other.model[name]) for name in one.model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_recipe, arm_settings, pictures, labelled_pictures):
    """One run of every arm; SACL-XD on pictures with labels."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    for arm, assignments in arm_settings.items():
        data = labelled_pictures if arm == "SACL-XD" else pictures
        train(make_recipe(*assignments), root / arm, data)
    return root


ARMS = ["Barlow Twins", "XD only", "SACL only", "SACL-XD"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_step_has_every_number(runs, arm):
    records = steps_of(runs / arm)
    assert [record["step"] for record in records] == list(range(1, 2 * STEPS + 1))
    absent = {"coding_rate"}
    if arm in ("Barlow Twins", "SACL only"):
        absent |= {"xd_host", "xd_slim"}
    if arm in ("Barlow Twins", "XD only"):
        absent |= {"grad_norm_slim"}
    for record in records:
        assert record.keys() == STEP_KEYS
        assert {key for key in record if record[key] is None} == absent
        assert all(math.isfinite(record[key]) for key in STEP_KEYS - absent)


@pytest.mark.parametrize("arm", ARMS)
def test_quality_is_looked_at_each_time_it_is_due(runs, arm):
    records = looks_of(runs / arm)
    # Before the first step, once the plateau alarm has its records, and after each epoch.
    assert [record["step"] for record in records] == [0, 3, 5, 10]
    assert [record["epoch"] for record in records] == [0.0, 0.6, 1.0, 2.0]
    for record in records:
        assert record.keys() == QUALITY_KEYS
        assert 1 <= record["rankme_host"] <= 40
        if arm in ("SACL only", "SACL-XD"):
            assert 1 <= record["rankme_slim"] <= 40
        else:
            assert record["rankme_slim"] is None
        for net in ("host", "slim"):
            knn = record[f"knn_top1_{net}"]
            # Neighbors are asked where there are labels.
            assert knn is None if arm != "SACL-XD" else 0 <= knn <= 100


@pytest.mark.parametrize("arm", ARMS)
def test_logged_loss_is_the_formula_of_the_logged_terms(runs, arm, make_recipe, arm_settings):
    method = make_recipe(*arm_settings[arm]).method
    for record in steps_of(runs / arm):
        distillation = 0.0 if record["xd_slim"] is None else (record["xd_host"] + record["xd_slim"]) / 2
        expected = method.scale * (method.alpha * record["sacl"] + (1 - method.alpha) * distillation)
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


def test_logged_rate_is_that_of_the_step(runs, make_recipe):
    rates = [record["lr"] for record in steps_of(runs / "SACL-XD")]
    warm_up = round(0.5 * STEPS)
    for step, rate in enumerate(rates):
        line = 1e-3 * (step + 1) / (warm_up + 1)
        cosine = 1e-3 * (1 + math.cos(math.pi * (step - warm_up) / (2 * STEPS - warm_up))) / 2
        assert rate == pytest.approx(line if step < warm_up else cosine, abs=1e-12)


@pytest.mark.parametrize("arm", ARMS)
def test_run_record_says_what_was_run(runs, arm, make_recipe, arm_settings):
    record = RunDir(runs / arm).read()
    recipe = make_recipe(*arm_settings[arm])
    assert record.state == "done"
    assert record.method == arm
    assert record.recipe == recipe.model_dump(mode="json")
    assert (record.steps_per_epoch, record.total_steps) == (STEPS, 2 * STEPS)
    assert record.data.images == 40
    assert record.made_from == record.data.fingerprint
    assert record.wall_s > 0
    assert {"torch", "timm", "accelerate", "numpy", "python"} <= record.versions.keys()


def test_a_grid_of_views_is_drawn(runs):
    with Image.open(runs / "SACL-XD" / "views.png") as page:
        assert page.format == "PNG"
        assert page.size[0] > page.size[1] > 100
        assert len(page.convert("RGB").getcolors(1 << 24)) > 50


def test_training_changes_every_tensor(runs, make_recipe):
    from edgecl.nets.build import create_slimmable

    torch.manual_seed(0)
    start = create_slimmable(make_recipe()).state_dict()
    end = read_newest(RunDir(runs / "SACL-XD")).model
    assert start.keys() == end.keys()
    assert [name for name in start if torch.equal(start[name], end[name])] == []


def test_the_same_seed_gives_the_same_weights(runs, tmp_path, make_recipe, labelled_pictures):
    # A scheduler says --resume the first time and after each pre-emption.
    train(make_recipe(), tmp_path / "again", labelled_pictures, resume=True)
    assert_same_run(runs / "SACL-XD", tmp_path / "again")


def test_another_seed_gives_other_weights(runs, tmp_path, make_recipe, labelled_pictures):
    train(make_recipe("run.seed=1"), tmp_path / "other", labelled_pictures)
    assert not same_weights(runs / "SACL-XD", tmp_path / "other")


def test_looking_on_the_way_changes_nothing(runs, tmp_path, make_recipe, labelled_pictures):
    """Records, quality looks and checkpoints are observations: fewer of them, the same weights."""
    recipe = make_recipe("run.log_every=7", "run.quality_epochs=9", "run.checkpoint_epochs=2")
    train(recipe, tmp_path / "quiet", labelled_pictures)
    assert [record["step"] for record in steps_of(tmp_path / "quiet")] == [7, 10]
    assert same_weights(runs / "SACL-XD", tmp_path / "quiet")


def test_a_run_stopped_before_its_first_checkpoint_starts_over(
    runs, tmp_path, make_recipe, labelled_pictures
):
    copy = tmp_path / "run"
    shutil.copytree(runs / "SACL-XD", copy)
    shutil.rmtree(copy / "checkpoints")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "state": "running", "step": 0}))
    train(make_recipe(), copy, labelled_pictures, resume=True)
    assert_same_run(runs / "SACL-XD", copy)


def test_resuming_a_run_that_is_done_changes_nothing_but_its_time(
    runs, tmp_path, make_recipe, labelled_pictures
):
    copy = shutil.copytree(runs / "SACL-XD", tmp_path / "run")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "command": "edgecl first", "wall_s": 1000.0}))
    resumed = train(make_recipe(), copy, labelled_pictures, resume=True)
    assert (resumed.state, resumed.command) == ("done", "edgecl first")
    assert resumed.wall_s > 1000
    assert same_weights(runs / "SACL-XD", copy)
    assert read_metrics(copy / "metrics.jsonl") == read_metrics(runs / "SACL-XD" / "metrics.jsonl")


def test_a_torn_newest_checkpoint_costs_its_epochs_only(
    runs, tmp_path, make_recipe, labelled_pictures, capsys
):
    copy = tmp_path / "run"
    shutil.copytree(runs / "SACL-XD", copy)
    (copy / "checkpoints" / "step-000000010" / "model.safetensors").write_bytes(b"torn")
    train(make_recipe(), copy, labelled_pictures, resume=True)
    assert "step-000000010 passed over" in capsys.readouterr().err
    assert_same_run(runs / "SACL-XD", copy)


def test_resuming_what_is_no_run_is_named(tmp_path, make_recipe, pictures):
    (tmp_path / "thesis.txt").write_text("words", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"not a run directory.* no run\.json"):
        train(make_recipe(), tmp_path, pictures, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_force_replaces_a_run(runs, tmp_path, make_recipe, pictures):
    copy = tmp_path / "run"
    shutil.copytree(runs / "SACL-XD", copy)
    (copy / "stray").write_text("", encoding="utf-8")
    train(make_recipe("run.epochs=1"), copy, pictures, force=True)
    assert read_newest(RunDir(copy)).epoch == 1
    assert len(steps_of(copy)) == STEPS
    assert not (copy / "stray").exists()


def test_a_failed_start_leaves_an_earlier_run_alone(runs, tmp_path, make_recipe, pictures):
    copy = tmp_path / "run"
    shutil.copytree(runs / "SACL-XD", copy)
    with pytest.raises(DataError):
        train(make_recipe("data.batch_size=64"), copy, pictures, force=True)
    assert same_weights(runs / "SACL-XD", copy)


def test_no_images_named_is_an_error(tmp_path, make_recipe):
    with pytest.raises(RecipeError, match="'tiny' names no images") as caught:
        pretrain(make_recipe(), recipe_name="tiny", out=tmp_path / "run", device="cpu")
    assert "--data" in caught.value.hint


def test_a_collapse_is_warned_of_and_stops_the_run(tmp_path, make_recipe, pictures, monkeypatch, capsys):
    monkeypatch.setattr(loop, "spread", lambda z: torch.tensor(0.01))
    with pytest.raises(CollapseError, match="the embedding collapsed"):
        train(make_recipe(), tmp_path / "run", pictures)
    assert len(steps_of(tmp_path / "run")) == 5
    assert capsys.readouterr().err.count("the embedding may be collapsing") == 1
    events = [(record["step"], record["because"]) for record in events_of(tmp_path / "run")]
    assert events == [(step, "collapse") for step in (1, 2, 3, 4)]
    record = RunDir(tmp_path / "run").read()
    assert (record.state, record.step) == ("failed", 0)
    assert record.error.startswith("the embedding collapsed")


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_unreadable_images_within_what_is_allowed_do_not_stop_a_run(
    tmp_path, make_recipe, pictures, capsys, cache_mib
):
    """The quality look uses fewer images, of which a larger fraction may be bad."""
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    (folder / "000.png").write_bytes(b"")
    settings = ["data.max_bad_fraction=0.025", "run.epochs=1", f"data.cache_mib={cache_mib}"]
    record = train(make_recipe(*settings), tmp_path / "run", folder)
    assert record.data.images == 39
    assert record.data.skipped == [str(folder / "000.png")]
    assert "1 unreadable image of" in capsys.readouterr().err


def test_bf16_trains(tmp_path, make_recipe, pictures):
    train(make_recipe("run.precision='bf16'", "run.epochs=1"), tmp_path / "run", pictures)
    assert all(math.isfinite(record["loss"]) for record in steps_of(tmp_path / "run"))


def test_gradients_are_clipped(tmp_path, make_recipe, pictures, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def note(self, *positional, **named):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        return step(self, *positional, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    train(make_recipe("optim.clip_norm=0.01", "run.epochs=1"), tmp_path / "run", pictures)
    assert len(norms) == STEPS
    assert norms == pytest.approx([0.01] * STEPS, rel=1e-3)


def test_trackers_start_once_the_run_directory_stands(tmp_path, make_recipe, pictures, monkeypatch):
    """They write into it, and making it removes what was there before."""
    stood = []
    monkeypatch.setattr(pretraining.accelerate.utils, "is_tensorboard_available", lambda: True)
    build = pretraining.Accelerator
    monkeypatch.setattr(
        pretraining,
        "Accelerator",
        lambda **settings: build(**{**settings, "log_with": None, "project_dir": None}),
    )
    monkeypatch.setattr(
        build,
        "init_trackers",
        lambda self, name: stood.append(RunDir(tmp_path / "run").record_file.is_file()),
    )
    train(make_recipe("run.trackers=['tensorboard']", "run.epochs=1"), tmp_path / "run", pictures)
    assert stood == [True]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, make_recipe, pictures, monkeypatch):
    monkeypatch.setattr(pretraining.accelerate.utils, "is_wandb_available", lambda: False)
    with pytest.raises(DeviceError, match="'wandb' is not installed") as caught:
        train(make_recipe("run.trackers=['wandb']"), tmp_path / "run", pictures)
    # Exact, for it is a command to copy.
    assert caught.value.hint == "pip install 'edgecl[wandb]'"
