from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from edgecl.onboard import cudart
from edgecl.onboard.cudart import (
    CAPTURE_THREAD_LOCAL,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    NON_BLOCKING,
    Cudart,
    Gpu,
    array_at,
    available_bytes,
)
from edgecl.onboard.errors import DeviceError
from onboard.fake_cudart import FakeCudart
from onboard.recorded.boards import plant


def use(monkeypatch, *fakes):
    named = [(f"libcudart.so.{fake.version // 1000}", fake) for fake in fakes]
    monkeypatch.setattr(cudart, "open_libraries", lambda: iter(named))


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCudart()
    use(monkeypatch, fake)
    return fake


@pytest.fixture(scope="module")
def real():
    found = list(cudart.open_libraries())
    if not found:
        pytest.skip("no CUDA runtime library on this machine")
    return found


def has_gpu(libraries):
    count = ctypes.c_int(0)
    return any(
        library.cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value for _, library in libraries
    )


# --- the real library ---


def test_real_library_has_every_function_that_is_called(real):
    text = Path(cudart.__file__).read_text(encoding="utf-8")
    wanted = set(re.findall(r"\bcuda[A-Z]\w+", text)) - {"cudaDeviceProp"}
    assert len(wanted) > 20
    assert not [name for name in wanted if not hasattr(real[0][1], name)]


def test_real_library_without_a_gpu_is_a_named_error(real):
    if has_gpu(real):
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match=r"no GPU .*libcudart.*: error (35|100), \w+") as caught:
        Cudart()
    assert "update the GPU driver" in caught.value.hint


def test_real_library_says_its_version_and_errors(real):
    cuda = Cudart.__new__(Cudart)
    cuda._library = real[0][1]
    cuda._library.cudaGetErrorString.restype = ctypes.c_char_p
    assert re.fullmatch(r"1[0-9]\.\d", cuda.versions()[0])
    if not has_gpu(real):
        with pytest.raises(DeviceError, match=r"cudaMalloc.* error (35|100), .*(driver|device)"):
            cuda.make("cudaMalloc", 16)


def test_a_library_is_found_in_the_folders_of_jetpack(monkeypatch, tmp_path):
    folder = tmp_path / "cuda-10.2" / "targets" / "aarch64-linux" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.10.2").write_bytes(b"no library")
    monkeypatch.setattr(
        cudart, "FOLDERS", (str(tmp_path / "cuda*/lib64"), str(tmp_path / "cuda*/targets/*/lib"))
    )
    assert str(folder / "libcudart.so.10.2") in cudart.library_paths()
    assert str(folder / "libcudart.so.10.2") not in [path for path, _ in cudart.open_libraries()]


def test_no_library_is_a_named_error(monkeypatch):
    monkeypatch.setattr(cudart, "library_paths", lambda: ["libcudart.so.nowhere"])
    with pytest.raises(DeviceError, match=r"no CUDA runtime.*: libcudart\.so\.13, ") as caught:
        Cudart()
    assert "sudo apt install nvidia-jetpack" in caught.value.hint


# --- choosing ---


def test_an_older_runtime_is_taken_where_the_driver_is_too_old_for_the_newest(monkeypatch):
    use(monkeypatch, FakeCudart(version=13000, device_status=35), FakeCudart(version=12020))
    assert Cudart().versions() == ("12.2", "12.3")


def test_every_runtime_that_failed_is_named_and_those_that_fail_alike_are_counted(monkeypatch):
    old = [FakeCudart(version=13000, device_status=35) for _ in range(3)]
    use(monkeypatch, *old, FakeCudart(version=12020, device_status=100))
    with pytest.raises(DeviceError, match="no GPU") as caught:
        Cudart()
    newest, oldest = caught.value.problem.split("; ")
    assert re.search(r"libcudart\.so\.13 and 2 more: error 35, .*driver.* insufficient", newest)
    assert re.match(r"libcudart\.so\.12: error 100, no CUDA-capable device", oldest)


# --- calls ---


def test_gpu_is_named(fake):
    assert Cudart().gpu() == Gpu("Orin", "8.7", 8, True)


def make_stream(cuda):
    return cuda.make("cudaStreamCreateWithFlags", NON_BLOCKING)


def test_bytes_go_to_the_device_and_back_once_the_stream_is_waited_for(fake):
    cuda = Cudart()
    stream = make_stream(cuda)
    sent, got = (cuda.make("cudaHostAlloc", 16, 0) for _ in range(2))
    on_device = cuda.make("cudaMalloc", 16)
    array_at(sent, (2, 2))[...] = [[1, 2], [3, 4]]
    array_at(got, (2, 2))[...] = 0
    cuda.call("cudaMemcpyAsync", on_device, sent, 16, HOST_TO_DEVICE, stream)
    cuda.call("cudaMemcpyAsync", got, on_device, 16, DEVICE_TO_HOST, stream)
    assert not array_at(got, (2, 2)).any()
    cuda.call("cudaStreamSynchronize", stream)
    assert np.array_equal(array_at(got, (2, 2)), [[1, 2], [3, 4]])


def test_events_measure_what_lies_between_them(fake):
    cuda = Cudart()
    stream, memory = make_stream(cuda), cuda.make("cudaMalloc", 4)
    start, end = (cuda.make("cudaEventCreate") for _ in range(2))
    cuda.call("cudaMemsetAsync", memory, 0, 4, stream)
    cuda.call("cudaEventRecord", start, stream)
    for _ in range(2):
        cuda.call("cudaMemsetAsync", memory, 0, 4, stream)
    cuda.call("cudaEventRecord", end, stream)
    assert cuda.elapsed_s(start, end) == pytest.approx(0.001)


@pytest.mark.parametrize("version", [10020, 11040, 12060, 13000])
def test_a_graph_does_again_what_was_captured(monkeypatch, version):
    fake = FakeCudart(version=version)
    use(monkeypatch, fake)
    cuda = Cudart()
    stream, memory = make_stream(cuda), cuda.make("cudaMalloc", 4)
    host = cuda.make("cudaHostAlloc", 4, 0)
    cuda.call("cudaStreamBeginCapture", stream, CAPTURE_THREAD_LOCAL)
    cuda.call("cudaMemsetAsync", memory, 0, 4, stream)
    graph = cuda.end_capture(stream)
    executable = cuda.instantiate(graph)
    cuda.call("cudaGraphDestroy", graph)
    cuda.call("cudaMemsetAsync", memory, 0xFF, 4, stream)
    cuda.call("cudaGraphLaunch", executable, stream)
    cuda.call("cudaMemcpyAsync", host, memory, 4, DEVICE_TO_HOST, stream)
    cuda.call("cudaStreamSynchronize", stream)
    assert array_at(host, (1,))[0] == 0
    for free, handle in (
        ("cudaGraphExecDestroy", executable),
        ("cudaStreamDestroy", stream),
        ("cudaFree", memory),
        ("cudaFreeHost", host),
    ):
        cuda.call(free, handle)
    assert fake.live() == 0


def test_a_failure_names_function_number_and_text_and_for_memory_what_to_do(fake):
    fake.fail["cudaStreamSynchronize"], fake.free_bytes = 700, 10
    cuda = Cudart()
    with pytest.raises(DeviceError, match=r"cudaStreamSynchronize .*error 700, .*illegal memory access"):
        cuda.call("cudaStreamSynchronize", make_stream(cuda))
    with pytest.raises(DeviceError, match=r"cudaMalloc .*error 2, out of memory") as caught:
        cuda.make("cudaMalloc", 11)
    assert "free memory" in caught.value.hint


# --- how much memory ---


def test_page_cache_counts_as_available_on_a_jetson(fake, tmp_path):
    plant(tmp_path, {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:    5242880 kB\n"})
    cuda = Cudart()
    orin, desktop = Gpu("Orin", "8.7", 8, True), Gpu("RTX", "8.9", 76, False)
    assert available_bytes(cuda, orin, str(tmp_path)) == 5 << 30
    assert available_bytes(cuda, desktop, str(tmp_path)) == 3 << 30
    assert available_bytes(cuda, orin, str(tmp_path / "nowhere")) == 3 << 30
