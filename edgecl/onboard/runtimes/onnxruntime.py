"""ONNX Runtime on the processor."""

from typing import TYPE_CHECKING, Any, Dict, Optional, Union

from ..errors import cannot_import
from ..runtime import Loaded, ProcessorSession, Run, Runtime

if TYPE_CHECKING:
    import numpy as np

PROVIDER = "CPUExecutionProvider"
INSTALL = "pip install onnxruntime"
# The highest of onnxruntime's severities.
_FATAL = 4


def import_onnxruntime() -> Any:
    """Return the module, silent: what goes wrong is in its exceptions, its log would be colored even in a file.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise cannot_import("the runtime 'onnxruntime'", exc, INSTALL) from exc
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def open_model(model: Union[bytes, str], *, threads: int, optimization: str = "ALL") -> Any:
    """Return onnxruntime's session for the content of a model, or its file; optimization: 'ALL', 'BASIC' or 'NONE'."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "ALL": levels.ORT_ENABLE_ALL,
        "BASIC": levels.ORT_ENABLE_BASIC,
        "NONE": levels.ORT_DISABLE_ALL,
    }[optimization]
    # The default, stated for the record: idle threads spin. Faster alone on a machine, slower on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    return onnxruntime.InferenceSession(model, sess_options=options, providers=[PROVIDER])


def _optimization(form: str) -> str:
    """Return how to optimize a form: one for TensorRT is computed as it is written.

    Optimized, its products of 8-bit numbers would saturate on x86-64 without VNNI, and its biases be quantized too.
    """
    return "NONE" if form.startswith("int8-trt") else "ALL"


class OrtSession(ProcessorSession):
    """A session of ONNX Runtime."""

    module = "onnxruntime"
    device = PROVIDER
    failures = (Exception,)  # its own classes share no other base

    def _import(self) -> str:
        return str(import_onnxruntime().__version__)

    def _load(self, file: str, form: str) -> Loaded:
        self._optimization = _optimization(form)
        self._binding: Any = None
        self._session: Any = open_model(file, threads=self._threads, optimization=self._optimization)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = [[[value.name] for value in values] for values in (inputs, outputs)]
        return Loaded(list(self._session.get_providers()), *names)

    def _compute(self, images: "np.ndarray") -> "np.ndarray":
        outputs: "np.ndarray" = self._session.run([self._output], {self._input: images})[0]
        return outputs

    def _place(self, images: "np.ndarray") -> None:
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input(self._input, images)
        self._binding.bind_output(self._output)

    def run_once(self, mode: str = "inference") -> Optional[float]:
        """Run the bound batch; the outputs are complete when this returns."""
        self._session.run_with_iobinding(self._binding)
        return None  # the clock times the call

    def _settings(self) -> Dict[str, Any]:
        return {
            "intra_op_num_threads": self._threads,
            "inter_op_num_threads": 1,
            "execution_mode": "sequential",
            "graph_optimization": self._optimization.lower(),
            "intra_op_spinning": True,
        }

    def close(self) -> None:
        """Free the session and its memory."""
        self._binding = self._session = None


def _evaluate(model: bytes, form: str) -> Run:
    session = open_model(model, threads=1, optimization=_optimization(form))
    name = session.get_inputs()[0].name

    def run(images: "np.ndarray") -> "np.ndarray":
        outputs: "np.ndarray" = session.run(None, {name: images})[0]
        return outputs

    return run


RUNTIME = Runtime(
    title="ONNX Runtime",
    module="onnxruntime",
    install=INSTALL,
    open=OrtSession,
    int8_forms=("int8-cpu",),  # it fuses nothing in the others, and is slow on them
    alias="ort",
    evaluate=_evaluate,
)
