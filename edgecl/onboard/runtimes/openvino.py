"""OpenVINO on the processor."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from ..bundle import choose_precision
from ..errors import BundleError, DeviceError, cannot_import
from ..runtime import Report, Run, Runtime

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


class OpenvinoSession:
    """A compiled net on a given number of threads; see `edgecl.onboard.runtime.Session`.

    By default OpenVINO computes a float32 net in bf16 where the processor has it. Here fp32 and int8 nets ask for
    f32 for what is not quantized, and fp16 nets for f16 where the processor has it; `describe` has what was taken,
    and how many layers run in which precision.

    Args:
        bundle: the directory.
        manifest: of that bundle.
        precision: one that the bundle holds.
        threads: to compute with.
        report: not used.

    Raises:
        DeviceError: openvino is not installed, cannot load the file, or would run it elsewhere than asked.
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
        precision, about = choose_precision(manifest, precision)
        model_file = bundle / about["model"]
        openvino = import_openvino()
        self._version = str(openvino.__version__).partition("-")[0]
        core = openvino.Core()
        half = precision == "fp16" and "FP16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        asked = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": "f16" if half else "f32",
        }
        try:
            model = core.read_model(str(model_file))
            self._compiled: Any = core.compile_model(model, DEVICE, asked)
        except RuntimeError as exc:
            raise DeviceError(
                "openvino %s cannot load '%s': %s" % (self._version, model_file.name, exc),
                "install a newer openvino, or export the bundle for this one",
            ) from exc
        devices = list(self._compiled.get_property("EXECUTION_DEVICES"))
        if devices != [DEVICE]:
            raise DeviceError(
                "openvino %s would run '%s' on %s, asked for was %s"
                % (self._version, model_file.name, ", ".join(devices) or "nothing", DEVICE),
                "install an openvino that has %s" % DEVICE,
            )
        for kind, name, values in (
            ("input", manifest["input"]["name"], self._compiled.inputs),
            ("output", manifest["output"]["name"], self._compiled.outputs),
        ):
            names = [sorted(value.get_names()) for value in values]
            if len(names) != 1 or name not in names[0]:
                raise BundleError(
                    "'%s' has the %ss %s, the manifest says '%s'" % (model_file.name, kind, names, name),
                    "export the bundle again",
                )
        self._tensor = openvino.Tensor
        self._request: Any = self._compiled.create_infer_request()
        self._threads = threads
        self._precision = precision

    def run(self, images: "np.ndarray") -> "np.ndarray":
        """Return the outputs (N, F) for images (N, C, H, W) float32.

        Raises:
            DeviceError: openvino does not take a batch of this shape, or fails to compute it.
        """
        try:
            self._place(images)
            self._request.infer()
            outputs: "np.ndarray" = self._request.get_output_tensor().data.copy()
            return outputs
        except RuntimeError as exc:
            raise DeviceError(
                "openvino %s cannot run the net on inputs %s: %s" % (self._version, images.shape, exc),
                "install a newer openvino, or export the bundle for this one",
            ) from exc

    def bind(self, images: "np.ndarray") -> None:
        """Keep a batch in place, so that a timed run neither converts nor copies it."""
        self.run(images)  # a shape the net refuses is named here
        self._place(images)

    def _place(self, images: "np.ndarray") -> None:
        self._bound = images.astype("float32", order="C", copy=False)  # the tensor reads this very memory
        self._request.set_input_tensor(self._tensor(self._bound, shared_memory=True))

    def modes(self) -> List[str]:
        """Return what can be timed."""
        return list(self.MODES)

    def run_once(self, mode: str = MODES[0]) -> Optional[float]:
        """Run the bound batch; the outputs are complete when this returns."""
        self._request.infer(share_outputs=True)
        return None  # the clock times the call

    def describe(self) -> Dict[str, Any]:
        """Return what runs, for the record."""
        settings = {
            "device": DEVICE,
            "performance_hint": "latency",
            "num_streams": int(self._compiled.get_property("NUM_STREAMS")),
            "inference_num_threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "inference_precision": self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
            "input": "bound",
            "layers": self._layers(),
        }
        return {
            "runtime": "openvino %s %s" % (self._version, DEVICE),
            "precision": self._precision,
            "threads": self._threads,
            "versions": {"openvino": self._version},
            "settings": settings,
            "engine": None,
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
