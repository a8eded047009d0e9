"""Measure the latency and energy of a bundle's nets on this device."""

import contextlib
import math
import os
import shlex
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

import numpy as np

from .bundle import PRECISIONS, check_files, choose_precision, read_manifest
from .clock import BLOCK_S, Measurement, measure_interleaved
from .device_info import add_state_after, available_cores, read_device_info
from .errors import DeviceError
from .power import PowerMeter
from .reference import read_reference
from .runtime import Report, Session
from .runtimes import TRTEXEC, full_name, open_session
from .statistics import drift, ratio_interval, summarize
from .throttle import ThrottleWatch
from .versions import version_fits

# Median of the last quarter of the samples over that of the first, above which the device slowed down.
DRIFT = 1.03
# The 90th percentile over the median, above which something else took part in the run.
NOISE = 1.25
# Power monitors average over tenths of a second: with one, blocks are so long that little of the net before is in
# what they tell.
METERED_BLOCK_S = 2.0
LOOK_EVERY_S = 1.0

PROGRESS = "bench: "
"""Begins a line of progress on stderr."""

# Variables that libraries read for their number of threads and how these wait.
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class _Task(NamedTuple):
    """One mode of one net."""

    precision: str
    mode: str

    def __str__(self) -> str:
        return "%s, %s" % self


class _Job(NamedTuple):
    """What is to be measured, and what looks on."""

    bundle: Path
    manifest: Dict[str, Any]
    precisions: Sequence[str]
    runtime: str
    duration_s: float
    threads: int
    watch: ThrottleWatch
    meter: PowerMeter
    report: Report

    @property
    def batch(self) -> int:
        return int(self.manifest["input"]["shape"][0])


class _Measured(NamedTuple):
    """What one way of measuring hands to the record."""

    runtime: str
    device: Dict[str, Any]
    measurements: List[Dict[str, Any]]
    ratios: List[Dict[str, Any]]


def bench(
    bundle: Union[str, Path],
    *,
    precisions: Optional[Sequence[str]] = None,
    runtime: Optional[str] = None,
    duration_s: float = 10.0,
    threads: Optional[int] = None,
    power: bool = True,
    report: Optional[Report] = None,
) -> Dict[str, Any]:
    """Time one inference after another, in this process, on the bundle's own reference images.

    Several precisions, and several modes of one, are measured in turn, A B A B, in one session. 'trtexec' measures
    in processes of its own, one after another, on images of its own.

    Args:
        precisions: the bundle's default one where None.
        runtime: 'trtexec' for a bundle for TensorRT too; the manifest's where None.
        duration_s: seconds to sample each mode of each precision for, > 0.
        threads: >= 1; every core this process may run on where None.

    Returns:
        The record without its header, as `BenchRecord` in edgecl/storage/records.py describes it. The marks of a
        measurement are 'unsteady' (warm-up never settled), 'noisy' (p90 over 1.25 times p50) and 'drift' (the last
        quarter of the samples over 3 % slower than the first); those of the session come from `throttle` and the
        conditions. Where energy is None, power's reason says why.

    Raises:
        BundleError: a file is missing or changed, not what the manifest says, or no such precision.
        DeviceError: the runtime is not there or cannot load the net; a duration or number of threads out of
            range.
    """
    if not (duration_s > 0 and math.isfinite(duration_s)):
        raise DeviceError("cannot measure for %s s" % duration_s, "ask for a duration above 0")
    if threads is not None and threads < 1:
        raise DeviceError("cannot run on %d threads" % threads, "ask for 1 or more")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    chosen = [choose_precision(manifest, name)[0] for name in dict.fromkeys(precisions or (None,))]
    runtime = full_name(runtime or manifest["runtime"])
    if runtime == TRTEXEC and manifest["runtime"] != "tensorrt":
        raise DeviceError(
            "trtexec measures bundles for 'tensorrt', this one is for '%s'" % manifest["runtime"],
            "leave out --runtime, or export for a TensorRT target",
        )
    threads = threads or available_cores()
    say = report or (lambda line: None)
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    watch = ThrottleWatch()
    with _metered(power, say) as meter:
        job = _Job(Path(bundle), manifest, chosen, runtime, duration_s, threads, watch, meter, say)
        found = _measure_with_trtexec(job) if runtime == TRTEXEC else _measure_here(job)
        throttle = watch.stop()
        source = {"source": meter.source, "rails": list(meter.rails), "reason": meter.reason}
    add_state_after(found.device)
    return {
        "runtime": found.runtime,
        "batch": job.batch,
        "threads": threads,
        "device": found.device,
        "started_at": started_at,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "duration_asked_s": duration_s,
        "command": _command(),
        "measurements": found.measurements,
        "ratios": found.ratios,
        "throttle": throttle,
        "power": source,
        "marks": throttle["marks"] + _marks_of_conditions(found.device, manifest, runtime, threads),
    }


def _marks_of_conditions(
    device: Dict[str, Any], manifest: Dict[str, Any], runtime: str, threads: int
) -> List[str]:
    """Return what of the device casts doubt on a whole session, in words."""
    marks = []
    load, cores = device["load_1m"], device["cores"]
    if load is not None and load > cores:
        marks.append("busy: a load of %.1f on %d cores before the run" % (load, cores))
    if threads > cores and runtime != TRTEXEC:
        marks.append("%d threads on %d cores" % (threads, cores))
    versions = (manifest.get("target") or {}).get("versions") or ""
    version = device["versions"].get(runtime)
    if version and runtime == manifest["runtime"] and not version_fits(version, versions):
        marks.append("%s %s, and the target is for %s" % (runtime, version, versions))
    return marks


def _command() -> str:
    """Return the command of this process as a line for a shell."""
    program = Path(sys.argv[0]).name
    words = [program] if program != "__main__.py" else ["-m", str(__package__)]
    return " ".join(shlex.quote(word) for word in [Path(sys.executable).name] + words + sys.argv[1:])


@contextlib.contextmanager
def _metered(power: bool, say: Report) -> Iterator[PowerMeter]:
    """Sample power for a while, the idle baseline first."""
    meter = PowerMeter()
    if not power:
        meter.reason = "not asked for"
        yield meter
        return
    with meter:
        if meter.source:
            say("measuring idle power")
            meter.measure_idle()
        yield meter


def _measure_here(job: _Job) -> _Measured:
    """Measure every mode of every precision in turn, in this process."""
    images, _ = read_reference(job.bundle, job.manifest)
    bound = images[np.arange(job.batch) % len(images)]
    with contextlib.ExitStack() as opened:
        sessions: Dict[str, Session] = {}
        for name in job.precisions:
            job.report("loading %s" % name)
            sessions[name] = open_session(
                job.bundle,
                job.manifest,
                precision=name,
                runtime=job.runtime,
                threads=job.threads,
                report=job.report,
            )
            opened.callback(sessions[name].close)
            sessions[name].bind(bound)
        abouts = {name: session.describe() for name, session in sessions.items()}
        about = abouts[job.precisions[0]]
        device = read_device_info(threads=job.threads, versions=_versions(about))  # the load before ours
        timed = {name: session.modes() for name, session in sessions.items()}
        # The precisions of one mode side by side: these are compared.
        modes = list(dict.fromkeys(mode for each in timed.values() for mode in each))
        tasks = [_Task(name, mode) for mode in modes for name in sessions if mode in timed[name]]
        job.watch.start()
        seen = measure_interleaved(
            [(str(task), partial(sessions[task.precision].run_once, task.mode)) for task in tasks],
            duration_s=job.duration_s,
            max_warmup_s=min(max(3 * job.duration_s, 5.0), 60.0),
            block_s=METERED_BLOCK_S if job.meter.source else BLOCK_S,
            report=job.report,
            between=job.watch.sample,
        )
    measurements = []
    for task in tasks:
        found = seen[str(task)]
        measurement = _measurement(job, task, abouts[task.precision], found.samples_s)
        windows = [(block.begin_s, block.end_s) for block in found.blocks]
        measurement.update(
            headline=task.mode == timed[task.precision][0],
            warmup_samples=found.warmup_samples,
            warmup_s=round(found.warmup_s, 3),
            steady=found.steady,
            duration_s=round(found.duration_s, 3),
            energy=job.meter.energy_of(windows, len(found.samples_s)),
            marks=([] if found.steady else ["unsteady"]) + measurement["marks"],
        )
        measurements.append(measurement)
    return _Measured(about["runtime"], device, measurements, _ratios(tasks, seen))


def _versions(about: Dict[str, Any]) -> Dict[str, str]:
    return dict(about["versions"], numpy=str(np.__version__))


def _ratios(tasks: Sequence[_Task], seen: Dict[str, Measurement]) -> List[Dict[str, Any]]:
    """Return by how much each precision is faster than each higher one, mode by mode, from their paired blocks."""
    ratios = []
    ordered = sorted(tasks, key=lambda task: PRECISIONS.index(task.precision))
    for mode in dict.fromkeys(task.mode for task in tasks):
        same = [task for task in ordered if task.mode == mode]
        for i, a in enumerate(same):
            for b in same[i + 1 :]:
                blocks_a, blocks_b = _samples_of_blocks(seen[str(a)]), _samples_of_blocks(seen[str(b)])
                ratio, interval = ratio_interval(blocks_a, blocks_b)
                ratios.append(
                    {
                        "a": a.precision,
                        "b": b.precision,
                        "mode": mode,
                        "p50_ratio": round(ratio, 5),
                        "ci95": [round(end, 5) for end in interval] if interval else None,
                        "rounds": len(blocks_a),
                    }
                )
    return ratios


def _samples_of_blocks(seen: Measurement) -> List[Sequence[float]]:
    return [seen.samples_s[block.first : block.first + block.runs] for block in seen.blocks]


def _measurement(job: _Job, task: _Task, about: Dict[str, Any], samples_s: Sequence[float]) -> Dict[str, Any]:
    """Return what a measurement's record says in both ways of measuring."""
    numbers, change = summarize(samples_s, job.batch), drift(samples_s)
    noisy = numbers["latency_ms"]["p90"] > NOISE * numbers["latency_ms"]["p50"]
    drifted = change is not None and change > DRIFT
    return dict(
        numbers,
        precision=task.precision,
        form=job.manifest["precisions"][task.precision]["form"],
        mode=task.mode,
        drift=change,
        marks=["noisy"] * noisy + ["drift"] * drifted,
        settings=about["settings"],
        engine=about["engine"],
    )


def _measure_with_trtexec(job: _Job) -> _Measured:
    """Measure one precision after another with trtexec, which keeps no sample of one beside one of another."""
    from .trtexec import measure_with_trtexec

    measurements: List[Dict[str, Any]] = []
    device: Dict[str, Any] = {}
    job.watch.start()
    for precision in job.precisions:
        with _looking(job.watch):
            about, modes = measure_with_trtexec(
                job.bundle, job.manifest, precision=precision, duration_s=job.duration_s, report=job.report
            )
        device = device or read_device_info(threads=None, versions=_versions(about))
        for mode, seen in modes.items():
            measurement = _measurement(job, _Task(precision, mode), about, seen["samples_s"])
            per_s, window = seen["throughput_per_s"], seen["window"]
            measurement.update(
                headline=mode == next(iter(modes)),
                # trtexec keeps the queue full: more than one over the latency.
                throughput_per_s=None if per_s is None else round(job.batch * per_s, 3),
                warmup_samples=None,
                warmup_s=None,
                steady=None,
                energy=job.meter.energy_of([window], len(seen["samples_s"])) if window else None,
                marks=measurement["marks"] + seen["marks"],
            )
            measurement.update((name, seen[name]) for name in ("duration_s", "enqueue_p50_ms", "command"))
            measurements.append(measurement)
    return _Measured(about["runtime"], device, measurements, [])


@contextlib.contextmanager
def _looking(watch: ThrottleWatch) -> Iterator[None]:
    """Sample the watch once a second while another process measures."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_S):
            watch.sample()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
