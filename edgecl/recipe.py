"""A recipe: everything that decides one training run, read from one TOML file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from edgecl.errors import RecipeError
from edgecl.settings import (
    Count,
    Decay,
    Factor,
    Rate,
    Seed,
    Settings,
    Side,
    Weight,
    find_settings_file,
    header_comment,
    override,
    packaged_files,
    parse_toml,
    read_text,
    validate,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
PerView = tuple[Fraction, Fraction]
Range = tuple[Annotated[float, Field(ge=0.01, le=100)], Annotated[float, Field(ge=0.01, le=100)]]
Strength = Annotated[float, Field(ge=0, le=100)]
PerChannel = tuple[
    Annotated[float, Field(ge=-10, le=10)],
    Annotated[float, Field(ge=-10, le=10)],
    Annotated[float, Field(ge=-10, le=10)],
]
PerChannelSpread = tuple[
    Annotated[float, Field(ge=0.001, le=10)],
    Annotated[float, Field(ge=0.001, le=10)],
    Annotated[float, Field(ge=0.001, le=10)],
]
_LARGER_PICTURES = "larger pictures do not fit into memory by the batch"
_A_LAYER = "a layer between two of 32,768 has 4 GiB of weights"
_A_WEEK = "a picture that takes over a week will not come"
_THREADS = "a process cannot start that many threads"


class Host(Settings):
    """The wide net that is trained."""

    arch: str
    """A timm architecture, e.g. mobilenetv3_large_100."""
    width: float = Field(1.5, gt=0, le=4.0)
    """Channels as a multiple of the architecture's own."""
    stem_stride: Literal[1, 2] | None = None
    """Stride of the first convolution; None keeps the architecture's. 1 suits images of 32 pixels."""
    nested_start: bool = False
    """Begin as the slim net plus channels that do not touch it yet: both compute the same at step 0."""


class Slim(Settings):
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
            with contextlib.suppress(
                TypeError, ValueError
            ):  # no list, an empty one, no numbers: said by their own checks
                return {**values, "width": max(values.get("widths") or ())}
        return values

    @property
    def all_widths(self) -> tuple[float, ...]:
        """The slim widths that are trained, widest first."""
        return tuple(sorted({self.width, *self.widths}, reverse=True))


class Projector(Settings):
    """The MLP between features and loss, thrown away after training."""

    sizes: tuple[Annotated[int, Field(gt=0, le=32_768)], ...] = Field(
        (2048, 2048, 2048), min_length=1, max_length=16, description=_A_LAYER
    )
    """Width of each linear layer; the last is D."""


class Loss(Settings):
    """L = alpha L_SACL + (1 - alpha) (L_D(z_A, [z_A]) + L_D(z_B, [z_B])) / 2."""

    name: Literal["barlow-twins", "simclr", "cosine"] = "barlow-twins"
    """The loss inside L_SACL and L_D; cosine only aligns and needs [coding_rate] weight."""
    alpha: Fraction = 0.95
    off_diagonal: Weight = 0.0051
    """Barlow Twins: weight of the redundancy term."""
    temperature: float = Field(0.2, gt=0, le=100)
    """SimCLR: temperature of the softmax."""
    scale: Factor = 0.1
    """Multiplies the whole loss."""
    xd_direction: Literal["both", "slim_only"] = "both"
    """slim_only leaves out L_D(z_A, [z_A]), which pulls the host towards the frozen slim net."""
    swap_views: Fraction = 0.5
    """Probability, per step, that the host sees view B and the slim net view A."""
    symmetric: bool = False
    """Both views through both encoders, all four passes with gradient."""
    learn_targets: bool = False
    """Gradient flows into [z] too, through all four passes."""


class CodingRate(Settings):
    """L <- L - weight R: R, the coding rate, is large when the projections fill all their dimensions."""

    weight: Weight = 0.0
    epsilon: float = Field(0.5, ge=0.01, le=1e6)
    """Precision of the code: the smaller, the more small directions count; below 0.01 float32 has too few digits."""
    until: float | None = Field(None, gt=0, le=1, examples=[0.5])
    """Fraction of the run at which the weight has fallen to 0, in a line; None keeps it constant."""
    encoders: Literal["both", "host", "slim"] = "both"
    """Whose projections it is taken of."""


class Data(Settings):
    """Which images, and in what batches."""

    uri: str | None = None
    """A data URI; None asks for --data."""
    image_size: Side = 224
    """Height and width of a view and of a test image, pixels."""
    canvas_size: int | None = Field(None, ge=8, le=8192, description=_LARGER_PICTURES)
    """Each picture is decoded whole to a square of this side before cropping, pixels; None means image_size."""
    resize_size: int | None = Field(None, ge=8, le=8192, description=_LARGER_PICTURES)
    """Shorter side before the centre crop of a test image, pixels; None means image_size."""
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
    mean: PerChannel = (0.485, 0.456, 0.406)
    std: PerChannelSpread = (0.229, 0.224, 0.225)
    limit: int | None = Field(None, ge=2, le=10**12)
    """Use only so many images, an even choice per class where there are classes; None means all."""


class Views(Settings):
    """How one picture becomes two views; a pair gives view A and view B."""

    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Area of the crop as a fraction of the picture's."""
    crop_ratio: Range = (0.75, 4 / 3)
    """Width / height of the crop."""
    flip: Fraction = 0.5
    flip_vertical: Fraction = 0.0
    jitter: Fraction = 0.8
    """Probability of colour jitter."""
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: float = Field(0.1, ge=0, le=0.5)
    grey: Fraction = 0.2
    blur: PerView = (1.0, 0.1)
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur, pixels of a 224-pixel view; scaled with image_size."""
    solarize: PerView = (0.0, 0.2)
    local_count: int = Field(0, ge=0, le=32)
    """Further views of each picture: small crops, varied like view B, through the slim net alone."""
    local_size: int | None = Field(None, ge=8, le=4096, description=_LARGER_PICTURES)
    """Height and width of a local view, pixels; None means half of image_size."""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.3)
    """Area of a local crop as a fraction of the picture's."""


class Optim(Settings):
    """The optimiser and its schedule."""

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


class Run(Settings):
    """How long, how exact, and how often to look."""

    epochs: Count = 200
    seed: Seed = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    """Compile the passes with torch.compile."""
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


class Probe(Settings):
    """How `edgecl run` judges the result."""

    labels_per_class: Count = 10
    draws: int = Field(5, ge=2, le=10_000)
    scratch_steps: Count = 200
    """Steps of the same net trained, from scratch and from the pretrained weights, on the same few labels."""
    scratch_lr: Rate = 3e-3


class Recipe(Settings):
    """One training run; two recipes differ exactly where their files do."""

    host: Host
    slim: Slim = Slim()
    projector: Projector = Projector()
    loss: Loss = Loss()
    coding_rate: CodingRate = CodingRate()
    data: Data = Data()
    views: Views = Views()
    optim: Optim = Optim()
    run: Run = Run()
    probe: Probe = Probe()

    @model_validator(mode="after")
    def _slim_fits_into_host(self) -> Recipe:
        if self.slim.width > self.host.width:
            raise ValueError(
                f"slim width {width_as_given(self.slim.width)} is above the host's {width_as_given(self.host.width)}; "
                "the slim net is a part of the host: widen [host] width or narrow [slim] width"
            )
        if self.slim.widths and max(self.slim.widths) != self.slim.width:
            raise ValueError(
                f"'slim.widths' must have 'slim.width' {width_as_given(self.slim.width)} as its widest, not "
                f"{width_as_given(max(self.slim.widths))}; set 'slim.width' to that, or leave it out of the recipe"
            )
        if len(set(self.slim.widths)) < len(self.slim.widths):
            raise ValueError(f"'slim.widths' names a width twice: {list(self.slim.widths)}")
        if self.loss.name == "cosine" and self.coding_rate.weight == 0:
            raise ValueError(
                "'loss.name' cosine only pulls views together, and every picture to one point; set 'coding_rate.weight'"
            )
        if self.coding_rate.weight > 0 and self.data.batch_size < 3:
            raise ValueError(
                "'coding_rate.weight' needs a 'data.batch_size' of 3 or more: of two standardised projections one is "
                "always the other's opposite"
            )
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
        return self

    @property
    def arm(self) -> str:
        """Which method of the family the settings amount to; one net narrower than the host makes it slimmed."""
        return arm_name(self.host.width, self.slim.all_widths[-1], self.loss.alpha, loss=self.loss.name)

    @property
    def local_size(self) -> int:
        """Side of a local view, pixels."""
        return self.views.local_size or max(8, self.data.image_size // 2)


_LOSS_NAMES = {"barlow-twins": "Barlow Twins", "simclr": "SimCLR", "cosine": "cosine and coding rate"}


def arm_name(host_width: float, slim_width: float, alpha: float, *, loss: str = "barlow-twins") -> str:
    """Name the method that the host's width, the narrowest slim width, alpha and the loss amount to."""
    if host_width == slim_width and alpha == 1:
        return _LOSS_NAMES[loss]
    name = "XD only" if host_width == slim_width else "SACL only" if alpha == 1 else "SACL-XD"
    return name if loss == "barlow-twins" else f"{name} ({_LOSS_NAMES[loss]})"


def width_as_given(width: float) -> str:
    """Write a width with all its digits: rounded, it may read like another one."""
    return str(width).removesuffix(".0")


def read_recipe(name: str, assignments: list[str] | None = None) -> Recipe:
    """Read a packaged recipe or a TOML file, with `--set` assignments applied.

    Raises:
        RecipeError: unknown name, key or value; every problem at once.
    """
    path = find_settings_file(name, folder="recipes", error=RecipeError, noun="recipe")
    tables = parse_toml(read_text(path, error=RecipeError), source=str(path), error=RecipeError)
    assignments = assignments or []
    tables = override(tables, assignments, error=RecipeError)
    return validate(Recipe, tables, source=str(path), error=RecipeError, assignments=assignments)


def recipe_keys() -> set[str]:
    """Return every setting's name, as `--set` takes it."""
    return {
        f"{table}.{key}"
        for table, field in Recipe.model_fields.items()
        for key in cast(type[Settings], field.annotation).model_fields
    }


def recipe_from_tables(tables: dict[str, Any], *, source: str) -> Recipe:
    """Validate parsed tables, for example those of a run directory.

    Raises:
        RecipeError: unknown key or wrong value.
    """
    return validate(Recipe, tables, source=source, error=RecipeError)


def recipe_name(name: str) -> str:
    """Return the short name of a packaged recipe or of a file."""
    return Path(name).stem if name.endswith(".toml") or "/" in name else name


def list_recipes() -> list[dict[str, str]]:
    """List the packaged recipes: name and the first line of the header."""
    return [
        {"name": name, "summary": header_comment(path.read_text(encoding="utf-8")).partition("\n")[0]}
        for name, path in packaged_files("recipes").items()
    ]
