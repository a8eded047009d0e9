"""Which pictures a folder holds, and an index of them beside the run that makes the next start quick.

The index is trusted when every folder has the inode and the time of change that it had, and a sample of the files
(of a small folder all) has its sizes; otherwise, or when it is damaged, the folder is read again. What it holds decides no
result: the same folder gives the same names in the same order with and without it.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgecl.distributed.processes import is_main
from edgecl.errors import EdgeclError, first_of, tell
from edgecl.onboard.pictures import EXTENSIONS
from edgecl.progress import Progress
from edgecl.storage.reading import parse_json, read_bytes, read_json
from edgecl.storage.writing import write_bytes

_MAGIC = "edgecl-index 2"
_SAMPLE = 1024
# In names joined by NUL: a part that is empty or begins with a dot, so also one that leads out of the folder.
_OUTSIDE = re.compile(rb"(?:^|[\0/])(?:[.\0/]|$)")
# A folder that changed this shortly before it was read may change again without its time of change showing it.
_RACY_NS = 2_000_000_000
_NOWHERE = "a link that leads nowhere"
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
_COUNT_EVERY = 1000
# A file or folder that went while its neighbors were read; the second is what /proc says of a process.
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, eq=False)
class Listing:
    """The pictures below a folder."""

    names: list[str]
    """Relative, with slashes, sorted."""
    sizes: NDArray[np.int64]
    """(N,) bytes."""
    fingerprint: str
    """sha256 over names and sizes."""
    folders: list[tuple[str, int, int]]
    """Of each folder that was read: relative name, time of change in nanoseconds, inode."""
    left_out: list[str]
    """Links to folders that were already read, and links that lead nowhere but to themselves."""
    no_files: list[tuple[str, str]]
    """Of what is named like a picture, and of links, what there is no file behind: name, and what it is instead."""


class Memory:
    """The files of a folder that could not be decoded, remembered until they change.

    The file is JSON: relative name -> size, time of change and what was wrong. `names` are those of all pictures, sorted.
    """

    def __init__(self, file: Path, root: Path, names: list[str]):
        self._file, self._root, self._names = file, root, names

    def known(self) -> dict[int, str]:
        """Return the positions of the files that were unreadable and have not changed, with the reasons."""
        found = {}
        for name, entry in self._read().items():
            position = bisect.bisect_left(self._names, name)
            if (
                position < len(self._names)
                and self._names[position] == name
                and entry[:2] == self._stamp(name)
            ):
                found[position] = str(entry[2])
        return found

    def remember(self, news: Mapping[int, str]) -> None:
        """Add files; a file system that refuses costs the memory, not the run."""
        entries = self._read()
        for position, reason in news.items():
            if stamp := self._stamp(self._names[position]):
                entries[self._names[position]] = [*stamp, reason]
        _write(self._file, json.dumps(entries, indent=1).encode())

    def _read(self) -> dict[str, list[Any]]:
        try:
            entries = read_json(self._file)
        except (OSError, EdgeclError):
            return {}
        whole = isinstance(entries, dict) and all(
            isinstance(entry, list) and len(entry) == 3 for entry in entries.values()
        )
        return entries if whole else {}

    def _stamp(self, name: str) -> list[int] | None:
        try:
            status = (self._root / name).stat()
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns]


def list_folder(root: Path, *, index_dir: Path | None) -> tuple[Listing, Memory | None]:
    """Find every picture below a folder, links to folders included, dot files left out; no `index_dir` keeps no index.

    Raises:
        OSError: a folder cannot be read.
    """
    if index_dir is None:
        listing = scan(root)
        _report_left_out(listing, root)
        return listing, None
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    file = index_dir / f"index-{key}"
    kept = _read(file)
    if kept and _unchanged(kept, root):
        listing = kept
    else:
        started = time.time_ns()
        listing = scan(root)
        if is_main() and max(changed for _, changed, _ in listing.folders) < started - _RACY_NS:
            _write(file, _encoded(listing))
    _report_left_out(listing, root)
    return listing, Memory(index_dir / f"unreadable-{key}.json", root, listing.names)


def scan(root: Path) -> Listing:
    """Read a folder and those below it, each once; what goes meanwhile is left out, as if it had gone before.

    Raises:
        OSError: a folder cannot be read.
    """
    found = _Found({}, [], [], [], [])
    folders: list[tuple[str, int, int]] = []
    seen: set[tuple[int, int]] = set()
    # Linked folders wait until all real ones are seen: a link to a folder inside the root then adds
    # nothing, and a loop ends.
    real = [(str(root), "")]
    with Progress("looking for images", total=None, unit="files") as progress:
        while real or found.linked:
            is_link = not real
            folder, prefix = found.linked.pop(0) if is_link else real.pop()
            try:
                status = os.stat(folder)  # noqa: PTH116 - millions of names; plain strings are far quicker
                if (status.st_dev, status.st_ino) in seen:
                    if is_link:
                        found.left_out.append(prefix.rstrip("/"))
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    folders.append((prefix, status.st_mtime_ns, status.st_ino))
                    for count, entry in enumerate(entries, start=1):
                        if count % _COUNT_EVERY == 0:
                            progress.advance(_COUNT_EVERY)
                        if not entry.name.startswith("."):
                            found.add(entry, prefix)
            except _GONE:
                if not prefix:
                    raise
            real += sorted(found.inner)
            found.inner.clear()
            found.linked.sort()
    names = sorted(found.sizes)
    sizes = np.fromiter((found.sizes[name] for name in names), dtype=np.int64, count=len(names))
    return Listing(
        names, sizes, fingerprint(names, sizes), folders, sorted(found.left_out), sorted(found.no_files)
    )


class _Found(NamedTuple):
    """What a scan met so far; the folders as path and prefix."""

    sizes: dict[str, int]
    inner: list[tuple[str, str]]
    linked: list[tuple[str, str]]
    left_out: list[str]
    no_files: list[tuple[str, str]]

    def add(self, entry: os.DirEntry[str], prefix: str) -> None:
        """Sort in one entry of a folder."""
        name = entry.name
        try:
            if entry.is_dir():
                (self.linked if entry.is_symlink() else self.inner).append((entry.path, f"{prefix}{name}/"))
                return
            is_picture = name.lower().endswith(EXTENSIONS)
            if is_picture and entry.is_file():
                self.sizes[prefix + name] = entry.stat().st_size
            elif is_picture or entry.is_symlink():
                kind = _no_file(entry.path)
                # Of other names a link alone matters: it may have led to a folder of pictures.
                if kind and (is_picture or kind == _NOWHERE):
                    self.no_files.append((prefix + name, kind))
        except _GONE:
            return
        except OSError as exc:
            if exc.errno == errno.ENOTDIR:
                self.no_files.append((prefix + name, _NOWHERE))
            elif exc.errno == errno.ELOOP:
                self.left_out.append(prefix + name)
            else:
                raise


def _no_file(path: str) -> str | None:
    """Return what stands in the place of a file, None for a file or folder; not opened, since a pipe would block."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return _NOWHERE
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def fingerprint(names: Iterable[str], sizes: NDArray[np.int64]) -> str:
    """Return the sha256 over names and sizes."""
    lines = "".join(f"{name}\0{size}\n" for name, size in zip(names, sizes.tolist(), strict=True))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def _unchanged(listing: Listing, root: Path) -> bool:
    try:
        for prefix, changed, inode in listing.folders:
            status = os.stat(f"{root}/{prefix}")  # noqa: PTH116
            if (status.st_mtime_ns, status.st_ino) != (changed, inode):
                return False
        return all(
            os.stat(f"{root}/{listing.names[place]}").st_size == listing.sizes[place]  # noqa: PTH116
            for place in _sample(len(listing.names))
        ) and all(
            _no_file(f"{root}/{name}") == kind
            for name, kind in map(listing.no_files.__getitem__, _sample(len(listing.no_files)))
        )
    except OSError:
        return False


def _sample(count: int) -> list[int]:
    """Choose some of so many: others at every start, so that what one misses the next may see."""
    if count <= _SAMPLE:
        return list(range(count))
    chosen: list[int] = np.random.default_rng().permutation(count)[:_SAMPLE].tolist()
    return chosen


def _encoded(listing: Listing) -> bytes:
    names = "\0".join(listing.names).encode(errors="surrogateescape")
    header = {
        "fingerprint": listing.fingerprint,
        "folders": listing.folders,
        "left_out": listing.left_out,
        "no_files": listing.no_files,
        "count": len(listing.names),
        "names_bytes": len(names),
    }
    body = json.dumps(header).encode() + b"\n" + names + listing.sizes.astype("<i8").tobytes()
    return f"{_MAGIC} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def _read(file: Path) -> Listing | None:
    """Read an index; None where there is none, or none that is whole and as edgecl writes it."""
    try:
        first, _, body = read_bytes(file).partition(b"\n")
        if first != f"{_MAGIC} {hashlib.sha256(body).hexdigest()}".encode():
            return None
        header, _, rest = body.partition(b"\n")
        fields = parse_json(header)
        end = fields["names_bytes"]
        joined = rest[:end]
        listing = Listing(
            joined.decode(errors="surrogateescape").split("\0") if joined else [],
            np.frombuffer(rest[end:], dtype="<i8").astype(np.int64),
            fields["fingerprint"],
            [(prefix, changed, inode) for prefix, changed, inode in fields["folders"]],
            fields["left_out"],
            [(name, kind) for name, kind in fields["no_files"]],
        )
        return listing if len(listing.names) == fields["count"] and _is_sound(listing, joined) else None
    except (OSError, EdgeclError, ValueError, LookupError, TypeError, AttributeError):
        # Whoever writes an index can also write its sum.
        return None


def _is_sound(listing: Listing, joined: bytes) -> bool:
    """Return whether a listing is one that `scan` could have made, its joined names below the folder included."""
    names, sizes = listing.names, listing.sizes
    texts = [
        listing.fingerprint,
        *(prefix for prefix, _, _ in listing.folders),
        *listing.left_out,
        *(text for pair in listing.no_files for text in pair),
    ]
    numbers = [number for _, *both in listing.folders for number in both]
    return (
        isinstance(listing.left_out, list)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) for number in numbers)
        and bool(listing.folders)
        and len(names) == len(sizes)
        and bool((sizes >= 0).all())
        and all(before < after for before, after in itertools.pairwise(names))
        and not (joined and _OUTSIDE.search(joined))
    )


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content)
    except (OSError, EdgeclError) as exc:
        if is_main():
            reason = str(exc).partition("\n")[0]
            tell(f"no index is kept, the next start takes as long: {reason}")


def _report_left_out(listing: Listing, root: Path) -> None:
    if not is_main():
        return
    if count := len(listing.left_out):
        tell(
            f"{count} link{'s' if count > 1 else ''} in '{root}' left out, "
            f"leading back to what was already read: {first_of(listing.left_out)}"
        )
    if count := len(listing.no_files):
        named = first_of([f"{name} ({kind})" for name, kind in listing.no_files])
        tell(f"{count} name{'s' if count > 1 else ''} in '{root}' left out, with no file behind: {named}")
