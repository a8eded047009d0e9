"""What edgecl knows of a runtime: its record, and the session that it opens."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Tuple

if TYPE_CHECKING:  # no Protocol before Python 3.8; and records are read where there is no NumPy
    from typing import Protocol

    import numpy as np

    from .device_state import Check

    class Session(Protocol):
        """A loaded net."""

        def run(self, images: "np.ndarray") -> "np.ndarray":
            """Return the outputs (N, F) for images (N, C, H, W) float32; N is the manifest's batch unless dynamic."""

        def bind(self, images: "np.ndarray") -> None:
            """Keep a batch in place to be timed."""

        def modes(self) -> List[str]:
            """Return what can be timed, the headline first: 'inference' on a processor."""

        def run_once(self, mode: str) -> Optional[float]:
            """Run the bound batch; return the seconds the device measured, or None to time the call."""

        def describe(self) -> Dict[str, Any]:
            """Return what runs: runtime, precision, threads, versions, settings, engine."""

        def close(self) -> None:
            """Free the device's memory."""

else:
    Session = Any

Run = Callable[["np.ndarray"], "np.ndarray"]
"""Images (N, C, H, W) float32 -> outputs (N, F)."""
Report = Callable[[str], None]


class Runtime(NamedTuple):
    """One runtime; the file that holds it, in the folder `runtimes`, has its name."""

    title: str
    """As tables and texts call it."""
    module: str
    """The Python module to import; also the name that targets, manifests and records have for the runtime."""
    install: str
    """The command that installs it, where `fix_import` has no better one."""
    open: Callable[..., Session]
    """(bundle, manifest, precision=, threads=, report=) -> a session."""
    precisions: Tuple[str, ...] = ("fp32", "fp16", "int8")
    int8_forms: Tuple[str, ...] = ("int8-trt", "int8-trt-fp16")
    """The forms of INT8 graph it takes; the first is the one to recommend."""
    devices: Tuple[str, ...] = ("cpu",)
    """Patterns of the kinds of device it runs on; 'cpu' among them: also on the machine that exports."""
    alias: str = ""
    """A short name for `--runtime`."""
    suffix: str = ".onnx"
    """Of the files it loads."""
    needs: str = ""
    """What a bundle's README asks for beside Python and NumPy; the title where it is empty."""
    builds_engines: bool = False
    """It builds an engine on the device before it runs, which takes minutes."""
    opsets: Tuple[Tuple[Tuple[int, ...], int], ...] = ()
    """(version, the newest opset that it reads), oldest first; none where it reads every opset edgecl writes."""
    hidden: Tuple[str, ...] = ()
    """Modules that must not be imported along with it."""
    evaluate: Optional[Callable[[bytes, str], Run]] = None
    """(content of a model for any batch, its form) -> a function that runs it, on one thread of the exporting machine."""
    fix_import: Optional[Callable[[Path, bool], str]] = None
    """(root, whether it is a Jetson) -> how to mend an import that failed."""
    checks: Optional[Callable[[Path, Dict[str, Any]], "List[Optional[Check]]"]] = None
    """(root, target) -> more checks for `doctor`."""

    @property
    def on_host(self) -> bool:
        """Whether a processor runs it, so that the exporting machine can too."""
        return "cpu" in self.devices
