"""The readers that are fuzzed: each makes an input out of its seeds in a folder, and reads it as edgecl would.

A group is a function of a `Mutator`, the seeds and an empty folder. It may raise a named error and nothing else. To add
one, write it and put it into `GROUPS` with its share of the cases.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from edgecl.onboard.bundle import digest_of_record

from .mutation import TEXTS, Mutator, dumps
from .oracle import run_command

CORPUS = Path(__file__).parent / "corpus"
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Seeds:
    """Whole things to damage copies of: directories that edgecl wrote, and the files of the corpus."""

    run: Path
    model: Path
    bundle: Path
    recipes: tuple[str, ...] = field(default_factory=lambda: _texts("recipes/*.toml", "benchmarks/tiny.toml"))
    targets: tuple[str, ...] = field(default_factory=lambda: _texts("export/*.toml"))


def _texts(*patterns: str) -> tuple[str, ...]:
    return tuple(path.read_text() for one in patterns for path in sorted(REPOSITORY.glob(one)))


@cache
def corpus(suffixes: tuple[str, ...]) -> tuple[bytes, ...]:
    """Content of the corpus's files of a kind."""
    return tuple(path.read_bytes() for path in sorted(CORPUS.iterdir()) if path.name.endswith(suffixes))


# --- settings ---


@cache
def _recipe_keys() -> tuple[str, ...]:
    from edgecl.config.recipe import flatten, read_recipe

    return tuple(sorted(flatten(read_recipe("demo").model_dump())))


def recipes(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.config.recipe import read_recipe

    file = place / "recipe.toml"
    _write_text(
        file,
        mutator.toml(mutator.pick(seeds.recipes)) if mutator.chance(0.7) else mutator.pick(seeds.recipes),
    )
    if mutator.chance(0.02):
        _spoil(mutator, file)
    assignments = []
    while mutator.chance(0.4):
        key = mutator.pick(_recipe_keys()) if mutator.chance(0.9) else mutator.pick(TEXTS)
        assignments.append(f"{key}={mutator.literal()}")
    if mutator.chance(0.03):
        run_command("cost", _name(mutator, file), *(word for one in assignments for word in ("--set", one)))
        return
    read_recipe(str(file), assignments)


def targets(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.config.target import read_target

    file = place / "target.toml"
    _write_text(file, mutator.toml(mutator.pick(seeds.targets)))
    if mutator.chance(0.05):
        _write_text(file, f"alias = {mutator.literal()}\n")
    if mutator.chance(0.02):
        _spoil(mutator, file)
    precisions = [mutator.pick([*TEXTS, "fp32", "fp16", "int8"])] if mutator.chance(0.2) else None
    read_target(str(file) if mutator.chance(0.9) else _name(mutator, file), precisions=precisions)


# --- data ---


def pictures(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.data.decode import read_picture
    from edgecl.data.source import UnreadableImage
    from edgecl.data.sources import open_source

    folder = place / "pictures"
    folder.mkdir()
    content = mutator.pick(corpus((".jpg", ".png", ".webp", ".bmp", ".eps", ".gif", ".tif")))
    (folder / f"x{mutator.pick(['.jpg', '.png', '.webp', '.bmp'])}").write_bytes(mutator.bytes(content))
    source = open_source(str(folder))
    outcomes = set()
    for read in (lambda: read_picture(source, 0, 16), lambda: source.read(0)):
        try:
            read()
            outcomes.add("read")
        except UnreadableImage:
            outcomes.add("unreadable")
    # libjpeg-turbo may doubt a picture that Pillow reads, but has no last word.
    assert len(outcomes) == 1, "one way reads the picture and the other does not"


def folders(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.data.loading import load_eval_images

    root = place / "root"
    root.mkdir()
    _plant(mutator, root, depth=3)
    source = _open(str(root), index_dir=place / ".edgecl" if mutator.chance(0.3) else None)
    load_eval_images(source, resize_size=16, image_size=16, max_bad_fraction=1.0, limit=4)


def indices(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.data.index import list_folder

    root, kept = place / "root", place / ".edgecl"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").write_bytes(b"no picture")
        os.utime(root / name, (1_600_000_000, 1_600_000_000))
    os.utime(root, (1_600_000_000, 1_600_000_000))
    _, memory = list_folder(root, index_dir=kept)
    assert memory is not None
    memory.remember({0: "broken", 1: "broken too"})
    for file in sorted(kept.iterdir()):
        if file.name.startswith("index") and mutator.chance(0.7):
            _reseal_index(mutator, file)
        elif file.name.startswith("unreadable") and mutator.chance(0.5):
            _write_text(file, dumps(mutator.tree(json.loads(file.read_text()))))
        elif mutator.chance(0.1):
            _spoil(mutator, file)
        else:
            file.write_bytes(mutator.bytes(file.read_bytes()))
    listing, memory = list_folder(root, index_dir=kept)
    assert memory is not None
    assert memory.known().keys() <= set(range(len(listing.names)))
    memory.remember(dict.fromkeys(range(len(listing.names)), "again"))


def tables(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.data.source import UnreadableImage
    from edgecl.data.sources import absolute_uri

    file, column = place / "t.csv", "labels" if mutator.chance(0.5) else "label"
    rows = [f"x/{row}.png,{'red;dark' if row % 2 else 'blue'}" for row in range(5)]
    file.write_bytes(mutator.bytes("\n".join([f"file,{column}", *rows]).encode()))
    if mutator.chance(0.05):
        _spoil(mutator, file)
    absolute_uri(f"csv:{file}")
    source = _open(f"csv:{file}")
    for position in range(min(3, len(source))):
        source.describe(position)
        with contextlib.suppress(UnreadableImage):
            source.read(position)


def shards(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.data.source import UnreadableImage
    from edgecl.data.sources import absolute_uri

    pattern = place / "x-0.tar"
    pattern.write_bytes(_tar(mutator))
    uri = f"shards:{pattern}"
    if mutator.chance(0.05):
        _spoil(mutator, pattern)
    if mutator.chance(0.2):
        uri = f"shards:{_pattern(mutator, place)}"
    absolute_uri(uri)
    source = _open(uri)
    for kept in (place / "home" / "cache").rglob("*.npz"):
        kept.write_bytes(mutator.bytes(kept.read_bytes()))
    source = _open(uri)
    for position in range(min(3, len(source))):
        source.describe(position)
        with contextlib.suppress(UnreadableImage):
            source.read(position)


# --- directories that edgecl writes ---


def models(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.nets.model_dir import load_model

    directory = _copy(seeds.model, place / "model")
    weights, record = directory / "weights.safetensors", directory / "model.json"
    kind = mutator.random.randrange(10)
    if kind < 5:
        _reseal(mutator, record)
    elif kind < 7:
        changed = (
            mutator.bytes(weights.read_bytes()[:40_000]) if mutator.chance(0.5) else _header(mutator, weights)
        )
        _replace(weights, changed)
        _reseal(None, record, weights_sha256=hashlib.sha256(changed).hexdigest())
    elif kind < 9:
        _replace(record, mutator.bytes(record.read_bytes()))
    else:
        _spoil(mutator, mutator.pick([record, weights]))
    command = mutator.random.randrange(30)
    if command == 0:
        run_command("cost", str(directory))
    elif command < 4:
        run_command("report", str(directory), "--out", str(place / "report"))
    else:
        load_model(directory)


def runs(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.storage.checkpoint import read_best, read_newest
    from edgecl.storage.directories import RunDir

    directory = _copy(seeds.run, place / "run")
    states = sorted(directory.rglob("state.json"))
    record, state = directory / "run.json", mutator.pick(states)
    kind = mutator.random.randrange(10)
    if kind < 3:
        _write_tree(record, mutator.tree(json.loads(record.read_text())))
    elif kind < 6:
        _reseal(mutator, state)
    elif kind < 8:
        file = mutator.pick(sorted(state.parent.glob("*.safetensors")))
        changed = _header(mutator, file)
        _replace(file, changed)
        told = json.loads(state.read_text())
        told["files"][file.name] = hashlib.sha256(changed).hexdigest()
        told["size_bytes"][file.name] = len(changed)
        _write_tree(state, told)
        _reseal(None, state)
    elif kind < 9:
        file = mutator.pick([record, state, directory / "metrics.jsonl"])
        _replace(file, mutator.bytes(file.read_bytes()))
    else:
        _spoil(mutator, mutator.pick(sorted(path for path in directory.rglob("*") if path.is_file())))
    command = mutator.random.randrange(8)
    if command == 0:
        words = ["--checkpoint", "best"] if mutator.chance(0.5) else []
        run_command("carve", str(directory), "--out", str(place / "model"), "--no-recalibrate", *words)
    elif command == 1:
        run_command("report", str(directory), "--out", str(place / "report"))
    else:
        run = RunDir(directory)
        run.read()
        (read_best if mutator.chance(0.3) else read_newest)(run)


def metrics(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.reports.collect import read_metrics

    file = place / "metrics.jsonl"
    lines = (seeds.run / "metrics.jsonl").read_text().splitlines()
    if mutator.chance(0.6):
        lines = [
            dumps(mutator.tree(json.loads(line))).replace("\n", "") if mutator.chance(0.5) else line
            for line in lines
        ]
        _write_text(file, "\n".join(lines))
    else:
        file.write_bytes(mutator.bytes("\n".join(lines).encode()))
    if mutator.chance(0.02):
        _spoil(mutator, file)
    if mutator.chance(0.1):
        directory = _copy(seeds.run, place / "run")
        _replace(directory / "metrics.jsonl", file.read_bytes() if file.is_file() else b"")
        run_command("report", str(directory), "--out", str(place / "report"))
        return
    read_metrics(file)


def bundles(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.onboard.bundle import check_files, choose_precision, read_manifest
    from edgecl.onboard.reference import read_reference
    from edgecl.storage.directories import Bundle

    directory = _copy(seeds.bundle, place / "bundle")
    manifest = directory / "manifest.json"
    kind = mutator.random.randrange(10)
    if kind < 5:
        _reseal(mutator, manifest)
    elif kind < 7:
        file = mutator.pick([directory / "reference.npz", directory / "model.onnx"])
        changed = _npz(mutator, file) if file.suffix == ".npz" else mutator.bytes(file.read_bytes())
        _replace(file, changed)
        told = json.loads(manifest.read_text())
        told["files"][file.name] = hashlib.sha256(changed).hexdigest()
        _write_tree(manifest, told)
        _reseal(None, manifest)
    elif kind < 9:
        _replace(manifest, mutator.bytes(manifest.read_bytes()))
    else:
        _spoil(mutator, mutator.pick(sorted(path for path in directory.rglob("*") if path.is_file())))
    if mutator.chance(0.1):
        run_command("report", str(directory), "--out", str(place / "report"))
        return
    if mutator.chance(0.2):
        Bundle(directory).read()
    told = read_manifest(directory)
    check_files(directory, told)
    choose_precision(told)
    read_reference(directory, told)


def nets(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    from edgecl.onboard.bundle import check_self_contained

    file = place / "model.onnx"
    # Structure lies at both ends, weights between.
    content = mutator.pick([*corpus((".onnx",)), (seeds.bundle / "model.onnx").read_bytes()[:20_000]])
    file.write_bytes(mutator.bytes(content))
    check_self_contained(file)


# --- what comes out ---


def reports(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    directory = _copy(mutator.pick([seeds.run, seeds.model, seeds.bundle]), place / "made")
    for name in ("run.json", "model.json", "manifest.json"):
        if (directory / name).is_file():
            told = _with_texts(mutator, json.loads((directory / name).read_text()))
            _write_tree(directory / name, told)
            _reseal(None, directory / name)
    if (directory / "metrics.jsonl").is_file():
        file = directory / "metrics.jsonl"
        lines = [json.dumps(_with_texts(mutator, json.loads(line))) for line in file.read_text().splitlines()]
        _replace(file, "\n".join(lines).encode())
    out = place / "report"
    if run_command("report", str(directory), "--out", str(out)):
        return
    for file in out.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not set(text) & set("\x00\x07\x1b\u202e\u2066"), f"{file.name} holds what steers a terminal"
        if file.suffix == ".html":
            tags = _Tags()
            tags.feed(text)
            assert not tags.strange, f"{file.name} holds {tags.strange}"


def commands(mutator: Mutator, seeds: Seeds, place: Path) -> None:
    import typer

    from edgecl.cli.commands import app

    known: Any = typer.main.get_command(app)
    verb = mutator.pick(sorted(known.commands)) if mutator.chance(0.9) else mutator.pick(TEXTS)
    command = known.commands.get(verb)
    options = [
        name for one in (command.params if command else ()) for name in (*one.opts, *one.secondary_opts)
    ]
    # `cost` writes beside the net.
    model = shutil.copytree(seeds.model, place / "model") if verb == "cost" else seeds.model
    things = [
        *map(str, (seeds.run, model, seeds.bundle, place)),
        "ls",
        "ort-cpu",
        "demo",
        "3",
        "-1",
        "1e9",
    ]
    words = []
    while mutator.chance(0.75):
        words.append(
            mutator.pick(options or ["--x"]) if mutator.chance(0.5) else mutator.pick([*things, *TEXTS])
        )
    with contextlib.ExitStack() as stack:
        for one in app.registered_commands:
            if one.name not in ("ls", "cost", "report"):
                # What it would do takes too long, or needs a device; its words are read all the same.
                stack.enter_context(mock.patch.object(one, "callback", _idle(one.callback)))
        run_command(verb, *words)


def _idle(callback: Any) -> Any:
    @functools.wraps(callback)
    def idle(*_given: Any, **_options: Any) -> None:
        pass

    return idle


GROUPS: dict[str, tuple[int, Callable[[Mutator, Seeds, Path], None]]] = {
    "recipes": (300, recipes),
    "targets": (150, targets),
    "pictures": (350, pictures),
    "folders": (50, folders),
    "indices": (150, indices),
    "shards": (200, shards),
    "tables": (50, tables),
    "models": (150, models),
    "runs": (120, runs),
    "metrics": (100, metrics),
    "bundles": (150, bundles),
    "nets": (80, nets),
    "reports": (30, reports),
    "commands": (120, commands),
}
"""Name -> parts of 2,000 and the reader."""


# --- how inputs are made ---


def _write_text(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def _write_tree(file: Path, tree: Any) -> None:
    _replace(file, dumps(tree).encode("utf-8", "surrogatepass"))


def _replace(file: Path, content: bytes) -> None:
    # What is there may be a seed's own file, by another name.
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _copy(directory: Path, place: Path) -> Path:
    return Path(shutil.copytree(directory, place, copy_function=os.link))


def _reseal(mutator: Mutator | None, file: Path, **changes: Any) -> None:
    """Change a record and write its own hash anew, as anybody can."""
    record = json.loads(file.read_text())
    record |= changes
    if mutator is not None:
        record = mutator.tree(record)
    if isinstance(record, dict):
        record.pop("sha256", None)
        try:
            record["sha256"] = digest_of_record(record)
        except (ValueError, TypeError, RecursionError, UnicodeError):
            record["sha256"] = "0" * 64
    _write_tree(file, record)


def _spoil(mutator: Mutator, file: Path) -> None:
    """Put something else in the place of a file."""
    file.unlink(missing_ok=True)
    kind = mutator.random.randrange(7)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to("/dev/zero")
    elif kind == 3:
        file.symlink_to(file)
    elif kind == 4:
        file.touch()
    elif kind == 5:
        file.symlink_to("/proc/self/mem")


def _name(mutator: Mutator, file: Path) -> str:
    """A path as somebody may give it."""
    long = ["x" * 300 + ".toml", "a/" * 3000 + ".toml"]
    return mutator.pick(
        [str(file), str(file), *long, "/dev/zero/x.toml", "\x1b[2J.toml", ".", "", "~/x.toml"]
    )


def _open(uri: str, **options: Any) -> Any:
    from edgecl.data.sources import open_source

    return open_source(uri, **options)


def _plant(mutator: Mutator, folder: Path, *, depth: int) -> None:
    """Fill a folder with pictures and what else may lie there."""
    for number in range(mutator.random.randrange(1, 6)):
        stem = mutator.pick(
            [f"x{number}", f"ü{number}", f"a\n{number}", f"\x1b[2J{number}", os.fsdecode(b"\xff%d" % number)]
        )
        file = folder / (stem + mutator.pick([".jpg", ".PNG", ".bmp", ".txt", ""]))
        kind = mutator.random.randrange(10)
        if file.exists() or file.is_symlink():
            continue
        if kind < 4:
            file.write_bytes(mutator.pick(corpus((".jpg", ".png", ".bmp", ".webp"))))
        elif kind < 7 and depth:
            file.mkdir()
            _plant(mutator, file, depth=depth - 1)
        elif kind == 7:
            file.symlink_to(
                mutator.pick([".", "..", file.name, "nowhere", "x0.jpg", "/dev/zero", "/proc/self/mem"])
            )
        else:
            _spoil(mutator, file)


def _reseal_index(mutator: Mutator, file: Path) -> None:
    magic, _, body = file.read_bytes().partition(b"\n")
    header, _, rest = body.partition(b"\n")
    if mutator.chance(0.7):
        header = dumps(mutator.tree(json.loads(header))).replace("\n", "").encode("utf-8", "surrogatepass")
    else:
        rest = mutator.bytes(rest)
    body = header + b"\n" + rest
    file.write_bytes(
        magic.rpartition(b" ")[0] + b" " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    )


def _tar(mutator: Mutator) -> bytes:
    if mutator.chance(0.3):
        return mutator.bytes(mutator.pick(corpus((".tar",))))
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=mutator.pick([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ) as archive:
        for number in range(mutator.random.randrange(5)):
            name = mutator.pick([f"{number}.png", f"{number}.cls", f"a/{number}.x.jpg", *TEXTS])
            member = tarfile.TarInfo(name.replace("\0", "0") or "x.png")
            member.type = mutator.pick(
                [tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"S", b"L", b"x"]
            )
            content = mutator.pick(
                [
                    *corpus((".png", ".jpg")),
                    b"3",
                    b"",
                    b"\xff" * 2000,
                    mutator.pick(TEXTS).encode(errors="replace"),
                ]
            )
            member.size = len(content)
            try:
                archive.addfile(member, io.BytesIO(content))
            except (UnicodeError, ValueError):
                continue
    return mutator.bytes(stream.getvalue()) if mutator.chance(0.6) else stream.getvalue()


def _pattern(mutator: Mutator, place: Path) -> str:
    parts = [*"{},09az\\x~$-.", "..", "99999999", "::", ".tar", "${A}", "${", "file:"]
    made = "".join(mutator.pick(parts) for _ in range(mutator.random.randrange(1, 25)))
    return mutator.pick(
        [
            made,
            f"{place}/x-{made}",
            *(text for text in TEXTS if "pipe" not in text and "://" not in text),
            "http://[::1",
        ]
    )


def _header(mutator: Mutator, file: Path) -> bytes:
    """A safetensors file with another header: lengths, names, offsets, types."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    kind = mutator.random.randrange(4)
    if kind == 0:
        return mutator.pick([0, 1, 2**31, 2**63, 2**64 - 1, length - 1]).to_bytes(8, "little") + content[8:]
    if kind == 1:
        return mutator.bytes(content[: length + 8]) + content[length + 8 :]
    told = mutator.tree(json.loads(content[8 : length + 8]))
    header = dumps(told).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + content[length + 8 :]


def _npz(mutator: Mutator, file: Path) -> bytes:
    """An archive of arrays that is whole as an archive: what is wrong is within, so no checksum finds it."""
    if mutator.chance(0.3):
        return mutator.bytes(file.read_bytes())
    with zipfile.ZipFile(file) as kept:
        members = {name: kept.read(name) for name in kept.namelist()}
    name = mutator.pick(sorted(members))
    kind = mutator.random.randrange(5)
    if kind == 0:
        del members[name]
    elif kind == 1:
        # Headers end after 128 bytes.
        members[name] = mutator.bytes(members[name][:128]) + members[name][128:]
    elif kind == 2:
        shape = tuple(
            mutator.pick([-1, 0, 1, 3, 48, 1 << 20, 1 << 31, 1 << 62])
            for _ in range(mutator.random.randrange(5))
        )
        types = ["<f4", "<f8", "|O", "<c16", "|S0", "<U9", "|V1000000000", "<M8[s]", mutator.pick(TEXTS)]
        members[name] = _npy_header(
            repr({"descr": mutator.pick(types), "fortran_order": False, "shape": shape})
        )
        members[name] += bytes(mutator.pick([0, 4, 100_000]))
    elif kind == 3:
        members[name] = _npy_header(
            mutator.pick(["{" * 300, "[" * 3000, "(", "1" * 5000, "__import__('os')", *TEXTS])
        )
    else:
        stream = io.BytesIO()
        arrays = [
            np.full((48, 3), np.nan),
            np.array([object()], dtype=object),
            np.float32(1),
            np.zeros((20_000, 3, 32, 32)),
        ]
        np.save(stream, mutator.pick(arrays))
        members[name] = stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    content = stream.getvalue()
    if mutator.chance(0.1):
        # A way of packing that Python has no code for.
        content = content.replace(
            b"PK\x01\x02\x14\x03\x14\0\0\0\x08\0", b"PK\x01\x02\x14\x03\x14\0\0\0\x63\0"
        )
    return content


def _npy_header(text: str) -> bytes:
    header = text.encode("latin-1", "replace")[:60_000] + b"\n"
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header


def _with_texts(mutator: Mutator, tree: Any) -> Any:
    """A record with hostile texts in the places of its own, here and there."""
    if isinstance(tree, dict):
        return {key: _with_texts(mutator, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_texts(mutator, value) for value in tree]
    if isinstance(tree, str) and mutator.chance(0.1):
        return mutator.pick(TEXTS)
    return tree


class _Tags(HTMLParser):
    """Finds in a page what edgecl does not write: scripts, handlers, links to elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.strange: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "form", "link", "base"):
            self.strange.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (
                name in ("href", "src") and not (value or "").startswith(("#", "data:image/"))
            ):
                self.strange.append(f"{tag} {name}={value}")


def draw_picture(form: str, **options: Any) -> bytes:
    """A small picture of some format, for the corpus."""
    ramp = np.arange(16 * 12 * 3, dtype=np.uint32).reshape(12, 16, 3) * 7 % 256
    stream = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(stream, form, **options)
    return stream.getvalue()
