"""Write in words what came out, what it costs, and what a reader must know before trusting it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from edgecl.errors import counted
from edgecl.reports.collect import Collection, Source
from edgecl.reports.notation import between, fixed, megabytes, milliseconds, percent, points, scaled
from edgecl.reports.precisions import BundleSummary, joined
from edgecl.reports.rows import ACCURACIES, Comparison, Difference, Row, row_label
from edgecl.storage.records import ModelRecord, ProbeRecord, RunRecord

# What a measurement's flags mean.
_FLAGS = {
    "unsteady": "the latency never became steady, so its percentiles are not to be relied on",
    "precision not checked": "the engine does not tell what its layers compute in",
    "noisy": "a tenth of the runs took over 1.25 times the median, so something else ran on the machine",
    "drift": "the latency rose while it was measured, so the device may have throttled",
    "throttled": "the device throttled while it was measured, so cooler or better powered it is faster",
}


def decision_of(
    comparisons: Sequence[Comparison],
    rows: Sequence[Row],
    bundles: Sequence[BundleSummary],
    collection: Collection,
) -> tuple[str, list[str]]:
    """Return one sentence on what came out, and a few more on what it costs and what became of each precision."""
    differences = list(_differences_in_words(comparisons))
    timed = [row for row in rows if row.is_timed]
    speeds = _speeds_in_words(timed, rows)
    precisions = [sentence for bundle in bundles for sentence in _precisions_in_words(bundle, bundles)]
    if differences or timed:
        decision, *support = [*differences, *speeds]
        return decision, [*support, *precisions]
    accurate = [(row, key, found) for row in rows for key in ACCURACIES if (found := row.of_net(key))]
    if accurate:
        # A classifier is what people deploy; without one, the first net.
        row, key, found = min(accurate, key=lambda one: one[1] != "finetuned")
        value = joined(f"{percent(found.top1)} %", between(found.ci95), ACCURACIES[key], by=" ")
        decision = f"{row_label(row, rows)} reaches {value}; nothing was compared and nothing was timed."
        return decision, [*precisions, _what_measures([row, *rows], accuracy=False)]
    if rows:
        names = {row.name for row in rows}
        decision = f"{counted(len(names), 'net')} found, with no accuracy and no latency measured yet."
        return decision, [*precisions, _what_measures(rows, accuracy=True)]
    return _runs_in_words(collection.of(RunRecord)), []


def plateaus_in_words(runs: Sequence[Source[RunRecord]]) -> tuple[list[str], list[str]]:
    """Return which runs are stuck on the plateau of one dimension, and what to change; nothing where none is."""
    stuck = [(run, plateau) for run in runs if (plateau := run.record.plateau)]
    words = [(f"{run.name}: " if len(runs) > 1 else "") + plateau.words for run, plateau in stuck]
    hints = dict.fromkeys(plateau.hint for _, plateau in stuck)
    return words, [f"To get off the plateau, start anew: {hint}." for hint in hints]


def _what_measures(rows: Sequence[Row], *, accuracy: bool) -> str:
    """Name the commands that measure latency and, where it is missing too, accuracy."""
    models = list(dict.fromkeys(row.model_dir for row in rows if row.model_dir))
    bundles = [row.bundle_dir for row in rows if row.bundle_dir]
    commands = []
    if accuracy and models:
        commands.append(f"`edgecl probe {shlex.join(models)} --data URI` for accuracy")
    if bundles:
        commands.append(f"`edgecl bench {shlex.quote(bundles[0])}` for latency")
    else:
        export = f"edgecl export {shlex.quote(models[0])} --target ort-cpu --out BUNDLE"
        commands.append(f"`{export}` and `edgecl bench BUNDLE` for latency")
    return f"Next: {'; '.join(commands)}."


_NETS = {
    "pretrained": "the pretrained net",
    "random init": "its random initialization",
    "fine-tuned": "the pretrained net, fine-tuned on these labels,",
    "from scratch": "the same net trained from scratch",
    "given": "the given net",
    "given, fine-tuned": "the given net, fine-tuned on these labels,",
    "pretrained further": "the net pretrained further",
    "pretrained further, fine-tuned": "the net pretrained further and fine-tuned on these labels",
    "pretrained from scratch, fine-tuned": "the net pretrained from scratch and fine-tuned on these labels",
}


def _differences_in_words(comparisons: Sequence[Comparison]) -> Iterator[str]:
    for comparison in comparisons:
        where = f"{comparison.name}: " if len(comparisons) > 1 else ""
        at = f" with {counted(comparison.labels_per_class, 'label')} per class"
        if comparison.verdict:
            yield _ended(f"{where}{comparison.verdict[:1].upper()}{comparison.verdict[1:]}{at}")
        # The verdict is the first one's.
        others = comparison.differences[1 if comparison.verdict else 0 :]
        for difference in sorted(others, key=lambda one: one.b != "random init"):
            yield where + _difference_in_words(difference, at)


def _difference_in_words(difference: Difference, at: str) -> str:
    a, b = (_NETS.get(name, name) for name in (difference.a, difference.b))
    mean, interval = difference.mean, difference.ci95
    if difference.resolved and interval:
        verb = "beats" if mean > 0 else "falls short of"
        size = between(sorted(abs(end) for end in interval))
        text = f"{a} {verb} {b} by {fixed(abs(mean))} points {size}{at}"
    else:
        size = f"{points(mean)} points {between(interval)}"
        text = f"not resolved: {a} differs from {b} by {size}{at}, and the interval includes zero"
    return text[0].upper() + text[1:] + "."


def _speeds_in_words(timed: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    ordered = sorted(timed, key=lambda row: (row.is_rejected, row.p50))
    if len(timed) <= 2:
        shown = ordered if any(row.is_rejected for row in timed) else timed
        return [_row_in_words(row, rows) for row in shown]
    # A rejected precision counts only where there is no other.
    running = [row for row in ordered if not row.is_rejected] or ordered
    if len(running) == 1:
        return [_row_in_words(running[0], rows)]
    ends = [
        f"{milliseconds(row.p50)} ms ({_label_but_device(row, rows)}{_on(row)})"
        for row in (running[0], running[-1])
    ]
    rejected = len(timed) - len(running)
    besides = f"; {rejected} of rejected precisions {'does' if rejected == 1 else 'do'} not count"
    besides = besides if rejected else ""
    only = " of rejected precisions only" if running[0].is_rejected else ""
    return [f"{len(running)} median latencies{only} were measured, from {ends[0]} to {ends[1]}{besides}."]


def _precisions_in_words(bundle: BundleSummary, bundles: Sequence[BundleSummary]) -> Iterator[str]:
    where = f"{bundle.name}, " if len(bundles) > 1 else ""
    for one in bundle.precisions:
        if one.decision:
            yield _ended(f"{where}{one.precision} {one.decision.in_words}")
    several = len({(ratio.device, ratio.runtime) for ratio in bundle.ratios}) > 1
    for ratio in bundle.ratios:
        yield _ended(where + ratio.words + (f" on {ratio.device}, {ratio.runtime}" if several else ""))


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!")) else sentence + "."


def _label_but_device(row: Row, rows: Sequence[Row]) -> str:
    return row_label(row, rows, without=("device", "power_mode", "threads", "batch"))


def _on(row: Row) -> str:
    return f" on {row.device}" if row.device else ""


def _row_in_words(row: Row, rows: Sequence[Row]) -> str:
    label = _label_but_device(row, rows) + (" (rejected)" if row.is_rejected else "")
    how = joined(*row.batch_and_threads)
    size = joined(
        f"{scaled(row.macs)} MACs" if row.macs is not None else "",
        f"{scaled(row.params)} parameters" if row.params is not None else "",
        f"{megabytes(row.onnx_bytes)} MB of ONNX" if row.onnx_bytes is not None else "",
    )
    time = joined(f"{milliseconds(row.p50)} ms", row.p50_interval, by=" ")
    sentence = f"{label} takes {time} at the median{_on(row)}" + (f" ({how})" if how else "")
    return sentence + (f", at {size}." if size else ".")


def _runs_in_words(runs: Sequence[Source[RunRecord]]) -> str:
    if not runs:
        return "Nothing was measured."
    run = runs[0]
    total = run.record.total_steps
    of = f" of {fixed(total, 0)}" if total is not None else ""
    steps = f"{fixed(run.steps[-1]['step'], 0)}{of} steps" if run.steps else "no step logged yet"
    state = {"done": "finished", "failed": "failed"}.get(run.record.state, "is not finished")
    more = f" ({counted(len(runs), 'run')} in all)" if len(runs) > 1 else ""
    return f"The run {run.name} {state}: {steps}; no net was measured{more}."


def warnings_of(rows: Sequence[Row], collection: Collection) -> list[str]:
    """Return what a reader must know before trusting the rows."""
    notes = [
        f"{model.name}: a picture may be of several classes; its accuracy is the mean F1 of a picture's set of "
        "classes, and it has no confusion matrix."
        for model in collection.of(ModelRecord)
        if model.record.label_sets
    ]
    flagged: dict[str, list[str]] = {}
    for row in rows:
        label = row_label(row, rows)
        if row.verified is False:
            notes.append(f"{label}: verify failed, so this bundle does not compute what torch computed.")
        for flag in row.flags:
            flagged.setdefault(flag, []).append(label)
        if row.precision == "int8" and row.bundle and not row.accuracy:
            notes.append(
                f"{label}: no accuracy of the int8 file is known, so it stands in no chart; "
                "`edgecl export --eval` measures it."
            )
    notes.extend(_ended(f"{', '.join(labels)}: {_FLAGS.get(flag, flag)}") for flag, labels in flagged.items())
    exported = [row.accuracy for row in rows if row.accuracy and row.accuracy.measured]
    measured = {accuracy.data for accuracy in exported if accuracy.data}
    probes = [probe for model in collection.of(ModelRecord) if (probe := model.one_beside(ProbeRecord))]
    probed = {str(probe.test or probe.data) for probe in probes}
    for data, what in ((measured, "exported files were evaluated"), (probed, "nets were probed")):
        if len(data) > 1:
            notes.append(
                f"The {what} on different data ({', '.join(sorted(data))}): their accuracies do not compare."
            )
    return notes
