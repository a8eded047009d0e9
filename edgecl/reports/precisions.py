"""What a bundle says about its precisions, and what its measurements say about each of their modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgecl.errors import counted, printable
from edgecl.reports.collect import Record, Source
from edgecl.reports.notation import between, finite, fixed, interval_from

KEPT, KEPT_IN_PART, REJECTED = "kept", "kept in part", "rejected"

METRICS = {
    "top1": "top-1",
    "knn_top1": "kNN top-1",
    "mean_cosine": "cosine",
    "linear_top1": "linear, torch",
    "few_label_top1": "few-label, torch",
    "net_top1": "top-1, torch",
    "net_knn_top1": "kNN, torch",
}
"""What an accuracy is called. The last four were measured on the net in torch, not on the exported file."""

# Under one of these a decision lists the nodes that stay in higher precision.
_NODES = ("kept_nodes", "nodes")


def table(record: Any, key: str) -> Record:
    """Return the table under a key, empty where there is none."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def tables(record: Any, key: str) -> list[Record]:
    """Return the tables in the list under a key, empty where there is none."""
    value = record.get(key) if isinstance(record, dict) else None
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def text(value: Any) -> str | None:
    """Return a record's text fit to be printed, or None."""
    return None if value is None else printable(value)


def precisions_of(manifest: Record) -> dict[str, Record]:
    """Return what a manifest says about each precision, empty for a manifest written before there were several."""
    return {
        printable(name): about
        for name, about in table(manifest, "precisions").items()
        if isinstance(about, dict)
    }


def file_bytes(manifest: Record, precision: str | None) -> float | None:
    """Return the size of a precision's ONNX file."""
    about = precisions_of(manifest).get(precision or "", {})
    name = about.get("model")
    return finite(table(manifest, "size_bytes").get(name)) if isinstance(name, str) else None


def decision_on(about: Record) -> dict[str, Any] | None:
    """Return a precision's decision: `state`, `nodes` that stay in higher precision, and its `words`.

    Returns:
        None where the precision was not evaluated.
    """
    decision = table(about, "decision")
    kept = decision.get("kept")
    if not isinstance(kept, bool):
        return None
    nodes = next((len(decision[key]) for key in _NODES if isinstance(decision.get(key), list)), 0)
    state = (KEPT_IN_PART if nodes else KEPT) if kept else REJECTED
    return {"state": state, "nodes": nodes, "words": printable(decision.get("words") or "")}


def decision_in_short(decision: dict[str, Any] | None) -> str:
    """Write a decision in as few words as a cell of a table holds."""
    if decision is None:
        return ""
    if decision["state"] == KEPT_IN_PART:
        return f"kept, {counted(decision['nodes'], 'node')} higher"
    return str(decision["state"])


def decision_in_words(decision: dict[str, Any]) -> str:
    """Write a decision with its reasons, without saying twice what the reasons begin with."""
    short, words = decision_in_short(decision), decision["words"]
    if not words:
        return short
    begins_alike = words.lower().startswith("kept" if decision["state"] == KEPT_IN_PART else short)
    return str(words) if begins_alike else f"{short}: {words}"


def exported_accuracy(about: Record) -> dict[str, Any] | None:
    """Return the accuracy measured on a precision's own file, or None."""
    accuracy = table(about, "accuracy")
    value, metric = finite(accuracy.get("value")), accuracy.get("metric")
    if value is None or metric not in ("top1", "knn_top1", "mean_cosine"):
        return None
    return {
        "metric": metric,
        "value": value,
        "ci95": interval_from(accuracy.get("ci95")),
        "n": finite(accuracy.get("n")),
        "data": text(accuracy.get("data")),
        "measured": True,
    }


def timings_of(bench: Record) -> Iterator[dict[str, Any]]:
    """Take a measurement's record apart: one timing per precision and mode.

    Exactly one timing of each precision has `headline` set: the one the record says, else its first.
    """
    found = tables(bench, "measurements")
    headlines: dict[str, int] = {}
    for place, one in enumerate(found):
        precision = printable(one.get("precision"))
        if precision not in headlines or (
            one.get("headline") is True and found[headlines[precision]].get("headline") is not True
        ):
            headlines[precision] = place
    device = table(bench, "device")
    session = _marks(bench)
    for place, one in enumerate(found):
        latency = table(one, "latency_ms")
        precision = printable(one.get("precision"))
        own = _marks(one)
        if one.get("steady") is False:
            own.insert(0, "unsteady")
        yield {
            "precision": precision,
            "form": text(one.get("form")),
            "mode": text(one.get("mode")),
            "headline": headlines[precision] == place,
            "latency_ms": {
                **{key: finite(latency.get(key)) for key in ("p50", "p90", "p99", "mean")},
                **{f"ci95_{key}": interval_from(latency.get(f"ci95_{key}")) for key in ("p50", "p90", "p99")},
            },
            "throughput_per_s": finite(one.get("throughput_per_s")),
            "samples": finite(one.get("samples")),
            "marks": list(dict.fromkeys([*own, *session])),
            "energy": _energy(one),
            "batch": bench.get("batch"),
            "threads": bench.get("threads"),
            "runtime": text(bench.get("runtime")),
            "device": text(device.get("name") or device.get("cpu_model")),
            "power_mode": _power_mode(device),
        }


def _marks(record: Record) -> list[str]:
    marks = record.get("marks")
    return [printable(mark) for mark in marks] if isinstance(marks, list) else []


def _energy(measurement: Record) -> dict[str, Any] | None:
    energy = table(measurement, "energy")
    joules = finite(energy.get("j_per_inference"))
    if joules is None:
        return None
    rails = energy.get("rails")
    return {
        "j_per_inference": joules,
        "idle_w": finite(energy.get("idle_w")),
        "load_w": finite(energy.get("load_w")),
        "rails": [printable(rail) for rail in rails] if isinstance(rails, list) else [],
        "rate_hz": finite(energy.get("rate_hz")),
        "source": text(energy.get("source")),
    }


def _power_mode(device: Record) -> str | None:
    mode = device.get("power_mode")
    if isinstance(mode, dict):
        number = mode.get("id")
        mode = mode.get("name") or (None if number is None else f"mode {number}")
    return text(mode)


def ratios_of(bench: Record, rejected: set[str]) -> list[dict[str, Any]]:
    """Return how precisions compare that were timed in turns in one session, in numbers and words.

    Args:
        bench: the measurement's record.
        rejected: precisions to be marked as such.
    """
    device = table(bench, "device")
    found = []
    for one in tables(bench, "ratios"):
        ratio, interval = finite(one.get("p50_ratio")), interval_from(one.get("ci95"))
        if ratio is None:
            continue
        a, b = printable(one.get("a")), printable(one.get("b"))
        words = f"{b}{' (rejected)' if b in rejected else ''} is {fixed(ratio, 2)}x"
        words += f" {between(interval, lambda end: fixed(end, 2))}" if interval else ""
        words += f" as fast as {a}{' (rejected)' if a in rejected else ''}"
        if interval and interval[0] <= 1 <= interval[1]:
            words += ", not resolved: the interval includes 1"
        found.append(
            {
                "a": a,
                "b": b,
                "p50_ratio": ratio,
                "ci95": interval,
                "words": words,
                "device": text(device.get("name") or device.get("cpu_model")),
                "runtime": text(bench.get("runtime")),
            }
        )
    return found


def parity_of(manifest: Record) -> list[dict[str, Any]]:
    """Return the steps from torch to the smallest precision."""
    return [
        {
            "from": printable(step.get("from")),
            "to": printable(step.get("to")),
            **{
                key: finite(step.get(key))
                for key in (
                    "max_abs_difference",
                    "mean_abs_difference",
                    "max_relative_difference",
                    "top1_agreement",
                    "mean_cosine",
                    "images",
                )
            },
            "first_diverging_layer": text(step.get("first_diverging_layer")),
        }
        for step in tables(manifest, "parity")
    ]


def bundle_record(bundle: Source) -> dict[str, Any]:
    """Return everything the page shows of one bundle apart from its rows."""
    manifest = bundle.record
    verify = table(bundle.beside, "verify.json")
    precisions = []
    for name, about in precisions_of(manifest).items():
        parity = table(about, "parity")
        precisions.append(
            {
                "precision": name,
                "form": text(about.get("form")),
                "opset": about.get("opset"),
                "file_bytes": file_bytes(manifest, name),
                "max_relative_difference": finite(parity.get("max_relative_difference")),
                "top1_agreement": finite(parity.get("top1_agreement")),
                "verified": verified(verify, name),
                "decision": decision_on(about),
                "default": name == manifest.get("precision"),
            }
        )
    rejected = rejected_of(manifest)
    return {
        "name": bundle.name,
        "bundle_dir": printable(bundle.path),
        "target": text(manifest.get("target_name")),
        "precisions": precisions,
        "timings": [timing for bench in bundle.benches() for timing in timings_of(bench)],
        "ratios": [ratio for bench in bundle.benches() for ratio in ratios_of(bench, rejected)],
        "parity": parity_of(manifest),
    }


def rejected_of(manifest: Record) -> set[str]:
    """Return the precisions of a bundle whose decision is rejected."""
    decisions = {name: decision_on(about) for name, about in precisions_of(manifest).items()}
    return {name for name, decision in decisions.items() if decision and decision["state"] == REJECTED}


def verified(verify: Record, precision: str | None) -> bool | None:
    """Say whether a precision computed its reference outputs again; None where nobody looked."""
    if not verify:
        return None
    if verify.get("files_ok") is False:
        return False
    ok = table(table(verify, "precisions"), precision or "").get("ok", verify.get("ok"))
    return ok if isinstance(ok, bool) else None
