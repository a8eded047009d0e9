"""Progress on stderr: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

Of the processes of one run only the first shows any.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from edgecl.distributed.processes import is_main

# Nothing is shown for work that ends sooner.
PATIENCE_S = 2.0
PLAIN_LINE_EVERY_S = 15.0


class Progress:
    """Show how far a piece of work is.

    Args:
        what: the work, e.g. "pretrain"; None shows nothing.
        total: how many units it has; None where nobody knows.
        unit: one unit, plural, e.g. "steps".
        done: units already behind us, for work that is resumed.
    """

    def __init__(self, what: str | None, *, total: int | None, unit: str, done: int = 0):
        self._what, self._total, self._unit = what, total, unit
        self._done = self._first = done
        self._started = self._last_line = time.monotonic()
        self._note = ""
        self._bar: object | None = None

    def __enter__(self) -> Progress:
        return self

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count units done; the note is shown beside the bar until the next one."""
        self._done += units
        self._note = self._note if note is None else note
        now = time.monotonic()
        if not self._is_shown(now):
            return
        if sys.stderr.isatty():
            self._draw()
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            self._print_line(now)

    def _is_shown(self, now: float) -> bool:
        return self._what is not None and now - self._started >= PATIENCE_S and is_main()

    def _draw(self) -> None:
        from rich import progress as rich
        from rich.console import Console

        if self._bar is None:
            bar = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[rate]}"),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            bar.start()
            self._task = bar.add_task(
                self._what or "", total=self._total, completed=self._first, rate="", note=""
            )
            self._bar = bar
        assert isinstance(self._bar, rich.Progress)
        self._bar.update(self._task, completed=self._done, rate=self._rate(time.monotonic()), note=self._note)

    def _rate(self, now: float) -> str:
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        return f"{rate:.3g} {self._unit}/s"

    def _print_line(self, now: float) -> None:
        elapsed = now - self._started
        of_total, left = "", ""
        note = f", {self._note}" if self._note else ""
        if self._total is not None:
            seconds = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
            of_total, left = f"/{self._total}", f", about {seconds:.0f} s left"
        sys.stderr.write(
            f"{self._what}: {self._done}{of_total} {self._unit}, {self._rate(now)}, "
            f"{elapsed:.0f} s gone{left}{note}\n"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
            return
        now = time.monotonic()
        if kind is None and self._is_shown(now) and not sys.stderr.isatty():
            self._print_line(now)
