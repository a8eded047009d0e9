"""What may come of any input: it is read, or refused by a named error, soon, in little memory, and nothing else happens."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from edgecl.data.source import UnreadableImage
from edgecl.errors import EdgeclError
from edgecl.onboard.errors import OnboardError

# Of processor time, and of waiting on what never comes.
BUSY_S, WAITING_S = 15.0, 60.0
MEMORY = 2 << 30
LONGEST_ERROR = 20_000
_STEERS = {
    *map(chr, range(32)),
    *map(chr, range(127, 160)),
    *"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e",
}
_STEERS |= set("\u2066\u2067\u2068\u2069") - {"\n", "\t"}
_STEERS -= {"\n", "\t"}

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {
    "os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "shutil.rmtree",
}  # fmt: skip
_OF_TWO = ("os.rename", "os.link", "os.symlink")
_NEVER = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class",
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "code.__new__", "ctypes.dlopen",
}  # fmt: skip


class TooLongError(BaseException):
    """No subclass of Exception: readers catch many of these."""


class _Watch:
    """Sees through Python's audit events what code does to the machine, while it is told to."""

    def __init__(self) -> None:
        self.place: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, given: tuple[Any, ...]) -> None:
        if self.place is None:
            return
        if event in _NEVER and not self._while_importing():
            self.seen.append(f"{event} {given!r:.200}")
            raise RuntimeError(f"{event} in a fuzz case")
        if event == "open" and isinstance(given[2], int) and given[2] & _WRITING:
            self._hold(event, given[0])
        elif event in _CHANGES:
            # Of a link the place that it leads to stays as it is.
            for path in given[event in ("os.link", "os.symlink") : 1 + (event in _OF_TWO)]:
                self._hold(event, path)

    def _while_importing(self) -> bool:
        # A library that is loaded late may load its own.
        frame = sys._getframe()
        while frame := frame.f_back:  # type: ignore[assignment]
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
        return False

    def _hold(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor, which was held when it was opened
        text = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - Path.resolve would follow links
        if text == os.devnull or "__pycache__" in text or text.startswith(f"{self.place}{os.sep}"):
            return
        if event.startswith(("os.mkdir", "os.utime")) and text == self.place:
            return
        self.seen.append(f"{event} outside its folder: {text:.200}")


_watch: _Watch | None = None


def evaluator(case: Callable[[Path], None], place: Path) -> str | None:
    """Run a case in a folder of its own; None when all is well, else what is not."""
    global _watch
    _watch = _watch or _Watch()
    place.mkdir(parents=True)
    begun = Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    problem = None
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _surroundings(place),
            _limits(),
        ):
            _watch.place, _watch.seen = str(place), []
            try:
                case(place)
            finally:
                _watch.place = None
    except EdgeclError as exc:
        problem = _bad_text(str(exc))
    except (OnboardError, UnreadableImage):
        pass  # their texts become part of such an error
    except TooLongError:
        problem = f"longer than {BUSY_S:.0f} s of processor or {WAITING_S:.0f} s of waiting"
    except OSError as exc:
        # The command line says these too, with the file; without a number they are no system's.
        problem = None if exc.errno else _described(exc)
    except Exception as exc:
        problem = _described(exc)
    finally:
        os.chdir(begun)
        gc.enable()
    return problem or next(iter(_watch.seen), None) or _bad_text(out.getvalue()) or _bad_text(err.getvalue())


def run_command(*words: str) -> int:
    """Run `edgecl` in this process, as `main` does; what is not a named error or wrong usage comes out."""
    from edgecl.cli import main

    if any("\0" in word for word in words):
        return 2  # no system hands such a word over
    begun = len(_text(sys.stderr))
    with mock.patch.object(sys, "argv", ["edgecl", *words]):
        try:
            main()
            return 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    said = _text(sys.stderr)[begun:]
    if code not in (0, 1, 2):
        raise AssertionError(f"exit {code}: {said}")
    if "not enough memory" in said:
        raise MemoryError(said)
    if code and not said.strip():
        raise AssertionError(f"exit {code} without a word")
    return code


def _text(stream: Any) -> str:
    return stream.getvalue() if isinstance(stream, io.StringIO) else ""


def _bad_text(text: str) -> str | None:
    if steers := sorted(_STEERS.intersection(text)):
        return f"output that steers a terminal: {steers}"
    # Wrong usage repeats the words that were given, however long.
    if len(text) > LONGEST_ERROR and not text.startswith("Usage: "):
        return f"output of {len(text):,} letters: {text[:200]}"
    return None


def _described(exc: Exception) -> str:
    frames = traceback.extract_tb(exc.__traceback__)[-6:]
    where = "".join(f"\n    {frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(exc).__name__}: {str(exc)[:300]!r}{where}"


@contextlib.contextmanager
def _surroundings(place: Path) -> Iterator[None]:
    home = place / "home"
    home.mkdir()
    changed = {"HOME": str(home), "TMPDIR": str(home), "EDGECL_CACHE": str(home / "cache"), "COLUMNS": "120"}
    os.chdir(place)
    with (
        mock.patch.dict(os.environ, changed),
        mock.patch.object(tempfile, "tempdir", str(home)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limits that end with the case: the address space, and the time by two clocks."""

    def end(number: int, frame: Any) -> None:
        raise TooLongError

    before = {number: signal.signal(number, end) for number in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, BUSY_S)
    signal.setitimer(signal.ITIMER_REAL, WAITING_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def remove(place: Path) -> None:
    """Remove a case's folder, whatever its rights."""
    shutil.rmtree(place, ignore_errors=True)
