"""A page on this machine that shows a run while it trains: losses, quality, speed, time left, warnings and views."""

from __future__ import annotations

import hashlib
import secrets
import time
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from markupsafe import Markup

from edgecl.errors import DeviceError, printable
from edgecl.reports.collect import Source, collect
from edgecl.reports.content import run_summary
from edgecl.reports.notation import duration, fixed
from edgecl.reports.render import render, run_charts
from edgecl.storage.directories import RunDir
from edgecl.storage.reading import METRICS_BYTES, parse_json, read_bytes
from edgecl.storage.records import RunRecord

ADDRESS = "127.0.0.1"
POLL_S = 3
_DRAWN_AGAIN_S = 10
"""Drawing takes processor time from the training."""
_SILENT_MIN = 3
_RECENT = 10
"""Lines of metrics.jsonl whose mean speed tells the time left."""
_RULES = "default-src 'none'; connect-src 'self'; img-src 'self'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'"


class WatchedRun:
    """What a run's directory says now, as HTML; drawn anew only when it has changed.

    Raises:
        ArtifactError: not a run directory.
    """

    def __init__(self, path: Path):
        self.files = RunDir(path)
        self.files.read()
        self._lock = Lock()
        self._state: list[object] = []
        self._drawn_at = 0.0
        self._html = ""

    def html(self) -> str:
        """Return the inside of the page."""
        with self._lock:
            state: list[object] = [_stamp(file) for file in (self.files.record_file, self.files.metrics_file)]
            state.append(silent_min := _silent_min(self.files.metrics_file))
            is_due = state != self._state and time.monotonic() - self._drawn_at > _DRAWN_AGAIN_S
            if is_due or not self._html:
                self._html = self._draw(silent_min)
                self._state, self._drawn_at = state, time.monotonic()
            return self._html

    def page(self, *, nonce: str) -> str:
        """Return the whole page, whose script asks for its inside again and again."""
        return render(
            "watch.html.j2",
            title=printable(self.files.path.resolve().name),
            inside=Markup(self.html()),
            nonce=nonce,
            poll_ms=1000 * POLL_S,
        )

    def _draw(self, silent_min: int) -> str:
        (run,) = collect([self.files.path]).of(RunRecord)
        summary = run_summary(run)
        return render(
            "watching.html.j2",
            run=summary,
            progress=_progress_in_words(run, silent_min),
            warnings=_warnings_in_words(self.files.metrics_file),
            charts=list(run_charts(summary, "run")),
            views=hashlib.sha256(run.views_png).hexdigest()[:8] if run.views_png else None,
        )


def _progress_in_words(run: Source[RunRecord], silent_min: int) -> str:
    """Say how far a run is, how fast, and when it will be done."""
    record = run.record
    step, total = (run.steps[-1]["step"] if run.steps else 0.0), record.total_steps
    parts = [f"{fixed(step, 0)} of {fixed(total, 0)} steps" if total else f"{fixed(step, 0)} steps"]
    speeds = [line["images_per_s"] for line in run.steps[-_RECENT:] if line.get("images_per_s", 0) > 0]
    if record.state != "running":
        return f"{parts[0]}, {record.state}"
    if silent_min:
        return f"{parts[0]}, nothing written for {silent_min:,} min: is it still there?"
    if speeds and total:
        speed = sum(speeds) / len(speeds)
        left_s = (total - step) * float(record.recipe["data"]["batch_size"]) / speed
        parts += [f"{fixed(speed, 0)} images/s", f"about {duration(left_s)} left"]
    return ", ".join(parts)


def _warnings_in_words(metrics_file: Path) -> list[str]:
    """Return what a run warned of, and how often it went back, the newest first."""
    found = []
    for text in read_bytes(metrics_file, most=METRICS_BYTES).splitlines() if metrics_file.exists() else []:
        if b'"event"' not in text:
            continue
        try:
            event = parse_json(text)
        except ValueError:
            continue  # half a line: it is being written
        words = event.get("words") or f"{event.get('event')}: {event.get('because')}"
        found.append(printable(f"step {event.get('step')}: {words}"))
    return found[::-1]


def _silent_min(metrics_file: Path) -> int:
    """Return the whole minutes since a file was written to, 0 for a few."""
    minutes = (time.time() - metrics_file.stat().st_mtime) / 60 if metrics_file.exists() else 0.0
    return int(minutes) if minutes >= _SILENT_MIN else 0


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


class _Answers(BaseHTTPRequestHandler):
    """Answers a browser on this machine, and no page of another site that has it ask."""

    protocol_version = "HTTP/1.1"

    def __init__(self, watched: WatchedRun, *args: object):
        self.watched = watched
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer with the page, its inside, or the picture of the views."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (ADDRESS, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            nonce = secrets.token_urlsafe(16)
            self._send(self.watched.page(nonce=nonce).encode(), "text/html; charset=utf-8", nonce=nonce)
        elif self.path == "/now":
            self._send(self.watched.html().encode(), "text/html; charset=utf-8")
        elif self.path.startswith("/views.png") and self.watched.files.views_file.is_file():
            self._send(self.watched.files.views_file.read_bytes(), "image/png")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, content: bytes, kind: str, *, nonce: str = "") -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", _RULES.format(nonce=nonce)),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Keep quiet: the terminal belongs to the user."""


def watch(run: Path, *, port: int) -> ThreadingHTTPServer:
    """Open a server on this machine alone that shows a run; `serve_forever` runs it.

    Args:
        run: a run directory.
        port: 0 takes a free one.

    Raises:
        ArtifactError: not a run directory.
        DeviceError: the port is taken.
    """
    watched = WatchedRun(run)
    try:
        return ThreadingHTTPServer((ADDRESS, port), partial(_Answers, watched))
    except OSError as exc:
        raise DeviceError(
            f"port {port} cannot be opened: {exc.strerror}", hint="--port 0 takes a free one"
        ) from exc
