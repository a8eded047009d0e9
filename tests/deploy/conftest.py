"""The tiny net once more as ONNX, for any batch; real nets as ONNX with ranges."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onboard.tiny_bundle import make_bundle

from edgecl.config.target import Graph
from edgecl.deploy.onnx import onnx_from_net
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import load_model

from .sketch import SIDE, images_of, ranges_of


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A whole bundle of a tiny net, each test its own."""
    return make_bundle(tmp_path / "bundle")


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
    onnx.save(model, path)
    features = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    assert features == net(torch.zeros(1, 3, 32, 32)).shape[1]
    return path


@pytest.fixture(scope="session")
def exported():
    """Nets of the support list at 64 pixels, their batch norms settled, with ranges from the same kind of images."""
    made = {}

    def make(arch):
        if arch not in made:
            torch.manual_seed(0)
            net = create_backbone(arch, num_classes=10)
            images = images_of(16, SIDE)
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 0.5
            with torch.no_grad():
                for _ in range(2):
                    net.train()(torch.from_numpy(images))
            model = onnx_from_net(
                net.eval(),
                graph=Graph(opset=19, dynamic_batch=True, max_batch=16),
                shape=(3, SIDE, SIDE),
                metadata={},
            )
            made[arch] = model, ranges_of(model, images)
        return made[arch]

    return make
