"""Small directories as the verbs write them, with numbers chosen so that a report's facts can be foretold."""

from __future__ import annotations

import base64
import io
import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sealed import write_sealed

from edgecl.onboard.bundle import SCHEMA, sha256_of_file
from edgecl.reports.report import report as report_on


def report(dirs, *, out, force=False):
    """The content of the report.json that is written."""
    return report_on(dirs, out=out, force=force).to_json()


def header(kind: str, made_from: str | None, command: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": kind,
        "made_by": "edgecl 0.1.0",
        "made_from": made_from,
        "command": command,
    }


def write(path: Path, record: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if record["kind"] in ("model", "bundle"):
        write_sealed(path, record)
    else:
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
TERMS = {"loss": "total", "sacl": "SACL", "xd_host": "XD host", "xd_slim": "XD slim"}
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
                    "method": {"name": "sacl-xd", "alpha": 0.95, "off_diagonal": 0.005},
                    "optim": {"name": "lars", "lr": 0.8},
                },
                "method": "SACL-XD",
                "panels": [{"title": "Loss terms", "lines": TERMS, "unit": "", "log": True}],
                "data": {"uri": "demo", "images": 8192, "fingerprint": "f1" * 32},
                "steps_per_epoch": 64,
                "total_steps": total,
                "state": state,
                "wall_s": 151.3,
                "versions": {"torch": "2.11.0", "timm": "1.0.20"},
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
        """Write a picture of the size of views beside a run."""
        Image.new("RGB", (8 * 68 - 4, 3 * 68 - 4), "teal").save(run / "views.png")

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
                "recipe_name": "demo",
                "method": "SACL-XD",
                "data": None,
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
                    "n_train": 8192,
                    "data": "demo",
                    "test": "demo (test split)",
                    "epochs": 3,
                    "settings": {},
                },
            )
        return path

    def inspection(self, model: Path, *, classes: list[str], picture: str | None = None) -> Path:
        """Write what a net confuses: each class once for the next one, and 9 times for itself."""
        if picture is None:
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), "teal").save(buffer, "JPEG")
            picture = base64.b64encode(buffer.getvalue()).decode("ascii")
        count = len(classes)
        pairs = [
            (label, (label + wrong) % count, 9 - 8 * wrong) for label in range(count) for wrong in (0, 1)
        ]
        return write(
            model / "inspection.json",
            {
                **header("inspection", sha256_of_file(model / "model.json"), f"edgecl probe {model}"),
                "predicted_by": "linear probe",
                "classes": classes,
                "confusion": [
                    {"label": label, "predicted": predicted, "images": images}
                    for label, predicted, images in pairs
                ],
                "mistakes": [
                    {"picture": picture, "label": label, "predicted": (label + 1) % count, "confidence": 0.9}
                    for label in range(min(count, 16))
                ],
                "map": {
                    "made_by": "PCA",
                    "explained": [0.4, 0.2],
                    "x": [math.cos(6.3 * label / count) for label in range(count)],
                    "y": [math.sin(6.3 * label / count) for label in range(count)],
                    "label": list(range(count)),
                },
                "n_test": 10 * count,
                "test": "demo (test split)",
            },
        )

    def precision(
        self, name: str, *, accuracy: dict[str, Any] | None = None, decision: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One entry of a manifest's precisions."""
        scale = {"fp32": 1.0, "fp16": 700.0, "int8": 40_000.0}[name]
        return {
            "model": "model.onnx" if name == "fp32" else f"model.{name}.onnx",
            "form": {"int8": "int8-cpu"}.get(name, name),
            "opset": 18,
            "tolerance": {"max_relative_difference": 1e-3, "top1_agreement": 0.99},
            "parity": {
                "from": "carved torch net",
                "to": f"ONNX {name}",
                "images": 16,
                "max_abs_difference": 2.1e-6 * scale,
                "max_relative_difference": 8.8e-7 * scale,
                "top1_agreement": 1.0 if name != "int8" else 0.9375,
            },
            "decision": decision,
            "accuracy": accuracy,
        }

    def top1(
        self, value: float, *, metric: str = "top1", data: str = "demo", half: float = 1.2
    ) -> dict[str, Any]:
        """An accuracy as export measures it on a precision's file."""
        return {
            "metric": metric,
            "value": value,
            "ci95": [value - half, value + half],
            "n": 2000,
            "data": data,
        }

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
        precisions: dict[str, dict[str, Any]] | None = None,
        parity: list[dict[str, Any]] | None = None,
        target: str = "ort-cpu",
        runtime: str = "onnxruntime",
        **more: Any,
    ) -> Path:
        precisions = precisions or {"fp32": self.precision("fp32")}
        sizes = {"fp32": 934_210, "fp16": 470_113, "int8": 265_902}
        model_sha = sha256_of_file(model / "model.json") if model else "c0ffee" + "0" * 58
        net = {
            "arch": "mobilenetv1_100",
            "width": 0.25,
            "origin": "pretrained",
            "params": 231_400,
            "model_sha256": model_sha,
        }
        record_file = write(
            path / "manifest.json",
            {
                **header("bundle", model_sha, f"edgecl export {model} --target {target} --out {path}"),
                "target_name": target,
                "target": {"runtime": runtime, "precisions": list(precisions), "graph": {"opset": 18}},
                "runtime": runtime,
                "precision": next(iter(precisions)),
                "precisions": precisions,
                "net": net,
                "input": {"name": "input", "shape": [1, 3, 32, 32], "dynamic_batch": False, "max_batch": 1},
                "output": {"name": "output", "shape": [1, 256]},
                "preprocessing": PREPROCESSING,
                "parity": parity or [],
                "files": {about["model"]: "a" * 64 for about in precisions.values()}
                | {"reference.npz": "b" * 64},
                "size_bytes": {about["model"]: sizes[name] for name, about in precisions.items()},
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
                "precisions": {
                    name: {"ok": ok, "max_abs_difference": 1.9e-6, "top1_agreement": 1.0}
                    for name in precisions
                },
            },
        )
        if p50 is not None:
            self.bench(path, p50=p50, p99=p99, device=device, threads=threads)
        return path

    def measurement(
        self,
        precision: str,
        p50: float,
        *,
        p99: float | None = None,
        mode: str = "inference",
        headline: bool = True,
        steady: bool = True,
        marks: list[str] | None = None,
        joules: float | None = None,
        share: float = 0.015,
    ) -> dict[str, Any]:
        """One entry of a bench record's measurements."""
        return {
            "precision": precision,
            "form": precision,
            "mode": mode,
            "headline": headline,
            "latency_ms": {
                "p50": p50,
                "p90": p50 * 1.12,
                "p99": p99,
                "mean": p50 * 1.03,
                "ci95_p50": [p50 * (1 - share), p50 * (1 + share)],
            },
            "throughput_per_s": 1000 / (p50 * 1.03),
            "samples": 20_000,
            "steady": steady,
            "marks": marks or [],
            "energy": None
            if joules is None
            else {
                "rails": ["VDD_IN"],
                "idle_w": 4.31,
                "load_w": 7.92,
                "j_per_inference": joules,
                "rate_hz": 10.2,
                "source": "ina3221",
            },
        }

    def bench(
        self,
        bundle: Path,
        *,
        p50: float = 0.412,
        p99: float | None = None,
        device: str,
        threads: int = 1,
        steady: bool = True,
        measurements: list[dict[str, Any]] | None = None,
        ratios: list[dict[str, Any]] | None = None,
        marks: list[str] | None = None,
        runtime: str = "onnxruntime 1.31.1 CPUExecutionProvider",
        power_mode: str | None = None,
    ) -> Path:
        return write(
            bundle / f"bench-{device}.json",
            {
                **header(
                    "bench",
                    sha256_of_file(bundle / "manifest.json"),
                    f"edgecl bench {bundle} --threads {threads}",
                ),
                "runtime": runtime,
                "batch": 1,
                "threads": threads,
                "device": {
                    "name": device,
                    "cpu_model": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
                    "versions": {"onnxruntime": "1.24.0", "numpy": "2.4.6"},
                    "power_mode": power_mode if power_mode is None else {"id": 0, "name": power_mode},
                },
                "started_at": "2026-11-22T05:00:00+00:00",
                "measurements": measurements or [self.measurement("fp32", p50, p99=p99, steady=steady)],
                "ratios": ratios or [],
                "marks": marks or [],
            },
        )

    def compiled(
        self, path: Path, *, model: Path | None, reject: bool = False, device: str = "Orin Nano"
    ) -> Path:
        """A bundle of three precisions for a Jetson, evaluated, timed in turns in four modes, with a parity report."""
        words = (
            "rejected because it costs 5.1 points of top-1 for 4 % of speed"
            if reject
            else "kept: loses 0.4 points of top-1 within the budget of 1.0, and is 1.37x as fast as fp32"
        )
        bundle = self.bundle(
            path,
            model=model,
            p50=None,
            target="jetson-orin-jp6",
            runtime="tensorrt",
            precisions={
                "fp16": self.precision("fp16", accuracy=self.top1(76.9)),
                "fp32": self.precision("fp32", accuracy=self.top1(77.0)),
                "int8": self.precision(
                    "int8",
                    accuracy=self.top1(71.9 if reject else 76.6),
                    decision={
                        "kept": not reject,
                        "words": words,
                        "kept_nodes": [] if reject else ["conv_stem"],
                    },
                ),
            },
            parity=self.parity(),
        )
        modes = ("compute, CUDA graph", "compute", "with transfers, CUDA graph", "with transfers")
        measurements = [
            self.measurement(
                precision,
                p50 * (1 + 0.12 * place),
                p99=p50 * (1.2 + 0.12 * place),
                mode=mode,
                headline=place == 0,
                joules=p50 * 0.008 if place == 0 else None,
                marks=["drift"] if (precision, place) == ("fp32", 0) else [],
            )
            for precision, p50 in (("fp32", 1.37), ("fp16", 0.71), ("int8", 0.68 if reject else 0.52))
            for place, mode in enumerate(modes)
        ]
        self.bench(
            bundle,
            device=device,
            measurements=measurements,
            ratios=[
                {"a": "fp32", "b": "fp16", "p50_ratio": 1.93, "ci95": [1.91, 1.95]},
                {"a": "fp16", "b": "int8", "p50_ratio": 1.37, "ci95": [1.35, 1.39]},
            ],
            runtime="tensorrt 10.3.0",
            power_mode="MAXN_SUPER",
        )
        return bundle

    def parity(self) -> list[dict[str, Any]]:
        steps = (
            ("slim view", "carved torch", 0.0, 1.0, None),
            ("carved torch", "ONNX fp32", 2.1e-6, 1.0, None),
            ("ONNX fp32", "fp16", 1.4e-3, 1.0, None),
            ("fp16", "int8", 0.31, 0.953, "blocks.2.0.conv_dw"),
        )
        return [
            {
                "from": source,
                "to": variant,
                "max_abs_difference": difference,
                "mean_abs_difference": difference / 6,
                "max_relative_difference": difference / 2.4,
                "top1_agreement": agreement,
                "mean_cosine": 1 - difference / 50,
                "images": 64,
                "first_diverging_layer": layer,
            }
            for source, variant, difference, agreement, layer in steps
        ]

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
            found = {"mean": sum(paired) / len(paired), "ci95": [low, high], "resolved": low > 0 or high < 0}
            differences.append({"a": "pretrained", "b": other, **found})
        probes = {"pretrained": (61.5, 74.2), "random init": (38.4, 52.0), "from scratch": (None, None)}
        return write(
            path / "comparison.json",
            {
                **header("comparison", None, f"edgecl demo --out {path}"),
                "labels_per_class": 5,
                "draws": 5,
                "n_test": 2000,
                "data": "demo",
                "test": "demo (test split)",
                "scratch": {"steps": 100, "lr": 0.05, "seed": 0},
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
                "recipe": {},
                "stages": {"pretrain": {"wall_s": 151.3}, "probe": {"wall_s": 21.0}},
            },
        )
        return path


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()
