"""What this device is: processor, board, memory, clocks' governor, load, versions."""

import os
import platform
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Union

# Arm's numbers for its cores (the "CPU part" of /proc/cpuinfo), for implementer 0x41, and NVIDIA's own, 0x4e.
_CORES = {
    ("0x41", "0xb76"): "ARM1176",
    ("0x41", "0xc07"): "Cortex-A7",
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd0d"): "Cortex-A77",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd46"): "Cortex-A510",
    ("0x41", "0xd47"): "Cortex-A710",
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


def read_passport(
    *,
    threads: Optional[int],
    versions: Mapping[str, str],
    root: Union[str, Path] = "/",
    machine: Optional[str] = None,
    cores: Optional[int] = None,
) -> Dict[str, Any]:
    """Return what this device is; whatever it does not tell is None.

    Args:
        threads: how many threads the runner was given.
        versions: library -> version.
        root: where /proc, /sys and /etc lie.
        machine: the instruction set, if not this machine's.
        cores: how many cores the process may run on, if not this process.
    """
    root = Path(root)
    cpuinfo = _text(root / "proc/cpuinfo") or ""
    board = _text(root / "proc/device-tree/model") or _text(root / "sys/firmware/devicetree/base/model")
    cpu_model = _cpu_model(cpuinfo)
    machine = machine or platform.machine()
    return {
        "name": board or _short(cpu_model) or machine,
        "board": board,
        "cpu_model": cpu_model,
        "machine": machine,
        "cores": cores or available_cores(),
        "cores_present": len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or None,
        "core_quota": _core_quota(root),
        "threads": threads,
        "governor": _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_1m": _load(root),
        "memory_mib": _memory_mib(root, "MemTotal"),
        "memory_available_mib": _memory_mib(root, "MemAvailable"),
        "os": _os_name(root),
        "kernel": _text(root / "proc/sys/kernel/osrelease"),
        "l4t": _l4t(root),
        "python": platform.python_version(),
        "versions": dict(versions),
    }


def _text(path: Path) -> Optional[str]:
    """Return a file's text without the zero byte of the device tree, or None where there is none."""
    try:
        return path.read_bytes().decode("utf-8", "replace").replace("\x00", "").strip() or None
    except OSError:
        return None


def _values(cpuinfo: str, key: str) -> List[str]:
    return re.findall(r"^%s[ \t]*:[ \t]*(.+?)[ \t]*$" % key, cpuinfo, re.MULTILINE)


def _cpu_model(cpuinfo: str) -> Optional[str]:
    """Return the processor's name: the kinds of Arm cores where they are told, else the model name."""
    kinds: List[str] = []
    for processor in re.split(r"\n\s*\n", cpuinfo):
        implementer, part = _values(processor, "CPU implementer"), _values(processor, "CPU part")
        if not implementer or not part:
            continue
        numbers = (implementer[-1].lower(), part[-1].lower())
        kind = _CORES.get(numbers, "Arm core %s/%s" % numbers)
        if kind not in kinds:
            kinds.append(kind)
    if kinds:
        return " + ".join(kinds)
    names = _values(cpuinfo, "model name")
    return names[0] if names else None


def _short(cpu_model: Optional[str]) -> Optional[str]:
    """Return a processor's name without trade marks and nominal clock."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", cpu_model or "", flags=re.IGNORECASE)
    return " ".join(name.split()) or None


def _load(root: Path) -> Optional[float]:
    text = _text(root / "proc/loadavg")
    return float(text.split()[0]) if text else None


def _memory_mib(root: Path, key: str) -> Optional[int]:
    found = re.search(r"^%s:\s*(\d+) kB" % key, _text(root / "proc/meminfo") or "", re.MULTILINE)
    return int(found.group(1)) // 1024 if found else None


def _os_name(root: Path) -> Optional[str]:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)"?', _text(root / "etc/os-release") or "", re.MULTILINE)
    return found.group(1) if found else None


def _l4t(root: Path) -> Optional[str]:
    """Return the release of Linux for Tegra, such as '36.4.3', on a Jetson."""
    text = _text(root / "etc/nv_tegra_release")
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text or "")
    return "%s.%s" % found.groups() if found else text


def _core_quota(root: Path) -> Optional[float]:
    """Return how many cores' time a container grants this process, or None where there is no limit."""
    group = root / "sys/fs/cgroup"
    unified = _text(group / "cpu.max")
    if unified:
        quota, period = unified.split()[:2]
    else:
        quota = _text(group / "cpu/cpu.cfs_quota_us") or "max"
        period = _text(group / "cpu/cpu.cfs_period_us") or "100000"
    return None if quota in ("max", "-1") else round(int(quota) / int(period), 2)
