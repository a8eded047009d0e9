"""What each precision costs and gains on a CPU, for classifiers of one's own; prints a table and one JSON line.

    python benchmarks/precisions.py MODEL_DIR... --data TRAIN --test TEST --out DIR --qat-epochs 1

Every classifier is exported in fp32, fp16 and INT8 (quantized after training), then trained for INT8 and exported
again. Accuracy is counted on TEST by the exported files; half of it is what the decision searches on. Latency is that
of batch 1 on one thread, the precisions of one bundle in alternating blocks of one session. What is already in DIR is
not made again.
"""

import argparse
import json
from pathlib import Path

from edgecl.deploy.bench import bench
from edgecl.deploy.export import export
from edgecl.evaluate.finetune import finetune
from edgecl.storage.directories import Bundle, ModelDir

PRECISIONS = ["fp32", "fp16", "int8"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("models", nargs="+", type=Path)
    options.add_argument("--data", required=True)
    options.add_argument("--test", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--target", default="ort-cpu")
    options.add_argument("--qat-epochs", type=int, default=1)
    options.add_argument("--duration-s", type=float, default=10.0)
    given = options.parse_args()
    rows = []
    for model in given.models:
        trained = given.out / f"{model.name}-qat"
        if not ModelDir(trained).record_file.exists():
            finetune(
                model,
                data=given.data,
                test=given.test,
                out=trained,
                epochs=given.qat_epochs,
                quantize="int8",
                force=True,
            )
        for source, training in ((model, "float"), (trained, "QAT")):
            rows += measure(source, training, given)
    print(
        f"{'net':<24} {'trained':<8} {'precision':<9} {'top-1 %':>20} {'p50 ms':>8} {'x fp32':>7} {'MB':>6}"
    )
    for row in rows:
        low, high = row["ci95"]
        print(
            f"{row['arch']:<24} {row['trained']:<8} {row['precision']:<9} {row['top1']:>6.2f} [{low:.2f}, {high:.2f}]"
            f" {row['p50_ms']:>8.3f} {row['times_fp32']:>7.2f} {row['mb']:>6.2f}"
        )
        if row["decision"]:
            print(f"    decision: {row['decision']}")
    print(json.dumps(rows))


def measure(model: Path, training: str, given: argparse.Namespace) -> list[dict]:
    """Export a classifier in every precision and time them side by side."""
    bundle = Bundle(given.out / f"{given.target}-{model.name}")
    if not bundle.record_file.exists():
        export(
            model,
            target=given.target,
            precisions=PRECISIONS,
            calibration=given.data,
            eval_uri=given.test,
            out=bundle.path,
            say=print,
        )
    manifest = bundle.read().to_json()
    held = [name for name in PRECISIONS if name in manifest["precisions"]]
    record = bench(bundle.path, precisions=held, duration_s=given.duration_s, threads=1)
    p50 = {one["precision"]: one["latency_ms"]["p50"] for one in record["measurements"] if one["headline"]}
    ratios = {ratio["b"]: ratio["p50_ratio"] for ratio in record["ratios"] if ratio["a"] == "fp32"}
    rows = []
    for name in held:
        about = manifest["precisions"][name]
        rows.append(
            {
                "arch": manifest["net"]["arch"],
                "trained": training,
                "precision": name,
                "top1": about["accuracy"]["value"],
                "ci95": about["accuracy"]["ci95"],
                "p50_ms": p50[name],
                "times_fp32": ratios.get(name, 1.0),
                "mb": manifest["size_bytes"][about["model"]] / 1e6,
                "decision": about["decision"]["words"] if about["decision"] else None,
                "runtime": record["runtime"],
                "device": record["device"]["name"],
            }
        )
    for name, about in manifest.get("left_out", {}).items():
        print(f"{manifest['net']['arch']} {training} {name} left out: {about['decision']['words']}")
    return rows


if __name__ == "__main__":
    main()
