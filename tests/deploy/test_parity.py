"""The parity report: numbers and sentences of a check, and the first layer that leaves the tolerance."""

from __future__ import annotations

import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from edgecl.config.recipe import read_recipe
from edgecl.config.target import Graph, Tolerance
from edgecl.deploy.onnx import onnx_from_net
from edgecl.deploy.parity import (
    breaches,
    check_parity,
    check_tolerance,
    first_outside,
    onnx_layers,
    slim_view_check,
    torch_layers,
)
from edgecl.errors import ArtifactError, ParityError
from edgecl.nets.model_dir import load_model
from edgecl.storage.checkpoint import read_newest, write_checkpoint
from edgecl.storage.directories import RunDir
from edgecl.train.carve import carve
from edgecl.train.pretrain import pretrain

EXPECTED = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
STRICT = Tolerance(max_relative_difference=1e-3, top1_agreement=0.99, mean_cosine=0.999)


def test_numbers_of_a_check_are_those_of_their_definitions():
    found = EXPECTED.copy()
    found[3, EXPECTED[3].argmin()] = EXPECTED[3].max() + 1
    step = check_parity("torch", "ONNX", found, EXPECTED)
    difference = np.abs(found - EXPECTED)
    assert step.max_abs_difference == pytest.approx(difference.max())
    assert step.mean_abs_difference == pytest.approx(difference.mean())
    assert step.max_relative_difference == pytest.approx(difference.max() / np.abs(EXPECTED).max())
    assert step.top1_agreement == pytest.approx(0.9)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(EXPECTED, axis=1)
    assert step.mean_cosine == pytest.approx(((found * EXPECTED).sum(1) / norms).mean())


def test_check_outside_its_tolerance_is_refused_with_numbers_and_layer():
    step = check_parity("carved torch net", "ONNX fp32", EXPECTED + 0.01, EXPECTED)
    step.first_diverging_layer = "blocks.1.conv_pw"
    with pytest.raises(ParityError) as caught:
        check_tolerance(step, STRICT)
    assert caught.value.problem.startswith(
        "ONNX fp32 disagrees with carved torch net on 10 images: the largest relative difference is 0.0"
    )
    assert "allowed is 0.001" in caught.value.problem
    assert caught.value.where == {"first layer outside": "blocks.1.conv_pw"}
    assert "no bundle was written" in caught.value.hint


def test_agreement_below_the_tolerance_is_a_breach_of_its_own():
    step = check_parity("torch", "ONNX", EXPECTED[:, ::-1].copy(), EXPECTED)
    assert len(breaches(step, STRICT)) == 3
    assert "the top-1 agreement is" in breaches(step, STRICT)[1]
    assert "the mean cosine similarity is" in breaches(step, STRICT)[2]


def test_values_that_are_not_finite_are_refused():
    found = EXPECTED.copy()
    found[0, 0] = np.inf
    with pytest.raises(ParityError, match="fp16 gives values that are not finite"):
        check_parity("fp32", "fp16", found, EXPECTED)


# --- layer by layer ---


@pytest.fixture(scope="module")
def net(carved_model):
    return load_model(carved_model)[0]


@pytest.fixture(scope="module")
def model(net):
    return onnx_from_net(net, graph=Graph(), shape=(3, 32, 32), metadata={})


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_layer_of_onnx_computes_what_torch_computes(net, model):
    in_torch = torch_layers(net, IMAGES)
    in_onnx = onnx_layers(model, IMAGES.numpy(), names=list(in_torch))
    assert in_onnx.keys() == in_torch.keys()
    assert len(in_torch) > 15
    assert first_outside(in_onnx, in_torch, Tolerance(max_relative_difference=1e-4)) is None


def test_layer_that_was_changed_is_the_first_outside(net, model):
    in_torch = torch_layers(net, IMAGES)
    names = list(in_torch)
    changed = deepcopy(model)
    place = 10
    convolution = [node for node in changed.graph.node if node.op_type == "Conv"][place]
    weight = next(tensor for tensor in changed.graph.initializer if tensor.name == convolution.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    found = onnx_layers(changed, IMAGES.numpy(), names=names)
    assert first_outside(found, in_torch, STRICT) == names[place]


# --- the slim view ---


@pytest.fixture(scope="module")
def plain_model(trained_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "slim"
    carve(trained_run, out=out, recalibrate_norms=False)
    return out


@pytest.mark.parametrize(
    ("made", "told"), [("plain_model", ""), ("carved_model", " (batch norms re-estimated)")]
)
def test_carved_net_equals_the_slim_view_bit_for_bit(request, trained_run, made, told):
    """With new statistics, the slim view that is given them."""
    net, record = load_model(request.getfixturevalue(made))
    step = slim_view_check(net, record, trained_run, IMAGES)
    assert step.max_abs_difference == 0
    assert step.variant == f"carved torch net{told}"


def test_slim_view_shows_a_weight_that_was_changed(plain_model, trained_run):
    net, record = load_model(plain_model)
    with torch.no_grad():
        next(net.parameters()).mul_(1.01)
    assert slim_view_check(net, record, trained_run, IMAGES).max_abs_difference > 0


@pytest.fixture(scope="module")
def run_of_widths(tmp_path_factory, image_folder, recipe_file):
    """A finished run of the tiny recipe with three slim widths."""
    out = tmp_path_factory.mktemp("widths") / "run"
    recipe = read_recipe(str(recipe_file), ["slim.widths=[0.35, 0.4, 0.5]"])
    pretrain(recipe, recipe_name="tiny", out=out, data=str(image_folder), device="cpu")
    return out


@pytest.mark.parametrize("recalibrated", [False, True])
@pytest.mark.parametrize("width", [0.35, 0.4, 0.5, 0.75])
def test_net_of_every_width_equals_its_own_view_in_the_host(run_of_widths, tmp_path, width, recalibrated):
    carve(run_of_widths, out=tmp_path / "net", width=width, recalibrate_norms=recalibrated)
    net, record = load_model(tmp_path / "net")
    assert slim_view_check(net, record, run_of_widths, IMAGES).max_abs_difference == 0


def test_net_of_a_checkpoint_that_is_not_the_newest_has_its_slim_view(run_of_widths, tmp_path):
    copy = shutil.copytree(run_of_widths, tmp_path / "run")
    carve(copy, out=tmp_path / "net", recalibrate_norms=False)
    checkpoint = read_newest(RunDir(copy))
    changed = {name: tensor + 1 for name, tensor in checkpoint.model.items()}
    write_checkpoint(
        RunDir(copy),
        step=checkpoint.step + 1,
        epoch=checkpoint.epoch,
        model=changed,
        optimizer=checkpoint.optimizer,
    )
    net, record = load_model(tmp_path / "net")
    assert slim_view_check(net, record, copy, IMAGES).max_abs_difference == 0


def test_another_run_is_refused(plain_model, trained_run):
    net, record = load_model(plain_model)
    with pytest.raises(ArtifactError, match="this model was not carved from a checkpoint that this run has"):
        slim_view_check(net, record.model_copy(update={"made_from": "0" * 64}), trained_run, IMAGES)
