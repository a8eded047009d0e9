"""Checkpoints come and go: which are kept, what a full disk leaves, and what a process killed while writing leaves."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from disks import disk_of, largest_file

from edgecl.errors import ArtifactError
from edgecl.storage.checkpoint import read_best, read_newest, write_checkpoint
from edgecl.storage.directories import RunDir

FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def write(run_dir, step, quality=None, *, value=None, size=16, name="knn_top1_slim", **options):
    number = float(step if value is None else value)
    return write_checkpoint(
        run_dir,
        step=step,
        epoch=0,
        model={"weight": torch.full((size,), number)},
        optimizer={"state": {0: {"momentum": torch.full((size,), number)}}, "param_groups": []},
        state={"value": number},
        quality=None if quality is None else {"name": name, "value": quality},
        **options,
    )


def names(run_dir):
    return sorted(path.name for path in run_dir.checkpoints.iterdir())


def kept(run_dir):
    return [int(name.removeprefix("step-")) for name in names(run_dir)]


def tree(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


# --- which are kept ---


@pytest.mark.parametrize(
    ("qualities", "options", "expected", "best"),
    [
        ([None, None, None, None], {}, [3, 4], None),
        ([None, None, None, None], {"keep": 1}, [4], None),
        ([None, None, None, None], {"keep": 3}, [2, 3, 4], None),
        ([0.9, 0.1, 0.2, 0.3], {}, [1, 3, 4], 1),
        ([0.9, 0.1, 0.2, 0.3], {"keep": 1}, [1, 4], 1),
        ([0.9, 0.1, 0.2, 0.3], {"keep_best": False}, [3, 4], 4),
        ([0.1, 0.9, 0.2, 0.3], {}, [2, 3, 4], 2),
        ([0.1, 0.2, 0.3, 0.9], {}, [3, 4], 4),
        ([0.5, 0.5, 0.5, 0.1, 0.1], {}, [3, 4, 5], 3),
        ([0.9, None, None, None, None], {}, [1, 4, 5], 1),
        ([None, 0.2, None, 0.1, None, None], {}, [2, 5, 6], 2),
        ([-3.0, -7.0, -8.0, -9.0], {}, [1, 3, 4], 1),
        ([0.5, math.nan, math.inf, -math.inf, math.nan], {}, [1, 4, 5], 1),
        ([math.nan, math.nan, math.nan], {}, [2, 3], None),
        ([0, 0, 0, -1], {"keep": 1}, [3, 4], 3),
    ],
)
def test_the_newest_and_the_best_are_kept(run_dir, qualities, options, expected, best):
    for step, quality in enumerate(qualities, start=1):
        write(run_dir, step, quality, **options)
    assert kept(run_dir) == expected
    assert read_newest(run_dir).step == len(qualities)
    if best is None:
        with pytest.raises(ArtifactError, match="no whole checkpoint with a quality") as caught:
            read_best(run_dir)
        assert "[run] quality_epochs" in caught.value.hint
    else:
        assert read_best(run_dir).step == best


def test_qualities_of_another_name_are_not_compared(run_dir):
    write(run_dir, 1, 63.0, name="rankme_slim")
    write(run_dir, 2, 0.4)
    write(run_dir, 3, 0.3)
    assert read_best(run_dir).step == 2
    write(run_dir, 4, 0.2)
    assert kept(run_dir) == [2, 3, 4]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_best_is_passed_over_for_the_next_best(run_dir, capsys, name):
    for step, quality in enumerate([0.3, 0.9, 0.2, 0.4], start=1):
        write(run_dir, step, quality, keep=4)
    (run_dir.checkpoint_file(2) / name).write_text("{}")
    assert read_best(run_dir).step == 4
    said = capsys.readouterr().err
    assert "step-000000002 passed over" in said
    assert name in said


@pytest.mark.parametrize("name", FILES)
def test_a_torn_one_pushes_no_whole_one_out(run_dir, name):
    write(run_dir, 1)
    (write(run_dir, 2) / name).write_bytes(b"")
    assert read_newest(run_dir).step == 1
    write(run_dir, 3)
    assert kept(run_dir) == [1, 3]


def test_a_run_that_went_back_leaves_nothing_of_what_lay_ahead(run_dir):
    write(run_dir, 10, 0.5)
    write(run_dir, 20, 0.9)
    (write(run_dir, 30, 0.7, keep=3) / "model.safetensors").write_bytes(b"")
    (run_dir.checkpoint_file(20) / "state.json").write_text("torn")
    write(run_dir, 15, 0.1)
    assert kept(run_dir) == [10, 15]
    assert (read_newest(run_dir).step, read_best(run_dir).step) == (15, 10)


def test_what_cannot_be_read_just_now_is_not_removed(run_dir):
    write(run_dir, 1)
    # A link to itself stands for a disk that answers with an error.
    state = write(run_dir, 2) / "state.json"
    state.rename(state.with_name("aside"))
    state.symlink_to("state.json")
    for step in (3, 4, 5):
        write(run_dir, step)
    assert kept(run_dir) == [2, 4, 5]
    state.unlink()
    state.with_name("aside").rename(state)
    write(run_dir, 6)
    assert kept(run_dir) == [5, 6]


# --- the same step once more ---


def test_one_set_aside_for_its_like_is_still_found(run_dir):
    """As after a kill in between."""
    path = write(run_dir, 5)
    path.rename(path.with_name("step-000000005.old"))
    assert read_newest(run_dir).step == 5
    write(run_dir, 6)
    assert names(run_dir) == ["step-000000005.old", "step-000000006"]
    write(run_dir, 7)
    assert kept(run_dir) == [6, 7]


def test_of_two_of_one_step_the_later_written_counts(run_dir):
    path = write(run_dir, 5)
    shutil.copytree(path, run_dir.path / "earlier")
    write(run_dir, 5, value=7.0)
    shutil.copytree(run_dir.path / "earlier", path.with_name("step-000000005.old"))
    assert read_newest(run_dir).state == {"value": 7.0}
    write(run_dir, 5, value=8.0)
    assert kept(run_dir) == [5]
    assert read_newest(run_dir).state == {"value": 8.0}


# --- on the disk, not only on its way ---


def test_all_is_flushed_before_it_is_named_and_the_name_before_an_old_one_goes(run_dir, monkeypatch):
    for step in (1, 2):
        write(run_dir, step)
    flushed = []
    fsync = os.fsync

    def watched(handle):
        place = Path(f"/proc/self/fd/{handle}").resolve().relative_to(run_dir.path.resolve())
        flushed.append((place, kept(run_dir) if place == Path("checkpoints") else None))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write(run_dir, 3)
    assert flushed[-1] == (Path("checkpoints"), [1, 2, 3])
    assert kept(run_dir) == [2, 3]
    before = {place.name for place, _ in flushed[:-1] if place.parent.name.startswith(".step-000000003.")}
    assert before >= set(FILES)
    assert any(place.name.startswith(".step-000000003.") for place, _ in flushed)  # the directory itself


# --- a full disk ---


def assert_says_no_room(error, run_dir, step):
    assert "no room on the disk" in error.problem
    assert f"'step-{step:09d}'" in error.problem
    assert error.where == {"directory": run_dir.checkpoints}
    assert "--resume" in error.hint


def test_a_full_disk_gives_back_the_checkpoint_of_the_same_step(run_dir):
    write(run_dir, 3)
    before = tree(run_dir.path)
    with largest_file(50_000), pytest.raises(ArtifactError) as caught:
        write(run_dir, 3, value=7.0, size=20_000)
    assert_says_no_room(caught.value, run_dir, 3)
    assert tree(run_dir.path) == before


@pytest.fixture
def small_disk(tmp_path):
    with disk_of(256, tmp_path / "small") as place:
        yield place


def test_a_disk_full_at_any_page_leaves_the_checkpoints_before_whole(small_disk):
    run_dir = RunDir(small_disk / "run")
    for step in (1, 2):
        write(run_dir, step, 0.5, size=2000)
    before = tree(run_dir.path)
    ballast = small_disk / "ballast"
    page = os.sysconf("SC_PAGE_SIZE")
    met = []
    for pages in range(20):
        ballast.unlink(missing_ok=True)
        free = os.statvfs(small_disk).f_bavail
        ballast.write_bytes(bytes((free - pages) * page))
        try:
            write(run_dir, 3, 0.6, size=2000)
        except ArtifactError as problem:
            assert_says_no_room(problem, run_dir, 3)
            met.append(str(problem.__cause__))
            assert tree(run_dir.path) == before
            assert read_newest(run_dir).step == 2
        else:
            break
    # safetensors, which writes the first two files, words it otherwise than Python, which writes the last.
    assert any(text.startswith("[Errno 28]") for text in met)
    assert not all(text.startswith("[Errno 28]") for text in met)
    assert pages == len(met) > 3
    assert read_newest(run_dir).step == 3


# --- a process killed while it writes ---


KILLING = """
    import json, os, random, signal, sys, time
    import torch
    from edgecl.storage.directories import RunDir
    from edgecl.storage.checkpoint import read_best, read_newest, write_checkpoint

    run_dir, kills = RunDir(sys.argv[1]), int(sys.argv[2])

    def write(number):
        # Every step twice, so that the second has to take the place of the first.
        write_checkpoint(
            run_dir, step=number // 2, epoch=0, model={"weight": torch.full((30_000,), float(number))},
            optimizer={"state": {0: {"m": torch.full((30_000,), float(number))}}, "param_groups": []},
            state={"number": number}, quality={"name": "q", "value": float(-number)},
        )

    def number_of(checkpoint):
        numbers = {float(value) for value in checkpoint.model["weight"].unique()}
        numbers |= {float(value) for value in checkpoint.optimizer["state"][0]["m"].unique()}
        numbers |= {float(checkpoint.state["number"]), -checkpoint.quality.value}
        assert len(numbers) == 1, numbers
        assert checkpoint.step == numbers.copy().pop() // 2
        return int(numbers.pop())

    write(0)
    half_written = []
    for _ in range(kills):
        begin = number_of(read_newest(run_dir)) + 1
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            number = begin
            while True:
                write(number)
                os.write(tell, number.to_bytes(8, "little"))
                number += 1
        os.close(tell)
        os.read(told, 8)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = begin
        while content := os.read(told, 8):
            last = int.from_bytes(content, "little")
        os.close(told)
        left = sorted(path.name for path in run_dir.checkpoints.iterdir())
        half_written += [name for name in left if name.startswith(".") or name.endswith(".old")]
        newest = number_of(read_newest(run_dir))
        assert last <= newest <= last + 1, (last, newest)  # nothing that was written is lost
        number_of(read_best(run_dir))
        write(newest + 1)
        left = sorted(path.name for path in run_dir.checkpoints.iterdir())
        assert all(name.startswith("step-") and not name.endswith(".old") for name in left[1:]), left
    print(json.dumps(half_written))
"""


def test_a_process_killed_at_any_moment_of_writing_leaves_a_whole_checkpoint(run_dir):
    words = [sys.executable, "-c", textwrap.dedent(KILLING), str(run_dir.path), "20"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # and none is torn: what stands under its name is whole
    half_written = json.loads(done.stdout)
    assert any(name.endswith(".part") for name in half_written)
