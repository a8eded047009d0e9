"""The saver: what was at the time of saving is written, off the training thread, and its errors come out."""

import copy
import os
import threading
from pathlib import Path

import pytest
import torch
from disks import largest_file
from torch import nn

from edgecl.errors import ArtifactError
from edgecl.storage.checkpoint import has_checkpoint, read_newest
from edgecl.storage.directories import RunDir
from edgecl.storage.records import Quality
from edgecl.train import saver as saver_module
from edgecl.train.saver import Saver


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes nothing until the event is set."""
    opened = threading.Event()
    fsync = os.fsync

    def wait_for_disk(handle):
        assert opened.wait(60), "nobody opened the disk"
        fsync(handle)

    monkeypatch.setattr(os, "fsync", wait_for_disk)
    yield opened
    opened.set()


def save(saver, step, *, size=4, **options):
    saver.save(
        step=step,
        epoch=0,
        model={"weight": torch.full((size,), float(step))},
        optimizer={"state": {0: {"m": torch.full((size,), 2.0 * step)}}, "param_groups": []},
        **options,
    )


def in_place(value):
    """Change everything in a nest that can be changed."""
    if isinstance(value, torch.Tensor):
        value.detach().fill_(-1)
    elif isinstance(value, dict):
        for key, item in value.items():
            in_place(item)
            if isinstance(item, (int, float)):
                value[key] = -1
    elif isinstance(value, list):
        for item in value:
            in_place(item)
        value.append("changed")


# --- a copy ---


def everything(device="cpu"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1), betas=(0.9, 0.95), foreach=False)
    for _ in range(2):
        net(torch.randn(2, 3, 8, 8, device=device)).square().sum().backward()
        optimizer.step()
    tied = torch.randn(4, 6, device=device)
    model = {**net.state_dict(), "tied": tied, "alias": tied, "rows": tied[1:], "columns": tied[:, 1:3]}
    return {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "state": {"guard": {"skipped": 3, "losses": [0.1, 0.2]}, "scale": 65536.0},
        "quality": {"name": "knn_top1_slim", "value": 0.25},
    }


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_what_is_written_is_what_was_when_it_was_saved(run_dir, device):
    content = everything(device)
    expected = copy.deepcopy(content)
    begin = threading.Event()
    with Saver(run_dir, keep=2, keep_best=True) as saver:
        saver._thread.submit(begin.wait, 60)  # nothing is written before
        saver.save(step=7, epoch=1, **content)
        in_place(content)  # as the next step of training does
        begin.set()
    found = read_newest(run_dir)
    assert (found.step, found.epoch) == (7, 1)
    assert found.state == expected["state"]
    assert found.quality == Quality(**expected["quality"])
    for name, tensor in expected["model"].items():
        torch.testing.assert_close(found.model[name], tensor.cpu(), rtol=0, atol=0, msg=name)
    for index, entries in expected["optimizer"]["state"].items():
        for key, tensor in entries.items():
            torch.testing.assert_close(
                found.optimizer["state"][index][key], tensor.cpu(), rtol=0, atol=0, msg=key
            )
    group = found.optimizer["param_groups"][0]
    assert torch.equal(group["lr"], torch.tensor(0.1))
    assert group["params"] == [0, 1, 2, 3]
    assert group["weight_decay"] == 0.01


def test_tensors_may_change_their_size_between_two_saves(run_dir):
    with Saver(run_dir, keep=1, keep_best=False) as saver:
        save(saver, 1, size=4)
        save(saver, 2, size=6)
    assert torch.equal(read_newest(run_dir).model["weight"], torch.full((6,), 2.0))


# --- one thread beside ---


def test_writes_follow_one_another_off_the_training_thread(run_dir):
    threads, steps = set(), []

    def written(step):
        threads.add(threading.current_thread())
        steps.append(step)
        assert run_dir.checkpoint_file(step).is_dir()  # it stands by now

    with Saver(run_dir, keep=2, keep_best=False) as saver:
        for step in range(1, 6):
            save(saver, step, on_written=lambda step=step: written(step))
    assert steps == [1, 2, 3, 4, 5]
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_training_goes_on_while_the_disk_takes_its_time_and_a_second_save_waits_for_the_first(
    run_dir, slow_disk
):
    steps = []
    with Saver(run_dir, keep=2, keep_best=False) as saver:
        save(saver, 1, on_written=lambda: steps.append(1))
        assert steps == []
        threading.Timer(0.2, slow_disk.set).start()
        save(saver, 2, on_written=lambda: steps.append(2))
        assert steps[:1] == [1]
    assert steps == [1, 2]


def test_a_long_wait_says_what_for(run_dir, slow_disk, monkeypatch, capsys):
    monkeypatch.setattr(saver_module, "REPORT_AFTER_S", 0.02)
    with Saver(run_dir, keep=2, keep_best=False) as saver:
        save(saver, 7)
        threading.Timer(0.2, slow_disk.set).start()
    assert "waiting for the disk to take the checkpoint of step 7" in capsys.readouterr().err


def test_file_handles_and_threads_stay_as_many(run_dir):
    def count():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before = count()
    with Saver(run_dir, keep=2, keep_best=True) as saver:
        save(saver, 1)
        saver.flush()
        during = count()
        for step in range(2, 12):
            save(saver, step)
        saver.flush()
        assert count() == during
    assert count() == before


# --- errors ---


OCCASIONS = {
    "save": lambda saver: save(saver, 3),
    "flush": lambda saver: saver.flush(),
    "exit": lambda saver: saver.__exit__(None, None, None),
}


@pytest.mark.parametrize("occasion", OCCASIONS)
def test_a_full_disk_comes_out_at_the_next_occasion_and_once(run_dir, occasion):
    saver = Saver(run_dir, keep=2, keep_best=False)
    save(saver, 1)
    saver.flush()
    with largest_file(50_000):
        save(saver, 2, size=20_000)
        with pytest.raises(ArtifactError) as caught:
            OCCASIONS[occasion](saver)
    saver.__exit__(None, None, None)  # said once
    assert "no room on the disk to write 'step-000000002'" in caught.value.problem
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step-000000001"]
    assert read_newest(run_dir).step == 1


def test_after_a_full_disk_that_was_emptied_saving_goes_on(run_dir):
    with Saver(run_dir, keep=2, keep_best=False) as saver:
        with largest_file(50_000):
            save(saver, 1, size=20_000)
            with pytest.raises(ArtifactError):
                saver.flush()
        save(saver, 2, size=20_000)
    assert read_newest(run_dir).step == 2


class OddError(Exception):
    pass


def test_an_error_of_what_is_done_after_a_write_keeps_its_type(run_dir):
    def fail():
        raise OddError("no run.json")

    saver = Saver(run_dir, keep=2, keep_best=False)
    with pytest.raises(OddError, match=r"^no run\.json$"), saver:
        save(saver, 1, on_written=fail)
    assert read_newest(run_dir).step == 1


def test_what_cannot_be_kept_is_refused_at_once(run_dir):
    text = r"^state\.seen is a set, which JSON cannot hold exactly$"
    with Saver(run_dir, keep=2, keep_best=False) as saver, pytest.raises(TypeError, match=text):
        save(saver, 1, state={"seen": {1}})
    assert not has_checkpoint(run_dir)


def save_and_fail(run_dir, error, **options):
    with Saver(run_dir, keep=2, keep_best=False) as saver:
        save(saver, 5, **options)
        raise error


@pytest.mark.parametrize("kind", [OddError, KeyboardInterrupt, SystemExit])
def test_an_exception_on_its_way_is_not_masked(run_dir, capsys, kind):
    with pytest.raises(kind, match=r"^first$"), largest_file(50_000):
        save_and_fail(run_dir, kind("first"), size=20_000)
    assert "the checkpoint of step 5 was not written: no room" in capsys.readouterr().err
