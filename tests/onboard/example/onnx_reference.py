"""The interpreter that comes with the onnx package, written in Python."""

from ..bundle import choose_precision
from ..errors import cannot_import
from ..runtime import Runtime

INSTALL = "pip install onnx"


class ReferenceSession:
    """A net that the interpreter runs; see `edgecl.onboard.runtime.Session`."""

    def __init__(self, bundle, manifest, *, precision, threads, report=None):
        try:
            from onnx import __version__
            from onnx.reference import ReferenceEvaluator
        except ImportError as exc:
            raise cannot_import("the runtime 'onnx_reference'", exc, INSTALL) from exc
        self._version, self._precision, self._threads = __version__, precision, threads
        file = bundle / choose_precision(manifest, precision)[1]["model"]
        self._evaluator, self._input = ReferenceEvaluator(str(file)), manifest["input"]["name"]

    def run(self, images):
        return self._evaluator.run(None, {self._input: images})[0]

    def bind(self, images):
        self._bound = images

    def modes(self):
        return ["inference"]

    def run_once(self, mode):
        self.run(self._bound)

    def describe(self):
        return {
            "runtime": "onnx_reference " + self._version,
            "precision": self._precision,
            "threads": self._threads,
            "versions": {"onnx_reference": self._version},
            "settings": {},
            "engine": None,
        }

    def close(self):
        self._evaluator = None


RUNTIME = Runtime(
    title="ONNX reference",
    module="onnx",
    install=INSTALL,
    open=ReferenceSession,
    precisions=("fp32",),
    alias="reference",
)
