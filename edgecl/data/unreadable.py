"""The pictures that cannot be read: counted, named, limited, and remembered for the next start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgecl.data.source import ImageSource, UnreadableImage
from edgecl.distributed.processes import is_main
from edgecl.errors import DataError, counted, first_of, tell
from edgecl.storage.redaction import without_secrets

_T = TypeVar("_T")

_NAMED_BAD_IMAGES = 5


class BadImages:
    """The unreadable images known so far; too many of them are an error.

    Args:
        chosen: (N,) positions in the source that take part.
        max_bad_fraction: of these that may be unreadable.
        left_out: names of some that count as unreadable, whatever they are now.
        setting: what would allow more of them, where there is such a thing.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        chosen: NDArray[np.int64],
        max_bad_fraction: float,
        left_out: Collection[str] = (),
        setting: str | None = None,
    ):
        self._source = source
        self._total = len(chosen)
        self._max_bad_fraction = max_bad_fraction
        self._setting = setting
        self._lock = threading.Lock()
        self._news: dict[int, str] = {}
        known = source.memory.known() if source.memory else {}
        self._reasons = {index: known[index] for index in np.intersect1d(chosen, [*known]).tolist()}
        if left_out:
            names = set(left_out)
            again = (index for index in chosen.tolist() if source.describe(index) in names)
            self._reasons |= dict.fromkeys(again, "left out when the run began")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the unreadable images, in the order of the data."""
        with self._lock:
            return tuple(self._source.describe(index) for index in sorted(self._reasons))

    def read(self, index: int, read: Callable[[int], _T]) -> _T:
        """Read an image of the source, unless it is known to be unreadable; any thread may.

        Raises:
            UnreadableImage: it is, or turns out to be, which is counted.
        """
        if index in self._reasons:
            raise UnreadableImage
        try:
            return read(index)
        except UnreadableImage as exc:
            with self._lock:
                self._reasons[index] = str(exc)
                if exc.lasting:
                    self._news[index] = str(exc)
            raise

    def remember(self) -> None:
        """Keep for the next start what was found since the last call, where the source has a memory."""
        with self._lock:
            news, self._news = self._news, {}
        if news and self._source.memory:
            self._source.memory.remember(news)

    def check(self) -> None:
        """Check the number of unreadable images against what is allowed.

        Raises:
            DataError: all are unreadable, or more than the allowed fraction.
        """
        with self._lock:
            reasons = sorted(self._reasons.items())
        bad = len(reasons)
        if bad == 0 or (bad < self._total and bad / self._total <= self._max_bad_fraction):
            return
        listed = [
            f"{self._source.describe(index)} ({reason})" for index, reason in reasons[:_NAMED_BAD_IMAGES]
        ]
        if bad > _NAMED_BAD_IMAGES:
            listed.append(f"and {bad - _NAMED_BAD_IMAGES} more")
        # One below the other, in line with the first.
        where = {"data": self._source.uri, "unreadable": ("\n" + " " * len("  unreadable: ")).join(listed)}
        if bad == self._total:
            raise DataError(f"none of the {self._total} images can be read", where=where)
        raise DataError(
            f"{bad} of {self._total} images cannot be read: {bad / self._total:.1%}, "
            f"{self._max_bad_fraction:.1%} are allowed",
            where=where,
            hint="repair or remove them" + (f", or raise {self._setting}" if self._setting else ""),
        )


def say_skipped(names: Sequence[str], uri: str) -> None:
    """Name on stderr the pictures that could not be read and are left out; one process of a run does."""
    if names and is_main():
        tell(
            f"{counted(len(names), 'unreadable image')} of '{without_secrets(uri)}' left out: {first_of(names)}"
        )
