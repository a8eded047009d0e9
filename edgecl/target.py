"""A target: the runtime and the limits a net is exported for, read from one TOML file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgecl.errors import TargetError
from edgecl.settings import (
    Settings,
    find_settings_file,
    header_comment,
    packaged_files,
    parse_toml,
    read_text,
    validate,
)


class Graph(Settings):
    """The form of the ONNX graph."""

    opset: int = Field(18, ge=18, le=24)
    batch: int = Field(1, ge=1)
    """Images per inference when the batch is static, and the size that is measured."""
    dynamic_batch: bool = False
    """Accept any batch from 1 to max_batch."""
    max_batch: int = Field(64, ge=1)


class Tolerance(Settings):
    """How far the exported net may be from torch, on real images."""

    max_relative_difference: float = Field(1e-3, gt=0)
    """Largest absolute difference of an output, divided by the largest absolute output of torch."""
    top1_agreement: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Fraction of images with the same largest output."""


class Target(Settings):
    """One kind of device and runtime."""

    runtime: Literal["onnxruntime"]
    precision: Literal["fp32"] = "fp32"
    graph: Graph = Graph()
    tolerance: Tolerance = Tolerance()

    @model_validator(mode="after")
    def _batch_within_limits(self) -> Target:
        if self.graph.dynamic_batch and self.graph.batch > self.graph.max_batch:
            raise ValueError(
                f"'graph.batch' {self.graph.batch} is above 'graph.max_batch' {self.graph.max_batch}"
            )
        return self


def read_target(name: str) -> Target:
    """Read a packaged target or a TOML file.

    Raises:
        TargetError: unknown name, key or value; every problem at once.
    """
    path = find_settings_file(name, folder="export", error=TargetError, noun="target")
    tables = parse_toml(read_text(path, error=TargetError), source=str(path), error=TargetError)
    return validate(Target, tables, source=str(path), error=TargetError)


def list_targets() -> list[dict[str, str]]:
    """List the packaged targets: name and the first line of the header."""
    return [
        {"name": name, "summary": header_comment(path.read_text(encoding="utf-8")).partition("\n")[0]}
        for name, path in packaged_files("export").items()
    ]
