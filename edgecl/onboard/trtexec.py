"""NVIDIA's trtexec: find it, build and time an engine with it, and read what it wrote and printed.

Its command lines are made in `trtexec_flags`. Times come from the JSON file of `--exportTimes`, one entry per
run; the summary that it prints is a fallback, without samples.

Sources: NVIDIA/TensorRT, samples/common/sampleReporting.cpp; public logs of 8.2, 8.6, 10.x and 11.1.
"""

import hashlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from .bundle import choose_precision, engine_name, is_plain_file, read_plain, sha256_of_file, write_whole
from .errors import DeviceError
from .layers import Layer, check_delivered, count_precisions, precision_shares, read_layers
from .runtime import Report
from .trtexec_flags import (
    DURATION_S,
    ITERATIONS,
    MODES,
    ON_JETSON,
    WARMUP_S,
    Net,
    bench_command,
    build_command,
)
from .versions import version_fits

_PLACES = ("usr/src/tensorrt/bin/trtexec", "opt/tensorrt/bin/trtexec", "usr/local/tensorrt/bin/trtexec")
_INSTALL = (
    "on a Jetson it is %s, from the package libnvinfer-bin (`sudo apt install libnvinfer-bin`); no pip package "
    "holds it; elsewhere set TRTEXEC to its path" % ON_JETSON
)

# Both are trtexec's own ideas; 2.5 % is ours, its threshold changes with the version.
UNSTABLE_PERCENT = 2.5
ENQUEUE_BOUND = 0.8

NOT_CHECKED = "precision not checked"
"""The mark of an engine whose layers do not tell what they compute in."""

BUILD_LIMIT_S = 3600.0
RUN_LIMIT_S = 600.0
"""Beyond the asked duration: loading, warming up, and nets too slow for the iterations."""


# --- what it printed and wrote ---


def version_of_banner(text: str) -> Optional[str]:
    """Return the version that trtexec's output names: '[TensorRT v8201]' is 8.2.1, '[TensorRT v100300]' 10.3.0."""
    found = re.search(r"\[TensorRT v(\d+(?:\.\d+)*)\]", text)
    if found and "." not in found.group(1) and len(found.group(1)) >= 4:
        digits = found.group(1)
        # One digit for the minor version before TensorRT 9, two since.
        major, minor, patch = (
            (digits[0], digits[1], digits[2:])
            if len(digits) == 4
            else (digits[:-4], digits[-4:-2], digits[-2:])
        )
        return "%d.%d.%d" % (int(major), int(minor), int(patch))
    found = found or re.search(r"TensorRT version: (\d+(?:\.\d+)+)", text)
    return ".".join(found.group(1).split(".")[:3]) if found else None


_NUMBER = r"([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_METRIC = re.compile(r"\[I\] ([A-Z][\w\- ]*?): (min = .*)$", re.MULTILINE)
_ERROR = re.compile(r"^(?:\[[^\]]*\] )?\[E\] (.*)$", re.MULTILINE)


def read_summary(text: str) -> Dict[str, Dict[str, float]]:
    """Return the performance summary of a log: metric -> min, max, mean, median, p90 ... in milliseconds.

    With several summaries in one log, the last one counts. 'Throughput' -> {'qps'}; 'coefficient of variance'
    -> {'percent'} where the log warns of it.
    """
    summary: Dict[str, Dict[str, float]] = {}
    for name, values in _METRIC.findall(text):
        found = {key: float(number) for key, number in re.findall(r"(\w+) = %s ms" % _NUMBER, values)}
        for percentile, number in re.findall(r"percentile\(%s%%\) = %s ms" % (_NUMBER, _NUMBER), values):
            found["p%g" % float(percentile)] = float(number)
        summary[name] = found
    for number in re.findall(r"Throughput: %s qps" % _NUMBER, text):
        summary["Throughput"] = {"qps": float(number)}
    for number in re.findall(
        r"GPU compute time is unstable, with coefficient of variance = %s%%" % _NUMBER, text
    ):
        summary["coefficient of variance"] = {"percent": float(number)}
    return summary


def read_times(path: Union[str, Path]) -> Optional[Dict[str, "np.ndarray[Any, Any]"]]:
    """Return what `--exportTimes` wrote: compute, latency and enqueue, each (N,) milliseconds of one query.

    enqueue is absent where the version does not write it. None where the file is not there or holds no times.
    """
    try:
        queries = json.loads(Path(path).read_bytes().decode("utf-8"))
        times = {
            "compute": np.array([query["computeMs"] for query in queries], dtype=np.float64),
            "latency": np.array([query["latencyMs"] for query in queries], dtype=np.float64),
        }
        if queries and all("startEnqMs" in query for query in queries):
            enqueue = [query["endEnqMs"] - query["startEnqMs"] for query in queries]
            times["enqueue"] = np.array(enqueue, dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = len(times["compute"]) > 0 and all(np.isfinite(values).all() for values in times.values())
    return times if whole else None


def marks_of(
    text: str, summary: Dict[str, Dict[str, float]], times: Optional[Dict[str, "np.ndarray[Any, Any]"]]
) -> List[str]:
    """Return what casts doubt on a run: 'summary only', 'unstable', 'enqueue bound', 'no CUDA graph'."""
    marks = []
    if times is None:
        marks.append("summary only")
        percent = summary.get("coefficient of variance", {}).get("percent", 0.0)
        enqueue = summary.get("Enqueue Time", {}).get("median")
        compute = summary.get("GPU Compute Time", {}).get("median")
    else:
        percent = 100 * float(times["compute"].std() / times["compute"].mean())
        enqueue = float(np.median(times["enqueue"])) if "enqueue" in times else None
        compute = float(np.median(times["compute"]))
    if percent > UNSTABLE_PERCENT:
        marks.append("unstable")
    if enqueue is not None and compute is not None and enqueue > ENQUEUE_BOUND * compute:
        marks.append("enqueue bound")
    if re.search(r"CUDA graph capture.*failed|not permitted under CUDA graph capture", text):
        marks.append("no CUDA graph")
    return marks


# --- running it ---


def find_trtexec(root: Union[str, Path] = "/") -> str:
    """Return the path of trtexec: TRTEXEC where it is set, NVIDIA's folders under `root`, then the PATH.

    Raises:
        DeviceError: it is in none of them.
    """
    named = os.environ.get("TRTEXEC")
    if named:
        found = shutil.which(named)
        if found:
            return found
        raise DeviceError("TRTEXEC is '%s', which is no program" % named, _INSTALL)
    for place in _PLACES:
        path = Path(root) / place
        if os.access(str(path), os.X_OK):
            return str(path)
    found = shutil.which("trtexec") if str(root) == "/" else None
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
    bundle: Union[str, Path],
    manifest: Dict[str, Any],
    *,
    precision: Optional[str] = None,
    duration_s: float = DURATION_S,
    modes: Sequence[str] = MODES,
    trtexec: Optional[str] = None,
    root: Union[str, Path] = "/",
    report: Optional[Report] = None,
) -> Dict[str, Any]:
    """Build an engine with trtexec, or take the one it built here before, and time it in each mode.

    Args:
        bundle: the directory; its files checked by `check_files`.
        manifest: of the bundle.
        precision: the bundle's default where None.
        duration_s: seconds to sample for, rounded up to whole ones; 1,024 runs at least.
        modes: of MODES.
        trtexec: its path, if not the one that `find_trtexec` finds.
        root: where /usr and /proc lie.
        report: called with a line on what begins.

    Returns:
        describe: as a session's; engine holds file, sha256, build_s (None for one built before), layers and
        precision_checked: whether they were enough to check the precision; where not,
        every mode has the mark 'precision not checked'.
        modes: name -> samples_s (`array` of seconds per inference; None with the mark 'summary only', where
        latency_ms holds the summary's percentiles instead), throughput_per_s as trtexec counts it (inferences),
        enqueue_p50_ms, duration_s, window ((from, to) of `time.monotonic()` around the timed runs, None where
        the log came in one piece), marks and command.

    Raises:
        DeviceError: no trtexec, or it fails: its own words are in the problem. Or the engine does not compute in
            the precision; it is deleted then.
        BundleError: the bundle does not hold that precision.
    """
    bundle = Path(bundle)
    precision, about = choose_precision(manifest, precision)
    program = trtexec or find_trtexec(root)
    version = trtexec_version(program)
    versions = str(manifest["target"].get("versions") or "")
    net = Net(manifest["input"], manifest["target"]["build"], precision, about["form"], about["model"])
    say = report or (lambda line: None)
    marks = [] if version_fits(version, versions) else ["outside the target's versions"]
    with tempfile.TemporaryDirectory(prefix="edgecl-trtexec-") as scratch:
        timed = _TimedEngine(
            bundle, net, about, Path(scratch), program=program, version=version, root=root, say=say
        )
        measured = {mode: timed.measure(mode, duration_s) for mode in modes}
        engine = timed.describe()
    if not timed.checked:
        say("%s: the engine does not tell the precision of its layers" % precision)
    for found in measured.values():
        found["marks"] = marks + found["marks"] + ([] if timed.checked else [NOT_CHECKED])
    settings = {
        "build": command_text(timed.build_words),
        "warmup_s": WARMUP_S,
        "iterations": ITERATIONS,
        "spin_wait": True,
        "input": "random",
    }
    describe = {
        "runtime": "trtexec %s" % version,
        "precision": precision,
        "threads": None,
        "versions": {"tensorrt": version},
        "settings": settings,
        "engine": engine,
    }
    return {"describe": describe, "modes": measured}


class _TimedEngine:
    """The engine of one precision, and the files that timing it writes into a scratch folder."""

    def __init__(
        self,
        bundle: Path,
        net: Net,
        about: Dict[str, Any],
        scratch: Path,
        *,
        program: str,
        version: str,
        root: Union[str, Path],
        say: Report,
    ) -> None:
        self._bundle, self._net, self._about, self._scratch = bundle, net, about, scratch
        self._program, self._version, self._root, self._say = program, version, root, say
        self._home = bundle if os.access(str(bundle), os.W_OK) else scratch
        self._build()

    def _build(self) -> None:
        self._layers: List[Layer] = []
        self.checked = False
        self._plan, self.build_words, self._build_s = _engine(
            self._bundle,
            self._home,
            self._net,
            program=self._program,
            version=self._version,
            root=self._root,
            say=self._say,
        )

    def measure(self, mode: str, duration_s: float) -> Dict[str, Any]:
        """Time the engine in a mode, and check the precision of its layers the first time."""
        self._say("%s, %s: timing with trtexec" % (self._net.precision, mode))
        times, info = self._scratch / "times.json", self._scratch / "layers.json"

        def run() -> Tuple[List[str], _Run]:
            command = bench_command(
                self._version,
                self._net,
                str(self._plan),
                mode=mode,
                duration_s=duration_s,
                times=str(times),
                layers=str(info),
            )
            return command, _run_whole([self._program] + command[1:], limit_s=RUN_LIMIT_S + duration_s)

        try:
            command, done = run()
        except DeviceError:
            if self._build_s is not None:
                raise
            _forget(self._plan)  # one built before: a driver or a board may have changed under it
            self._build()
            command, done = run()
        if not self.checked:
            self._layers = _layers_of(info)
            self.checked = _check_precision(
                self._layers,
                self._net.precision,
                self._about,
                self._plan,
                maker="trtexec %s" % self._version,
            )
        words = [
            word.replace(str(self._plan), self._plan.name).replace("%s/" % self._scratch, "")
            for word in command
        ]
        found = dict(_measured(done, times, mode), command=command_text(words))
        if times.exists():
            times.unlink()
        return found

    def describe(self) -> Dict[str, Any]:
        """Return what the record says of the engine."""
        return {
            "file": self._plan.name,
            "sha256": sha256_of_file(self._plan),
            "build_s": self._build_s,
            "layers": count_precisions(self._layers) if self._layers else None,
            "precision_checked": self.checked,
        }


def command_text(command: Iterable[str]) -> str:
    """Return a command as a line to paste into a shell."""
    return " ".join(shlex.quote(word) for word in command)


def _engine(
    bundle: Path, home: Path, net: Net, *, program: str, version: str, root: Union[str, Path], say: Report
) -> Tuple[Path, List[str], Optional[float]]:
    """Return an engine, the command that builds it, and the seconds that took, None for one built before."""
    model = str((bundle / net.model).resolve())
    words = build_command(version, net, "engine.plan")
    told = words + [version, sha256_of_file(model), _gpu(Path(root))]
    key = hashlib.sha256("\n".join(told).encode("utf-8")).hexdigest()
    plan = home.resolve() / engine_name(net.precision, "trtexec-%s-%s" % (version, key[:12]))
    if is_plain_file(plan):
        problem = _problem_of(plan)
        if not problem:
            return plan, words, None
        say("building '%s' again: %s" % (plan.name, problem))
    part = plan.with_name(plan.name + ".part")
    say("%s: building an engine with trtexec" % net.precision)
    try:
        command = build_command(version, net._replace(model=model), str(part))
        run = _run_whole([program] + command[1:], limit_s=BUILD_LIMIT_S)
        if not part.is_file():
            raise DeviceError("trtexec built no engine and named no error", "run it by hand: trtexec.sh")
        record = {"sha256": sha256_of_file(part), "size_bytes": part.stat().st_size}
        part.replace(plan)
        write_whole(_record_of(plan), json.dumps(record, sort_keys=True).encode("ascii"))
    finally:
        if part.exists():
            part.unlink()
    return plan, words, round(run.seconds, 3)


def _record_of(plan: Path) -> Path:
    return plan.with_suffix(".json")


def _problem_of(plan: Path) -> str:
    """Return what is wrong with an engine that was kept, which is nothing where it is as it was built."""
    try:
        expected = json.loads(read_plain(_record_of(plan)).decode("ascii"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its record is missing or damaged"
    return "" if sha256_of_file(plan) == expected else "the file changed since it was built"


def _forget(plan: Path) -> None:
    for path in (plan, _record_of(plan)):
        if path.exists():
            path.unlink()


def _check_precision(
    layers: Sequence[Layer], precision: str, about: Dict[str, Any], plan: Path, *, maker: str
) -> bool:
    """Check the precision of an engine, as `check_delivered` does, and delete one that does not deliver it."""
    expected = 1.0
    decision = about.get("decision") or {}
    if precision == "int8" and decision.get("candidates"):
        # Nodes that int8 would harm stay in a wider type.
        expected -= len(decision.get("kept_nodes") or ()) / decision["candidates"]
    try:
        return check_delivered(precision_shares(layers), precision, expected=expected, maker=maker)
    except DeviceError:
        _forget(plan)
        raise


def _gpu(root: Path) -> str:
    """Return what tells this device's GPU from another's, as far as files say."""
    paths = [root / "proc/device-tree/model"] + sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    return "\n".join(path.read_bytes().decode("utf-8", "replace") for path in paths if path.is_file())


def _measured(run: "_Run", times_file: Path, mode: str) -> Dict[str, Any]:
    summary, times = read_summary(run.text), read_times(times_file)
    metric = "Latency" if "transfers" in mode else "GPU Compute Time"
    found: Dict[str, Any] = {
        "samples_s": None,
        "latency_ms": None,
        "enqueue_p50_ms": None,
        "duration_s": None,
    }
    found["throughput_per_s"] = summary.get("Throughput", {}).get("qps")
    found["marks"] = marks_of(run.text, summary, times)
    if times is not None:
        values = times["latency" if "transfers" in mode else "compute"]
        found["samples_s"] = array("d", values / 1e3)
        if "enqueue" in times:
            found["enqueue_p50_ms"] = round(float(np.median(times["enqueue"])), 6)
    elif metric in summary:
        said = summary[metric]
        names = {"p50": "median", "p90": "p90", "p99": "p99", "mean": "mean", "min": "min", "max": "max"}
        found["latency_ms"] = {name: said.get(word) for name, word in names.items()}
        found["enqueue_p50_ms"] = summary.get("Enqueue Time", {}).get("median")
    else:
        raise DeviceError("trtexec reported no times", "run it by hand: trtexec.sh")
    trace = re.search(r"Timing trace has (\d+) queries over %s s" % _NUMBER, run.text)
    if trace:
        found["duration_s"] = float(trace.group(2))
    found["window"] = run.window(found["duration_s"])
    return found


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


def _run_whole(command: Sequence[str], *, limit_s: float) -> _Run:
    """Run trtexec; a failure is an error in its own words.

    Raises:
        DeviceError: it cannot be started, fails, is killed, or does not end.
    """
    run = _run(command, limit_s=limit_s)
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
    raise DeviceError(
        "trtexec failed with exit status %d: %s" % (run.status, words),
        "run it by hand: %s" % command_text(command),
    )


def _run(command: Sequence[str], *, limit_s: float) -> _Run:
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as exc:
        raise DeviceError("'%s' cannot be started: %s" % (command[0], exc), _INSTALL) from exc
    assert process.stdout is not None
    lines: List[Tuple[float, str]] = []
    pending = b""
    try:
        with process.stdout as output:
            while True:
                left_s = limit_s - (time.monotonic() - begin)
                if left_s <= 0 or not select.select([output.fileno()], [], [], left_s)[0]:
                    raise DeviceError(
                        "trtexec did not end within %g s" % limit_s,
                        "run it by hand: %s" % command_text(command),
                    )
                block = os.read(output.fileno(), 65536)
                if not block:
                    break
                now = time.monotonic()
                whole = (pending + block).split(b"\n")
                pending = whole.pop()
                lines += [(now, line.decode("utf-8", "replace").rstrip("\r")) for line in whole]
        process.wait(timeout=60)
    except subprocess.TimeoutExpired as exc:
        raise DeviceError("trtexec closed its output but did not end", "run it by hand") from exc
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if pending:
        lines.append((time.monotonic(), pending.decode("utf-8", "replace")))
    text = "\n".join(line for _, line in lines)
    return _Run(process.returncode, text, lines, time.monotonic() - begin)
