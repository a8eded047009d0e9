"""Say in words what came out, what it costs, and what a reader must know before trusting it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from edgecl.errors import counted, printable
from edgecl.reports.collect import Collection, Source
from edgecl.reports.notation import between, finite, fixed, megabytes, milliseconds, percent, points, scaled
from edgecl.reports.precisions import decision_in_words, precisions_of, timings_of
from edgecl.reports.rows import ACCURACIES, Row, is_rejected, is_timed, row_label

# What a measurement says against itself.
_MARKS = {
    "unsteady": "the latency never became steady, so its percentiles are not to be relied on",
    "precision not checked": "the engine does not tell what its layers compute in",
    "noisy": "a tenth of the runs took over 1.25 times the median, so something else ran on the machine",
    "drift": "the latency rose while it was measured, so the device may have throttled",
    "throttled": "the device throttled while it was measured, so cooler or better powered it is faster",
}


def decision_of(
    comparisons: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    bundles: Sequence[dict[str, Any]],
    collection: Collection,
) -> tuple[str, list[str]]:
    """Say in one sentence what came out, and in a few more what it costs and what became of each precision."""
    support: list[str] = []
    decision = ""
    for comparison in comparisons:
        where = f"{comparison['name']}: " if len(comparisons) > 1 else ""
        labels = comparison["labels_per_class"]
        at = f" with {counted(labels, 'label')} per class" if isinstance(labels, int) else ""
        for difference in sorted(comparison["differences"], key=lambda one: one["b"] != "random init"):
            sentence = where + _difference_in_words(difference, at)
            if decision:
                support.append(sentence)
            else:
                decision = sentence
    timed = [row for row in rows if is_timed(row)]
    speeds = _speeds_in_words(timed, rows)
    precisions = [sentence for bundle in bundles for sentence in _precisions_in_words(bundle, bundles)]
    if decision:
        return decision, [*support, *speeds, *precisions]
    if timed:
        return speeds[0], [*speeds[1:], *precisions]
    accurate = [(row, key) for row in rows for key in ACCURACIES if row[key]]
    if accurate:
        row, key = accurate[0]
        value = row[key]
        interval = f" {between(value['ci95'])}" if value["ci95"] else ""
        return (
            f"{row_label(row, rows)} reaches {percent(value['top1'])} %{interval} {ACCURACIES[key]}; "
            "nothing was compared and nothing was timed."
        ), [*precisions, _what_measures(rows, accuracy=False)]
    if rows:
        names = {row["name"] for row in rows}
        return (
            f"{counted(len(names), 'net')} found, with no accuracy and no latency measured yet.",
            [*precisions, _what_measures(rows, accuracy=True)],
        )
    return _runs_in_words(collection.of("run")), []


def plateaus_in_words(runs: Sequence[Source]) -> tuple[list[str], list[str]]:
    """Say of each run that is stuck on the plateau of one dimension that it is, and what to change.

    Returns:
        what the decision must begin with, and what must stand right below it; both empty where no run is stuck.
    """
    stuck = [(run, plateau) for run in runs if isinstance(plateau := run.record.get("plateau"), dict)]
    words = [
        (f"{run.name}: " if len(runs) > 1 else "") + printable(plateau.get("words")) for run, plateau in stuck
    ]
    hints = dict.fromkeys(printable(plateau.get("hint")) for _, plateau in stuck)
    return words, [f"To get off the plateau, start anew: {hint}." for hint in hints]


def _what_measures(rows: Sequence[Row], *, accuracy: bool) -> str:
    """Name the commands that measure latency and, where it is missing too, accuracy."""
    models, bundles = (
        list(dict.fromkeys(row[key] for row in rows if row[key])) for key in ("model_dir", "bundle_dir")
    )
    commands = []
    if accuracy and models:
        commands.append(f"`edgecl probe {shlex.join(models)} --data URI` for accuracy")
    if bundles:
        commands.append(f"`edgecl bench {shlex.quote(bundles[0])}` for latency")
    else:
        export = f"edgecl export {shlex.quote(models[0])} --target ort-cpu --out BUNDLE"
        commands.append(f"`{export}` and `edgecl bench BUNDLE` for latency")
    return f"Next: {'; '.join(commands)}."


_CALLED = {
    "pretrained": "the pretrained net",
    "random init": "its random initialization",
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
    ordered = sorted(timed, key=lambda row: (is_rejected(row), row["latency_ms"]["p50"]))
    if len(timed) <= 2:
        return [_row_in_words(row, rows) for row in (timed if not any(map(is_rejected, timed)) else ordered)]
    # A precision that was rejected is not to be had, however fast it is.
    running = [row for row in ordered if not is_rejected(row)] or ordered
    first, last = running[0], running[-1]
    rejected = len(timed) - len(running)
    besides = (
        f"; {rejected} of rejected precisions {'does' if rejected == 1 else 'do'} not count"
        if rejected
        else ""
    )
    only = " of rejected precisions only" if is_rejected(first) else ""
    return [
        f"{len(running)} median latencies{only} were measured, from {milliseconds(first['latency_ms']['p50'])} ms "
        f"({_label_but_device(first, rows)}{_on(first)}) to {milliseconds(last['latency_ms']['p50'])} ms "
        f"({_label_but_device(last, rows)}{_on(last)}){besides}."
        if len(running) > 1
        else _row_in_words(first, rows)
    ]


def _precisions_in_words(bundle: dict[str, Any], bundles: Sequence[dict[str, Any]]) -> list[str]:
    """Say what was decided about each evaluated precision of a bundle, and how fast those timed in turns are."""
    where = f"{bundle['name']}, " if len(bundles) > 1 else ""
    sentences = []
    for one in bundle["precisions"]:
        if one["decision"]:
            sentences.append(_ended(f"{where}{one['precision']} {decision_in_words(one['decision'])}"))
    several = len({(ratio["device"], ratio["runtime"]) for ratio in bundle["ratios"]}) > 1
    for ratio in bundle["ratios"]:
        on = f" on {ratio['device']}, {ratio['runtime']}" if several else ""
        sentences.append(_ended(f"{where}{ratio['words']}{on}"))
    return sentences


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!")) else sentence + "."


def _label_but_device(row: Row, rows: Sequence[Row]) -> str:
    return row_label(row, rows, without=("device", "power_mode", "threads", "batch"))


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
        f"{_label_but_device(row, rows)}{' (rejected)' if is_rejected(row) else ''} takes {milliseconds(latency['p50'])} ms"
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
    state = {"done": "finished", "failed": "failed"}.get(str(run.record.get("state")), "is not finished")
    more = f" ({counted(len(runs), 'run')} in all)" if len(runs) > 1 else ""
    return f"The run {run.name} {state}: {steps}; no net was measured{more}."


def warnings_of(rows: Sequence[Row], collection: Collection) -> list[str]:
    """Say what a reader must know before trusting the rows."""
    notes = []
    marked: dict[str, list[str]] = {}
    for row in rows:
        label = row_label(row, rows)
        if row["verified"] is False:
            notes.append(f"{label}: verify failed, so this bundle does not compute what torch computed.")
        for mark in row["marks"]:
            marked.setdefault(mark, []).append(label)
        if row["precision"] == "int8" and row["bundle"] and not row["accuracy"]:
            notes.append(
                f"{label}: no accuracy of the int8 file is known, so it stands in no chart; "
                "`edgecl export --eval` measures it."
            )
    notes.extend(_ended(f"{', '.join(labels)}: {_MARKS.get(mark, mark)}") for mark, labels in marked.items())
    for bundle in collection.of("bundle"):
        notes.extend(_of_earlier_edgecl(bundle))
    tests = {
        printable(probe.get("test") or probe.get("data"))
        for model in collection.of("model")
        if (probe := model.beside.get("probe.json"))
    }
    measured = {
        row["accuracy"]["data"]
        for row in rows
        if row["accuracy"] and row["accuracy"]["measured"] and row["accuracy"]["data"]
    }
    if len(measured) > 1:
        notes.append(
            f"The exported files were evaluated on different data ({', '.join(sorted(measured))}): "
            "their accuracies do not compare."
        )
    if len(tests) > 1:
        notes.append(
            f"The nets were probed on different data ({', '.join(sorted(tests))}): "
            "their accuracies do not compare."
        )
    return notes


def _of_earlier_edgecl(bundle: Source) -> list[str]:
    """Name the records that an edgecl of one precision per bundle wrote; what it said elsewhere is left out."""
    shown = printable(bundle.path)
    notes = []
    if not precisions_of(bundle.record):
        notes.append(
            f"{shown}: manifest.json names no precisions (an earlier edgecl wrote it), so sizes and parity are "
            "left out; export the bundle again."
        )
    for name, bench in sorted(bundle.beside.items()):
        if name.startswith("bench-") and not any(True for _ in timings_of(bench)):
            notes.append(
                f"{shown}: {name} holds no measurements (an earlier edgecl wrote it), so its numbers are left "
                "out; run `edgecl bench` again."
            )
    return notes
