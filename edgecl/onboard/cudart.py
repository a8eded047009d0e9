"""The few calls of the CUDA runtime that running an engine needs, through ctypes: no package to install on a board."""

import ctypes
import glob
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

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
NON_BLOCKING = 1

_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76
# `cudaDeviceProp` begins with the name, 256 characters; it has grown from 0.7 to 1.1 kB over the versions.
_NAME_BYTES, _PROPERTIES_BYTES = 256, 16384


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
    patterns = [Path(folder) / name for name in NAMES for folder in FOLDERS]
    patterns += [
        Path(entry) / folder / name
        for name in NAMES
        for entry in sys.path
        if entry
        for folder in WHEEL_FOLDERS
    ]
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
            count = ctypes.c_int(0)
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
        raise DeviceError(
            "no GPU that CUDA can use: "
            + "; ".join(
                paths[0] + (" and %d more" % (len(paths) - 1) if len(paths) > 1 else "") + ": " + words
                for words, paths in tried.items()
            ),
            "on a Jetson add yourself to the group 'video'; in a container start it with --runtime nvidia; "
            "elsewhere update the GPU driver",
        )

    def _words(self, status: int) -> str:
        text = self._library.cudaGetErrorString(ctypes.c_int(status))
        return "error %d, %s" % (status, text.decode("utf-8", "replace") if text else "which has no text")

    def _call(self, function: str, *arguments: Any) -> None:
        # Every argument is a ctypes value of the C type: without it ctypes would cut a pointer to 32 bits.
        status = int(getattr(self._library, function)(*arguments))
        if status != 0:
            hint = "see what else runs on this GPU"
            if status == 2:
                hint = "free memory: close the desktop and other programs, or add swap; then try again"
            raise DeviceError("%s failed with %s" % (function, self._words(status)), hint)

    def _handle(self, function: str, *arguments: Any) -> int:
        handle = ctypes.c_void_p(None)
        self._call(function, ctypes.byref(handle), *arguments)
        return int(handle.value or 0)

    def _number(self, function: str) -> int:
        number = ctypes.c_int(0)
        self._call(function, ctypes.byref(number))
        return int(number.value)

    # --- what is there ---

    def versions(self) -> Tuple[str, str]:
        """Return the versions of the runtime and of the newest CUDA that the driver supports, such as '12.6'."""
        runtime, driver = self._number("cudaRuntimeGetVersion"), self._number("cudaDriverGetVersion")
        return _version(runtime), _version(driver)

    def gpu(self) -> Gpu:
        """Return what the first GPU is."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, ctypes.c_int(0))
        name = properties.raw[:_NAME_BYTES].partition(b"\0")[0].decode("utf-8", "replace")
        return Gpu(
            name or "gpu",
            "%d.%d" % (self._attribute(_MAJOR), self._attribute(_MINOR)),
            self._attribute(_MULTIPROCESSORS),
            bool(self._attribute(_INTEGRATED)),
        )

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int(0)
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
        return int(value.value)

    def memory(self) -> Tuple[int, int]:
        """Return the free and the whole memory of the GPU in bytes."""
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return int(free.value), int(total.value)

    # --- memory ---

    def malloc(self, size: int) -> int:
        """Return the address of new device memory of this many bytes."""
        return self._handle("cudaMalloc", ctypes.c_size_t(size))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def pinned(self, size: int) -> int:
        """Return the address of new host memory that the GPU reads without a copy in between."""
        return self._handle("cudaHostAlloc", ctypes.c_size_t(size), ctypes.c_uint(0))

    def free_pinned(self, address: int) -> None:
        """Give pinned memory back; arrays on it must not be used any more."""
        self._call("cudaFreeHost", ctypes.c_void_p(address))

    def copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        """Queue a copy of bytes, HOST_TO_DEVICE or DEVICE_TO_HOST."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            ctypes.c_int(kind),
            ctypes.c_void_p(stream),
        )

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        """Queue the filling of device memory with one byte value."""
        self._call(
            "cudaMemsetAsync",
            ctypes.c_void_p(address),
            ctypes.c_int(value),
            ctypes.c_size_t(size),
            ctypes.c_void_p(stream),
        )

    # --- streams and events ---

    def stream(self) -> int:
        """Return a new stream that does not wait for the default one."""
        return self._handle("cudaStreamCreateWithFlags", ctypes.c_uint(NON_BLOCKING))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until everything queued on a stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def event(self) -> int:
        """Return a new event that takes the time."""
        return self._handle("cudaEventCreate")

    def free_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        """Queue the taking of the time."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def elapsed_s(self, start: int, end: int) -> float:
        """Wait for the end and return the seconds between two events."""
        self._call("cudaEventSynchronize", ctypes.c_void_p(end))
        milliseconds = ctypes.c_float(0)
        self._call(
            "cudaEventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end)
        )
        return float(milliseconds.value) / 1000

    # --- graphs ---

    def begin_capture(self, stream: int) -> None:
        """Record what is queued on a stream from here on, instead of doing it."""
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(CAPTURE_THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        """Return the graph of what was queued since `begin_capture`."""
        return self._handle_after("cudaStreamEndCapture", stream)

    def _handle_after(self, function: str, stream: int) -> int:
        handle = ctypes.c_void_p(None)
        self._call(function, ctypes.c_void_p(stream), ctypes.byref(handle))
        return int(handle.value or 0)

    def instantiate(self, graph: int) -> int:
        """Return a graph ready to be launched."""
        # The signature changed with CUDA 12: no error node and log any more, flags instead.
        if self._number("cudaRuntimeGetVersion") >= 12000:
            return self._handle("cudaGraphInstantiate", ctypes.c_void_p(graph), ctypes.c_ulonglong(0))
        nothing = ctypes.c_void_p(None)
        return self._handle(
            "cudaGraphInstantiate", ctypes.c_void_p(graph), nothing, nothing, ctypes.c_size_t(0)
        )

    def launch(self, executable: int, stream: int) -> None:
        """Queue a graph."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(executable), ctypes.c_void_p(stream))

    def free_graph(self, graph: int) -> None:
        """Destroy a graph that `end_capture` returned."""
        self._call("cudaGraphDestroy", ctypes.c_void_p(graph))

    def free_executable(self, executable: int) -> None:
        """Destroy a graph that `instantiate` returned."""
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(executable))

    def clear_error(self) -> None:
        """Forget the last error, as after a capture that failed: later calls would report it once more."""
        self._library.cudaGetLastError()


def array_at(address: int, shape: Tuple[int, ...]) -> np.ndarray:
    """Return float32 host memory at an address as an array that lives only as long as the memory."""
    count = int(np.prod(shape))
    floats = (ctypes.c_float * count).from_address(address)
    array: np.ndarray = np.ctypeslib.as_array(floats).reshape(shape)
    return array


def available_bytes(cuda: Cudart, gpu: Gpu, root: str = "/") -> int:
    """Return how much memory an engine may use.

    On a Jetson it is the processor's: there CUDA counts the page cache as taken, which Linux gives up when asked.
    """
    free, _ = cuda.memory()
    if not gpu.integrated:
        return free
    return max(free, (memory_mib(root, "MemAvailable") or 0) << 20)


def _version(number: int) -> str:
    return "%d.%d" % (number // 1000, number % 1000 // 10)
