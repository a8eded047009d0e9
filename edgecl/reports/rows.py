"""Join nets, bundles, precisions and measurements into rows, and the nets of a pipeline into a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from edgecl.reports.collect import Collection, Source
from edgecl.reports.notation import between, fixed, milliseconds, points
from edgecl.reports.precisions import (
    REJECTED,
    Conditions,
    Decision,
    ExportedAccuracy,
    Part,
    Timing,
    decision_on,
    exported_accuracy,
    file_bytes,
    joined,
    timings_of,
    verified,
)
from edgecl.storage import records
from edgecl.storage.records import (
    BenchRecord,
    ComparisonRecord,
    CostRecord,
    EvaluationRecord,
    FewLabelAccuracy,
    Interval,
    Latency,
    Manifest,
    ModelRecord,
    ProbeRecord,
)

ORIGINS = {
    "pretrained": "pretrained",
    "given": "given",
    "random": "random init",
    "finetuned": "fine-tuned",
}

# The accuracies a chart may show; it takes the first that most timed nets have.
ACCURACIES = {
    "few_label": "few-label top-1",
    "linear": "linear-probe top-1",
    "finetuned": "fine-tuned top-1",
    "knn": "kNN top-1",
}

# An accuracy of the net in torch, in the order in which it stands in for one of the exported file.
_OF_THE_NET = {
    "finetuned": "net_top1",
    "linear": "linear_top1",
    "knn": "net_knn_top1",
    "few_label": "few_label_top1",
}
# Which accuracy of an exported file compares with which of the net.
MEASURED_AS = {"finetuned": "top1", "knn": "knn_top1"}
# What tells rows of one net apart, the most telling first.
_APART = ("bundle", "precision", "device", "power_mode", "runtime", "mode", "threads", "batch")
# What a row has only where its net was exported.
_OF_A_BUNDLE = (*_APART, "accuracy", "decision", "latency_ms")


class Accuracy(Part):
    """An accuracy in percent with its 95 % interval."""

    top1: float
    ci95: Interval | None = None


class FewLabel(Accuracy):
    """An accuracy with few labels: the mean over several random choices of them."""

    std: float | None = None
    labels_per_class: int | None = None
    draws: list[float] = Field(default_factory=list)
    """The accuracy with each choice of labels."""


class Row(Conditions):
    """A net, with what was measured of one precision of one bundle of it."""

    name: str
    model_dir: str | None = None
    bundle: str | None = None
    bundle_dir: str | None = None
    target: str | None = None
    arch: str | None = None
    width: float | None = None
    origin: str | None = None
    few_label: FewLabel | None = None
    knn: Accuracy | None = None
    linear: Accuracy | None = None
    finetuned: Accuracy | None = None
    accuracy: ExportedAccuracy | None = None
    latency_ms: Latency | None = None
    throughput_per_s: float | None = None
    samples: float | None = None
    flags: list[str] = Field(default_factory=list)
    j_per_inference: float | None = None
    runtime: str | None = None
    precision: str | None = None
    form: str | None = None
    decision: Decision | None = None
    macs: float | None = None
    params: float | None = None
    onnx_bytes: float | None = None
    verified: bool | None = None
    top1_agreement: float | None = None
    on_pareto_front: bool | None = None

    @property
    def p50(self) -> float | None:
        """The median latency in ms."""
        return self.latency_ms.p50 if self.latency_ms else None

    @property
    def p50_interval(self) -> str:
        """Its 95 % interval in words."""
        return between(self.latency_ms.ci95_p50 if self.latency_ms else None, milliseconds)

    @property
    def is_timed(self) -> bool:
        """Whether it has a median latency."""
        return self.p50 is not None

    @property
    def is_rejected(self) -> bool:
        """Whether its precision was evaluated and found not worth its cost."""
        return self.decision is not None and self.decision.state == REJECTED

    def of_net(self, key: str) -> Accuracy | None:
        """Return an accuracy of ACCURACIES, of the net in torch."""
        found: Accuracy | None = getattr(self, key)
        return found

    def gain(self, key: str) -> Accuracy | None:
        """Return an accuracy of ACCURACIES as it holds for the row's precision.

        What was measured on the exported file comes first. The net's own stands in, but not for int8, which is
        another net: it would seem to cost nothing.
        """
        exported = self.accuracy
        if exported and exported.measured and exported.metric == MEASURED_AS.get(key):
            return Accuracy(top1=exported.value, ci95=exported.ci95)
        return None if self.precision == "int8" else self.of_net(key)

    @property
    def about_net(self) -> str:
        """Architecture, width and origin."""
        arch = joined(self.arch, None if self.width is None else f"{self.width:g}×", by=" ")
        return joined(arch, ORIGINS.get(self.origin or "", self.origin))

    @property
    def about_bundle(self) -> str:
        """Target, runtime, precision, mode, batch, threads and device."""
        runtime = joined(self.runtime, self.precision, by=" ") if self.bundle else None
        if not self.latency_ms:
            return joined(self.target, runtime)
        how = [self.mode_if_other, *self.batch_and_threads, self.device, self.power_mode]
        return joined(self.target, runtime, *how)

    def without_bundle(self) -> Row:
        """Return what the row says of its net alone."""
        return self.model_copy(update=dict.fromkeys(_OF_A_BUNDLE))


class ComparedNet(Part):
    """One net of a comparison: pretrained, at its random initialization, trained from scratch."""

    name: str
    few_label: FewLabel
    knn_top1: float | None
    linear_top1: float | None


class Difference(records.Difference):
    """How much more accurate net a is than b on the same labels, in points."""

    draws: list[float]

    @property
    def in_words(self) -> str:
        """Both nets, the difference and its interval."""
        difference = joined(f"{points(self.mean)} points", between(self.ci95), by=" ")
        return f"{self.a} − {self.b}: {difference}, {'resolved' if self.resolved else 'not resolved'}"


class Comparison(Part):
    """A pipeline's nets side by side, and whether their differences are resolved."""

    name: str
    labels_per_class: int
    draws: int
    n_test: int
    test: str
    chance: float | None
    """The accuracy of guessing, in percent."""
    nets: list[ComparedNet]
    differences: list[Difference]
    verdict: str | None = None
    """Whether pretraining given weights further paid."""

    @property
    def in_words(self) -> str:
        """On what the nets were compared."""
        return (
            f"Each net was given the same {self.draws} choices of labels; "
            f"{fixed(self.n_test, 0)} test images; test data {self.test}."
        )


def rows_of(collection: Collection) -> list[Row]:
    """Return one row per net, bundle, measurement and precision, also for a net without a bundle and the reverse.

    Of a precision timed in several modes the row has the headline's. A precision that nobody timed has a row, too.
    """
    models, bundles = collection.of(ModelRecord), collection.of(Manifest)
    joined_to = [(bundle, _net_of(bundle, models)) for bundle in bundles]
    rows: list[Row] = []
    for model in models:
        own = [bundle for bundle, net in joined_to if net is model]
        for bundle in own:
            rows.extend(_bundle_rows(model, bundle))
        if not own:
            rows.append(_row(model, None, None, None))
    for bundle, net in joined_to:
        if net is None:
            rows.extend(_bundle_rows(None, bundle))
    return rows


def _net_of(bundle: Source[Manifest], models: Sequence[Source[ModelRecord]]) -> Source[ModelRecord] | None:
    made_from = {bundle.record.made_from, bundle.record.net.model_sha256 if bundle.record.net else None}
    return next((model for model in models if model.sha256 in made_from), None)


def _bundle_rows(model: Source[ModelRecord] | None, bundle: Source[Manifest]) -> Iterator[Row]:
    timed = set()
    for timing in (timing for bench in bundle.all_beside(BenchRecord) for timing in timings_of(bench)):
        if timing.headline:
            timed.add(timing.precision)
            yield _row(model, bundle, timing.precision, timing)
    for precision in bundle.record.precisions:
        if precision not in timed:
            yield _row(model, bundle, precision, None)


def _row(
    model: Source[ModelRecord] | None,
    bundle: Source[Manifest] | None,
    precision: str | None,
    timing: Timing | None,
) -> Row:
    row = Row(name="", precision=precision)
    if bundle:
        manifest = bundle.record
        about = manifest.precisions.get(precision or "")
        row.name, row.bundle, row.bundle_dir = bundle.name, bundle.name, bundle.shown
        row.target, row.runtime = manifest.target_name, manifest.runtime
        row.form = about.form if about else None
        row.accuracy, row.decision = exported_accuracy(about), decision_on(about)
        row.onnx_bytes, row.verified = file_bytes(manifest, about), verified(bundle, precision)
        row.top1_agreement = about.parity.top1_agreement if about and about.parity else None
    if model:
        row.name, row.model_dir = model.name, model.shown
        if cost := model.one_beside(CostRecord):
            row.macs = cost.macs
        if probe := model.one_beside(ProbeRecord):
            row.few_label = _few_label(probe.few_label_top1)
            row.knn = Accuracy(top1=probe.knn_top1, ci95=probe.knn_ci95)
            row.linear = Accuracy(top1=probe.linear_top1, ci95=probe.linear_ci95)
        if evaluation := model.one_beside(EvaluationRecord):
            row.finetuned = Accuracy(top1=evaluation.top1, ci95=evaluation.top1_ci95)
    net = model.record if model else bundle.record.net if bundle else None
    if net:
        row.arch, row.width, row.origin, row.params = net.arch, net.width, net.origin, net.params
    if timing:
        for key in ("latency_ms", "throughput_per_s", "samples", "flags", *Conditions.model_fields):
            setattr(row, key, getattr(timing, key))
        row.j_per_inference = timing.energy.j_per_inference if timing.energy else None
        row.runtime = timing.runtime or row.runtime
    if bundle and not row.accuracy:
        row.accuracy = _standing_in(row)
    return row


def _few_label(few: FewLabelAccuracy) -> FewLabel:
    return FewLabel(
        top1=few.mean, ci95=few.ci95, std=few.std, labels_per_class=few.labels_per_class, draws=few.draws
    )


def _standing_in(row: Row) -> ExportedAccuracy | None:
    """Return the net's accuracy in torch for a file that was not measured itself."""
    for key, metric in _OF_THE_NET.items():
        if found := row.gain(key):
            return ExportedAccuracy(metric=metric, value=found.top1, ci95=found.ci95, measured=False)
    return None


def nets_of(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each net whose own directory was given."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.model_dir is not None:
            found.setdefault(row.model_dir, row)
    return list(found.values())


def comparable_accuracies(rows: Sequence[Row]) -> dict[str, str]:
    """Return those of ACCURACIES that compare, with their full names: few-label ones at different label counts do not."""
    counts = {row.few_label.labels_per_class for row in rows if row.few_label}
    names = {key: name for key, name in ACCURACIES.items() if key != "few_label" or len(counts) < 2}
    if len(counts) == 1:
        names["few_label"] += f", {counts.pop()} labels per class"
    return names


def row_label(row: Row, rows: Sequence[Row], *, without: Sequence[str] = ()) -> str:
    """Return a row's net, and as much of its bundle, precision and device as tells it from the other rows."""
    label = row.name
    alike = [other for other in rows if other.name == row.name]
    for key in _APART:
        own = getattr(row, key)
        if len(alike) < 2 or key in without:
            continue
        if len({getattr(other, key) for other in alike}) > 1 and own is not None:
            label += " · " + {"threads": f"{own} threads", "batch": f"batch {own}"}.get(key, str(own))
            alike = [other for other in alike if getattr(other, key) == own]
    return label


def comparison_of(source: Source[ComparisonRecord], collection: Collection) -> Comparison:
    """Return a pipeline's comparison with everything the page shows of it."""
    record = source.record
    nets = [
        ComparedNet(
            name=one.name,
            few_label=_few_label(one.few_label_top1),
            knn_top1=one.knn_top1,
            linear_top1=one.linear_top1,
        )
        for one in record.rows
    ]
    draws = {net.name: net.few_label.draws for net in nets}
    root = source.path.resolve()
    inside = [model for model in collection.of(ModelRecord) if root in model.path.resolve().parents]
    return Comparison(
        name=source.name,
        labels_per_class=record.labels_per_class,
        draws=record.draws,
        n_test=record.n_test,
        test=record.test,
        chance=_chance(inside),
        nets=nets,
        differences=[
            Difference(**one.to_json(), draws=_paired(draws.get(one.a, []), draws.get(one.b, [])))
            for one in record.differences
        ],
        verdict=record.verdict,
    )


def _paired(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)] if len(a) == len(b) else []


def _chance(models: Sequence[Source[ModelRecord]]) -> float | None:
    probes = [probe for model in models if (probe := model.one_beside(ProbeRecord))]
    counts = {probe.classes for probe in probes if probe.classes > 1}
    return 100.0 / counts.pop() if len(counts) == 1 else None
