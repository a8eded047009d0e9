"""Nets trained on few labels: the same in processes of their own as in this one, and no process is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch

from edgecl.config.views import Views
from edgecl.errors import ArtifactError, ProcessError
from edgecl.evaluate import few_labels
from edgecl.evaluate.few_labels import FewLabels, train_on_few
from edgecl.evaluate.labelled import read_labelled
from edgecl.evaluate.supervised import FinetuneConfig
from edgecl.storage.directories import ModelDir


@pytest.fixture(scope="module")
def labelled(carved_model, image_folder):
    return read_labelled(
        str(image_folder), test=None, preprocessing=ModelDir(carved_model).read().preprocessing
    )


@pytest.fixture
def two_threads():
    """As many processes; each then has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def jobs_of(model, labelled, *, start=None, steps=3, count=3):
    return [
        FewLabels(
            start=start,
            record=ModelDir(model).read(),
            classes=labelled.classes,
            images=labelled.train.images[:8].numpy(),
            labels=labelled.train.labels[:8].numpy(),
            steps=steps,
            settings=FinetuneConfig(lr=0.01, seed=seed, device="cpu"),
            views=Views(),
        )
        for seed in range(count)
    ]


def test_nets_trained_in_processes_are_those_trained_here(carved_model, labelled, two_threads, monkeypatch):
    jobs = jobs_of(carved_model, labelled, start=carved_model, steps=6)
    evaluated = []

    def evaluator(net, part, preprocessing):
        evaluated.append([value.clone() for value in net.state_dict().values()])
        return 0.0

    monkeypatch.setattr(few_labels, "classifier_accuracy", evaluator)
    assert len(list(train_on_few(jobs, labelled.test))) == 3
    assert not multiprocessing.active_children()
    torch.set_num_threads(1)
    list(train_on_few(jobs, labelled.test))
    for apart, here in zip(evaluated[:3], evaluated[3:], strict=True):
        assert all(map(torch.equal, apart, here))
    assert not all(map(torch.equal, evaluated[0], evaluated[1]))


def test_error_of_a_process_keeps_its_class_and_ends_the_others(
    carved_model, labelled, two_threads, tmp_path
):
    with pytest.raises(ArtifactError, match="nowhere"):
        list(
            train_on_few(
                jobs_of(carved_model, labelled, start=tmp_path / "nowhere", steps=9999), labelled.test
            )
        )
    assert not multiprocessing.active_children()


def test_killed_process_is_named(carved_model, labelled, two_threads, monkeypatch):
    jobs = jobs_of(carved_model, labelled, steps=1, count=1) + jobs_of(carved_model, labelled, steps=99999)

    def kill_one(net, part, preprocessing):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return 0.0

    monkeypatch.setattr(few_labels, "classifier_accuracy", kill_one)
    with pytest.raises(ProcessError, match="killed"):
        list(train_on_few(jobs, labelled.test))
    assert not multiprocessing.active_children()


def test_interruption_ends_the_processes_at_once(carved_model, labelled, two_threads, monkeypatch):
    jobs = jobs_of(carved_model, labelled, steps=1, count=1) + jobs_of(carved_model, labelled, steps=99999)

    def interrupted(net, part, preprocessing):
        raise KeyboardInterrupt

    monkeypatch.setattr(few_labels, "classifier_accuracy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(train_on_few(jobs, labelled.test))
    assert not multiprocessing.active_children()
