"""Join nets, bundles, precisions and measurements into rows, and the nets of a pipeline into a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from edgecl.reports.collect import BundleSource, Collection, ComparisonSource, NetSource, Record, Source
from edgecl.reports.notation import Interval
from edgecl.reports.precisions import (
    Conditions,
    Decision,
    ExportedAccuracy,
    Latency,
    Part,
    Timing,
    decision_on,
    exported_accuracy,
    file_bytes,
    joined,
    precisions_of,
    table,
    tables,
    timings_of,
    verified,
)
from edgecl.storage.reading import reading

ORIGINS = {"pretrained": "pretrained", "random": "random init", "finetuned": "fine-tuned"}

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
# What a row has only where its net was exported.
_OF_A_BUNDLE = (
    *("bundle", "precision", "accuracy", "decision", "latency_ms"),
    *("device", "power_mode", "runtime", "mode", "threads", "batch"),
)
# What tells rows of one net apart, the most telling first.
_APART = ("bundle", "precision", "device", "power_mode", "runtime", "mode", "threads", "batch")


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
    def is_timed(self) -> bool:
        """Whether it has a median latency."""
        return self.p50 is not None

    @property
    def is_rejected(self) -> bool:
        """Whether its precision was evaluated and found not worth its cost."""
        return self.decision is not None and self.decision.state == "rejected"

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
    few_label: FewLabel | None
    knn_top1: float | None
    linear_top1: float | None


class Difference(Part):
    """How much more accurate net a is than b on the same labels, in points."""

    a: str
    b: str
    mean: float
    ci95: Interval | None
    resolved: bool
    draws: list[float]


class Comparison(Part):
    """A pipeline's nets side by side, and whether their differences are resolved."""

    name: str
    labels_per_class: int | None
    draws: int | None
    n_test: float | None
    test: str | None
    chance: float | None
    """The accuracy of guessing, in percent."""
    nets: list[ComparedNet]
    differences: list[Difference]


def rows_of(collection: Collection) -> list[Row]:
    """Return one row per net, bundle, measurement and precision, also for a net without a bundle and the reverse.

    Of a precision timed in several modes the row has the headline's. A precision that nobody timed has a row, too.
    """
    models, bundles = collection.of(NetSource), collection.of(BundleSource)
    rows: list[Row] = []
    for model in models:
        own = [bundle for bundle in bundles if _net_of(bundle, [model])]
        for bundle in own:
            rows.extend(_bundle_rows(model, bundle))
        if not own:
            with reading(model.path / model.file):
                rows.append(_row(model, None, None, None))
    for bundle in bundles:
        if not _net_of(bundle, models):
            rows.extend(_bundle_rows(None, bundle))
    return rows


def _net_of(bundle: BundleSource, models: Sequence[NetSource]) -> NetSource | None:
    made_from = {table(bundle.record, "net").get("model_sha256"), bundle.record.get("made_from")}
    return next((model for model in models if model.sha256 in made_from), None)


def _bundle_rows(model: NetSource | None, bundle: BundleSource) -> Iterator[Row]:
    with reading(bundle.path / bundle.file):
        timed = set()
        for bench in bundle.benches():
            for timing in timings_of(bench):
                if timing.headline:
                    timed.add(timing.precision)
                    yield _row(model, bundle, timing.precision, timing)
        known = list(precisions_of(bundle.record))
        for precision in known:
            if precision not in timed:
                yield _row(model, bundle, precision, None)
        if not known and not timed:
            yield _row(model, bundle, bundle.record.get("precision"), None)


def _row(
    model: NetSource | None, bundle: BundleSource | None, precision: str | None, timing: Timing | None
) -> Row:
    probe, evaluation, cost = (
        model.named(name) if model else {} for name in ("probe.json", "evaluation.json", "cost.json")
    )
    manifest = bundle.record if bundle else {}
    net = model.record if model else table(manifest, "net")
    about = precisions_of(manifest).get(precision or "", {})
    named: Source | None = model or bundle
    assert named is not None
    row = Row(
        name=named.name,
        model_dir=model.shown if model else None,
        bundle=bundle.name if bundle else None,
        bundle_dir=bundle.shown if bundle else None,
        target=manifest.get("target_name"),
        arch=net.get("arch"),
        width=net.get("width"),
        origin=net.get("origin"),
        few_label=_few_label(probe),
        knn=_accuracy(probe, "knn"),
        linear=_accuracy(probe, "linear"),
        finetuned=_accuracy(evaluation, ""),
        accuracy=exported_accuracy(about),
        runtime=manifest.get("runtime"),
        precision=precision,
        form=about.get("form"),
        decision=decision_on(about),
        macs=cost.get("macs"),
        params=net.get("params"),
        onnx_bytes=file_bytes(manifest, precision),
        verified=verified(bundle, precision) if bundle else None,
        top1_agreement=table(about, "parity").get("top1_agreement"),
    )
    if timing:
        for key in ("latency_ms", "throughput_per_s", "samples", "flags", *Conditions.model_fields):
            setattr(row, key, getattr(timing, key))
        row.j_per_inference = timing.energy.j_per_inference if timing.energy else None
        row.runtime = timing.runtime or row.runtime
    if bundle and not row.accuracy:
        row.accuracy = _standing_in(row)
    return row


def _accuracy(record: Record, name: str) -> Accuracy | None:
    top1, ci95 = (f"{name}_top1", f"{name}_ci95") if name else ("top1", "top1_ci95")
    return None if record.get(top1) is None else Accuracy(top1=record[top1], ci95=record.get(ci95))


def _few_label(record: Record) -> FewLabel | None:
    few = table(record, "few_label_top1")
    return None if few.get("mean") is None else FewLabel.model_validate({**few, "top1": few["mean"]})


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
    """Return those of ACCURACIES that compare in these rows, each with its full name.

    Few-label accuracies at different label counts do not.
    """
    counts = {row.few_label.labels_per_class for row in rows if row.few_label}
    names = {key: name for key, name in ACCURACIES.items() if key != "few_label" or len(counts) < 2}
    if len(counts) == 1:
        names["few_label"] += f", {counts.pop()} labels per class"
    return names


def row_label(row: Row, rows: Sequence[Row], *, without: Sequence[str] = ()) -> str:
    """Return a row's net, and as much of its bundle, precision and device as tells it from the other rows.

    Args:
        row: the row to name.
        rows: the rows it must differ from.
        without: parts that are shown in another way, such as by color.
    """
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


def comparison_of(source: ComparisonSource, collection: Collection) -> Comparison:
    """Return a pipeline's comparison with everything the page shows of it."""
    record = source.record
    nets = [
        ComparedNet(
            name=str(one.get("name")),
            few_label=_few_label(one),
            knn_top1=one.get("knn_top1"),
            linear_top1=one.get("linear_top1"),
        )
        for one in tables(record, "rows")
    ]
    draws = {net.name: net.few_label.draws for net in nets if net.few_label}
    inside = [
        model for model in collection.of(NetSource) if source.path.resolve() in model.path.resolve().parents
    ]
    return Comparison(
        name=source.name,
        labels_per_class=record.get("labels_per_class"),
        draws=record.get("draws"),
        n_test=record.get("n_test"),
        test=record.get("test"),
        chance=_chance(inside),
        nets=nets,
        differences=[
            _difference(one, draws) for one in tables(record, "differences") if one.get("mean") is not None
        ],
    )


def _difference(record: Record, draws: dict[str, list[float]]) -> Difference:
    found = Difference.model_validate({**record, "resolved": False, "draws": []})
    clear = found.ci95 is not None and (found.ci95[0] > 0 or found.ci95[1] < 0)
    # The record's word alone is not enough: its interval must agree.
    found.resolved = clear and record.get("resolved") is not False
    a, b = draws.get(found.a, []), draws.get(found.b, [])
    if len(a) == len(b):
        found.draws = [x - y for x, y in zip(a, b, strict=True)]
    return found


def _chance(models: Sequence[NetSource]) -> float | None:
    counts = set()
    for model in models:
        classes = model.named("probe.json").get("classes")
        count = len(classes) if isinstance(classes, list) else classes
        if isinstance(count, int) and count > 1:
            counts.add(count)
    return 100.0 / counts.pop() if len(counts) == 1 else None
