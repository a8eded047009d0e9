"""Detect throttling of the device while it was measured, by what changed from start to stop.

    watch = ThrottleWatch(); watch.start()
    ...; watch.sample(); ...     between blocks, never while a run is timed
    record = watch.stop()        record["marks"] names every hit

Sources: Linux Documentation/ABI/testing (sysfs-class-hwmon, sysfs-class-thermal, sysfs-class-devfreq), the driver
of Tegra's soctherm, NVIDIA's Jetson Orin guide on over-current events.
"""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from .sysfs import gpu_folder, read_number, read_text, trips

OVER_CURRENT = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}
# A clock below its lock by more than rounding, in more than so many of the looks.
CLOCK_SLACK = 0.99
CLOCK_LOOKS = 0.01
# So near to a passive trip the kernel is about to slow the device down, or between two looks just did.
NEAR_TRIP_C = 3.0
# Cooling that costs no speed, or whose state is a setting of the user and not an event.
HARMLESS = re.compile(r"fan|lcd|backlight|tcc offset|wifi|charge", re.IGNORECASE)


class ThrottleWatch:
    """Samples the counters, alarms, clocks, temperatures and cooling devices that a system shows below a root."""

    def __init__(self, root: Union[str, Path] = "/") -> None:
        self._root = Path(root)
        self._looks = 0
        self._counters: Dict[str, List[Path]] = {}
        self._counts: Dict[Path, Optional[int]] = {}
        self._alarms: Dict[str, Path] = {}
        self._raised: "Counter[str]" = Counter()
        self._cooling: Dict[str, Path] = {}
        self._cooled: Dict[str, int] = {}
        self._trips: List[Tuple[str, Path, float]] = []
        self._hottest: Dict[Tuple[str, float], float] = {}
        self._gpu: Optional[Path] = None
        self._gpu_lock: Optional[int] = None
        self._gpu_clocks: List[int] = []
        self._looked_s = 0.0

    def start(self) -> None:
        """Find what this system shows, and read the counters."""
        monitors = sorted(self._root.glob("sys/class/hwmon/hwmon*"))
        for monitor in monitors:
            if read_text(monitor / "name") == "soctherm_oc":
                for path in sorted(monitor.glob("oc[0-9]_event_cnt")):
                    number = path.name[: len("oc1")]
                    self._counters["%s (%s)" % (number, OVER_CURRENT.get(number, "over-current"))] = [path]
            for pattern in ("curr*_crit_alarm", "curr*_max_alarm", "in*_lcrit_alarm"):
                for path in sorted(monitor.glob(pattern)):
                    self._alarms["%s of %s" % (path.name, read_text(monitor / "name") or monitor.name)] = path
        for name in ("core_throttle_count", "package_throttle_count"):  # x86, one of each per core
            paths = list(self._root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/" + name))
            if paths:
                self._counters[name] = paths
        for path in self._root.glob("sys/class/thermal/cooling_device*"):
            kind = read_text(path / "type") or path.name
            if not HARMLESS.search(kind):
                self._cooling["%s (%s)" % (kind, path.name)] = path / "cur_state"
        self._trips = [
            (name, file, limit / 1000) for name, file, kind, limit in trips(self._root) if kind == "passive"
        ]
        self._gpu = gpu_folder(self._root)
        if self._gpu is not None:
            least, most = read_number(self._gpu / "min_freq"), read_number(self._gpu / "max_freq")
            self._gpu_lock = most if most and least == most else None
        self._counts = {path: read_number(path) for paths in self._counters.values() for path in paths}
        for path in self._alarms.values():
            read_number(path)  # reading clears what was latched before the run

    def sample(self) -> None:
        """Take one sample."""
        begin = time.perf_counter()
        self._looks += 1
        self._raised.update(name for name, path in self._alarms.items() if read_number(path))
        for name, path in self._cooling.items():
            self._cooled[name] = max(self._cooled.get(name, 0), read_number(path) or 0)
        for name, path, trip_c in self._trips:
            temperature = read_number(path)
            if temperature is not None:
                hottest = self._hottest.get((name, trip_c), -300.0)
                self._hottest[name, trip_c] = max(hottest, round(temperature / 1000, 1))
        clock = read_number(self._gpu / "cur_freq") if self._gpu is not None else None
        if clock is not None:
            self._gpu_clocks.append(clock)
        self._looked_s += time.perf_counter() - begin

    def stop(self) -> Dict[str, Any]:
        """Take a last sample and return the record.

        Returns:
            counters, alarms, cooling, gpu_mhz and hottest_c; looks, how many, and look_ms, what one cost; marks:
            'throttled: ...', one for each kind of evidence.
        """
        self.sample()
        counters = {}
        for name, paths in self._counters.items():
            counts = [(self._counts[path], read_number(path)) for path in paths]
            events = [after - before for before, after in counts if before is not None and after is not None]
            if events:
                counters[name] = max(events)
        gpu, below = self._gpu_record()
        marks = ["throttled: %s counted %d" % hit for hit in sorted(counters.items()) if hit[1] > 0]
        marks += ["throttled: alarm %s" % name for name in sorted(self._raised)]
        if below > CLOCK_LOOKS:
            assert gpu is not None
            marks.append(
                "throttled: GPU clock below its lock of %g MHz in %.0f %% of %d looks"
                % (gpu["locked_mhz"], 100 * below, len(self._gpu_clocks))
            )
        marks += [
            "throttled: %s reached %g C, its passive trip is at %g C" % (name, hottest, trip_c)
            for (name, trip_c), hottest in sorted(self._hottest.items())
            if hottest >= trip_c - NEAR_TRIP_C
        ]
        cooled = {name: state for name, state in sorted(self._cooled.items()) if state > 0}
        marks += ["throttled: cooling device %s at state %d" % one for one in cooled.items()]
        return {
            "counters": counters,
            "alarms": dict(self._raised),
            "cooling": cooled,
            "gpu_mhz": gpu,
            "hottest_c": {
                name: {"seen": hottest, "passive_trip": trip_c}
                for (name, trip_c), hottest in sorted(self._hottest.items())
            },
            "looks": self._looks,
            "look_ms": round(1e3 * self._looked_s / self._looks, 3),
            "marks": marks,
        }

    def _gpu_record(self) -> Tuple[Optional[Dict[str, Any]], float]:
        """Return the GPU's clocks for the record, and the share of looks that found it below its lock."""
        if not self._gpu_clocks:
            return None, 0.0
        lock, below = self._gpu_lock, 0.0
        if lock:
            below = sum(clock < CLOCK_SLACK * lock for clock in self._gpu_clocks) / len(self._gpu_clocks)
        return {
            "min_mhz": round(min(self._gpu_clocks) / 1e6, 3),
            "max_mhz": round(max(self._gpu_clocks) / 1e6, 3),
            "locked_mhz": round(lock / 1e6, 3) if lock else None,
            "below_lock": round(below, 4) if lock else None,
        }, below
