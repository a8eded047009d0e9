"""A target: a kind of device, its runtime, and the limits a net is exported for, read from one TOML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgecl.config.settings import (
    LARGER_PICTURES,
    Config,
    Count,
    Factor,
    Fraction,
    read_tables,
    validate,
)
from edgecl.errors import TargetError, near_matches
from edgecl.onboard.devices import DEVICES
from edgecl.onboard.runtimes import RUNTIMES
from edgecl.onboard.versions import bounds_of

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
Int8Form = Literal["int8-trt", "int8-trt-fp16", "int8-cpu"]
GraphInput = Literal["float32", "uint8", "uint8-nchw"]
ComputeCapability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]


class Graph(Config):
    """The form of the ONNX graph."""

    opset: int = Field(17, ge=13, le=22)
    hard_swish: Literal["keep", "hard_sigmoid", "clip"] = "hard_sigmoid"
    """As one HardSwish node (opset 14 and later), as HardSigmoid and Mul, or as Add, Clip and Mul."""
    int8: Int8Form = "int8-trt"
    """Which form of explicit quantization the runtime takes."""
    image_size: int | None = Field(None, ge=8, le=4096, description=LARGER_PICTURES)
    """Height and width of the input in pixels; the net's own where it is not said."""
    batch: int = Field(1, ge=1, le=65_536)
    """Images per inference when the batch is static, and the size that is measured."""
    dynamic_batch: bool = False
    """Accept any batch from 1 to max_batch."""
    max_batch: int = Field(64, ge=1, le=65_536)
    input: GraphInput = "float32"
    """float32: (N, 3, H, W), normalized by whoever runs the net. uint8: (N, H, W, 3) RGB bytes as decoders give them, and
    uint8-nchw: (N, 3, H, W) bytes, both normalized in the graph."""
    softmax: bool = False
    """End a classifier in softmax: probabilities, not logits."""


class Build(Config):
    """How a TensorRT engine is built."""

    workspace_mib: int = Field(1024, ge=16, le=1 << 20)
    """Most scratch memory of the builder; on the device also bounded by half of what is free."""
    optimization_level: int = Field(3, ge=0, le=5)
    """0 builds fast, 5 searches long; from TensorRT 8.6."""
    tf32: bool = True
    """Let fp32 layers use TF32 where the GPU has it."""
    dla_core: int | None = Field(None, ge=0, le=63)
    """Run on this DLA core, and on the GPU what DLA cannot."""
    compute_capabilities: tuple[ComputeCapability, ...] = ()
    """What a TensorRT-RTX engine is compiled for."""


class Quantization(Config):
    """How INT8 is made and evaluated."""

    calibration_images: Count = 256
    holdout_images: Count = 256
    """Images apart from those that calibrate, on which the methods are compared."""
    methods: Annotated[tuple[Literal["minmax", "entropy", "percentile"], ...], Field(min_length=1)] = (
        "minmax",
        "entropy",
        "percentile",
    )
    """Tried in this order; the one that keeps most accuracy on the held-out images is taken."""
    max_loss_points: float = Field(1.0, ge=0, le=100)
    """Most points of top-1 (of kNN top-1 for a net without classifier) that INT8 may cost."""
    min_cosine: Fraction = 0.98
    """Least mean cosine similarity with the fp32 features, for a net without classifier."""
    max_kept_fraction: Fraction = 0.5
    """Largest share of the quantized nodes that may be kept in higher precision to stay within the budget."""


class Tolerance(Config):
    """How far the exported net may be from torch, on real images."""

    max_relative_difference: Factor = 1e-3
    """Largest absolute difference of an output, divided by the largest absolute output of torch."""
    top1_agreement: Fraction = 0.99
    """Fraction of images with the same largest output."""
    mean_cosine: Fraction = 0.999
    """Mean cosine similarity of the outputs."""


class Tolerances(Config):
    """One tolerance per precision."""

    fp32: Tolerance = Tolerance()
    fp16: Tolerance = Tolerance(max_relative_difference=5e-2, top1_agreement=0.95)
    # Loose: what INT8 may cost is the decision's to say. This holds off a wrong graph.
    int8: Tolerance = Tolerance(max_relative_difference=1.0, top1_agreement=0.5, mean_cosine=0.9)


class Target(Config):
    """One kind of device and runtime."""

    runtime: str
    """One of `edgecl ls runtimes`."""
    versions: str = Field("", max_length=200)
    """Versions of the runtime it is for, such as '>=10.3,<10.8'; any where it is empty."""
    device: str = "cpu"
    """A kind of device; see `edgecl.onboard.devices`."""
    precisions: tuple[Precision, ...] = ("fp32",)
    """What is exported, the preferred one first."""
    graph: Graph = Graph()
    build: Build = Build()
    quantization: Quantization = Quantization()
    tolerance: Tolerances = Tolerances()

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        graph = self.graph
        if self.device not in DEVICES:
            raise ValueError(f"'device' is '{self.device}'; there are {', '.join(DEVICES)}")
        device = DEVICES[self.device]
        for precision in self.precisions:
            if precision not in device.precisions:
                raise ValueError(
                    f"'precisions' asks for {precision}, which {device.title} cannot compute; "
                    f"it has {', '.join(device.precisions)}"
                )
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ValueError("'precisions' must name one or more precisions, each once")
        if graph.dynamic_batch and graph.batch > graph.max_batch:
            raise ValueError(f"'graph.batch' {graph.batch} is above 'graph.max_batch' {graph.max_batch}")
        if graph.hard_swish == "keep" and graph.opset < 14:
            raise ValueError(f"'graph.hard_swish' = 'keep' needs opset 14, 'graph.opset' is {graph.opset}")
        if graph.int8 == "int8-trt-fp16" and graph.opset < 19:
            raise ValueError(f"'graph.int8' = 'int8-trt-fp16' needs opset 19, 'graph.opset' is {graph.opset}")
        self._check_dla()
        self._check_runtime()
        if self.runtime == "tensorrt_rtx" and not self.build.compute_capabilities:
            raise ValueError("'build.compute_capabilities' is empty; name what to compile for, e.g. 'SM86'")
        return self

    def _check_runtime(self) -> None:
        """Check versions, device, precisions, INT8 form and opset against what the runtime takes."""
        runtime = RUNTIMES.get(self.runtime)
        if runtime is None:
            raise ValueError(f"'runtime' is '{self.runtime}': {near_matches(self.runtime, RUNTIMES)}")
        if not any(fnmatch(self.device, pattern) for pattern in runtime.devices):
            raise ValueError(
                f"'{self.runtime}' does not run on 'device' = '{self.device}'; it runs on "
                + " and ".join(runtime.devices)
            )
        for precision in self.precisions:
            if precision not in runtime.precisions:
                raise ValueError(f"'{self.runtime}' has {', '.join(runtime.precisions)}, not {precision}")
        if "int8" in self.precisions and self.graph.int8 not in runtime.int8_forms:
            raise ValueError(
                f"'{self.runtime}' does not take 'graph.int8' = '{self.graph.int8}'; take '{runtime.int8_forms[0]}'"
            )
        bounds = bounds_of(self.versions)
        least = max((number for sign, number in bounds if sign in (">=", "==", ">")), default=None)
        most = min((number for sign, number in bounds if sign in ("<", "<=")), default=None)
        if least and most and least > most:
            raise ValueError(f"'versions' = '{self.versions}' holds no version")
        if least and least < runtime.bytes_from and self.graph.input != "float32":
            first = ".".join(map(str, runtime.bytes_from))
            raise ValueError(
                f"'graph.input' = '{self.graph.input}', but {runtime.title} takes bytes from {first} on, "
                f"and 'versions' = '{self.versions}' begins before it; take 'float32'"
            )
        if least and runtime.opsets:
            opset = max((opset for version, opset in runtime.opsets if version <= least), default=13)
            if self.graph.opset > opset:
                raise ValueError(
                    f"'graph.opset' is {self.graph.opset}, {runtime.title} {'.'.join(map(str, least))} reads up to {opset}"
                )

    def _check_dla(self) -> None:
        core, device = self.build.dla_core, DEVICES[self.device]
        if core is None:
            return
        if device.dla_cores is None:
            raise ValueError(
                f"'build.dla_core' = {core}, but not every module of '{self.device}' has DLA; name the module as "
                "'device', such as 'jetson-agx-orin'"
            )
        if core >= device.dla_cores:
            raise ValueError(
                f"'build.dla_core' = {core}, but {device.title} has {device.dla_cores} DLA cores"
            )
        if self.graph.dynamic_batch:
            raise ValueError("'build.dla_core' needs a static batch; set 'graph.dynamic_batch' = false")
        if self.precisions == ("fp32",):
            raise ValueError("'build.dla_core' needs fp16 or int8; DLA does not compute fp32")

    def tolerance_of(self, precision: Precision, *, features: bool) -> Tolerance:
        """Return the tolerance of a precision; which of a net's features is the largest means nothing."""
        tolerance: Tolerance = getattr(self.tolerance, precision)
        return tolerance.model_copy(update={"top1_agreement": 0.0}) if features else tolerance


def read_target(
    name: str,
    *,
    precisions: Sequence[str] | None = None,
    graph: Mapping[str, object] | None = None,
) -> Target:
    """Read a packaged target or a TOML file, with other precisions and settings of its graph if asked; an alias is followed.

    Raises:
        TargetError: unknown name, key or value, every problem at once; or a precision the target's device lacks.
    """
    target = _read(name)[1]
    if precisions is None and not graph:
        return target
    tables = target.model_dump(mode="json", exclude_unset=True)
    if precisions is not None:
        tables["precisions"] = list(precisions)
    if graph:
        tables["graph"] = {**tables.get("graph", {}), **graph}
    return validate(Target, tables, source=name, error=TargetError)


def target_name(name: str) -> str:
    """Return what a target is called once aliases are followed, such as 'jetson-orin-jp6' for 'jetson'."""
    return _read(name)[0]


def _read(name: str, *, from_alias: str | None = None) -> tuple[str, Target]:
    path, tables = read_tables(name, folder="export", error=TargetError, noun="target")
    if set(tables) == {"alias"} and isinstance(tables["alias"], str):
        if from_alias:
            raise TargetError(f"'{from_alias}' is an alias of '{name}', which is an alias itself")
        return _read(tables["alias"], from_alias=name)
    return path.stem, validate(Target, tables, source=str(path), error=TargetError)
