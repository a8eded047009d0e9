"""Join nets, bundles and measurements into rows, find the Pareto front, and say in words what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgecl.report.collect import Collection, Record, Source
from edgecl.report.notation import (
    between,
    counted,
    finite,
    fixed,
    interval_from,
    megabytes,
    milliseconds,
    percent,
    points,
    printable,
    scaled,
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


def rows_of(collection: Collection) -> list[Row]:
    """Make one row per net, bundle and measurement, also for a net without a bundle and the reverse."""
    models = collection.of("model")
    bundles = collection.of("bundle")
    rows: list[Row] = []
    for model in models:
        own = [bundle for bundle in bundles if _net_of(bundle, [model]) is model]
        for bundle in own:
            rows.extend(_bundle_rows(model, bundle))
        if not own:
            rows.append(_row(model, None, None))
    for bundle in bundles:
        if _net_of(bundle, models) is None:
            rows.extend(_bundle_rows(None, bundle))
    return rows


def _net_of(bundle: Source, models: Sequence[Source]) -> Source | None:
    made_from = {_table(bundle.record, "net").get("model_sha256"), bundle.record.get("made_from")}
    for model in models:
        if model.sha256 in made_from:
            return model
    return None


def _bundle_rows(model: Source | None, bundle: Source) -> Iterator[Row]:
    benches: list[Record | None] = [*bundle.benches()]
    for bench in benches or [None]:
        yield _row(model, bundle, bench)


def _table(record: Record | None, key: str) -> Record:
    value = (record or {}).get(key)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return None if value is None else printable(value)


def _accuracy(value: Any, interval: Any, **more: Any) -> dict[str, Any] | None:
    mean = finite(value)
    return None if mean is None else {"top1": mean, "ci95": interval_from(interval), **more}


def few_label_of(record: Record) -> dict[str, Any] | None:
    """Return a record's few-label accuracy with its interval and draws, or None."""
    few = _table(record, "few_label_top1")
    draws = few.get("draws") if isinstance(few.get("draws"), list) else []
    return _accuracy(
        few.get("mean"),
        few.get("ci95"),
        std=finite(few.get("std")),
        labels_per_class=few.get("labels_per_class"),
        draws=[draw for draw in map(finite, draws or []) if draw is not None],
    )


def _row(model: Source | None, bundle: Source | None, bench: Record | None) -> Row:
    probe = model.beside.get("probe.json", {}) if model else {}
    evaluation = model.beside.get("evaluation.json", {}) if model else {}
    cost = model.beside.get("cost.json", {}) if model else {}
    manifest = bundle.record if bundle else {}
    net = model.record if model else _table(manifest, "net")
    verify = bundle.beside.get("verify.json") if bundle else None
    latency = _table(bench, "latency_ms")
    device = _table(bench, "device")
    params = finite(net.get("params"))
    macs = finite(cost.get("macs"))
    named = model or bundle
    assert named is not None
    return {
        "name": named.name,
        "model_dir": printable(model.path) if model else None,
        "bundle": bundle.name if bundle else None,
        "bundle_dir": printable(bundle.path) if bundle else None,
        "target": _text(manifest.get("target_name")),
        "arch": _text(net.get("arch")),
        "width": finite(net.get("width")),
        "origin": _text(net.get("origin")),
        "few_label": few_label_of(probe),
        "knn": _accuracy(probe.get("knn_top1"), probe.get("knn_ci95")),
        "linear": _accuracy(probe.get("linear_top1"), probe.get("linear_ci95")),
        "finetuned": _accuracy(evaluation.get("top1"), evaluation.get("top1_ci95")),
        "latency_ms": {
            **{key: finite(latency.get(key)) for key in ("p50", "p90", "p99", "mean")},
            "ci95_p50": interval_from(latency.get("ci95_p50")),
        }
        if bench
        else None,
        "throughput_per_s": finite((bench or {}).get("throughput_per_s")),
        "samples": finite((bench or {}).get("samples")),
        "marks": _marks(bench or {}),
        "batch": (bench or {}).get("batch"),
        "threads": (bench or {}).get("threads"),
        "runtime": _text((bench or manifest).get("runtime")),
        "precision": _text((bench or manifest).get("precision")),
        "device": _text(device.get("name") or device.get("cpu_model")),
        "macs": macs,
        "params": params,
        "onnx_bytes": finite(_table(manifest, "size_bytes").get("model.onnx")),
        "verified": verify.get("ok") if verify else None,
        "top1_agreement": finite(_table(manifest, "parity").get("top1_agreement")),
        "on_pareto_front": None,
    }


# What a measurement says against itself.
_MARKS = {
    "unsteady": "the latency never became steady, so its percentiles are not to be relied on",
    "drift": "the latency rose while it was measured, so the device may have throttled",
}


def _marks(bench: Record) -> list[str]:
    marks = [printable(mark) for mark in bench.get("marks") or []]
    return ["unsteady", *marks] if bench.get("steady") is False and "unsteady" not in marks else marks


def conditions_of_row(row: Row) -> str:
    """Say in a few words what was timed: target, runtime, precision, batch, threads, device."""
    runtime = " ".join(part for part in (row["runtime"], row["precision"]) if part)
    parts = [row["target"], runtime if row["bundle"] else None]
    if row["latency_ms"]:
        parts.append(f"batch {row['batch']}" if row["batch"] else None)
        parts.append(counted(row["threads"], "thread") if isinstance(row["threads"], int) else None)
        parts.append(row["device"])
    return ", ".join(str(part) for part in parts if part)


def net_of_row(row: Row) -> str:
    """Say in a few words which net a row is about: architecture, width, origin."""
    width = f"{row['width']:g}×" if row["width"] is not None else None
    arch = " ".join(part for part in (row["arch"], width) if part)
    return ", ".join(part for part in (arch, ORIGINS.get(row["origin"], row["origin"])) if part)


def row_label(row: Row, rows: Sequence[Row], *, without: Sequence[str] = ()) -> str:
    """Call a row by its net, and by as much of its bundle and device as tells it from the other rows.

    Args:
        row: the row to name.
        rows: the rows it shall be told from.
        without: parts that are shown in another way, such as by colour.
    """
    label = str(row["name"])
    alike = [other for other in rows if other["name"] == row["name"]]
    for key in ("bundle", "device", "threads", "batch"):
        if len(alike) < 2 or key in without:
            continue
        if len({str(other[key]) for other in alike}) > 1 and row[key] is not None:
            value = {"threads": f"{row[key]} threads", "batch": f"batch {row[key]}"}.get(key, str(row[key]))
            label += f" · {value}"
            alike = [other for other in alike if other[key] == row[key]]
    return label


def pareto_front(points_: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (cost, gain) points no other beats by costing no more and gaining no less.

    Returns:
        Indices, cheapest first; of equal points all are on the front.
    """
    front = [
        index
        for index, (cost, gain) in enumerate(points_)
        if not any(
            other_cost <= cost and other_gain >= gain and (other_cost, other_gain) != (cost, gain)
            for other_cost, other_gain in points_
        )
    ]
    return sorted(front, key=lambda index: points_[index])


def trade_off(rows: list[Row]) -> dict[str, Any] | None:
    """Choose the accuracy to set against latency and mark the rows on each Pareto front.

    Rows compete only with rows timed on the same device at the same batch and thread count. Sets the rows'
    `on_pareto_front`.

    Returns:
        `accuracy` (a key of ACCURACIES), `label`, and `groups`: conditions, indices of rows, and those on the
        front. None when no row has both an accuracy and a latency.
    """
    timed = [
        index for index, row in enumerate(rows) if row["latency_ms"] and row["latency_ms"]["p50"] is not None
    ]
    labels_per_class = {str(row["few_label"]["labels_per_class"]) for row in rows if row["few_label"]}
    best, most = None, 0
    for key in ACCURACIES:
        if key == "few_label" and len(labels_per_class) > 1:
            continue  # accuracies at different label counts are not like for like
        count = sum(1 for index in timed if rows[index][key])
        if count > most:
            best, most = key, count
    if best is None:
        return None
    label = ACCURACIES[best]
    if best == "few_label":
        label += f", {labels_per_class.pop()} labels per class"
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in timed:
        row = rows[index]
        if row[best]:
            groups.setdefault((row["device"], row["batch"], row["threads"]), []).append(index)
    result = []
    for (device, batch, threads), members in groups.items():
        front = pareto_front(
            [(rows[index]["latency_ms"]["p50"], rows[index][best]["top1"]) for index in members]
        )
        for place, index in enumerate(members):
            rows[index]["on_pareto_front"] = place in front
        result.append(
            {
                "device": device,
                "batch": batch,
                "threads": threads,
                "rows": members,
                "front": [members[place] for place in front],
            }
        )
    return {"accuracy": best, "label": label, "groups": result}


def comparison_of(source: Source, collection: Collection) -> dict[str, Any]:
    """Return a pipeline's comparison with everything the page shows of it, in plain numbers."""
    record = source.record
    arms: list[dict[str, Any]] = []
    draws: dict[str, list[float]] = {}
    for arm in record.get("rows") or []:
        few = few_label_of(arm)
        arms.append(
            {
                "name": printable(arm.get("name")),
                "few_label": few,
                "knn_top1": finite(arm.get("knn_top1")),
                "linear_top1": finite(arm.get("linear_top1")),
            }
        )
        if few:
            draws[printable(arm.get("name"))] = few["draws"]
    differences = []
    for difference in record.get("differences") or []:
        a, b = printable(difference.get("a")), printable(difference.get("b"))
        mean, interval = finite(difference.get("mean")), interval_from(difference.get("ci95"))
        if mean is None:
            continue
        clear = interval is not None and (interval[0] > 0 or interval[1] < 0)
        paired = len(draws.get(a, [])) == len(draws.get(b, []))
        differences.append(
            {
                "a": a,
                "b": b,
                "mean": mean,
                "ci95": interval,
                # Never resolved on the record's word alone when its interval says otherwise.
                "resolved": clear and difference.get("resolved") is not False,
                "draws": [x - y for x, y in zip(draws.get(a, []), draws.get(b, []), strict=True)]
                if paired
                else [],
            }
        )
    inside = [
        model for model in collection.of("model") if source.path.resolve() in model.path.resolve().parents
    ]
    return {
        "name": source.name,
        "labels_per_class": record.get("labels_per_class"),
        "draws": record.get("draws"),
        "n_test": record.get("n_test"),
        "test": _text(record.get("test")),
        "chance": _chance(inside),
        "arms": arms,
        "differences": differences,
    }


def _chance(models: list[Source]) -> float | None:
    counts = set()
    for model in models:
        classes = model.beside.get("probe.json", {}).get("classes")
        count = len(classes) if isinstance(classes, list) else classes
        if isinstance(count, int) and not isinstance(count, bool) and count > 1:
            counts.add(count)
    return 100.0 / counts.pop() if len(counts) == 1 else None


def verdict_of(
    comparisons: Sequence[dict[str, Any]], rows: Sequence[Row], collection: Collection
) -> tuple[str, list[str]]:
    """Say in one sentence what came out, and in a few more what it costs."""
    support: list[str] = []
    verdict = ""
    for comparison in comparisons:
        where = f"{comparison['name']}: " if len(comparisons) > 1 else ""
        labels = comparison["labels_per_class"]
        at = f" with {counted(labels, 'label')} per class" if isinstance(labels, int) else ""
        for difference in sorted(comparison["differences"], key=lambda one: one["b"] != "random init"):
            sentence = where + _difference_in_words(difference, at)
            if verdict:
                support.append(sentence)
            else:
                verdict = sentence
    timed = [row for row in rows if row["latency_ms"] and row["latency_ms"]["p50"] is not None]
    speeds = _speeds_in_words(timed, rows)
    if verdict:
        return verdict, [*support, *speeds]
    if timed:
        return speeds[0], speeds[1:]
    accurate = [(row, key) for row in rows for key in ACCURACIES if row[key]]
    if accurate:
        row, key = accurate[0]
        value = row[key]
        interval = f" {between(value['ci95'])}" if value["ci95"] else ""
        return (
            f"{row_label(row, rows)} reaches {percent(value['top1'])} %{interval} {ACCURACIES[key]}; "
            "nothing was compared and nothing was timed."
        ), []
    if rows:
        return f"{counted(len(rows), 'net')} found, with no accuracy and no latency measured yet.", []
    return _runs_in_words(collection.of("run")), []


_CALLED = {
    "pretrained": "the pretrained net",
    "random init": "its random initialisation",
    "fine-tuned": "the pretrained net, fine-tuned on these labels,",
    "from scratch": "the same net trained from scratch",
}


def _difference_in_words(difference: dict[str, Any], at: str) -> str:
    a = _CALLED.get(difference["a"], difference["a"])
    b = _CALLED.get(difference["b"], difference["b"])
    interval = difference["ci95"]
    if difference["resolved"]:
        verb = "beats" if difference["mean"] > 0 else "falls short of"
        size = [abs(end) for end in interval]
        text = f"{a} {verb} {b} by {fixed(abs(difference['mean']))} points {between(sorted(size))}{at}"
    elif interval is None:
        text = (
            f"not resolved: {a} and {b} differ by {points(difference['mean'])} points{at}, with no interval"
        )
    else:
        reason = (
            "the interval includes zero"
            if interval[0] <= 0 <= interval[1]
            else "the record calls it unresolved"
        )
        text = (
            f"not resolved: {a} differs from {b} by {points(difference['mean'])} points "
            f"{between(interval)}{at}, and {reason}"
        )
    return text[0].upper() + text[1:] + "."


def _speeds_in_words(timed: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    if len(timed) <= 2:
        return [_row_in_words(row, rows) for row in timed]
    ordered = sorted(timed, key=lambda row: row["latency_ms"]["p50"])
    first, last = ordered[0], ordered[-1]
    return [
        f"{len(timed)} median latencies were measured, from {milliseconds(first['latency_ms']['p50'])} ms "
        f"({_label_but_device(first, rows)}{_on(first)}) to {milliseconds(last['latency_ms']['p50'])} ms "
        f"({_label_but_device(last, rows)}{_on(last)})."
    ]


def _label_but_device(row: Row, rows: Sequence[Row]) -> str:
    return row_label(row, rows, without=("device", "threads", "batch"))


def _on(row: Row) -> str:
    return f" on {row['device']}" if row["device"] else ""


def _row_in_words(row: Row, rows: Sequence[Row]) -> str:
    latency = row["latency_ms"]
    how = [
        f"batch {row['batch']}" if row["batch"] else "",
        counted(row["threads"], "thread") if isinstance(row["threads"], int) else "",
    ]
    how_text = ", ".join(part for part in how if part)
    interval = between(latency["ci95_p50"], milliseconds)
    sentence = (
        f"{_label_but_device(row, rows)} takes {milliseconds(latency['p50'])} ms"
        f"{' ' + interval if interval else ''} "
        f"at the median{_on(row)}{f' ({how_text})' if how_text else ''}"
    )
    size = [
        f"{scaled(row['macs'])} MACs" if row["macs"] is not None else "",
        f"{scaled(row['params'])} parameters" if row["params"] is not None else "",
        f"{megabytes(row['onnx_bytes'])} MB of ONNX" if row["onnx_bytes"] is not None else "",
    ]
    size_text = ", ".join(part for part in size if part)
    return sentence + (f", at {size_text}." if size_text else ".")


def _runs_in_words(runs: list[Source]) -> str:
    if not runs:
        return "Nothing was measured."
    run = runs[0]
    total = finite(run.record.get("total_steps"))
    done = finite(run.steps[-1].get("step")) if run.steps else None
    of = f" of {fixed(total, 0)}" if total is not None else ""
    steps = f"{fixed(done, 0)}{of} steps" if done is not None else "no step logged yet"
    state = "finished" if run.record.get("state") == "done" else "is not finished"
    more = f" ({counted(len(runs), 'run')} in all)" if len(runs) > 1 else ""
    return f"The run {run.name} {state}: {steps}; no net was measured{more}."


def warnings_of(rows: Sequence[Row], collection: Collection) -> list[str]:
    """Say what a reader must know before trusting the rows."""
    notes = []
    for row in rows:
        label = row_label(row, rows)
        if row["verified"] is False:
            notes.append(f"{label}: verify failed, so this bundle does not compute what torch computed.")
        notes.extend(f"{label}: {_MARKS.get(mark, mark)}." for mark in row["marks"])
    tests = {
        printable(probe.get("test") or probe.get("data"))
        for model in collection.of("model")
        if (probe := model.beside.get("probe.json"))
    }
    if len(tests) > 1:
        notes.append(
            f"The nets were probed on different data ({', '.join(sorted(tests))}): "
            "their accuracies do not compare."
        )
    return notes
