"""SIGTERM as a wish: the run sees it between two steps, saves, and ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Whether this process was asked to end since the context was entered.

    Schedulers send SIGTERM some time before they kill. Signals reach Python in the main thread only, so elsewhere the
    handler stays as it is.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: object = None
        self._installed = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
            self._installed = True
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]
