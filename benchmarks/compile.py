"""Compare the speed of a net's compiled forms with float32 and with timm's own ONNX; prints a table and one JSON line.

    python benchmarks/compile.py                                  # three nets, batch 1, 224 px, one thread: minutes
    python benchmarks/compile.py --nets mobilenetv1_100 --rounds 24

Each file is loaded by a process of its own, pinned to one core with one thread. The processes take turns, A B C A B C,
one block each per round, so that whatever else the machine does meets all of them. What is timed is the processor time
of an inference: on a quiet machine that is the time on the clock, on a busy one it leaves out the waiting for other
processes. A block gives its fastest inference, a ratio is the median over rounds of float32's over the other's in the
same round, a time the fastest of all.
Weights are random, with batch norms that did something: they decide no speed here, and no accuracy is measured.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from timing import Server, conditions_of, in_turns, options_of, processor, ratio_of, table

NETS = ("mobilenetv1_100", "mobilenetv3_large_100", "efficientnet_b0")
SIDE = 224
BLOCK_S = 0.25
WARM_UP_S = 1.0
FP32 = "fp32"
# Dot products of whole numbers.
INTEGER = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--nets", nargs="+", default=list(NETS))
    options.add_argument("--rounds", type=int, default=16)
    options.add_argument("--core", type=int, default=0)
    options.add_argument("--keep", type=Path, help="write the files here and leave them")
    options.add_argument("--serve", nargs=2, metavar=("RUNTIME", "FILE"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        serve(*given.serve, core=given.core)
        return
    results = {}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        for arch in given.nets:
            folder = (given.keep or Path(scratch)) / arch
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{arch}: exporting", file=sys.stderr, flush=True)
            write_variants(arch, folder)
            print(f"{arch}: measuring", file=sys.stderr, flush=True)
            results[arch] = {"latency": measure(folder, rounds=given.rounds, core=given.core)}
    conditions = conditions_of(
        load_before,
        ["onnxruntime", "openvino", "torch", "timm", "onnx"],
        integer_instructions=[flag for flag in processor()[1] if flag in INTEGER],
        pinned_to_core=given.core,
        threads=1,
        batch=1,
        image_size=SIDE,
        rounds=given.rounds,
        block_s=BLOCK_S,
        clock="processor time",
        weights="random",
    )
    print_tables(results, conditions)
    print(json.dumps({"benchmark": "compile", "conditions": conditions, "results": results}))


def write_variants(arch: str, folder: Path) -> None:
    """Write timm's ONNX and all of edgecl's forms of one net."""
    import numpy as np
    import torch
    from timm.utils.onnx import onnx_export

    from edgecl.config.target import read_target
    from edgecl.deploy.calibrate import calibrate
    from edgecl.deploy.int8 import quantize
    from edgecl.deploy.onnx import onnx_from_net
    from edgecl.nets.backbone import create_backbone, is_norm

    torch.manual_seed(0)
    net = create_backbone(arch, num_classes=1000).eval()
    for module in net.modules():
        if is_norm(module):
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_export(net, str(folder / "timm.onnx"), batch_size=1, input_size=(3, SIDE, SIDE))
    cpu, openvino = (read_target(name).graph for name in ("ort-cpu", "openvino-cpu"))
    images = np.random.default_rng(0).normal(size=(16, 3, SIDE, SIDE)).astype(np.float32)
    fp32, plain = (
        onnx_from_net(net, graph=graph, shape=(3, SIDE, SIDE), metadata={}) for graph in (cpu, openvino)
    )
    cpu_ranges, plain_ranges = (calibrate(model, images, ["minmax"])["minmax"] for model in (fp32, plain))
    forms = {
        FP32: fp32,
        "int8-cpu": quantize(fp32, form="int8-cpu", ranges=cpu_ranges),
        "int8-trt": quantize(plain, form="int8-trt", ranges=plain_ranges),
    }
    for name, model in forms.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def serve(runtime: str, file: str, *, core: int) -> None:
    """Load one file and time a block of inferences for every line that comes in."""
    os.sched_setaffinity(0, {core})
    import numpy as np

    image = np.random.default_rng(1).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    run = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[runtime](file, image)

    def block(seconds: float) -> list[float]:
        times = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            started = time.process_time()
            run()
            times.append(time.process_time() - started)
        return times

    block(WARM_UP_S)
    for _ in sys.stdin:
        block(0)  # The other processes had the caches.
        print(json.dumps({"fastest_ms": 1e3 * min(block(BLOCK_S))}), flush=True)


def open_onnxruntime(file: str, image):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: image}
    return lambda: session.run(None, fed)


def open_openvino(file: str, image):
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    model.reshape(list(image.shape))
    # Without the hint OpenVINO computes in bfloat16 where the processor can, which is another precision.
    hints = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    request.set_input_tensor(openvino.Tensor(image))
    return request.infer


def measure(folder: Path, *, rounds: int, core: int) -> dict[str, dict]:
    """Time all forms in turns."""
    variants = {
        FP32: ("onnxruntime", FP32),
        "timm's ONNX": ("onnxruntime", "timm"),
        "int8-cpu": ("onnxruntime", "int8-cpu"),
    }
    if importlib.util.find_spec("openvino"):
        variants["OpenVINO fp32"] = ("openvino", FP32)
        variants["OpenVINO int8-trt"] = ("openvino", "int8-trt")
        variants["OpenVINO int8-cpu"] = ("openvino", "int8-cpu")
    servers = {}
    try:
        for name, (runtime, stem) in variants.items():
            words = ("--core", core, "--serve", runtime, folder / f"{stem}.onnx")
            servers[name] = Server(__file__, *words, OPENVINO_TELEMETRY_OPT_OUT="1")
        blocks: dict[str, list[float]] = {name: [] for name in servers}
        for _, name in in_turns(servers, rounds):
            blocks[name].append(servers[name].ask("go")["fastest_ms"])
    finally:
        for server in servers.values():
            server.close()
    return {
        name: {
            "ms": min(times),
            "median_ms": statistics.median(times),
            **ratio_of(times, blocks[FP32], "times_faster_than_fp32"),
            "of_fastest_blocks": min(blocks[FP32]) / min(times),
        }
        for name, times in blocks.items()
    }


def print_tables(results: dict[str, dict], conditions: dict) -> None:
    """Print conditions, one row per form, and the goals."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    print(
        f"{conditions['name']}, {', '.join(conditions['integer_instructions']) or 'no integer dot product'}; {versions}"
    )
    print(
        f"batch 1, {SIDE} px, 1 thread on core {conditions['pinned_to_core']} of {conditions['cores']}, random weights; "
        f"load {conditions['load_before']} before, {conditions['load_after']} after\n"
    )
    nets = list(results)
    body = []
    for form in results[nets[0]]["latency"]:
        cells = [form]
        for arch in nets:
            row = results[arch]["latency"][form]
            low, high = row["range"]
            cells.append(f"{row['ms']:.2f} ms {row['times_faster_than_fp32']:.2f}x [{low:.2f}, {high:.2f}]")
        body.append(cells)
    print(table(["form", *nets], body) + "\n")


if __name__ == "__main__":
    main()
