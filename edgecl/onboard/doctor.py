"""Check what would fail or spoil a measurement on this device, with the fix for each."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from .bundle import check_files, is_plain_file, read_manifest
from .device_info import read_device_info
from .device_state import Check, check, check_conditions, check_memory
from .devices import DEVICES
from .errors import OnboardError
from .runtimes import RUNTIMES
from .versions import version_fits

OLDEST_PYTHON = (3, 6)
SPARE_MIB = 64

# Imports a module in a process of its own: one built for another processor kills the process that imports it. The
# current folder is left out, since anything may lie beside a bundle.
_PROBE = """
import sys
sys.path = [path for path in sys.path if path]
import importlib, json
for hidden in sys.argv[2:]:
    sys.modules[hidden] = None
module = importlib.import_module(sys.argv[1])
if getattr(module, "__file__", None) is None:
    raise ImportError("there is a folder of that name, but no module in it")
print(json.dumps({"version": getattr(module, "__version__", None), "file": module.__file__}))
"""
_PROBE_S = 120.0


def doctor(
    bundle: Union[str, Path, None] = None,
    target: Optional[Dict[str, Any]] = None,
    root: Union[str, Path] = "/",
) -> Dict[str, Any]:
    """Check this device for a bundle or a target, or as such.

    Nothing is changed, no root is needed, and NumPy may be missing. Of a bundle its own target counts.

    Returns:
        ok, False if a check failed; device, its device_info; checks, each
        with name, status ("ok", "warn", "fail"), found, and fix where there is one.
    """
    root = Path(root)
    device_info = read_device_info(threads=None, versions={}, root=root)
    kind = device_info["kind"]
    checks: List[Optional[Check]] = [_check_python(), _check_numpy()]
    manifest: Optional[Dict[str, Any]] = None
    if bundle is not None:
        try:
            manifest = read_manifest(bundle)
            target = manifest.get("target") or {"runtime": manifest["runtime"]}
            check_files(bundle, manifest)
            checks.append(check("bundle", "ok", "%d files match their hashes" % len(manifest["files"])))
        except OnboardError as error:
            checks.append(check("bundle", "fail", error.problem, error.hint))
    if target is None:
        checks += [_check_any_runtime(), check_memory(root, 0)]
    else:
        checks.append(_check_device(kind, target))
        checks += _check_precisions(kind, target, manifest)
        checks += check_runtime(root, target, jetson=kind is not None)
        checks.append(check_memory(root, _workspace_mib(target)))
    checks.append(_check_disk(bundle, manifest))
    checks += check_conditions(root, device_info)
    checks.append(_check_rails(root, jetson=kind is not None))
    done = [one for one in checks if one]
    return {"ok": all(one["status"] != "fail" for one in done), "device": device_info, "checks": done}


def _check_python() -> Check:
    found = "%s, %s" % (".".join(str(part) for part in sys.version_info[:3]), sys.executable)
    if sys.version_info < OLDEST_PYTHON:
        return check("Python", "fail", found, "run it with Python %d.%d or newer" % OLDEST_PYTHON)
    return check("Python", "ok", found)


def probe(module: str, hidden: Sequence[str] = ()) -> Dict[str, Any]:
    """Import a module in a process of its own, without the hidden ones; return its version and file, or the error.

    error is what was printed, crashed whether the process was killed while importing, by an illegal instruction say.
    """
    command = [sys.executable, "-c", _PROBE, module, *hidden]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=nothing, stdout=pipe, stderr=pipe, timeout=_PROBE_S)
    except subprocess.TimeoutExpired:
        return {"error": "importing it took over %.0f s" % _PROBE_S, "crashed": False}
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode == 0 and lines:
        about: Dict[str, Any] = json.loads(lines[-1])
        return about
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"error": "importing it was ended by %s" % name, "crashed": True}
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return {"error": words[-1] if words else "importing it ended with %d" % done.returncode, "crashed": False}


def _check_numpy() -> Check:
    seen = probe("numpy")
    if "error" not in seen:
        return check("NumPy", "ok", str(seen["version"]))
    fix = "sudo apt install python3-numpy"
    if seen["crashed"]:
        fix = "export OPENBLAS_CORETYPE=ARMV8  # or: " + fix
    return check("NumPy", "fail", seen["error"], fix)


def _check_any_runtime() -> Check:
    seen = {name: probe(runtime.module, runtime.hidden) for name, runtime in RUNTIMES.items()}
    found = ["%s %s" % (name, about["version"]) for name, about in seen.items() if "error" not in about]
    if found:
        return check("runtimes", "ok", ", ".join(found))
    install = "install one, such as: " + RUNTIMES["onnxruntime"].install
    return check("runtimes", "warn", "none of %s" % ", ".join(RUNTIMES), install)


def _check_device(kind: Optional[str], target: Dict[str, Any]) -> Optional[Check]:
    """Check the kind of device against the one a target is for."""
    wanted = target.get("device")
    if wanted not in DEVICES or wanted == "cpu":
        return None
    title = DEVICES[wanted].title
    if wanted == "gpu":
        if kind is None:
            return None  # whether there is a GPU shows with the CUDA runtime
        fix = "export with a target for this board, such as --target jetson (`edgecl ls targets`)"
        return check("device", "fail", "%s; the target is for %s" % (DEVICES[kind].title, title), fix)
    if kind is None:
        found = "this is no Jetson; the target is for %s" % title
        return check("device", "fail", found, "run it on the board: --host USER@BOARD")
    here = DEVICES[kind]
    same = here.compute_capability == DEVICES[wanted].compute_capability
    if kind == wanted or (DEVICES[wanted].dla_cores is None and same):
        return check("device", "ok", here.title)
    found = "%s; the target is for %s" % (here.title, title)
    fix = "export with a target for this board (`edgecl ls targets`)"
    return check("device", "warn" if same else "fail", found, fix)


def _check_precisions(
    kind: Optional[str], target: Dict[str, Any], manifest: Optional[Dict[str, Any]]
) -> List[Optional[Check]]:
    """Check what a bundle or target asks against what the device's GPU computes."""
    runtime = RUNTIMES.get(target["runtime"])
    if kind is None or runtime is None or runtime.on_host:
        return []
    here = DEVICES[kind]
    asked = list(manifest["precisions"] if manifest else target.get("precisions", ()))
    default = manifest["precision"] if manifest else (asked[0] if asked else None)
    lacking = [precision for precision in asked if precision not in here.precisions]
    checks: List[Optional[Check]] = []
    if lacking:
        able = [precision for precision in asked if precision in here.precisions]
        status = "fail" if default in lacking or not able else "warn"
        found = "%s does not compute %s" % (here.title, ", ".join(lacking))
        fix = "run it with --precision %s" % able[0] if able else "export again with --precision fp16"
        checks.append(check("precision", status, "%s; it has %s" % (found, ", ".join(here.precisions)), fix))
    elif asked:
        checks.append(check("precision", "ok", "%s of %s" % (", ".join(asked), ", ".join(here.precisions))))
    core, cores = (target.get("build") or {}).get("dla_core"), here.dla_cores
    if core is not None and cores is not None and core >= cores:
        found = "asked for core %d; %s has %d DLA cores" % (core, here.title, cores)
        checks.append(check("DLA", "fail", found, "export with a target that has no build.dla_core"))
    elif core is not None:
        checks.append(check("DLA", "ok", "core %d" % core))
    return checks


def check_runtime(root: Path, target: Dict[str, Any], *, jetson: bool) -> List[Optional[Check]]:
    """Check the runtime a target is for: that it imports, its version, and what its record adds."""
    name, versions = target["runtime"], target.get("versions") or ""
    if name not in RUNTIMES:
        return [check("runtime", "fail", "nothing runs '%s'" % name, "use the onboard.pyz of the bundle")]
    runtime = RUNTIMES[name]
    seen = probe(runtime.module, runtime.hidden)
    if "error" in seen:
        fix = runtime.fix_import(root, jetson) if runtime.fix_import else runtime.install
        found = check(name, "fail", "cannot be imported: %s" % seen["error"], fix)
    elif seen["version"] and not version_fits(seen["version"], versions):
        words = "%s; the target is for %s" % (seen["version"], versions)
        fix = "export with a target for %s (`edgecl ls targets`), or install a version it is for"
        found = check(name, "fail", words, fix % seen["version"])
    else:
        found = check(name, "ok", "%s%s" % (seen["version"], ", for %s" % versions if versions else ""))
    return [found, *(runtime.checks(root, target) if runtime.checks else ())]


def _workspace_mib(target: Dict[str, Any]) -> int:
    runtime = RUNTIMES.get(target["runtime"])
    if runtime is None or not runtime.builds_engines:
        return 0
    return int((target.get("build") or {}).get("workspace_mib", 0))


def _check_disk(bundle: Union[str, Path, None], manifest: Optional[Dict[str, Any]]) -> Optional[Check]:
    """Fail where the engines of a bundle, as large as its nets at most, and a record would not fit."""
    place = Path(bundle) if bundle is not None and Path(bundle).is_dir() else Path.home()
    needed_mib = SPARE_MIB
    if manifest is not None and bundle is not None:
        models = [place / about["model"] for about in manifest["precisions"].values()]
        needed_mib += 2 * sum(path.stat().st_size for path in models if is_plain_file(path)) >> 20
    try:
        free_mib = shutil.disk_usage(str(place)).free >> 20
    except OSError:
        return None
    found = "%d MiB free for %d" % (free_mib, needed_mib)
    if free_mib < needed_mib:
        return check("disk", "fail", found, "free some space in %s" % place)
    if not os.access(str(place), os.W_OK):
        found = "%s cannot be written: engines are not kept" % place
        return check("disk", "warn", found, "copy the bundle elsewhere")
    return check("disk", "ok", found)


def _check_rails(root: Path, *, jetson: bool) -> Optional[Check]:
    """Warn of a Jetson whose energy cannot be measured."""
    from .power import find_rails

    names = [rail.name for rail in find_rails(root)]
    if names:
        return check("power rails", "ok", ", ".join(names))
    if not jetson:
        return None
    if shutil.which("tegrastats"):
        return check("power rails", "ok", "by tegrastats")
    return check(
        "power rails",
        "warn",
        "no INA3221 monitor and no tegrastats: no energy is measured",
        "run it on the board itself and not in a container, or start that with -v /sys:/sys:ro",
    )
