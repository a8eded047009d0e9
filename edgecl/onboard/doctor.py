"""Say what would fail or spoil a measurement on this device before it does, and how to mend it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from .bundle import check_files, is_plain_file, read_manifest
from .device_info import read_device_info
from .device_state import Check, check, check_conditions, check_memory
from .devices import DEVICES
from .errors import OnboardError
from .versions import version_fits

RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
OLDEST_PYTHON = (3, 6)
SPARE_MIB = 64

# Says of a module what it is, in a process of its own: a module built for another processor kills the one that imports it.
# See `runtimes.openvino.import_openvino` for the telemetry.
_PROBE = """
import importlib, json, sys
sys.modules["openvino_telemetry"] = None
module = importlib.import_module(sys.argv[1])
if getattr(module, "__file__", None) is None:
    raise ImportError("there is a folder of that name, but no module in it")
about = {"version": getattr(module, "__version__", None), "file": module.__file__}
if hasattr(module, "get_available_providers"):
    about["providers"] = module.get_available_providers()
print(json.dumps(about))
"""
_PROBE_S = 120.0

_INSTALL = {
    "onnxruntime": "pip install onnxruntime",
    "openvino": "pip install openvino",
    "tensorrt": "pip install tensorrt",
    "tensorrt_rtx": "pip install tensorrt-rtx",
}


def doctor(
    bundle: Union[str, Path, None] = None,
    target: Optional[Dict[str, Any]] = None,
    root: Union[str, Path] = "/",
) -> Dict[str, Any]:
    """Check this device for a bundle or a target, or as such.

    Nothing is changed, no root is needed, and NumPy may be missing.

    Args:
        bundle: a directory; its own target counts, and its files are held to their hashes.
        target: a target as JSON, where there is no bundle.
        root: where /proc, /sys, /etc, /usr and /var lie.

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
        checks.append(_check_any_runtime())
    else:
        checks.append(_check_device(kind, target))
        checks += _check_precisions(kind, target, manifest)
        checks += check_runtime(root, target, jetson=kind is not None)
        checks.append(check_memory(root, _workspace_mib(target)))
    if target is None:
        checks.append(check_memory(root, 0))
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


def probe(module: str) -> Dict[str, Any]:
    """Import a module in a process of its own; return its version, file and providers, or the error.

    error is what was said, crashed whether the process was killed while importing, by an illegal instruction say.
    """
    # Beside a bundle may lie anything: what is imported must not come from where we happen to stand.
    command = [sys.executable, "-c", "import sys; sys.path = [p for p in sys.path if p];" + _PROBE, module]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=_PROBE_S,
        )
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
    seen = {name: probe(name) for name in RUNTIMES}
    found = ["%s %s" % (name, about["version"]) for name, about in seen.items() if "error" not in about]
    if found:
        return check("runtimes", "ok", ", ".join(found))
    return check(
        "runtimes",
        "warn",
        "none of %s" % ", ".join(RUNTIMES),
        "pip install onnxruntime; on a Jetson sudo apt install python3-libnvinfer",
    )


def _check_device(kind: Optional[str], target: Dict[str, Any]) -> Optional[Check]:
    """Hold the kind of device to the one a target is for."""
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
        return check(
            "device",
            "fail",
            "this is no Jetson; the target is for %s" % title,
            "run it on the board: --host USER@BOARD",
        )
    here = DEVICES[kind]
    if kind == wanted or (
        DEVICES[wanted].dla_cores is None and here.compute_capability == DEVICES[wanted].compute_capability
    ):
        return check("device", "ok", here.title)
    same = here.compute_capability == DEVICES[wanted].compute_capability
    return check(
        "device",
        "warn" if same else "fail",
        "%s; the target is for %s" % (here.title, title),
        "export with a target for this board (`edgecl ls targets`)",
    )


def _check_precisions(
    kind: Optional[str], target: Dict[str, Any], manifest: Optional[Dict[str, Any]]
) -> List[Optional[Check]]:
    """Hold what a bundle or target asks to what the device computes."""
    if kind is None or target["runtime"] in ("onnxruntime", "openvino"):
        return []
    here = DEVICES[kind]
    asked = list(manifest["precisions"] if manifest else target.get("precisions", ()))
    default = manifest["precision"] if manifest else (asked[0] if asked else None)
    lacking = [precision for precision in asked if precision not in here.precisions]
    checks: List[Optional[Check]] = []
    if lacking:
        able = [precision for precision in asked if precision in here.precisions]
        checks.append(
            check(
                "precision",
                "fail" if default in lacking or not able else "warn",
                "%s does not compute %s; it has %s"
                % (here.title, ", ".join(lacking), ", ".join(here.precisions)),
                "run it with --precision %s" % able[0] if able else "export again with --precision fp16",
            )
        )
    elif asked:
        checks.append(check("precision", "ok", "%s of %s" % (", ".join(asked), ", ".join(here.precisions))))
    core = (target.get("build") or {}).get("dla_core")
    if core is not None:
        cores = here.dla_cores
        if cores is not None and core >= cores:
            fix = "export with a target that has no build.dla_core"
            checks.append(
                check(
                    "DLA", "fail", "asked for core %d; %s has %d DLA cores" % (core, here.title, cores), fix
                )
            )
        else:
            checks.append(check("DLA", "ok", "core %d" % core))
    return checks


def check_runtime(root: Path, target: Dict[str, Any], *, jetson: bool) -> List[Optional[Check]]:
    """Hold the runtime a target is for to what is installed: it imports, its version, its libraries."""
    runtime, versions = target["runtime"], target.get("versions") or ""
    if runtime not in RUNTIMES:
        return [check("runtime", "fail", "nothing runs '%s'" % runtime, "use the onboard.pyz of the bundle")]
    seen = probe(runtime)
    if "error" in seen:
        checks: List[Optional[Check]] = [
            check(
                runtime,
                "fail",
                "cannot be imported: %s" % seen["error"],
                _fix_import(root, runtime, jetson=jetson),
            )
        ]
    elif seen["version"] and not version_fits(seen["version"], versions):
        checks = [
            check(
                runtime,
                "fail",
                "%s; the target is for %s" % (seen["version"], versions),
                "export with a target for %s (`edgecl ls targets`), or install a version it is for"
                % seen["version"],
            )
        ]
    else:
        found = "%s%s" % (seen["version"], ", for %s" % versions if versions else "")
        checks = [check(runtime, "ok", found)]
    if runtime == "onnxruntime" and "error" not in seen:
        checks.append(_check_providers(seen.get("providers") or [], target, jetson=jetson))
    if runtime.startswith("tensorrt"):
        checks += _check_cuda(target)
    if runtime == "tensorrt":
        checks.append(_check_trtexec(root))
    return checks


def _fix_import(root: Path, runtime: str, *, jetson: bool) -> str:
    """Return how to get a runtime that does not import."""
    if runtime != "tensorrt":
        return _INSTALL[runtime]
    folders = (
        "usr/lib/python3*/dist-packages",
        "usr/lib/python3/dist-packages",
        "usr/local/lib/python3*/dist-packages",
    )
    bindings = [path for folder in folders for path in root.glob(folder + "/tensorrt/__init__.py")]
    if bindings and sys.prefix != getattr(sys, "base_prefix", sys.prefix):
        return (
            "the system's python3 has it, this virtual environment does not see it: make it with "
            "`python3 -m venv --system-site-packages DIR`, or use /usr/bin/python3"
        )
    if bindings:
        return "the system's own python3 has it: use /usr/bin/python3"
    libraries = [
        path for folder in ("usr/lib/*", "usr/local/lib") for path in root.glob(folder + "/libnvinfer.so*")
    ]
    if libraries:
        return "sudo apt install python3-libnvinfer  # the library is there, Python's part is not"
    return "sudo apt install nvidia-jetpack" if jetson else _INSTALL[runtime]


def _check_providers(providers: List[str], target: Dict[str, Any], *, jetson: bool) -> Check:
    """Warn where a target for a GPU meets an ONNX Runtime without one."""
    found = ", ".join(name.replace("ExecutionProvider", "") for name in providers)
    if target.get("device", "cpu") == "cpu":
        if "CPUExecutionProvider" not in providers:
            return check("onnxruntime providers", "fail", found or "none", _INSTALL["onnxruntime"])
        return check("onnxruntime providers", "ok", found)
    if "CUDAExecutionProvider" in providers:
        return check("onnxruntime providers", "ok", found)
    fix = "pip install onnxruntime-gpu in place of onnxruntime"
    if jetson:
        fix = "install an onnxruntime-gpu wheel built for this JetPack; the package index has none for Jetson"
    title = DEVICES[target["device"]].title if target["device"] in DEVICES else target["device"]
    return check("onnxruntime providers", "fail", "%s; the target is for %s" % (found or "none", title), fix)


def _check_cuda(target: Dict[str, Any]) -> List[Optional[Check]]:
    """Fail without a GPU that CUDA can use, and for one that the bundle's engines are not compiled for."""
    try:
        from .cudart import Cudart
    except ImportError:  # NumPy, which has its own check
        return []
    try:
        cuda = Cudart()
        gpu = cuda.gpu()
    except OnboardError as error:
        return [check("CUDA", "fail", error.problem.partition(";")[0], error.hint)]
    checks: List[Optional[Check]] = [check("CUDA", "ok", "%s, %s" % (gpu.name, cuda.path))]
    checks.append(check_capability(gpu.compute_capability, target))
    return checks


def check_capability(capability: str, target: Dict[str, Any]) -> Optional[Check]:
    """Hold a GPU's compute capability, such as '8.6', to those that engines were compiled for ahead of time."""
    compiled = list((target.get("build") or {}).get("compute_capabilities") or ())
    if not compiled:
        return None
    here = "SM" + capability.replace(".", "")
    if here in compiled:
        return check("GPU", "ok", here)
    return check(
        "GPU",
        "fail",
        "%s; the engines are for %s" % (here, ", ".join(compiled)),
        "add it to build.compute_capabilities of a target if TensorRT for RTX knows it, or use --target tensorrt",
    )


def _check_trtexec(root: Path) -> Check:
    program = shutil.which("trtexec")
    usual = root / "usr/src/tensorrt/bin/trtexec"
    if program or usual.is_file():
        return check("trtexec", "ok", program or str(usual))
    return check(
        "trtexec",
        "warn",
        "not found: --runtime trtexec will not work, all else will",
        "sudo apt install libnvinfer-bin",
    )


def _workspace_mib(target: Dict[str, Any]) -> int:
    if not target["runtime"].startswith("tensorrt"):
        return 0
    return int((target.get("build") or {}).get("workspace_mib", 0))


def _check_disk(bundle: Union[str, Path, None], manifest: Optional[Dict[str, Any]]) -> Optional[Check]:
    """Fail where the engines of a bundle, as large as its nets at most, and a record would not fit."""
    place = Path(bundle) if bundle is not None and Path(bundle).is_dir() else Path.home()
    needed_mib = SPARE_MIB
    if manifest is not None and bundle is not None:
        sizes = [
            (place / about["model"]).stat().st_size
            for about in manifest["precisions"].values()
            if is_plain_file(place / about["model"])
        ]
        needed_mib += 2 * sum(sizes) >> 20
    try:
        free_mib = shutil.disk_usage(str(place)).free >> 20
    except OSError:
        return None
    found = "%d MiB free for %d" % (free_mib, needed_mib)
    if free_mib < needed_mib:
        return check("disk", "fail", found, "free some space in %s" % place)
    if not os.access(str(place), os.W_OK):
        return check(
            "disk", "warn", "%s cannot be written: engines are not kept" % place, "copy the bundle elsewhere"
        )
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
