"""Measure the latency of a bundle's net on this device."""

import math
import os
import time
from pathlib import Path
from typing import Any, Dict, Optional, Union

import numpy as np

from .bundle import check_files, read_manifest
from .clock import Report, measure
from .errors import DeviceError
from .passport import available_cores, read_passport
from .reference import read_reference
from .runners import open_runner
from .statistics import drift, summarise

# Median of the last quarter of the samples over that of the first, above which the device slowed down.
DRIFT = 1.03

PROGRESS = "bench: "
"""Begins a line of progress on stderr."""

# Variables that libraries read for their number of threads and how these wait.
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def bench(
    bundle: Union[str, Path],
    *,
    duration_s: float = 10.0,
    threads: Optional[int] = None,
    report: Optional[Report] = None,
) -> Dict[str, Any]:
    """Time one inference after another, in this process, on the bundle's own reference images.

    Args:
        bundle: the directory; its files are held to their hashes first.
        duration_s: seconds to sample for, > 0; see `clock.measure` for how warm-up and sampling end.
        threads: how many to compute with, >= 1; every core this process may run on where None.
        report: called about once a second with a line on how far it is.

    Returns:
        The record without its header: latency_ms, throughput_per_s (images), runtime, precision, batch,
        threads, device, samples, warmup_samples, warmup_s, steady, duration_s, marks and the conditions.
        `marks` names what casts doubt: 'unsteady' (warm-up never settled), 'drift' (the last quarter of the
        samples over 3 % slower than the first).

    Raises:
        BundleError: a file is missing or changed, or not what the manifest says.
        DeviceError: the runtime is not there or cannot load the net; a duration or number of threads out of
            range.
    """
    if not (duration_s > 0 and math.isfinite(duration_s)):
        raise DeviceError("cannot measure for %s s" % duration_s, "ask for a duration above 0")
    if threads is not None and threads < 1:
        raise DeviceError("cannot run on %d threads" % threads, "ask for 1 or more")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    images, _ = read_reference(bundle, manifest)
    batch = manifest["input"]["shape"][0]
    threads = threads or available_cores()
    runner = open_runner(bundle, manifest, threads=threads)
    about = runner.describe()
    device = read_passport(threads=threads, versions=about["versions"])  # the load before ours
    runner.bind(images[np.arange(batch) % len(images)])
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    seen = measure(
        runner.run_once,
        duration_s=duration_s,
        max_warmup_s=min(max(3 * duration_s, 5.0), 60.0),
        report=report,
    )
    record = summarise(seen.samples_s, batch)
    change = drift(seen.samples_s)
    marks = [] if seen.steady else ["unsteady"]
    if change is not None and change > DRIFT:
        marks.append("drift")
    record.update(
        runtime=about["runtime"],
        precision=about["precision"],
        batch=batch,
        threads=threads,
        device=device,
        warmup_samples=seen.warmup_samples,
        warmup_s=round(seen.warmup_s, 3),
        steady=seen.steady,
        duration_s=round(seen.duration_s, 3),
        duration_asked_s=duration_s,
        drift=change,
        marks=marks,
        settings=about["settings"],
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        started_at=started_at,
    )
    return record
