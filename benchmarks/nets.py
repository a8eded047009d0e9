"""How long every tested net takes on one core, fp32 and INT8; prints a table and one JSON line.

    python benchmarks/nets.py                               # all of them at 224 pixels, some 20 minutes
    python benchmarks/nets.py --nets repvit_m0_9 mobilenetv3_large_100 --rounds 50

Weights are random, which changes no time: branches are fused, and INT8 is in the form and calibrated as `edgecl export
--target ort-cpu` does. Batch 1, ONNX Runtime, one thread on one core (Linux). All nets in both precisions take turns, a
block of inferences each, for many rounds, so that whatever else happens on the machine happens to all. The number is the
median over the rounds of a block's median, beside it the middle half of these.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from edgecl.config.target import read_target
from edgecl.data.demo_images import render
from edgecl.data.loading import normalize
from edgecl.deploy.calibrate import calibrate
from edgecl.deploy.int8 import quantize
from edgecl.deploy.onnx import INPUT, onnx_from_net
from edgecl.nets.backbone import create_backbone, example_side
from edgecl.nets.catalogue import NETS

TARGET = read_target("ort-cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sessions_of(arch: str, *, size: int) -> dict[str, tuple[ort.InferenceSession, np.ndarray]]:
    """Return a net's sessions by precision, each with a picture for it."""
    torch.manual_seed(0)
    net = create_backbone(arch, num_classes=1000).eval()
    own = example_side(net)
    side = own if own > 64 else size  # some take one size only
    drawn = torch.from_numpy(render("train", 16, size=side)[0]).permute(0, 3, 1, 2)
    pictures = normalize(drawn, MEAN, STD).numpy()
    fp32 = onnx_from_net(net, graph=TARGET.graph, shape=(3, side, side), metadata={})
    ranges = calibrate(fp32, pictures, ["minmax"])["minmax"]
    models = {"fp32": fp32, "int8": quantize(fp32, form="int8-cpu", ranges=ranges, images=pictures)}
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return {
        precision: (
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]),
            pictures[:1],
        )
        for precision, model in models.items()
    }


def block_ms(session: ort.InferenceSession, picture: np.ndarray, *, inferences: int) -> float:
    """Return the median time of some inferences in milliseconds."""
    taken = []
    for _ in range(inferences):
        begun = time.perf_counter()
        session.run(None, {INPUT: picture})
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken)) * 1e3


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--nets", nargs="+", default=list(NETS))
    options.add_argument("--size", type=int, default=224, help="pixels")
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--inferences", type=int, default=10, help="in a block")
    given = options.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    timed = {
        (arch, precision): parts
        for arch in given.nets
        for precision, parts in sessions_of(arch, size=given.size).items()
    }
    blocks: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for turn in range(given.rounds + 1):
        # Back and forth, so that no net always follows the same one; the first round warms up.
        for key in list(timed)[:: 1 if turn % 2 else -1]:
            taken = block_ms(*timed[key], inferences=given.inferences)
            blocks[key] += [taken] if turn else []
    rows = []
    for arch in given.nets:
        row: dict[str, object] = {"net": arch, "threads": 1, "onnxruntime": ort.__version__}
        for precision in ("fp32", "int8"):
            low, middle, high = np.quantile(blocks[arch, precision], (0.25, 0.5, 0.75))
            row[f"{precision}_p50_ms"] = round(float(middle), 3)
            row[f"{precision}_middle_half_ms"] = [round(float(low), 3), round(float(high), 3)]
        rows.append(row)
        print(f"{arch:<30} fp32 {row['fp32_p50_ms']:>9} ms   int8 {row['int8_p50_ms']:>9} ms")
    print(json.dumps({"cpu": cpu_name(), "size": given.size, "rounds": given.rounds, "nets": rows}))


def cpu_name() -> str:
    """Return the processor's name."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    main()
