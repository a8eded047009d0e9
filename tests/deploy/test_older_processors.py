"""INT8 for ONNX Runtime on x86-64 without VNNI, played by qemu: the numbers are those of every other processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from copy import deepcopy

import numpy as np
import onnx
import pytest
from onnx import helper

from edgecl.deploy.qdq import weight_scales

from .sketch import Sketch, images_of, quantize, quantize_net, ranges_of, run

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="qemu-user runs this Python on x86-64 only"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 (Debian: qemu-user-static) on the PATH"),
]

# Without torch, which takes a minute to import there.
RUN_FILES = """
import sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for file in sys.argv[1:]:
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    numpy.save(file + ".out.npy", session.run(None, {"input": numpy.load(file + ".in.npy")})[0])
"""


def run_python(code, *words, emulated, **environment):
    """Run a program as it is, or on a processor with AVX2 and nothing later."""
    before = [QEMU, "-cpu", "Haswell"] if emulated else []
    subprocess.run(
        [*before, sys.executable, "-c", code, *map(str, words)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=None if not emulated else subprocess.DEVNULL,  # qemu lists what of Haswell it lacks
        timeout=600,
    )


def run_there(pairs, folder):
    """Return the first output of each (model, images) on the emulated processor."""
    files = [folder / f"{place}.onnx" for place in range(len(pairs))]
    for file, (model, images) in zip(files, pairs, strict=True):
        onnx.save(model, file)
        np.save(f"{file}.in.npy", images)
    run_python(RUN_FILES, *files, emulated=True)
    return [np.load(f"{file}.out.npy") for file in files]


def exposed(model, tensor):
    """Let a model return what a tensor is after its pair, and the step of that pair."""
    there = next(
        node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == tensor
    )
    back = next(node for node in model.graph.node if there.output[0] in node.input)
    opened = deepcopy(model)
    opened.graph.output.insert(0, helper.make_empty_tensor_value_info(back.output[0]))
    step = next(entry for entry in model.graph.initializer if entry.name == back.input[1])
    return opened, float(onnx.numpy_helper.to_array(step))


KERNELS = {
    "pointwise": {},
    "odd": {"inputs": 37, "outputs": 19},
    "dense": {"kernel": 3},
    "grouped": {"kernel": 3, "group": 4},
    "two per channel": {"kernel": 3, "inputs": 16, "outputs": 32, "group": 16},
    "depthwise": {"kernel": 3, "group": 32},
    "wide depthwise": {"kernel": 5, "group": 32, "stride": 2},
}


def worst(*, inputs=32, outputs=32, **shape):
    """A convolution whose weights are nearly as large as its largest, and images at the end of the range."""
    net = Sketch()
    net.conv("input", "a", inputs=inputs, outputs=outputs, **shape)
    weights = net.constants["a_w"]
    signs = np.where(net.random.random((len(weights), 1, 1, 1)) < 0.5, -1, 1)
    net.constants["a_w"] = (signs * net.random.uniform(0.9, 1, weights.shape)).astype(np.float32)
    net.conv("a", "output", inputs=outputs, outputs=4)
    images = net.random.uniform(0, 1, (2, inputs, 9, 9)).astype(np.float32)
    images[0] = 1
    return net.model(channels=inputs, side=9), images


def wrong_steps(pairs, folder):
    """Return how many steps of the convolution's output each form is off there, at most."""
    opened = [(*exposed(form, "a"), images) for form, images in pairs]
    there = run_there([(form, images) for form, _, images in opened], folder)
    # Without optimization ONNX Runtime computes in floats what stands between two pairs.
    return [
        float(np.abs(found - run(form, images, plain=True)).max() / step)
        for found, (form, step, images) in zip(there, opened, strict=True)
    ]


def test_every_integer_convolution_computes_there_what_floats_do(tmp_path, monkeypatch):
    models = [worst(**shape) for shape in KERNELS.values()]
    ranges = [ranges_of(model, images) for model, images in models]

    def quantized():
        return [
            (quantize(model, form="int8-cpu", ranges=seen), images)
            for (model, images), seen in zip(models, ranges, strict=True)
        ]

    forms = quantized()
    # With 8 bits everywhere the matrix products saturate there, so that this test can fail.
    monkeypatch.setattr("edgecl.deploy.qdq.paired_weight_scales", weight_scales)
    steps = wrong_steps(forms + quantized(), tmp_path)
    exact = dict(zip(KERNELS, steps[: len(KERNELS)], strict=True))
    saturated = dict(zip(KERNELS, steps[len(KERNELS) :], strict=True))
    assert max(exact.values()) < 1.01, exact
    assert {name for name, off in saturated.items() if off < 1.01} == {"depthwise", "wide depthwise"}, (
        saturated
    )
    assert min(off for name, off in saturated.items() if "depthwise" not in name) > 5, saturated


def test_every_operator_of_a_net_computes_there_what_it_does_here(tmp_path):
    pairs = [(quantize_net("int8-cpu", classifier=classifier), images_of()) for classifier in (True, False)]
    for (model, images), found in zip(pairs, run_there(pairs, tmp_path), strict=True):
        for here in (run(model, images), run(model, images, plain=True)):
            assert np.abs(found - here).max() < 0.02 * np.abs(here).max()
