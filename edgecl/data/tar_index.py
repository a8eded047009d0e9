"""What is in one tar shard and where: read from its headers once, kept as an .npz, never unpacked to the disk."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgecl.errors import ArtifactError, DataError, counted
from edgecl.onboard.pictures import EXTENSIONS
from edgecl.storage.writing import write_bytes

_VERSION = 2
_BLOCK = 512
_LARGEST_LABEL = 1024
_END_SEARCHED = 64 * 1024
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_IMAGE_SUFFIXES = tuple(extension.removeprefix(".") for extension in EXTENSIONS)
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}


class Stamp(NamedTuple):
    """What tells that a file is still the one that was indexed."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The images of one shard in the order of the tar, each with the text of its label."""

    stamp: Stamp
    digest: str
    """sha256 over every member's name and size, and over the labels."""
    offsets: NDArray[np.int64]
    """(N,) where each image's bytes begin, in the shard."""
    sizes: NDArray[np.int64]
    """(N,) bytes of each image."""
    joined_names: bytes
    """Member names of the images, with NUL between them."""
    joined_labels: bytes
    """Content of each image's `.cls` member with NUL between them; empty where there is none."""
    unused: int
    """Further images of samples that have several."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.offsets)

    def name(self, position: int) -> str:
        """Name the member that an image is."""
        return printable(self.joined_names.split(b"\0")[position].decode(errors="surrogateescape"))

    def labels(self) -> list[str]:
        """Return the text of each image's label, '' where it has none."""
        return self.joined_labels.decode().split("\0") if len(self) else []


@dataclass
class _Sample:
    """The members of one shard that share a key."""

    suffixes: set[str] = field(default_factory=set)
    images: list[tuple[int, int, str, int, int]] = field(default_factory=list)
    """Dots and preference of the suffix, name, offset and size: the least of them is the sample's image."""
    label: str = ""


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file's status."""
    return Stamp(status.st_size, status.st_mtime_ns)


def indexed(shard: Path, *, shown: str, cached_at: Path) -> TarIndex:
    """Return a shard's index: the kept one if the shard is as it was then, else a new one, which is kept if it can be.

    Raises:
        DataError: as in `read_index`.
    """
    kept = load_index(cached_at)
    if kept is not None:
        with suppress(OSError):
            if stamp_of(shard.stat()) == kept.stamp:
                return kept
    index = read_index(shard, shown=shown)
    save_index(index, cached_at)
    return index


def read_index(shard: Path, *, shown: str) -> TarIndex:
    """Read every header of a tar file; of the contents, the labels alone.

    A sample is what shares a name up to the first dot of its last part, as WebDataset has it, wherever in the shard
    its members lie. Its image is the member with an image's suffix, its label the text of `.cls`. Folders, samples
    without an image and names like `__this__` are passed over. Errors name the shard as `shown`.

    Raises:
        DataError: not there, no tar, compressed, cut short, damaged, or with a member that has no place in a shard:
            a link, a device, a path that climbs out, the same name twice.
    """
    try:
        if not stat.S_ISREG(shard.stat().st_mode):
            # Opening a pipe would block.
            raise _bad(
                shown,
                "is no file",
                hint="images are read from within a shard, in any order: write it to a file first",
            )
        with shard.open("rb") as file:
            return _read(file, shown)
    except OSError as exc:
        raise _bad(shown, f"cannot be read: {exc.strerror or exc}") from exc


def _read(file: BinaryIO, shown: str) -> TarIndex:
    stamp = stamp_of(os.fstat(file.fileno()))
    _refuse_what_is_no_tar(file, stamp.size, shown)
    samples: dict[str, _Sample] = {}
    digest = hashlib.sha256()
    member = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                _refuse_member(member, shown)
                if archive.offset <= member.offset:
                    raise tarfile.ReadError("a size below zero")
                if member.isreg() and not _is_meta(member.name):
                    _add(samples, member, file, shown)
                    digest.update(f"{member.name}\0{member.size}\n".encode(errors="surrogateescape"))
            end = archive.offset
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as exc:
        # tarfile reads a long name and the header it belongs to by calling itself.
        nested = isinstance(exc, RecursionError)
        reason = "one long name after the other, and no file that they name" if nested else str(exc)
        raise _cut(file, samples, member, reason, stamp, shown) from exc
    _check_end(file, end, samples, stamp, shown)
    chosen = [(min(sample.images), sample.label) for sample in samples.values() if sample.images]
    labels = "\0".join(label for _, label in chosen).encode()
    digest.update(labels)
    return TarIndex(
        stamp=stamp,
        digest=digest.hexdigest(),
        offsets=np.array([image[3] for image, _ in chosen], dtype=np.int64),
        sizes=np.array([image[4] for image, _ in chosen], dtype=np.int64),
        joined_names="\0".join(image[2] for image, _ in chosen).encode(errors="surrogateescape"),
        joined_labels=labels,
        unused=sum(len(sample.images) for sample in samples.values()) - len(chosen),
    )


def _refuse_what_is_no_tar(file: BinaryIO, size: int, shown: str) -> None:
    if size == 0:
        raise _bad(
            shown,
            "is empty",
            hint="copy or fetch it again, or write it anew; whoever wrote it must close the writer",
        )
    start = file.read(_BLOCK)
    file.seek(0)
    if start.startswith(_COMPRESSED):
        raise _bad(
            shown,
            "is compressed, so no image in it can be read without all before it",
            hint="unpack it to a plain .tar; JPEG files do not shrink any further",
        )
    try:
        tarfile.TarInfo.frombuf(start, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as exc:
        if any(start):
            raise _bad(
                shown,
                "is not a tar file",
                hint="see what it is with `file` (a page of a server that asks for a login?), and fetch it again; "
                "shards are written with webdataset's TarWriter or `tar cf`",
            ) from exc


def _refuse_member(member: tarfile.TarInfo, shown: str) -> None:
    """Refuse what no shard needs: nothing is ever unpacked by name here, but the next reader might."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        problem = "has a path that climbs out of the shard"
    elif "\0" in member.name:
        problem = "has a NUL in its name"
    elif member.type in _KINDS:
        problem = f"is {_KINDS[member.type]}"
    elif member.issparse():
        problem = "is a sparse file"
    else:
        return
    raise _bad(
        shown,
        f"has a member that {problem}: '{printable(member.name)}'",
        hint="do not trust a shard with such a member; write it again with regular files alone",
    )


def _is_meta(name: str) -> bool:
    first = name.partition("/")[0]
    return len(first) > 4 and first.startswith("__") and first.endswith("__")


def _add(samples: dict[str, _Sample], member: tarfile.TarInfo, file: BinaryIO, shown: str) -> None:
    key, suffix = _key_and_suffix(member.name)
    if not suffix:
        return
    sample = samples.setdefault(key, _Sample())
    if suffix in sample.suffixes:
        raise _bad(
            shown,
            f"holds '{printable(member.name)}' twice",
            hint="write the shard again, with a key of its own for every sample",
        )
    sample.suffixes.add(suffix)
    if suffix.rpartition(".")[2] in _IMAGE_SUFFIXES:
        # 'jpg' before 'png', and either before 'mask.png': what WebDataset's users write as "jpg;png".
        preference = _IMAGE_SUFFIXES.index(suffix.rpartition(".")[2])
        sample.images.append((suffix.count("."), preference, member.name, member.offset_data, member.size))
    elif suffix == "cls":
        sample.label = _label(member, file, shown)


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split a name at the first dot of its last part: 'a.b/c.seg.png' -> 'a.b/c', 'seg.png'."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


def _label(member: tarfile.TarInfo, file: BinaryIO, shown: str) -> str:
    content = b"\0"
    if member.size <= _LARGEST_LABEL:
        content = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        label = content.decode().strip()
    except UnicodeDecodeError:
        label = "\0"
    if "\0" in label:
        raise _bad(
            shown,
            f"has the label '{printable(member.name)}', which is no short text",
            hint="a .cls member holds the number or the name of a class",
        )
    return label


def _cut(
    file: BinaryIO,
    samples: dict[str, _Sample],
    member: tarfile.TarInfo | None,
    reason: str,
    stamp: Stamp,
    shown: str,
) -> DataError:
    """Return the error of a shard that ends, or turns to nonsense, inside a member: how much of it is whole."""
    cut, inside, size = None, "a header", f"{stamp.size:,}"
    if member is not None:
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if end > stamp.size:
            cut, inside = _key_and_suffix(member.name)[0], f"'{printable(member.name)}'"
            size += f", at least {end:,} expected"
    # A tar ends with blocks of zeros: one that does so and cannot be read was not cut.
    if cut is None and not any(os.pread(file.fileno(), _BLOCK, max(0, stamp.size - _BLOCK))):
        problem = f"is damaged: {reason}"
    else:
        problem = f"is cut short: it ends inside {inside}"
    whole = _count_whole(samples, but=cut)
    return _bad(shown, f"{problem}, after {whole}", hint="copy or fetch it again", bytes=size)


def _check_end(file: BinaryIO, end: int, samples: dict[str, _Sample], stamp: Stamp, shown: str) -> None:
    """Check a tar's end mark: without it tarfile stops in silence, wherever the file was cut or damaged."""
    file.seek(end)
    mark = file.read(_BLOCK)
    whole = _count_whole(samples)
    if len(mark) < _BLOCK:
        raise _bad(
            shown,
            f"is cut short: after {whole} the tar's end mark is missing",
            hint="copy or fetch it again; whoever wrote it must close the writer",
            bytes=f"{stamp.size:,}",
        )
    if any(mark):
        raise _bad(
            shown,
            f"is damaged at byte {end:,}: no tar header there, after {whole}",
            hint="copy or fetch it again",
        )
    if any(file.read(_END_SEARCHED)):
        raise _bad(
            shown,
            f"goes on after its end mark, after {whole}",
            hint="tar files cannot be joined with `cat`; name them both, with '::' between",
        )


def _count_whole(samples: dict[str, _Sample], *, but: str | None = None) -> str:
    count = sum(1 for key, sample in samples.items() if sample.images and key != but)
    return counted(count, "whole sample")


def _bad(shown: str, problem: str, *, hint: str | None = None, **where: str) -> DataError:
    return DataError(
        f"the shard '{basename(shown)}' {problem}",
        where={"shard": shown, **where},
        hint=hint,
    )


def save_index(index: TarIndex, path: Path) -> None:
    """Keep an index, written aside and renamed; a place that cannot be written does without."""
    content = io.BytesIO()
    np.savez(
        content,
        version=np.int64(_VERSION),
        stamp=np.array(index.stamp, dtype=np.int64),
        digest=np.frombuffer(index.digest.encode(), dtype=np.uint8),
        offsets=index.offsets,
        sizes=index.sizes,
        names=np.frombuffer(index.joined_names, dtype=np.uint8),
        labels=np.frombuffer(index.joined_labels, dtype=np.uint8),
        unused=np.int64(index.unused),
    )
    with suppress(OSError, ArtifactError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())


def load_index(path: Path) -> TarIndex | None:
    """Return a kept index; None where there is none, or none that this edgecl can read."""
    try:
        if not path.is_file():
            return None  # a pipe would never end
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            if int(kept["version"]) != _VERSION:
                return None
            return TarIndex(
                stamp=Stamp(*kept["stamp"].tolist()),
                digest=kept["digest"].tobytes().decode(),
                offsets=kept["offsets"],
                sizes=kept["sizes"],
                joined_names=kept["names"].tobytes(),
                joined_labels=kept["labels"].tobytes(),
                unused=int(kept["unused"]),
            )
    except Exception:
        # NumPy, zipfile and zlib meet a damaged file with a dozen kinds of exception; any means: made again.
        return None


def basename(shown: str) -> str:
    """Return the last part of a shard's path or URL, by which errors name it."""
    return shown.rpartition("/")[2] or shown


def printable(name: str) -> str:
    """Return a name that cannot steer a terminal: what is not printable is written as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in name
    )
