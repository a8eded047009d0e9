"""The records that verbs write and other verbs read: one pydantic model for each kind of JSON file.

Every record begins with `schema`, `kind`, `made_by`, `made_from` and `command`. Whoever writes a record can also seal it, so
types and ranges are checked when it is read: no value is converted, and no number is infinite or NaN. An entry that no
model names is kept as it is. `docs/schemas/NAME.json` is made from these models by `reports/schemas.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from edgecl import __version__
from edgecl.errors import ArtifactError, bounded, first_of
from edgecl.onboard import bundle as bundle_names
from edgecl.storage.redaction import without_secrets

SCHEMA = bundle_names.SCHEMA
MADE_BY = f"edgecl {__version__}"


def _checked_text(value: object) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return value


# pydantic's own takes no names of files that are not UTF-8.
Text = Annotated[str, PlainValidator(_checked_text), WithJsonSchema({"type": "string"})]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
"""The lower and the upper end of a 95 % interval."""
PerChannel = Annotated[list[float], Field(min_length=3, max_length=3)]
Json = dict[str, Any]
"""What is only passed on: a recipe or target as TOML has it, the settings of a runtime."""


def command_line() -> str:
    """Return the command this process was started with, as one would type it again."""
    import shlex

    return (
        shlex.join(["edgecl", *map(without_secrets, sys.argv[1:])])
        if Path(sys.argv[0]).stem in ("edgecl", "__main__")
        else "python"
    )


class Table(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        populate_by_name=True,
        defer_build=True,
    )

    def to_json(self) -> dict[str, Any]:
        """Return the content as it stands in the file."""
        return self.model_dump(by_alias=True)


class Record(Table):
    """The entries that every record begins with."""

    KIND: ClassVar[str]
    FILE: ClassVar[str]
    """The name of its file."""

    schema_number: int = Field(default=SCHEMA, validation_alias="schema", serialization_alias="schema", ge=1)
    """The version of the form of all records."""
    kind: Text
    """What the record is of."""
    made_by: Text = Field(default_factory=lambda: MADE_BY)
    """edgecl's version."""
    made_from: Text | None
    """The sha256 of what it was made from: a record, a checkpoint, or the list of a run's images."""
    command: Text = Field(default_factory=command_line)
    """The command that made it."""


class SealedRecord(Record):
    """A record that holds its own hash, so that an accidental change is noticed."""

    sha256: Text | None = None
    """Of the record's content, this entry apart."""


# --- runs ---


class ImagesRead(Table):
    """The images that a run was trained on."""

    uri: Text
    """Where they are, as `--data` takes it."""
    found: Count | None = None
    """How many there are."""
    images: Count | None = None
    """How many could be read."""
    fingerprint: Text
    """The hash of their names and sizes."""
    skipped: list[Text] = []
    """Those that could not be read."""


class Plateau(Table):
    """Why a run is stuck where it learns nothing."""

    since: Count
    """The step at which it was noticed."""
    words: Text
    hint: Text


class RunRecord(Record):
    """run.json: a pretraining run, its settings and how far it is."""

    KIND = "run"
    FILE = "run.json"

    kind: Literal["run"] = "run"
    recipe_name: Text | None
    recipe: Json
    """All settings, with their defaults."""
    method: Text | None = None
    """Variant of the method."""
    panels: list[Json] = []
    """What a report draws of this method: title, unit, log, and the name of each line's key in metrics.jsonl."""
    data: ImagesRead
    seed: Count | None = None
    device: Text | None = None
    processes: Count | None = None
    threads: Count | None = None
    """Threads of each process."""
    steps_per_epoch: Count | None = None
    total_steps: Count | None = None
    """Steps planned."""
    params: dict[str, Count] = {}
    """Parameters of the host and of each slim net, as carved."""
    versions: dict[str, Text] = {}
    """Library -> version."""
    host_skips: dict[str, Count] = {}
    """Block of the host -> to how many channels a nested start adds its input."""
    rests_on: dict[str, Text] = {}
    """What the run rests on besides pictures, "teacher" or "init" -> its sha256."""
    left_out: list[Text] = []
    """Tensors of the weights it starts from that it does not take: their classifier's."""
    launch: Text | None = None
    """Which start of torchrun it was; a restart by the same one resumes."""
    plateau: Plateau | None = None
    """Set while training is stuck on a plateau of one dimension."""
    state: Literal["running", "stopped", "done", "failed"] = "done"
    step: Count = 0
    """Steps taken."""
    wall_s: float = Field(0.0, ge=0)
    """Seconds it ran, all starts together."""
    error: Text | None = None
    """Why a run failed, in one line."""
    resumed_with: Text | None = None
    """The last command that resumed it."""
    changes: list[Text] = []
    """What was different when it was resumed."""


class Quality(Table):
    """How good a run's features were, by one number."""

    name: Text
    """Key of the number in metrics.jsonl, such as "knn_top1_slim"."""
    value: float
    """Higher is better."""


class CheckpointRecord(SealedRecord):
    """checkpoints/step-…/state.json: what a run goes on from, the tensors apart."""

    KIND = "checkpoint"
    FILE = "state.json"

    kind: Literal["checkpoint"] = "checkpoint"
    step: Count
    """Steps taken."""
    epoch: Count
    """Whole epochs passed."""
    quality: Quality | None
    """From the last look at the features."""
    state: Json
    """State of the learning rate, the alarms and the way back."""
    optimizer: Json
    """What of the optimizer's state is no tensor."""
    files: dict[str, Text]
    """File of tensors -> its sha256."""
    size_bytes: dict[str, Count]
    """File of tensors -> its size."""


class MetricsLine(Table):
    """A line of metrics.jsonl: a step with its loss, a look at the features, or an event."""

    step: float
    """Steps taken."""
    epoch: float
    """Epochs passed, a fraction within one."""
    loss: float | None = None
    """Loss of a step, null where it was not finite; the terms of the method's loss stand beside it."""
    std: float | None = None
    """Spread of the projections: 1 when even, 0 when collapsed."""
    diagonal: float | None = None
    """Mean correlation of a dimension with itself in the other view."""
    off_diagonal_rms: float | None = None
    """Root mean square of the correlation of two dimensions."""
    grad_norm_host: float | None = None
    grad_norm_slim: float | None = None
    lr: float | None = None
    """Learning rate."""
    images_per_s: float | None = None
    """Training images per second, all processes together."""
    rankme_host: float | None = None
    """How many dimensions the features use, 1 to their number; also with _slim and _slim_at_WIDTH."""
    rankme_slim: float | None = None
    knn_top1_host: float | None = None
    """Nearest-neighbor accuracy on training images, percent; also with _slim and _slim_at_WIDTH."""
    knn_top1_slim: float | None = None
    event: Text | None = None
    """What happened on the way: "warning", "left out", "went back"."""


# --- nets ---


class Preprocessing(Table):
    """What a test image goes through."""

    image_size: int = Field(ge=1, le=4096)
    """Side of the square that the net sees, pixels."""
    resize_size: int = Field(ge=1, le=8192)
    """The shorter side before the square is cut out, pixels."""
    mean: PerChannel
    """Subtracted from each channel, which is 0 to 1 before."""
    std: PerChannel
    """By which each channel is then divided."""
    interpolation: Text = "bilinear"


class Quantization(Table):
    """How a net was trained for INT8."""

    precision: Text = "int8"
    keep: list[Text]
    """Modules that stayed float."""
    learnt: bool | None = None
    """Whether the scales were learnt."""


class ModelRecord(SealedRecord):
    """model.json: all that rebuilds a net from its weights."""

    KIND = "model"
    FILE = "model.json"

    kind: Literal["model"] = "model"
    arch: Text
    """timm's name."""
    width: float = Field(gt=0, le=4)
    """Multiple of the architecture's own channels."""
    stem_stride: Literal[1, 2] | None
    """Stride of the first convolution; null is the architecture's own."""
    classes: list[Text] | None
    """Names by label; null of a net without classifier."""
    label_sets: bool = False
    """Whether a picture may be of several classes: each output then is a class's own yes or no, its chance the sigmoid."""
    features: int
    """Length of a feature vector."""
    params: int
    """Parameters, the classifier's among them."""
    preprocessing: Preprocessing
    origin: Text
    """"pretrained", "finetuned", "random", or "given" of weights that somebody else trained."""
    recalibrated: bool = False
    """Whether the batch norms were re-estimated after carving."""
    recipe_name: Text | None
    method: Text | None
    """The variant of the method."""
    epoch: int | None = None
    """Epochs of the checkpoint it was carved from."""
    step: int | None = None
    """Steps of the checkpoint it was carved from."""
    quantization: Quantization | None = None
    data: Text | None
    """The images it was made from, as `--data` takes them."""
    weights_sha256: Text


class FewLabelAccuracy(Table):
    """Accuracy with a few labels, over several draws of them."""

    mean: float
    """Percent."""
    std: float | None = None
    """Over the draws, percentage points; 0 of one draw."""
    ci95: Interval | None = None
    """95 % interval of the mean, percent; null of one draw."""
    draws: list[float] = []
    """Accuracy of each draw, percent."""
    labels_per_class: Count | None = None


class ProbeRecord(Record):
    """probe.json: how good a frozen net's features are."""

    KIND = "probe"
    FILE = "probe.json"

    kind: Literal["probe"] = "probe"
    knn_top1: float
    """Nearest-neighbor accuracy, percent."""
    knn_ci95: Interval
    linear_top1: float
    """Accuracy of a linear classifier on the features, percent."""
    linear_ci95: Interval
    few_label_top1: FewLabelAccuracy
    """Of a linear classifier on a few labels of each class."""
    n_test: Count
    """Held-out images."""
    n_train: Count
    classes: Count
    data: Text
    """The images to learn from."""
    test: Text
    """The held-out images."""


class ComparedRow(Table):
    """One way to a classifier."""

    name: Text
    few_label_top1: FewLabelAccuracy
    knn_top1: float | None
    """Percent; null where no features were evaluated."""
    linear_top1: float | None
    """Percent; null where no features were evaluated."""


class Difference(Table):
    """Two ways to a classifier compared, draw by draw."""

    a: Text
    b: Text
    mean: float
    """Few-label accuracy of a minus that of b, percentage points."""
    ci95: Interval | None
    resolved: bool
    """Whether the interval leaves out zero."""


class Scratch(Table):
    """How the nets were trained on the few labels."""

    steps: Count
    lr: float
    seed: Count


class ComparisonRecord(Record):
    """comparison.json: a pretrained net beside its baselines, on the same draws of labels."""

    KIND = "comparison"
    FILE = "comparison.json"

    kind: Literal["comparison"] = "comparison"
    labels_per_class: Count
    draws: Count
    n_test: Count
    """Held-out images."""
    data: Text
    """The images to learn from."""
    test: Text
    """The held-out images."""
    scratch: Scratch
    rows: list[ComparedRow]
    differences: list[Difference]
    verdict: Text | None = None
    """Whether pretraining given weights further paid: the first difference, in words. Null where a run began at random."""


class EvaluationRecord(Record):
    """evaluation.json: the accuracy of a fine-tuned net."""

    KIND = "evaluation"
    FILE = "evaluation.json"

    kind: Literal["evaluation"] = "evaluation"
    metric: Literal["top1", "f1"] = "top1"
    """What `top1` and the like are: of images with sets of classes the mean F1 of an image's set."""
    top1: float
    """Percent."""
    top1_ci95: Interval
    mean_average_precision: float | None = None
    """Of images with sets of classes: over the classes, percent."""
    float_top1: float | None = None
    """Before quantization, percent."""
    float_top1_ci95: Interval | None = None
    calibrated_top1: float | None = None
    """Quantized, before it was trained so, percent."""
    calibrated_top1_ci95: Interval | None = None
    n_test: Count
    """Held-out images."""
    n_train: Count
    data: Text
    """The images to learn from."""
    test: Text
    """The held-out images, in words."""
    test_uri: Text | None = None
    """The held-out images as `--test` named them."""
    epochs: Count
    settings: Json
    """Of fine-tuning."""


class Confusion(Table):
    """How many held-out images of one class were taken for another, or rightly for their own."""

    label: Count
    """The class, by its place in `classes`."""
    predicted: Count
    images: Count


class Mistake(Table):
    """A held-out image that was taken for another class."""

    picture: Text
    """A small JPEG, in base64."""
    label: Count
    predicted: Count
    confidence: float = Field(ge=0, le=1)
    """The softmax of the class that was predicted."""


class FeatureMap(Table):
    """Held-out images as points of a plane, by their features."""

    made_by: Literal["PCA", "UMAP"]
    explained: Interval | None
    """Of each of the two axes: its share of the features' variance; null where axes have no such meaning."""
    x: list[float] = Field(max_length=10_000)
    y: list[float]
    label: list[Count]


class InspectionRecord(Record):
    """inspection.json: which held-out images a net confuses, and how its features lie."""

    KIND = "inspection"
    FILE = "inspection.json"

    kind: Literal["inspection"] = "inspection"
    predicted_by: Literal["linear probe", "classifier"]
    classes: list[Text]
    confusion: list[Confusion]
    """Pairs of classes that occur."""
    mistakes: list[Mistake] = Field(max_length=100)
    """The most confident ones, the most confident first."""
    map: FeatureMap
    n_test: Count
    """Held-out images."""
    test: Text
    """The held-out images, in words."""

    @model_validator(mode="after")
    def _is_of_its_classes(self) -> InspectionRecord:
        pairs: list[Confusion | Mistake] = [*self.confusion, *self.mistakes]
        labels = [label for pair in pairs for label in (pair.label, pair.predicted)]
        if max([*labels, *self.map.label], default=-1) >= len(self.classes):
            raise ValueError("a label is none of the classes")
        if not len(self.map.x) == len(self.map.y) == len(self.map.label):
            raise ValueError("the points of the map have different numbers of coordinates and labels")
        return self


class FinetunedModel(ModelRecord):
    """model.json of a net that was fine-tuned now, with its accuracy."""

    evaluation: EvaluationRecord


class NetCost(Table):
    """The cost of one image, forward."""

    macs: Count
    """Multiply-adds as fvcore counts them."""
    flops: Count
    """2 x macs."""
    params: Count
    input: list[Count]
    """Shape, a batch of one."""
    by_operator: dict[str, Count] = {}
    """Operator -> its part of macs."""
    elementwise: Count = 0
    """Operations of activations, additions, gates and means, which macs leaves out."""
    uncounted: dict[str, Count] = {}
    """Operator -> calls that nothing counts."""


class CostRecord(NetCost, Record):
    """cost.json: what a net costs."""

    KIND = "cost"
    FILE = "cost.json"

    kind: Literal["cost"] = "cost"


class WidthCost(Table):
    """A slim net within a recipe."""

    width: float
    macs: Count
    params: Count
    forward_flops: Count
    """One image, activations counted."""
    forward_passes: float
    """Per training image; a backward pass is two."""


class RecipeTraining(Table):
    """What training by a recipe costs, projector and losses apart where not said otherwise."""

    method: Text
    forward_units: float
    """Forward passes of the widest slim net per image."""
    flops_per_image: Count
    total_flops: float
    further_widths_flops_per_image: Count
    further_widths_total_flops: float
    """The part of the slim nets below the widest."""
    local_views_flops_per_image: Count
    """The part of the local views."""
    coding_rate_flops_per_image: Count
    coding_rate_total_flops: float
    """Not in total_flops."""
    teacher_forward_flops: Count
    """One image through the method's frozen teacher; 0 where it has none."""
    teacher_total_flops: float
    """The part of its passes."""
    teacher_training_flops: float
    """What its own training has cost, as [method.teacher] says; not in total_flops."""
    images: Count
    """Per epoch."""
    epochs: Count
    host_forward_flops: Count
    slim_forward_flops: Count
    projector_flops_per_image: Count
    projector_total_flops: float
    """Not in total_flops."""


class RecipeCost(NetCost):
    """What `cost RECIPE --json` prints: the widest slim net, every width, and the training."""

    widths: list[WidthCost]
    """Widest first."""
    training: RecipeTraining


class PublishedCost(Table):
    """A row of what `cost --table --json` prints: a training cost as published, and by one rule."""

    method: Text
    arch: Text
    teacher: Text | None
    epochs: Count
    total_flops: float
    """By the rule."""
    printed_flops: float
    difference: float
    """total_flops / printed_flops - 1."""
    note: Text


class ProbedNet(Table):
    """A row of what `probe MODEL MODEL ... --json` prints."""

    model: Text
    """Directory."""
    width: float
    params: Count
    macs: Count
    made_from: Text | None
    probe: ProbeRecord


# --- a recipe for a folder, pictures to label ---


class Survey(Table):
    """What a folder of pictures holds, from those that were read."""

    uri: Text
    images: Count
    read: Count
    """How many were read and could be; of many, runs of neighbors by name, evenly spread."""
    unreadable: list[Text]
    """Of those that were read."""
    shorter_side: list[int] = Field(min_length=3, max_length=3)
    """5th percentile, median and 95th, pixels."""
    aspect: list[float] = Field(min_length=3, max_length=3)
    """Longer side / shorter side: 5th percentile, median and 95th."""
    grayscale: float
    """The fraction without color."""
    duplicates: list[list[Text]]
    """Groups of pictures that look the same."""
    smallest_class: Count | None = None
    """Pictures of the class that has fewest, where sub-folders are classes."""
    labelled: Count | None = None
    """Pictures in the labelled folder, where one was named."""
    labelled_read: Count | None = None
    """Of these, how many were compared by their looks, with those that were read."""
    searched: Count | None = None
    """Pictures with which all labelled ones were compared byte for byte; 0 where one of the two is no folder."""
    leaks: list[list[Text]] = []
    """Pictures that also lie in the labelled folder: each with the one there."""


class Machine(Table):
    """Where a recipe would be trained."""

    device: Literal["cpu", "cuda"]
    name: Text
    """Of the processor or GPU."""
    cores: Count
    """That this process may use."""
    memory_mib: Count
    """Free for decoded pictures; with a GPU, of its memory or the machine's what is less."""
    bf16: bool
    """Whether it is a GPU that computes in bfloat16."""


class Timing(Table):
    """A few steps of training, taken and timed."""

    steps: Count
    images_per_s: float
    peak_mib: float
    """Most memory in use: of the GPU, or of this process."""


class Proposal(Table):
    """What `init --json` prints: the recipe it wrote, what it rests on and what it costs."""

    recipe: Text
    """The file."""
    advice: Literal["pretrain", "fine-tune"]
    why: Text
    base: Text
    """The packaged recipe it began with."""
    reasons: dict[str, Text]
    """Of each setting that is not the packaged recipe's: why."""
    hours: float
    """That the training will take on this machine, by the timed steps."""
    total_flops: float
    """As `edgecl cost` prices it, projector apart."""
    survey: Survey
    machine: Machine
    timing: Timing


class PickedImage(Table):
    """A row of what `pick --json` prints and a line of its .jsonl: a picture to label, or one only named."""

    path: Text
    order: Count | None
    """From 1 on; null for one that is only named: unlike all others, or not readable."""
    reason: Text
    near_duplicates: list[Text]
    """Pictures that look the same; none of them is picked too."""
    readable: bool = True


# --- bundles ---


class Comparison(Table):
    """How far outputs are from others."""

    max_abs_difference: float | None = None
    """In units of the output."""
    mean_abs_difference: float | None = None
    max_relative_difference: float | None = None
    """The largest difference over the largest output."""
    top1_agreement: float | None = None
    """Fraction of images with the same largest output, 0 to 1."""
    mean_cosine: float | None = None
    """Mean cosine similarity."""


class ParityCheck(Comparison):
    """The same images through two variants of a net."""

    source: Text = Field(validation_alias="from", serialization_alias="from")
    """What the variant was made from."""
    variant: Text = Field(validation_alias="to", serialization_alias="to")
    images: Count | None = None
    first_diverging_layer: Text | None = None
    """The first layer outside the tolerance."""


class Accuracy(Table):
    """The accuracy of an exported file."""

    metric: Text
    """"top1", "knn_top1" or "mean_cosine"."""
    value: float
    """Percent; of mean_cosine -1 to 1."""
    ci95: Interval | None = None
    n: Count | None = None
    """Images."""
    data: Text | None = None
    """The images, in words."""
    mean_cosine: float | None = None
    """With the fp32 outputs."""


class Speed(Table):
    """How fast INT8 is on this machine."""

    against: Text
    """The other precision."""
    ratio: float
    """Median latency of the other precision over that of INT8."""
    ci95: Interval | None = None
    device: Text | None = None
    runtime: Text | None = None
    threads: Count | None = None


class Budget(Table):
    """What INT8 may cost."""

    max_loss_points: float
    """Percentage points of accuracy."""
    min_cosine: float | None = None
    """Of a net without classifier."""


class Attempt(Table):
    """One INT8 net of the search."""

    kept_nodes: Count
    """How many stayed in higher precision."""
    loss_points: float | None
    mean_cosine: float


class Decision(Table):
    """Whether INT8 is kept."""

    kept: bool | None = None
    kept_nodes: list[Text] = []
    """Those that stay in higher precision."""
    words: Text | None = None
    candidates: Count | None = None
    """Nodes that could be quantized."""
    metric: Text | None = None
    loss_points: float | None = None
    """Accuracy lost against fp32, percentage points."""
    loss_ci95: Interval | None = None
    mean_cosine: float | None = None
    budget: Budget | None = None
    images: Count | None = None
    """Images that the decision is made on."""
    searched_on: Count | None = None
    """Other images, on which the kept nodes were chosen."""
    tried: list[Attempt] = []
    data: Text | None = None
    form: Text | None = None
    method: Text | None = None
    """Of calibration, or "trained"."""
    methods: dict[str, dict[str, float]] = {}
    """Method of calibration -> how good it was on other images."""
    calibration_images: Count | None = None
    holdout_images: Count | None = None
    trained_for_int8: bool = False
    outside_tolerance: list[Text] | None = None
    """In which ways its outputs leave the tolerance; then the file is left out."""
    speed: Speed | None = None


class Tolerance(Table):
    """How far outputs may be from torch's."""

    max_relative_difference: float
    top1_agreement: float
    """Fraction of images, 0 to 1."""
    mean_cosine: float = 0.0


class BundlePrecision(Table):
    """One precision of a bundle."""

    model: Text
    """The file."""
    form: Text
    """Of the graph: "fp32", "fp16", "int8-cpu", "int8-trt" or "int8-trt-fp16"."""
    opset: Count | None = None
    tolerance: Tolerance
    parity: ParityCheck | None = None
    accuracy: Accuracy | None = None
    decision: Decision | None = None
    """Of INT8."""
    engines: dict[str, Json] | None = None
    """File of an engine -> how it was compiled."""
    trtexec: Json | None = None
    """Command lines of trtexec."""


class LeftOut(Table):
    """A precision that was made and is not in the bundle."""

    decision: Decision | None = None
    parity: ParityCheck | None = None


class InputForm(Table):
    """The input of the exported net."""

    name: Text
    shape: list[Count] = Field(min_length=4, max_length=4)
    """In the order of the layout."""
    dtype: Literal["float32", "uint8"] = "float32"
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Batch, channels, height, width; or the channels last, as decoders leave pictures in memory."""
    normalization: Literal["outside", "inside"] = "outside"
    """Whether whoever runs the net subtracts the mean and divides by std, or the graph does, of bytes 0 to 255."""
    dynamic_batch: bool
    max_batch: Count = Field(ge=1)


class OutputForm(Table):
    """The output of the exported net."""

    name: Text
    shape: list[Count] = Field(min_length=2, max_length=2)
    """Batch, features or classes."""
    softmax: bool = False
    """Whether the graph ends in softmax: probabilities, not logits."""


class ExportedNet(Table):
    """The net of a bundle."""

    arch: Text | None = None
    width: float | None = None
    stem_stride: int | None = None
    features: Count | None = None
    classes: list[Text] | None = None
    label_sets: bool = False
    """As of the model."""
    origin: Text | None = None
    params: Count | None = None
    model_sha256: Text | None = None
    """Of model.json."""


class Manifest(SealedRecord):
    """manifest.json: a bundle, its files and what is known of each precision."""

    KIND = bundle_names.KIND
    FILE = bundle_names.MANIFEST

    kind: Literal["bundle"] = "bundle"
    target_name: Text
    target: Json | None = None
    """As its TOML file has it."""
    runtime: Text
    precision: Text
    """The default."""
    precisions: dict[str, BundlePrecision]
    """The preferred one first."""
    left_out: dict[str, LeftOut] = {}
    input: InputForm
    output: OutputForm
    net: ExportedNet | None = None
    preprocessing: Preprocessing | None = None
    classes: list[Text] | None = None
    parity: list[ParityCheck] = []
    """The parity report, from torch to the smallest precision."""
    images_from: Text | None = None
    """The images compared and calibrated on."""
    versions: dict[str, Text] = {}
    """Library -> version."""
    files: dict[str, Text]
    """File -> its sha256."""
    size_bytes: dict[str, Count] = {}
    """File -> its size."""


class VerifiedPrecision(Comparison):
    """How far a precision is from torch on the reference images."""

    ok: bool | None = None
    tolerance: Tolerance | None = None


class VerifyRecord(Record):
    """verify.json: a bundle's hashes and reference outputs, checked on a device."""

    KIND = "verify"
    FILE = bundle_names.VERIFY

    kind: Literal["verify"] = "verify"
    ok: bool
    files_ok: bool
    runtime: Text | None = None
    """With its version."""
    images: Count | None = None
    precisions: dict[str, VerifiedPrecision] = {}
    problem: Text | None = None
    """Of a check that failed, in words."""


class PublishedRecord(Record):
    """edgecl.json: a folder for timm, for ONNX Runtime and for a hub."""

    KIND = "published"
    FILE = "edgecl.json"

    kind: Literal["published"] = "published"
    timm: Text | None
    """The name under which timm builds the net; null where it cannot."""
    why_not_timm: Text | None
    """Why timm cannot build it."""
    files: dict[str, Text]
    """File -> its sha256."""
    url: Text | None = None
    """Where it was pushed; null in the file, which is written before."""


class PowerMode(Table):
    """A Jetson's power mode."""

    id: int | None = None
    name: Text | None = None


class DeviceInfo(Table):
    """A device and its state; what it does not tell is null."""

    name: Text
    board: Text | None = None
    module: Text | None = None
    kind: Text | None = None
    """"orin", "xavier" and so on, of a Jetson."""
    gpu: list[Text] | Text | None = None
    cpu_model: Text | None = None
    machine: Text | None = None
    """Instruction set."""
    cores: Count | None = None
    """That the process may run on."""
    cores_present: Count | None = None
    core_quota: float | None = None
    """Of a container."""
    threads: Count | None = None
    governor: Text | None = None
    load_1m: float | None = None
    """Before the run."""
    memory_mib: float | None = None
    memory_available_mib: float | None = None
    os: Text | None = None
    kernel: Text | None = None
    l4t: Text | None = None
    jetpack: Text | None = None
    tensorrt: Text | None = None
    cuda: Text | None = None
    driver: Text | None = None
    power_mode: PowerMode | None = None
    clocks: Json = {}
    """MHz, before and after."""
    temperatures_c: Json = {}
    """Degrees Celsius by thermal zone, before and after."""
    fan: Json | None = None
    python: Text | None = None
    versions: dict[str, Text] = {}
    """Library -> version."""


class Latency(Table):
    """Milliseconds per inference of one batch."""

    p50: float | None = None
    ci95_p50: Interval | None = None
    p90: float | None = None
    ci95_p90: Interval | None = None
    p99: float | None = None
    """Null under 1,000 samples."""
    ci95_p99: Interval | None = None
    mean: float | None = None
    std: float | None = None
    min: float | None = None


class Energy(Table):
    """Energy of the whole module while a net ran."""

    rails: list[Text] = []
    """Those that were summed."""
    idle_w: float | None = None
    """Watts before the run."""
    load_w: float | None = None
    """Watts during the run."""
    j_per_inference: float
    """Joules."""
    j_per_inference_above_idle: float | None = None
    """Joules, without what the idle module uses."""
    samples: Count | None = None
    rate_hz: float | None = None
    source: Text | None = None


class BenchMeasurement(Table):
    """One precision in one mode."""

    precision: Text
    form: Text | None = None
    mode: Text | None = None
    headline: bool = False
    """Whether it is the first mode of its precision, which reports show."""
    latency_ms: Latency
    cov: float | None = None
    """Standard deviation over mean."""
    throughput_per_s: float | None = None
    """Images per second."""
    samples: Count | None = None
    warmup_samples: Count | None = None
    warmup_s: float | None = None
    steady: bool | None = None
    """Whether the warm-up settled."""
    duration_s: float | None = None
    """Seconds that were sampled."""
    drift: float | None = None
    """Median of the last quarter over that of the first."""
    enqueue_p50_ms: float | None = None
    """Median time that trtexec needs to enqueue an inference."""
    command: Text | None = None
    """Command line of trtexec."""
    marks: list[Text] = []
    """What casts doubt: "unsteady", "noisy", "drift", or what trtexec says."""
    settings: Json = {}
    """Of the runtime."""
    engine: Json | None = None
    """Of TensorRT: layers in each precision, how it was built."""
    energy: Energy | None = None


class Ratio(Table):
    """Two precisions that were timed in turns."""

    a: Text
    b: Text
    mode: Text | None = None
    p50_ratio: float
    """Median latency of a over that of b: how many times as fast b is."""
    ci95: Interval | None = None
    rounds: Count | None = None


class PowerSource(Table):
    """Where power was read."""

    source: Text | None = None
    rails: list[Text] = []
    reason: Text | None = None
    """Why energy is null."""


class BenchRecord(Record):
    """bench-DEVICE-RUNTIME-….json: how fast a bundle's nets run on a device."""

    KIND = "bench"
    FILE = "bench-DEVICE-RUNTIME-PRECISIONS-THREADSt-bBATCH.json"

    kind: Literal["bench"] = "bench"
    runtime: Text
    """With its version."""
    batch: Count
    """Images per inference."""
    threads: Count
    device: DeviceInfo
    started_at: Text | None = None
    """UTC, ISO 8601."""
    environment: dict[str, Text] = {}
    """Variables that libraries read for their number of threads."""
    duration_asked_s: float | None = None
    measurements: list[BenchMeasurement]
    ratios: list[Ratio] = []
    throttle: Json = {}
    """Evidence of throttling: counters, alarms, cooling devices, clocks, temperatures."""
    power: PowerSource | None = None
    marks: list[Text] = []
    """What casts doubt on the whole session."""
    onboard_command: Text | None = None
    """What ran on the device."""


class Guess(Table):
    """A class that a picture may show."""

    label: Count
    """Its position among the net's classes."""
    name: Text
    score: float = Field(ge=0, le=1)
    """Probability, 0 to 1; where a picture may be of several classes, each class has its own."""


class Prediction(Table):
    """What a net sees on a picture; a line of `predict --out FILE.jsonl`."""

    file: Text
    top: list[Guess] = []
    """The likeliest first."""
    problem: Text | None = None
    """Why the picture cannot be read."""


class Predictions(Table):
    """What `predict --json` prints."""

    made_from: Text
    """The sha256 of model.json or manifest.json."""
    runtime: Text
    """What ran the net, with its version."""
    precision: Text
    decoders: list[Text]
    """What decoded the pictures, with versions."""
    images: Count
    """Pictures, unreadable ones among them."""
    unreadable: Count
    predictions: list[Prediction]
    """In the order of the files."""


class DoctorCheck(Table):
    """One check of a device."""

    name: Text
    status: Literal["ok", "warn", "fail"]
    found: Text
    fix: Text | None = None
    """A command, or what to do."""


class DoctorReport(Table):
    """What `doctor --json` prints."""

    ok: bool
    """False if a check failed."""
    device: DeviceInfo
    checks: list[DoctorCheck]


class VariantDifferences(Table):
    """The largest relative differences of one way to train; null where they are not finite."""

    variant: Text
    loss: float | None
    gradients: float | None
    statistics: float | None
    """Of what moves without a gradient: batch norms' running statistics, queues, copies that follow."""
    exact: bool
    """None is above the tolerance."""


class SelftestReport(Table):
    """What `selftest ddp --json` prints."""

    exact: bool
    """Every variant is."""
    processes: Count
    hosts: list[Text]
    device: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    batch_size: Count
    tolerance: float
    torch: Text
    """Its version."""
    variants: list[VariantDifferences]


# --- pipelines ---


class Stage(Table):
    """A stage of a pipeline that is done."""

    wall_s: float | None = None
    made: list[Text] = []
    """Files, relative to the pipeline's directory."""
    target: Json | None = None
    """Of an export, as it was."""


class PipelineRecord(Record):
    """pipeline.json: the settings of `edgecl run`, and which stages are done."""

    KIND = "pipeline"
    FILE = "pipeline.json"

    kind: Literal["pipeline"] = "pipeline"
    recipe_name: Text | None = None
    recipe: Json
    data: Text | None = None
    test: Text | None = None
    targets: list[Text] = []
    precisions: list[Text] | None = None
    """In place of each target's."""
    stages: dict[str, Stage]


RecordT = TypeVar("RecordT", bound=Record)

KINDS: tuple[type[Record], ...] = (
    RunRecord,
    CheckpointRecord,
    ModelRecord,
    Manifest,
    PipelineRecord,
    ProbeRecord,
    ComparisonRecord,
    EvaluationRecord,
    InspectionRecord,
    CostRecord,
    VerifyRecord,
    BenchRecord,
    PublishedRecord,
)


def parse_record(content: object, kind: type[RecordT], *, path: Path) -> RecordT:
    """Check the content of a JSON file and return it as a record.

    Raises:
        ArtifactError: of another kind, of a newer schema than this edgecl knows, or an entry is missing or of another
            type or range.
    """
    if not isinstance(content, dict) or content.get("kind") != kind.KIND:
        raise ArtifactError(f"'{path.name}' is not the record of a {kind.KIND}", where={"file": path})
    _check_schema(content, path)
    try:
        record = kind.model_validate(content)
    except ValidationError as exc:
        problems = [
            f"'{bounded('.'.join(map(str, problem['loc'])), 100)}': {problem['msg'].lower()}"
            for problem in exc.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise ArtifactError(
            f"'{path.name}' is not what edgecl writes: {first_of(problems)}",
            where={"file": path},
            hint="restore it from a copy, or make its directory anew",
        ) from None
    # Their defaults are this process's, not a reader's.
    unsaid = {"made_by", "command"} - content.keys()
    if unsaid:
        raise ArtifactError(
            f"'{path.name}' is not what edgecl writes: it lacks '{min(unsaid)}'", where={"file": path}
        )
    return record


def _check_schema(content: dict[str, Any], path: Path) -> None:
    schema = content.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise ArtifactError(
            f"'{path.name}' has schema {bounded(repr(schema), 100)}, this edgecl reads {SCHEMA}",
            where={"file": path, "made by": content.get("made_by")},
            hint="upgrade edgecl" if newer else "make its directory anew with this edgecl",
        )
