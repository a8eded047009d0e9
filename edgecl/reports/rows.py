"""Join nets, bundles, precisions and measurements into rows, and say in a few words what a row is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgecl.errors import counted, printable
from edgecl.reports.collect import Collection, Record, Source
from edgecl.reports.notation import finite, interval_from
from edgecl.reports.precisions import (
    REJECTED,
    decision_on,
    exported_accuracy,
    file_bytes,
    precisions_of,
    table,
    text,
    timings_of,
    verified,
)

Row = dict[str, Any]

ORIGINS = {"pretrained": "pretrained", "random": "random init", "finetuned": "fine-tuned"}

# The accuracies a chart may show, the first that most timed nets have.
ACCURACIES = {
    "few_label": "few-label top-1",
    "linear": "linear-probe top-1",
    "finetuned": "fine-tuned top-1",
    "knn": "kNN top-1",
}

# An accuracy of the net in torch, in the order of what stands in for one of the exported file.
_OF_THE_NET = {
    "finetuned": "net_top1",
    "linear": "linear_top1",
    "knn": "net_knn_top1",
    "few_label": "few_label_top1",
}
# What a row has only where its net was exported.
_OF_A_BUNDLE = (
    *("bundle", "precision", "accuracy", "decision", "latency_ms"),
    *("device", "power_mode", "runtime", "mode", "threads", "batch"),
)
# What an accuracy measured on the exported file is the like of.
_MEASURED_AS = {"finetuned": "top1", "knn": "knn_top1"}


def rows_of(collection: Collection) -> list[Row]:
    """Make one row per net, bundle, measurement and precision, also for a net without a bundle and the reverse.

    Of a precision timed in several modes the row has the headline's. A precision that nobody timed has a row too.
    """
    models = collection.of("model")
    bundles = collection.of("bundle")
    rows: list[Row] = []
    for model in models:
        own = [bundle for bundle in bundles if _net_of(bundle, [model]) is model]
        for bundle in own:
            rows.extend(_bundle_rows(model, bundle))
        if not own:
            rows.append(_row(model, None, None, None))
    for bundle in bundles:
        if _net_of(bundle, models) is None:
            rows.extend(_bundle_rows(None, bundle))
    return rows


def _net_of(bundle: Source, models: Sequence[Source]) -> Source | None:
    made_from = {table(bundle.record, "net").get("model_sha256"), bundle.record.get("made_from")}
    for model in models:
        if model.sha256 in made_from:
            return model
    return None


def _bundle_rows(model: Source | None, bundle: Source) -> Iterator[Row]:
    timed = set()
    for bench in bundle.benches():
        for timing in timings_of(bench):
            if timing["headline"]:
                timed.add(timing["precision"])
                yield _row(model, bundle, timing["precision"], timing)
    held = list(precisions_of(bundle.record))
    for precision in held:
        if precision not in timed:
            yield _row(model, bundle, precision, None)
    if not held and not timed:
        yield _row(model, bundle, text(bundle.record.get("precision")), None)


def _accuracy(value: Any, interval: Any, **more: Any) -> dict[str, Any] | None:
    mean = finite(value)
    return None if mean is None else {"top1": mean, "ci95": interval_from(interval), **more}


def few_label_of(record: Record) -> dict[str, Any] | None:
    """Return a record's few-label accuracy with its interval and draws, or None."""
    few = table(record, "few_label_top1")
    draws = few.get("draws") if isinstance(few.get("draws"), list) else []
    return _accuracy(
        few.get("mean"),
        few.get("ci95"),
        std=finite(few.get("std")),
        labels_per_class=few.get("labels_per_class"),
        draws=[draw for draw in map(finite, draws or []) if draw is not None],
    )


def _row(
    model: Source | None, bundle: Source | None, precision: str | None, timing: dict[str, Any] | None
) -> Row:
    probe = model.beside.get("probe.json", {}) if model else {}
    evaluation = model.beside.get("evaluation.json", {}) if model else {}
    cost = model.beside.get("cost.json", {}) if model else {}
    manifest = bundle.record if bundle else {}
    net = model.record if model else table(manifest, "net")
    about = precisions_of(manifest).get(precision or "", {})
    named = model or bundle
    assert named is not None
    timing = timing or {}
    energy = timing.get("energy")
    row = {
        "name": named.name,
        "model_dir": printable(model.path) if model else None,
        "bundle": bundle.name if bundle else None,
        "bundle_dir": printable(bundle.path) if bundle else None,
        "target": text(manifest.get("target_name")),
        "arch": text(net.get("arch")),
        "width": finite(net.get("width")),
        "origin": text(net.get("origin")),
        "few_label": few_label_of(probe),
        "knn": _accuracy(probe.get("knn_top1"), probe.get("knn_ci95")),
        "linear": _accuracy(probe.get("linear_top1"), probe.get("linear_ci95")),
        "finetuned": _accuracy(evaluation.get("top1"), evaluation.get("top1_ci95")),
        "accuracy": exported_accuracy(about),
        "latency_ms": timing.get("latency_ms"),
        "throughput_per_s": timing.get("throughput_per_s"),
        "samples": timing.get("samples"),
        "marks": timing.get("marks", []),
        "j_per_inference": energy["j_per_inference"] if energy else None,
        "mode": timing.get("mode"),
        "batch": timing.get("batch"),
        "threads": timing.get("threads"),
        "runtime": timing.get("runtime") or text(manifest.get("runtime")),
        "precision": precision,
        "form": text(about.get("form")),
        "decision": decision_on(about),
        "device": timing.get("device"),
        "power_mode": timing.get("power_mode"),
        "macs": finite(cost.get("macs")),
        "params": finite(net.get("params")),
        "onnx_bytes": file_bytes(manifest, precision),
        "verified": verified(bundle.beside.get("verify.json", {}), precision) if bundle else None,
        "top1_agreement": finite(table(about, "parity").get("top1_agreement")),
        "on_pareto_front": None,
    }
    if bundle and not row["accuracy"]:
        row["accuracy"] = _standing_in(row)
    return row


def _standing_in(row: Row) -> dict[str, Any] | None:
    """Return the net's accuracy in torch for a file that was not measured itself.

    Not for int8, which is not the same net: it would seem to cost nothing.
    """
    if row["precision"] == "int8":
        return None
    for key, metric in _OF_THE_NET.items():
        if row[key]:
            one = row[key]
            return {
                "metric": metric,
                "value": one["top1"],
                "ci95": one["ci95"],
                "n": None,
                "data": None,
                "measured": False,
            }
    return None


def gain_of(row: Row, key: str) -> dict[str, Any] | None:
    """Return an accuracy of ACCURACIES as it holds for a row's precision, or None.

    What was measured on the exported file comes first. The net's accuracy in torch stands in for fp32 and fp16.
    """
    accuracy = row["accuracy"]
    if accuracy and accuracy["measured"] and accuracy["metric"] == _MEASURED_AS.get(key):
        return {"top1": accuracy["value"], "ci95": accuracy["ci95"]}
    gain: dict[str, Any] | None = None if row["precision"] == "int8" else row[key]
    return gain


def is_timed(row: Row) -> bool:
    """Say whether a row has a median latency."""
    return bool(row["latency_ms"]) and row["latency_ms"]["p50"] is not None


def is_rejected(row: Row) -> bool:
    """Say whether a row's precision was evaluated and found not worth its cost."""
    return bool(row["decision"]) and row["decision"]["state"] == REJECTED


def nets_of(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each net whose own directory was given."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["model_dir"] is not None:
            found.setdefault(row["model_dir"], row)
    return list(found.values())


def as_net(row: Row) -> Row:
    """Return what a row says of its net, without bundle, precision and measurement."""
    return {**row, **dict.fromkeys(_OF_A_BUNDLE)}


def comparable_accuracies(rows: Sequence[Row]) -> dict[str, str]:
    """Return those of ACCURACIES that are like for like in these rows, each with its full name.

    Few-label accuracies at different label counts are not.
    """
    counts = {str(row["few_label"]["labels_per_class"]) for row in rows if row["few_label"]}
    names = {key: name for key, name in ACCURACIES.items() if key != "few_label" or len(counts) < 2}
    if len(counts) == 1:
        names["few_label"] += f", {counts.pop()} labels per class"
    return names


def conditions_of_row(row: Row) -> str:
    """Say in a few words what was timed: target, runtime, precision, mode, batch, threads, device."""
    runtime = " ".join(part for part in (row["runtime"], row["precision"]) if part)
    parts = [row["target"], runtime if row["bundle"] else None]
    if row["latency_ms"]:
        parts.append(row["mode"] if row["mode"] != "inference" else None)
        parts.append(f"batch {row['batch']}" if row["batch"] else None)
        parts.append(counted(row["threads"], "thread") if isinstance(row["threads"], int) else None)
        parts.append(row["device"])
        parts.append(row["power_mode"])
    return ", ".join(str(part) for part in parts if part)


def conditions_key(row: Row) -> tuple[Any, ...]:
    """Return the way a row was timed: only rows with the same compete."""
    return (row["device"], row["power_mode"], row["batch"], row["threads"], row["mode"])


def conditions_in_words(way: tuple[Any, ...]) -> str:
    """Say a way of timing, as `conditions_key` returns it."""
    device, power_mode, batch, threads, mode = way
    parts = [
        device or "an unnamed device",
        power_mode or "",
        mode if mode not in (None, "inference") else "",
        f"batch {batch}" if batch else "",
        counted(threads, "thread") if isinstance(threads, int) else "",
    ]
    return ", ".join(part for part in parts if part)


def net_of_row(row: Row) -> str:
    """Say in a few words which net a row is about: architecture, width, origin."""
    width = f"{row['width']:g}×" if row["width"] is not None else None
    arch = " ".join(part for part in (row["arch"], width) if part)
    return ", ".join(part for part in (arch, ORIGINS.get(row["origin"], row["origin"])) if part)


def row_label(row: Row, rows: Sequence[Row], *, without: Sequence[str] = ()) -> str:
    """Call a row by its net, and by as much of its bundle, precision and device as tells it from the other rows.

    Args:
        row: the row to name.
        rows: the rows it shall be told from.
        without: parts that are shown in another way, such as by color.
    """
    label = str(row["name"])
    alike = [other for other in rows if other["name"] == row["name"]]
    for key in ("bundle", "precision", "device", "power_mode", "runtime", "mode", "threads", "batch"):
        if len(alike) < 2 or key in without:
            continue
        if len({str(other[key]) for other in alike}) > 1 and row[key] is not None:
            value = {"threads": f"{row[key]} threads", "batch": f"batch {row[key]}"}.get(key, str(row[key]))
            label += f" · {value}"
            alike = [other for other in alike if other[key] == row[key]]
    return label
