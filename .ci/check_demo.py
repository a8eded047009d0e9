"""Hold the demo's output to what the README promises: `python .ci/check_demo.py DEMO_DIR`."""

import json
import sys
from pathlib import Path

LIMIT_S = 240


def main(demo: Path) -> None:
    """Exit with a message when a promise is broken."""
    report = json.loads((demo / "report" / "report.json").read_text(encoding="utf-8"))
    comparison = json.loads((demo / "comparison.json").read_text(encoding="utf-8"))
    stages = json.loads((demo / "pipeline.json").read_text(encoding="utf-8"))["stages"]
    took_s = sum(stage["wall_s"] for stage in stages.values())
    over_random, over_scratch, tuned = (
        next(d for d in comparison["differences"] if (d["a"], d["b"]) == pair)
        for pair in (
            ("pretrained", "random init"),
            ("pretrained", "from scratch"),
            ("fine-tuned", "from scratch"),
        )
    )
    manifest = json.loads((demo / "bundles" / "ort-cpu" / "manifest.json").read_text(encoding="utf-8"))
    # Left out of the bundle, it still has its decision.
    int8 = manifest["precisions"].get("int8") or manifest.get("left_out", {}).get("int8")
    run = json.loads((demo / "pretrain" / "run.json").read_text(encoding="utf-8"))
    promises = {
        "the report is there": (demo / "report" / "report.html").stat().st_size > 10_000,
        "the pretrained net beats random initialization, interval clear of zero": over_random["ci95"][0] > 0,
        "frozen features beat training from scratch on the same labels, interval clear of zero": over_scratch[
            "ci95"
        ][0]
        > 0,
        "fine-tuned it beats training from scratch by 8 points, interval clear of zero": tuned["mean"] >= 8
        and tuned["ci95"][0] > 0,
        "training did not end on the plateau": run.get("plateau") is None,
        "INT8 is exported with a decision in words": bool(int8 and int8["decision"]["words"]),
        "at least 5 label draws": comparison["draws"] >= 5,
        "the report has rows": bool(report["rows"]),
    }
    for promise, kept in promises.items():
        sys.stdout.write(f"{'ok' if kept else 'BROKEN'}: {promise}\n")
    # Told, not evaluated: a machine with other work on it is no fault of the demo's.
    sys.stdout.write(f"stages took {took_s:.0f} s; promised are {LIMIT_S} s on two quiet cores\n")
    if not all(promises.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
