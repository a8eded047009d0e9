"""Runs that are killed, pre-empted or changed, and go on: real processes, real signals."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from worlds import run_script, wait_until

from edgecl.config.recipe import recipe_from_tables
from edgecl.errors import ArtifactError, RecipeError
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.storage.lock import NAME as LOCK
from edgecl.storage.lock import hold

from .conftest import assert_same_run, steps_of, train, train_until

KILLS = 7

# One process imports torch; the runs are forks of it, killed and started again.
KILL_SCRIPT = """
import json, os, random, signal, sys, time, traceback, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
from edgecl.config.recipe import recipe_from_tables
from edgecl.train.pretrain import pretrain

killed, whole, data, tables, kills = sys.argv[1:]
recipe = recipe_from_tables(json.loads(tables), source="test")


def start(out):
    child = os.fork()
    if child:
        return child
    # A slow disk: most of a run's time a checkpoint is being written.
    flush = os.fsync
    os.fsync = lambda handle: (time.sleep(0.05), flush(handle))[1]
    try:
        pretrain(recipe, recipe_name="tiny", out=Path(out), data=data, device="cpu", resume=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def steps_done():
    names = sorted(path.name for path in Path(killed, "checkpoints").glob("step-*"))
    return int(names[-1].removeprefix("step-")) if names else 0


random = random.Random(7)
halves, seen = 0, []
while len(seen) < int(kills):
    before = steps_done()
    child = start(killed)
    # The run must get somewhere, or the kills would all hit its start.
    until = time.monotonic() + 60
    goal = before + random.choice([0, 1, 1, 1])
    while steps_done() < goal and time.monotonic() < until:
        time.sleep(0.001)
    # One kill at least meets a checkpoint half written, however slow the machine.
    while not halves and not any(Path(killed, "checkpoints").glob(".step-*")) and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.3) if halves else 0.0)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(f"the run ended with {os.WEXITSTATUS(status)} before it was killed {kills} times")
    seen.append(steps_done())
    halves += any(Path(killed, "checkpoints").glob(".step-*"))
for out in (killed, whole):
    _, status = os.waitpid(start(out), 0)
    if status:
        sys.exit(f"{out} ended with {status}")
print(json.dumps({"seen": seen, "halves": halves}))
"""


MORE = [
    "host.nested_start=true",
    "method.coding_rate.weight=0.1",
    "method.coding_rate.until=0.6",
    "method.symmetric=true",
    "method.loss='simclr'",
    "views.local_count=3",
]


@pytest.mark.parametrize(
    ("more", "kills"),
    [
        pytest.param([], KILLS, id="SACL-XD"),
        pytest.param(MORE, 4, id="rate, symmetric, local views", marks=pytest.mark.slow),
    ],
)
def test_killed_many_times_is_uninterrupted(tmp_path, make_recipe, labelled_pictures, more, kills):
    """SIGKILL at random moments, the middle of a checkpoint's write included."""
    recipe = make_recipe("run.epochs=8", "run.checkpoint_steps=2", "run.quality_epochs=3", *more)
    script = tmp_path / "kill.py"
    script.write_text(KILL_SCRIPT, encoding="utf-8")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    tables = json.dumps(recipe.model_dump(mode="json"))
    printed = run_script(script, killed, whole, labelled_pictures, tables, kills)
    found = json.loads(printed.splitlines()[-1])
    assert len(found["seen"]) == kills
    assert found["halves"] >= 1 or kills < KILLS, (
        "no kill met a checkpoint half written: the test does not test what it says"
    )
    assert_same_run(killed, whole)
    assert not list((killed / "checkpoints").glob(".*"))
    assert RunDir(killed).read().state == "done"


@pytest.fixture
def edgecl_start(recipe_file):
    def start(*words, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "edgecl", *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "Ctrl-C", -signal.SIGINT)]
)
def test_a_signal_saves_and_ends_well(
    tmp_path, edgecl_start, recipe_file, image_folder, number, name, status
):
    """As a scheduler pre-empts, or a person at the terminal: the printed command finishes the run, bit for bit."""
    out = tmp_path / "a run"
    settings = ["--set", "run.epochs=20", "--set", "run.checkpoint_epochs=20", "--set", "run.log_every=1"]
    process = edgecl_start(
        "pretrain", recipe_file, "--data", image_folder, "--out", out, "--device", "cpu", *settings
    )
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 3, process)
    process.send_signal(number)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == status, said
    assert ("Ctrl-C again" in said) == (number == signal.SIGINT)
    done = re.fullmatch(
        rf"stopped by {name} after step (\d+) of (\d+), and saved; go on with: edgecl (pretrain .* --resume)\n",
        printed,
    )
    assert done, printed
    step, total = int(done[1]), int(done[2])
    assert read_newest(RunDir(out)).step == step
    record = RunDir(out).read()
    assert (record.state, record.step) == ("stopped", step)
    assert "Traceback" not in said

    again = edgecl_start(*shlex.split(done[3]))
    printed, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert RunDir(out).read().state == "done"
    assert read_newest(RunDir(out)).step == total
    assert [line["step"] for line in steps_of(out)] == list(range(1, total + 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_recipe, labelled_pictures):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(make_recipe(), out, labelled_pictures)
    return out


@pytest.fixture
def earlier(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_changed_recipe_is_refused_with_what_would_allow_it(earlier, make_recipe, labelled_pictures):
    with pytest.raises(RecipeError) as caught:
        train(make_recipe("run.epochs=3", "run.log_every=2"), earlier, labelled_pictures, resume=True)
    assert "run.epochs was 2, now 3; run.log_every was 1, now 2" in caught.value.problem
    assert caught.value.hint.endswith("add --allow run.epochs --allow run.log_every")


def test_what_decides_a_step_cannot_change(earlier, make_recipe, labelled_pictures):
    with pytest.raises(RecipeError) as caught:
        train(
            make_recipe("run.epochs=3", "optim.lr=0.5"),
            earlier,
            labelled_pictures,
            resume=True,
            allow=["run.epochs"],
        )
    assert caught.value.problem.endswith("another recipe: optim.lr was 0.001, now 0.5")
    assert "repeat the command" in caught.value.hint
    tables = make_recipe().model_dump(mode="json") | {"method": {"name": "byol"}}
    tables["host"]["width"] = tables["slim"]["width"]
    with pytest.raises(RecipeError) as caught:
        train(recipe_from_tables(tables, source="test"), earlier, labelled_pictures, resume=True)
    assert caught.value.problem.endswith(": method.name was 'sacl-xd', now 'byol'")
    with pytest.raises(RecipeError, match=r"'optim\.lr' cannot change within a run"):
        train(make_recipe("optim.lr=0.5"), earlier, labelled_pictures, resume=True, allow=["optim.lr"])
    with pytest.raises(RecipeError, match=r"there is no setting 'run\.epoch'"):
        train(make_recipe(), earlier, labelled_pictures, resume=True, allow=["run.epoch"])


def test_more_epochs_can_be_allowed(earlier, make_recipe, labelled_pictures, capsys):
    record = train(make_recipe("run.epochs=3"), earlier, labelled_pictures, resume=True, allow=["run.epochs"])
    assert "resuming with a change: run.epochs was 2, now 3" in capsys.readouterr().err
    assert (record.state, record.step, record.changes) == ("done", 15, ["run.epochs was 2, now 3"])
    assert read_newest(RunDir(earlier)).step == 15
    assert RunDir(earlier).read().recipe["run"]["epochs"] == 3


def test_allowing_without_resuming_is_named(tmp_path, make_recipe, labelled_pictures):
    with pytest.raises(RecipeError, match="add --resume to --allow"):
        train(make_recipe(), tmp_path / "run", labelled_pictures, allow=["run.epochs"])


def test_force_goes_over_what_a_killed_force_left(earlier, make_recipe, labelled_pictures):
    (earlier / ".checkpoints.old").mkdir()
    (earlier / ".checkpoints.old" / "step-000000005").mkdir()
    train(make_recipe("run.epochs=1"), earlier, labelled_pictures, force=True)
    assert sorted(path.name for path in earlier.iterdir() if path.name != LOCK) == [
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "views.png",
    ]


def test_checkpoints_can_be_read_by_others(earlier):
    for path in (earlier / "checkpoints").rglob("*.*"):
        if path.is_file():
            assert path.stat().st_mode & 0o444 == 0o444, path


def test_fewer_epochs_than_are_done_are_refused_before_a_word_of_resuming(
    earlier, make_recipe, labelled_pictures, capsys
):
    before = RunDir(earlier).read()
    with pytest.raises(RecipeError) as caught:
        train(make_recipe("run.epochs=1"), earlier, labelled_pictures, resume=True, allow=["run.epochs"])
    assert re.search("end at step 5, .*at step 10 already", caught.value.problem)
    assert re.search("run.epochs to 2 or more.*another --out", caught.value.hint)
    assert "resuming" not in capsys.readouterr().err
    assert RunDir(earlier).read() == before


def test_two_runs_cannot_write_to_one_directory(earlier, make_recipe, labelled_pictures):
    def times():
        files = (path for path in earlier.rglob("*") if path.is_file() and path.name != LOCK)
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    with (
        hold(earlier, what="run directory"),
        pytest.raises(ArtifactError) as caught,
    ):
        train(make_recipe(), earlier, labelled_pictures, force=True)
    assert f"in use by process {os.getpid()} on {os.uname().nodename}" in caught.value.problem
    assert times() == before


@pytest.mark.parametrize("setting", ["run.checkpoint_steps=3", "run.accumulate=2", "slim.slow_start=0.5"])
def test_a_stop_within_an_epoch_leaves_no_trace(tmp_path, make_recipe, labelled_pictures, setting):
    recipe = make_recipe(setting, "run.epochs=3")
    train(recipe, tmp_path / "whole", labelled_pictures)

    train_until(7, recipe, tmp_path / "stopped", labelled_pictures)
    assert read_newest(RunDir(tmp_path / "stopped")).step == 7
    train(recipe, tmp_path / "stopped", labelled_pictures, resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
