"""What of a device's state would spoil a measurement or make it fail: clocks, heat, memory, load, rails.

Every check reads files below a root and gives `{"name", "status", "found", "fix"}`; status is "ok", "warn" or
"fail". A check that does not apply to the device, or that the device tells nothing about, gives None.
"""

import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .sysfs import memory_mib, power_modes, read_number, read_text, trips

Check = Dict[str, Any]
DeviceInfo = Dict[str, Any]

# Closer to its limit than this, in degrees Celsius, a zone may throttle within the minute a measurement takes.
NEAR_TRIP_C = 10.0
# A fan at rest is worth a word above this.
WARM_C = 60.0
# What the libraries of a runtime need beside the net and the workspace, in MiB.
LEAST_MEMORY_MIB = 300
SWAPPED_MIB = 256
DESKTOPS = ("gnome-shell", "Xorg", "Xwayland", "lxsession", "compiz", "lightdm", "gdm3", "plasmashell")


def check(name: str, status: str, found: str, fix: Optional[str] = None) -> Check:
    """Return one check's result."""
    return {"name": name, "status": status, "found": found, "fix": fix}


def check_conditions(root: Path, device_info: DeviceInfo) -> List[Check]:
    """Return every check of the device's state that applies to it."""
    jetson = device_info["kind"] is not None
    found = [
        check_power_mode(root, device_info),
        check_gpu_clock(device_info),
        check_cpu_clock(device_info),
        check_temperature(root, device_info),
        check_fan(device_info),
        check_swap(root),
        check_desktop(root) if jetson else None,
        check_load(device_info),
        check_quota(device_info),
    ]
    return [one for one in found if one]


def highest_power_mode(table: str) -> Optional[Tuple[int, str]]:
    """Return number and name of the mode of an nvpmodel.conf with the most power: MAXN_SUPER, MAXN, else the most watts."""

    def rank(mode: Tuple[int, str]) -> Tuple[int, float]:
        name = mode[1].upper()
        watts = re.search(r"(\d+(?:\.\d+)?)W", name)
        if "MAXN" in name:
            return (2 if "SUPER" in name else 1), 0.0
        return 0, float(watts.group(1)) if watts else -1.0

    return max(power_modes(table), key=rank, default=None)


def check_power_mode(root: Path, device_info: DeviceInfo) -> Optional[Check]:
    """Warn of a power mode below the highest."""
    highest = highest_power_mode(read_text(root / "etc/nvpmodel.conf") or "")
    if highest is None:
        return None
    current = device_info["power_mode"]
    fix = "sudo nvpmodel -m %d  # %s" % highest
    if current is None:
        return check("power mode", "warn", "not told; see `nvpmodel -q`", fix)
    name = current["name"] or "number %d" % current["id"]
    if current["id"] == highest[0]:
        return check("power mode", "ok", name)
    return check("power mode", "warn", "%s, the highest is %s" % (name, highest[1]), fix)


def check_gpu_clock(device_info: DeviceInfo) -> Optional[Check]:
    """Warn of a GPU clock that moves."""
    gpu = device_info["clocks"]["before"]["gpu"]
    if gpu is None or gpu["max_mhz"] is None:
        return None
    if gpu["locked"]:
        return check("GPU clock", "ok", "locked at %.0f MHz" % gpu["max_mhz"])
    moves = "moves from %.0f to %.0f MHz" % (gpu["min_mhz"] or 0.0, gpu["max_mhz"])
    return check("GPU clock", "warn", moves, "sudo jetson_clocks")


def check_cpu_clock(device_info: DeviceInfo) -> Optional[Check]:
    """Warn of processor clocks that follow the load."""
    cpu, governor = device_info["clocks"]["before"]["cpu"], device_info["governor"]
    if cpu is not None and cpu["locked"]:
        return check("CPU clock", "ok", "locked at %.0f MHz" % cpu["max_mhz"])
    if governor is None:
        return None
    if governor == "performance":
        return check("CPU clock", "ok", "governor performance")
    fix = "sudo jetson_clocks" if device_info["kind"] else "sudo cpupower frequency-set -g performance"
    return check("CPU clock", "warn", "governor %s: it follows the load" % governor, fix)


def check_temperature(root: Path, device_info: DeviceInfo) -> Optional[Check]:
    """Warn of a zone close to where it makes the clocks fall, fail at it."""
    zones = [
        ((limit - now) / 1000, name, now / 1000, limit / 1000)
        for name, file, kind, limit in trips(root)
        for now in [read_number(file)]
        if kind in ("passive", "hot", "critical") and now is not None and not name.startswith("PMIC")
    ]
    nearest = min(zones, default=None)
    if nearest is not None and nearest[0] < NEAR_TRIP_C:
        status = "fail" if nearest[0] <= 0 else "warn"
        found = "%s is at %.0f C, clocks fall at %.0f C" % nearest[1:]
        return check("temperature", status, found, "let it cool; sudo jetson_clocks --fan")
    degrees = device_info["temperatures_c"]["before"]
    if not degrees:
        return None
    hottest = max(degrees, key=lambda zone: float(degrees[zone]))
    return check("temperature", "ok", "%.0f C at most (%s)" % (degrees[hottest], hottest))


def check_fan(device_info: DeviceInfo) -> Optional[Check]:
    """Warn of a fan that rests on a warm board."""
    fan = device_info["fan"]
    if fan is None or fan["pwm"] is None:
        return None
    if fan["pwm"] == 0 and max(device_info["temperatures_c"]["before"].values(), default=0.0) > WARM_C:
        return check("fan", "warn", "at rest on a warm board", "sudo jetson_clocks --fan")
    return check("fan", "ok", "at %d of 255" % fan["pwm"])


def check_swap(root: Path) -> Optional[Check]:
    """Warn of a device that swaps."""
    total, free = memory_mib(root, "SwapTotal"), memory_mib(root, "SwapFree")
    if total is None or free is None:
        return None
    used = "%d of %d MiB in use" % (total - free, total)
    if total - free > SWAPPED_MIB:
        return check("swap", "warn", used, "close other programs, or reboot")
    return check("swap", "ok", used)


def check_desktop(root: Path) -> Optional[Check]:
    """Warn of a desktop, which takes memory and GPU time."""
    names = {read_text(process) or "" for process in (root / "proc").glob("[0-9]*/comm")}
    running = sorted(names.intersection(DESKTOPS))
    if not running:
        return check("desktop", "ok", "none")
    return check(
        "desktop",
        "warn",
        "%s: it takes memory and GPU time" % ", ".join(running),
        "sudo systemctl isolate multi-user.target  # back: graphical.target",
    )


def check_load(device_info: DeviceInfo) -> Optional[Check]:
    """Warn of a busy processor."""
    load, cores = device_info["load_1m"], device_info["cores"]
    if load is None:
        return None
    busy = load > max(0.5 * cores, 1.0)
    fix = "stop other programs" if busy else None
    return check("load", "warn" if busy else "ok", "%.2f on %d cores" % (load, cores), fix)


def check_quota(device_info: DeviceInfo) -> Optional[Check]:
    """Warn of a container that grants less time than it shows cores."""
    quota, cores = device_info["core_quota"], device_info["cores"]
    if quota is None or quota >= cores:
        return None
    return check(
        "core quota",
        "warn",
        "the container grants the time of %g cores and shows %d" % (quota, cores),
        "ask for %d threads at most (--threads), or start the container without a limit" % max(int(quota), 1),
    )


def check_memory(root: Path, workspace_mib: int) -> Optional[Check]:
    """Fail where a net can hardly be loaded, warn where a builder gets less memory than its target states."""
    available = memory_mib(root, "MemAvailable")
    if available is None:
        return None
    found = "%d MiB available" % available
    fix = "close the desktop (sudo systemctl isolate multi-user.target) and other programs"
    if available < LEAST_MEMORY_MIB:
        return check("memory", "fail", found, fix + ", or add swap")
    if available < 2 * workspace_mib:  # the builder takes half of what is free at most
        wanted = "%s, so the engine builder gets %d of %d MiB" % (found, available // 2, workspace_mib)
        return check("memory", "warn", wanted, fix)
    return check("memory", "ok", found)
