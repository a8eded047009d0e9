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
    shares_in_words,
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

TYPES = {"float32": "FLOAT", "uint8": "UINT8"}
"""The manifest's name of a type -> TensorRT's, from 8.5 on for bytes."""

_KEPT_MESSAGES = 2000
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|requested amount of gpu memory|alloc\w* fail", re.IGNORECASE
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


def made(make: Callable[[], Any], what: str, title: str, log: Log) -> Any:
    """Return what a call of the bindings makes.

    Raises:
        DeviceError: it returned nothing, or raised, which is how the bindings say that a constructor did.
    """
    cause: Optional[Exception] = None
    try:
        thing = make()
    except (TypeError, RuntimeError) as exc:
        thing, cause = None, exc
    if thing is None:
        raise DeviceError(
            "%s cannot make %s: %s" % (title, what, log.last() if log.errors or not cause else cause),
            "it needs a GPU with free memory, and a driver that fits; `onboard.pyz doctor` looks at both",
        ) from cause
    return thing


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
        onnx_file: with float32 outputs whatever the precision.
        build: the target's table of that name.
        input_form: 'input' of the manifest.
        free_bytes: memory that is free; the workspace is bounded by half of it.
        timing_cache: of an earlier build on this device.

    Raises:
        DeviceError: the runtime is not there, cannot do what was asked, refuses the graph, or fails to build it.
        BundleError: the graph has other inputs or outputs than the manifest says.
    """
    one = _Build(Path(onnx_file), runtime, precision, form, build, input_form)
    log, title, network, config = one.log, one.title, one.network, one.config
    one.parse()
    asked = one.describe()
    one.check_io(asked)
    one.check_asked(asked)
    settings: Dict[str, Any] = {"strongly_typed": one.typed, "flags": one.set_precision()}
    settings.update(one.set_limits(free_bytes))
    settings.update(one.set_device())
    one.set_shapes()
    if runtime == "tensorrt":  # TensorRT for RTX times nothing
        one.set_timing_cache(timing_cache)
    if report:
        report("building an %s engine with %s; on a small board this takes minutes" % (precision, title))
    started = time.perf_counter()
    plan = one.builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise DeviceError(
            "%s cannot build an %s engine from '%s': %s" % (title, precision, one.file.name, log.last()),
            _hint_of_build(log, build),
        )
    layers = layers_of_log(log.lists)
    expected = asked["shares"].get(precision, 1.0)
    check_delivered(precision_shares(layers), precision, expected=expected, maker=title)
    cache: Any = config.get_timing_cache() if runtime == "tensorrt" else None
    return Built(
        plan=bytes(memoryview(plan)),
        seconds=seconds,
        settings=settings,
        network=asked,
        layers=layers,
        timing_cache=None if cache is None else bytes(memoryview(cache.serialize())),
        warnings=[" ".join(message.split()) for message in log.warnings[-20:]],
    )


class _Build:
    """One build: TensorRT's objects, and what is asked of them."""

    def __init__(
        self,
        file: Path,
        runtime: str,
        precision: str,
        form: str,
        build: Dict[str, Any],
        input_form: Dict[str, Any],
    ) -> None:
        self.file, self.runtime, self.precision, self.build = file, runtime, precision, build
        self.input_form = input_form
        self.trt = trt = import_runtime(runtime)
        version = numbers_of(trt.__version__)[:3]
        self.title = "%s %s" % (RUNTIMES[runtime].title, trt.__version__)
        self.typed = is_strongly_typed(runtime, version, form)
        if form == "int8-cpu" or (form == "int8-trt-fp16" and not self.typed):
            raise DeviceError(
                "%s takes no graph of the form '%s'" % (self.title, form),
                "export the bundle with [graph] int8 = 'int8-trt' in the target",
            )
        self.log = log_of(trt)
        self.log.forget()
        self.builder: "tensorrt.Builder" = self._made(lambda: trt.Builder(self.log.logger), "a builder")
        # Gone in 11, where every GPU that it still runs on has both.
        if precision != "fp32" and getattr(self.builder, "platform_has_fast_%s" % precision, True) is False:
            raise DeviceError(
                "asked for %s, but this GPU cannot compute it fast: %s says so" % (precision, self.title),
                "take another precision of the bundle, such as --precision %s"
                % ("fp16" if precision == "int8" else "fp32"),
            )
        kinds = trt.NetworkDefinitionCreationFlag
        # Explicit batches are the default from 10 on, and the flag is then gone.
        flag = kinds.STRONGLY_TYPED if self.typed else getattr(kinds, "EXPLICIT_BATCH", None)
        flags = 0 if flag is None else 1 << int(flag)
        self.network: "tensorrt.INetworkDefinition" = self._made(
            lambda: self.builder.create_network(flags), "a network"
        )
        self.config: "tensorrt.IBuilderConfig" = self._made(
            self.builder.create_builder_config, "a configuration"
        )

    def _made(self, make: Callable[[], Any], what: str) -> Any:
        return made(make, what, self.title, self.log)

    def parse(self) -> None:
        """Read the ONNX file."""
        if not self.file.is_file():
            raise BundleError("'%s' is missing" % self.file)
        parser = self.trt.OnnxParser(self.network, self.log.logger)
        if parser.parse_from_file(str(self.file)) and parser.num_errors == 0:
            return
        errors: List[Any] = [parser.get_error(index) for index in range(parser.num_errors)]
        text = " ".join(error.desc() for error in errors) or self.log.last()
        problems = ["%s: %s" % (self._node_of(error), " ".join(error.desc().split())) for error in errors]
        raise DeviceError(
            "%s cannot read '%s': %s" % (self.title, self.file.name, "; ".join(problems[:3]) or text),
            _hint_of_parser(text + " ".join(problems)),
        )

    def _node_of(self, error: Any) -> str:
        operator = error.node_operator() if hasattr(error, "node_operator") else ""  # from 10 on
        name = error.node_name() if hasattr(error, "node_name") else ""
        found = filter(None, (_NODE_IN_TEXT.search(text) for text in [error.desc()] + self.log.errors))
        operator = operator or next((match.group(1) or match.group(2) for match in found), "")
        where = "node %d" % error.node() if error.node() >= 0 else "the file"
        return where + (" '%s'" % name if name else "") + (" (%s)" % operator if operator else "")

    def describe(self) -> Dict[str, Any]:
        """Return what the network asks for."""
        layers, network = layers_of_network(self.network), self.network
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        return {
            "layers": histogram(layers),
            "inputs": {tensor.name: str(tensor.dtype).rpartition(".")[2] for tensor in inputs},
            "outputs": {tensor.name: str(tensor.dtype).rpartition(".")[2] for tensor in outputs},
            "shares": precision_shares(layers),
        }

    def check_io(self, asked: Dict[str, Any]) -> None:
        """Check the graph's ends against the manifest's."""
        inputs, outputs, name = list(asked["inputs"]), list(asked["outputs"]), self.input_form["name"]
        if inputs != [name] or len(outputs) != 1:
            raise BundleError(
                "'%s' has the inputs %s and outputs %s, the manifest says the input '%s' and one output"
                % (self.file.name, inputs, outputs, name)
            )
        for tensor, kind in dict(asked["inputs"], **asked["outputs"]).items():
            wanted = TYPES[self.input_form.get("dtype", "float32") if tensor == name else "float32"]
            if kind != wanted:
                raise BundleError(
                    "'%s' of '%s' is %s, the manifest says %s" % (tensor, self.file.name, kind, wanted)
                )

    def check_asked(self, asked: Dict[str, Any]) -> None:
        """Check the precision of the graph itself: no engine can deliver what the graph does not ask for."""
        precision = self.precision
        if precision == "fp32" or (precision == "fp16" and not self.typed):
            return
        if asked["shares"].get(precision, 0.0) == 0:
            raise DeviceError(
                "asked for %s and not delivered: no convolution or matrix product of '%s' is %s (%s)"
                % (precision, self.file.name, precision, shares_in_words(asked["shares"]) or "it has none"),
                "export the bundle again with --precision %s" % precision,
            )

    def set_precision(self) -> List[str]:
        """Set the flags of a weakly typed build; return their names."""
        if self.typed or self.precision == "fp32":
            return []
        names = [self.precision.upper()]
        # What is not quantized shall be fp16, where the GPU has it.
        if self.precision == "int8" and getattr(self.builder, "platform_has_fast_fp16", True):
            names.append("FP16")
        for name in names:
            self.config.set_flag(getattr(self.trt.BuilderFlag, name))
        return names

    def set_limits(self, free_bytes: Optional[int]) -> Dict[str, Any]:
        """Set memory, effort and TF32; return them for the record."""
        trt, config = self.trt, self.config
        workspace = int(self.build.get("workspace_mib", 1024)) << 20
        if free_bytes is not None:
            workspace = min(workspace, free_bytes // 2)
        if hasattr(config, "set_memory_pool_limit"):  # from 8.4 on
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        else:
            setattr(config, "max_workspace_size", workspace)  # noqa: B010  # the stubs do not know it any more
        tf32 = bool(self.build.get("tf32", True))
        settings: Dict[str, Any] = {"workspace_bytes": workspace, "tf32": tf32}
        if hasattr(config, "builder_optimization_level"):  # from 8.6 on
            level = int(self.build.get("optimization_level", 3))
            config.builder_optimization_level = settings["optimization_level"] = level
        (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
        # Without it the inspector and the log say names only, and no precision could be checked.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        return settings

    def set_device(self) -> Dict[str, Any]:
        """Choose the DLA core, or what TensorRT for RTX compiles for."""
        if self.runtime == "tensorrt_rtx":
            return {"compute_capabilities": self._set_compute_capabilities()}
        core = self.build.get("dla_core")
        if core is None or self.precision == "fp32":  # DLA computes no fp32: that precision stays on the GPU
            return {"dla_core": None}
        cores = int(getattr(self.builder, "num_DLA_cores", 0))
        if core >= cores:
            raise DeviceError(
                "asked for DLA core %d, but %s finds %d DLA cores on this device" % (core, self.title, cores),
                "Orin Nano and Thor have none, and TensorRT 10.8 to 11.3 uses none; "
                "export the bundle without build.dla_core",
            )
        self.config.default_device_type = self.trt.DeviceType.DLA
        self.config.DLA_core = core
        self.config.set_flag(self.trt.BuilderFlag.GPU_FALLBACK)
        return {"dla_core": core}

    def _set_compute_capabilities(self) -> List[str]:
        names = list(self.build.get("compute_capabilities") or [])
        members = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        chosen: Any = self.config
        chosen.num_compute_capabilities = len(names)
        refused = [
            name
            for index, name in enumerate(names)
            if name not in members or not chosen.set_compute_capability(members[name], index)
        ]
        if refused or not names:
            known = ", ".join(name for name in members if name.startswith("SM"))
            raise DeviceError(
                "%s cannot compile for %s; it knows %s"
                % (self.title, ", ".join(refused) or "nothing named", known),
                "change [build] compute_capabilities in the target",
            )
        return names

    def set_shapes(self) -> None:
        """Say which batches a net with a dynamic one takes."""
        form = self.input_form
        if not form["dynamic_batch"]:
            return
        batches, rest = (1, int(form["shape"][0]), int(form["max_batch"])), list(form["shape"][1:])
        least, best, most = [self.trt.Dims4([batch] + rest) for batch in batches]
        profile = self.builder.create_optimization_profile()
        profile.set_shape(form["name"], least, best, most)
        self.config.add_optimization_profile(profile)

    def set_timing_cache(self, earlier: Optional[bytes]) -> None:
        """Use the timings of an earlier build, unless it was of another device or version."""
        for content in (earlier or b"", b""):
            taken: Any = self.config.set_timing_cache(self.config.create_timing_cache(content), False)
            if taken:
                return


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


def _hint_of_build(log: Log, build: Dict[str, Any]) -> str:
    text, workspace = " ".join(log.errors), build.get("workspace_mib", 1024)
    if _OUT_OF_MEMORY.search(text):
        return (
            "out of memory: lower build.workspace_mib in the target (it is %s), close the desktop and other programs, "
            "or add swap" % workspace
        )
    if "int8 is not configured" in text:
        return "the graph is quantized: ask for --precision int8"
    if "DLA" in text:
        return "export the bundle without build.dla_core, or for a net without squeeze-and-excitation"
    if "could not find any implementation" in text.lower():
        return "raise build.workspace_mib in the target (it is %s), or take another precision" % workspace
    return "take another precision of the bundle, or export it for this version of TensorRT"
