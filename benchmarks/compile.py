"""Compare the speed of a net's compiled forms with float32 and with timm's own ONNX; prints a table and one JSON line.

    python benchmarks/compile.py                                  # three nets, batch 1, 224 px, one thread: minutes
    python benchmarks/compile.py --nets mobilenetv1_100 --rounds 24

Each file is loaded by a process of its own, pinned to one core with one thread. The processes take turns, A B C A B C,
one block each per round, so that whatever else the machine does meets all of them. What is timed is the processor time
of an inference: on a quiet machine that is the time on the clock, on a busy one it leaves out the waiting for other
processes. A block gives its fastest inference, a ratio is the median over rounds of float32's over the other's in the
same round, a time the fastest of all. Engines of TensorRT for RTX are only compiled, each in a process of its own.
Weights are random, with batch norms that did something: they decide no speed here, and no accuracy is measured.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

NETS = ("mobilenetv1_100", "mobilenetv3_large_100", "efficientnet_b0")
SIDE = 224
BLOCK_S = 0.25
WARM_UP_S = 1.0
FP32 = "fp32"
GOALS = {
    "fp32 over timm's": dict.fromkeys(NETS, 1.02),
    "int8-cpu": {"mobilenetv1_100": 2.6, "mobilenetv3_large_100": 1.35, "efficientnet_b0": 1.35},
    "compile": 3.0,
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--nets", nargs="+", default=list(NETS))
    options.add_argument("--rounds", type=int, default=16)
    options.add_argument("--core", type=int, default=0)
    options.add_argument("--no-engines", action="store_true")
    options.add_argument("--keep", type=Path, help="write the files here and leave them")
    options.add_argument("--serve", nargs=2, metavar=("RUNTIME", "FILE"), help=argparse.SUPPRESS)
    options.add_argument("--compile", nargs=3, metavar=("FORM", "PRECISION", "FILE"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        serve(*given.serve, core=given.core)
        return
    if given.compile:
        compile_engine(*given.compile, core=given.core)
        return
    results = {}
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch:
        for arch in given.nets:
            folder = (given.keep or Path(scratch)) / arch
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{arch}: exporting", file=sys.stderr, flush=True)
            write_variants(arch, folder)
            print(f"{arch}: measuring", file=sys.stderr, flush=True)
            results[arch] = {"latency": measure(folder, rounds=given.rounds, core=given.core)}
            if importlib.util.find_spec("tensorrt_rtx") and not given.no_engines:
                results[arch]["compile"] = compile_all(folder, core=given.core)
    conditions = describe(load_before, core=given.core)
    print_tables(results, conditions)
    print(
        json.dumps(
            {
                "benchmark": "compile",
                "batch": 1,
                "image_size": SIDE,
                "threads": 1,
                "rounds": given.rounds,
                "block_s": BLOCK_S,
                "clock": "processor time",
                "weights": "random",
                "goals": GOALS,
                "conditions": conditions,
                "results": results,
            }
        )
    )


def write_variants(arch: str, folder: Path) -> None:
    """Write timm's ONNX and all of edgecl's forms of one net."""
    import numpy as np
    import torch
    from timm.utils.onnx import onnx_export

    from edgecl.config.target import read_target
    from edgecl.deploy.calibrate import calibrate
    from edgecl.deploy.fp16 import half
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
    cpu, openvino, rtx = (read_target(name).graph for name in ("ort-cpu", "openvino-cpu", "rtx"))
    images = np.random.default_rng(0).normal(size=(16, 3, SIDE, SIDE)).astype(np.float32)
    fp32, plain, typed = (
        onnx_from_net(net, graph=graph, shape=(3, SIDE, SIDE), metadata={}) for graph in (cpu, openvino, rtx)
    )
    cpu_ranges, plain_ranges, typed_ranges = (
        calibrate(model, images, ["minmax"])["minmax"] for model in (fp32, plain, typed)
    )
    forms = {
        FP32: fp32,
        "int8-cpu": quantize(fp32, form="int8-cpu", ranges=cpu_ranges),
        "int8-trt": quantize(plain, form="int8-trt", ranges=plain_ranges),
        "rtx-fp32": typed,
        "rtx-fp16": half(typed, images=images[:4])[0],
    }
    for form in ("int8-trt", "int8-trt-fp16"):
        forms[f"rtx-{form}"] = quantize(typed, form=form, ranges=typed_ranges, images=images[:4])
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
    print("ready", flush=True)
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


class Server:
    """A process that holds one session.

    Args:
        runtime: "onnxruntime" or "openvino".
        file: the ONNX file.
        core: which it is pinned to.
    """

    def __init__(self, runtime: str, file: Path, *, core: int):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--core", str(core), "--serve", runtime, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENVINO_TELEMETRY_OPT_OUT": "1"},
        )
        if self._read() != "ready":
            raise SystemExit(f"{runtime} cannot run {file.name}")

    def _read(self) -> str:
        return self._process.stdout.readline().strip()

    def block_ms(self) -> float:
        """Return the time of the fastest inference of one block."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return json.loads(self._read())["fastest_ms"]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


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
            servers[name] = Server(runtime, folder / f"{stem}.onnx", core=core)
        blocks: dict[str, list[float]] = {name: [] for name in servers}
        for index in range(rounds):
            # Every other round backwards: no form always follows the same one.
            order = list(servers) if index % 2 == 0 else list(reversed(servers))
            for name in order:
                blocks[name].append(servers[name].block_ms())
    finally:
        for server in servers.values():
            server.close()
    found = {}
    for name, times in blocks.items():
        ratios = [base / own for base, own in zip(blocks[FP32], times, strict=True)]
        found[name] = {
            "ms": min(times),
            "median_ms": statistics.median(times),
            "times_faster_than_fp32": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "of_fastest_blocks": min(blocks[FP32]) / min(times),
        }
    return found


def compile_all(folder: Path, *, core: int) -> dict[str, dict | None]:
    """Compile every form for RTX GPUs; None for one that fails."""
    seconds = {}
    for form, precision in (
        ("fp32", "fp32"),
        ("fp16", "fp16"),
        ("int8-trt", "int8"),
        ("int8-trt-fp16", "int8"),
    ):
        words = [sys.executable, __file__, "--core", str(core), "--compile", form, precision]
        done = subprocess.run(
            [*words, str(folder / f"rtx-{form}.onnx")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seconds[form] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return seconds


def compile_engine(form: str, precision: str, file: str, *, core: int) -> None:
    """Compile one engine and say how long it took, the loading of the library apart."""
    os.sched_setaffinity(0, {core})
    import tensorrt_rtx  # noqa: F401

    from edgecl.config.target import read_target
    from edgecl.onboard.engine import build_plan

    target = read_target("rtx")
    started, processor = time.perf_counter(), time.process_time()
    built = build_plan(
        file,
        runtime="tensorrt_rtx",
        precision=precision,
        form=form,
        build=target.build.model_dump(mode="json"),
        input_form={
            "name": "input",
            "shape": [1, 3, SIDE, SIDE],
            "dtype": "float32",
            "dynamic_batch": False,
            "max_batch": 1,
        },
    )
    assert built.plan
    spent = {"processor_s": time.process_time() - processor, "clock_s": time.perf_counter() - started}
    print(json.dumps(spent))


def describe(load_before: tuple[float, float, float], *, core: int) -> dict:
    """Say on what and beside what it was measured."""
    model, flags = platform.machine(), set()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    integer = sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
    versions = {}
    for package in ("onnxruntime", "openvino", "tensorrt_rtx", "torch", "timm", "onnx"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "integer_instructions": integer,
        "cores": os.cpu_count(),
        "pinned_to_core": core,
        "threads": 1,
        "load_before": [round(value, 2) for value in load_before],
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "versions": versions,
    }


def print_tables(results: dict[str, dict], conditions: dict) -> None:
    """Print conditions, one row per form, and the goals."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    print(
        f"{conditions['cpu']}, {', '.join(conditions['integer_instructions']) or 'no integer dot product'}; {versions}"
    )
    print(
        f"batch 1, {SIDE} px, 1 thread on core {conditions['pinned_to_core']} of {conditions['cores']}, random weights; "
        f"load {conditions['load_before'][0]} before, {conditions['load_after'][0]} after\n"
    )
    nets = list(results)
    print("| form | " + " | ".join(nets) + " |\n| --- |" + " --- |" * len(nets))
    for form in results[nets[0]]["latency"]:
        cells = []
        for arch in nets:
            row = results[arch]["latency"][form]
            low, high = row["range"]
            cells.append(f"{row['ms']:.2f} ms {row['times_faster_than_fp32']:.2f}x [{low:.2f}, {high:.2f}]")
        print(f"| {form} | " + " | ".join(cells) + " |")
    for form in results[nets[0]].get("compile", {}):
        cells = (results[arch]["compile"][form] for arch in nets)
        print(
            f"| compile {form} | "
            + " | ".join("failed" if cell is None else f"{cell['processor_s']:.2f} s" for cell in cells)
            + " |"
        )
    print()
    for arch in nets:
        for words, ok in evaluator(arch, results[arch]):
            print(f"{'reached' if ok else 'MISSED '} {arch}: {words}")


def evaluator(arch: str, result: dict) -> list[tuple[str, bool]]:
    """Hold a net's numbers to the goals."""
    lines = []
    latency = result["latency"]
    slower = latency["timm's ONNX"]["times_faster_than_fp32"]
    if arch in NETS:
        goal = GOALS["fp32 over timm's"][arch]
        lines.append((f"fp32 takes {slower:.3f} of the time of timm's ONNX, at most {goal}", slower <= goal))
        goal, found = GOALS["int8-cpu"][arch], latency["int8-cpu"]["times_faster_than_fp32"]
        lines.append((f"int8-cpu is {found:.2f}x faster than fp32, at least {goal}x", found >= goal))
    for form, spent in result.get("compile", {}).items():
        ok = spent is not None and spent["processor_s"] < GOALS["compile"]
        words = "fails" if spent is None else f"takes {spent['processor_s']:.2f} s"
        lines.append((f"compiling {form} {words}, below {GOALS['compile']:g} s", ok))
    return lines


if __name__ == "__main__":
    main()
