"""What a program must know to feed a bundle's net and to read its answer: the one place where the manifest is asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    image_size: int
    preprocessing: Preprocessing
    outputs: int
    """Classes, or features."""
    labels: list[str] | None
    """Names of the classes, one line each; None of a net without a classifier."""
    on_gpu: bool

    @property
    def batch_words(self) -> str:
        """How many pictures one call takes."""
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
        image_size=form.shape[2],
        preprocessing=manifest.preprocessing,
        outputs=manifest.output.shape[1],
        labels=None if manifest.classes is None else [one_line(name) for name in manifest.classes],
        on_gpu=not RUNTIMES[manifest.runtime].on_host,
    )


def one_line(name: str) -> str:
    """Return a name of anybody's as one line that steers nothing: what would break it is an escape."""
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def render(template: str, **values: Any) -> str:
    """Return a file made from one of `templates/`, nothing escaped: only numbers and our own names go in."""
    env = Environment(
        loader=PackageLoader("edgecl.deploy"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return env.get_template(template).render(**values)
