"""The tiny net once more as ONNX, for any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgecl.deploy.onnx import onnx_from_net, output_length, save_onnx
from edgecl.nets.carving import load_model
from edgecl.target import Graph


@pytest.fixture(scope="session")
def dynamic_file(tmp_path_factory: pytest.TempPathFactory, carved_model: Path) -> Path:
    """The carved net at opset 20 for any batch up to 6."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    net, _ = load_model(carved_model)
    model = onnx_from_net(
        net,
        graph=Graph(opset=20, batch=2, dynamic_batch=True, max_batch=6),
        shape=(3, 32, 32),
        metadata={"classes": ["a", "b"], "mean": [0.5, 0.25, 0.125]},
    )
    save_onnx(model, path)
    features = output_length(model)
    assert features == net(torch.zeros(1, 3, 32, 32)).shape[1]
    return path
