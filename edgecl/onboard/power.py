"""What a net costs in energy: the module's power rails, sampled by a process of their own beside the run.

Three sources, in this order: the INA3221 monitors that Linux shows under /sys, NVIDIA's tegrastats, and jtop
where the user has it. All read only, none needs root.

The sampler is another Python process, not a thread: a thread would take the interpreter's lock from the
measured loop, and a fork would carry a CUDA context that does not survive it. It is started with
the folder or the archive that this module was loaded from on its path, and needs neither NumPy nor site-packages.
It writes to a file that has no name, so the run never waits for it, and what a killed sampler saw is still there. It
ends when its standard input closes, which the kernel does for it when the measuring process ends, however that happens.

Times are seconds of CLOCK_MONOTONIC (`time.monotonic()`), the one clock that two processes read alike.
"""

import importlib
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from .sysfs import read_text

# The rails whose sum is the whole module, by their names; the first set that a board has whole is taken.
# Rails beside them, such as VDD_SOC or VDDQ_VDD2_1V8AO, are fed from these and would count twice; VIN of
# Thor is the carrier board.
TOTALS: Tuple[Tuple[str, ...], ...] = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX, TX2
    ("POM_5V_IN",),  # Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)

SOURCES = ("ina3221", "tegrastats", "jtop")
"""In the order in which they are tried."""
INTERVAL_S = 0.05
"""Between two samples; tegrastats and jtop are asked for the same, and what came is in the record."""
TEGRASTATS = "usr/bin/tegrastats"
IDLE_S = 3.0
FIRST_SAMPLE_S = 5.0
"""So long may a source take to its first sample before the next source is tried."""
GAP_S = 1.0
"""Without a sample for so long there is no energy: what happened in between is not known."""
SAMPLES = 3
"""Fewer within all windows together are too few for an energy."""

Sample = Tuple[float, float]  # seconds, watts
Window = Tuple[float, float]  # from, to, seconds


class Rail(NamedTuple):
    """One supply: its name, and the files to multiply, [mV, mA] or [mW]."""

    name: str
    files: Tuple[str, ...]


def find_rails(root: Union[str, Path] = "/") -> List[Rail]:
    """Return every rail that an INA3221 monitor shows, of new kernels (hwmon) or of JetPack 4's (iio)."""
    drivers = Path(root) / "sys/bus/i2c/drivers"
    rails = []
    for label in sorted(drivers.glob("ina3221/*/hwmon/hwmon*/in*_label")):
        number = label.name[len("in") : -len("_label")]
        files = [str(label.with_name(name % number)) for name in ("in%s_input", "curr%s_input")]
        rails.append((read_text(label), files))
    for label in sorted(drivers.glob("ina3221x/*/iio:device*/rail_name_*")):
        number = label.name[len("rail_name_") :]
        rails.append((read_text(label), [str(label.with_name("in_power%s_input" % number))]))
    return [Rail(name, tuple(files)) for name, files in rails if name and _watts(files) is not None]


def module_rails(names: Sequence[str]) -> Optional[Tuple[str, ...]]:
    """Return which of these rails add up to the whole module, or None where edgecl knows no such set."""
    for total in TOTALS:
        if all(names.count(name) == 1 for name in total):
            return total
    return None


# 'VDD_IN 3951mW/3951mW' (now/mean), 'POM_5V_IN 3842/3842' (JetPack 4, no unit), 'VDD_GPU 6330mW/6330mW/6330mW'
# (now/mean/most, JetPack 7.2), 'VDD_GPU -392mW/-392mW' (an offset of the monitor). Not 'RAM 3162/30536MB'.
_TEGRASTATS_RAIL = re.compile(
    r"(?<![\w@])([A-Z][A-Z0-9_]*) (-?\d+)(mW)?((?:/-?\d+(?:mW)?){0,2})(?=\s|$)",
)


def rails_of_tegrastats(line: str) -> Dict[str, float]:
    """Return the rails of one line of tegrastats: name -> watts at that moment, not the mean beside it."""
    found = {}
    for name, now, unit, others in _TEGRASTATS_RAIL.findall(line):
        if unit or others:  # 'VIC_FREQ 115' and 'APE 150' are clocks
            found[name] = int(now) / 1e3
    return found


class PowerMeter:
    """Samples the power of the module from `start` to `stop`; says nothing where there is no meter.

    `source` is 'ina3221', 'tegrastats', 'jtop', or None with the cause in `reason`; `rails` are those summed.

        with PowerMeter() as meter:
            meter.measure_idle()
            start = time.monotonic(); ...; end = time.monotonic()
            record["energy"] = meter.energy_of([(start, end)], inferences)
    """

    def __init__(self, root: Union[str, Path] = "/") -> None:
        self.source: Optional[str] = None
        self.rails: Tuple[str, ...] = ()
        self.reason: Optional[str] = "not started"
        self._root = Path(root)
        self._process: Optional["subprocess.Popen[bytes]"] = None
        self._samples_file: Any = None
        self._errors_file: Any = None
        self._idle: Optional[Window] = None

    def __enter__(self) -> "PowerMeter":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> bool:
        """Start to sample with the first source that gives a sample; return whether there is one."""
        reasons = []
        for source in SOURCES:
            reason = self._lacks(source)
            if reason is None:
                self._start_sampler(source)
                reason = self._wait_for_first()
            if reason is None:
                self.source, self.reason = source, None
                return True
            self.stop()
            reasons.append("%s: %s" % (source, reason))
        self.reason = "; ".join(reasons)
        return False

    def measure_idle(self, seconds: float = IDLE_S) -> None:
        """Wait so long and take that as the idle baseline; at once where there is no meter."""
        if self.source is None:
            return
        start = time.monotonic()
        time.sleep(seconds)
        self._idle = (start, time.monotonic())

    def energy_of(self, windows: Sequence[Window], inferences: int) -> Optional[Dict[str, Any]]:
        """Return the energy of measured windows, such as the blocks of one precision among others.

        Args:
            windows: (from, to) in seconds of `time.monotonic()`, after `start`.
            inferences: how many ran in all of them together, >= 1.

        Returns:
            rails, the names summed; idle_w, mean power of the idle baseline, or None without one; load_w, mean
            power within the windows; j_per_inference, all of the module's energy; j_per_inference_above_idle,
            what the idle module would not have used, or None; samples within the windows, rate_hz, source.
            None where there is no meter or it did not see the windows whole: `reason` says why.
        """
        if self.source is None or self._samples_file is None:
            return None
        samples = self._samples_until(max(end for _, end in windows))
        loads = [self._integrate(samples, window) for window in windows]
        known = [load for load in loads if load is not None]
        if len(known) < len(loads):
            return None
        joules, seconds = sum(known), sum(end - start for start, end in windows)
        count = sum(1 for at, _ in samples if any(start <= at <= end for start, end in windows))
        if count < SAMPLES:
            self.reason = "%d samples within %.2f s are too few" % (count, seconds)
            return None
        energy = {
            "rails": list(self.rails),
            "idle_w": None,
            "load_w": round(joules / seconds, 4),
            "j_per_inference": _significant(joules / inferences),
            "j_per_inference_above_idle": None,
            "samples": count,
            "rate_hz": round(count / seconds, 2),
            "source": self.source,
        }
        idle_j = self._integrate(samples, self._idle) if self._idle else None
        if self._idle and idle_j is not None:
            idle_w = idle_j / (self._idle[1] - self._idle[0])
            above = _significant((joules - idle_w * seconds) / inferences)
            energy.update(idle_w=round(idle_w, 4), j_per_inference_above_idle=above)
        return energy

    def stop(self) -> None:
        """End the sampler, within seconds, and forget its samples."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for file in (self._samples_file, self._errors_file):
            if file is not None:
                file.close()
        self._samples_file = self._errors_file = None

    # --- the sampler ---

    def _lacks(self, source: str) -> Optional[str]:
        """Return what a source lacks that no sampler needs to be started for."""
        if source == "ina3221" and not find_rails(self._root):
            return "no power monitor under %s" % (self._root / "sys/bus/i2c/drivers")
        if source == "tegrastats" and not os.access(str(self._root / TEGRASTATS), os.X_OK):
            return "there is no %s" % (self._root / TEGRASTATS)
        if source == "jtop" and importlib.util.find_spec("jtop") is None:
            return "jetson-stats is not installed"
        return None

    def _start_sampler(self, source: str) -> None:
        # The folder or archive that holds the outermost package: as many steps up as the name has parts.
        home = Path(os.path.abspath(__file__)).parents[__name__.count(".")]  # noqa: PTH100 (a link stays)
        code = "import sys; sys.path.insert(0, sys.argv[1]); import importlib; " + (
            "sys.exit(importlib.import_module(sys.argv[2]).sample_until_closed(sys.argv[3]))"
        )
        # jtop is a package the user installed; the other sources need the standard library only.
        flags = [] if source == "jtop" else ["-I", "-S"]
        settings = {
            "source": source,
            "root": str(self._root),
            "parent": os.getpid(),
        }
        self._samples_file = tempfile.TemporaryFile()
        self._errors_file = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable] + flags + ["-B", "-c", code, str(home), __name__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=self._samples_file,
            stderr=self._errors_file,
        )

    def _wait_for_first(self) -> Optional[str]:
        """Return why there is no first sample, or take the rails that it names."""
        assert self._process is not None
        until = time.monotonic() + FIRST_SAMPLE_S
        while time.monotonic() < until:
            lines = self._lines()
            if lines:
                self.rails = tuple(lines[0].split(" ", 2)[2].split("+"))
                return None
            if self._process.poll() is not None:
                return self._last_words()
            time.sleep(0.02)
        return "no sample within %g s" % FIRST_SAMPLE_S

    def _lines(self) -> List[str]:
        """Return the sampler's lines so far; one that is being written is left out."""
        file = self._samples_file.fileno()
        text = os.pread(file, os.fstat(file).st_size, 0).decode("ascii", "replace")  # moves no position
        return text[: text.rfind("\n") + 1].splitlines()

    def _samples_until(self, end: float) -> List[Sample]:
        """Return the samples so far, after waiting a little for one behind `end`."""
        assert self._process is not None
        until = time.monotonic() + GAP_S
        while True:
            samples = [(float(line.split()[0]), float(line.split()[1])) for line in self._lines()]
            if samples and samples[-1][0] >= end:
                return samples
            if time.monotonic() >= until or self._process.poll() is not None:
                return samples
            time.sleep(0.01)

    def _integrate(self, samples: List[Sample], window: Window) -> Optional[float]:
        found = integrate(samples, window)
        if isinstance(found, str):
            assert self._process is not None
            ended = self._process.poll() is not None
            self.reason = "the sampler ended: %s; %s" % (self._last_words(), found) if ended else found
            return None
        return found

    def _last_words(self) -> str:
        assert self._process is not None
        file = self._errors_file.fileno()
        lines = os.pread(file, 65536, 0).decode("utf-8", "replace").strip().splitlines()
        if lines:
            return lines[-1]
        status = self._process.returncode
        if status is not None and status < 0:
            return "killed by %s" % signal.Signals(-status).name
        return "exit status %s" % status


def integrate(samples: Sequence[Sample], window: Window) -> Union[float, str]:
    """Return the joules within a window by trapezoids, or why they are not known.

    At the ends the nearest sample within the window holds: a sample beyond them may belong to another load, such
    as the next precision's. A window with fewer than SAMPLES takes straight lines from those around it.
    """
    import numpy as np  # which the sampler does without

    start, end = window
    if not end > start:
        return "the window of %.3f s is empty" % (end - start)
    points = [sample for sample in samples if start <= sample[0] <= end]
    around = [sample for sample in samples if sample[0] < start][-1:]
    around += points + [sample for sample in samples if sample[0] > end][:1]
    times = [start] + [at for at, _ in around] + [end]
    gaps = [(abs(times[i] - times[i - 1]), min(times[i - 1 : i + 1])) for i in range(1, len(times))]
    longest, at = max(gaps)
    if longest > GAP_S:
        return "no sample for %.2f s, from %.2f s after the window began" % (longest, at - start)
    seen = points if len(points) >= SAMPLES else around
    edges = [start] + [at for at, _ in seen if start < at < end] + [end]
    # Constant beyond the first and the last one.
    levels = np.interp(edges, [at for at, _ in seen], [watts for _, watts in seen])
    return float(np.sum(np.diff(edges) * (levels[1:] + levels[:-1]) / 2))


def sample_until_closed(settings_json: str) -> Optional[str]:
    """Write 'seconds watts rails' to standard output until standard input closes, or return why there are no samples."""
    settings = json.loads(settings_json)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the measuring process, which then closes us

    def closed(wait_s: float) -> bool:
        readable = select.select([sys.stdin.fileno()], [], [], max(0.0, wait_s))[0]
        # Nothing is ever written to us: readable means closed. A forked sibling may hold the other end open
        # after the parent is gone, so the parent itself is looked at too.
        return bool(readable) or os.getppid() != settings["parent"]

    sources = {"ina3221": _sample_files, "tegrastats": _sample_tegrastats, "jtop": _sample_jtop}
    return sources[settings["source"]](Path(settings["root"]), closed)


def _sample_files(root: Path, closed: Callable[[float], bool]) -> Optional[str]:
    rails = find_rails(root)
    names = [rail.name for rail in rails]
    total = module_rails(names)
    if total is None:
        return _unknown(names)
    due = time.monotonic()
    while True:
        begin = time.monotonic()
        watts = [_watts(rail.files) for rail in rails if rail.name in total]
        end = time.monotonic()
        known = [value for value in watts if value is not None]
        if len(known) == len(watts):  # a monitor that is busy fails now and then; a gap shows in the energy
            _write((begin + end) / 2, sum(known), total)
        due = max(due + INTERVAL_S, end)
        if closed(due - end):
            return None


def _sample_tegrastats(root: Path, closed: Callable[[float], bool]) -> Optional[str]:
    program = [str(root / TEGRASTATS), "--interval", "%d" % (1000 * INTERVAL_S)]
    process = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    pending, total = b"", None
    try:
        while not closed(0.0):
            ready = select.select([process.stdout.fileno(), sys.stdin.fileno()], [], [], 0.5)[0]
            if process.stdout.fileno() not in ready:
                continue
            block = os.read(process.stdout.fileno(), 65536)
            now = time.monotonic()
            if not block:
                return "%s ended" % program[0]
            lines = (pending + block).split(b"\n")
            pending = lines.pop()
            for line in lines[-1:]:  # lines that came together cannot be told apart in time
                found = rails_of_tegrastats(line.decode("ascii", "replace"))
                total = total or module_rails(list(found))
                if total is None:
                    return _unknown(list(found))
                if all(name in found for name in total):
                    _write(now, sum(found[name] for name in total), total)
        return None
    finally:
        process.terminate()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()


def _sample_jtop(root: Path, closed: Callable[[float], bool]) -> Optional[str]:
    with importlib.import_module("jtop").jtop(interval=INTERVAL_S) as board:
        while not closed(0.0) and board.ok():
            _write(time.monotonic(), board.power["tot"]["power"] / 1e3, ("total of jtop",))
    return None


def _write(at: float, watts: float, rails: Sequence[str]) -> None:
    os.write(
        1, ("%.6f %.4f %s\n" % (at, watts, "+".join(rails))).encode("ascii", "replace")
    )  # whole lines, at once


def _watts(files: Sequence[str]) -> Optional[float]:
    """Return the power of a rail: mV x mA, or mW; None where a file does not give a number now."""
    product = 1.0
    for path in files:
        try:
            product *= int(read_text(path) or "")
        except ValueError:
            return None
    return product / (1e6 if len(files) == 2 else 1e3)


def _unknown(names: Sequence[str]) -> str:
    if not names:
        return "it shows no power rails"
    known = ", ".join(sorted(set(names)))
    return "edgecl does not know which of the rails %s make up the whole module" % known


def _significant(value: float) -> float:
    return float("%.5g" % round(value, 9))  # not the last bit of a difference
