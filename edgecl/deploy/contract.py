"""What a program must know to feed a bundle's net and to read its answer, read from the manifest in this one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgecl.errors import printable
from edgecl.onboard.runtimes import RUNTIMES
from edgecl.storage.records import Manifest, Preprocessing


@dataclass(frozen=True)
class Contract:
    """From a picture to the net's input, and from its output to a name."""

    model: str
    """The ONNX file of the default precision."""
    input: str
    output: str
    batch: int
    max_batch: int | None
    """Where any batch up to it is taken; None where `batch` is the only one."""
    dims: list[int]
    """Of one input: channels, height, width, in the order of the layout."""
    dtype: Literal["float32", "uint8"]
    channels_last: bool
    normalize: bool
    """Whether whoever runs the net divides by 255, subtracts the mean and divides by std."""
    preprocessing: Preprocessing
    outputs: int
    """Classes, or features."""
    softmax: bool
    """Whether the outputs are probabilities."""
    label_sets: bool
    """Whether a picture may be of several classes, each output a class's own yes or no."""
    labels: list[str] | None
    """Names of the classes, one line each; None of a net without a classifier."""
    on_gpu: bool

    @property
    def image_size(self) -> int:
        """The side of the square picture, pixels."""
        return self.preprocessing.image_size

    @property
    def value_words(self) -> str:
        """What the input's numbers are."""
        if not self.normalize:
            return f"RGB from 0 to 255, {'channels last' if self.channels_last else 'channels first'}"
        return f"RGB / 255, minus mean {self.preprocessing.mean}, divided by std {self.preprocessing.std}"

    @property
    def one_class(self) -> bool:
        """Whether a picture is of one class, the largest output's."""
        return self.labels is not None and not self.label_sets

    @property
    def input_words(self) -> str:
        """The input's name, type, shape and numbers."""
        shape = " x ".join(map(str, [self._batch_words, *self.dims]))
        return f"'{self.input}': {self.dtype}, {shape}, {self.value_words}"

    @property
    def output_words(self) -> str:
        """The output's name, type and shape."""
        kind = ", probabilities" if self.softmax else ""
        if self.label_sets:
            kind = (
                ", several classes may be in a picture: the sigmoid of each output is the chance of its own"
            )
        return f"'{self.output}': float32, {self._batch_words} x {self.outputs}{kind}"

    @property
    def _batch_words(self) -> str:
        return str(self.batch) if self.max_batch is None else f"1 to {self.max_batch}"


def contract_of(manifest: Manifest) -> Contract:
    """Return the contract of a bundle, from its manifest."""
    form = manifest.input
    assert manifest.preprocessing is not None
    return Contract(
        model=manifest.precisions[manifest.precision].model,
        input=form.name,
        output=manifest.output.name,
        batch=form.shape[0],
        max_batch=form.max_batch if form.dynamic_batch else None,
        dims=form.shape[1:],
        dtype=form.dtype,
        channels_last=form.layout == "nhwc",
        normalize=form.normalization == "outside",
        preprocessing=manifest.preprocessing,
        outputs=manifest.output.shape[1],
        softmax=manifest.output.softmax,
        label_sets=manifest.net is not None and manifest.net.label_sets,
        labels=None if manifest.classes is None else [one_line(name) for name in manifest.classes],
        on_gpu=not RUNTIMES[manifest.runtime].on_host,
    )


def one_line(name: str) -> str:
    """Return a name of anybody's as one line that steers nothing: what would break it is an escape."""
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def render(template: str, **values: Any) -> str:
    """Return a file made from one of `templates/`, nothing escaped: others' names go in as `one_line` makes them."""
    env = Environment(
        loader=PackageLoader("edgecl.deploy"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return env.get_template(template).render(**values)
