"""WebDataset tar shards, on the disk or fetched into a cache, as images by index with an order that stays local."""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from edgecl.data.fetching import cache_folder, cached_place, fetch
from edgecl.data.randomness import permutation
from edgecl.data.source import ImageSource, Labels, UnreadableImage, expanded
from edgecl.data.tar_index import TarIndex, basename, indexed, stamp_of
from edgecl.distributed.processes import is_main
from edgecl.errors import DataError, counted, first_of, tell
from edgecl.progress import Progress
from edgecl.storage.redaction import without_secrets

SCHEME = "shards"
SUMMARIES = {
    "shards:PATTERN": "WebDataset tar files on disk, behind https:// or s3://; train-{000000..000127}.tar"
}
# Images are shuffled among so many neighboring shards of an epoch, and among so many images at least.
WINDOW_SHARDS = 8
WINDOW_IMAGES = 8192
_THREADS = 4
# Each is a file of its own to look for, open and index; the largest public sets have a quarter of this.
_MOST_SHARDS = 1_000_000
_DEEPEST_BRACES = 20
_RANGE = re.compile(
    r"(?:(?P<first>-?\d+)\.\.(?P<last>-?\d+)|(?P<letter>[A-Za-z])\.\.(?P<to>[A-Za-z]))(?:\.\.-?(?P<step>\d+))?"
)
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_PATTERNS = "write shards:PATH/train-{000000..000127}.tar, a URL, or several with '::' between"
# Class numbers beyond this are names of classes that happen to be digits.
_MOST_CLASSES = 65536
_MIB = 2**20

Indices = NDArray[np.int64]


class _Shard(NamedTuple):
    """One shard that is on this machine."""

    shown: str
    file: Path
    tar: TarIndex


@dataclass(frozen=True, eq=False)
class _ShardImages:
    """The images of all shards, one shard after the other."""

    shards: tuple[_Shard, ...]
    first: Indices
    """(S + 1,) position of each shard's first image, and the number of all."""

    def find(self, index: int) -> tuple[_Shard, int]:
        """Return the shard an image is in, and which of its images it is."""
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        return self.shards[shard], index - int(self.first[shard])

    def read(self, index: int) -> bytes:
        """Return one image as the shard holds it.

        Raises:
            UnreadableImage: its shard is not the one that was indexed.
            OSError: it is gone or out of reach.
        """
        (_, file, shard), position = self.find(index)
        offset, size = int(shard.offsets[position]), int(shard.sizes[position])
        # Opened for each image: thousands of shards are more than a process may hold open.
        with file.open("rb", buffering=0) as opened:
            stamp = stamp_of(os.fstat(opened.fileno()))
            if stamp.size < shard.stamp.size:
                raise UnreadableImage(
                    f"its shard shrank from {shard.stamp.size:,} to {stamp.size:,} bytes since it was indexed"
                )
            if stamp != shard.stamp:
                raise UnreadableImage("its shard changed since it was indexed")
            content = os.pread(opened.fileno(), size, offset)
        if len(content) < size:
            raise UnreadableImage("its shard shrank while it was read")
        return content

    def name(self, index: int) -> str:
        """Name an image by its shard and its member."""
        shard, position = self.find(index)
        return f"{shard.shown}:{shard.tar.name(position)}"

    def order(self, seed: int, epoch: int, chosen: Indices) -> Indices:
        """Shuffle the shards of an epoch, and the images within windows of neighboring shards.

        Reading stays within a few shards at a time, where a plain shuffle would ask every shard of a slow disk for
        every batch. Windows are of WINDOW_SHARDS shards, or of more until they hold WINDOW_IMAGES images.

        Returns:
            (M,) positions in (M,) `chosen`, every one once: a function of the arguments alone.
        """
        shard_of = np.searchsorted(self.first, chosen, side="right") - 1
        shards = permutation(seed, epoch, len(self.shards), stream="shards")
        counts = np.bincount(shard_of, minlength=len(self.shards))[shards]
        window_of = np.empty(len(self.shards), dtype=np.int64)
        window_of[shards] = _windows(counts)
        shuffled = permutation(seed, epoch, len(chosen))
        return shuffled[np.argsort(window_of[shard_of[shuffled]], kind="stable")]


def _windows(counts: Indices) -> Indices:
    """Number the windows that shards with so many images make, in their order."""
    window = shards = images = 0
    numbers = []
    for count in counts.tolist():
        if shards >= WINDOW_SHARDS and images >= WINDOW_IMAGES:
            window, shards, images = window + 1, 0, 0
        if count:
            shards, images = shards + 1, images + count
        numbers.append(window)
    return np.array(numbers, dtype=np.int64)


def open_shards(uri: str) -> ImageSource:
    """Open the images of WebDataset shards.

    Every shard is indexed once, and the index kept in the cache. Remote ones are fetched whole into the cache first.
    Labels are those of the `.cls` members, where every image has one: numbers, or names of classes.

    Args:
        uri: shards:PATTERN. The pattern is a folder, a path or URL with WebDataset's braces, or several of these with
            '::' between.

    Raises:
        DataError: a package is missing, the pattern is wrong, a shard is missing, cannot be fetched, is no whole tar
            or has a member that climbs out, or there are no images.
    """
    shown = without_secrets(uri)
    urls = _expand(uri.partition(":")[2], shown)
    _refuse_missing(urls, shown)
    _refuse_twice(urls, shown)
    shards = _index_all(urls)
    counts = [len(shard.tar) for shard in shards]
    if not sum(counts):
        raise DataError(
            f"no images in the {counted(len(shards), 'shard')} of '{shown}'",
            hint="looked for members that end in .jpg, .jpeg, .png, .webp or .bmp",
        )
    images = _ShardImages(tuple(shards), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    unused = sum(shard.tar.unused for shard in shards)
    if unused and is_main():
        tell(
            f"{counted(unused, 'image')} of '{shown}' not used: of those whose names agree up to the first dot, "
            "which are one sample, one is"
        )
    classes, labels = _classes([text for shard in shards for text in shard.tar.labels()], shown)
    digest = hashlib.sha256()
    for shard in shards:
        name = basename(shard.shown)
        digest.update(
            f"{name}\0{shard.tar.stamp.size}\0{shard.tar.digest}\n".encode(errors="surrogateescape")
        )
    return ImageSource(
        uri=shown,
        fingerprint=digest.hexdigest(),
        length=sum(counts),
        opener=None,
        reader=images.read,
        namer=images.name,
        classes=classes,
        labels=labels,
        order=images.order,
    )


def absolute_shards(uri: str) -> str:
    """Return a URI of shards that means the same from any working directory, and that holds no secret."""
    parts = []
    for part in uri.partition(":")[2].split("::"):
        if is_remote(part):
            parts.append(without_secrets(part))
        elif part.startswith(("{", "$")):
            # Only its expansions tell whether it is a path.
            parts += [
                without_secrets(url) if is_remote(url) else _absolute(url)
                for url in _expand(part, without_secrets(uri))
            ]
        else:
            parts.append(_absolute(part))
    return f"{SCHEME}:{'::'.join(parts)}"


def is_remote(url: str) -> bool:
    """Return whether a shard has to be fetched: it is a URL of another kind than file:.

    Raises:
        DataError: it looks like a URL and is none.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError as exc:
        problem = f"'{without_secrets(url)}' is no URL: {exc}"
        raise DataError(problem, hint=_PATTERNS) from exc
    return bool(scheme) and scheme != "file"


def _absolute(path: str) -> str:
    return str(_local(path).absolute())


def _local(url: str) -> Path:
    if url.startswith("file:"):
        url = unquote(urlsplit(url).path)
    return expanded(url)


def _expand(pattern: str, shown: str) -> list[str]:
    """Return the shards a pattern names, by WebDataset's rules; a folder stands for the .tar files in it."""
    try:
        from braceexpand import braceexpand
    except ImportError as exc:
        raise DataError(
            f"reading shards needs the package '{exc.name}'", hint="pip install 'edgecl[shards]'"
        ) from exc
    for name in _VARIABLE.findall(pattern):
        if f"WDS_{name}" not in os.environ:
            raise DataError(
                f"the environment variable WDS_{name} is not set, and '{shown}' stands on it",
                hint=f"its value is put in the place of ${{{name}}}",
            )
    # The values are the user's own.
    parts = [_VARIABLE.sub(lambda found: os.environ[f"WDS_{found[1]}"], part) for part in pattern.split("::")]
    try:
        _refuse_too_many(parts, shown)
        urls: list[str] = [url for part in parts for url in braceexpand(part) if url]
    except ValueError as exc:
        problem = without_secrets(f"the pattern '{shown}' cannot be read: {exc}")
        raise DataError(problem, hint=_PATTERNS) from exc
    if not urls:
        raise DataError(f"'{shown}' names no shards", hint=_PATTERNS)
    found: list[str] = []
    for url in urls:
        if is_remote(url) or not _local(url).is_dir():
            found.append(url)
            continue
        inside = sorted(str(path) for path in _local(url).glob("*.tar"))
        if not inside:
            raise DataError(
                f"no .tar files in the folder '{url}'",
                hint="looked for *.tar right in it, not deeper; unpack .tar.gz to .tar; if it holds images as they are, "
                "name the folder without 'shards:'",
            )
        found += inside
    return found


def _refuse_too_many(parts: Sequence[str], shown: str) -> None:
    """Check the number of files that a pattern stands for, before it is expanded."""
    count = sum(map(_expansions, parts))
    if count > _MOST_SHARDS:
        raise DataError(
            f"the pattern '{shown}' stands for {count:,} shards; {_MOST_SHARDS:,} are allowed", hint=_PATTERNS
        )


def _expansions(pattern: str) -> int:
    """Count what braces expand to, by multiplying: twenty letters can name more than memory holds.

    Raises:
        ValueError: nested deeper than anybody writes, or a number with thousands of digits.
    """
    # Of each open brace: where it began, of its alternatives so far the sum, of the current one the product.
    begun, sums, products = [0], [0], [1]
    for mark in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        if mark[0] == "{":
            begun.append(mark.end())
            sums.append(0)
            products.append(1)
            if len(begun) > _DEEPEST_BRACES:
                raise ValueError(f"braces nested more than {_DEEPEST_BRACES} deep")
        elif mark[0] == "," and len(begun) > 1:
            sums[-1] += products[-1]
            products[-1] = 1
        elif mark[0] == "}" and len(begun) > 1:
            inside = _RANGE.fullmatch(pattern, begun.pop(), mark.start())
            alternatives = sums.pop() + products.pop()
            products[-1] *= _range_length(inside) if inside else alternatives
    # A closing brace too many turns a later open one into text.
    return math.prod(sum(both) for both in zip(sums, products, strict=True))


def _range_length(found: re.Match[str]) -> int:
    if found["letter"]:
        first, last = ord(found["letter"]), ord(found["to"])
    else:
        first, last = int(found["first"]), int(found["last"])
    return abs(last - first) // (int(found["step"] or 1) or 1) + 1


def _refuse_missing(urls: Sequence[str], shown: str) -> None:
    local = [url for url in urls if not is_remote(url)]
    missing = [url for url in local if not _local(url).exists()]
    if not missing:
        return
    raise DataError(
        f"{len(missing)} of {len(local)} shards are missing"
        if len(local) > 1
        else f"there is no shard '{missing[0]}'",
        where={
            "data": shown,
            "missing": first_of(missing),
            "there": f"{len(local) - len(missing)} of {len(local)}",
        },
        hint="compare the pattern's braces with what is there",
    )


def _refuse_twice(urls: Sequence[str], shown: str) -> None:
    """Refuse a shard that is named twice, however it is spelled: its images would count double."""
    named: dict[Path, str] = {}
    for url in urls:
        spelled = without_secrets(url)
        place = cached_place(url) if is_remote(url) else _local(url).resolve()
        if place in named:
            raise DataError(
                f"the shard '{basename(spelled)}' is named twice",
                where={"data": shown, "first": named[place], "again": spelled},
                hint="name each shard once: look for braces that overlap, and for two spellings of one path",
            )
        named[place] = spelled


def _index_all(urls: Sequence[str]) -> list[_Shard]:
    """Fetch and index the shards, several at a time; at the first error the rest is left."""
    stop = threading.Event()
    arrived = 0
    counting = threading.Lock()

    def count(size: int) -> None:
        nonlocal arrived
        with counting:
            arrived += size

    pool = ThreadPoolExecutor(min(_THREADS, len(urls)), thread_name_prefix="edgecl-shards")
    try:
        futures = [pool.submit(_bring, url, count, stop) for url in urls]
        waiting: set[Future[_Shard]] = set(futures)
        with Progress("shards", total=len(urls), unit="shards") as progress:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.advance(len(done), note=f"{arrived / _MIB:,.0f} MiB fetched" if arrived else None)
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _bring(url: str, count: Callable[[int], None], stop: threading.Event) -> _Shard:
    if is_remote(url):
        return _Shard(without_secrets(url), *fetch(url, count=count, stop=stop))
    file = _local(url).absolute()
    place = hashlib.sha256(os.fsencode(file)).hexdigest()[:24]
    cached_at = cache_folder() / "indices" / f"{place}-{file.name[-80:]}.npz"
    return _Shard(str(file), file, indexed(file, shown=str(file), cached_at=cached_at))


def _classes(texts: list[str], shown: str) -> tuple[tuple[str, ...] | None, Labels | None]:
    """Make class numbers of what the `.cls` members say."""
    known = set(texts)
    without = sum(1 for text in texts if not text or _number(text) < -1)
    if without == len(texts):
        return None, None
    if without:
        if is_main():
            tell(f"{without} of {len(texts)} images of '{shown}' have no class, so all are taken without")
        return None, None
    if all(_number(text) >= 0 for text in known):
        numbers = {text: _number(text) for text in known}
        most = max(numbers.values()) + 1
        if most <= _MOST_CLASSES:
            labels = np.array([numbers[text] for text in texts], dtype=np.int64)
            return tuple(str(number) for number in range(most)), labels
    names = sorted(known)
    positions = {name: position for position, name in enumerate(names)}
    return tuple(names), np.array([positions[text] for text in texts], dtype=np.int64)


def _number(text: str) -> int:
    """Read a class number; -1 for a name, below that for a number that says 'none', as -1 does by custom."""
    try:
        number = int(text)
    except ValueError:
        return -1
    return number if number >= 0 else -2
