"""Runs that start from weights somebody has: the slim net begins as they are, and what guards them guards the run."""

import re
import shutil

import pytest
import torch
from every_net import LAYER_NORMS, every_net
from safetensors.torch import load_file, save_file

from edgecl.config.recipe import list_methods, recipe_from_tables
from edgecl.errors import ArtifactError, RecipeError
from edgecl.nets.backbone import create_backbone, example_side
from edgecl.nets.build import create_slimmable, start_from
from edgecl.nets.given import load_start
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.train.carve import carve

from .conftest import looks_of, train
from .test_methods import SMALL, TAUGHT

ARCH = "mobilenetv3_small_050"
SOME = ("mobilenetv3_small_100", "repvit_m0_9", "vit_tiny_patch16_224")


def trained(arch, *, width=1.0, classes=7):
    """A net whose every tensor is its own, those of norms too."""
    torch.manual_seed(3)
    net = create_backbone(arch, width=width, num_classes=classes).eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape) / 10)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(1234)
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    save_file(trained(ARCH).state_dict(), file)
    return file


@pytest.fixture
def tables_from(tables, weights):
    """Make the tables of a run from the file's weights, in a nested host."""

    def make(**host):
        own = {"arch": ARCH, "width": 1.5, "nested_start": True, "init": str(weights), **host}
        return {**tables, "host": own, "slim": {"width": 1.0}, "run": {**tables["run"], "epochs": 1}}

    return make


def assert_given_back(model, file):
    """Hold a model directory to a file, tensor by tensor and bit by bit, but for its classifier."""
    found, given = load_file(model / "weights.safetensors"), load_file(file)
    assert {name for name in given if not name.startswith("classifier.")} == found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name]), name


def keep_only_the_start(run):
    for path in (run / "checkpoints").glob("step-*"):
        if path.name != "step-000000000":
            shutil.rmtree(path)


@pytest.mark.parametrize("arch", every_net(quick=SOME))
def test_the_slim_view_is_the_given_net_bit_for_bit(tmp_path, arch):
    net, file = trained(arch), tmp_path / "weights.pth"
    torch.save(net.state_dict(), file)
    side, nests = example_side(net), arch not in LAYER_NORMS
    tables = {
        "host": {"arch": arch, "width": 1.5 if nests else 1.0, "nested_start": nests, "init": str(file)},
        "projector": {"sizes": [8]},
        "data": {"image_size": side},
    }
    recipe = recipe_from_tables(tables, source="test")
    given = load_start(recipe.host.init, host=recipe.host, width=1.0, data=recipe.data)
    assert given.left_out
    slimmable = create_slimmable(recipe)
    start_from(slimmable, given)
    slimmable.eval()
    pictures = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(pictures), pre_logits=True)
        assert torch.equal(slimmable.forward_slim_part("backbone", pictures), expected)
        wide = slimmable.host.backbone(pictures)[:, : expected.shape[1]]
        assert float((wide - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("sacl-xd", "byol", "oss") else pytest.param(name, marks=pytest.mark.slow)
        for name in list_methods()
    ],
)
def test_a_run_of_every_method_begins_with_them_and_carving_gives_them_back(
    tmp_path, weights, tables_from, pictures, labelled_pictures, name
):
    method = {"name": name, **SMALL.get(name, {})}
    if name in TAUGHT:
        method["teacher"] = {"arch": ARCH, "weights": "untrained"}
    host = {} if name == "sacl-xd" else {"width": 1.0, "nested_start": False}
    recipe = recipe_from_tables({**tables_from(**host), "method": method}, source="test")
    run = tmp_path / "run"
    train(recipe, run, labelled_pictures if recipe.method.needs_labels else pictures)
    moved = read_newest(RunDir(run)).model
    keep_only_the_start(run)
    carve(run, out=tmp_path / "model")
    assert_given_back(tmp_path / "model", weights)
    begun = read_newest(RunDir(run)).model
    assert any(not torch.equal(tensor, begun[key]) for key, tensor in moved.items())
    for key, tensor in begun.items():
        if key.startswith("method.target.net.backbone.") and not key.endswith(("mean", "var", "tracked")):
            assert torch.equal(tensor, begun[key.replace("method.target.net.", "host.")]), key


def test_a_run_says_what_it_starts_from_and_what_it_leaves_out(
    tmp_path, capsys, weights, tables_from, labelled_pictures
):
    train(recipe_from_tables(tables_from(), source="test"), tmp_path / "run", labelled_pictures)
    record = RunDir(tmp_path / "run").read()
    assert record.left_out == ["classifier.bias", "classifier.weight"]
    assert re.fullmatch("[0-9a-f]{64}", record.rests_on["init"])
    said = capsys.readouterr().err
    assert f"starts from '{weights}'; without its classifier: classifier.bias, classifier.weight" in said


def test_narrower_nets_begin_as_their_part_of_the_weights(tables_from, weights):
    tables = {**tables_from(), "slim": {"widths": [1.0, 0.5]}}
    recipe = recipe_from_tables(
        {**tables, "host": {**tables["host"], "arch": "mobilenetv2_100", "init": "untrained"}}, source="test"
    )
    net = create_slimmable(recipe)
    given = load_start(recipe.host.init, host=recipe.host, width=1.0, data=recipe.data)
    with torch.no_grad():
        for tensor in given.net.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape))
    start_from(net, given)
    for name, tensor in net.slim_tensors(0.5).items():
        if name.startswith("backbone."):
            whole = given.net.state_dict()[name.removeprefix("backbone.")]
            assert torch.equal(tensor, whole[tuple(slice(0, size) for size in tensor.shape)]), name


def test_a_run_goes_on_from_its_start_as_if_it_had_not_stopped(tmp_path, tables_from, pictures):
    recipe = recipe_from_tables(tables_from(), source="test")
    train(recipe, tmp_path / "run", pictures)
    whole = read_newest(RunDir(tmp_path / "run")).model
    looks = looks_of(tmp_path / "run")
    keep_only_the_start(tmp_path / "run")
    train(recipe, tmp_path / "run", pictures, resume=True)
    again = read_newest(RunDir(tmp_path / "run"))
    assert again.step == 5
    for name, tensor in whole.items():
        assert torch.equal(again.model[name], tensor), name
    assert looks == looks_of(tmp_path / "run")


def test_other_weights_are_refused_when_a_run_is_resumed(tmp_path, tables_from, pictures):
    file = tmp_path / "weights.safetensors"
    save_file(trained(ARCH).state_dict(), file)
    recipe = recipe_from_tables(tables_from(init=str(file)), source="test")
    train(recipe, tmp_path / "run", pictures)
    save_file(create_backbone(ARCH).state_dict(), file)
    with pytest.raises(RecipeError, match="another init"):
        train(recipe, tmp_path / "run", pictures, resume=True)


@pytest.mark.parametrize(
    ("host", "error", "words"),
    [
        ({"init": "nowhere.pth"}, ArtifactError, "neither a file of weights nor a model directory"),
        ({"arch": "mobilenetv3_small_075"}, RecipeError, r"'[\w.]+' has the shape \([\d, ]+\), and is"),
        ({"nested_start": False}, RecipeError, "'host.nested_start' = true, or 'host.width' = 1"),
    ],
)
def test_what_does_not_fit_is_named_before_pictures_are_read(tmp_path, tables_from, host, error, words):
    with pytest.raises(error, match=words):
        train(
            recipe_from_tables(tables_from(**host), source="test"), tmp_path / "run", tmp_path / "no pictures"
        )
    assert not (tmp_path / "run").exists()


def test_weights_inside_the_output_are_not_removed(tmp_path, tables_from, pictures, weights):
    run = tmp_path / "run"
    train(recipe_from_tables(tables_from(), source="test"), run, pictures)
    inside = shutil.copy(weights, run / "weights.safetensors")
    recipe = recipe_from_tables(tables_from(init=str(inside)), source="test")
    with pytest.raises(ArtifactError, match="holds the directory"):
        train(recipe, run, pictures, force=True)
    assert inside.exists()
