"""A model directory gives the net again that was written, and names what does not belong together."""

import json

import pytest
import torch
from sealed import write_sealed

from edgecl.errors import ArtifactError
from edgecl.nets.backbone import create_backbone
from edgecl.nets.fake_quant import quantize_net
from edgecl.nets.model_dir import load_model, write_model
from edgecl.storage.records import Preprocessing, Quantization

SMALL = "mobilenetv3_small_100"
MADE = {
    "arch": SMALL,
    "preprocessing": Preprocessing(image_size=32, resize_size=32, mean=[0.5] * 3, std=[0.5] * 3),
    "origin": "random",
    "made_from": None,
    "data": None,
}


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def test_weights_of_another_net_are_named(tmp_path):
    net = create_backbone(SMALL, width=0.5)
    write_model(tmp_path / "model", net, width=0.75, stem_stride=None, classes=None, **MADE)
    with pytest.raises(ArtifactError, match=f"the weights are not those of '{SMALL}' at width 0.75"):
        load_model(tmp_path / "model")


# --- quantized nets ---


@pytest.fixture
def quantized(tmp_path):
    """Write a quantized net with a classifier; return its directory and the net."""
    torch.manual_seed(0)
    net, kept = quantize_net(
        create_backbone(SMALL, width=0.5, num_classes=2), torch.randn(4, 3, 64, 64), keep=["conv_stem"]
    )
    about = {"width": 0.5, "stem_stride": 1, "classes": ["cat", "dog"]}
    quantization = Quantization(keep=kept, learnt=False)
    write_model(tmp_path / "quantized", net, quantization=quantization, **about, **MADE)
    return tmp_path / "quantized", net


def test_quantized_net_is_rebuilt_with_its_scales(quantized, images):
    path, net = quantized
    net.conv_stem.stride = (1, 1)
    loaded, record = load_model(path)
    assert not loaded.training
    assert record.quantization.keep == ["conv_stem"]
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))


def test_weights_of_a_quantized_net_do_not_pass_for_those_of_another_choice(quantized):
    path, _ = quantized
    file = path / "model.json"
    record = json.loads(file.read_text())
    record["quantization"]["keep"] = ["conv_stem", "conv_head"]
    write_sealed(file, record)
    with pytest.raises(
        ArtifactError, match=f"the weights are not those of '{SMALL}' at width 0.5, quantized"
    ):
        load_model(path)
