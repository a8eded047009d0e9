"""Losses that are not finite: the step is left out, the run goes back once, then it stops."""

import json
import math

import pytest
import torch

from edgecl.errors import NonFiniteError
from edgecl.methods.sacl_xd import SaclXd
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.checkpoint import read_newest, read_sealed
from edgecl.storage.directories import RunDir
from edgecl.train import loop
from edgecl.train.guard import Guard

from .conftest import assert_same_state, events_of, steps_of, train


def break_losses(monkeypatch, calls):
    """Make the losses of these calls, counted from 1, no numbers; and the activations with them."""
    loss = SaclXd.loss
    forward = torch.nn.Linear.forward
    count = [0]

    def count_passes(self, embeddings, step):
        count[0] += 1
        return loss(self, embeddings, step)

    def poison(self, x):
        y = forward(self, x)
        return y * math.nan if count[0] + 1 in calls else y

    monkeypatch.setattr(SaclXd, "loss", count_passes)
    monkeypatch.setattr(torch.nn.Linear, "forward", poison)
    return count


def test_a_step_left_out_changes_nothing(tmp_path, make_recipe, pictures, monkeypatch):
    """Neither weights nor moments, nor the batch norms' running statistics, which the forward passes had reached."""
    break_losses(monkeypatch, {4})
    recipe = make_recipe("run.epochs=1", "run.checkpoint_steps=1", "run.keep_checkpoints=9")
    train(recipe, tmp_path / "run", pictures)
    run_dir = RunDir(tmp_path / "run")
    before, after = (
        read_sealed(run_dir, sha256_of_file(run_dir.checkpoint_file(step) / "state.json")) for step in (3, 4)
    )
    assert_same_state(before, after)
    # And the run went on from there.
    last = read_newest(run_dir)
    assert last.step == 5
    assert any(not torch.equal(last.model[name], after.model[name]) for name in last.model)
    (event,) = events_of(tmp_path / "run")
    assert (event["step"], event["event"]) == (4, "left out")
    assert event["because"].startswith("loss nan, sacl nan, xd_host nan, xd_slim nan, ")
    broken = [record for record in steps_of(tmp_path / "run") if record["step"] == 4][-1]
    assert broken["loss"] is None


def test_too_many_go_back_once_with_a_smaller_rate(tmp_path, make_recipe, pictures, monkeypatch, capsys):
    out = tmp_path / "run"
    recipe = make_recipe("run.epochs=3", "run.max_skipped=1", "optim.warmup_epochs=0.0")
    # The 8th and 9th step; after going back to step 5 everything is finite.
    count = break_losses(monkeypatch, {8, 9})
    assert train(recipe, out, pictures).state == "done"
    assert count[0] == 15 + 4  # steps 6 to 9 were made twice
    assert "back to step 5 with 0.5 of the learning rate" in capsys.readouterr().err
    (event,) = events_of(out)
    assert event["event"] == "went back"
    assert (event["step"], event["from_step"], event["left_out"]) == (5, 9, [8, 9])
    rates = {record["step"]: record["lr"] for record in steps_of(out)}
    reference = tmp_path / "reference"
    monkeypatch.undo()
    train(recipe, reference, pictures)
    usual = {record["step"]: record["lr"] for record in steps_of(reference)}
    assert list(rates) == list(range(1, 16))
    for step, rate in rates.items():
        assert rate == pytest.approx(usual[step] * (1 if step <= 5 else 0.5))
    assert read_newest(RunDir(out)).state["guard"] == {"went_back": True, "skipped": []}


def test_a_second_time_stops_the_run(tmp_path, make_recipe, pictures, monkeypatch):
    out = tmp_path / "run"
    break_losses(monkeypatch, set(range(7, 99)))
    with pytest.raises(NonFiniteError) as caught:
        train(make_recipe("run.epochs=9", "run.max_skipped=1"), out, pictures)
    assert caught.value.problem.startswith("2 steps since the last checkpoint had no finite loss")
    assert "again after going back to a checkpoint" in caught.value.problem
    assert caught.value.where == {"run": out, "step": 7}
    assert "lower [optim] lr" in caught.value.hint
    record = RunDir(out).read()
    assert (record.state, record.step, record.error) == ("failed", 5, caught.value.problem)
    # The last good checkpoint is left to go on from.
    newest = read_newest(RunDir(out))
    assert newest.step == 5
    assert all(torch.isfinite(tensor).all() for tensor in newest.model.values())


def test_having_gone_back_outlives_a_kill(tmp_path, make_recipe, pictures, monkeypatch):
    """Killed after going back and before the next checkpoint, a resumed run does not go back once more."""
    out = tmp_path / "run"
    recipe = make_recipe("run.epochs=3", "run.max_skipped=1", "optim.warmup_epochs=0.0")
    with monkeypatch.context() as patch:
        break_losses(patch, {8, 9})
        go_back = loop.Training._go_back

        def and_die(self, **settings):
            go_back(self, **settings)
            raise KeyboardInterrupt

        patch.setattr(loop.Training, "_go_back", and_die)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out, pictures)
    assert read_newest(RunDir(out)).state["guard"]["went_back"] is False
    with monkeypatch.context() as patch:
        # The same steps again.
        break_losses(patch, {3, 4})
        with pytest.raises(NonFiniteError, match="again after going back"):
            train(recipe, out, pictures, resume=True)
    assert [event["event"] for event in events_of(out)].count("went back") == 1


def test_weights_that_broke_are_never_saved(tmp_path, make_recipe, pictures):
    """The first step itself is finite; no loss is looked at before the end of the epoch, after the damage."""
    out = tmp_path / "run"
    recipe = make_recipe("optim.warmup_epochs=0.0", "run.log_every=1000")
    # No recipe may ask for such a rate.
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 1e30})})
    with pytest.raises(NonFiniteError, match=r"hold numbers that are not finite, again after going back"):
        train(recipe, out, pictures)
    assert list(out.glob("checkpoints/*")) == []
    (event,) = [record for record in events_of(out) if record["event"] == "went back"]
    assert (event["step"], event["from_step"]) == (0, 5)


def test_going_back_to_the_very_start_starts_from_the_same_weights(
    tmp_path, make_recipe, pictures, monkeypatch
):
    recipe = make_recipe("run.epochs=1", "run.max_skipped=0", "optim.lr=1e-30", "run.channels_last=true")
    train(recipe, tmp_path / "usual", pictures)
    break_losses(monkeypatch, {2})
    train(recipe, tmp_path / "back", pictures)
    usual, back = (read_newest(RunDir(tmp_path / name)) for name in ("usual", "back"))
    assert back.state["guard"]["went_back"]
    # At a rate of nothing only the running statistics move, and they are those of all five steps.
    for name, tensor in usual.model.items():
        torch.testing.assert_close(tensor, back.model[name], rtol=0, atol=1e-20)


def test_the_count_starts_anew_with_a_checkpoint():
    guard = Guard(max_skipped=2)
    for _ in range(3):
        assert not guard.must_go_back(1, terms="loss nan", where={})
        assert not guard.must_go_back(2, terms="loss nan", where={})
        guard.start_anew()
    assert not guard.must_go_back(3, terms="loss nan", where={})
    assert not guard.must_go_back(4, terms="loss nan", where={})
    kept = json.loads(json.dumps(guard.state()))
    resumed = Guard(max_skipped=2)
    resumed.restore(kept)
    assert resumed.must_go_back(5, terms="loss nan", where={})
