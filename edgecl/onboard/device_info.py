"""What this device is: board, module, processor, power mode, clocks, temperatures, fan, memory, load, versions.

All of it is read from files that anybody may read; nothing is started, and no library is loaded for it.
"""

import os
import platform
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from .devices import device_of_module, jetpack_of_l4t
from .sysfs import found_in, gpu_folder, memory_mib, power_modes, read_number, read_text, thermal_zones
from .versions import numbers_of

# Arm's numbers for its cores (the "CPU part" of /proc/cpuinfo), for implementer 0x41, and NVIDIA's own, 0x4e.
_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd83"): "Neoverse-V3AE",
    ("0x4e", "0x003"): "Denver 2",
    ("0x4e", "0x004"): "Carmel",
}


def available_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_device_info(
    *, threads: Optional[int], versions: Mapping[str, str], root: Union[str, Path] = "/"
) -> Dict[str, Any]:
    """Return what this device is, read below `root`; whatever it does not tell is None."""
    root = Path(root)
    l4t = _l4t(root)
    cpuinfo = read_text(root / "proc/cpuinfo") or ""
    board = read_text(root / "proc/device-tree/model")
    cpu_model = _cpu_model(cpuinfo)
    machine = platform.machine()
    load = found_in(root / "proc/loadavg", r"^(\S+)")
    driver = found_in(root / "proc/driver/nvidia/version", r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s")
    return {
        "name": board or _short(cpu_model) or machine,
        "board": board,
        # The part number, which the board's name may not tell: of carrier board + module.
        "module": found_in(root / "proc/device-tree/compatible", r"\+(p\d{4}-\d{4})"),
        "kind": device_of_module(board) if board else None,
        "gpu": _gpu_names(root),
        "cpu_model": cpu_model,
        "machine": machine,
        "cores": available_cores(),
        "cores_present": len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or None,
        "core_quota": _core_quota(root),
        "threads": threads,
        "governor": read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_1m": float(load) if load else None,
        "memory_mib": memory_mib(root, "MemTotal"),
        "memory_available_mib": memory_mib(root, "MemAvailable"),
        "os": found_in(root / "etc/os-release", r'^PRETTY_NAME="?([^"\n]*)"?'),
        "kernel": read_text(root / "proc/sys/kernel/osrelease"),
        "l4t": l4t,
        "jetpack": jetpack_of_l4t(l4t) if l4t else None,
        "tensorrt": versions.get("tensorrt") or _tensorrt(root),
        "cuda": _cuda(root),
        "driver": driver or read_text(root / "sys/module/nvidia/version"),
        "power_mode": _power_mode(root),
        "clocks": {"before": read_clocks(root), "after": None},
        "temperatures_c": {"before": read_temperatures(root), "after": None},
        "fan": _fan(root),
        "python": platform.python_version(),
        "versions": dict(versions),
    }


def add_state_after(device_info: Dict[str, Any], root: Union[str, Path] = "/") -> None:
    """Complete a device-info record with the clocks and temperatures of now."""
    device_info["clocks"]["after"] = read_clocks(root)
    device_info["temperatures_c"]["after"] = read_temperatures(root)


def read_clocks(root: Union[str, Path] = "/") -> Dict[str, Any]:
    """Return the clocks at this moment, in MHz; what is not told is None.

    Returns:
        cpu: mhz of each core, the least min_mhz and largest max_mhz they may take, and locked: each core has one.
        gpu: mhz, min_mhz, max_mhz, locked.
        emc_mhz: of the memory, which some systems tell to root only.
        locked: True where both are, as after `jetson_clocks`; None where neither is told.
    """
    root = Path(root)
    cpu, gpu = _cpu_clocks(root), _gpu_clocks(root)
    told = [one["locked"] for one in (cpu, gpu) if one]
    return {"cpu": cpu, "gpu": gpu, "emc_mhz": _emc_mhz(root), "locked": all(told) if told else None}


def read_temperatures(root: Union[str, Path] = "/") -> Dict[str, float]:
    """Return the temperature of each thermal zone in degrees Celsius; a zone that is switched off has none."""
    found: Dict[str, float] = {}
    for zone in thermal_zones(root):
        degrees = read_number(zone / "temp")
        name = read_text(zone / "type") or zone.name
        if degrees is None or name.startswith("PMIC"):  # a constant 100 on Jetson Nano and TX2
            continue
        found[name if name not in found else "%s (%s)" % (name, zone.name)] = round(degrees / 1000, 1)
    return found


def _values(cpuinfo: str, key: str) -> List[str]:
    return re.findall(r"^%s[ \t]*:[ \t]*(.+?)[ \t]*$" % key, cpuinfo, re.MULTILINE)


def _cpu_model(cpuinfo: str) -> Optional[str]:
    """Return the processor's name: the kinds of Arm cores where they are told, else the model name."""
    kinds: Dict[str, None] = {}  # in their order
    for processor in re.split(r"\n\s*\n", cpuinfo):
        implementer, part = _values(processor, "CPU implementer"), _values(processor, "CPU part")
        if implementer and part:
            numbers = (implementer[-1].lower(), part[-1].lower())
            kinds[_CORES.get(numbers, "Arm core %s/%s" % numbers)] = None
    if kinds:
        return " + ".join(kinds)
    names = _values(cpuinfo, "model name")
    return names[0] if names else None


def _short(cpu_model: Optional[str]) -> Optional[str]:
    """Return a processor's name without trade marks and nominal clock."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", cpu_model or "", flags=re.IGNORECASE)
    return " ".join(name.split()) or None


def _gpu_names(root: Path) -> Optional[List[str]]:
    """Return the names of the GPUs of NVIDIA's driver for PCs and servers."""
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    names = [found_in(path, r"^Model:\s*(.+?)\s*$") for path in files]
    return [name for name in names if name] or None


def _tensorrt(root: Path) -> Optional[str]:
    """Return the version in the name of the installed library; loading it would take its memory too."""
    versions = []
    for folder in ("lib/aarch64-linux-gnu", "lib/x86_64-linux-gnu", "lib64", "local/tensorrt/lib"):
        for path in (root / "usr" / folder).glob("libnvinfer.so.*"):
            numbers = numbers_of(path.name[len("libnvinfer.so.") :])
            if len(numbers) >= 3:
                versions.append(numbers)
    return ".".join(map(str, max(versions))) if versions else None


def _cuda(root: Path) -> Optional[str]:
    folder = root / "usr/local/cuda"
    version = found_in(folder / "version.json", r'"cuda"\s*:\s*\{[^{}]*"version"\s*:\s*"([^"]*)"')
    return version or found_in(folder / "version.txt", r"CUDA Version (\S+)")  # CUDA 10


def _power_mode(root: Path) -> Optional[Dict[str, Any]]:
    """Return the power mode of a Jetson: its id, and its name as the board's own table has it."""
    mode = found_in(root / "var/lib/nvpmodel/status", r"pmode:(\d+)")
    if not mode:
        return None
    number = int(mode)
    # The number means another mode on another board: only this board's table names it. Where none is chosen, the
    # tables of all boards must agree.
    tables = [root / "etc/nvpmodel.conf"]
    if not tables[0].is_file():
        tables = sorted((root / "etc/nvpmodel").glob("*.conf"))
    modes = [mode for table in tables for mode in power_modes(read_text(table) or "")]
    names = {name for one, name in modes if one == number}
    return {"id": number, "name": names.pop() if len(names) == 1 else None}


def _cpu_clocks(root: Path) -> Optional[Dict[str, Any]]:
    folders = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")
    current: List[Optional[float]] = []
    limits: List[Tuple[int, int]] = []
    for folder in sorted(folders, key=lambda folder: int(folder.parent.name[3:])):
        least, most = read_number(folder / "scaling_min_freq"), read_number(folder / "scaling_max_freq")
        if least is not None and most is not None:
            current.append(_mhz(read_number(folder / "scaling_cur_freq"), 1e3))
            limits.append((least, most))
    if not limits:
        return None
    return {
        "mhz": current,
        "min_mhz": _mhz(min(least for least, _ in limits), 1e3),
        "max_mhz": _mhz(max(most for _, most in limits), 1e3),
        "locked": all(least == most for least, most in limits),
    }


def _gpu_clocks(root: Path) -> Optional[Dict[str, Any]]:
    folder = gpu_folder(root)
    if folder is None:
        return None
    current, least, most = (read_number(folder / ("%s_freq" % which)) for which in ("cur", "min", "max"))
    clocks: Dict[str, Any] = {
        "mhz": _mhz(current, 1e6),
        "min_mhz": _mhz(least, 1e6),
        "max_mhz": _mhz(most, 1e6),
    }
    return dict(clocks, locked=least is not None and least == most)


def _mhz(clock: Optional[int], unit: float) -> Optional[float]:
    return None if clock is None else round(clock / unit, 3)


def _emc_mhz(root: Path) -> Optional[float]:
    for place in ("bpmp/debug/clk/emc/rate", "clk/emc/clk_rate", "tegra_bwmgr/emc_rate"):
        clock = read_number(root / "sys/kernel/debug" / place)
        if clock is not None:
            return _mhz(clock, 1e6)
    return None


def _fan(root: Path) -> Optional[Dict[str, Optional[int]]]:
    """Return the fan's duty, 0 to 255, and its speed in turns per minute."""
    found: Dict[str, Optional[int]] = {"pwm": None, "rpm": None}
    monitors = "sys/class/hwmon/hwmon*/"
    for key, patterns in (
        ("pwm", (monitors + "pwm1", "sys/devices/pwm-fan/cur_pwm")),
        ("rpm", (monitors + "rpm", monitors + "fan1_input", "sys/devices/pwm-fan/rpm_measured")),
    ):
        paths = [path for pattern in patterns for path in sorted(root.glob(pattern))]
        numbers = [number for number in (read_number(path) for path in paths) if number is not None]
        found[key] = numbers[0] if numbers else None
    return found if any(number is not None for number in found.values()) else None


def _l4t(root: Path) -> Optional[str]:
    """Return the release of Linux for Tegra, such as '36.4.3', on a Jetson."""
    text = read_text(root / "etc/nv_tegra_release")
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text or "")
    return "%s.%s" % found.groups() if found else text


def _core_quota(root: Path) -> Optional[float]:
    """Return how many cores' time a container grants this process, or None where there is no limit."""
    group = root / "sys/fs/cgroup"
    unified = read_text(group / "cpu.max")
    if unified:
        quota, period = unified.split()[:2]
    else:
        quota = read_text(group / "cpu/cpu.cfs_quota_us") or "max"
        period = read_text(group / "cpu/cpu.cfs_period_us") or "100000"
    return None if quota in ("max", "-1") else round(int(quota) / int(period), 2)
