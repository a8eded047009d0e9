"""How long a training step of each method takes on one core, views included; prints a table and one JSON line.

    python benchmarks/methods.py --core 1                                    # every method on the demo's net: some minutes
    python benchmarks/methods.py --recipe cifar10-smoke --methods simclr moco-v2

Each method has the recipe's net, pictures and batch and settings of its own; a teacher is an untrained ResNet-18 with
timm's stem, or what --teacher says, whose passes are computed in every step (no features kept). All methods take turns,
one step each per round, every other round backwards; it is processor time that is compared, and a ratio is the median
over rounds of the ratios within a round. FLOPs are `edgecl cost`'s per step, projector and coding rate included.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from arms import price
from timing import conditions_of, in_turns, options_of, ratio_of, table

from edgecl.config.recipe import Recipe, find_method, list_methods, read_recipe
from edgecl.data.loading import Batch, TrainingImages
from edgecl.data.sources import open_source
from edgecl.data.views import make_views
from edgecl.methods.teacher import TaughtConfig
from edgecl.nets.build import create_slimmable
from edgecl.train.allocator import keep_freed_memory
from edgecl.train.pretrain import create_accelerator
from edgecl.train.step import create_step

YARDSTICK = "simclr"
STEPS_PER_EPOCH = 1000
"""Of the run that is played, in which schedules hardly move."""


def recipe_of(method: str, given) -> Recipe:
    """Return the given recipe with another method; its own method keeps the settings that the recipe has for it."""
    own = read_recipe(given.recipe, given.set)
    if own.method.name == method:
        return own
    changes = [*given.set, f"method.name={method}"]
    if issubclass(find_method(method).Config, TaughtConfig):
        arch = [] if Path(given.teacher).is_dir() else ["method.teacher.arch=resnet18"]
        changes += [*arch, f"method.teacher.weights={given.teacher}", "method.teacher.cache=false"]
    return read_recipe(given.recipe, changes)


def stepper(recipe: Recipe, images: TrainingImages, batches: list[Batch]) -> Callable[[], float]:
    """Return what makes views of the next batch, takes a step and returns the processor time of both in seconds."""
    torch.manual_seed(recipe.run.seed)
    accelerator = create_accelerator(recipe, device="cpu", out=Path())
    step = create_step(
        recipe, create_slimmable(recipe), accelerator=accelerator, steps_per_epoch=STEPS_PER_EPOCH
    )
    with tempfile.TemporaryDirectory() as cache:
        known = step.method.look_up(images, cache=Path(cache))
    turn = itertools.count()

    def take() -> float:
        number = next(turn)
        batch, data, began = batches[number % len(batches)], recipe.data, time.process_time()
        views = make_views(
            batch, recipe.view_specs, mean=data.mean, std=data.std, seed=recipe.run.seed, epoch=0
        )
        if known is not None:
            views.append(known[torch.from_numpy(batch.indices)])
        step(views, number=number)
        return time.process_time() - began

    return take


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--recipe", default="demo")
    options.add_argument("--set", action="append", default=[], help="a change to the recipe")
    options.add_argument("--data", default="demo")
    options.add_argument("--methods", nargs="+", default=list_methods())
    options.add_argument("--teacher", default="untrained", help="a model directory")
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--core", type=int, help="pin to this core [default: leave it to the system]")
    given = options.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    torch.set_num_threads(1)
    keep_freed_memory()  # as pretrain does
    load_before = os.getloadavg()[0]
    recipes = {name: recipe_of(name, given) for name in dict.fromkeys([YARDSTICK, *given.methods])}
    data = recipes[YARDSTICK].data
    images = TrainingImages(
        open_source(given.data), decode_size=data.decode_size or data.image_size, limit=8 * data.batch_size
    )
    batches = list(images.batches(0, 0, batch_size=data.batch_size))
    steppers = {name: stepper(recipe, images, batches) for name, recipe in recipes.items()}
    spent: dict[str, list[float]] = {name: [] for name in recipes}
    for index, name in in_turns(recipes, 1 + given.rounds):
        taken = steppers[name]()
        if index:  # the first round chooses kernels and fills the memory
            spent[name].append(taken)
        print(f"round {index} of {given.rounds}: {name}", end="\r", file=sys.stderr, flush=True)
    found = {
        name: {
            "ms": 1e3 * statistics.median(spent[name]),
            **ratio_of(spent[YARDSTICK], spent[name], "ratio"),
            "gflop": price(recipe) * data.batch_size / 1e9,
        }
        for name, recipe in recipes.items()
    }
    of_yardstick = found[YARDSTICK]["gflop"]
    rows = [
        [
            name,
            f"{one['ms']:.0f}",
            f"{one['ratio']:.2f} [{one['range'][0]:.2f}, {one['range'][1]:.2f}]",
            f"{one['gflop']:.2f}",
            f"{one['gflop'] / of_yardstick:.2f}",
        ]
        for name, one in sorted(found.items(), key=lambda item: item[1]["ms"])
    ]
    print(table(["method", "ms a step", f"x {YARDSTICK} [range]", "GFLOP a step", f"x {YARDSTICK}'s"], rows))
    conditions = conditions_of(
        load_before, ("torch", "timm"), recipe=given.recipe, batch=data.batch_size, rounds=given.rounds
    )
    print(json.dumps({"benchmark": "methods", "conditions": conditions, "methods": found}))


if __name__ == "__main__":
    main()
