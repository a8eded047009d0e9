"""NVIDIA's trtexec: find it, build and time an engine with it, and read what it wrote and printed.

Its command lines are made in `trtexec_flags`. Times come from the JSON file of `--exportTimes`, one entry per run.

Sources: NVIDIA/TensorRT, samples/common/sampleReporting.cpp; public logs of 8.2, 8.6, 10.x and 11.1.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from array import array
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from .bundle import choose_precision, sha256_of_file
from .errors import DeviceError
from .layers import Layer, check_delivered, count_precisions, precision_shares, read_layers
from .runtime import Report
from .trtexec_flags import ITERATIONS, MODES, ON_JETSON, WARMUP_S, Net, bench_command, build_command
from .versions import version_fits

_INSTALL = (
    "on a Jetson it is %s, from the package libnvinfer-bin (`sudo apt install libnvinfer-bin`); no pip package "
    "holds it; elsewhere set TRTEXEC to its path" % ON_JETSON
)
_BY_HAND = "run it by hand: trtexec.sh"

# Both are trtexec's own ideas; 2.5 % is ours, its threshold changes with the version.
UNSTABLE_PERCENT = 2.5
ENQUEUE_BOUND = 0.8

NOT_CHECKED = "precision not checked"
"""The mark of an engine whose layers do not tell what they compute in."""

BUILD_LIMIT_S = 3600.0
RUN_LIMIT_S = 600.0
"""Beyond the asked duration: loading, warming up, and nets too slow for the iterations."""

_ERROR = re.compile(r"^(?:\[[^\]]*\] )?\[E\] (.*)$", re.MULTILINE)

Times = Dict[str, "np.ndarray[Any, Any]"]


# --- what it printed and wrote ---


def version_of_banner(text: str) -> Optional[str]:
    """Return the version that trtexec's output names: '[TensorRT v8201]' is 8.2.1, '[TensorRT v100300]' 10.3.0."""
    found = re.search(r"\[TensorRT v(\d+(?:\.\d+)*)\]", text)
    if found and "." not in found.group(1) and len(found.group(1)) >= 4:
        digits = found.group(1)
        # One digit for the minor version before TensorRT 9, two since.
        at = (1, 2) if len(digits) == 4 else (-4, -2)
        return "%d.%d.%d" % (int(digits[: at[0]]), int(digits[at[0] : at[1]]), int(digits[at[1] :]))
    found = found or re.search(r"TensorRT version: (\d+(?:\.\d+)+)", text)
    return ".".join(found.group(1).split(".")[:3]) if found else None


def number_in(text: str, before: str, after: str) -> Optional[float]:
    """Return the last number between two patterns of a log, or None where there is none."""
    found = re.findall(before + r"([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)" + after, text)
    return float(found[-1]) if found else None


def read_times(path: Path) -> Times:
    """Return what `--exportTimes` wrote: compute, latency and enqueue, each (N,) milliseconds of one query.

    enqueue is absent where the version does not write it.

    Raises:
        DeviceError: the file is not there or holds no times.
    """
    try:
        queries = json.loads(path.read_bytes().decode("utf-8"))
        times = {
            "compute": np.array([query["computeMs"] for query in queries], dtype=np.float64),
            "latency": np.array([query["latencyMs"] for query in queries], dtype=np.float64),
        }
        if queries and all("startEnqMs" in query for query in queries):
            enqueue = [query["endEnqMs"] - query["startEnqMs"] for query in queries]
            times["enqueue"] = np.array(enqueue, dtype=np.float64)
        if not queries or not all(np.isfinite(values).all() for values in times.values()):
            raise ValueError("no times")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DeviceError("trtexec reported no times", _BY_HAND) from exc
    return times


def marks_of(text: str, times: Times) -> List[str]:
    """Return what casts doubt on a run: 'unstable', 'enqueue bound', 'no CUDA graph'."""
    compute, marks = times["compute"], []
    if 100 * compute.std() / compute.mean() > UNSTABLE_PERCENT:
        marks.append("unstable")
    if "enqueue" in times and np.median(times["enqueue"]) > ENQUEUE_BOUND * np.median(compute):
        marks.append("enqueue bound")
    if re.search(r"CUDA graph capture.*failed|not permitted under CUDA graph capture", text):
        marks.append("no CUDA graph")
    return marks


# --- running it ---


def find_trtexec(root: Union[str, Path] = "/") -> str:
    """Return the path of trtexec: TRTEXEC where it is set, JetPack's place under `root`, then the PATH.

    Raises:
        DeviceError: it is in none of them.
    """
    named = os.environ.get("TRTEXEC")
    if named:
        found = shutil.which(named)
        if found:
            return str(Path(found).resolve())
        raise DeviceError("TRTEXEC is '%s', which is no program" % named, _INSTALL)
    usual = str(root).rstrip("/") + ON_JETSON
    if os.access(usual, os.X_OK):
        return usual
    found = shutil.which("trtexec")
    if found:
        return found
    raise DeviceError("there is no trtexec on this device", _INSTALL)


def trtexec_version(trtexec: str) -> str:
    """Return the version of TensorRT that a trtexec belongs to, such as '10.3.0'.

    Raises:
        DeviceError: it cannot be started, hangs, or does not say.
    """
    run = _run([trtexec, "--help"], limit_s=60.0)  # --version came late, and fails for want of a model
    version = version_of_banner(run.text)
    if version is None:
        words = (run.text.strip().splitlines() or ["nothing"])[-1]
        raise DeviceError("'%s' does not say its version, but: %s" % (trtexec, words), _INSTALL)
    return version


def measure_with_trtexec(
    bundle: Union[str, Path], manifest: Dict[str, Any], *, precision: str, duration_s: float, report: Report
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Build an engine with trtexec, and time it in each mode, 1,024 runs at least; it is not kept.

    Returns:
        as a session's `describe`; engine holds sha256, build_s, layers and precision_checked.
        mode -> samples_s (`array` of seconds per inference), throughput_per_s as trtexec counts it (inferences),
        enqueue_p50_ms, duration_s, window ((from, to) of `time.monotonic()` around the timed runs, None where
        the log came in one piece), marks and command.

    Raises:
        DeviceError: no trtexec, or it fails, or the engine does not compute in the precision.
        BundleError: the bundle does not hold that precision.
    """
    about = choose_precision(manifest, precision)[1]
    program = find_trtexec()
    version = trtexec_version(program)
    maker = "trtexec %s" % version
    net = Net(manifest["input"], manifest["target"]["build"], precision, about["form"], about["model"])
    fits = version_fits(version, manifest["target"].get("versions") or "")
    modes: Dict[str, Any] = {}
    layers: List[Layer] = []
    with tempfile.TemporaryDirectory(prefix="edgecl-trtexec-") as name:
        folder = Path(name)
        plan, times_file = folder / "engine.plan", folder / "times.json"
        report("%s: building an engine with trtexec" % precision)
        model = str((Path(bundle) / net.model).resolve())
        command = build_command(version, net._replace(model=model), plan.name)
        build_s = _run_whole(program, command, limit_s=BUILD_LIMIT_S, folder=folder).seconds
        if not plan.is_file():
            raise DeviceError("trtexec built no engine and named no error", _BY_HAND)
        checked = False
        for mode in MODES:
            report("%s, %s: timing with trtexec" % (precision, mode))
            command = bench_command(
                version,
                net,
                plan.name,
                mode=mode,
                duration_s=duration_s,
                times=times_file.name,
                layers="layers.json",
            )
            run = _run_whole(program, command, limit_s=RUN_LIMIT_S + duration_s, folder=folder)
            if not modes:
                layers = _layers_of(folder / "layers.json")
                shares, expected = precision_shares(layers), _expected_share(precision, about)
                checked = check_delivered(shares, precision, expected=expected, maker=maker)
            modes[mode] = dict(_measured(run, read_times(times_file), mode), command=command_text(command))
            times_file.unlink()
        engine = {
            "file": None,
            "sha256": sha256_of_file(plan),
            "build_s": round(build_s, 3),
            "layers": count_precisions(layers) if layers else None,
            "precision_checked": checked,
        }
    if not checked:
        report("%s: the engine does not tell the precision of its layers" % precision)
    for found in modes.values():
        found["marks"] = ([] if fits else ["outside the target's versions"]) + found["marks"]
        found["marks"] += [] if checked else [NOT_CHECKED]
    settings = {
        "build": command_text(build_command(version, net, plan.name)),
        "warmup_s": WARMUP_S,
        "iterations": ITERATIONS,
        "spin_wait": True,
        "input": "random",
    }
    about = {"runtime": maker, "versions": {"tensorrt": version}, "settings": settings, "engine": engine}
    return about, modes


def command_text(command: Iterable[str]) -> str:
    """Return a command as a line to paste into a shell."""
    return " ".join(shlex.quote(word) for word in command)


def _expected_share(precision: str, about: Dict[str, Any]) -> float:
    """Return the share of the layers that the graph asks for in the precision: nodes that int8 would harm stay wider."""
    decision = about.get("decision") or {}
    if precision != "int8" or not decision.get("candidates"):
        return 1.0
    return float(1 - len(decision.get("kept_nodes") or ()) / decision["candidates"])


def _measured(run: "_Run", times: Times, mode: str) -> Dict[str, Any]:
    enqueue = times.get("enqueue")
    duration_s = number_in(run.text, r"Timing trace has \d+ queries over ", " s")
    return {
        "samples_s": array("d", times["latency" if "transfers" in mode else "compute"] / 1e3),
        "throughput_per_s": number_in(run.text, "Throughput: ", " qps"),
        "enqueue_p50_ms": None if enqueue is None else round(float(np.median(enqueue)), 6),
        "duration_s": duration_s,
        "window": run.window(duration_s),
        "marks": marks_of(run.text, times),
    }


def _layers_of(info: Path) -> List[Layer]:
    """Return the engine's layers as trtexec wrote them, or none where it wrote none that can be read."""
    try:
        layers = read_layers(info.read_bytes().decode("utf-8", "replace"))
    except (OSError, ValueError):
        return []
    return layers if all(isinstance(layer, (str, dict)) for layer in layers) else []


class _Run(NamedTuple):
    """A run that ended: its exit status, its output, when each line came, and how long it took."""

    status: int
    text: str
    lines: List[Tuple[float, str]]
    seconds: float

    def window(self, duration_s: Optional[float]) -> Optional[Tuple[float, float]]:
        """Return from when to when the timed runs ran, or None where the lines' times do not show it."""
        start = next((at for at, line in self.lines if "Starting inference" in line), None)
        end = next(
            (at for at, line in self.lines if "Warmup completed" in line or "Timing trace has" in line), None
        )
        if start is None or end is None or duration_s is None or end - duration_s < start:
            return None  # written in one piece: the lines came long after they were printed
        return end - duration_s, end


def _run_whole(program: str, command: Sequence[str], *, limit_s: float, folder: Path) -> _Run:
    """Run a command of trtexec in a folder; a failure is an error in its own words."""
    run = _run([program, *command[1:]], limit_s=limit_s, folder=folder)
    if run.status == 0 and "&&&& FAILED" not in run.text:
        return run
    errors = [line.strip() for line in _ERROR.findall(run.text)]
    unknown = [line for line in errors if line.startswith("Unknown option")]
    if unknown:
        flag = unknown[0].split(":", 1)[-1].strip().split(" ")[0]
        raise DeviceError(
            "trtexec %s does not know %s" % (version_of_banner(run.text) or "", flag),
            "edgecl's table of flags is wrong for this version; please report it, with the output of trtexec --help",
        )
    if run.status < 0:
        raise DeviceError(
            "trtexec was killed by %s" % signal.Signals(-run.status).name,
            "often the memory is full: close other programs, or lower 'build.workspace_mib' in the target",
        )
    words = "; ".join(errors[-3:]) or (run.text.strip().splitlines() or ["it said nothing"])[-1]
    raise DeviceError("trtexec failed with exit status %d: %s" % (run.status, words), _BY_HAND)


def _run(command: Sequence[str], *, limit_s: float, folder: Optional[Path] = None) -> _Run:
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=None if folder is None else str(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as exc:
        raise DeviceError("'%s' cannot be started: %s" % (command[0], exc), _INSTALL) from exc
    late = threading.Timer(limit_s, process.kill)
    late.start()
    with process:
        try:
            assert process.stdout is not None
            lines = [
                (time.monotonic(), line.decode("utf-8", "replace").rstrip("\r\n")) for line in process.stdout
            ]
            process.wait()
        finally:
            late.cancel()
            process.kill()  # only what an exception left running
    seconds = time.monotonic() - begin
    if seconds >= limit_s:
        raise DeviceError("trtexec did not end within %g s" % limit_s, _BY_HAND)
    return _Run(process.returncode, "\n".join(line for _, line in lines), lines, seconds)
