"""What a bundle's manifest says about its precisions, and what its measurements say about each of their modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from edgecl.errors import counted
from edgecl.reports.collect import Source
from edgecl.reports.notation import between, fixed
from edgecl.storage.records import (
    Accuracy,
    BenchMeasurement,
    BenchRecord,
    BundlePrecision,
    Energy,
    Latency,
    LeftOut,
    Manifest,
    ParityCheck,
    Ratio,
    Table,
    VerifyRecord,
)

KEPT, KEPT_IN_PART, REJECTED = "kept", "kept in part", "rejected"


class Part(Table):
    """A part of a report and of report.json."""


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


class ExportedAccuracy(Accuracy):
    """The accuracy of an exported file, or of its net in torch where it was not `measured`."""

    measured: bool = True


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


class TimedRatio(Ratio):
    """How much faster precision b is than a, timed in turns in one session."""

    words: str
    device: str | None = None
    runtime: str | None = None

    @property
    def in_full(self) -> str:
        """The words with device and runtime."""
        return joined(self.words + (f" on {self.device}" if self.device else ""), self.runtime)


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

    @property
    def is_left_out(self) -> bool:
        """Whether it was made and is not in the bundle."""
        return self.form is None


class BundleSummary(Part):
    """What the page shows of one bundle apart from its rows."""

    name: str
    bundle_dir: str
    target: str | None
    precisions: list[Precision]
    timings: list[Timing]
    ratios: list[TimedRatio]
    parity: list[ParityCheck]


def joined(*parts: str | None, by: str = ", ") -> str:
    """Join those parts that are not empty."""
    return by.join(part for part in parts if part)


def decision_on(about: BundlePrecision | LeftOut | None) -> Decision | None:
    """Return a precision's decision, or None where the precision was not evaluated."""
    found = about.decision if about else None
    if not found or found.kept is None:
        return None
    state = (KEPT_IN_PART if found.kept_nodes else KEPT) if found.kept else REJECTED
    return Decision(state=state, nodes=len(found.kept_nodes), words=found.words or "")


def exported_accuracy(about: BundlePrecision | None) -> ExportedAccuracy | None:
    """Return the accuracy measured on a precision's own file, or None."""
    return ExportedAccuracy.model_validate(about.accuracy.to_json()) if about and about.accuracy else None


def file_bytes(manifest: Manifest, about: BundlePrecision | None) -> int | None:
    """Return the size of a precision's ONNX file."""
    return manifest.size_bytes.get(about.model) if about else None


def timings_of(bench: BenchRecord) -> Iterator[Timing]:
    """Return a measurement's timings; the headline of a precision is the one that the record says, or the first."""
    headlines: dict[str, BenchMeasurement] = {}
    for one in bench.measurements:
        first = headlines.setdefault(one.precision, one)
        if one.headline and not first.headline:
            headlines[one.precision] = one
    for one in bench.measurements:
        flags = ["unsteady"] if one.steady is False else []
        yield Timing(
            precision=one.precision,
            form=one.form,
            mode=one.mode,
            headline=headlines[one.precision] is one,
            latency_ms=one.latency_ms,
            throughput_per_s=one.throughput_per_s,
            samples=one.samples,
            flags=list(dict.fromkeys([*flags, *one.marks, *bench.marks])),
            energy=one.energy,
            batch=bench.batch,
            threads=bench.threads,
            runtime=bench.runtime,
            device=bench.device.name,
            power_mode=_power_mode(bench),
        )


def _power_mode(bench: BenchRecord) -> str | None:
    mode = bench.device.power_mode
    return (mode.name or (None if mode.id is None else f"mode {mode.id}")) if mode else None


def ratios_of(bench: BenchRecord, rejected: set[str]) -> Iterator[TimedRatio]:
    """Return how precisions compare that were timed in turns in one session, those that are rejected called so."""
    for one in bench.ratios:
        a, b = (f"{name} (rejected)" if name in rejected else name for name in (one.a, one.b))
        ratio = joined(f"{fixed(one.p50_ratio, 2)}x", between(one.ci95, lambda end: fixed(end, 2)), by=" ")
        words = f"{b} is {ratio} as fast as {a}"
        if one.ci95 and one.ci95[0] <= 1 <= one.ci95[1]:
            words += ", not resolved: the interval includes 1"
        yield TimedRatio(**one.to_json(), words=words, device=bench.device.name, runtime=bench.runtime)


def bundle_summary(bundle: Source[Manifest]) -> BundleSummary:
    """Return what the page shows of one bundle apart from its rows."""
    manifest = bundle.record
    precisions = [
        Precision(
            precision=name,
            form=about.form,
            opset=about.opset,
            file_bytes=file_bytes(manifest, about),
            verified=verified(bundle, name),
            default=name == manifest.precision,
            **_found_of(about),
        )
        for name, about in manifest.precisions.items()
    ]
    precisions += [Precision(precision=name, **_found_of(about)) for name, about in manifest.left_out.items()]
    rejected = {one.precision for one in precisions if one.is_rejected}
    benches = bundle.all_beside(BenchRecord)
    return BundleSummary(
        name=bundle.name,
        bundle_dir=bundle.shown,
        target=manifest.target_name,
        precisions=precisions,
        timings=[timing for bench in benches for timing in timings_of(bench)],
        ratios=[ratio for bench in benches for ratio in ratios_of(bench, rejected)],
        parity=manifest.parity,
    )


def _found_of(about: BundlePrecision | LeftOut) -> dict[str, Any]:
    parity = about.parity
    return {
        "max_relative_difference": parity.max_relative_difference if parity else None,
        "top1_agreement": parity.top1_agreement if parity else None,
        "decision": decision_on(about),
    }


def verified(bundle: Source[Manifest], precision: str | None) -> bool | None:
    """Return whether a precision computed its reference outputs again; None where `verify` did not run."""
    verify = bundle.one_beside(VerifyRecord)
    if not verify or not verify.files_ok:
        return False if verify else None
    found = verify.precisions.get(precision or "")
    return verify.ok if found is None or found.ok is None else found.ok
