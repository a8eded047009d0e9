"""Build a TensorRT engine from ONNX: TensorRT 8.2 to 11 on the device, TensorRT for RTX ahead of time, by one path.

What a version may lack is looked up by name; what every version has is type-checked against the official API.
"""

import importlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Union

from .errors import BundleError, DeviceError, cannot_import
from .layers import (
    Layer,
    check_delivered,
    histogram,
    layers_of_log,
    layers_of_network,
    precision_shares,
)
from .runtime import Report
from .runtimes import RUNTIMES
from .versions import Version, numbers_of

if TYPE_CHECKING:
    import tensorrt

    class Trt:
        """What `tensorrt` and `tensorrt_rtx` both have."""

        __version__: str
        Builder = tensorrt.Builder
        BuilderFlag = tensorrt.BuilderFlag
        DeviceType = tensorrt.DeviceType
        Dims4 = tensorrt.Dims4
        ILogger = tensorrt.ILogger
        MemoryPoolType = tensorrt.MemoryPoolType
        NetworkDefinitionCreationFlag = tensorrt.NetworkDefinitionCreationFlag
        OnnxParser = tensorrt.OnnxParser
        ProfilingVerbosity = tensorrt.ProfilingVerbosity
        Runtime = tensorrt.Runtime
        TensorIOMode = tensorrt.TensorIOMode  # from 8.5 on


# Weak typing is deprecated from here on, and gone in 11: the precision lives in the graph alone.
STRONGLY_TYPED_FROM = (10, 12)
# fp16 scales of Q/DQ need a strongly typed network, and no version before this one takes them.
FP16_SCALES_FROM = (10, 0)

_KEPT_MESSAGES = 2000
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|requested amount of gpu memory|alloc\w* fail", re.I
)
_NODE_IN_TEXT = re.compile(r"node (?:number )?\d+[^:\[]*\[([\w.]+)|for op(?:erator)?:? (\w+)", re.I)


class Built(NamedTuple):
    """A plan and how it came about."""

    plan: bytes
    seconds: float
    settings: Dict[str, Any]
    """Every choice that was made, for the record."""
    network: Dict[str, Any]
    """layers, how many of each type; inputs and outputs, name -> data type; shares, what the graph asks for."""
    layers: List[Layer]
    """The engine's, where the builder's log lists them."""
    timing_cache: Optional[bytes]
    warnings: List[str]


def import_runtime(runtime: str) -> "Trt":
    """Return the module `tensorrt` or `tensorrt_rtx`.

    Raises:
        DeviceError: it is not installed, or its libraries do not load.
    """
    try:
        module: Any = importlib.import_module(runtime)
        if not hasattr(module, "Builder"):  # type stubs, or a folder of that name, import as an empty module
            raise ImportError("there is a module of that name without TensorRT in it")
    except (ImportError, OSError) as exc:
        raise cannot_import("the runtime '%s'" % runtime, exc, RUNTIMES[runtime].install) from exc
    trt: "Trt" = module
    return trt


class Log:
    """The newest messages of TensorRT, and the logger that receives them."""

    def __init__(self, trt: "Trt") -> None:
        log = self
        self.errors: List[str] = []
        self.warnings: List[str] = []
        self.lists: List[str] = []
        severities = trt.ILogger.Severity
        worst, warning = (severities.INTERNAL_ERROR, severities.ERROR), severities.WARNING

        def initialize(logger: Any) -> None:
            trt.ILogger.__init__(logger)

        def receive(logger: Any, severity: Any, message: str) -> None:
            if severity in worst:
                kept = log.errors
            elif severity == warning:
                kept = log.warnings
            elif message.startswith("Layers:"):
                kept = log.lists
            else:
                return
            kept.append(message)
            del kept[:-_KEPT_MESSAGES]

        self.logger: Any = type("Log", (trt.ILogger,), {"__init__": initialize, "log": receive})()

    def forget(self) -> None:
        """Begin anew, before something whose messages matter."""
        del self.errors[:], self.warnings[:], self.lists[:]

    def last(self, count: int = 3) -> str:
        """Return the last errors in one line."""
        return "; ".join(" ".join(message.split()) for message in self.errors[-count:]) or "it says no reason"


_LOGS: Dict[str, Log] = {}


def log_of(trt: "Trt") -> Log:
    """Return the one log of a runtime in this process: TensorRT ignores every further logger, and its messages are lost."""
    name = getattr(trt, "__name__", "tensorrt")
    # In tests one version follows another in one process.
    if name not in _LOGS or not isinstance(_LOGS[name].logger, trt.ILogger):
        _LOGS[name] = Log(trt)
    return _LOGS[name]


def is_strongly_typed(runtime: str, version: Version, form: str) -> bool:
    """Return whether the graph alone decides the precisions, or builder flags as well."""
    if runtime == "tensorrt_rtx" or version >= STRONGLY_TYPED_FROM:
        return True
    return form == "int8-trt-fp16" and version >= FP16_SCALES_FROM


def build_plan(
    onnx_file: Union[str, Path],
    *,
    runtime: str,
    precision: str,
    form: str,
    build: Dict[str, Any],
    input_form: Dict[str, Any],
    free_bytes: Optional[int] = None,
    timing_cache: Optional[bytes] = None,
    report: Optional[Report] = None,
) -> Built:
    """Parse an ONNX file and build its engine.

    Args:
        onnx_file: float32 inputs and outputs whatever the precision.
        runtime: 'tensorrt' or 'tensorrt_rtx'.
        precision: 'fp32', 'fp16' or 'int8'.
        form: of the graph, such as 'int8-trt'.
        build: the target's table of that name.
        input_form: 'input' of the manifest.
        free_bytes: memory that is free; the workspace is bounded by half of it.
        timing_cache: of an earlier build on this device.
        report: called with a line on what is going on.

    Returns:
        the plan, and what the network asks for.

    Raises:
        DeviceError: the runtime is not there, cannot do what was asked, refuses the graph, or fails to build it.
        BundleError: the graph has other inputs or outputs than the manifest says.
    """
    trt = import_runtime(runtime)
    version = numbers_of(trt.__version__)[:3]
    title = "%s %s" % (RUNTIMES[runtime].title, trt.__version__)
    file = Path(onnx_file)
    typed = is_strongly_typed(runtime, version, form)
    if form == "int8-cpu" or (
        form == "int8-trt-fp16" and version < FP16_SCALES_FROM and runtime == "tensorrt"
    ):
        raise DeviceError(
            "%s takes no graph of the form '%s'" % (title, form),
            "export the bundle with [graph] int8 = 'int8-trt' in the target",
        )
    log = log_of(trt)
    log.forget()
    builder = _make(lambda: trt.Builder(log.logger), "a builder", title, log)
    _check_platform(builder, precision, title)
    network = _make(lambda: builder.create_network(_network_flags(trt, typed)), "a network", title, log)
    _parse(trt, network, file, title, log)
    asked = _describe(network)
    _check_io(asked, file, input_form)
    _check_asked(asked, precision, file.name, weak=not typed)
    config = _make(builder.create_builder_config, "a configuration", title, log)
    settings = {
        "strongly_typed": typed,
        "flags": _set_precision(trt, builder, config, precision, typed, title),
    }
    settings.update(_set_limits(trt, config, build, free_bytes, version))
    settings.update(_set_device(trt, builder, config, precision, build, runtime, title))
    _set_shapes(trt, builder, config, input_form)
    if runtime == "tensorrt":  # TensorRT for RTX times nothing
        _set_timing_cache(config, timing_cache)
    if report:
        report("building an %s engine with %s; on a small board this takes minutes" % (precision, title))
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise DeviceError(
            "%s cannot build an %s engine from '%s': %s" % (title, precision, file.name, log.last()),
            _hint_of_build(log, build),
        )
    layers = layers_of_log(log.lists)
    check_delivered(
        precision_shares(layers), precision, expected=asked["shares"].get(precision, 1.0), maker=title
    )
    return Built(
        plan=bytes(memoryview(plan)),
        seconds=seconds,
        settings=settings,
        network=asked,
        layers=layers,
        timing_cache=_timings(config) if runtime == "tensorrt" else None,
        warnings=[" ".join(message.split()) for message in log.warnings[-20:]],
    )


def _make(make: Callable[[], Any], what: str, title: str, log: Log) -> Any:
    try:
        made = make()
    except (
        TypeError,
        RuntimeError,
    ) as exc:  # the bindings' way to say that a constructor returned nothing
        raise DeviceError(
            "%s cannot make %s: %s" % (title, what, log.last() if log.errors else exc),
            "it needs a GPU and a driver that fits; `onboard.pyz doctor` looks at both",
        ) from exc
    if made is None:
        raise DeviceError(
            "%s cannot make %s: %s" % (title, what, log.last()),
            "it needs a GPU and a driver that fits; `onboard.pyz doctor` looks at both",
        )
    return made


def _network_flags(trt: "Trt", typed: bool) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    if typed:
        return 1 << int(flags.STRONGLY_TYPED)
    explicit = getattr(flags, "EXPLICIT_BATCH", None)  # the default, and then gone, from 10 on
    return 0 if explicit is None else 1 << int(explicit)


def _check_platform(builder: "tensorrt.Builder", precision: str, title: str) -> None:
    if precision == "fp32":
        return
    # Gone in 11, where every GPU that it still runs on has both.
    if getattr(builder, "platform_has_fast_%s" % precision, True) is False:
        raise DeviceError(
            "asked for %s, but this GPU cannot compute it fast: %s says so" % (precision, title),
            "take another precision of the bundle, such as --precision %s"
            % ("fp16" if precision == "int8" else "fp32"),
        )


def _parse(trt: "Trt", network: "tensorrt.INetworkDefinition", file: Path, title: str, log: Log) -> None:
    if not file.is_file():
        raise BundleError("'%s' is missing" % file)
    parser = trt.OnnxParser(network, log.logger)
    parsed = parser.parse_from_file(str(file))
    if parsed and parser.num_errors == 0:
        return
    problems, text = [], log.last() if parser.num_errors == 0 else ""
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        text += " " + error.desc()
        problems.append("%s: %s" % (_node_of(error, log), " ".join(error.desc().split())))
    raise DeviceError(
        "%s cannot read '%s': %s" % (title, file.name, "; ".join(problems[:3]) or text),
        _hint_of_parser(text + " ".join(problems)),
    )


def _node_of(error: Any, log: Log) -> str:
    operator = error.node_operator() if hasattr(error, "node_operator") else ""  # from 10 on
    name = error.node_name() if hasattr(error, "node_name") else ""
    if not operator:
        for text in [error.desc()] + log.errors:
            match = _NODE_IN_TEXT.search(text)
            if match:
                operator = match.group(1) or match.group(2)
                break
    where = "node %d" % error.node() if error.node() >= 0 else "the file"
    return where + (" '%s'" % name if name else "") + (" (%s)" % operator if operator else "")


def _hint_of_parser(text: str) -> str:
    lower = text.lower()
    if "hardswish" in lower:  # before 8.5
        return "this version has no HardSwish: export with [graph] hard_swish = 'hard_sigmoid' in the target"
    if "zero point" in lower or "uint8" in lower or "quantizelinear" in lower:
        return "export with [graph] int8 = 'int8-trt' in the target: symmetric INT8, no quantized bias"
    if "not a regular file" in lower or "parse" in lower and "protobuf" in lower:
        return "the file is damaged: copy the bundle again"
    if "plugin not found" in lower or "no importer registered" in lower:
        return "this version has no such operator: export with a lower [graph] opset, or for another target"
    return (
        "export the bundle for this version: `edgecl ls targets` lists them, [graph] opset sets the operators"
    )


def _describe(network: "tensorrt.INetworkDefinition") -> Dict[str, Any]:
    layers = layers_of_network(network)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {
        "layers": histogram(layers),
        "inputs": {tensor.name: str(tensor.dtype).rpartition(".")[2] for tensor in inputs},
        "outputs": {tensor.name: str(tensor.dtype).rpartition(".")[2] for tensor in outputs},
        "shares": precision_shares(layers),
    }


def _check_io(asked: Dict[str, Any], file: Path, input_form: Dict[str, Any]) -> None:
    if list(asked["inputs"]) != [input_form["name"]] or len(asked["outputs"]) != 1:
        raise BundleError(
            "'%s' has the inputs %s and outputs %s, the manifest says the input '%s' and one output"
            % (file.name, list(asked["inputs"]), list(asked["outputs"]), input_form["name"])
        )
    for name, kind in list(asked["inputs"].items()) + list(asked["outputs"].items()):
        if kind != "FLOAT":
            raise BundleError(
                "'%s' of '%s' is %s, a bundle's inputs and outputs are FLOAT" % (name, file.name, kind)
            )


def _check_asked(asked: Dict[str, Any], precision: str, file: str, *, weak: bool) -> None:
    """Check the precision of the graph itself: no engine can deliver what the graph does not ask for."""
    if precision == "fp32" or (precision == "fp16" and weak):
        return
    if asked["shares"].get(precision, 0.0) == 0:
        seen = ", ".join("%s %.0f %%" % (name, 100 * share) for name, share in asked["shares"].items())
        raise DeviceError(
            "asked for %s and not delivered: no convolution or matrix product of '%s' is %s (%s)"
            % (precision, file, precision, seen or "it has none"),
            "export the bundle again with --precision %s" % precision,
        )


def _set_precision(
    trt: "Trt",
    builder: "tensorrt.Builder",
    config: "tensorrt.IBuilderConfig",
    precision: str,
    typed: bool,
    title: str,
) -> List[str]:
    """Set the flags of a weakly typed build and see that they took effect; return their names."""
    if typed or precision == "fp32":
        return []
    names = ["FP16"] if precision == "fp16" else ["INT8"]
    # What is not quantized shall be fp16, where the GPU has it.
    if precision == "int8" and getattr(builder, "platform_has_fast_fp16", True):
        names.append("FP16")
    for name in names:
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is not None:
            config.set_flag(flag)
        if flag is None or not config.get_flag(flag):
            raise DeviceError(
                "asked for %s, but %s has no builder flag %s, or does not keep it" % (precision, title, name),
                "export the bundle for this version of TensorRT",
            )
    return names


def _set_limits(
    trt: "Trt",
    config: "tensorrt.IBuilderConfig",
    build: Dict[str, Any],
    free_bytes: Optional[int],
    version: Version,
) -> Dict[str, Any]:
    workspace = int(build.get("workspace_mib", 1024)) << 20
    if free_bytes is not None:
        workspace = min(workspace, free_bytes // 2)
    if hasattr(config, "set_memory_pool_limit"):  # from 8.4 on
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    else:
        setattr(config, "max_workspace_size", workspace)  # noqa: B010  # the stubs do not know it any more
    settings: Dict[str, Any] = {"workspace_bytes": workspace}
    if hasattr(config, "builder_optimization_level"):  # from 8.6 on
        level = int(build.get("optimization_level", 3))
        config.builder_optimization_level = level
        settings["optimization_level"] = level
    tf32 = bool(build.get("tf32", True))
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    settings["tf32"] = tf32
    # Without it the inspector and the log say names only, and no precision could be checked.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return settings


def _set_device(
    trt: "Trt",
    builder: "tensorrt.Builder",
    config: "tensorrt.IBuilderConfig",
    precision: str,
    build: Dict[str, Any],
    runtime: str,
    title: str,
) -> Dict[str, Any]:
    """Choose the DLA core, or what TensorRT for RTX compiles for."""
    core = build.get("dla_core")
    if runtime == "tensorrt_rtx":
        return {"compute_capabilities": _set_compute_capabilities(trt, config, build, title)}
    if core is None or precision == "fp32":  # DLA computes no fp32: that precision stays on the GPU
        return {"dla_core": None}
    cores = int(getattr(builder, "num_DLA_cores", 0))
    if core >= cores:
        raise DeviceError(
            "asked for DLA core %d, but %s finds %d DLA cores on this device" % (core, title, cores),
            "Orin Nano and Thor have none, and TensorRT 10.8 to 11.3 uses none; "
            "export the bundle without build.dla_core",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    return {"dla_core": core}


def _set_compute_capabilities(
    trt: "Trt", config: "tensorrt.IBuilderConfig", build: Dict[str, Any], title: str
) -> List[str]:
    names = list(build.get("compute_capabilities") or [])
    known: Any = getattr(trt, "ComputeCapability", None)
    members = {} if known is None else known.__members__
    unknown = [name for name in names if name not in members]
    if unknown or not names:
        raise DeviceError(
            "%s cannot compile for %s; it knows %s"
            % (
                title,
                ", ".join(unknown) or "nothing named",
                ", ".join(name for name in members if name.startswith("SM")),
            ),
            "change [build] compute_capabilities in the target",
        )
    chosen: Any = config
    chosen.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not chosen.set_compute_capability(members[name], index):
            raise DeviceError(
                "%s refuses to compile for %s" % (title, name),
                "change [build] compute_capabilities in the target",
            )
    return names


def _set_shapes(
    trt: "Trt", builder: "tensorrt.Builder", config: "tensorrt.IBuilderConfig", input_form: Dict[str, Any]
) -> None:
    if not input_form["dynamic_batch"]:
        return
    batch, rest = int(input_form["shape"][0]), list(input_form["shape"][1:])
    profile = builder.create_optimization_profile()
    least, best, most = [trt.Dims4([size] + rest) for size in (1, batch, int(input_form["max_batch"]))]
    profile.set_shape(input_form["name"], least, best, most)
    config.add_optimization_profile(profile)


def _set_timing_cache(config: "tensorrt.IBuilderConfig", earlier: Optional[bytes]) -> None:
    taken: Any = config.set_timing_cache(config.create_timing_cache(earlier or b""), False)
    if not taken:  # of another device or version
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _timings(config: "tensorrt.IBuilderConfig") -> Optional[bytes]:
    cache: Any = config.get_timing_cache()
    return None if cache is None else bytes(memoryview(cache.serialize()))


def _hint_of_build(log: Log, build: Dict[str, Any]) -> str:
    text = " ".join(log.errors)
    if _OUT_OF_MEMORY.search(text):
        return (
            "out of memory: lower build.workspace_mib in the target (it is %s), close the desktop and other programs, "
            "or add swap" % build.get("workspace_mib", 1024)
        )
    if "int8 is not configured" in text:
        return "the graph is quantized: ask for --precision int8"
    if "DLA" in text:
        return "export the bundle without build.dla_core, or for a net without squeeze-and-excitation"
    if "could not find any implementation" in text.lower():
        return "raise build.workspace_mib in the target (it is %s), or take another precision" % build.get(
            "workspace_mib", 1024
        )
    return "take another precision of the bundle, or export it for this version of TensorRT"
