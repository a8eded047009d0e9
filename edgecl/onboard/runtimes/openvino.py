"""OpenVINO on the processor."""

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, Dict, Optional

from ..errors import cannot_import
from ..runtime import Loaded, ProcessorSession, Run, Runtime

if TYPE_CHECKING:
    import numpy as np

DEVICE = "CPU"
INSTALL = "pip install openvino"
# openvino reports to its maker by this package while it is imported, and goes without where it is missing.
TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """Return the module, imported without its telemetry, which no environment variable switches off.

    Raises:
        DeviceError: it is not installed.
    """
    hide = "openvino" not in sys.modules and TELEMETRY not in sys.modules
    if hide:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as exc:
        raise cannot_import("the runtime 'openvino'", exc, INSTALL) from exc
    finally:
        if hide:
            del sys.modules[TELEMETRY]
    return openvino


class OpenvinoSession(ProcessorSession):
    """A compiled net of OpenVINO.

    By default OpenVINO computes a float32 net in bf16 where the processor has it. Here fp32 and int8 nets ask for
    f32 for what is not quantized, and fp16 nets for f16 where the processor has it; `describe` has what was taken,
    and how many layers run in which precision.
    """

    module = "openvino"
    device = DEVICE
    failures = (RuntimeError,)

    def _import(self) -> str:
        return str(import_openvino().__version__).partition("-")[0]

    def _load(self, file: str, form: str) -> Loaded:
        openvino = import_openvino()
        core = openvino.Core()
        half = self._precision == "fp16" and "FP16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        asked = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self._threads),
            "INFERENCE_PRECISION_HINT": "f16" if half else "f32",
        }
        self._compiled: Any = core.compile_model(core.read_model(file), DEVICE, asked)
        self._tensor = openvino.Tensor
        self._request: Any = self._compiled.create_infer_request()
        devices = list(self._compiled.get_property("EXECUTION_DEVICES"))
        ends = (self._compiled.inputs, self._compiled.outputs)
        return Loaded(devices, *[[list(value.get_names()) for value in values] for values in ends])

    def _compute(self, images: "np.ndarray") -> "np.ndarray":
        self._place(images.astype(self._dtype, order="C", copy=False))
        self._request.infer()
        outputs: "np.ndarray" = self._request.get_output_tensor().data.copy()
        return outputs

    def _place(self, images: "np.ndarray") -> None:
        self._bound = images  # the tensor reads this very memory
        self._request.set_input_tensor(self._tensor(images, shared_memory=True))

    def run_once(self, mode: str = "inference") -> Optional[float]:
        """Run the bound batch; the outputs are complete when this returns."""
        self._request.infer(share_outputs=True)
        return None  # the clock times the call

    def _settings(self) -> Dict[str, Any]:
        return {
            "device": DEVICE,
            "performance_hint": "latency",
            "num_streams": int(self._compiled.get_property("NUM_STREAMS")),
            "inference_num_threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "inference_precision": self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
            "layers": self._layers(),
        }

    def _layers(self) -> Dict[str, int]:
        """Return how many layers of the compiled net run in each precision."""
        info = [node.get_rt_info() for node in self._compiled.get_runtime_model().get_ops()]
        found = [about["runtimePrecision"].astype(str) for about in info if "runtimePrecision" in about]
        return dict(Counter(found))

    def close(self) -> None:
        """Free the compiled net and its memory."""
        self._request = self._compiled = None


def _evaluate(model: bytes, form: str) -> Run:
    core = import_openvino().Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model), DEVICE, settings)

    def run(images: "np.ndarray") -> "np.ndarray":
        outputs: "np.ndarray" = compiled(images)[0]
        return outputs

    return run


RUNTIME = Runtime(
    title="OpenVINO",
    module="openvino",
    install=INSTALL,
    open=OpenvinoSession,
    int8_forms=("int8-trt", "int8-cpu", "int8-trt-fp16"),
    hidden=(TELEMETRY,),
    evaluate=_evaluate,
)
