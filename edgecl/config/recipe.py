"""A recipe: everything that decides one training run, read from one TOML file."""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, create_model, model_validator

from edgecl.config.settings import (
    LARGER_PICTURES,
    Config,
    Count,
    Decay,
    Factor,
    Fraction,
    Rate,
    Seed,
    Side,
    override,
    read_tables,
    validate,
)
from edgecl.config.views import Views, ViewSpec
from edgecl.errors import RecipeError, bounded, near_matches

DEFAULT_METHOD = "sacl-xd"
"""Of a recipe that names none."""
_Mean = Annotated[float, Field(ge=-10, le=10)]
_Std = Annotated[float, Field(ge=0.001, le=10)]
_A_LAYER = "a layer between two of 32,768 has 4 GiB of weights"
_A_WEEK = "a picture that takes over a week will not come"
_THREADS = "a process cannot start that many threads"


class Host(Config):
    """The wide net that is trained."""

    arch: str
    """A timm architecture, e.g. mobilenetv3_large_100."""
    width: float = Field(1.5, gt=0, le=4.0)
    """Channels as a multiple of the architecture's own."""
    stem_stride: Literal[1, 2] | None = None
    """Stride of the first convolution; None keeps the architecture's. 1 suits images of 32 pixels."""
    nested_start: bool = False
    """Begin as the slim net plus channels that do not touch it yet: both compute the same at step 0."""
    init: str | None = None
    """Weights that the slim net starts from: a model directory, a .safetensors or .pth file of timm's tensors, "timm" for
    timm's pretrained ones, "hf-hub:USER/NAME", or "untrained". A wider host needs `nested_start` with them."""


class Slim(Config):
    """The net inside the host that will be carved out."""

    width: float = Field(1.0, gt=0, le=4.0)
    """Channels as a multiple of the architecture's own; at the host's width the host itself is the slim net."""
    widths: tuple[Annotated[float, Field(gt=0, le=4.0)], ...] = Field(
        (), max_length=64, examples=[(0.5, 1.0)]
    )
    """Every slim width of the run, `width` the widest of them and theirs by default; empty trains `width` alone."""
    slow_start: Fraction = 0.0
    """First fraction of the epochs in which both views go through the host only."""

    @model_validator(mode="before")
    @classmethod
    def _widest(cls, values: Any) -> Any:
        if isinstance(values, dict) and "width" not in values:
            # No list, an empty one, no numbers: said by their own checks.
            with contextlib.suppress(TypeError, ValueError):
                return {**values, "width": max(values.get("widths") or ())}
        return values

    @property
    def all_widths(self) -> tuple[float, ...]:
        """The slim widths that are trained, widest first."""
        return tuple(sorted({self.width, *self.widths}, reverse=True))


class Projector(Config):
    """The MLP between features and loss, thrown away after training."""

    sizes: tuple[Annotated[int, Field(gt=0, le=32_768)], ...] = Field(
        (2048, 2048, 2048), min_length=1, max_length=16, description=_A_LAYER
    )
    """Width of each linear layer; the last is D."""


class Panel(NamedTuple):
    """A chart of the report: what is logged of a method, over epochs."""

    title: str
    lines: dict[str, str]
    """Key in metrics.jsonl -> the name of its line."""
    unit: str = ""
    log: bool = False
    """A logarithmic axis, where every value is positive and they span a decade."""


class ForwardPasses(NamedTuple):
    """What one image costs in forward passes; a backward pass counts as two."""

    whole: dict[float, float]
    """Width -> passes of whole views."""
    local: dict[float, float]
    coding_rates: float = 0.0
    """Sets of embeddings that the coding rate is taken of, in a step that takes it."""
    coding_rate_share: float = 1.0
    """Of the steps that take it."""
    teacher: float = 0.0
    """Passes of the teacher in every epoch."""
    teacher_once: float = 0.0

    def with_targets(self, count: int) -> ForwardPasses:
        """Add passes without gradient of a net as large as the one encoder, such as a copy that follows it."""
        ((width, passes),) = self.whole.items()
        return self._replace(whole={width: passes + count})


class MethodConfig(Config):
    """The [method] table. A method's own file, edgecl/methods/NAME.py, derives its own from this one.

    What follows from settings alone is said here, so that names, prices and checks need no net.
    """

    panels: ClassVar[tuple[Panel, ...]] = (Panel("Loss", {"loss": "total"}, log=True),)
    """What the report draws of the method; the key "loss" is the total, the others are the terms of its loss."""
    has_host: ClassVar[bool] = False
    """Whether slim nets train inside a wider host; without, there is one encoder, and its width is that of both."""
    label: ClassVar[str] = ""
    """The method's name in the words of the field; empty where that is `name`."""
    needs_labels: ClassVar[bool] = False
    """Whether it learns from the classes of the pictures."""
    brings: ClassVar[dict[str, dict[str, Any]]] = {}
    """Defaults of other tables than [method] that are part of the method; a recipe that names the method may set others."""

    name: str
    """Of the method: of its file, with hyphens."""

    def view_specs(self, recipe: Recipe) -> tuple[ViewSpec, ...]:
        """Return the views of each picture that the method wants, in the order in which it is given them.

        Here two whole ones and the local ones of [views]; whole ones come first.
        """
        return recipe.views.specs(recipe.data.image_size)

    def title(self, recipe: Recipe) -> str:
        """Return what the settings amount to, in the words of the field."""
        return self.label or self.name

    def check(self, recipe: Recipe) -> None:
        """Refuse settings that only together are wrong.

        Raises:
            ValueError: with what to change.
        """
        widths = {recipe.host.width, *recipe.slim.all_widths}
        if not self.has_host and (len(widths) > 1 or recipe.slim.slow_start):
            raise ValueError(
                f"'method.name' {self.name} trains one encoder: set 'host.width' and 'slim.width' to its width, and no "
                "other 'slim.widths' or 'slim.slow_start'"
            )

    def prepare(self, recipe: Recipe) -> dict[str, str]:
        """Load what is needed besides pictures; called before they are read, so that what is missing is said at once.

        Returns:
            what it is -> the sha256 of its content, the same in all processes and when the run is resumed.

        Raises:
            EdgeclError: it is missing, or does not fit the recipe.
        """
        return {}

    def forward_passes(self, recipe: Recipe) -> ForwardPasses:
        """Return the cost of one image; here that of one encoder through which every view learns."""
        width = recipe.host.width
        whole, local = (self.count_views(recipe, local=local) for local in (False, True))
        return ForwardPasses({width: 3.0 * whole}, {width: 3.0 * local})

    def count_views(self, recipe: Recipe, *, local: bool) -> int:
        """Count the whole or the local views of each picture."""
        return sum(spec.count for spec in self.view_specs(recipe) if spec.local == local and not spec.teacher)

    def has_idle_parameters(self, recipe: Recipe) -> bool:
        """Return whether some steps give some parameters no gradient, which many processes must know."""
        return False


class Data(Config):
    """Which images, and in what batches."""

    uri: str | None = None
    """A data URI; None asks for --data."""
    image_size: Side = 224
    """Height and width of a view and of a test image, pixels."""
    decode_size: int | None = Field(None, ge=8, le=8192, description=LARGER_PICTURES)
    """Each picture is decoded whole to a square of this side before cropping, pixels; None means image_size."""
    resize_size: int | None = Field(None, ge=8, le=8192, description=LARGER_PICTURES)
    """Shorter side before the center crop of a test image, pixels; None means image_size."""
    batch_size: int = Field(256, ge=2, le=10**9)
    """Images per step, over all processes."""
    max_bad_fraction: Fraction = 0.01
    """Unreadable images skipped (and named) before the run stops."""
    cache_mib: int = Field(4096, ge=0, le=10**9)
    """Keep the decoded images in memory when they fit into this."""
    workers: int = Field(2, ge=0, le=1024, description=_THREADS)
    """Decoding threads when they do not."""
    decode: Literal["cpu", "cuda"] = "cpu"
    """Where JPEGs that do not fit into memory are decoded; cuda uses nvJPEG through torchvision."""
    read_timeout_s: float = Field(300.0, gt=0, le=604_800, description=_A_WEEK)
    """Longest wait for a batch of pictures before the run stops."""
    mean: tuple[_Mean, _Mean, _Mean] = (0.485, 0.456, 0.406)
    std: tuple[_Std, _Std, _Std] = (0.229, 0.224, 0.225)
    limit: int | None = Field(None, ge=2, le=10**12)
    """Use only so many images, an even choice per class where there are classes; None means all."""


class Optim(Config):
    """The optimizer and its schedule."""

    name: Literal["lars", "adamw", "sgd"] = "lars"
    lr: Rate = 0.3
    """Peak learning rate; with lr_batch, for a batch of that size, scaled linearly."""
    lr_batch: int | None = Field(None, gt=0, le=10**9)
    weight_decay: Decay = 1e-4
    """Not applied to biases and norms."""
    momentum: Fraction = 0.9
    trust_coefficient: Factor = 0.02
    """LARS's eta."""
    trust_clip: bool = True
    """LARS: never take a step longer than plain SGD's."""
    warmup_epochs: float = Field(0.0, ge=0, le=1e9)
    final_lr_fraction: Fraction = 0.0
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    clip_norm: float | None = Field(None, gt=0, le=1e30)
    """Gradient norm above which gradients are scaled down."""


class Run(Config):
    """How long, how exact, and how often to look."""

    epochs: Count = 200
    seed: Seed = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    """Compile the passes with torch.compile."""
    threads: int | None = Field(None, ge=1, le=1024, description=_THREADS)
    """With which a CPU trains; None means as many as torch takes. Steps of a few milliseconds gain little from a second one,
    and wait for it all the time where another program has its core."""
    accumulate: Count = 1
    """Parts of each process's share of a batch that go through the net one after another, to save memory; the
    correlations stay those of the whole batch, the batch norms see a part."""
    sync_norms: Literal["none", "projector", "all"] = "none"
    """Which batch norms take their statistics over all processes."""
    log_every: Count = 10
    """Steps between two records in metrics.jsonl."""
    checkpoint_epochs: Count = 1
    """Epochs between two checkpoints."""
    checkpoint_steps: int | None = Field(None, ge=1, le=10**9)
    """Steps between two checkpoints within an epoch; None writes them between epochs only."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints are kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the best kNN accuracy or, without labels, RankMe of the slim net."""
    max_skipped: int = Field(10, ge=0, le=10**9)
    """Steps since the last checkpoint whose loss is not finite that are left out before the run goes back to it."""
    quality_epochs: Count = 10
    """Epochs between two looks at RankMe and, where there are labels, kNN."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), examples=[("tensorboard",)])
    """Also log through these; each must be installed."""


class Probe(Config):
    """How `edgecl run` evaluates the result."""

    labels_per_class: Count = 10
    draws: int = Field(5, ge=2, le=10_000)
    scratch_steps: Count = 200
    """Steps of the same net trained, from scratch and from the pretrained weights, on the same few labels."""
    scratch_lr: Rate = 3e-3
    pretrained_from_scratch: str | None = None
    """With [host] init: the same net pretrained without it, given as [host] init is, to be compared on the same labels."""


class Recipe(Config):
    """One training run; two recipes differ exactly where their files do."""

    host: Host
    slim: Slim = Slim()
    projector: Projector = Projector()
    method: MethodConfig
    data: Data = Data()
    views: Views = Views()
    optim: Optim = Optim()
    run: Run = Run()
    probe: Probe = Probe()

    @model_validator(mode="after")
    def _slim_fits_into_host(self) -> Recipe:
        width, widths = self.slim.width, self.slim.widths
        if width > self.host.width:
            raise ValueError(
                f"slim width {width_as_given(width)} is above the host's {width_as_given(self.host.width)}; "
                "the slim net is a part of the host: widen [host] width or narrow [slim] width"
            )
        if self.host.init is not None and self.host.width > width and not self.host.nested_start:
            raise ValueError(
                "'host.init' starts the slim net, and a wider host would begin as another net: set 'host.nested_start' "
                f"= true, or 'host.width' = {width_as_given(width)}"
            )
        if widths and max(widths) != width:
            raise ValueError(
                f"'slim.widths' must have 'slim.width' {width_as_given(width)} as its widest, not "
                f"{width_as_given(max(widths))}; set 'slim.width' to that, or leave it out of the recipe"
            )
        if len(set(widths)) < len(widths):
            raise ValueError(f"'slim.widths' names a width twice: {list(widths)}")
        for name in ("crop_scale", "crop_ratio", "blur_sigma", "local_scale"):
            low, high = getattr(self.views, name)
            if low > high:
                raise ValueError(
                    f"'views.{name}' runs from {low:g} down to {high:g}; write the smaller first"
                )
        if self.data.resize_size is not None and self.data.resize_size < self.data.image_size:
            raise ValueError(
                f"'data.resize_size' {self.data.resize_size} is below 'data.image_size' {self.data.image_size}"
            )
        self.method.check(self)
        return self

    @property
    def title(self) -> str:
        """What the method and its settings amount to, in the words of the field."""
        return self.method.title(self)

    @property
    def view_specs(self) -> tuple[ViewSpec, ...]:
        """The views of each picture that the method wants."""
        return self.method.view_specs(self)


_SHARED = {"losses", "method", "momentum", "pairs", "teacher"}
"""Files of edgecl/methods/ that are no method."""


def _method_files() -> dict[str, Path]:
    folders = importlib.import_module("edgecl.methods").__path__
    files = [file for folder in folders for file in Path(folder).glob("[!_]*.py") if file.stem not in _SHARED]
    return {file.stem.replace("_", "-"): file for file in sorted(files, key=lambda file: file.stem)}


def list_methods() -> list[str]:
    """List the names of the methods that there are: the files of edgecl/methods/."""
    return list(_method_files())


def describe_methods() -> list[dict[str, str]]:
    """List the methods: name and the first line of the file, of which nothing is run."""
    found = []
    for name, file in _method_files().items():
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found.append({"name": name, "summary": about.partition("\n")[0]})
    return found


def method_settings(name: str) -> dict[str, Any]:
    """Return a method's settings, "[method] key" -> default, and whether it needs a teacher or labels."""
    config = find_method(name).Config
    settings = flatten(config.model_validate({}).model_dump(mode="json"))
    return {
        "needs_teacher": "teacher" in config.model_fields,
        "needs_labels": config.needs_labels,
        "settings": {key: value for key, value in settings.items() if key != "name"},
    }


def find_method(name: Any, *, where: dict[str, object] | None = None) -> Any:
    """Import the file of a method, and torch with it: a module that has `Config` and `METHOD`.

    Raises:
        RecipeError: no such method; near names are suggested.
    """
    known = list_methods()
    if name not in known:
        raise RecipeError(
            f"'method.name' is {bounded(repr(name), 200)}, not one of {', '.join(known)}",
            where=where,
            hint=near_matches(bounded(str(name), 200), known),
        )
    return importlib.import_module(f"edgecl.methods.{name.replace('-', '_')}")


@cache
def _recipe_with(config: type[MethodConfig]) -> type[Recipe]:
    return create_model(
        "Recipe", __base__=Recipe, __module__=__name__, method=(config, config.model_validate({}))
    )


def width_as_given(width: float) -> str:
    """Write a width with all its digits: rounded, it may read like another one."""
    return str(width).removesuffix(".0")


def read_recipe(name: str, assignments: list[str] | None = None) -> Recipe:
    """Read a packaged recipe or a TOML file, with `--set` assignments applied.

    Raises:
        RecipeError: unknown name, key or value; every problem at once.
    """
    path, tables = read_tables(name, folder="recipes", error=RecipeError, noun="recipe")
    assignments = assignments or []
    chosen = override(tables, assignments, error=RecipeError)
    if _method_name(chosen) != _method_name(tables):
        tables = _with_method(tables, _method_name(chosen), source=str(path))
        chosen = override(tables, assignments, error=RecipeError)
    return recipe_from_tables(chosen, source=str(path), assignments=assignments)


def _method_name(tables: Mapping[str, Any]) -> Any:
    method = tables.get("method", {})
    return method.get("name", DEFAULT_METHOD) if isinstance(method, Mapping) else DEFAULT_METHOD


def _with_method(tables: Mapping[str, Any], name: Any, *, source: str) -> dict[str, Any]:
    """Return a recipe's tables for another method: with its own defaults, and one net where it trains one."""
    config = find_method(name, where={"file": source}).Config
    brought: dict[str, Any] = {table: dict(own) for table, own in config.brings.items()}
    brought["method"] = {"name": name}
    changed = {key: table for key, table in tables.items() if key != "method"}
    if not config.has_host:
        slim = changed.pop("slim", {})
        width = slim.get("width", 1.0) if isinstance(slim, Mapping) else 1.0
        brought["slim"] = {"width": width}
        brought["host"] = {"width": width, "nested_start": False}
    for table, own in brought.items():
        given = changed.get(table, {})
        changed[table] = {**given, **own} if isinstance(given, Mapping) else given
    return changed


def recipe_from_tables(tables: dict[str, Any], *, source: str, assignments: Sequence[str] = ()) -> Recipe:
    """Validate parsed tables, for example those of a run directory.

    Raises:
        RecipeError: unknown method, key or wrong value.
    """
    for old, new in (("loss", "method"), ("coding_rate", "method.coding_rate")):
        if old in tables:
            raise RecipeError(
                f"the table [{old}] is now [{new}]",
                where={"file": source, **({"--set": ", ".join(assignments)} if assignments else {})},
                hint="the run was begun by an earlier edgecl: go on with it, or carve it, with that one"
                if source.endswith(".json")
                else "[loss] name is [method] loss; [method] name is the method's, 'sacl-xd' unless said otherwise",
            )
    config = find_method(_method_name(tables), where={"file": source}).Config
    brought = {
        table: {**own, **given} if isinstance(given := tables.get(table, {}), Mapping) else given
        for table, own in config.brings.items()
    }
    return validate(
        _recipe_with(config), {**tables, **brought}, source=source, error=RecipeError, assignments=assignments
    )


def flatten(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Name every setting of a recipe's tables as `--set` does: "method.coding_rate.weight"."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": one for inner, one in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def recipe_name(name: str) -> str:
    """Return the short name of a packaged recipe or of a file."""
    return Path(name).stem if name.endswith(".toml") or "/" in name else name
