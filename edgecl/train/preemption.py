"""SIGTERM and Ctrl-C as a stop request: the run sees it between two steps, saves, and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from edgecl.distributed import processes

# torchrun passes on to its processes the Ctrl-C that the terminal has sent them already.
_SAME_CTRL_C_S = 1.0


class StopRequest:
    """By which signal this process was asked to end since the context was entered.

    Schedulers send SIGTERM some time before they kill; Ctrl-C is SIGINT, and a second one ends the process at once.
    Signals reach Python in the main thread only, so elsewhere the handlers stay as they are.
    """

    def __init__(self) -> None:
        self.asked = 0
        """The signal's number; 0 while there was none."""
        self._before: dict[int, object] = {}
        self._interrupted_at: float | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number, ask in ((signal.SIGTERM, self._ask), (signal.SIGINT, self._interrupt)):
                self._before[number] = signal.signal(number, ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            self.asked = self.asked or number
            if processes.is_main():
                # The interrupted code may be writing to sys.stderr itself.
                os.write(2, b"\nedgecl: saving after this step or the next; Ctrl-C again ends at once\n")
        elif now - self._interrupted_at > _SAME_CTRL_C_S:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
