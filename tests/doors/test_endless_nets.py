"""Nets that never end, that crash, or that fail: they take their process along, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onboard.tiny_bundle import make_bundle, read_manifest, write_manifest
from onnx import TensorProto, helper, numpy_helper

import edgecl
from edgecl.deploy.device import bench, verify
from edgecl.errors import DeviceError
from edgecl.onboard.bundle import sha256_of_file

REPOSITORY = Path(edgecl.__file__).parents[1]


def put_before_the_output(bundle, nodes, tensors=()):
    """Change the net so that its outputs pass through some nodes, 'inner' -> 'output', and seal the bundle again."""
    model = onnx.load(bundle / "model.onnx")
    model.graph.node[-1].output[0] = "inner"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    onnx.save(model, bundle / "model.onnx")
    manifest = read_manifest(bundle)
    manifest["files"]["model.onnx"] = sha256_of_file(bundle / "model.onnx")
    write_manifest(bundle, manifest)
    return bundle


@pytest.fixture
def endless(tmp_path):
    """A bundle whose net loops for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_again"]),
            helper.make_node("Abs", ["before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on_again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["", "yes", "inner"], ["output"], body=body)
    yes = numpy_helper.from_array(np.array(True), "yes")
    return put_before_the_output(make_bundle(tmp_path / "endless"), [loop], [yes])


def processes_naming(path):
    """The processes whose command names a path."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(path) in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_it_loops(bundle, parent):
    """Return the process in which the net runs, once that has computed for longer than it takes to start."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for pid in processes_naming(bundle):
            if (
                "edgecl.onboard" in Path(f"/proc/{pid}/cmdline").read_text()
                and "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()
                and processor_seconds(pid) > 2
            ):
                return pid
        assert parent.poll() is None, parent.communicate()
        time.sleep(0.05)
    raise AssertionError("the net never ran")


@pytest.mark.parametrize("act", [verify, bench])
def test_a_net_that_loops_for_ever_is_ended_with_its_process(endless, monkeypatch, act):
    monkeypatch.setattr("edgecl.deploy.process.SILENCE_S", 3.0)
    with pytest.raises(DeviceError, match=r"said nothing for 3 s") as caught:
        act(endless)
    assert "loop" in caught.value.hint
    assert processes_naming(endless) == []
    assert not (endless / "verify.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["edgecl", "verify"], "edgecl: interrupted\n"),
        (["edgecl", "bench", "--threads", "1"], "edgecl: interrupted\n"),
        (["edgecl.onboard", "verify"], ""),  # the bundle's own zip, whose process the net runs in
    ],
)
def test_ctrl_c_ends_a_net_that_loops_for_ever_and_its_process(endless, words, said):
    # Of no group but their own, and only the command is told: a terminal would tell both.
    with subprocess.Popen(
        [sys.executable, "-m", *words, str(endless)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    ) as process:
        try:
            pid = wait_until_it_loops(endless, process)
            assert (pid == process.pid) == (words[0] == "edgecl.onboard")
            process.send_signal(signal.SIGINT)
            found = process.communicate(timeout=30)[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGINT
    assert found.endswith(said)
    assert "Traceback" not in found
    assert processes_naming(endless) == []


def test_a_slow_net_that_says_how_far_it_is_may_take_its_time(tmp_path, monkeypatch):
    code = (
        "import sys, time\n"
        "for _ in range(6): time.sleep(0.5); sys.stderr.write('bench: still here\\n'); sys.stderr.flush()\n"
        'print(\'{"ok": true, "files_ok": true}\')'
    )
    monkeypatch.setattr("edgecl.deploy.process._ONBOARD", [sys.executable, "-c", code])
    monkeypatch.setattr("edgecl.deploy.process.SILENCE_S", 2.0)
    lines = []
    assert verify(make_bundle(tmp_path / "bundle"), report=lines.append).ok is True
    assert lines == ["still here"] * 6


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGILL])
def test_a_net_that_kills_its_process_is_named(tmp_path, monkeypatch, number):
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    monkeypatch.setattr("edgecl.deploy.process._ONBOARD", [sys.executable, "-c", code])
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(DeviceError, match=f"was killed by {number.name}") as caught:
        verify(bundle)
    assert caught.value.where == {}
    assert not (bundle / "verify.json").exists()


def test_a_net_that_fails_is_an_error_without_colors(tmp_path):
    """onnxruntime logs a failing node in colors, also into a file."""
    nodes = [
        helper.make_node("ArgMax", ["inner"], ["best"], axis=1, keepdims=0),
        helper.make_node("Add", ["best", "far"], ["beyond"]),
        helper.make_node("Gather", ["inner", "beyond"], ["picked"], axis=0),
        helper.make_node("Identity", ["picked"], ["output"]),
    ]
    bundle = put_before_the_output(
        make_bundle(tmp_path / "bundle"), nodes, [numpy_helper.from_array(np.array([1000]), "far")]
    )
    done = subprocess.run(
        [sys.executable, "-m", "edgecl.onboard", "verify", str(bundle)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["name"] == "device"
    assert "cannot run the net" in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stderr.count("edgecl: ") == 1
    assert done.stderr.startswith("edgecl: ")
