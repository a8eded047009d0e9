"""Read what a report is made of: the records of runs, nets and bundles, and which was made from which.

Nothing here loads a net. A missing piece is left out; a piece that belongs to something else is left out with a note.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from edgecl.errors import ArtifactError, counted, printable
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.directories import PipelineDir, RunDir
from edgecl.storage.reading import METRICS_BYTES, RECORD_BYTES, parse_json, read_bytes
from edgecl.storage.record_files import RECORD_FILES, kind_of, read_record
from edgecl.storage.records import (
    BenchRecord,
    ComparisonRecord,
    CostRecord,
    EvaluationRecord,
    InspectionRecord,
    Json,
    Manifest,
    ModelRecord,
    PipelineRecord,
    ProbeRecord,
    Record,
    RunRecord,
    VerifyRecord,
    parse_record,
)

Line = dict[str, float]
"""One line of a run's metrics: the numbers in it."""

# The order of a pipeline's folders in the report; others follow by name.
_ORDER = ("pretrain", "slim", "finetuned", "given", "scratch", "random", "bundles")

R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)


@dataclass
class Source(Generic[R_co]):
    """One directory with its record, and the records beside it; all text in them is `printable`."""

    path: Path
    record: R_co
    sha256: str
    beside: dict[str, Record] = field(default_factory=dict)
    """File name -> record, without those that belong to an earlier state of the directory."""
    name: str = ""
    """The directory's name, with as many parents as tell it from the others."""
    steps: list[Line] = field(default_factory=list)
    """Of a run: one line per training step."""
    quality: list[Line] = field(default_factory=list)
    """Of a run: one line per measurement of the features."""
    views_png: bytes | None = None
    """Of a run: images and their views."""
    inspection: InspectionRecord | None = None
    """Of a net: what it confuses."""

    @property
    def shown(self) -> str:
        """The directory's path as it is printed."""
        return printable(self.path)

    def all_beside(self, kind: type[R]) -> list[R]:
        """Return the records of a kind beside this one, by file name."""
        return [record for _, record in sorted(self.beside.items()) if isinstance(record, kind)]

    def one_beside(self, kind: type[R]) -> R | None:
        """Return the record of a kind beside this one."""
        return next(iter(self.all_beside(kind)), None)

    @property
    def hashes(self) -> set[str]:
        """What others may say that they were made from: the record's hash, and that of a net's weights."""
        return {self.sha256, *([self.record.weights_sha256] if isinstance(self.record, ModelRecord) else [])}


@dataclass
class Collection:
    """Everything the given directories hold, in the order given."""

    sources: list[Source[Record]]
    notes: list[str]

    def of(self, kind: type[R]) -> list[Source[R]]:
        """Return the sources that have a record of this kind."""
        return [cast("Source[R]", source) for source in self.sources if isinstance(source.record, kind)]

    def maker_of(self, source: Source[Record]) -> Source[Record] | None:
        """Return the source whose hash this one says it was made from."""
        others = [other for other in self.sources if other is not source]
        return next((other for other in others if source.record.made_from in other.hashes), None)

    def sha256(self) -> str:
        """Return the hash of every record's hash, so that a report names exactly what it was made from."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.sha256.encode())
            if source.inspection:
                digest.update(json.dumps(content_of(source.inspection), sort_keys=True).encode())
            for name, record in sorted(source.beside.items()):
                digest.update(f"{name} {json.dumps(content_of(record), sort_keys=True)}".encode())
        return digest.hexdigest()


def content_of(record: Record) -> Json:
    """Return a record as its file has it."""
    return record.model_dump(by_alias=True, exclude_unset=True)


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(key): _cleaned(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    return printable(value) if isinstance(value, str) else value


def collect(dirs: Sequence[Path]) -> Collection:
    """Read the records of runs, nets, bundles and pipelines; a pipeline stands for every directory inside it.

    Raises:
        ArtifactError: a directory that is missing or that edgecl did not write, or an unreadable record.
    """
    if not dirs:
        raise ArtifactError(
            "no directory to report on", hint="give run, model, bundle or pipeline directories"
        )
    sources: dict[Path, Source[Record]] = {}  # a pipeline's comparison and record have paths of their own
    notes: list[str] = []
    for path in dirs:
        found = list(_sources(path, notes))
        if not found:
            raise ArtifactError(
                f"'{path}' holds no run, model or bundle to report on",
                hint="`edgecl run` fills such a directory",
            )
        for source in found:
            sources.setdefault((source.path / source.record.FILE).resolve(), source)
    _name(list(sources.values()))
    return Collection(list(sources.values()), list(dict.fromkeys(notes)))


def _sources(path: Path, notes: list[str]) -> Iterator[Source[Record]]:
    kind = kind_of(path) if path.is_dir() else None
    pipeline = PipelineDir(path)
    if kind is None and not pipeline.comparison_file.is_file():
        raise ArtifactError(_not_ours(path), hint="give run, model, bundle or pipeline directories")
    if kind == "report":
        raise ArtifactError(f"'{path}' is a report itself", hint="give the directories it was made from")
    if kind in _KINDS:
        yield _read_source(path, _KINDS[kind], notes)
        return
    if pipeline.comparison_file.is_file():
        yield _read_source(path, ComparisonRecord, notes)
    yield from _inside(path, notes)
    if kind == "pipeline":
        yield _read_source(path, PipelineRecord, notes)


def _not_ours(path: Path) -> str:
    if not path.exists():
        return f"there is no directory '{path}'"
    if not path.is_dir():
        return f"'{path}' is a file, not a directory"
    names = ", ".join(name for kind, name in RECORD_FILES.items() if kind in _KINDS or kind == "pipeline")
    return f"'{path}' is not a directory edgecl wrote: it has none of {names}"


def _inside(path: Path, notes: list[str]) -> Iterator[Source[Record]]:
    def order(child: Path) -> tuple[int, str]:
        # Of several widths, slim-0.5 and slim-0.75 lie beside slim.
        name = child.name if child.name in _ORDER else child.name.partition("-")[0]
        return (_ORDER.index(name) if name in _ORDER else len(_ORDER), child.name)

    for child in sorted((child for child in path.iterdir() if child.is_dir()), key=order):
        if child.name.startswith("."):  # a directory that is still being written
            continue
        kind = kind_of(child)
        if kind in _KINDS or kind == "pipeline":
            yield from _sources(child, notes)
        elif kind is None:
            yield from _inside(child, notes)


def read_cleaned(file: Path, kind: type[R]) -> R:
    """Return a record whose text any output may show.

    Raises:
        ArtifactError: as of `read_record`.
    """
    record = read_record(file, kind)
    return parse_record(_cleaned(content_of(record)), kind, path=file)


_BESIDE_A_NET: tuple[type[Record], ...] = (ProbeRecord, CostRecord, EvaluationRecord, InspectionRecord)
_KINDS: dict[str | None, type[Record]] = {kind.KIND: kind for kind in (RunRecord, ModelRecord, Manifest)}


def _read_source(path: Path, kind: type[Record], notes: list[str]) -> Source[Record]:
    source = Source(path, read_cleaned(path / kind.FILE, kind), sha256_of_file(path / kind.FILE))
    if isinstance(source.record, RunRecord):
        _read_run(source, source.record, notes)
    files: list[tuple[Path, type[Record]]] = []
    if kind is ModelRecord:
        files = [(path / beside.FILE, beside) for beside in _BESIDE_A_NET]
    elif kind is Manifest:
        files = [(file, BenchRecord) for file in sorted(path.glob("bench-*.json"))]
        files.insert(0, (path / VerifyRecord.FILE, VerifyRecord))
    _read_beside(source, files, notes)
    # Apart from what lies beside: its pictures are shown, and are no numbers for the list of records.
    inspection = source.beside.pop(InspectionRecord.FILE, None)
    if isinstance(inspection, InspectionRecord):
        source.inspection = inspection
    return source


def _read_run(source: Source[Record], record: RunRecord, notes: list[str]) -> None:
    run = RunDir(source.path)
    source.steps, source.quality, unreadable = read_metrics(run.metrics_file)
    if unreadable:
        notes.append(
            f"{source.shown}: {counted(unreadable, 'line')} of metrics.jsonl cannot be read and "
            f"{'is' if unreadable == 1 else 'are'} left out (the run was killed while writing)."
        )
    if record.state == "failed":
        notes.append(f"{source.shown}: the run failed: {record.error}.")
    elif record.state != "done":
        notes.append(f"{source.shown}: the run is not finished (state '{record.state}').")
    if run.views_file.is_file():
        source.views_png = read_bytes(run.views_file, most=RECORD_BYTES)


def _read_beside(
    source: Source[Record], files: Sequence[tuple[Path, type[Record]]], notes: list[str]
) -> None:
    # A fine-tuned net's evaluation may be written with the net, and then names what the net was made from.
    fitting = {None, source.record.made_from, *source.hashes}
    for file, kind in files:
        if not file.is_file():
            continue
        record = read_cleaned(file, kind)
        if record.made_from in fitting:
            source.beside[printable(file.name)] = record
        else:
            notes.append(
                f"{source.shown}: {printable(file.name)} was made from {str(record.made_from)[:12]}…, "
                f"{source.record.FILE} is now {source.sha256[:12]}…; its numbers are left out."
            )


def read_metrics(path: Path) -> tuple[list[Line], list[Line], int]:
    """Return a run's step lines and quality lines by step, and how many lines could not be read.

    Of two lines for one step the later counts: a resumed run writes some steps twice.
    """
    steps: dict[float, Line] = {}
    quality: dict[float, Line] = {}
    unreadable = 0
    for text in read_bytes(path, most=METRICS_BYTES).splitlines() if path.exists() else []:
        if not text.strip():
            continue
        try:
            entry = parse_json(text)
        except ValueError:
            unreadable += 1
            continue
        line = _numbers(entry) if isinstance(entry, dict) else {}
        if "step" not in line or "epoch" not in line:
            unreadable += 1
        elif "event" in entry:
            continue  # it may share its step with a line of numbers
        else:
            (steps if "loss" in entry else quality)[line["step"]] = line
    return [steps[step] for step in sorted(steps)], [quality[step] for step in sorted(quality)], unreadable


def _numbers(entry: Json) -> Line:
    return {
        key: float(value)
        for key, value in entry.items()
        if type(value) in (int, float) and math.isfinite(value)
    }


def _name(sources: Sequence[Source[Record]]) -> None:
    """Name each source by the last parts of its path, as few as tell it from the others."""
    paths = {source.path.resolve() for source in sources}
    for source in sources:
        parts = source.path.resolve().parts
        rivals = [path.parts for path in paths if path.parts != parts]
        length = 1
        while length < len(parts) and any(rival[-length:] == parts[-length:] for rival in rivals):
            length += 1
        source.name = printable("/".join(parts[-length:]))
