"""Read what a report is made of: the records of runs, nets and bundles, and how they hang together.

Nothing here loads a net. A missing piece is left out; a piece of something else is left out and noted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecl.errors import ArtifactError, counted, printable
from edgecl.onboard import bundle as bundle_names
from edgecl.onboard.bundle import sha256_of_file
from edgecl.reports.notation import finite
from edgecl.storage.directories import Bundle, ModelDir, PipelineDir, RunDir
from edgecl.storage.raw_records import check_seal, read_record, read_side_record
from edgecl.storage.reading import METRICS_BYTES, RECORD_BYTES, RECORD_FILES, kind_of, parse_json, read_bytes

Record = dict[str, Any]

# The order of a pipeline's folders in the report; others follow by name.
_ORDER = ("pretrain", "slim", "finetuned", "random", "bundles")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Source:
    """One directory with its record, and the records that lie beside it."""

    kind: str
    path: Path
    record: Record
    sha256: str
    name: str = ""
    """How the report calls it: the directory's name, with parents where two are alike."""
    beside: dict[str, Record] = field(default_factory=dict)
    """File name -> record, without those that belong to an earlier state of the directory."""
    steps: list[Record] = field(default_factory=list)
    """Of a run: one line per training step."""
    quality: list[Record] = field(default_factory=list)
    """Of a run: one line per look at the features."""
    views_png: bytes | None = None

    def benches(self) -> list[Record]:
        """Return a bundle's measurements, by file name."""
        return [record for name, record in sorted(self.beside.items()) if name.startswith("bench-")]


@dataclass
class Collection:
    """Everything the given directories hold, in the order given."""

    sources: list[Source]
    notes: list[str]

    def of(self, kind: str) -> list[Source]:
        """Return the sources of one kind."""
        return [source for source in self.sources if source.kind == kind]

    def maker_of(self, source: Source) -> Source | None:
        """Return the source whose hash this one says it was made from."""
        made_from = source.record.get("made_from")
        if not made_from:
            return None
        for other in self.sources:
            if other is not source and made_from in (other.sha256, other.record.get("weights_sha256")):
                return other
        return None

    def sha256(self) -> str:
        """Hash of the hashes of every record, so that a report names exactly what it was made from."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.sha256.encode())
            for name, record in sorted(source.beside.items()):
                digest.update(f"{name} {json.dumps(record, sort_keys=True)}".encode())
        return digest.hexdigest()


def collect(dirs: Sequence[Path]) -> Collection:
    """Read the records of runs, nets, bundles and pipelines; a pipeline stands for every directory inside it.

    Raises:
        ArtifactError: a directory that is missing or that edgecl did not write, or an unreadable record.
    """
    if not dirs:
        raise ArtifactError(
            "no directory to report on", hint="give run, model, bundle or pipeline directories"
        )
    sources: list[Source] = []
    notes: list[str] = []
    seen: set[tuple[str, Path]] = set()
    for path in dirs:
        found = list(_sources(path, notes))
        if not found:
            raise ArtifactError(
                f"'{path}' holds no run, model or bundle to report on",
                hint="`edgecl run` fills such a directory",
            )
        for source in found:
            key = (source.kind, source.path.resolve())
            if key not in seen:
                seen.add(key)
                sources.append(source)
    _name(sources)
    return Collection(sources, list(dict.fromkeys(notes)))


def _sources(path: Path, notes: list[str]) -> Iterator[Source]:
    kind = kind_of(path) if path.is_dir() else None
    if kind is None and not PipelineDir(path).comparison_file.is_file():
        raise ArtifactError(_not_ours(path), hint="give run, model, bundle or pipeline directories")
    if kind == "report":
        raise ArtifactError(f"'{path}' is a report itself", hint="give the directories it was made from")
    if kind in ("run", "model", "bundle"):
        yield _read(kind, path, notes)
        return
    comparison = PipelineDir(path).comparison_file
    if comparison.is_file():
        yield Source("comparison", path, read_side_record(comparison), sha256_of_file(comparison))
    yield from _inside(path, notes)
    if kind == "pipeline":
        record_file = PipelineDir(path).record_file
        yield Source("pipeline", path, read_record(record_file, kind="pipeline"), sha256_of_file(record_file))


def _not_ours(path: Path) -> str:
    if not path.exists():
        return f"there is no directory '{path}'"
    if not path.is_dir():
        return f"'{path}' is a file, not a directory"
    names = ", ".join(name for kind, name in RECORD_FILES.items() if kind != "report")
    return f"'{path}' is not a directory edgecl wrote: it has none of {names}"


def _inside(path: Path, notes: list[str]) -> Iterator[Source]:
    def order(child: Path) -> tuple[int, str]:
        # Of several widths, slim-0.5 and slim-0.75 lie beside slim.
        name = child.name if child.name in _ORDER else child.name.partition("-")[0]
        return (_ORDER.index(name) if name in _ORDER else len(_ORDER), child.name)

    for child in sorted((child for child in path.iterdir() if child.is_dir()), key=order):
        if child.name.startswith("."):  # a directory that is still being written
            continue
        kind = kind_of(child)
        if kind in ("run", "model", "bundle"):
            yield _read(kind, child, notes)
        elif kind == "pipeline":
            yield from _sources(child, notes)
        elif kind is None:
            yield from _inside(child, notes)


def _read(kind: str, path: Path, notes: list[str]) -> Source:
    record_file = {"run": RunDir.RECORD, "model": ModelDir.RECORD, "bundle": Bundle.RECORD}[kind]
    record = read_record(path / record_file, kind=kind)
    if kind in ("model", "bundle") and record.get("sha256") is not None:
        check_seal(
            record,
            {"directory": path},
            hint="the file changed after it was written; make the directory again",
        )
    source = Source(kind, path, record, sha256_of_file(path / record_file))
    shown = printable(path)
    if kind == "run":
        run = RunDir(path)
        source.steps, source.quality, unreadable = read_metrics(run.metrics_file)
        if unreadable:
            notes.append(
                f"{shown}: {counted(unreadable, 'line')} of metrics.jsonl cannot be read and "
                f"{'is' if unreadable == 1 else 'are'} left out (the run was killed while writing)."
            )
        if record.get("state") == "failed":
            notes.append(f"{shown}: the run failed: {printable(record.get('error'))}.")
        elif record.get("state") != "done":
            notes.append(f"{shown}: the run is not finished (state '{printable(record.get('state'))}').")
        if run.views_file.is_file():
            content = read_bytes(run.views_file, most=RECORD_BYTES)
            if content.startswith(_PNG):
                source.views_png = content
            else:
                notes.append(f"{shown}: views.png is not a PNG image and is left out.")
        return source
    if kind == "model":
        model = ModelDir(path)
        files = [model.probe_file, model.cost_file, model.evaluation_file]
    else:
        files = [path / bundle_names.VERIFY, *sorted(path.glob("bench-*.json"))]
    # A fine-tuned net's evaluation may be written with the net, and then names what the net was made from.
    fitting = {None, source.sha256, record.get("weights_sha256"), record.get("made_from")}
    for file in files:
        if not file.is_file():
            continue
        beside = read_side_record(file)
        if beside.get("made_from") in fitting:
            source.beside[file.name] = beside
        else:
            notes.append(
                f"{shown}: {file.name} was made from {str(beside.get('made_from'))[:12]}…, "
                f"{record_file} is now {source.sha256[:12]}…; its numbers are left out."
            )
    return source


def read_metrics(path: Path) -> tuple[list[Record], list[Record], int]:
    """Read a run's metrics.

    Returns:
        The step lines and the quality lines by step, and how many lines could not be read. Of two lines for
        one step the later counts: a resumed run writes some steps twice.
    """
    if not path.exists():
        return [], [], 0
    steps: dict[float, Record] = {}
    quality: dict[float, Record] = {}
    unreadable = 0
    for line in read_bytes(path, most=METRICS_BYTES).splitlines():
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError:
            unreadable += 1
            continue
        step = finite(entry.get("step")) if isinstance(entry, dict) else None
        if step is None or finite(entry.get("epoch")) is None:
            unreadable += 1
        elif "event" in entry:
            continue  # what happened on the way, at a step that may have a line of its own
        elif "loss" in entry:
            steps[step] = entry
        else:
            quality[step] = entry
    return [steps[step] for step in sorted(steps)], [quality[step] for step in sorted(quality)], unreadable


def _name(sources: list[Source]) -> None:
    """Call each source by the last parts of its path, as few as tell it from the others."""
    paths = {source.path.resolve() for source in sources}
    for source in sources:
        parts = source.path.resolve().parts
        rivals = [path.parts for path in paths if path != source.path.resolve()]
        length = 1
        while length < len(parts) and any(rival[-length:] == parts[-length:] for rival in rivals):
            length += 1
        source.name = printable("/".join(parts[-length:]))
