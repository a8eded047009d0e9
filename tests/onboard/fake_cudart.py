# ruff: noqa: N802, N815
"""A CUDA runtime without a GPU: its memory is the host's, its streams do nothing before someone waits for them.

Work that is queued stays undone until a synchronization, so that a missing one shows as stale results. Time is
scripted: every piece of work takes the milliseconds of COST. Python 3.6 grammar, since one test runs it there.
"""

import ctypes

COST_MS = {"copy": 1.0, "net": 4.0, "fill": 0.5, "graph net": 3.0}

INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, CAPTURE_INVALIDATED = 1, 2, 700, 901
TEXTS = {
    INVALID_VALUE: b"invalid argument",
    OUT_OF_MEMORY: b"out of memory",
    35: b"CUDA driver version is insufficient for CUDA runtime version",
    100: b"no CUDA-capable device is detected",
    ILLEGAL_ADDRESS: b"an illegal memory access was encountered",
    CAPTURE_INVALIDATED: b"operation failed due to a previous error during capture",
}


def destroyer(table):
    def destroy(self, handle):
        del getattr(self, table)[handle.value]

    return destroy


class Stream:
    def __init__(self):
        self.queue = []
        self.captured = None  # a list while capturing
        self.capture_broken = False

    def add(self, kind, work):
        (self.queue if self.captured is None else self.captured).append((kind, work))


class FakeCudart:
    """Stands for what `ctypes.CDLL` returns: functions take ctypes values, as the real ones do."""

    def __init__(self, version=12060, device_status=0, gpu=b"Orin", capability=(8, 7), integrated=1):
        self.version, self.device_status = version, device_status
        self.gpu_name, self.capability, self.integrated = gpu, capability, integrated
        self.free_bytes, self.total_bytes = 3 << 30, 8 << 30
        self.calls = []
        self.memory = {}  # address -> buffer
        self.streams, self.events, self.graphs, self.executables = {}, {}, {}, {}
        self.clock_ms = 0.0
        self.next_handle = 0x7F0000000000  # needs more than 32 bits, as real pointers do
        self.fail = {}  # function -> status
        self.empty_graphs = False  # what is captured is lost
        self.cudaGetErrorString = _ErrorString()

    def live(self):
        """Return how many things were made and not given back."""
        kinds = (self.memory, self.streams, self.events, self.graphs, self.executables)
        return sum(len(kind) for kind in kinds)

    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or name == "cudaGetErrorString":
            return value

        def call(*arguments):
            self.calls.append(name)
            if name in self.fail:
                return self.fail[name]
            return value(*arguments) or 0

        return call

    def _new(self, table, thing, out):
        self.next_handle += 0x1000
        table[self.next_handle] = thing
        out._obj.value = self.next_handle

    # --- what is there ---

    def cudaGetDeviceCount(self, out):
        out._obj.value = 0 if self.device_status else 1
        return self.device_status

    def cudaRuntimeGetVersion(self, out):
        out._obj.value = self.version

    def cudaDriverGetVersion(self, out):
        out._obj.value = self.version + 10

    def cudaGetDeviceProperties(self, out, device):
        assert device.value == 0
        out.raw = self.gpu_name + b"\0" * (len(out.raw) - len(self.gpu_name))

    def cudaDeviceGetAttribute(self, out, attribute, device):
        values = {16: 8, 18: self.integrated, 75: self.capability[0], 76: self.capability[1]}
        out._obj.value = values[attribute.value]

    def cudaMemGetInfo(self, free, total):
        free._obj.value, total._obj.value = self.free_bytes, self.total_bytes

    def cudaGetLastError(self):
        return 0

    # --- memory ---

    def _allocate(self, out, size):
        if size > self.free_bytes:
            return OUT_OF_MEMORY
        buffer = ctypes.create_string_buffer(size)
        out._obj.value = ctypes.addressof(buffer)
        self.memory[out._obj.value] = buffer
        return 0

    def cudaMalloc(self, out, size):
        return self._allocate(out, size.value)

    def cudaHostAlloc(self, out, size, flags):
        assert isinstance(flags, ctypes.c_uint)
        return self._allocate(out, size.value)

    def cudaFree(self, address):
        return 0 if self.memory.pop(address.value, None) is not None else INVALID_VALUE

    cudaFreeHost = cudaFree

    def _inside(self, address, size):
        return any(
            start <= address and address + size <= start + len(buffer.raw)
            for start, buffer in self.memory.items()
        )

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert isinstance(size, ctypes.c_size_t)
        assert kind.value in (1, 2)
        to, source, size = to.value, source.value, size.value
        if not (self._inside(to, size) and self._inside(source, size)):
            return ILLEGAL_ADDRESS
        self.streams[stream.value].add("copy", lambda: ctypes.memmove(to, source, size))
        return 0

    def cudaMemsetAsync(self, address, value, size, stream):
        address, value, size = address.value, value.value, size.value
        if not self._inside(address, size):
            return ILLEGAL_ADDRESS
        self.streams[stream.value].add("fill", lambda: ctypes.memset(address, value, size))
        return 0

    # --- streams and events ---

    def cudaStreamCreateWithFlags(self, out, flags):
        assert flags.value == 1
        self._new(self.streams, Stream(), out)

    def cudaStreamSynchronize(self, stream):
        self._drain(self.streams[stream.value])

    def _drain(self, stream):
        work, stream.queue = stream.queue, []
        for kind, do in work:
            self.clock_ms += COST_MS.get(kind, 0.0)
            do()

    def cudaEventCreate(self, out):
        self._new(self.events, {"ms": None}, out)

    def cudaEventRecord(self, event, stream):
        taken = self.events[event.value]
        self.streams[stream.value].add("event", lambda: taken.update(ms=self.clock_ms))

    def cudaEventSynchronize(self, event):
        assert event.value in self.events
        for stream in self.streams.values():
            self._drain(stream)

    def cudaEventElapsedTime(self, out, start, end):
        out._obj.value = self.events[end.value]["ms"] - self.events[start.value]["ms"]

    cudaStreamDestroy, cudaEventDestroy = destroyer("streams"), destroyer("events")
    cudaGraphDestroy, cudaGraphExecDestroy = destroyer("graphs"), destroyer("executables")

    # --- graphs ---

    def cudaStreamBeginCapture(self, stream, mode):
        assert mode.value == 1
        assert not self.streams[stream.value].queue, "captured with work still queued"
        self.streams[stream.value].captured = []

    def cudaStreamEndCapture(self, stream, out):
        stream = self.streams[stream.value]
        work, stream.captured = stream.captured, None
        if stream.capture_broken:
            stream.capture_broken = False
            return CAPTURE_INVALIDATED
        self._new(self.graphs, [] if self.empty_graphs else work, out)
        return 0

    def cudaGraphInstantiate(self, out, graph, *rest):
        if self.version >= 12000:
            assert [type(value) for value in rest] == [ctypes.c_ulonglong]
        else:
            assert [type(value) for value in rest] == [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._new(self.executables, list(self.graphs[graph.value]), out)

    def cudaGraphLaunch(self, executable, stream):
        for kind, work in self.executables[executable.value]:
            self.streams[stream.value].add("graph net" if kind == "net" else kind, work)


class _ErrorString:
    restype = None

    def __call__(self, status):
        assert self.restype is ctypes.c_char_p
        return TEXTS.get(status.value)
