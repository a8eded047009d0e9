"""A torch net -> ONNX at the target's opset and forms, with its preprocessing in the model's metadata."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import nn

from edgecl.config.target import Graph
from edgecl.deploy.graph import portable
from edgecl.nets.folding import fuse_branches
from edgecl.storage.records import MADE_BY

INPUT = "input"
OUTPUT = "output"
# The oldest that torch's exporter writes; everything else is rewritten from it.
EXPORTED_OPSET = 18


def onnx_from_net(
    net: nn.Module, *, graph: Graph, shape: tuple[int, int, int], metadata: dict[str, Any]
) -> onnx.ModelProto:
    """Fuse a net's branches and export it in evaluation mode at the target's opset and forms, weights inside.

    Args:
        net: (N, 3, H, W) float32 -> (N, F) or (N, K).
        graph: opset, forms and batch.
        shape: (3, H, W) of the input.
        metadata: written into the model, each value as JSON under `edgecl.KEY`; the classes also as others read them.

    Raises:
        TargetError, ParityError: an operator has no form in that opset.
    """
    # A batch of one would be taken for a constant where the batch shall be dynamic.
    example = torch.zeros((max(graph.batch, 2) if graph.dynamic_batch else graph.batch, *shape))
    dynamic = ({0: torch.export.Dim("batch", min=1, max=graph.max_batch)},) if graph.dynamic_batch else None
    with _quiet():
        program = torch.onnx.export(
            fuse_branches(net).eval(),
            (example,),
            dynamo=True,
            opset_version=EXPORTED_OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    model = portable(program.model_proto, opset=graph.opset, hard_swish=graph.hard_swish)
    model.producer_name, _, model.producer_version = MADE_BY.partition(" ")
    ours = {f"edgecl.{key}": json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, {**ours, **_for_others(metadata, graph, shape)})
    return model


def _for_others(metadata: dict[str, Any], graph: Graph, shape: tuple[int, int, int]) -> dict[str, str]:
    """Return what other programs look for in an ONNX file, under the keys and as the Python literals of Ultralytics."""
    found: dict[str, Any] = {
        "imgsz": list(shape[1:]),
        "channels": shape[0],
        "stride": 1,
        "batch": graph.batch,
    }
    if metadata.get("classes") is not None:
        found["names"] = dict(enumerate(metadata["classes"]))
        if not metadata.get("label_sets"):  # they know one class a picture
            found["task"] = "classify"
    return {key: str(value) for key, value in found.items()}


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
