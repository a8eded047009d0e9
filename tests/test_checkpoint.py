"""Checkpoints: bit for bit, held to their hashes, and nothing unpickled."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import edgecl
from edgecl.artifacts import RunDir
from edgecl.checkpoint import has_checkpoint, read_newest, restore_optimizer, write_checkpoint
from edgecl.errors import ArtifactError
from edgecl.recipe import Optim
from edgecl.train.optim import create_optimizer


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    return net.to(memory_format=torch.channels_last)


def train(net, optimizer, steps, *, start=0):
    for step in range(start, start + steps):
        images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        net(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.checkpoints.mkdir(parents=True)
    return run_dir


def write(run_dir, epoch, *, value=0.0):
    return write_checkpoint(
        run_dir,
        epoch=epoch,
        step=10 * epoch,
        model={"weight": torch.full((4, 4), value or float(epoch))},
        optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    )


OPTIMISERS = [
    Optim(name="adamw", lr=1e-2),
    Optim(name="sgd", lr=1e-2),
    Optim(name="sgd", lr=1e-2, momentum=0.0),
    Optim(name="lars", lr=1e-1),
]


@pytest.mark.parametrize(
    "settings", OPTIMISERS, ids=lambda settings: f"{settings.name}-{settings.momentum:g}"
)
def test_training_goes_on_bit_for_bit(run_dir, settings):
    net = make_net()
    optimizer = create_optimizer(net, settings, batch_size=6)
    train(net, optimizer, 3)
    write_checkpoint(run_dir, epoch=1, step=3, model=net.state_dict(), optimizer=optimizer.state_dict())
    train(net, optimizer, 3, start=3)

    other = make_net()
    other_optimizer = create_optimizer(other, settings, batch_size=6)
    checkpoint = read_newest(run_dir)
    other.load_state_dict(checkpoint.model)
    restore_optimizer(other_optimizer, checkpoint.optimizer)
    train(other, other_optimizer, 3, start=3)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "settings", OPTIMISERS, ids=lambda settings: f"{settings.name}-{settings.momentum:g}"
)
def test_an_optimisers_state_survives(run_dir, settings):
    net = make_net()
    optimizer = create_optimizer(net, settings, batch_size=6)
    train(net, optimizer, 2)
    before = optimizer.state_dict()
    write_checkpoint(run_dir, epoch=1, step=2, model=net.state_dict(), optimizer=before)
    after = read_newest(run_dir).optimizer
    assert after["state"].keys() == before["state"].keys()
    for index, entries in before["state"].items():
        assert after["state"][index].keys() == entries.keys()
        for key, value in entries.items():
            assert (
                torch.equal(after["state"][index][key], value) if isinstance(value, torch.Tensor) else value
            )
            assert getattr(after["state"][index][key], "dtype", None) == getattr(value, "dtype", None)
    assert json.dumps(after["param_groups"]) == json.dumps(before["param_groups"])


def test_epoch_and_step_survive(run_dir):
    write(run_dir, 3)
    checkpoint = read_newest(run_dir)
    assert (checkpoint.epoch, checkpoint.step) == (3, 30)


def test_newest_two_are_kept(run_dir):
    for epoch in (1, 2, 3, 9, 10):
        write(run_dir, epoch)
    assert sorted(path.name for path in run_dir.checkpoints.iterdir()) == ["epoch-00009", "epoch-00010"]
    assert read_newest(run_dir).epoch == 10


def test_a_checkpoint_can_be_written_again(run_dir):
    write(run_dir, 1)
    write(run_dir, 1, value=7.0)
    assert float(read_newest(run_dir).model["weight"][0, 0]) == 7.0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_byte_passes_a_checkpoint_over(run_dir, capsys, name):
    write(run_dir, 1)
    file = write(run_dir, 2) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert read_newest(run_dir).epoch == 1
    assert capsys.readouterr().err == (
        f"edgecl: checkpoint epoch-00002 passed over: {name} does not match its hash\n"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_file_passes_a_checkpoint_over(run_dir, capsys, name):
    write(run_dir, 1)
    (write(run_dir, 2) / name).unlink()
    assert read_newest(run_dir).epoch == 1
    assert "epoch-00002 passed over: unreadable" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", '{"epoch": 2', "[]", "{}", '{"sha256": []}', '{"sha256": {}}', "\x00\xff"]
)
def test_a_torn_state_passes_a_checkpoint_over(run_dir, capsys, content):
    write(run_dir, 1)
    (write(run_dir, 2) / "state.json").write_text(content, encoding="latin-1")
    assert read_newest(run_dir).epoch == 1
    assert "epoch-00002 passed over: unreadable" in capsys.readouterr().err


def test_a_truncated_file_passes_a_checkpoint_over(run_dir):
    write(run_dir, 1)
    file = write(run_dir, 2) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert read_newest(run_dir).epoch == 1


def test_a_changed_number_in_the_state_passes_a_checkpoint_over(run_dir):
    write(run_dir, 1)
    file = write(run_dir, 2) / "state.json"
    text = file.read_text(encoding="utf-8")
    assert '"step": 20' in text
    file.write_text(text.replace('"step": 20', '"step": 28'), encoding="utf-8")
    assert read_newest(run_dir).epoch == 1


def test_no_whole_checkpoint_is_an_error(run_dir):
    (write(run_dir, 1) / "model.safetensors").write_bytes(b"")
    assert has_checkpoint(run_dir)
    with pytest.raises(ArtifactError) as caught:
        read_newest(run_dir)
    assert caught.value.problem == f"the run directory '{run_dir.path}' has no whole checkpoint"
    assert "[run] checkpoint_epochs" in caught.value.hint


def test_a_half_written_checkpoint_is_no_checkpoint(run_dir):
    (run_dir.checkpoints / ".epoch-00001.xyz.part").mkdir()
    assert not has_checkpoint(run_dir)


def test_a_checkpoint_holds_safetensors_and_json_only(run_dir):
    path = write(run_dir, 1)
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_the_package_unpickles_nothing():
    allowed = {"sources.py"}  # which says, in words, that CIFAR's archive is a pickle
    for file in sorted(Path(edgecl.__file__).parent.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load\b(?!_)|weights_only|allow_pickle\s*=\s*True|\bjoblib\b", text), (
            file
        )
        assert not re.search(r"^\s*(import|from)\s+(pickle|dill|shelve|marshal)\b", text, re.MULTILINE), file
        assert "pickle." not in text or file.name in allowed, file
