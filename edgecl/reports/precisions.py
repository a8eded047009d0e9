"""What a bundle's manifest says about its precisions, and what its measurements say about each of their modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from edgecl.errors import counted
from edgecl.reports.collect import BundleSource, Record
from edgecl.reports.notation import Interval, between, fixed

KEPT, KEPT_IN_PART, REJECTED = "kept", "kept in part", "rejected"
_MEASURED = ("top1", "knn_top1", "mean_cosine")


class Part(BaseModel):
    """A part of a report and of report.json; what a record has beyond it is left out."""

    model_config = ConfigDict(populate_by_name=True)


class Decision(Part):
    """Whether a precision is worth its cost: the accuracy decision of `edgecl export`."""

    state: str
    """KEPT, KEPT_IN_PART or REJECTED."""
    nodes: int
    """How many nodes stay in a higher precision."""
    words: str

    @property
    def in_short(self) -> str:
        """The decision in as few words as a cell of a table holds."""
        return f"kept, {counted(self.nodes, 'node')} higher" if self.state == KEPT_IN_PART else self.state

    @property
    def in_words(self) -> str:
        """The decision with its reasons, which may begin with it."""
        if not self.words:
            return self.in_short
        begins_alike = self.words.lower().startswith("kept" if self.nodes else self.in_short)
        return self.words if begins_alike else f"{self.in_short}: {self.words}"


class ExportedAccuracy(Part):
    """The accuracy of an exported file, or of its net in torch where it was not `measured`."""

    metric: str
    value: float
    ci95: Interval | None = None
    n: float | None = None
    data: str | None = None
    measured: bool = True


class Latency(Part):
    """Percentiles of a latency in ms, with 95 % intervals."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None
    ci95_p50: Interval | None = None
    ci95_p90: Interval | None = None
    ci95_p99: Interval | None = None


class Energy(Part):
    """The energy of one inference, and how it was measured."""

    j_per_inference: float
    idle_w: float | None = None
    load_w: float | None = None
    rails: list[str] = Field(default_factory=list)
    rate_hz: float | None = None
    source: str | None = None


class Conditions(Part):
    """The way a latency was measured: only what was measured in the same way is compared."""

    device: str | None = None
    power_mode: str | None = None
    batch: int | None = None
    threads: int | None = None
    mode: str | None = None

    @property
    def key(self) -> tuple[str | int | None, ...]:
        """The conditions as a key."""
        return (self.device, self.power_mode, self.batch, self.threads, self.mode)

    @property
    def batch_and_threads(self) -> list[str]:
        """Batch and threads in words, as far as they are known."""
        batch = [f"batch {self.batch}"] if self.batch else []
        return batch + ([] if self.threads is None else [counted(self.threads, "thread")])

    @property
    def mode_if_other(self) -> str | None:
        """The mode, if it is not the usual one."""
        return None if self.mode == "inference" else self.mode

    @property
    def in_words(self) -> str:
        """The conditions in words."""
        device = self.device or "an unnamed device"
        return joined(device, self.power_mode, self.mode_if_other, *self.batch_and_threads)


class Timing(Conditions):
    """One precision of a bundle, timed in one mode."""

    precision: str
    form: str | None = None
    headline: bool
    """Whether it stands for its precision; exactly one timing of each does."""
    latency_ms: Latency
    throughput_per_s: float | None = None
    samples: float | None = None
    flags: list[str] = Field(default_factory=list)
    """What casts doubt on it, such as `unsteady` or `throttled`."""
    energy: Energy | None = None
    runtime: str | None = None

    @property
    def what(self) -> str:
        """Precision and mode."""
        return joined(self.precision, self.mode)


class Ratio(Part):
    """How much faster precision b is than a, timed in turns in one session."""

    a: str
    b: str
    p50_ratio: float
    ci95: Interval | None = None
    words: str
    device: str | None = None
    runtime: str | None = None


class ParityStep(Part):
    """One step of the parity report: two forms of a net on the same images."""

    source: str = Field(alias="from")
    to: str
    max_abs_difference: float | None = None
    mean_abs_difference: float | None = None
    max_relative_difference: float | None = None
    top1_agreement: float | None = None
    mean_cosine: float | None = None
    images: float | None = None
    first_diverging_layer: str | None = None


class Precision(Part):
    """One precision of a bundle: its file, its parity and the decision about it."""

    precision: str
    form: str | None = None
    opset: int | None = None
    file_bytes: float | None = None
    max_relative_difference: float | None = None
    top1_agreement: float | None = None
    verified: bool | None = None
    decision: Decision | None = None
    default: bool = False

    @property
    def is_rejected(self) -> bool:
        """Whether it is not worth its cost."""
        return self.decision is not None and self.decision.state == REJECTED


class BundleSummary(Part):
    """What the page shows of one bundle apart from its rows."""

    name: str
    bundle_dir: str
    target: str | None
    precisions: list[Precision]
    timings: list[Timing]
    ratios: list[Ratio]
    parity: list[ParityStep]


def joined(*parts: str | None, by: str = ", ") -> str:
    """Join those parts that say something."""
    return by.join(part for part in parts if part)


def table(record: Mapping[str, Any], key: str) -> Record:
    """Return the table under a key, empty where there is none."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def tables(record: Mapping[str, Any], key: str) -> list[Record]:
    """Return the tables in the list under a key."""
    value = record.get(key)
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def precisions_of(manifest: Record) -> dict[str, Record]:
    """Return what a manifest says about each precision."""
    return {name: about for name, about in table(manifest, "precisions").items() if isinstance(about, dict)}


def file_bytes(manifest: Record, precision: str | None) -> float | None:
    """Return the size of a precision's ONNX file."""
    model = precisions_of(manifest).get(precision or "", {}).get("model")
    size: float | None = table(manifest, "size_bytes").get(model) if isinstance(model, str) else None
    return size


def decision_on(about: Record) -> Decision | None:
    """Return a precision's decision, or None where the precision was not evaluated."""
    decision = table(about, "decision")
    if not isinstance(decision.get("kept"), bool):
        return None
    nodes = len(decision.get("kept_nodes") or [])
    state = (KEPT_IN_PART if nodes else KEPT) if decision["kept"] else REJECTED
    return Decision(state=state, nodes=nodes, words=decision.get("words") or "")


def exported_accuracy(about: Record) -> ExportedAccuracy | None:
    """Return the accuracy measured on a precision's own file, or None."""
    accuracy = table(about, "accuracy")
    if accuracy.get("value") is None or accuracy.get("metric") not in _MEASURED:
        return None
    return ExportedAccuracy.model_validate({**accuracy, "measured": True})


def timings_of(bench: Record) -> Iterator[Timing]:
    """Return a measurement's timings, one per precision and mode.

    The headline of a precision is the timing that the record says, or the first.
    """
    measurements = tables(bench, "measurements")
    headlines: dict[str, int] = {}
    for place, one in enumerate(measurements):
        first = headlines.setdefault(str(one.get("precision")), place)
        if one.get("headline") is True and measurements[first].get("headline") is not True:
            headlines[str(one.get("precision"))] = place
    device = table(bench, "device")
    for place, one in enumerate(measurements):
        flags = ["unsteady"] if one.get("steady") is False else []
        energy = table(one, "energy")
        yield Timing(
            precision=str(one.get("precision")),
            form=one.get("form"),
            mode=one.get("mode"),
            headline=headlines[str(one.get("precision"))] == place,
            latency_ms=Latency.model_validate(table(one, "latency_ms")),
            throughput_per_s=one.get("throughput_per_s"),
            samples=one.get("samples"),
            flags=list(dict.fromkeys([*flags, *_flags(one), *_flags(bench)])),
            energy=None if energy.get("j_per_inference") is None else Energy.model_validate(energy),
            batch=bench.get("batch"),
            threads=bench.get("threads"),
            runtime=bench.get("runtime"),
            device=_device(bench),
            power_mode=_power_mode(device),
        )


def _flags(record: Record) -> Iterable[str]:
    return record.get("flags") or record.get("marks") or []


def _device(bench: Record) -> str | None:
    device = table(bench, "device")
    return device.get("name") or device.get("cpu_model")


def _power_mode(device: Record) -> str | None:
    mode = device.get("power_mode")
    if isinstance(mode, dict):
        number = mode.get("id")
        return mode.get("name") or (None if number is None else f"mode {number}")
    return mode


def ratios_of(bench: Record, rejected: set[str]) -> Iterator[Ratio]:
    """Return how precisions compare that were timed in turns in one session.

    Args:
        bench: the measurement's record.
        rejected: precisions that the words call so.
    """
    for one in tables(bench, "ratios"):
        if one.get("p50_ratio") is None:
            continue
        ratio = Ratio.model_validate(
            {**one, "words": "", "device": _device(bench), "runtime": bench.get("runtime")}
        )
        a, b = (f"{name} (rejected)" if name in rejected else name for name in (ratio.a, ratio.b))
        interval = between(ratio.ci95, lambda end: fixed(end, 2))
        ratio.words = f"{b} is {joined(f'{fixed(ratio.p50_ratio, 2)}x', interval, by=' ')} as fast as {a}"
        if ratio.ci95 and ratio.ci95[0] <= 1 <= ratio.ci95[1]:
            ratio.words += ", not resolved: the interval includes 1"
        yield ratio


def bundle_summary(bundle: BundleSource) -> BundleSummary:
    """Return what the page shows of one bundle apart from its rows."""
    manifest = bundle.record
    precisions = [
        Precision(
            precision=name,
            form=about.get("form"),
            opset=about.get("opset"),
            file_bytes=file_bytes(manifest, name),
            max_relative_difference=table(about, "parity").get("max_relative_difference"),
            top1_agreement=table(about, "parity").get("top1_agreement"),
            verified=verified(bundle, name),
            decision=decision_on(about),
            default=name == manifest.get("precision"),
        )
        for name, about in precisions_of(manifest).items()
    ]
    rejected = {one.precision for one in precisions if one.is_rejected}
    return BundleSummary(
        name=bundle.name,
        bundle_dir=bundle.shown,
        target=manifest.get("target_name"),
        precisions=precisions,
        timings=[timing for bench in bundle.benches() for timing in timings_of(bench)],
        ratios=[ratio for bench in bundle.benches() for ratio in ratios_of(bench, rejected)],
        parity=[ParityStep.model_validate(step) for step in tables(manifest, "parity")],
    )


def verified(bundle: BundleSource, precision: str | None) -> bool | None:
    """Return whether a precision computed its reference outputs again; None where `verify` did not run."""
    verify = bundle.named("verify.json")
    if verify.get("files_ok") is False:
        return False
    ok = table(table(verify, "precisions"), precision or "").get("ok", verify.get("ok"))
    return ok if isinstance(ok, bool) else None
