"""Remote shards: fetched whole, once per machine, through WebDataset's own readers into a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from edgecl.data.tar_index import TarIndex, indexed, read_index, save_index
from edgecl.errors import DataError
from edgecl.storage.redaction import without_secrets
from edgecl.storage.writing import DISK_FULL, flush

# Longest silence of a server or a program. curl's own tries with a server that is busy (503) take this long.
STALL_S = 90.0
# A connection that breaks midway is tried anew so often in all.
ATTEMPTS = 3
PAUSE_S = 1.0
ALLOW_PIPES = "EDGECL_SHARD_PIPES"
_BLOCK = 2**20
_LOOK_AGAIN_S = 0.2
_STATUS_WITHIN_S = 20

# What curl's exit status says; webdataset runs it with -s, which keeps it from saying so itself.
_CURL = {
    1: "a redirection to another kind of URL",
    3: "the URL is malformed",
    5: "the proxy's name is not known",
    6: "the host's name is not known",
    7: "no connection: refused, or no way there",
    18: "the connection ended before the announced length (Content-Length)",
    22: "the server answered with an error",
    28: "the server did not answer in time",
    35: "the TLS handshake failed",
    47: "redirected too often",
    52: "the server answered nothing",
    55: "the connection broke",
    56: "the connection broke",
    60: "the server's certificate is not trusted",
    92: "the connection broke",
}
# For the status alone: what the server sends with it is thrown away, and a slow answer is given up.
_ASKING = ["-o", os.devnull, "--max-time", str(_STATUS_WITHIN_S)]
_BROKEN_MIDWAY = {18, 52, 55, 56, 92}
_NOT_REACHED = {5, 6, 7}
_BY_CURL = {"http", "https", "ftps", "sftp", "scp", "htgs", "hf"}
# Of a signed URL these change from one signing to the next, while the file stays the same.
_SIGNATURE = re.compile(
    r"x-(amz|goog|oss|cos|ms)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id"
    r"|sig|se|sp|sv|sr|st|spr|sip|skoid|sktid|skt|ske|sks|skv",
    re.IGNORECASE,
)


class Fetched(NamedTuple):
    """A remote shard that lies in the cache."""

    file: Path
    tar: TarIndex


class _Failed(Exception):  # noqa: N818 - becomes a DataError once it is known which shard it is
    """A transfer that did not end well."""

    def __init__(self, reason: str, *, said: str = "", hint: str | None = None, broke: bool = False):
        self.reason, self.said, self.hint, self.broke = reason, said, hint, broke


def cache_folder() -> Path:
    """Return the folder for shards that were fetched and for indices: $EDGECL_CACHE/shards or ~/.cache/edgecl/shards."""
    named = os.environ.get("EDGECL_CACHE")
    if named:
        return Path(named).expanduser() / "shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgecl" / "shards"


def cached_place(url: str) -> Path:
    """Return where a remote shard lies once it is fetched; the same however a URL is signed and whoever logs in."""
    parts = urlsplit(url)
    if url.startswith("pipe:"):
        plain, name = url, "pipe"
    else:
        query = urlencode(
            [(key, value) for key, value in parse_qsl(parts.query, True) if not _SIGNATURE.fullmatch(key)]
        )
        plain = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))
        name = re.sub(r"[^\w.-]", "_", parts.path.rpartition("/")[2])[-80:]
    return cache_folder() / f"{hashlib.sha256(plain.encode()).hexdigest()[:24]}-{name}"


def fetch(url: str, *, count: Callable[[int], None], stop: threading.Event) -> Fetched:
    """Bring a remote shard into the cache, unless it is there; only a whole one is kept.

    Processes that want the same shard wait for the first of them, as long as its file grows.

    Args:
        url: of any scheme that webdataset's `gopen` opens, and s3.
        count: called with the bytes that arrived.
        stop: ends the transfer.

    Raises:
        DataError: not there, refused, silent for too long, cut short, not a tar, or no room for it.
    """
    shown, place = without_secrets(url), cached_place(url)
    cached_at = place.with_name(f"{place.name}.npz")
    with suppress(DataError):
        # Not there yet, or damaged since: both end in fetching.
        return Fetched(place, indexed(place, shown=shown, cached_at=cached_at))
    _refuse_what_may_not_run(url)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(place, shown, stop):
            with suppress(DataError):
                return Fetched(place, indexed(place, shown=shown, cached_at=cached_at))
            aside = _part(place, str(os.getpid()))
            try:
                _download(url, aside, shown=shown, count=count, stop=stop)
                index = read_index(aside, shown=shown)
                aside.replace(place)
                flush(place.parent)
            finally:
                aside.unlink(missing_ok=True)
            save_index(index, cached_at)
            return Fetched(place, index)
    except OSError as exc:
        full = exc.errno in DISK_FULL
        raise DataError(
            f"no room for the shard '{_name(shown)}'"
            if full
            else f"the cache cannot be written: {exc.strerror}",
            where={"cache": place.parent, "url": shown},
            hint="EDGECL_CACHE names another place; fetched shards are kept until somebody deletes them",
        ) from exc


def _refuse_what_may_not_run(url: str) -> None:
    # A data URI may come out of somebody else's recipe or record: opening that must not run a program of his.
    if url.startswith("pipe:") and os.environ.get(ALLOW_PIPES) != "1":
        raise DataError(
            f"a pipe runs a program, so it must be allowed first: '{without_secrets(url)}'",
            hint=f"if this is your own command, set {ALLOW_PIPES}=1",
        )
    if url.startswith("pipe:") and url.endswith("…"):
        raise DataError(
            f"the command of '{url}' was not kept in the record",
            hint="give the data anew; `edgecl carve --no-recalibrate` needs none",
        )


@contextmanager
def _only_one(place: Path, shown: str, stop: threading.Event) -> Iterator[None]:
    """Let one process of the machine fetch a shard; the kernel frees the lock with the process."""
    with place.with_name(f"{place.name}.lock").open("ab") as lock:
        locked = _lock(lock, place, shown, stop)
        if locked:
            # Of processes that were killed.
            for leftover in place.parent.glob(f"{place.name}.*.part"):
                leftover.unlink(missing_ok=True)
        yield


def _lock(lock: BinaryIO, place: Path, shown: str, stop: threading.Event) -> bool:
    """Wait for a lock as long as its holder gets on; False where the file system has no locks."""
    size, since = -1, time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:
            return False
        arrived = _arrived(place)
        if arrived != size:
            size, since = arrived, time.monotonic()
        # Twice: the holder names its own trouble first.
        if time.monotonic() - since > 2 * STALL_S:
            raise DataError(
                f"another process fetches the shard '{_name(shown)}' and got no further for {2 * STALL_S:.0f} s",
                where={"url": shown, "lock": lock.name},
                hint="end that process; the lock goes with it",
            )
        if stop.wait(_LOOK_AGAIN_S):
            raise _stopped(shown)


def _arrived(place: Path) -> int:
    total = 0
    for part in place.parent.glob(f"{place.name}.*.part"):
        with suppress(OSError):
            total += part.stat().st_size
    return total


def _download(
    url: str, aside: Path, *, shown: str, count: Callable[[int], None], stop: threading.Event
) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, aside, count, stop)
            return
        except _Failed as failure:
            if stop.is_set():
                raise _stopped(shown) from failure
            if failure.broke and attempt < ATTEMPTS:
                stop.wait(PAUSE_S)
                continue
            where: dict[str, object] = {"url": shown}
            if failure.said:
                where["said"] = failure.said
            tried = f" ({ATTEMPTS} tries)" if failure.broke else ""
            raise DataError(
                f"the shard '{_name(shown)}' could not be fetched: {failure.reason}{tried}",
                where=where,
                hint=failure.hint,
            ) from failure


def _transfer(url: str, aside: Path, count: Callable[[int], None], stop: threading.Event) -> None:
    """Write what a URL gives to a file and flush it.

    Raises:
        _Failed: anything about the transfer.
        OSError: the file cannot be written.
    """
    stream = _open(url)
    process: subprocess.Popen[bytes] | None = getattr(stream, "proc", None)
    try:
        # Unbuffered: whoever waits for this shard watches the file grow.
        with aside.open("wb", buffering=0) as file:
            for block in _blocks(stream, stop):
                file.write(block)
                count(len(block))
            os.fsync(file.fileno())
        if process is not None and process.wait(STALL_S):
            raise _failure(url, process.returncode, stream)
    except subprocess.TimeoutExpired as exc:
        raise _Failed(f"the program did not end within {STALL_S:.0f} s after its last byte") from exc
    finally:
        if process is not None and process.poll() is None:
            process.kill()
        with suppress(Exception):
            # webdataset raises here once more what a program's status says.
            stream.close()
        if said := getattr(stream, "said", None):
            said.close()


def _open(url: str) -> Any:
    from webdataset.gopen import gopen, gopen_schemes

    # webdataset has no reader for s3 of its own; its manual pipes this command. A reader that the user has put
    # there, or asked for with USE_AIS_FOR, goes before.
    gopen_schemes.setdefault("s3", _open_s3)
    try:
        return gopen(url)
    except FileNotFoundError as exc:
        raise _Failed(
            f"the program '{exc.filename}' is not there",
            hint=f"install {exc.filename}, or put it on the PATH",
        ) from exc
    except ImportError as exc:
        raise _Failed(f"the package '{exc.name}' is missing", hint=f"pip install {exc.name}") from exc
    except Exception as exc:
        raise _Failed(without_secrets(str(exc)) or type(exc).__name__) from exc


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192) -> Any:
    from webdataset.gopen import Pipe

    said = tempfile.TemporaryFile()  # noqa: SIM115 - read once the program has ended
    try:
        pipe = Pipe(["aws", "s3", "cp", url, "-"], mode=mode, bufsize=bufsize, stderr=said)
    except OSError:
        said.close()
        raise
    pipe.said = said
    return pipe


def _blocks(stream: Any, stop: threading.Event) -> Iterator[bytes]:
    process = getattr(stream, "proc", None)
    if process is None:
        while block := stream.read(_BLOCK):
            yield block
        return
    descriptor = process.stdout.fileno()
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while True:
        deadline = time.monotonic() + STALL_S
        while not poller.poll(1000 * min(_LOOK_AGAIN_S, STALL_S)):
            if stop.is_set():
                raise _Failed("stopped")
            if time.monotonic() > deadline:
                raise _Failed(
                    # A program may hold back a trickle until it fills a block.
                    f"no block of data came within {STALL_S:.0f} s",
                    hint="try again later; what is fetched stays",
                )
        if stop.is_set():
            raise _Failed("stopped")
        block = os.read(descriptor, _BLOCK)
        if not block:
            return
        yield block


def _failure(url: str, status: int, stream: Any) -> _Failed:
    """Put a program's exit status into words."""
    scheme = urlsplit(url).scheme
    if scheme in _BY_CURL:
        if status == 22:
            return _refusal(url)
        return _Failed(
            _CURL.get(status, f"curl ended with status {status}"),
            hint="check the URL's host and port, and that its server is up; what is fetched stays"
            if status in _NOT_REACHED
            else None,
            broke=status in _BROKEN_MIDWAY,
        )
    said = getattr(stream, "said", None)
    lines: list[str] = []
    if said is not None:
        said.seek(0)
        lines = said.read(_BLOCK).decode(errors="replace").strip().splitlines()
    return _Failed(
        f"its program ended with status {status}", said=without_secrets(lines[-1].strip()) if lines else ""
    )


def _refusal(url: str) -> _Failed:
    """Ask once more for the first byte, to learn with which status the server refuses."""
    try:
        asked = subprocess.run(
            # Not -f: it is the status that is wanted.
            ["curl", "-s", "-L", "-r", "0-0", "-w", "%{http_code}", *_ASKING, url],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * _STATUS_WITHIN_S,
        )
        status = int(asked.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        status = 0
    if status in (401, 403):
        return _Failed(
            f"HTTP {status}",
            hint="the login or the signature is missing, wrong or out of date; records keep neither, so give the URL anew, "
            "or with ${NAME} and the secret in the environment variable WDS_NAME",
        )
    if status in (404, 410):
        return _Failed(
            f"HTTP {status}, there is no such file", hint="compare the pattern's braces with what is there"
        )
    return _Failed(
        f"HTTP {status}" if status >= 400 else _CURL[22], hint="try again later; what is fetched stays"
    )


def _stopped(shown: str) -> DataError:
    return DataError(f"fetching the shard '{_name(shown)}' was stopped", where={"url": shown})


def _part(place: Path, who: str) -> Path:
    return place.with_name(f"{place.name}.{who}.part")


def _name(shown: str) -> str:
    return shown if shown.startswith("pipe:") else shown.rpartition("/")[2] or shown
