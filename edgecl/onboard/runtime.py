"""What edgecl knows of a runtime: its record, and the session that it opens."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Type

from .bundle import choose_precision, input_dtype
from .errors import BundleError, DeviceError

if TYPE_CHECKING:  # no Protocol before Python 3.8; and records are read where there is no NumPy
    from typing import Protocol

    import numpy as np

    from .device_state import Check

    class Session(Protocol):
        """A loaded net."""

        def run(self, images: "np.ndarray") -> "np.ndarray":
            """Return the outputs (N, F) for images as the manifest's input; N is its batch unless that is dynamic."""

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
"""Images as the net takes them -> outputs (N, F)."""
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
    needs: str = ""
    """What a bundle's README asks for beside Python and NumPy; the title where it is empty."""
    builds_engines: bool = False
    """It builds an engine on the device before it runs, which takes minutes."""
    opsets: Tuple[Tuple[Tuple[int, ...], int], ...] = ()
    """(version, the newest opset that it reads), oldest first; none where it reads every opset edgecl writes."""
    bytes_from: Tuple[int, ...] = ()
    """The first version that takes uint8 inputs; every version does where it is empty."""
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


class Loaded(NamedTuple):
    """A net that a runtime has loaded: where it would run, and the names that each input and output goes by."""

    devices: List[str]
    inputs: List[List[str]]
    outputs: List[List[str]]


class ProcessorSession:
    """A net on a given number of threads of a processor; `Session` has the methods.

    Raises:
        DeviceError: the runtime is not installed, cannot load the file, or would run it elsewhere than asked.
        BundleError: the file's input or output is not the one of the manifest.
    """

    MODES = ("inference",)
    module: str
    device: str
    failures: Tuple[Type[BaseException], ...]
    """What the runtime raises."""

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
        self._dtype = input_dtype(manifest)
        self._title = "%s %s" % (self.module, self._import())
        file = bundle / about["model"]
        try:
            loaded = self._load(str(file), about["form"])
        except self.failures as exc:
            raise self._cannot("load '%s'" % file.name, exc) from exc
        if loaded.devices != [self.device]:
            raise DeviceError(
                "%s would run '%s' on %s, asked for was %s"
                % (self._title, file.name, ", ".join(loaded.devices) or "nothing", self.device),
                "install an %s that has %s" % (self.module, self.device),
            )
        for kind, name, found in (
            ("input", self._input, loaded.inputs),
            ("output", self._output, loaded.outputs),
        ):
            if len(found) != 1 or name not in found[0]:
                names = ", ".join("'%s'" % "'/'".join(sorted(one)) for one in found)
                raise BundleError(
                    "'%s' has the %ss [%s], the manifest says '%s'" % (file.name, kind, names, name)
                )

    def _import(self) -> str:
        """Import the runtime and return its version."""
        raise NotImplementedError

    def _load(self, file: str, form: str) -> Loaded:
        raise NotImplementedError

    def _compute(self, images: "np.ndarray") -> "np.ndarray":
        raise NotImplementedError

    def _place(self, images: "np.ndarray") -> None:
        """Keep images of the net's type in place, so that a timed run neither converts nor copies them."""
        raise NotImplementedError

    def _settings(self) -> Dict[str, Any]:
        raise NotImplementedError

    def _cannot(self, what: str, exc: BaseException) -> DeviceError:
        return DeviceError(
            "%s cannot %s: %s" % (self._title, what, exc),
            "install a newer %s, or export the bundle for this one" % self.module,
        )

    def run(self, images: "np.ndarray") -> "np.ndarray":
        """Return the outputs; a batch of a shape that the net does not take is a DeviceError."""
        try:
            return self._compute(images)
        except self.failures as exc:
            raise self._cannot("run the net on inputs %s" % (images.shape,), exc) from exc

    def bind(self, images: "np.ndarray") -> None:
        """Keep a batch in place to be timed."""
        self.run(images)  # a shape the net refuses is named here
        self._place(images.astype(self._dtype, order="C", copy=False))

    def modes(self) -> List[str]:
        """Return what can be timed."""
        return list(self.MODES)

    def describe(self) -> Dict[str, Any]:
        """Return what runs, for the record."""
        return {
            "runtime": "%s %s" % (self._title, self.device),
            "precision": self._precision,
            "threads": self._threads,
            "versions": {self.module: self._title.partition(" ")[2]},
            "settings": dict(self._settings(), input="bound"),
            "engine": None,
        }
