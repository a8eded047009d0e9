"""Read what Linux shows under /proc and /sys, below any root; what is not there is None."""

import re
from pathlib import Path
from typing import List, Optional, Tuple, Union

# Some PCs state trips near room temperature that mean nothing.
LEAST_TRIP_C = 45.0


def read_text(path: Union[str, Path], zero: str = "") -> Optional[str]:
    """Return a file's text without space around it; `zero` replaces the zero bytes of a device tree."""
    try:
        return Path(path).read_bytes().decode("utf-8", "replace").replace("\x00", zero).strip() or None
    except OSError:
        return None


def read_number(path: Union[str, Path]) -> Optional[int]:
    """Return the whole number that is all of a file."""
    text = read_text(path)
    return int(text) if text and re.match(r"-?\d+$", text) else None


def found_in(path: Union[str, Path], pattern: str) -> Optional[str]:
    """Return the first group of a pattern, line by line, where a file first has it."""
    found = re.search(pattern, read_text(path, "\n") or "", re.MULTILINE)
    return found.group(1) if found else None


def memory_mib(root: Union[str, Path], key: str) -> Optional[int]:
    """Return a row of /proc/meminfo, such as MemAvailable, in MiB."""
    kib = found_in(Path(root) / "proc/meminfo", r"^%s:\s*(\d+) kB" % key)
    return int(kib) // 1024 if kib else None


def thermal_zones(root: Union[str, Path]) -> List[Path]:
    """Return the folders of the thermal zones, in the order of their numbers."""
    zones = Path(root).glob("sys/class/thermal/thermal_zone*")
    return sorted(zones, key=lambda zone: (len(zone.name), zone.name))


def trips(root: Union[str, Path]) -> List[Tuple[str, Path, str, int]]:
    """Return zone, file of its temperature, kind and limit in thousandths of a degree of each trip that means something."""
    found = []
    for zone in thermal_zones(root):
        for path in zone.glob("trip_point_*_type"):
            limit = read_number(path.with_name(path.name.replace("_type", "_temp")))
            if limit is not None and limit >= 1000 * LEAST_TRIP_C:
                found.append(
                    (read_text(zone / "type") or zone.name, zone / "temp", read_text(path) or "", limit)
                )
    return found


def power_modes(table: str) -> List[Tuple[int, str]]:
    """Return number and name of each mode in an nvpmodel.conf."""
    modes = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", table, re.MULTILINE)
    return [(int(number), name.rstrip(">")) for number, name in modes]


def gpu_folder(root: Union[str, Path]) -> Optional[Path]:
    """Return the folder that has the clock of a Jetson's GPU."""
    for pattern in ("gpu-gpc-*", "*.gpu", "*gpu*", "*ga10b*", "*gv11b*", "*gp10b*", "*gm20b*"):
        found = sorted(Path(root).glob("sys/class/devfreq/" + pattern))
        if found:
            return found[0]
    return None
