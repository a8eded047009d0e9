"""Train nets on a few labels each, several at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from edgecl.config.views import Views
from edgecl.errors import ProcessError
from edgecl.evaluate.labelled import Part
from edgecl.evaluate.supervised import FinetuneConfig, classifier_accuracy, train_classifier
from edgecl.nets.model_dir import create_blank, load_backbone, load_model
from edgecl.progress import Progress
from edgecl.storage.records import ModelRecord

# Each takes some 500 MB for its libraries, whatever the net.
MAX_PROCESSES = 4


@dataclass(frozen=True)
class FewLabels:
    """One net to be trained on a few labels, as it is handed to another process.

    Attributes:
        start: the model directory whose weights it starts with; None for random ones.
        images: (N, 3, H, W) uint8. NumPy's, since tensors would travel through /dev/shm, which containers keep small.
        labels: (N,) int64.
    """

    start: Path | None
    record: ModelRecord
    classes: tuple[str, ...]
    images: NDArray[numpy.uint8]
    labels: NDArray[numpy.int64]
    steps: int
    settings: FinetuneConfig
    views: Views


def train_on_few(jobs: Sequence[FewLabels], test: Part) -> Iterator[float]:
    """Train nets on few labels, several at a time, and yield the accuracy of each in order, percent.

    A step on fifty small pictures is mostly calls, so that a second thread helps it little (53 against 57 ms a step) and
    a second process nearly doubles what is done. The processes share the threads that torch has here; with one thread
    nets are trained in this process.

    Raises:
        ProcessError: a process was killed.
    """
    threads = torch.get_num_threads()
    count = min(threads, len(jobs), MAX_PROCESSES)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("nets on few labels", total=len(jobs), unit="nets"))
        if count == 1:
            trained: Iterator[dict[str, NDArray[Any]]] = map(_train, jobs)
        else:
            pool = ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), _begin_worker, (threads // count,)
            )
            stack.callback(_end, pool)
            trained = pool.map(_train, jobs)
        for job in jobs:
            net = create_blank(job.record, classes=len(job.classes))
            try:
                weights = next(trained)
            except BrokenProcessPool:
                raise ProcessError(
                    "a process that trained a net on few labels was killed",
                    hint="mostly memory ran out; OMP_NUM_THREADS=1 trains one net at a time",
                ) from None
            net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
            progress.advance()
            yield classifier_accuracy(net, test, job.record.preprocessing)


def _begin_worker(threads: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of a terminal; the first ends the others
    torch.set_num_threads(threads)


def _end(pool: ProcessPoolExecutor) -> None:
    """End the processes now: after an error or Ctrl-C their results are not needed."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    pool.shutdown(cancel_futures=True)


def _train(job: FewLabels) -> dict[str, NDArray[Any]]:
    """Train one net and return its weights by name."""
    torch.manual_seed(job.settings.seed)
    net = create_blank(job.record, classes=len(job.classes))
    if job.start is not None:
        load_backbone(net, load_model(job.start)[0])
    train_classifier(
        net,
        Part(torch.from_numpy(job.images), torch.from_numpy(job.labels)),
        steps=job.steps,
        settings=job.settings,
        preprocessing=job.record.preprocessing,
        views=job.views,
    )
    return {name: value.numpy() for name, value in net.state_dict().items()}
