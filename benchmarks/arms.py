"""Train the arms of a campaign over several seeds, as far as time allows, and compare the nets they give.

    python benchmarks/arms.py benchmarks/campaigns/cifar10-v3-small.toml --data TRAIN_FOLDER --out DIR --core 0
    python benchmarks/arms.py benchmarks/campaigns/cifar10-v3-small.toml --data TRAIN_FOLDER --out DIR --table

A campaign is a TOML file: a recipe, and named lists of changes to it. Ctrl-C and SIGTERM stop it at any time; the same
command goes on, and the same command with another --core helps. Lists may be edited between two starts.

Every arm gives the same net, is trained on the same images in the same order, and is probed on the same label draws. An
arm with `match_flops = ["sacl-xd"]` is trained a second time, for as many epochs as cost what sacl-xd costs: passes by
edgecl.evaluate.cost.training_cost, projector and coding rate included, since they are computed too. Choices are made on
images held out of the training images; the test images are looked at with --on-test only. Differences are paired over seeds,
intervals are 95 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import campaign
from campaign import Run, paired, read_results, spread, state_of
from pydantic import Field
from timing import options_of, table

from edgecl.config.recipe import Recipe
from edgecl.config.settings import Config, parse_toml, validate
from edgecl.errors import EdgeclError, RecipeError

METRICS = ("knn_top1", "linear_top1", "few")


class Arm(Config):
    """One method: what it changes in the recipe."""

    set: tuple[str, ...] = ()
    """As `--set` takes it."""
    match_flops: tuple[str, ...] = ()
    """Arms whose training FLOPs this one gets too, in runs of their own."""
    untrained: bool = False
    """The net as it is initialized."""


class Anchor(Config):
    """A published row to stand beside ours."""

    name: str
    epochs: str
    knn: str


class Comparison(Config):
    """Each of some arms with each of others."""

    these: tuple[str, ...]
    others: tuple[str, ...]


class Campaign(Config):
    """What is trained and how it is evaluated."""

    recipe: str
    """A packaged recipe, or a TOML file beside this one."""
    set: tuple[str, ...] = ()
    """Changes to the recipe for every arm."""
    epochs: int = Field(gt=0)
    seeds: int = Field(gt=0)
    hold_out: int | None = Field(None, gt=0)
    """So many images of --data are not trained on but evaluated on, an even share of each class."""
    evaluate_on: str | None = None
    """A data URI to evaluate on instead."""
    labels_per_class: int = Field(10, gt=0)
    draws: int = Field(5, gt=1)
    learn_from: int | None = Field(None, gt=0)
    """Labelled images that kNN and linear probe learn from, an even share of each class; None means all."""
    arms: dict[str, Arm]
    compare: tuple[Comparison, ...] = ()
    anchors: tuple[Anchor, ...] = ()


@dataclass(frozen=True)
class Row:
    """An arm at a number of epochs: one run per seed.

    Attributes:
        arm: its name.
        target: the arm whose FLOPs it matches; None at the campaign's epochs.
        epochs: of each run.
        runs: by seed.
    """

    arm: str
    target: str | None
    epochs: int
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return self.arm if self.target is None else f"{self.arm}, FLOPs of {self.target}"


def read_campaign(file: Path) -> Campaign:
    """Read a campaign and hold the names in it to one another.

    Raises:
        RecipeError: an unknown key, or an arm that is not there.
    """
    tables = parse_toml(file.read_text(encoding="utf-8"), source=str(file), error=RecipeError)
    given = validate(Campaign, tables, source=str(file), error=RecipeError)
    for name, arm in given.arms.items():
        for target in arm.match_flops:
            if target not in given.arms or given.arms[target].untrained or target == name:
                raise RecipeError(f"'{name}' cannot match the FLOPs of '{target}'", where={"file": file})
    if given.recipe.endswith(".toml"):
        given = given.model_copy(update={"recipe": str(file.parent / given.recipe)})
    named = {name for one in given.compare for name in (*one.these, *one.others)}
    if unknown := sorted(named - given.arms.keys()):
        raise RecipeError(f"there is no arm '{unknown[0]}' to compare", where={"file": file})
    if (given.hold_out is None) == (given.evaluate_on is None):
        raise RecipeError("a campaign has either 'hold_out' or 'evaluate_on'", where={"file": file})
    return given


def plan(given: Campaign, **common: object) -> list[Row]:
    """Return every arm at the campaign's epochs, then those that match another's FLOPs.

    Args:
        given: the campaign.
        common: of all runs: where the images are, threads, device, split.
    """

    def row(name: str, target: str | None, epochs: int) -> Row:
        arm = given.arms[name]
        assignments = (*given.set, *arm.set, f"run.epochs={epochs}")
        run = Run(
            name,
            given.recipe,
            assignments,
            0,
            untrained=arm.untrained,
            labels_per_class=given.labels_per_class,
            draws=given.draws,
            learn_from=given.learn_from,
            **common,
        )
        runs = tuple(dataclasses.replace(run, seed=seed) for seed in range(given.seeds))
        return Row(name, target, epochs, runs)

    rows = [row(name, None, given.epochs) for name in given.arms]
    recipes = {one.arm: one.runs[0].settings() for one in rows}
    matches = [(name, target) for name, arm in given.arms.items() for target in arm.match_flops]
    prices = {name: price(recipes[name]) for name in {name for pair in matches for name in pair}}
    for name, target in matches:
        rows.append(row(name, target, max(1, round(given.epochs * prices[target] / prices[name]))))
    return rows


def price(recipe: Recipe) -> float:
    """Return the training FLOPs of one image, projector and coding rate included."""
    from edgecl.evaluate.cost import training_cost

    cost = training_cost(recipe, images=1)
    return cost.flops_per_image + cost.projector_flops + cost.rate_flops * cost.rate_share


def in_turn(rows: list[Row]) -> list[Run]:
    """Order all runs so that whole seeds are finished one after another: differences are paired over seeds."""
    return [row.runs[seed] for seed in range(len(rows[0].runs)) for row in rows]


# --- the table ---


def print_tables(given: Campaign, rows: list[Row], directory: Path) -> dict:
    """Print what is finished and the differences, and what is not finished; return them for the JSON line."""
    found = read_results(directory)
    results = {
        (row.arm, row.target): {run.seed: found[run.identity] for run in row.runs if run.identity in found}
        for row in rows
    }
    sound = {
        key: {seed: line for seed, line in lines.items() if "failed" not in line}
        for key, lines in results.items()
    }
    few = f"{given.labels_per_class}/class"
    head = ["arm", "epochs", "seeds", "kNN", "linear", few, "RankMe", "PFLOP, projector apart", "hours"]
    body = [cells_of(row, list(sound[row.arm, row.target].values())) for row in rows]
    body += [[one.name, one.epochs, "published", one.knn, *["–"] * 5] for one in given.anchors]
    print(table(head, body))
    differences = differences_of(given, rows, sound)
    if differences:
        print("\nDifferences in points, paired over seeds [95 %]:\n")
        print(table(["difference", "at equal", "seeds", "kNN", "linear", few], differences))
    finished, evaluated = print_unfinished(rows, found, directory)
    return {"finished": finished, "runs": evaluated, "differences": differences}


def cells_of(row: Row, lines: list[dict]) -> list[str]:
    if not lines:
        return [row.label, str(row.epochs), "0", *["–"] * 6]
    cells = [row.label, "–" if row.runs[0].untrained else str(row.epochs), str(len(lines))]
    cells += [spread([value_of(line, metric) for line in lines]) for metric in METRICS]
    cells.append(f"{statistics.mean(line['rankme'] for line in lines):.0f}")
    if row.runs[0].untrained:
        return [*cells, "–", "–"]
    flops, projector = (
        statistics.mean(line[key] for line in lines) / 1e15 for key in ("training_flops", "projector_flops")
    )
    return [
        *cells,
        f"{flops:.3g} + {projector:.2g}",
        f"{statistics.mean(line['wall_s'] for line in lines) / 3600:.2f}",
    ]


def value_of(line: dict, metric: str) -> float:
    return statistics.mean(line[metric]) if metric == "few" else line[metric]


def differences_of(given: Campaign, rows: list[Row], sound: dict) -> list[list[str]]:
    """Compare what the campaign asks for: at equal epochs, and at the FLOPs of every arm that both match."""
    by_key = {(row.arm, row.target): row for row in rows}
    # An arm has its own FLOPs at the campaign's epochs.
    targets = dict.fromkeys(row.target for row in rows if row.target)
    body = []
    pairs = [(a, b) for one in given.compare for a in one.these for b in one.others]
    for a, b in pairs:
        for target in (None, *targets):
            ours, theirs = (by_key.get((arm, None if arm == target else target)) for arm in (a, b))
            if ours is None or theirs is None:
                continue
            equal = (
                "epochs"
                if target is None
                else f"FLOPs, those of {target} ({ours.epochs} and {theirs.epochs} epochs)"
            )
            lines = [sound[row.arm, row.target] for row in (ours, theirs)]
            seeds = sorted(lines[0].keys() & lines[1].keys())
            cells = [
                paired(*([value_of(one[seed], metric) for seed in seeds] for one in lines))
                for metric in METRICS
            ]
            body.append([f"{a} - {b}", equal, str(len(seeds)), *cells])
    return body


def print_unfinished(rows: list[Row], found: dict, directory: Path) -> tuple[int, int]:
    """List failed and unfinished runs; return how many of how many are finished."""
    runs = {run.identity: (row, run) for row in rows for run in row.runs}
    failed = [
        f"- {row.label}, seed {run.seed}: {found[identity]['failed']}"
        for identity, (row, run) in runs.items()
        if "failed" in found.get(identity, {})
    ]
    if failed:
        print("\nFailed:\n\n" + "\n".join(failed))
    missing = [
        f"- {row.label}, seed {run.seed}: {state_of(run, directory)}"
        for identity, (row, run) in runs.items()
        if identity not in found
    ]
    if missing:
        print(f"\nUnfinished, {len(missing)} of {len(runs)} runs:\n\n" + "\n".join(missing))
    return len(runs) - len(missing), len(runs)


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("campaign", type=Path)
    options.add_argument("--data", required=True, help="data URI of the training images, with labels")
    options.add_argument("--out", type=Path, required=True, help="the campaign's directory")
    options.add_argument("--test", help="data URI of the test images, for --on-test")
    options.add_argument(
        "--on-test", action="store_true", help="evaluate on the test images, once all is chosen"
    )
    options.add_argument("--core", type=int, help="stay on this core, with low priority")
    options.add_argument("--threads", type=int, default=1, help="of each run")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--table", action="store_true", help="train nothing, print what there is")
    given = options.parse_args()
    if given.on_test and not given.test:
        options.error("--on-test needs --test")
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
        os.nice(10)
    try:
        raise SystemExit(run_campaign(given))
    except EdgeclError as problem:
        raise SystemExit(f"arms.py: {problem}") from None


def run_campaign(given: argparse.Namespace) -> int:
    """Do what the command line says; return what to exit with."""
    listed = read_campaign(given.campaign)
    given.out.mkdir(parents=True, exist_ok=True)
    data, evaluate_on = given.data, listed.evaluate_on
    if listed.hold_out:
        data, evaluate_on = campaign.hold_out(given.out, data, listed.hold_out)
    split = "test" if given.on_test else "validation"
    rows = plan(
        listed,
        data=data,
        evaluate_on=given.test if given.on_test else evaluate_on,
        split=split,
        device=given.device,
        threads=given.threads,
    )
    status = 0 if given.table else campaign.work(in_turn(rows), given.out)
    counted = print_tables(listed, rows, given.out)
    print(
        json.dumps({"benchmark": "arms", "campaign": given.campaign.stem, "evaluated_on": split, **counted})
    )
    return status


if __name__ == "__main__":
    main()
