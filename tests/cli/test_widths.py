"""Many widths from one run, through the command line: train, price, carve each, evaluate them side by side."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from edgecl.cli.commands import app
from edgecl.config.recipe import recipe_from_tables
from edgecl.nets.build import create_slimmable
from edgecl.nets.model_dir import load_model
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir

WIDTHS = (0.5, 0.4, 0.35)
SET = ("--set", "slim.widths=[0.35, 0.4, 0.5]")


def edgecl(*words):
    """Run a command in this process: a dozen would else load torch a dozen times. Return what it prints."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory, recipe_file, image_folder):
    out = tmp_path_factory.mktemp("widths") / "run"
    edgecl("pretrain", recipe_file, "--data", image_folder, "--out", out, *SET, "--set", "run.epochs=2")
    return out


@pytest.fixture(scope="module")
def carved(tmp_path_factory, trained):
    root = tmp_path_factory.mktemp("nets")
    for width in WIDTHS:
        said = edgecl("carve", trained, "--out", root / f"{width}", "--width", width, "--no-recalibrate")
        assert f"at width {width:g}, step 6: " in said
    return root


@pytest.fixture(scope="module")
def net(trained):
    """The host and its slim nets as the run left them."""
    recipe = recipe_from_tables(RunDir(trained).read().recipe, source="run.json")
    net = create_slimmable(recipe)
    net.load_state_dict(read_newest(RunDir(trained)).model)
    return net.eval()


@pytest.mark.parametrize("width", WIDTHS)
def test_carved_net_of_every_width_is_its_slim_view_bit_for_bit(carved, net, width):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, record = load_model(carved / f"{width}")
    assert record.width == width
    with torch.no_grad():
        assert torch.equal(found(images), net.forward_slim_part("backbone", images, width=width))
    weights = load_file(carved / f"{width}" / "weights.safetensors")
    slim = net.slim_tensors(width)
    assert len(weights) > 80
    assert all(torch.equal(tensor, slim[f"backbone.{name}"]) for name, tensor in weights.items())


def test_every_width_was_trained(net):
    """Its norms counted each step outside the frozen passes, and its own parameters moved."""
    for width in WIDTHS:
        norms = net.norms_of(width)
        assert {int(norm.num_batches_tracked) for norm in norms.values()} == {6}
        assert sum(float((norm.bias != 0).float().mean()) > 0.5 for norm in norms.values()) > 0.9 * len(norms)


def test_the_host_itself_can_be_carved_and_the_help_says_so(trained, net, tmp_path):
    edgecl("carve", trained, "--out", tmp_path / "host", "--width", 0.75, "--no-recalibrate")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, record = load_model(tmp_path / "host")
    assert record.width == 0.75
    with torch.no_grad():
        assert torch.equal(found(images), net.host.backbone(images))
    assert "or the host's for the host itself" in " ".join(edgecl("carve", "--help").split())


def test_the_best_checkpoint_is_carved_on_request(trained, tmp_path):
    edgecl("carve", trained, "--out", tmp_path / "net", "--best")
    _, record = load_model(tmp_path / "net")
    qualities = {}
    for state in RunDir(trained).checkpoints.glob("step-*/state.json"):
        about = json.loads(state.read_text())
        qualities[about["step"]] = about["quality"]["value"]
    best = max(qualities.values())
    assert record.step == max(step for step, value in qualities.items() if value == best)


def test_probe_shows_the_nets_of_a_run_side_by_side(carved, image_folder, monkeypatch):
    chance = SimpleNamespace(
        top1=lambda features, labels: 33.0, logits=lambda features: features.new_zeros(len(features), 3)
    )
    monkeypatch.setattr("edgecl.evaluate.probe.fit_linear", lambda features, labels, *, classes: chance)
    models = [carved / f"{width}" for width in WIDTHS]
    words = ("probe", *models, "--data", image_folder, "--labels-per-class", 2, "--seeds", 2)
    said = edgecl(*words)
    lines = [line for line in said.splitlines() if " M " in line]
    assert [line.split("│")[2].strip() for line in lines] == ["0.35", "0.4", "0.5"]
    assert "2 per class, 2 draws" in said
    table = json.loads(edgecl(*words, "--json"))
    assert [row["width"] for row in table] == sorted(WIDTHS)
    for row in table:
        assert (
            json.loads((carved / f"{row['width']}" / "probe.json").read_text()).items()
            >= {key: value for key, value in row["probe"].items() if key != "command"}.items()
        )


def test_cost_names_every_width(recipe_file):
    said = edgecl("cost", recipe_file, "--images", 60, *SET)
    for width, passes in ((0.5, "4.00"), (0.4, "3.00"), (0.35, "3.00")):
        (line,) = [line for line in said.splitlines() if f"width {width:g} " in line]
        assert f"{passes} of its forward passes per image" in line
    assert "width" not in edgecl("cost", recipe_file, "--images", 60)


def test_small_costs_are_written_in_small_units(recipe_file):
    words = ("--images", 16, "--set", "data.image_size=16", "--set", "slim.width=0.25")
    said = edgecl("cost", recipe_file, *words)
    record = json.loads(edgecl("cost", recipe_file, *words, "--json"))
    assert "e-" not in said
    for cell in (
        f"{record['macs'] / 1e3:.4g} k ",
        f"{record['params'] / 1e3:.4g} k ",
        f"{record['training']['flops_per_image'] / 1e6:.4g} MFLOPs per image",
        f"{record['training']['total_flops'] / 1e6:.4g} MFLOPs ",
        f"{record['training']['projector_total_flops'] / 1e3:.4g} kFLOPs ",
        "16 images, 1 epoch ",
    ):
        assert cell in said, cell


def test_large_costs_are_written_as_papers_do():
    assert "15.12e17 FLOPs" in edgecl("cost", "sacl-xd-mobilenetv3-large-200")
