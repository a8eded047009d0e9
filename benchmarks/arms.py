"""Train the four arms of the method by one recipe and compare the nets they give; prints a table and one JSON line.

    python benchmarks/arms.py --data FOLDER --test FOLDER --out DIR --epochs 10 --seeds 2

Every arm gives the same net, is trained on the same images in the same order, and is probed on the same label draws;
only the arm differs. Two baselines stand beside them: the net at random initialisation, and the net trained from
scratch on the same few labels. A run that is already in DIR is not repeated.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from edgecl.artifacts import ModelDir, RunDir
from edgecl.cost import training_cost
from edgecl.data.loading import normalise
from edgecl.evaluate.comparison import train_on_few, write_random
from edgecl.evaluate.labelled import draw_few, read_labelled
from edgecl.evaluate.linear import fit_linear
from edgecl.evaluate.probe import load_feature_net, probe_net
from edgecl.evaluate.supervised import Supervision
from edgecl.intervals import mean_interval
from edgecl.nets.carving import carve, preprocessing_of
from edgecl.quality import extract_features
from edgecl.recipe import read_recipe
from edgecl.train.pretrain import pretrain

ARMS = {
    "barlow-twins": ["host.width=1.0", "loss.alpha=1.0"],
    "xd-only": ["host.width=1.0"],
    "sacl-only": ["loss.alpha=1.0"],
    "sacl-xd": [],
}
LABELS_PER_CLASS = (10, 50, 100)
DRAWS = 5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--recipe", default="cifar10-smoke")
    options.add_argument("--data", required=True)
    options.add_argument("--test", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--scratch-steps", type=int, default=300)
    given = options.parse_args()

    settings = read_recipe(given.recipe)
    labelled = read_labelled(
        given.data, test=given.test, preprocessing=preprocessing_of(settings), limit=settings.data.limit
    )
    results: dict[str, list[dict]] = {}
    for seed in range(given.seeds):
        for arm, changes in ARMS.items():
            assignments = [*changes, f"run.seed={seed}", f"run.epochs={given.epochs}"]
            recipe = read_recipe(given.recipe, assignments)
            place = given.out / f"{arm}-seed{seed}"
            if not (place / "result.json").exists():
                started = time.monotonic()
                pretrain(
                    recipe,
                    recipe_name=given.recipe,
                    out=place / "pretrain",
                    data=given.data,
                    device="cpu",
                    force=True,
                )
                wall_s = time.monotonic() - started
                carve(place / "pretrain", out=place / "slim", force=True)
                cost = training_cost(recipe, images=len(labelled.train))
                result = {
                    "wall_s": wall_s,
                    "training_flops": cost.total_flops,
                    "projector_flops": cost.projector_flops * cost.images * cost.epochs,
                    **judge(place / "slim", labelled),
                }
                (place / "result.json").write_text(json.dumps(result))
            results.setdefault(arm, []).append(json.loads((place / "result.json").read_text()))
            print(f"seed {seed} {arm}: {brief(results[arm][-1])}", flush=True)
        place = given.out / f"random-seed{seed}"
        if not (place / "result.json").exists():
            record = ModelDir(given.out / f"sacl-xd-seed{seed}" / "slim").read()
            write_random(place / "slim", record, labelled, seed=seed, force=True)
            (place / "result.json").write_text(json.dumps(judge(place / "slim", labelled)))
        results.setdefault("random init", []).append(json.loads((place / "result.json").read_text()))
        print(f"seed {seed} random init: {brief(results['random init'][-1])}", flush=True)
    place = given.out / "scratch.json"
    if not place.exists():
        record = ModelDir(given.out / "sacl-xd-seed0" / "slim").read()
        place.write_text(
            json.dumps(from_scratch(record, labelled, settings.views, steps=given.scratch_steps))
        )
    scratch = json.loads(place.read_text())
    print_tables(results, scratch)
    run = RunDir(given.out / "sacl-xd-seed0" / "pretrain").read()
    print(
        json.dumps(
            {
                "benchmark": "arms",
                "recipe": given.recipe,
                "epochs": given.epochs,
                "seeds": given.seeds,
                "images": len(labelled.train),
                "test_images": len(labelled.test),
                "threads": torch.get_num_threads(),
                "versions": run["versions"],
                "results": results,
                "from_scratch": scratch,
            }
        )
    )


def judge(model: Path, labelled) -> dict:
    """Probe a net with all labels and with 10, 50 and 100 of each class."""
    net, record = load_feature_net(model)
    preprocessing = record["preprocessing"]
    found = probe_net(
        net, labelled, preprocessing=preprocessing, labels_per_class=LABELS_PER_CLASS[0], draws=DRAWS
    )

    def prepare(images: torch.Tensor) -> torch.Tensor:
        return normalise(images, preprocessing["mean"], preprocessing["std"])

    features = extract_features(net, labelled.train.images, normalise=prepare)
    test = extract_features(net, labelled.test.images, normalise=prepare)
    few = {str(LABELS_PER_CLASS[0]): found["few_label_top1"]["draws"]}
    for per_class in LABELS_PER_CLASS[1:]:
        few[str(per_class)] = []
        for draw in range(DRAWS):
            chosen = draw_few(labelled.train.labels, per_class=per_class, draw=draw)
            fitted = fit_linear(
                features[chosen], labelled.train.labels[chosen], classes=len(labelled.classes)
            )
            few[str(per_class)].append(fitted.top1(test, labelled.test.labels))
    return {"knn_top1": found["knn_top1"], "linear_top1": found["linear_top1"], "few": few}


def from_scratch(record: dict, labelled, views, *, steps: int) -> dict[str, list[float]]:
    """Train the same net from random weights on the same few labels."""
    return {
        str(per_class): [
            train_on_few(
                None,
                record,
                labelled,
                few=draw_few(labelled.train.labels, per_class=per_class, draw=draw),
                steps=steps,
                settings=Supervision(lr=3e-3, seed=draw, device="cpu"),
                views=views,
                what=f"from scratch, {per_class} per class, draw {draw + 1}",
            )
            for draw in range(DRAWS)
        ]
        for per_class in LABELS_PER_CLASS
    }


def brief(result: dict) -> str:
    few = ", ".join(f"{n}/class {statistics.mean(values):.1f}" for n, values in result["few"].items())
    return f"kNN {result['knn_top1']:.1f}, linear {result['linear_top1']:.1f}, {few}"


def print_tables(results: dict[str, list[dict]], scratch: dict[str, list[float]]) -> None:
    """Print means over seeds, and the paired differences that answer the questions asked beforehand."""
    head = [
        "arm",
        "seeds",
        "kNN",
        "linear",
        *(f"{n}/class" for n in LABELS_PER_CLASS),
        "train s",
        "train TFLOP",
    ]
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for arm, runs in results.items():
        cells = [arm, str(len(runs))]
        cells += [spread([run[key] for run in runs]) for key in ("knn_top1", "linear_top1")]
        cells += [spread([statistics.mean(run["few"][str(n)]) for run in runs]) for n in LABELS_PER_CLASS]
        cells.append(f"{statistics.mean(run['wall_s'] for run in runs):.0f}" if "wall_s" in runs[0] else "–")
        cells.append(f"{runs[0]['training_flops'] / 1e12:.2f}" if "training_flops" in runs[0] else "–")
        print("| " + " | ".join(cells) + " |")
    cells = [
        "from scratch",
        "5 draws",
        "–",
        "–",
        *(spread(scratch[str(n)]) for n in LABELS_PER_CLASS),
        "–",
        "–",
    ]
    print("| " + " | ".join(cells) + " |")
    print("\nPaired differences in points [95 %], over seeds:")
    for a, b in (("xd-only", "barlow-twins"), ("sacl-xd", "xd-only"), ("sacl-xd", "sacl-only"), ("sacl-xd", "barlow-twins"),
                 ("sacl-xd", "random init"), ("barlow-twins", "random init")):  # fmt: skip
        for key in ("knn_top1", "linear_top1"):
            print(
                f"- {a} - {b}, {key}: {verdict([x[key] - y[key] for x, y in zip(results[a], results[b], strict=True)])}"
            )
    print("\nPaired differences in points [95 %], over label draws (seed 0):")
    for n in LABELS_PER_CLASS:
        ours = results["sacl-xd"][0]["few"][str(n)]
        for name, theirs in (
            ("random init", results["random init"][0]["few"][str(n)]),
            ("from scratch", scratch[str(n)]),
        ):
            print(
                f"- sacl-xd - {name}, {n}/class: {verdict([x - y for x, y in zip(ours, theirs, strict=True)])}"
            )


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    low, high = mean_interval(values)
    return f"{statistics.mean(values):.1f} [{low:.1f}, {high:.1f}]"


def verdict(differences: list[float]) -> str:
    if len(differences) < 2:
        return f"{differences[0]:+.1f} (one seed: not resolved)"
    low, high = mean_interval(differences)
    resolved = "" if low > 0 or high < 0 else ": not resolved"
    return f"{statistics.mean(differences):+.1f} [{low:.1f}, {high:.1f}]{resolved}"


if __name__ == "__main__":
    main()
