"""Small directories as the verbs write them, with numbers chosen so that a report's facts can be foretold."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edgecl.onboard.bundle import sha256_of_file


def header(kind: str, made_from: str | None, command: str) -> dict[str, Any]:
    return {"schema": 1, "kind": kind, "made_by": "edgecl 0.1.0", "made_from": made_from, "command": command}


def write(path: Path, record: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


PREPROCESSING = {
    "image_size": 32,
    "resize_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bilinear",
}
PRETRAINED_DRAWS = [56.1, 54.9, 57.8, 55.2, 58.3]
RANDOM_DRAWS = [34.2, 35.8, 36.1, 33.9, 36.4]
SCRATCH_DRAWS = [47.0, 51.9, 44.2, 50.3, 49.1]


def interval(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    half = 2.776 * math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
    return [mean - half, mean + half]


def few_label(draws: list[float]) -> dict[str, Any]:
    mean = sum(draws) / len(draws)
    return {
        "mean": mean,
        "std": math.sqrt(sum((x - mean) ** 2 for x in draws) / (len(draws) - 1)),
        "ci95": interval(draws),
        "labels_per_class": 5,
        "draws": draws,
    }


class Maker:
    """Writes one kind of directory per method, each returning its path."""

    def run(
        self,
        path: Path,
        *,
        steps: int = 1200,
        total: int = 1200,
        state: str = "done",
        recipe: str = "demo",
        **more: Any,
    ) -> Path:
        write(
            path / "run.json",
            {
                **header("run", None, f"edgecl pretrain {recipe} --out {path}"),
                "recipe_name": recipe,
                "recipe": {
                    "host": {"arch": "mobilenetv1_100", "width": 1.5},
                    "loss": {"alpha": 0.95, "off_diagonal": 0.005},
                    "optim": {"name": "lars", "lr": 0.8},
                },
                "arm": "SACL-XD",
                "data": {"uri": "demo", "images": 8192, "fingerprint": "f1" * 32, "skipped": []},
                "seed": 7,
                "device": "cpu",
                "steps_per_epoch": 64,
                "total_steps": total,
                "params": {"host": 512_000, "slim": 231_000},
                "state": state,
                "wall_s": 151.3,
                "versions": {"torch": "2.11.0", "timm": "1.0.20"},
                "start_from": None,
                **more,
            },
        )
        lines = []
        for step in range(1, steps + 1):
            t = step / max(total, 1)
            wobble = 0.08 * math.sin(step * 1.7) + 0.05 * math.sin(step * 0.31)
            sacl = 48 * math.exp(-2.4 * t) + 9 + 6 * wobble
            host, slim = 20 * math.exp(-3 * t) + 2.2 + wobble, 22 * math.exp(-2.4 * t) + 3.1 + wobble
            lines.append(
                {
                    "step": step,
                    "epoch": step / 64,
                    "loss": 0.95 * sacl + 0.025 * (host + slim),
                    "sacl": sacl,
                    "xd_host": host,
                    "xd_slim": slim,
                    "diagonal": 0.92 * (1 - math.exp(-4 * t)) + 0.15 * wobble,
                    "off_diagonal_rms": 0.31 * math.exp(-2 * t) + 0.05 + 0.03 * abs(wobble),
                    "std": 0.4 + 0.5 * (1 - math.exp(-5 * t)),
                    "grad_norm_host": 4 * math.exp(-2 * t) + 0.6 + abs(wobble),
                    "grad_norm_slim": 3 * math.exp(-2 * t) + 0.4 + abs(wobble),
                    "lr": 0.8 * 0.5 * (1 + math.cos(math.pi * t)),
                    "images_per_s": 1040.0 + 60 * wobble,
                }
            )
            if step % 128 == 0:
                lines.append(
                    {
                        "step": step,
                        "epoch": step / 64,
                        "rankme_host": 12 + 70 * (1 - math.exp(-3 * t)),
                        "rankme_slim": 10 + 61 * (1 - math.exp(-3 * t)),
                        "knn_top1_host": 30 + 35 * (1 - math.exp(-3 * t)),
                        "knn_top1_slim": 29 + 33 * (1 - math.exp(-3 * t)),
                    }
                )
        (path / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        return path

    def views(self, run: Path) -> None:
        """Write a grid of pictures and views beside a run, three rows of coloured squares."""
        from PIL import Image, ImageDraw

        grid = Image.new("RGB", (8 * 68 - 4, 3 * 68 - 4), "white")
        draw = ImageDraw.Draw(grid)
        for column in range(8):
            for row in range(3):
                x, y = column * 68, row * 68
                draw.rectangle((x, y, x + 63, y + 63), fill=(30 * column + 20, 70 * row + 50, 90 + 60 * row))
                draw.ellipse((x + 12 + 6 * row, y + 16, x + 44, y + 48 - 4 * row), fill="white")
        grid.save(run / "views.png")

    def model(
        self,
        path: Path,
        *,
        origin: str = "pretrained",
        draws: list[float] | None = PRETRAINED_DRAWS,
        linear: float = 74.2,
        knn: float = 61.5,
        macs: int = 4_712_000,
        width: float = 0.25,
        top1: float | None = None,
        classes: list[str] | None = None,
        made_from: str | None = None,
        **more: Any,
    ) -> Path:
        record_file = write(
            path / "model.json",
            {
                **header("model", made_from, f"edgecl carve runs/demo --out {path}"),
                "arch": "mobilenetv1_100",
                "width": width,
                "stem_stride": 1,
                "classes": classes,
                "features": 256,
                "params": 231_400,
                "preprocessing": PREPROCESSING,
                "origin": origin,
                "recalibrated": True,
                "recipe_name": "demo",
                "arm": "SACL-XD",
                "weights_sha256": sha256(f"{path} {origin}".encode("utf-8", "surrogateescape")).hexdigest(),
                **more,
            },
        )
        sha = sha256_of_file(record_file)
        if draws:
            write(
                path / "probe.json",
                {
                    **header("probe", sha, f"edgecl probe {path} --data demo --labels-per-class 5 --seeds 5"),
                    "knn_top1": knn,
                    "knn_ci95": [knn - 1.9, knn + 1.9],
                    "linear_top1": linear,
                    "linear_ci95": [linear - 1.7, linear + 1.7],
                    "few_label_top1": few_label(draws),
                    "n_test": 2000,
                    "n_train": 8192,
                    "data": "demo",
                    "test": "demo (test split)",
                    "classes": 10,
                },
            )
        write(
            path / "cost.json",
            {
                **header("cost", sha, f"edgecl cost {path}"),
                "macs": macs,
                "flops": 2 * macs,
                "params": 231_400,
                "input": [1, 3, 32, 32],
                "by_operator": {"conv": macs - 2560, "linear": 2560},
                "uncounted": {"aten::add": 3},
            },
        )
        if top1 is not None:
            write(
                path / "evaluation.json",
                {
                    **header("evaluation", sha, f"edgecl finetune {path} --data demo"),
                    "top1": top1,
                    "top1_ci95": [top1 - 1.5, top1 + 1.5],
                    "n_test": 2000,
                    "data": "demo",
                    "test": "demo (test split)",
                },
            )
        return path

    def bundle(
        self,
        path: Path,
        *,
        model: Path | None,
        p50: float | None = 0.412,
        p99: float | None = 0.533,
        device: str = "build-box",
        threads: int = 1,
        ok: bool = True,
        **more: Any,
    ) -> Path:
        model_sha = sha256_of_file(model / "model.json") if model else "c0ffee" + "0" * 58
        net = {
            "arch": "mobilenetv1_100",
            "width": 0.25,
            "stem_stride": 1,
            "features": 256,
            "classes": None,
            "origin": "pretrained",
            "params": 231_400,
            "model_sha256": model_sha,
        }
        record_file = write(
            path / "manifest.json",
            {
                **header("bundle", model_sha, f"edgecl export {model} --target ort-cpu --out {path}"),
                "target_name": "ort-cpu",
                "target": {"runtime": "onnxruntime", "precision": "fp32", "graph": {"opset": 18, "batch": 1}},
                "runtime": "onnxruntime",
                "precision": "fp32",
                "model": "model.onnx",
                "net": net,
                "input": {
                    "name": "input",
                    "shape": [1, 3, 32, 32],
                    "dtype": "float32",
                    "dynamic_batch": False,
                    "max_batch": 1,
                },
                "output": {"name": "output", "shape": [1, 256]},
                "preprocessing": PREPROCESSING,
                "tolerance": {"max_relative_difference": 1e-3, "top1_agreement": 0.99},
                "parity": {
                    "images": 16,
                    "max_abs_difference": 2.1e-6,
                    "mean_abs_difference": 3.4e-7,
                    "max_relative_difference": 8.8e-7,
                    "top1_agreement": 1.0,
                    "images_from": "demo",
                },
                "files": {"model.onnx": "a" * 64, "reference.npz": "b" * 64},
                "size_bytes": {"model.onnx": 934_210},
                **more,
            },
        )
        sha = sha256_of_file(record_file)
        write(
            path / "verify.json",
            {
                **header("verify", sha, f"edgecl verify {path}"),
                "ok": ok,
                "files_ok": True,
                "max_abs_difference": 1.9e-6,
                "max_relative_difference": 8e-7,
                "top1_agreement": 1.0,
                "images": 16,
            },
        )
        if p50 is not None:
            self.bench(path, p50=p50, p99=p99, device=device, threads=threads)
        return path

    def bench(
        self,
        bundle: Path,
        *,
        p50: float,
        p99: float | None,
        device: str,
        threads: int = 1,
        steady: bool = True,
    ) -> Path:
        return write(
            bundle / f"bench-{device}.json",
            {
                **header(
                    "bench",
                    sha256_of_file(bundle / "manifest.json"),
                    f"edgecl bench {bundle} --threads {threads}",
                ),
                "latency_ms": {
                    "p50": p50,
                    "p90": p50 * 1.12,
                    "p99": p99,
                    "mean": p50 * 1.03,
                    "ci95_p50": [p50 * 0.985, p50 * 1.015],
                },
                "throughput_per_s": 1000 / (p50 * 1.03),
                "runtime": "onnxruntime",
                "precision": "fp32",
                "batch": 1,
                "threads": threads,
                "device": {
                    "name": device,
                    "cpu_model": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
                    "machine": "x86_64",
                    "cores": 2,
                    "threads": 2,
                    "governor": None,
                    "load_1m": 0.31,
                    "memory_mib": 7951,
                    "os": "Linux 6.1",
                    "python": "3.11.7",
                    "versions": {"onnxruntime": "1.24.0", "numpy": "2.4.6"},
                },
                "samples": 20_000,
                "warmup_samples": 600,
                "steady": steady,
                "warmup_s": 0.4,
                "duration_s": 10.0,
                "started_at": "2026-11-22T05:00:00+00:00",
            },
        )

    def comparison(self, path: Path, *, pretrained: list[float] | None = None) -> Path:
        draws = {
            "pretrained": pretrained or PRETRAINED_DRAWS,
            "random init": RANDOM_DRAWS,
            "from scratch": SCRATCH_DRAWS,
        }
        differences = []
        for other in ("random init", "from scratch"):
            paired = [a - b for a, b in zip(draws["pretrained"], draws[other], strict=True)]
            low, high = interval(paired)
            differences.append(
                {
                    "a": "pretrained",
                    "b": other,
                    "mean": sum(paired) / len(paired),
                    "ci95": [low, high],
                    "resolved": low > 0 or high < 0,
                }
            )
        probes = {"pretrained": (61.5, 74.2), "random init": (38.4, 52.0), "from scratch": (None, None)}
        return write(
            path / "comparison.json",
            {
                **header("comparison", None, f"edgecl demo --out {path}"),
                "labels_per_class": 5,
                "draws": 5,
                "n_test": 2000,
                "test": "demo (test split)",
                "rows": [
                    {
                        "name": name,
                        "few_label_top1": few_label(values),
                        "knn_top1": probes[name][0],
                        "linear_top1": probes[name][1],
                    }
                    for name, values in draws.items()
                ],
                "differences": differences,
            },
        )

    def pipeline(self, path: Path, *, pretrained: list[float] | None = None) -> Path:
        self.run(path / "pretrain")
        self.views(path / "pretrain")
        run_sha = sha256_of_file(path / "pretrain" / "run.json")
        slim = self.model(path / "slim", draws=pretrained or PRETRAINED_DRAWS, made_from=run_sha)
        self.model(path / "random", origin="random", draws=RANDOM_DRAWS, knn=38.4, linear=52.0)
        self.comparison(path, pretrained=pretrained)
        self.bundle(path / "bundles" / "ort-cpu", model=slim)
        write(
            path / "pipeline.json",
            {
                **header("pipeline", None, f"edgecl demo --out {path}"),
                "recipe_name": "demo",
                "stages": {"pretrain": {"wall_s": 151.3}, "probe": {"wall_s": 21.0}},
            },
        )
        return path


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()
