"""The few calls of the CUDA runtime that running an engine needs, through ctypes: no package to install on a board."""

import ctypes
import glob
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from .errors import DeviceError
from .sysfs import memory_mib

# Newest first: of several CUDA versions the first that works with the driver is taken.
NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2", "libcudart.so")
# Where JetPack and the CUDA packages put them, and the wheels below each folder of Python packages.
FOLDERS = ("/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib")
WHEEL_FOLDERS = ("nvidia/cu*/lib", "nvidia/cuda_runtime/lib")

DRIVER_TOO_OLD, NO_DEVICE = 35, 100
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
# Only this thread's calls may disturb a capture, and an unsafe one of them fails it.
CAPTURE_THREAD_LOCAL = 1
# A stream that does not wait for the default one.
NON_BLOCKING = 1

_POINTER, _SIZE, _INT, _UINT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
# The C types of what a call takes, beside the place for what it returns: ctypes would cut a bare pointer to 32 bits.
_TYPES: Dict[str, Tuple[Any, ...]] = {
    "cudaMalloc": (_SIZE,),
    "cudaHostAlloc": (_SIZE, _UINT),  # memory of the host that the GPU reads without a copy in between
    "cudaFree": (_POINTER,),
    "cudaFreeHost": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),  # to, from, bytes, direction, stream
    "cudaMemsetAsync": (_POINTER, _INT, _SIZE, _POINTER),
    "cudaStreamCreateWithFlags": (_UINT,),
    "cudaStreamDestroy": (_POINTER,),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaEventCreate": (),
    "cudaEventDestroy": (_POINTER,),
    "cudaEventRecord": (_POINTER, _POINTER),  # event, stream
    "cudaEventSynchronize": (_POINTER,),
    "cudaGraphLaunch": (_POINTER, _POINTER),  # executable, stream
    "cudaGraphDestroy": (_POINTER,),
    "cudaGraphExecDestroy": (_POINTER,),
}

_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76
# `cudaDeviceProp` begins with the name, 256 characters; it has grown from 0.7 to 1.1 kB over the versions.
_NAME_BYTES, _PROPERTIES_BYTES = 256, 16384


def _typed(function: str, arguments: Sequence[int]) -> List[Any]:
    return [kind(value) for kind, value in zip(_TYPES[function], arguments)]  # noqa: B905


class Gpu(NamedTuple):
    """What tells one GPU from another: 'Orin', '8.7', 8, True for an Orin Nano of 1024 cores."""

    name: str
    compute_capability: str
    multiprocessors: int
    integrated: bool
    """It shares the processor's memory, as on every Jetson."""


def library_paths() -> List[str]:
    """Return where to look for the CUDA runtime: what the loader finds by itself, then the usual folders."""
    paths = list(NAMES)
    wheels = [Path(entry) / folder for entry in sys.path if entry for folder in WHEEL_FOLDERS]
    patterns = [Path(folder) / name for name in NAMES for folder in FOLDERS]
    patterns += [folder / name for name in NAMES for folder in wheels]
    for pattern in patterns:
        found = sorted(glob.glob(str(pattern)), reverse=True)  # noqa: PTH207  # Path.glob needs a fixed beginning
        paths += [path for path in found if path not in paths]
    return paths


def open_libraries() -> Iterator[Tuple[str, Any]]:
    """Yield every CUDA runtime library that loads, with its path."""
    for path in library_paths():
        try:
            yield path, ctypes.CDLL(path)
        except OSError:  # not there, or made for another processor
            continue


class Cudart:
    """The CUDA runtime on the first GPU. Streams, events, graphs and device memory are plain integers here.

    Raises:
        DeviceError: no CUDA runtime, or none that works with the driver, or no GPU.
    """

    def __init__(self) -> None:
        tried: Dict[str, List[str]] = {}
        for path, library in open_libraries():
            self._library = library
            self.path = path
            self._library.cudaGetErrorString.restype = ctypes.c_char_p
            count = _INT(0)
            status = int(self._library.cudaGetDeviceCount(ctypes.byref(count)))
            if status == 0 and count.value > 0:
                return
            tried.setdefault(self._words(status or NO_DEVICE), []).append(path)
        if not tried:
            raise DeviceError(
                "no CUDA runtime found: %s do not load, nor is one in %s"
                % (", ".join(NAMES), " or ".join(FOLDERS)),
                "on a Jetson: sudo apt install nvidia-jetpack; elsewhere: pip install nvidia-cuda-runtime",
            )
        seen = [
            paths[0] + (" and %d more" % (len(paths) - 1) if len(paths) > 1 else "") + ": " + words
            for words, paths in tried.items()
        ]
        raise DeviceError(
            "no GPU that CUDA can use: " + "; ".join(seen),
            "on a Jetson add yourself to the group 'video'; in a container start it with --runtime nvidia; "
            "elsewhere update the GPU driver",
        )

    def _words(self, status: int) -> str:
        text = self._library.cudaGetErrorString(_INT(status))
        return "error %d, %s" % (status, text.decode("utf-8", "replace") if text else "which has no text")

    def call(self, function: str, *arguments: int) -> None:
        """Call a function of _TYPES that returns nothing.

        Raises:
            DeviceError: it fails.
        """
        self._call(function, *_typed(function, arguments))

    def make(self, function: str, *arguments: int) -> int:
        """Return the handle or address that a function of _TYPES makes."""
        return self._out(_POINTER, lambda place: self._call(function, place, *_typed(function, arguments)))

    def _call(self, function: str, *arguments: Any) -> None:
        status = int(getattr(self._library, function)(*arguments))
        if status != 0:
            hint = "see what else runs on this GPU"
            if status == 2:
                hint = "free memory: close the desktop and other programs, or add swap; then try again"
            raise DeviceError("%s failed with %s" % (function, self._words(status)), hint)

    def _out(self, kind: Any, call: Callable[[Any], None]) -> int:
        """Return the number that a call writes to a place."""
        number = kind()
        call(ctypes.byref(number))
        return int(number.value or 0)

    def _number(self, function: str) -> int:
        return self._out(_INT, lambda place: self._call(function, place))

    # --- what is there ---

    def versions(self) -> Tuple[str, str]:
        """Return the versions of the runtime and of the newest CUDA that the driver supports, such as '12.6'."""
        runtime, driver = self._number("cudaRuntimeGetVersion"), self._number("cudaDriverGetVersion")
        return _version(runtime), _version(driver)

    def gpu(self) -> Gpu:
        """Return what the first GPU is."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, _INT(0))
        name = properties.raw[:_NAME_BYTES].partition(b"\0")[0].decode("utf-8", "replace")
        return Gpu(
            name or "gpu",
            "%d.%d" % (self._attribute(_MAJOR), self._attribute(_MINOR)),
            self._attribute(_MULTIPROCESSORS),
            bool(self._attribute(_INTEGRATED)),
        )

    def _attribute(self, attribute: int) -> int:
        return self._out(
            _INT, lambda place: self._call("cudaDeviceGetAttribute", place, _INT(attribute), _INT(0))
        )

    def free_bytes(self) -> int:
        """Return the free memory of the GPU."""
        free, total = _SIZE(0), _SIZE(0)
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return int(free.value)

    def elapsed_s(self, start: int, end: int) -> float:
        """Wait for the end and return the seconds between two events."""
        self.call("cudaEventSynchronize", end)
        milliseconds = ctypes.c_float(0)
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), _POINTER(start), _POINTER(end))
        return float(milliseconds.value) / 1000

    def end_capture(self, stream: int) -> int:
        """Return the graph of what was queued on a stream since its capture began."""
        try:
            return self._out(
                _POINTER, lambda place: self._call("cudaStreamEndCapture", _POINTER(stream), place)
            )
        except DeviceError:
            self._library.cudaGetLastError()  # later calls would report it once more
            raise

    def instantiate(self, graph: int) -> int:
        """Return a graph ready to be launched."""
        # The signature changed with CUDA 12: no error node and log any more, flags instead.
        new = self._number("cudaRuntimeGetVersion") >= 12000
        rest = (ctypes.c_ulonglong(0),) if new else (_POINTER(None), _POINTER(None), _SIZE(0))
        return self._out(
            _POINTER, lambda place: self._call("cudaGraphInstantiate", place, _POINTER(graph), *rest)
        )


def array_at(address: int, shape: Tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return host memory at an address as an array that lives only as long as the memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))
    array: np.ndarray = memory.view(dtype).reshape(shape)
    return array


def available_bytes(cuda: Cudart, gpu: Gpu, root: str = "/") -> int:
    """Return how much memory an engine may use.

    On a Jetson it is the processor's: there CUDA counts the page cache as taken, which Linux gives up when asked.
    """
    free = cuda.free_bytes()
    return max(free, (memory_mib(root, "MemAvailable") or 0) << 20) if gpu.integrated else free


def _version(number: int) -> str:
    return "%d.%d" % (number // 1000, number % 1000 // 10)
