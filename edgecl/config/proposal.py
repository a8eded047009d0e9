"""Choose a recipe for a folder of pictures and a machine: the packaged one it begins with, what changes, and why.

Where a rule is not measured it follows the packaged recipes, which say what they rest on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgecl.config.recipe import Recipe, flatten, recipe_from_tables
from edgecl.config.settings import override, read_tables
from edgecl.config.target import Target
from edgecl.errors import RecipeError, counted, first_of, printable
from edgecl.storage.records import Machine, Survey, Timing

FEW = 1_000
"""Pictures below which to pretrain is not advised."""
_SOME = 5_000
"""Pictures for which the packaged recipes' epochs are meant; fewer are gone through more often."""
_MANY = 100_000
"""Pictures from which `photos-large` is meant."""
CONTINUE = "continue"
"""The packaged recipe for given weights, whose rate is for its own epochs."""
_MOST_EPOCHS = 800
_FEWEST_EPOCHS = 10
_SMALL_DEVICES = ("cpu", "jetson-nano", "jetson-tx2")
_SHORTEST_EPOCH = 16  # steps


@dataclass(frozen=True)
class Choice:
    """A recipe as it differs from a packaged one."""

    base: str
    """The packaged recipe's name."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Setting, as `--set` names it -> value; None leaves it out."""
    reasons: dict[str, str] = field(default_factory=dict)

    def put(self, because: str, changes: Mapping[str, Any]) -> Choice:
        """Return the choice with settings changed, named as `--set` names them; those that are so already stay."""
        now = {**flatten(self.recipe.model_dump(mode="json")), **self.changes}
        news = {name: value for name, value in changes.items() if now.get(name) != value}
        return Choice(self.base, {**self.changes, **news}, {**self.reasons, **dict.fromkeys(news, because)})

    @property
    def tables(self) -> dict[str, Any]:
        """The recipe as TOML has it."""
        changes = [f"{name}={_toml(value)}" for name, value in self.changes.items() if value is not None]
        _, packaged = read_tables(self.base, folder="recipes", error=RecipeError, noun="recipe")
        tables = override(packaged, changes, error=RecipeError)
        for name in self.changes.keys() - {change.partition("=")[0] for change in changes}:
            table, _, key = name.partition(".")
            tables[table].pop(key, None)
        return tables

    @property
    def recipe(self) -> Recipe:
        """The recipe, checked."""
        return recipe_from_tables(self.tables, source="the proposal")


def choose_recipe(
    survey: Survey,
    machine: Machine,
    *,
    target: Target | None = None,
    weights: Mapping[str, Any] | None = None,
) -> Choice:
    """Choose all but the length of a run; `weights` are the settings that follow from given weights."""
    size, why_size = _image_size(survey, target)
    small_device = target is not None and target.device in _SMALL_DEVICES
    many = survey.images >= _MANY and machine.device == "cuda" and not small_device
    choice = Choice(CONTINUE if weights else "small" if size <= 64 else "photos-large" if many else "photos")
    choice = choice.put("this folder", {"data.uri": survey.uri})
    if choice.base == "small":
        choice = choice.put(why_size, {"data.image_size": size})
    elif size != 224:
        choice = choice.put(
            why_size,
            {"data.image_size": size, "data.decode_size": size * 9 // 7, "data.resize_size": size * 8 // 7},
        )
    choice = _for_few(choice, survey)
    choice = _for_machine(choice, survey, machine)
    if survey.grayscale >= 0.9:
        choice = choice.put(
            f"{survey.grayscale:.0%} of the pictures have no color to vary",
            {"views.saturation": 0.0, "views.hue": 0.0, "views.grayscale": 0.0},
        )
    return choice.put("as the given weights are", weights or {})


def _image_size(survey: Survey, target: Target | None) -> tuple[int, str]:
    if target is not None and target.graph.image_size is not None:
        return target.graph.image_size, "what the target takes"
    median = survey.shorter_side[1]
    why = f"the shorter side of the median picture is {median} pixels"
    if median < 80:
        return (32 if median < 48 else 64), why
    return min(224, median // 32 * 32), why


def _for_few(choice: Choice, survey: Survey) -> Choice:
    """Return the choice with a batch that an epoch has several of, and what else pictures and labels ask for."""
    recipe, usable = choice.recipe, _usable(survey)
    batch = recipe.data.batch_size
    while batch > 32 and batch * _SHORTEST_EPOCH > usable:
        batch //= 2
    batch = max(2, min(batch, usable // 2))
    choice = with_batch(choice, batch, because=f"{counted(usable // batch, 'step')} an epoch")
    bad = len(survey.unreadable) / (survey.read + len(survey.unreadable))
    if bad > recipe.data.max_bad_fraction / 2:
        choice = choice.put(
            f"{bad:.1%} of those read are unreadable", {"data.max_bad_fraction": min(1.0, round(2 * bad, 3))}
        )
    least = survey.smallest_class
    if least is not None and least * 4 // 5 < recipe.probe.labels_per_class:
        choice = choice.put(
            f"the smallest class has {counted(least, 'picture')}, a fifth of them held out",
            {"probe.labels_per_class": max(1, least * 4 // 5)},
        )
    return choice


def with_batch(choice: Choice, batch: int, *, because: str) -> Choice:
    """Return the choice with another batch, and the rate scaled as it is."""
    data, optim = choice.recipe.data, choice.recipe.optim
    if batch == data.batch_size:
        return choice
    choice = choice.put(because, {"data.batch_size": batch})
    return choice.put(
        "of this batch the rate is; scaled to yours", {"optim.lr_batch": optim.lr_batch or data.batch_size}
    )


def _for_machine(choice: Choice, survey: Survey, machine: Machine) -> Choice:
    """Return the choice with the precision, the memory and the threads of a machine."""
    data = choice.recipe.data
    if machine.device == "cuda":
        precision = "bf16" if machine.bf16 else "fp16"
        choice = choice.put(f"the {machine.name} computes in it", {"run.precision": precision})
    needed_mib = 3 * (data.decode_size or data.image_size) ** 2 * survey.images / 2**20
    if data.cache_mib < needed_mib < machine.memory_mib / 2:
        choice = choice.put(
            f"all pictures decoded fit into less than half of the free {machine.memory_mib:,} MiB",
            {"data.cache_mib": int(needed_mib) + 1},
        )
    elif needed_mib > data.cache_mib:
        choice = choice.put("threads that decode: the cores of this machine", {"data.workers": machine.cores})
    return choice


def choose_length(choice: Choice, survey: Survey, timing: Timing, *, hours: float | None) -> Choice:
    """Choose how long a run takes: the hours that were asked for, or what the packaged recipe says."""
    recipe, usable = choice.recipe, _usable(survey)
    most = recipe.run.epochs if choice.base == CONTINUE else _MOST_EPOCHS
    if hours is None:
        epochs = min(most, round(recipe.run.epochs * max(1.0, _SOME / usable)))
        why = (
            f"fewer pictures than the {_SOME:,} that `{choice.base}` is written for, gone through more often"
        )
    else:
        epochs = max(1, min(most, int(hours * 3600 * timing.images_per_s / usable)))
        why = f"as many as fit into {hours:g} h, {most} at most"
    choice = choice.put(why, {"run.epochs": epochs})
    return choice.put(
        "a part of the epochs",
        {
            "optim.warmup_epochs": min(recipe.optim.warmup_epochs, round(epochs / 10, 1)),
            "run.quality_epochs": max(1, min(recipe.run.quality_epochs, epochs // 10)),
        },
    )


def hours_of(choice: Choice, survey: Survey, timing: Timing) -> float:
    """Return how long a choice trains at a timed rate."""
    return _usable(survey) * choice.recipe.run.epochs / timing.images_per_s / 3600


def advise(choice: Choice, survey: Survey, *, hours: float) -> tuple[Literal["pretrain", "fine-tune"], str]:
    """Say whether to train this recipe, which takes so many hours, and why."""
    usable, epochs = _usable(survey), choice.recipe.run.epochs
    if usable < FEW:
        return "fine-tune", (
            f"{counted(usable, 'picture')} are too few to pretrain on: fine-tune weights that were trained on many"
        )
    if epochs < _FEWEST_EPOCHS:
        return "fine-tune", (
            f"{length_in_words(hours)} on this machine are {counted(epochs, 'epoch')}, too few to learn much: "
            "fine-tune given weights, allow more hours or train on a GPU"
        )
    return (
        "pretrain",
        f"{counted(usable, 'picture')}, {epochs} epochs in {length_in_words(hours)} on this machine",
    )


def length_in_words(hours: float) -> str:
    """Write how long a run takes: minutes below an hour."""
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def _usable(survey: Survey) -> int:
    """Return how many of all pictures can be read, as far as the ones that were read tell."""
    return max(1, round(survey.images * survey.read / (survey.read + len(survey.unreadable))))


# --- as a file ---


def recipe_text(choice: Choice, header: list[str]) -> str:
    """Return a choice as a TOML file, its header's lines and each reason as comments."""
    lines = [f"# {_comment(line)}".rstrip() for line in header]

    def write(table: Mapping[str, Any], name: str) -> None:
        inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
        own = {key: value for key, value in table.items() if key not in inner}
        if own:
            lines.extend(["", f"[{name}]"])
        for key, value in own.items():
            reason = choice.reasons.get(f"{name}.{key}")
            setting = f"{key} = {_toml(value)}"
            lines.append(f"{setting:<36}# {_comment(reason)}" if reason else setting)
        for key, value in inner.items():
            write(value, f"{name}.{key}")

    for key, table in choice.tables.items():
        write(table, key)
    return "\n".join(lines) + "\n"


def describe(survey: Survey, machine: Machine, timing: Timing) -> list[str]:
    """Say what was seen of pictures and machine, a sentence a line."""
    sides, ratios = survey.shorter_side, survey.aspect
    tested = survey.read + len(survey.unreadable)
    looked = "all" if tested == survey.images else f"{tested:,} of them, runs of neighbors by name"
    lines = [
        f"{counted(survey.images, 'picture')} in '{survey.uri}' (looked at: {looked}).",
        f"Shorter side: {sides[0]} to {sides[2]} pixels, median {sides[1]}; longer / shorter side: {ratios[0]:g} to "
        f"{ratios[2]:g}, median {ratios[1]:g} (5th to 95th percentile).",
    ]
    if ratios[1] >= 1.7:
        lines.append(
            f"Nets are tested on the central square: {1 - 1 / ratios[1]:.0%} of the median picture lies outside of it."
        )
    if survey.unreadable:
        lines.append(f"Unreadable: {len(survey.unreadable):,}: {first_of(survey.unreadable)}.")
    if survey.duplicates:
        alike, groups = sum(map(len, survey.duplicates)), counted(len(survey.duplicates), "group")
        named = first_of([" = ".join(group[:3]) + " = …" * (len(group) > 3) for group in survey.duplicates])
        lines.append(f"Near-duplicates: {alike:,} pictures in {groups}: {named}.")
    if survey.labelled is not None:
        lines += _describe_leaks(survey)
    if any("…" in line for line in lines):
        lines.append("Where … stands, `--json` names all.")
    lines.append(
        f"Machine: {machine.name}, {counted(machine.cores, 'core')}, {machine.memory_mib:,} MiB free: "
        f"{timing.images_per_s:,.1f} pictures/s over {counted(timing.steps, 'step')}, {timing.peak_mib:,.0f} MiB in use."
    )
    return lines


def _describe_leaks(survey: Survey) -> list[str]:
    """Say which labelled pictures lie in the folder too, and in how much of it they were looked for."""
    lines = []
    if survey.leaks:
        named = first_of([f"{theirs} is {ours}" for ours, theirs in survey.leaks])
        lines.append(
            f"LEAK: {len(survey.leaks):,} of {survey.labelled:,} labelled pictures lie in this folder too: {named}. "
            "Take them out of one of the two before a net is tested on them."
        )
    exactly = f"all byte for byte among {survey.searched:,} of {survey.images:,} pictures; "
    exactly = exactly if survey.searched else ""
    return [
        *lines,
        f"{'Leaks' if lines else 'No leak found'}: {counted(survey.labelled or 0, 'labelled picture')} looked for, {exactly}"
        f"{survey.labelled_read:,} by their looks among {survey.read:,} ({survey.read / survey.images:.0%} of the folder).",
    ]


def _comment(text: str) -> str:
    """Return text that cannot leave its line of comment."""
    return printable(text).replace("\n", "\\n")


def _toml(value: Any) -> str:
    # Of strings, numbers, truth values and lists of these, JSON is TOML.
    return json.dumps(value, ensure_ascii=False)
