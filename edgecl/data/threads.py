"""Reading ahead in threads, with a limit on every wait and no thread that could keep the process from ending."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")

_NAME = "edgecl-decode"
# Threads that are between two pictures end within milliseconds; one that is held by a disk is left behind.
_GOODBYE_S = 1.0


def read_ahead(
    read: Callable[[int], _T],
    parts: Iterable[NDArray[np.int64]],
    *,
    threads: int,
    ahead: int,
    wait_s: float,
    stalled: Callable[[int, float], Exception],
) -> Iterator[list[_T]]:
    """Read the items of each part, cut into a piece for each thread, and give the parts' results in order.

    `concurrent.futures` would do but for one thing: at exit the interpreter waits for its threads, and a thread that
    a dead network share holds never ends.

    Args:
        read: item -> result; any thread may call it.
        parts: items that are given together.
        ahead: parts read before they are asked for.
        wait_s: longest wait for one part.
        stalled: of the item that a thread is held by and for how long, seconds -> the error to raise.

    Raises:
        Exception: what `read` raised, or what `stalled` returned.
    """
    pool = _Pool(read, threads)
    waiting: deque[tuple[NDArray[np.int64], list[Future[list[_T]]]]] = deque()

    def first() -> list[_T]:
        part, pieces = waiting.popleft()
        done, late = wait(pieces, timeout=wait_s, return_when=FIRST_EXCEPTION)
        for piece in done:
            piece.result()
        if late:
            item, seconds = pool.slowest() or (int(part[0]), wait_s)
            pool.close(patience_s=0)
            raise stalled(item, seconds)
        return [result for piece in pieces for result in piece.result()]

    try:
        for part in parts:
            pieces = np.array_split(part, max(1, min(threads, len(part))))
            waiting.append((part, [pool.submit(piece) for piece in pieces]))
            if len(waiting) > ahead:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.close()


class _Pool:
    """Threads that end when told to, and do not hold the process when they cannot."""

    def __init__(self, read: Callable[[int], Any], threads: int):
        self._read = read
        self._tasks: queue.SimpleQueue[tuple[Future[Any], NDArray[np.int64]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._at: dict[int, tuple[int, float]] = {}
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name=f"{_NAME}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, piece: NDArray[np.int64]) -> Future[list[Any]]:
        future: Future[list[Any]] = Future()
        self._tasks.put((future, piece))
        return future

    def slowest(self) -> tuple[int, float] | None:
        """Return the item that has been read for the longest time, and for how many seconds."""
        if not (busy := self._at.copy()):
            return None
        item, since = min(busy.values(), key=lambda entry: entry[1])
        return item, time.monotonic() - since

    def close(self, patience_s: float = _GOODBYE_S) -> None:
        """End the threads; one that is held longer than this is left behind."""
        self._closing.set()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + patience_s
        while self._threads:
            self._threads.pop().join(timeout=max(0.0, end - time.monotonic()))

    def _serve(self, number: int) -> None:
        while (task := self._tasks.get()) is not None:
            future, piece = task
            results = []
            try:
                for item in piece.tolist():
                    if self._closing.is_set():
                        return
                    self._at[number] = item, time.monotonic()
                    results.append(self._read(item))
                future.set_result(results)
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._at.pop(number, None)
