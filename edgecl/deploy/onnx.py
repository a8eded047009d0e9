"""A torch net -> an ONNX file at the target's opset, with its preprocessing in the file's metadata."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from edgecl.artifacts import MADE_BY
from edgecl.errors import ParityError
from edgecl.target import Graph

INPUT = "input"
OUTPUT = "output"


def write_onnx(
    net: nn.Module, path: Path, *, graph: Graph, shape: tuple[int, int, int], metadata: dict[str, Any]
) -> int:
    """Export a net in evaluation mode to one ONNX file.

    Args:
        net: (N, 3, H, W) float32 -> (N, F) or (N, K).
        path: the file to write; weights inside it.
        graph: opset and batch.
        shape: (3, H, W) of the input.
        metadata: written into the file, each value as JSON.

    Returns:
        the length of an output vector.

    Raises:
        ParityError: the exporter wrote another opset than asked for.
    """
    # A batch of one would be taken for a constant where the batch shall be dynamic.
    example = torch.zeros((max(graph.batch, 2) if graph.dynamic_batch else graph.batch, *shape))
    dynamic = ({0: torch.export.Dim("batch", min=1, max=graph.max_batch)},) if graph.dynamic_batch else None
    with _quiet():
        program = torch.onnx.export(
            net.eval(),
            (example,),
            dynamo=True,
            opset_version=graph.opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != graph.opset:
        raise ParityError(f"torch exported opset {written}, the target asks for {graph.opset}")
    model.producer_name, _, model.producer_version = MADE_BY.partition(" ")
    # The exporter notes source lines of the machine it ran on in every node; they say nothing to a device.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"edgecl.{key}", json.dumps(value)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's running commentary off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
