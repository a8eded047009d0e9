"""ONNX Runtime on the processor."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Union

from ..bundle import choose_precision
from ..errors import BundleError, DeviceError, cannot_import
from ..runtime import Report, Run, Runtime

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
    """Return onnxruntime's session for a model on the processor; operators run one after another.

    Args:
        model: its content, or its file.
        threads: to compute one operator with.
        optimization: of the graph while it is loaded: 'ALL', 'BASIC' or 'NONE'.
    """
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


class OrtSession:
    """A session on a given number of threads; see `edgecl.onboard.runtime.Session`.

    Args:
        bundle: the directory.
        manifest: of that bundle.
        precision: one that the bundle holds.
        threads: to compute one operator with.
        report: not used.

    Raises:
        DeviceError: onnxruntime is not installed, cannot load the file, or would run it elsewhere than asked.
        BundleError: the file's input or output is not the one of the manifest.
    """

    MODES = ("inference",)

    def __init__(
        self,
        bundle: Path,
        manifest: Dict[str, Any],
        *,
        precision: str,
        threads: int,
        report: Optional[Report] = None,
    ) -> None:
        self._precision, about = choose_precision(manifest, precision)
        self._threads = threads
        self._input, self._output = manifest["input"]["name"], manifest["output"]["name"]
        self._binding: Any = None
        self._optimization = _optimization(about["form"])
        self._version = str(import_onnxruntime().__version__)
        file = bundle / about["model"]
        try:
            self._session: Any = open_model(str(file), threads=threads, optimization=self._optimization)
        except Exception as exc:  # onnxruntime's own classes share no other base
            raise DeviceError(
                "onnxruntime %s cannot load '%s': %s" % (self._version, file.name, exc),
                "install a newer onnxruntime, or export the bundle for this one",
            ) from exc
        found = self._session.get_providers()
        if found != [PROVIDER]:
            raise DeviceError(
                "onnxruntime %s would run '%s' on %s, asked for was %s"
                % (self._version, file.name, ", ".join(found) or "nothing", PROVIDER),
                "install an onnxruntime that has %s" % PROVIDER,
            )
        for kind, name, values in (
            ("input", self._input, self._session.get_inputs()),
            ("output", self._output, self._session.get_outputs()),
        ):
            names = [value.name for value in values]
            if names != [name]:
                raise BundleError(
                    "'%s' has the %ss %s, the manifest says '%s'" % (file.name, kind, names, name),
                    "export the bundle again",
                )

    def run(self, images: "np.ndarray") -> "np.ndarray":
        """Return the outputs (N, F) for images (N, C, H, W) float32.

        Raises:
            DeviceError: onnxruntime does not take a batch of this shape, or fails to compute it.
        """
        try:
            outputs: "np.ndarray" = self._session.run([self._output], {self._input: images})[0]
        except Exception as exc:  # onnxruntime's own classes share no other base
            raise DeviceError(
                "onnxruntime %s cannot run the net on inputs %s: %s" % (self._version, images.shape, exc),
                "install a newer onnxruntime, or export the bundle for this one",
            ) from exc
        return outputs

    def bind(self, images: "np.ndarray") -> None:
        """Keep a batch in place, so that a timed run neither converts nor copies it."""
        self.run(images)  # a shape the net refuses is named here
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input(self._input, images.astype("float32", order="C", copy=False))
        self._binding.bind_output(self._output)

    def modes(self) -> List[str]:
        """Return what can be timed."""
        return list(self.MODES)

    def run_once(self, mode: str = MODES[0]) -> Optional[float]:
        """Run the bound batch; the outputs are complete when this returns."""
        self._session.run_with_iobinding(self._binding)
        return None  # the clock times the call

    def describe(self) -> Dict[str, Any]:
        """Return what runs, for the record."""
        return {
            "runtime": "onnxruntime %s %s" % (self._version, ",".join(self._session.get_providers())),
            "precision": self._precision,
            "threads": self._threads,
            "versions": {"onnxruntime": self._version},
            "settings": {
                "intra_op_num_threads": self._threads,
                "inter_op_num_threads": 1,
                "execution_mode": "sequential",
                "graph_optimization": self._optimization.lower(),
                "intra_op_spinning": True,
                "input": "bound",
            },
            "engine": None,
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
