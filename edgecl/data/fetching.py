"""Remote shards: fetched whole through fsspec, once per machine, into a cache."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from edgecl.data.tar_index import TarIndex, basename, indexed, read_index, save_index
from edgecl.errors import DataError, first_line
from edgecl.storage.redaction import without_secrets
from edgecl.storage.writing import DISK_FULL, flush

# Longest time without a byte.
STALL_S = 90.0
# A connection that breaks, and a server that is busy, are tried anew so often in all.
ATTEMPTS = 3
PAUSE_S = 5.0
_LOOK_AGAIN_S = 0.2
# fsspec knows more, some of which start programs: a data URI may come out of somebody else's recipe or record.
_SCHEMES = ("https", "http", "s3", "gs", "az")
# Of a signed URL these change from one signing to the next, while the file stays the same.
_SIGNATURE = re.compile(
    r"x-(amz|goog|oss|cos|ms)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id"
    r"|sig|se|sp|sv|sr|st|spr|sip|skoid|sktid|skt|ske|sks|skv",
    re.IGNORECASE,
)
_LOGIN_HINT = (
    "the login or the signature is missing, wrong or out of date; records keep neither, so give the URL anew, "
    "or with ${NAME} and the secret in the environment variable WDS_NAME"
)


class _Failed(Exception):  # noqa: N818 - becomes a DataError once it is known which shard it is
    """A transfer that did not end well; with `again` it may be tried anew."""

    def __init__(self, reason: str, *, hint: str | None = None, again: bool = False):
        self.reason, self.hint, self.again = reason, hint, again


def cache_folder() -> Path:
    """Return the folder for shards that were fetched and for indices: $EDGECL_CACHE/shards or ~/.cache/edgecl/shards."""
    named = os.environ.get("EDGECL_CACHE")
    if named:
        return Path(named).expanduser() / "shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgecl" / "shards"


def cached_place(url: str) -> Path:
    """Return where a remote shard lies once it is fetched; the same for every signature and login."""
    parts = urlsplit(url)
    query = urlencode(
        [(key, value) for key, value in parse_qsl(parts.query, True) if not _SIGNATURE.fullmatch(key)]
    )
    plain = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))
    name = re.sub(r"[^\w.-]", "_", parts.path.rpartition("/")[2])[-80:]
    return cache_folder() / f"{hashlib.sha256(plain.encode()).hexdigest()[:24]}-{name}"


def fetch(url: str, *, count: Callable[[int], None], stop: threading.Event) -> tuple[Path, TarIndex]:
    """Fetch a remote shard into the cache, unless it is there; only a whole one is kept.

    Processes that want the same shard wait for the first of them, as long as its file grows.

    Args:
        url: https, http, s3, gs or az.
        count: called with the bytes that arrived.

    Raises:
        DataError: not there, refused, silent for too long, cut short, not a tar, or no room for it.
    """
    shown, place = without_secrets(url), cached_place(url)
    cached_at = place.with_name(f"{place.name}.npz")
    with suppress(DataError):
        # Not there yet, or damaged since: both end in fetching.
        return place, indexed(place, shown=shown, cached_at=cached_at)
    scheme = urlsplit(url).scheme
    if scheme not in _SCHEMES:
        raise DataError(
            f"shards are not fetched through '{scheme}:'",
            where={"url": shown},
            hint=f"through {', '.join(_SCHEMES)}; what a program writes, let it write to a file first",
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(place, shown, stop):
            with suppress(DataError):
                return place, indexed(place, shown=shown, cached_at=cached_at)
            aside = place.with_name(f"{place.name}.{os.getpid()}.part")
            try:
                _download(url, aside, shown=shown, count=count, stop=stop)
                flush(aside)
                index = read_index(aside, shown=shown)
                aside.replace(place)
                flush(place.parent)
            finally:
                aside.unlink(missing_ok=True)
            save_index(index, cached_at)
            return place, index
    except OSError as exc:
        full = exc.errno in DISK_FULL
        raise DataError(
            f"no room for the shard '{basename(shown)}'"
            if full
            else f"the cache cannot be written: {exc.strerror}",
            where={"cache": place.parent, "url": shown},
            hint="EDGECL_CACHE names another place; fetched shards are kept until somebody deletes them",
        ) from exc


@contextmanager
def _only_one(place: Path, shown: str, stop: threading.Event) -> Iterator[None]:
    """Lock a shard for one process of the machine; others wait as long as its file grows."""
    from filelock import FileLock, Timeout  # slow to import, and most runs fetch nothing

    lock = FileLock(place.with_name(f"{place.name}.lock"))
    size, since = -1, time.monotonic()
    while True:
        with suppress(Timeout):
            lock.acquire(timeout=_LOOK_AGAIN_S, poll_interval=_LOOK_AGAIN_S / 4)
            break
        arrived = sum(_size(part) for part in place.parent.glob(f"{place.name}.*.part"))
        if arrived != size:
            size, since = arrived, time.monotonic()
        # Twice as long: the holder reports its own error first.
        if time.monotonic() - since > 2 * STALL_S:
            raise DataError(
                f"another process fetches the shard '{basename(shown)}' and got no further for {2 * STALL_S:.0f} s",
                where={"url": shown, "lock": lock.lock_file},
                hint="end that process; the lock goes with it",
            )
        if stop.is_set():
            raise _stopped(shown)
    try:
        # Of processes that were killed.
        for leftover in place.parent.glob(f"{place.name}.*.part"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _download(
    url: str, aside: Path, *, shown: str, count: Callable[[int], None], stop: threading.Event
) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, aside, count, stop)
            return
        except _Failed as failure:
            if failure.again and attempt < ATTEMPTS and not stop.wait(PAUSE_S):
                continue
            if stop.is_set():
                raise _stopped(shown) from None
            tried = f" ({ATTEMPTS} tries)" if failure.again else ""
            # Not chained: the texts of the libraries name the whole URL.
            raise DataError(
                f"the shard '{basename(shown)}' could not be fetched: {failure.reason}{tried}",
                where={"url": shown},
                hint=failure.hint,
            ) from None


def _transfer(url: str, aside: Path, count: Callable[[int], None], stop: threading.Event) -> None:
    """Write what a URL gives to a file.

    Raises:
        _Failed: anything about the transfer.
        OSError: the disk is full.
    """
    arrived, since = 0, time.monotonic()

    def note(size: int) -> None:
        nonlocal arrived, since
        arrived, since = arrived + size, time.monotonic()
        count(size)

    transfer = _start(url, aside, note)
    while not wait([transfer], timeout=_LOOK_AGAIN_S).done:
        silent = time.monotonic() - since > STALL_S
        if silent or stop.is_set():
            transfer.cancel()
            raise _Failed(f"nothing came for {STALL_S:.0f} s", hint="try again later; what is fetched stays")
    if exc := transfer.exception():
        if isinstance(exc, OSError) and exc.errno in DISK_FULL:
            raise exc
        raise _failure(exc) from None


def _start(url: str, aside: Path, note: Callable[[int], None]) -> Future[None]:
    """Start a transfer in fsspec's own thread, so that the wait for it can end."""
    import asyncio

    options: dict[str, Any] = {}
    try:
        from fsspec.callbacks import Callback
        from fsspec.core import url_to_fs

        if url.startswith("http"):
            from aiohttp import ClientTimeout

            # A whole shard may take hours. What is quoted already is not quoted again, which would break a signature.
            client = {"timeout": ClientTimeout(total=None, sock_connect=STALL_S / 3), "trust_env": True}
            options = {"client_kwargs": client, "encoded": bool(re.search("%[0-9A-Fa-f]{2}", url))}
        system, path = url_to_fs(url, **options)
    except ImportError as exc:
        raise _Failed(
            f"the package '{exc.name or 'fsspec'}' is missing", hint="pip install 'edgecl[shards]'"
        ) from None

    class Counted(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            note(inc)

    return asyncio.run_coroutine_threadsafe(
        system._get_file(path, str(aside), callback=Counted()), system.loop
    )


def _failure(exc: BaseException) -> _Failed:
    """Return the error of a transfer, without the URL that the libraries name in it."""
    kinds = {kind.__name__ for kind in type(exc).__mro__}
    status = getattr(exc, "status", None)
    if isinstance(exc, FileNotFoundError) or status == 410:
        return _Failed("there is no such file", hint="compare the pattern's braces with what is there")
    if isinstance(exc, PermissionError) or status in (401, 403) or "NoCredentialsError" in kinds:
        return _Failed(f"HTTP {status}" if status else "access denied", hint=_LOGIN_HINT)
    if isinstance(status, int) and status >= 400:
        return _Failed(
            f"HTTP {status}",
            hint="try again later; what is fetched stays",
            again=status == 429 or status >= 500,
        )
    if kinds & {"ClientConnectorError", "EndpointConnectionError", "ConnectionTimeoutError"}:
        return _Failed(
            "no connection",
            hint="check the URL's host and port, and that its server is up; what is fetched stays",
        )
    broke = kinds & {"ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "IncompleteReadError"}
    if broke or isinstance(exc, ConnectionError):
        return _Failed("the connection broke before the end", again=True)
    said = without_secrets(first_line(exc)) if isinstance(exc, Exception) else ""
    return _Failed(f"{type(exc).__name__}: {said}")


def _stopped(shown: str) -> DataError:
    return DataError(f"fetching the shard '{basename(shown)}' was stopped", where={"url": shown})
