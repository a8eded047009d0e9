"""Run a net with ONNX Runtime on the processor."""

from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from ..bundle import choose_precision
from ..errors import BundleError, DeviceError, cannot_import

PROVIDER = "CPUExecutionProvider"
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
        raise cannot_import("the runtime 'onnxruntime'", exc, "pip install onnxruntime") from exc
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


class OrtSession:
    """One session on a given number of threads, optimized for this processor as it is loaded.

    A form for TensorRT is computed as it is written instead: optimized, its products of 8-bit numbers would
    saturate on x86-64 without VNNI.

    Args:
        bundle: the directory.
        manifest: of that bundle.
        precision: one that the bundle holds.
        threads: to compute one operator with; operators run one after another.

    Raises:
        DeviceError: onnxruntime is not installed, cannot load the file, or would run it elsewhere than asked.
        BundleError: the file's input or output is not the one of the manifest.
    """

    RUNTIME = "onnxruntime"
    MODES = ("inference",)

    def __init__(self, bundle: Path, manifest: Dict[str, Any], *, precision: str, threads: int) -> None:
        precision, about = choose_precision(manifest, precision)
        model_file = bundle / about["model"]
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        self._as_written = about["form"].startswith("int8-trt")
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_DISABLE_ALL if self._as_written else levels.ORT_ENABLE_ALL
        )
        # The default, said aloud: idle threads spin. Faster alone on a machine, slower on a busy one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model_file), sess_options=options, providers=[PROVIDER]
            )
        except Exception as exc:  # onnxruntime's own classes share no other base
            raise DeviceError(
                "onnxruntime %s cannot load '%s': %s" % (onnxruntime.__version__, model_file.name, exc),
                "the file is whole: install a newer onnxruntime, or export the bundle for this one",
            ) from exc
        self._version = str(onnxruntime.__version__)
        found = self._session.get_providers()
        if found != [PROVIDER]:
            raise DeviceError(
                "onnxruntime %s would run '%s' on %s, asked for was %s"
                % (self._version, model_file.name, ", ".join(found) or "nothing", PROVIDER),
                "install an onnxruntime that has %s" % PROVIDER,
            )
        self._threads = threads
        self._precision = precision
        self._input = manifest["input"]["name"]
        self._output = manifest["output"]["name"]
        for kind, name, values in (
            ("input", self._input, self._session.get_inputs()),
            ("output", self._output, self._session.get_outputs()),
        ):
            names = [value.name for value in values]
            if names != [name]:
                raise BundleError(
                    "'%s' has the %ss %s, the manifest says '%s'" % (model_file.name, kind, names, name),
                    "export the bundle again",
                )
        self._binding: Any = None

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the outputs (N, F) for images (N, C, H, W) float32.

        Raises:
            DeviceError: onnxruntime does not take a batch of this shape, or fails to compute it.
        """
        try:
            return np.asarray(self._session.run([self._output], {self._input: images})[0])
        except Exception as exc:  # onnxruntime's own classes share no other base
            raise DeviceError(
                "onnxruntime %s cannot run the net on inputs %s: %s" % (self._version, images.shape, exc),
                "the file is whole: install a newer onnxruntime, or export the bundle for this one",
            ) from exc

    def bind(self, images: np.ndarray) -> None:
        """Keep a batch in place, so that a timed run neither converts nor copies it."""
        self.run(images)  # a shape the net refuses is named here
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input(self._input, np.ascontiguousarray(images))
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
            "runtime": "%s %s %s" % (self.RUNTIME, self._version, ",".join(self._session.get_providers())),
            "precision": self._precision,
            "threads": self._threads,
            "versions": {self.RUNTIME: self._version, "numpy": str(np.__version__)},
            "settings": {
                "intra_op_num_threads": self._threads,
                "inter_op_num_threads": 1,
                "execution_mode": "sequential",
                "graph_optimization": "none" if self._as_written else "all",
                "intra_op_spinning": True,
                "input": "bound",
            },
            "engine": None,
        }

    def close(self) -> None:
        """Let go of the session and its memory."""
        self._binding = None
        self._session = None
