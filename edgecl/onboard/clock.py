"""Time a runner: warm up until it is steady, then take samples."""

import gc
import time
from array import array
from typing import Callable, List, NamedTuple, Optional, Tuple

import numpy as np

# A warm-up window is full after so many runs and so much time; each is half as long again as the one before,
# so that a slow change still shows between two of them. Three windows at least: 2.4 s.
WINDOW_SAMPLES = 50
WINDOW_S = 0.5
WINDOW_GROWTH = 1.5
WINDOWS = 3
# A slow net need not fill 50 runs: after four times the window's time, ten are enough.
SLOW_WINDOW_SAMPLES = 10
SLOW_WINDOW = 4.0
# Steady: the medians of two windows in a row lie within so much of one another.
STEADY = 0.02

# A slow net may not reach 1,000 samples: sampling ends at so many times the asked duration, or at so many
# seconds where that is longer.
LONGEST = 6.0
LONGEST_S = 10.0

REPORT_EVERY_S = 1.0

Timer = Callable[[], float]
Report = Callable[[str], None]
_Teller = Callable[[float, str, int, float, Optional[float]], None]


class Measurement(NamedTuple):
    """What `measure` saw; all times in seconds."""

    samples_s: "array[float]"
    duration_s: float
    warmup_samples: int
    warmup_s: float
    steady: bool


def measure(
    run_once: Callable[[], object],
    *,
    duration_s: float,
    max_warmup_s: float,
    min_samples: int = 1000,
    timer: Timer = time.perf_counter,
    report: Optional[Report] = None,
) -> Measurement:
    """Time a call over and over, once it is steady.

    Warm-up ends when the rolling median is steady: after at least three growing windows, the last two within
    2 % of one another. At `max_warmup_s` it ends anyway, and `steady` is False. Sampling ends when both
    `duration_s` and `min_samples` are reached. A net too slow for that is cut off at the longer of
    6 x `duration_s` and 10 s, with as many samples as it made.

    Args:
        run_once: one inference, returning when it is done.
        duration_s: seconds to sample for, > 0.
        max_warmup_s: seconds of warm-up at most, >= 0; one run is always made.
        min_samples: samples to take even after `duration_s`.
        timer: seconds from any start; it is called right before and right after each run.
        report: called about once a second, between runs, with a line on how far it is.
    """
    tell = _teller(report)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection amid a run would be counted as the net's own time
    try:
        warmup_samples, warmup_s, steady = _warm_up(run_once, max_warmup_s, timer, tell)
        longest_s = max(LONGEST * duration_s, LONGEST_S)
        samples = array("d")  # 8 bytes each: a fast net makes millions
        begin = timer()
        while True:
            start = timer()
            run_once()
            end = timer()
            samples.append(end - start)
            elapsed = end - begin
            if elapsed >= longest_s or (elapsed >= duration_s and len(samples) >= min_samples):
                break
            expected_s = min(max(duration_s, elapsed * min_samples / len(samples)), longest_s)
            tell(end, "measuring", len(samples), elapsed, expected_s)
    finally:
        if collecting:
            gc.enable()
    return Measurement(samples, elapsed, warmup_samples, warmup_s, steady)


def _warm_up(
    run_once: Callable[[], object], max_warmup_s: float, timer: Timer, tell: _Teller
) -> Tuple[int, float, bool]:
    """Return how many runs warm-up took, how long, and whether it ended steady."""
    medians: List[float] = []
    count = 0
    full_s, full_samples = WINDOW_S, float(WINDOW_SAMPLES)
    begin = timer()
    while True:
        window = array("d")
        window_begin = timer()
        while True:
            start = timer()
            run_once()
            end = timer()
            window.append(end - start)
            elapsed, window_s = end - begin, end - window_begin
            if window_s >= full_s and len(window) >= full_samples:
                break
            if window_s >= SLOW_WINDOW * full_s and len(window) >= SLOW_WINDOW_SAMPLES:
                break
            if elapsed >= max_warmup_s:
                return count + len(window), elapsed, False
            tell(end, "warming up", count + len(window), elapsed, None)
        count += len(window)
        medians.append(float(np.median(window)))
        last = medians[-2:]
        if len(medians) >= WINDOWS and max(last) <= (1 + STEADY) * min(last):
            return count, elapsed, True
        if elapsed >= max_warmup_s:
            return count, elapsed, False
        full_s, full_samples = full_s * WINDOW_GROWTH, full_samples * WINDOW_GROWTH


def _teller(report: Optional[Report]) -> _Teller:
    """Return a function that passes a line on, about once a second."""
    last_stage, last_s = "", 0.0

    def tell(now: float, stage: str, count: int, elapsed: float, expected: Optional[float]) -> None:
        nonlocal last_stage, last_s
        if stage != last_stage:
            last_stage, last_s = stage, now
        if report is None or now - last_s < REPORT_EVERY_S:
            return
        last_s = now
        line = "%s: %.0f s, %d runs, %.0f runs/s" % (stage, elapsed, count, count / elapsed)
        report(line if expected is None else line + ", %.0f s left" % max(expected - elapsed, 0))

    return tell
