"""Time sessions: warm each up until it is steady, then sample them in alternating blocks."""

import gc
import time
from array import array
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .runtime import Report

MIN_SAMPLES = 1024
"""At least so many samples, as in MLPerf's single-stream scenario."""

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

# A block is long beside the runs lost on a switch, and short beside the changes of a device's temperature and
# of other load, so that the blocks of one round meet the same conditions. Ten rounds or more.
BLOCK_S = 0.5
ROUNDS = 10
BLOCK_SAMPLES = 8
SLOW_BLOCK = 4.0
# Not recorded after a switch: caches hold the other net, and threads of the other session still spin. A tenth
# of a block, and a few runs; of a slow net one run, if it takes half a block.
SETTLE = 0.1
SETTLE_RUNS = 3
SLOW_SETTLE = 0.5

# A slow net may not reach 1,024 samples: sampling ends at so many times the asked duration, or at so many
# seconds where that is longer.
LONGEST = 6.0
LONGEST_S = 10.0

REPORT_EVERY_S = 1.0

RunOnce = Callable[[], Optional[float]]
"""One inference, returning when it is done: seconds as the device measured them, or None to time the call."""
Timer = Callable[[], float]


class Block(NamedTuple):
    """Samples taken without interruption: `runs` from index `first`, between two readings of the timer."""

    first: int
    runs: int
    begin_s: float
    end_s: float


class Measurement(NamedTuple):
    """What was seen of one task; all times in seconds, duration_s without what was not recorded."""

    samples_s: "array[float]"
    duration_s: float
    warmup_samples: int
    warmup_s: float
    steady: bool
    blocks: Tuple[Block, ...]


def measure_interleaved(
    tasks: Sequence[Tuple[str, RunOnce]],
    *,
    duration_s: float,
    max_warmup_s: float,
    min_samples: int = MIN_SAMPLES,
    block_s: float = BLOCK_S,
    timer: Timer = time.perf_counter,
    report: Optional[Report] = None,
    between: Optional[Callable[[], object]] = None,
) -> Dict[str, Measurement]:
    """Time several calls in turn, A B A B, once each is steady, so that all meet the same conditions.

    Warm-up of a task ends when its rolling median is steady: after at least three growing windows, the last two
    within 2 % of one another. At `max_warmup_s` it ends anyway, and `steady` is False. Then every round gives
    each task one block of samples, after a few runs that are not recorded. Sampling ends with the round after
    which every task has both `duration_s` and `min_samples`. A task too slow for that is cut off at the
    longer of 6 x `duration_s` and 10 s, with as many samples as it made. A lone task with nothing to do
    between blocks is one block.

    Args:
        tasks: what to time, each with a name of its own.
        duration_s: seconds to sample each task for, > 0.
        max_warmup_s: seconds of warm-up per task at most, >= 0; one run is always made.
        min_samples: samples of each task to take even after `duration_s`.
        block_s: seconds of one block; shorter where `duration_s` would not hold ten rounds of several tasks.
        timer: called right before and right after each run.
        report: called about once a second, between runs.
        between: called before every block and at the end, while nothing is recorded.

    Returns:
        name -> what was seen of it.
    """
    tell = _Teller(report)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection amid a run would be counted as the net's own time
    try:
        series = [_Series(name, run_once, timer) for name, run_once in tasks]
        for one in series:
            one.warm_up(max_warmup_s, tell)
        longest_s = max(LONGEST * duration_s, LONGEST_S)
        alone = len(series) == 1 and between is None
        block_s = float("inf") if alone else min(block_s, duration_s / (ROUNDS if len(series) > 1 else 1))

        def enough(one: _Series, elapsed: float) -> bool:
            return elapsed >= longest_s or (elapsed >= duration_s and len(one.samples) >= min_samples)

        def expected_s(one: _Series) -> float:
            needed_s = one.elapsed_s * min_samples / len(one.samples) if one.samples else 0.0
            return min(max(duration_s, one.elapsed_s, needed_s), longest_s)

        def tell_sampling(now: float) -> None:
            if tell.is_due(now, "measuring"):
                tell.line(
                    sum(len(one.samples) for one in series),
                    sum(one.elapsed_s for one in series),
                    sum(expected_s(one) for one in series),
                )

        while not all(enough(one, one.elapsed_s) for one in series):
            for one in series:
                if between:
                    between()
                if not alone:
                    one.settle(block_s)
                one.sample(block_s, enough if alone else None, tell_sampling)
        if between:
            between()
    finally:
        if collecting:
            gc.enable()
    return {one.name: one.measurement() for one in series}


class _Series:
    """The samples of one task as they grow."""

    def __init__(self, name: str, run_once: RunOnce, timer: Timer) -> None:
        self.name = name
        self.samples = array("d")  # 8 bytes each: a fast net makes millions
        self.elapsed_s = 0.0
        self._blocks: List[Block] = []
        self._warmup: Tuple[int, float, bool] = (0, 0.0, False)
        self._run_once = run_once
        self._timer = timer

    def measurement(self) -> Measurement:
        return Measurement(self.samples, self.elapsed_s, *self._warmup, blocks=tuple(self._blocks))

    def settle(self, block_s: float) -> None:
        """Run without recording, after a switch."""
        begin, runs, elapsed = self._timer(), 0, 0.0
        while elapsed < SLOW_SETTLE * block_s and (runs < SETTLE_RUNS or elapsed < SETTLE * block_s):
            self._run_once()
            runs += 1
            elapsed = self._timer() - begin

    def sample(
        self,
        block_s: float,
        enough: Optional[Callable[["_Series", float], bool]],
        tell: Callable[[float], None],
    ) -> None:
        """Record one block: of `block_s`, or until `enough`."""
        timer, run_once, samples = self._timer, self._run_once, self.samples
        first, before_s = len(samples), self.elapsed_s
        begin = timer()
        while True:
            start = timer()
            seconds = run_once()
            end = timer()
            samples.append(end - start if seconds is None else seconds)
            self.elapsed_s = before_s + (end - begin)
            if enough:
                if enough(self, self.elapsed_s):
                    break
            elif end - begin >= block_s and (
                len(samples) - first >= BLOCK_SAMPLES or end - begin >= SLOW_BLOCK * block_s
            ):
                break
            tell(end)
        self._blocks.append(Block(first, len(samples) - first, begin, end))

    def warm_up(self, max_warmup_s: float, tell: "_Teller") -> None:
        """Run until the rolling median is steady, or for `max_warmup_s`."""
        medians: List[float] = []
        count = 0
        full_s, full_samples = WINDOW_S, float(WINDOW_SAMPLES)
        timer, run_once = self._timer, self._run_once
        stage = "warming up %s" % self.name if self.name else "warming up"
        begin = timer()
        while True:
            window = array("d")
            window_begin = timer()
            while True:
                start = timer()
                seconds = run_once()
                end = timer()
                window.append(end - start if seconds is None else seconds)
                elapsed, window_s = end - begin, end - window_begin
                slow = window_s >= SLOW_WINDOW * full_s and len(window) >= SLOW_WINDOW_SAMPLES
                if slow or (window_s >= full_s and len(window) >= full_samples):
                    break
                if elapsed >= max_warmup_s:
                    self._warmup = (count + len(window), elapsed, False)
                    return
                if tell.is_due(end, stage):
                    tell.line(count + len(window), elapsed)
            count += len(window)
            medians.append(float(np.median(window)))
            last = medians[-2:]
            steady = len(medians) >= WINDOWS and max(last) <= (1 + STEADY) * min(last)
            if steady or elapsed >= max_warmup_s:
                self._warmup = (count, elapsed, steady)
                return
            full_s, full_samples = full_s * WINDOW_GROWTH, full_samples * WINDOW_GROWTH


class _Teller:
    """Passes a line on about once a second."""

    def __init__(self, report: Optional[Report]) -> None:
        self._report = report
        self._stage = ""
        self._last_s = 0.0

    def is_due(self, now: float, stage: str) -> bool:
        """Return whether a second has passed since the last line, or since the stage began."""
        if stage != self._stage:
            self._stage, self._last_s = stage, now
        due = self._report is not None and now - self._last_s >= REPORT_EVERY_S
        if due:
            self._last_s = now
        return due

    def line(self, runs: int, elapsed: float, expected: Optional[float] = None) -> None:
        assert self._report is not None
        line = "%s: %.0f s, %d runs, %.0f runs/s" % (self._stage, elapsed, runs, runs / elapsed)
        self._report(line if expected is None else line + ", %.0f s left" % max(expected - elapsed, 0))
