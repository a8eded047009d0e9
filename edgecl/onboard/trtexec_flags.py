"""The exact command lines of NVIDIA's trtexec for each version of TensorRT.

trtexec's defaults turned round between TensorRT 10.16 and 11.0 (CUDA graph, spinning and leaving transfers out
became the default), and its flags come and go. So every flag that decides a number is said, for the version at
hand, and the command is part of the record.

Source: NVIDIA/TensorRT, samples/common/sampleOptions.cpp of 8.2 to 11.1.
"""

import math
from typing import Any, Dict, List, NamedTuple

from .errors import DeviceError
from .versions import Version, bounds_of, holds

# What can be timed; the first is the headline.
MODES = ("compute, CUDA graph", "compute", "with transfers, CUDA graph", "with transfers")

DURATION_S = 60.0
WARMUP_S = 2.0
ITERATIONS = 1024
OLDEST = (8, 2)

ON_JETSON = "/usr/src/tensorrt/bin/trtexec"

# Versions from which a command line differs.
_MEMORY_POOLS = (8, 4)  # before: --workspace
# before: --buildOnly; also --infStreams, several percentiles, the optimization level
_SKIP_INFERENCE = (8, 6)
_STRONGLY_TYPED = (10, 12)  # weak typing is deprecated; precision flags conflict with --stronglyTyped
_OPPOSITE = (11, 0)  # no precision flags, no --stronglyTyped, the opposite switches
_FP16_SCALES = (10, 0)  # Q/DQ with fp16 scales: strongly typed from the start
_NO_DLA = (10, 8)  # until 11.4
_DLA_AGAIN = (11, 4)


def _lowest(versions: str) -> Version:
    """Return the lowest version of a range, from 8.2 on."""
    bounds = bounds_of(versions if versions[:1] in "<>=" else "==" + versions)
    lowest = max([bound for sign, bound in bounds if sign in ("==", ">=", ">")] or [OLDEST])
    if lowest > OLDEST:
        return lowest
    if not all(holds(OLDEST, sign, bound) for sign, bound in bounds):
        raise DeviceError(
            "edgecl knows trtexec from TensorRT 8.2 on, not %s" % versions,
            "JetPack 4.6.1 and later have 8.2: update the board",
        )
    return OLDEST


def lowest_version(versions: str) -> str:
    """Return the lowest version of a range that edgecl knows trtexec of, such as '10.3'."""
    return _dotted(_lowest(versions))


# --- command lines ---


class Net(NamedTuple):
    """What is built: an ONNX file of a bundle, and how.

    input is the manifest's (name, shape, dynamic_batch, max_batch), build the target's (workspace_mib,
    optimization_level, tf32, dla_core), precision fp32, fp16 or int8, form that of the graph, model the file.
    """

    input: Dict[str, Any]
    build: Dict[str, Any]
    precision: str
    form: str
    model: str


def command_lines(version: str, net: Net, plan: str) -> Dict[str, List[str]]:
    """Return the commands, build and bench, that build an engine and time it in the headline mode.

    Args:
        version: '10.3.0', or a range such as '>=10.3,<10.8', of which the lowest version counts.
        net: its model as the path is to stand in the command.
        plan: path of the engine.

    Raises:
        DeviceError: a version before 8.2, or one without DLA where DLA is asked for.
    """
    times, layers = _beside(plan, "times"), _beside(plan, "layers")
    bench = bench_command(version, net, plan, mode=MODES[0], times=times, layers=layers)
    return {"build": build_command(version, net, plan), "bench": bench}


def build_command(version: str, net: Net, plan: str) -> List[str]:
    """Return the command that builds an engine; see `command_lines`."""
    number = _lowest(version)
    command = ["trtexec", "--onnx=" + net.model, "--saveEngine=" + plan]
    if number >= _OPPOSITE:
        pass  # the types of the graph decide
    elif number >= _STRONGLY_TYPED or (net.form == "int8-trt-fp16" and number >= _FP16_SCALES):
        command.append("--stronglyTyped")
    elif net.form.startswith("int8"):
        command += ["--int8", "--fp16"]
    elif net.form == "fp16":
        command.append("--fp16")
    if not net.build.get("tf32", True):
        command.append("--noTF32")
    pools = "workspace:%d" % net.build["workspace_mib"]
    dla = _dla_flags(number, net)
    if dla:
        command += dla + ["--allowGPUFallback"]
        if number >= _DLA_AGAIN:
            command.append("--adjustForDLA")
        pools += ",dlaSRAM:1,dlaLocalDRAM:1024,dlaGlobalDRAM:512"
    if number >= _MEMORY_POOLS:
        command.append("--memPoolSize=" + pools)
    else:
        command.append("--workspace=%d" % net.build["workspace_mib"])
    if net.input["dynamic_batch"]:
        for name, batch in (("min", 1), ("opt", net.input["shape"][0]), ("max", net.input["max_batch"])):
            command.append("--%sShapes=%s" % (name, _shape(net, batch)))
    if number >= _SKIP_INFERENCE:
        command.append("--builderOptimizationLevel=%d" % net.build["optimization_level"])
    command.append("--profilingVerbosity=detailed")
    command.append("--skipInference" if number >= _SKIP_INFERENCE else "--buildOnly")
    return command


def bench_command(
    version: str,
    net: Net,
    plan: str,
    *,
    mode: str,
    duration_s: float = DURATION_S,
    times: str,
    layers: str,
) -> List[str]:
    """Return the command that times an engine in one of MODES, and writes the JSON files `times` and `layers`.

    duration_s is rounded up to whole seconds.
    """
    number = _lowest(version)
    several = number >= _SKIP_INFERENCE
    command = ["trtexec", "--loadEngine=" + plan] + _dla_flags(number, net)
    if net.input["dynamic_batch"]:  # a static net refuses to be told its shape
        command.append("--shapes=" + _shape(net, net.input["shape"][0]))
    command += [
        "--warmUp=%d" % round(1000 * WARMUP_S),
        "--duration=%d" % max(1, math.ceil(duration_s)),
        "--iterations=%d" % ITERATIONS,
        "--avgRuns=100",
        "--percentile=" + ("50,90,95,99" if several else "99"),
        "--infStreams=1" if several else "--streams=1",
        "--useSpinWait",
    ]
    # Since 11.0 the first of each pair is the default and does nothing; the second did not exist before.
    if "CUDA graph" in mode:
        command.append("--useCudaGraph")
    elif number >= _OPPOSITE:
        command.append("--noCudaGraph")
    if "transfers" not in mode:
        command.append("--noDataTransfers")
    elif number >= _OPPOSITE:
        command.append("--includeDataTransfers")
    return command + ["--separateProfileRun", "--exportTimes=" + times, "--exportLayerInfo=" + layers]


def _dla_flags(number: Version, net: Net) -> List[str]:
    core = net.build.get("dla_core")
    if core is None or net.precision == "fp32":
        return []  # DLA does not compute fp32
    if _NO_DLA <= number < _DLA_AGAIN:
        raise DeviceError(
            "TensorRT %s has no DLA; 8.2 to 10.7 have it, and 11.4 on AGX Orin" % _dotted(number),
            "leave 'build.dla_core' out of the target",
        )
    return ["--useDLACore=%d" % core]


def _shape(net: Net, batch: int) -> str:
    sides = [batch] + list(net.input["shape"][1:])
    return "%s:%s" % (net.input["name"], "x".join(str(side) for side in sides))


def _beside(plan: str, what: str) -> str:
    return "%s.%s.json" % (plan.partition(".plan")[0], what)


def _dotted(number: Version) -> str:
    return ".".join(str(part) for part in number)
