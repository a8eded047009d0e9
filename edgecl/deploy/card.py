"""The model card of a published net: what it is, how it is loaded, and what was measured under which conditions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgecl.deploy.accuracy import METRICS
from edgecl.deploy.contract import contract_of, one_line, render
from edgecl.errors import counted
from edgecl.storage.directories import ModelDir
from edgecl.storage.record_files import read_record
from edgecl.storage.records import (
    BenchRecord,
    CostRecord,
    EvaluationRecord,
    Interval,
    Manifest,
    ModelRecord,
    ProbeRecord,
    PublishedRecord,
)


class Measured(NamedTuple):
    """A row of the card's table."""

    what: str
    value: str
    conditions: str


def model_card(
    model: ModelDir,
    record: ModelRecord,
    published: PublishedRecord,
    *,
    bundle: Path | None,
    manifest: Manifest | None,
    name: str | None,
) -> str:
    """Return the card: a head in YAML without a licence, which is its owner's to choose, and a page in Markdown."""
    rows = [*_of_net(model)]
    if bundle is not None and manifest is not None:
        rows += _of_bundle(bundle, manifest)
    return render(
        "card.md.j2",
        record=record,
        published=published,
        rows=[Measured(*map(_cell, row)) for row in rows],
        source=f"hf-hub:{name}" if name else "local-dir:FOLDER",
        title=(name or record.arch).rpartition("/")[2],
        precisions=None
        if manifest is None
        else {key: about.model for key, about in manifest.precisions.items()},
        contract=None if manifest is None else contract_of(manifest),
        default=None if manifest is None else manifest.precision,
        cell=_cell,
    )


def _of_net(model: ModelDir) -> Iterator[Measured]:
    """Yield the numbers of the records in a model directory, as far as there are any."""
    if model.cost_file.exists():
        cost = read_record(model.cost_file, CostRecord)
        shape = " x ".join(map(str, cost.input))
        yield Measured("multiply-adds", f"{cost.macs:,}", f"one picture of {shape}, as fvcore counts")
    if model.evaluation_file.exists():
        found = read_record(model.evaluation_file, EvaluationRecord)
        held_out = f"{found.n_test:,} held-out pictures of {_data(found.test)}"
        yield Measured(
            METRICS[found.metric],
            _percent(found.top1, found.top1_ci95),
            f"{held_out}; fine-tuned on {found.n_train:,} of {_data(found.data)}, {found.epochs} epochs",
        )
    if model.probe_file.exists():
        probe = read_record(model.probe_file, ProbeRecord)
        on = f"{probe.n_test:,} held-out pictures of {_data(probe.test)}; frozen features, "
        learnt = f"{on}{probe.n_train:,} labels of {_data(probe.data)}"
        yield Measured("kNN top-1", _percent(probe.knn_top1, probe.knn_ci95), learnt)
        yield Measured("linear top-1", _percent(probe.linear_top1, probe.linear_ci95), learnt)
        few = probe.few_label_top1
        yield Measured(
            "few-label top-1",
            _percent(few.mean, few.ci95),
            f"{on}{few.labels_per_class} labels per class, {len(few.draws)} draws",
        )


def _of_bundle(bundle: Path, manifest: Manifest) -> Iterator[Measured]:
    """Yield accuracy, size and speed of each ONNX file."""
    for precision, about in manifest.precisions.items():
        yield Measured(f"{precision}: size", f"{manifest.size_bytes[about.model] / 1e6:.2f} MB", about.model)
        accuracy = about.accuracy
        if accuracy is not None:
            value = (
                f"{accuracy.value:.4f}"
                if accuracy.metric == "mean_cosine"
                else _percent(accuracy.value, accuracy.ci95)
            )
            pictures = f"{accuracy.n or 0:,} pictures of {_data(accuracy.data or 'unknown')}"
            yield Measured(f"{precision}: {METRICS[accuracy.metric]}", value, pictures)
        if about.decision is not None and about.decision.words:
            yield Measured(
                f"{precision}: decision", "kept" if about.decision.kept else "not kept", about.decision.words
            )
    for file in sorted(bundle.glob("bench-*.json")):
        record = read_record(file, BenchRecord)
        for one in record.measurements:
            latency = one.latency_ms
            if one.headline and latency.p50 is not None:
                interval = "" if latency.ci95_p50 is None else " [{:.3g}, {:.3g}]".format(*latency.ci95_p50)
                doubts = ", ".join([*one.marks, *record.marks])
                yield Measured(
                    f"{one.precision}: median latency",
                    f"{latency.p50:.3g} ms{interval}",
                    f"{record.device.name}, {record.runtime}, {one.mode}, batch {record.batch}, "
                    + counted(record.threads, "thread")
                    + (f"; marked {doubts}" if doubts else ""),
                )


def _percent(value: float, interval: Interval | None) -> str:
    return f"{value:.1f} %" + ("" if interval is None else " [{:.1f}, {:.1f}]".format(*interval))


def _data(uri: str) -> str:
    """Return the last part of where pictures lie: the way to it is nobody's business."""
    return uri.partition("?")[0].rstrip("/").rpartition("/")[2]


def _cell(text: str) -> str:
    """Return a text as a cell of a table in Markdown, which shows it as it is."""
    signs = {ord(sign): f"\\{sign}" for sign in "\\`*_[]|#~!"} | {ord("<"): "&lt;", ord("&"): "&amp;"}
    return one_line(text).translate(signs)
