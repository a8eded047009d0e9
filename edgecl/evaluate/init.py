"""The verb `init`: a folder of pictures in, a recipe for it and for this machine out, with its reasons and its price."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecl.config.proposal import (
    CONTINUE,
    Choice,
    advise,
    choose_length,
    choose_recipe,
    describe,
    hours_of,
    length_in_words,
    recipe_text,
    with_batch,
)
from edgecl.config.target import read_target
from edgecl.data.source import ImageSource
from edgecl.data.sources import absolute_uri, has_test_split, open_source
from edgecl.data.survey import survey
from edgecl.errors import DeviceError, RecipeError
from edgecl.evaluate.cost import cost_of_recipe
from edgecl.nets.given import HUB, HUGGING_FACE, load_given, load_start
from edgecl.storage.directories import ModelDir
from edgecl.storage.outputs import refuse_existing_file
from edgecl.storage.records import MADE_BY, Proposal, Timing
from edgecl.storage.writing import disk_errors, write_bytes
from edgecl.train.timing import look_at_machine, time_steps

_SMALLEST_BATCH = 32


def init(
    photos: str,
    *,
    out: Path,
    labels: str | None = None,
    test: str | None = None,
    target: str | None = None,
    hours: float | None = None,
    weights: str | None = None,
    arch: str | None = None,
    force: bool = False,
) -> Proposal:
    """Look at pictures and at this machine, and write a recipe for them.

    `edgecl.api.init` says what the arguments are and what is raised.
    """
    if out.suffix != ".toml":
        raise RecipeError(f"'{out}' is no name of a recipe", hint="let it end in .toml")
    refuse_existing_file(out, force=force)
    device = None if target is None else read_target(target)
    if arch and weights is None:
        raise RecipeError(f"'{arch}' is the architecture of no weights", hint="name them by --weights")
    given = None if weights is None else _settings_of(weights, arch=arch)
    source = open_source(photos)
    labelled = None if labels is None else open_source(labels)
    if test is not None:
        labelled = open_source(test, split="test" if has_test_split(test) else "train")
    found = survey(source, labelled).model_copy(update={"uri": absolute_uri(photos)})
    machine = look_at_machine()
    choice = choose_recipe(found, machine, target=device, weights=given)
    choice, timing = _timed(choice, _without(source, found.unreadable))
    choice = choose_length(choice, found, timing, hours=hours)
    taken = hours_of(choice, found, timing)
    advice, why = advise(choice, found, hours=taken)
    cost = cost_of_recipe(choice.recipe, recipe_name=out.stem, images=found.images).training
    result = Proposal(
        recipe=str(out),
        advice=advice,
        why=why,
        base=choice.base,
        reasons=choice.reasons,
        hours=round(taken, 3),
        total_flops=cost.total_flops,
        survey=found,
        machine=machine,
        timing=timing,
    )
    header = [
        f"{advice.capitalize()}: {why}.",
        "",
        *(
            _instead(photos, out=str(out), labels=labels, test=test, weights=weights)
            if advice == "fine-tune"
            else []
        ),
        *_header(result, target=target, hours=hours),
    ]
    text = recipe_text(choice, header)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, text.encode())
    return result


def _is_model_dir(weights: str) -> bool:
    return weights != HUB and not weights.startswith(HUGGING_FACE) and Path(weights).is_dir()


def _settings_of(weights: str, *, arch: str | None) -> dict[str, Any]:
    """Load given weights, and return the settings that follow from them: their net, and how pictures are normalized.

    Raises:
        RecipeError, ArtifactError, DeviceError: as `edgecl.nets.given.load_given`.
    """
    path, packaged = Path(weights).absolute(), Choice(CONTINUE).recipe
    if not _is_model_dir(weights):
        wanted = arch or (None if weights.startswith(HUGGING_FACE) else packaged.host.arch)
        given = load_given(weights, arch=wanted)
        return {
            "host.init": str(path) if path.is_file() and weights != HUB else weights,
            "host.arch": given.arch,
            "data.mean": list(given.mean or packaged.data.mean),
            "data.std": list(given.std or packaged.data.std),
        }
    record = ModelDir(weights).read()
    settings = {
        "host.init": str(path),
        "host.arch": arch or record.arch,
        "host.width": record.width,
        "slim.width": record.width,
        "host.stem_stride": record.stem_stride,
        "data.mean": record.preprocessing.mean,
        "data.std": record.preprocessing.std,
    }
    recipe = Choice(CONTINUE).put("", settings).recipe
    load_start(weights, host=recipe.host, width=recipe.slim.width, data=recipe.data)
    return settings


def _without(source: ImageSource, unreadable: list[str]) -> ImageSource:
    """Return a source without pictures that are known to be unreadable, so that no more is said of them."""
    if not unreadable:
        return source
    known = set(unreadable)
    return source.take(np.array([row for row in range(len(source)) if source.describe(row) not in known]))


def _timed(choice: Choice, source: ImageSource) -> tuple[Choice, Timing]:
    """Time steps, with smaller batches where they do not fit into a GPU's memory."""
    while True:
        try:
            return choice, time_steps(choice.recipe, source)
        except torch.OutOfMemoryError:
            batch = choice.recipe.data.batch_size
            if batch <= _SMALLEST_BATCH:
                raise DeviceError(
                    f"a step of {batch} pictures does not fit into the memory of the GPU",
                    hint="close other programs on it",
                ) from None
        choice = with_batch(choice, batch // 2, because="twice as many do not fit into the memory of the GPU")


def _instead(
    photos: str, *, out: str, labels: str | None, test: str | None, weights: str | None
) -> list[str]:
    """Return how to fine-tune weights that others have trained, as lines of the header."""
    held_out = ["--test", test] if test else []
    learn = ["--data", labels or "LABELLED", *held_out, "--out", "models/classifier"]
    explained: list[str] = []
    if weights is None:
        learned = ["--labels", labels] if labels else []
        asked = [*learned, *held_out, "--weights", "FILE", "--arch", "NAME", "--out", out, "--force"]
        lines = [["init", photos, *asked]]
        explained = [
            "says how, for a file of timm's weights and the name of their net (`edgecl ls nets`); with a network,",
            "`--weights timm` fetches it.",
        ]
    elif _is_model_dir(weights):
        lines = [["finetune", weights, *learn]]
    else:
        lines = [["carve", out, "--out", "models/given"], ["finetune", "models/given", *learn]]
    return [
        *(f"  edgecl {shlex.join(line)}" for line in lines),
        "",
        *explained,
        "To pretrain all the same, or to compare:",
        "",
    ]


def _header(found: Proposal, *, target: str | None, hours: float | None) -> list[str]:
    """Return what stands above the recipe below the advice: the commands, what it costs and what it rests on."""
    recipe, name = shlex.quote(found.recipe), Path(found.recipe).stem
    return [
        f"  edgecl pretrain {recipe} --out runs/{name}",
        f"  edgecl run {recipe} --out runs/{name}"
        + (f" --target {target}" if target else "")
        + "   # the whole road",
        "",
        f"Price: {found.total_flops:.4g} FLOPs, projector apart; {length_in_words(found.hours)} on this machine at the",
        "timed rate, reading the pictures for the first time apart."
        + ("" if hours else " `--hours` chooses the length."),
        "",
        *describe(found.survey, found.machine, found.timing),
        "",
        f"It is the packaged recipe `{found.base}`, whose header says what that rests on, with the changes that have a",
        f"reason beside them. Written by {MADE_BY}, `edgecl init`.",
    ]
