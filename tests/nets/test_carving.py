"""Carving: a slim net as a plain timm net, bit for bit."""

import json

import pytest
import timm
import torch
from every_net import nets_at
from safetensors.torch import load_file

from edgecl.config.recipe import recipe_from_tables
from edgecl.errors import ArtifactError, RecipeError, SliceError
from edgecl.nets.backbone import count_parameters, create_backbone, example_side, feature_count
from edgecl.nets.build import backbone_tensors, create_slimmable
from edgecl.nets.model_dir import load_model
from edgecl.storage.checkpoint import write_checkpoint
from edgecl.storage.directories import ModelDir, RunDir
from edgecl.storage.record_files import write_record
from edgecl.train.carve import carve, preprocessing_of

SMALL = "mobilenetv3_small_100"
PREPROCESSING = preprocessing_of(recipe_from_tables({"host": {"arch": SMALL}}, source="test"))


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def backbone_output(net, images):
    """Run the slim net in evaluation mode; return what its backbone gave."""
    seen = []
    backbone = net._views[net.slim_width].skeleton.backbone
    hook = backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        net.eval().forward_slim(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("arch", "slim_width"), nets_at([1.0, 0.75, 0.5]))
def test_carved_net_equals_slim_view(slimmable, arch, slim_width):
    net = slimmable(arch, host_width=1.5, slim_width=slim_width)
    side = example_side(net.host)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    expected = backbone_output(net, images)
    torch.manual_seed(99)
    carved = create_backbone(arch, width=slim_width)
    carved.load_state_dict(backbone_tensors(net, width=slim_width))
    with torch.no_grad():
        found = carved.eval()(images)
    assert float(expected.std()) > 0
    assert float((found - expected).abs().max()) == 0


def test_carved_tensors_are_copies(slimmable):
    net = slimmable(SMALL, host_width=1.5, slim_width=0.5)
    tensors = backbone_tensors(net, width=0.5)
    before = net.host.backbone.conv_stem.weight.detach().clone()
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    assert torch.equal(net.host.backbone.conv_stem.weight, before)


TABLES = {
    "host": {"arch": SMALL, "width": 1.25},
    "slim": {"width": 1.0},
    "projector": {"sizes": [8, 4]},
    "data": {"image_size": 32, "resize_size": 40, "batch_size": 8},
}


def test_timm_loads_a_carved_file_by_itself(write_run, tmp_path, images):
    net = write_run(TABLES)
    carve(tmp_path / "run", out=tmp_path / "model", recalibrate_norms=False)
    loaded = timm.create_model(
        SMALL, num_classes=0, checkpoint_path=str(tmp_path / "model" / "weights.safetensors")
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone_output(net, images))


def test_model_record_says_what_the_net_is(write_run, tmp_path):
    write_run(TABLES)
    returned = carve(tmp_path / "run", out=tmp_path / "model", recalibrate_norms=False)
    record = json.loads((tmp_path / "model" / "model.json").read_text(encoding="utf-8"))
    assert record == returned.to_json()
    plain = timm.create_model(SMALL, num_classes=0)
    expected = {
        "kind": "model",
        "arch": SMALL,
        "width": 1.0,
        "stem_stride": None,
        "classes": None,
        "features": feature_count(plain),
        "params": count_parameters(plain),
        "origin": "pretrained",
        "recalibrated": False,
        "recipe_name": "tiny",
        "method": "SACL-XD",
        "epoch": 3,
        "step": 30,
    }
    assert record.items() >= expected.items()
    assert returned.preprocessing.image_size == 32
    assert returned.preprocessing.resize_size == 40
    assert returned.weights_sha256 == ModelDir(tmp_path / "model").read().weights_sha256


def write_step(run, step, net, **options):
    optimizer = {"state": {}, "param_groups": []}
    model = net.state_dict()
    write_checkpoint(
        RunDir(run), epoch=step // 10, step=step, model=model, optimizer=optimizer, keep=4, **options
    )


MANY = {**TABLES, "slim": {"width": 1.0, "widths": [0.5, 0.75, 1.0]}}


@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 1.25])
def test_every_trained_width_can_be_carved(write_run, tmp_path, images, width):
    net = write_run(MANY).eval()
    with torch.no_grad():
        # Every width has statistics and parameters of its own, so that a mistaken one shows.
        for name, tensor in net.state_dict().items():
            if "norms" in name and tensor.is_floating_point():
                tensor.add_(
                    0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    write_step(tmp_path / "run", 40, net)
    record = carve(tmp_path / "run", out=tmp_path / "model", width=width, recalibrate_norms=False)
    loaded, _ = load_model(tmp_path / "model")
    assert (record.width, record.step) == (width, 40)
    with torch.no_grad():
        host = net.host.backbone(images)
        expected = host if width == 1.25 else net.forward_slim_part("backbone", images, width=width)
        assert torch.equal(loaded(images), expected)
    others = [other for other in (1.0, 0.75, 0.5) if other != width]
    with torch.no_grad():
        for other in others:
            seen = net.forward_slim_part("backbone", images, width=other)
            assert seen.shape != expected.shape or not torch.allclose(seen, expected, rtol=1e-3)


def test_nets_of_one_checkpoint_say_so(write_run, tmp_path):
    write_run(MANY)
    records = [
        carve(tmp_path / "run", out=tmp_path / f"{width}", width=width, recalibrate_norms=False)
        for width in (0.5, None)
    ]
    assert records[1].width == 1.0
    assert len({record.made_from for record in records}) == 1
    assert len({record.weights_sha256 for record in records}) == 2


@pytest.mark.parametrize(
    ("widths", "width", "named", "trained"),
    [
        ((1.25, 1.0), 0.5, "0.5", "1 and 1.25"),
        ((1.25, 1.0, 0.75, 0.5), 0.6, "0.6", "0.5, 0.75, 1 and 1.25"),
        ((0.5, 0.5), 1.0, "1", "0.5"),
        # With all its digits.
        ((1.0, 0.75), 0.75000001, "0.75000001", "0.75 and 1"),
    ],
)
def test_an_untrained_width_is_named_with_those_that_were_trained(widths, width, named, trained):
    slim = {"width": widths[1], "widths": list(widths[1:])}
    net = create_slimmable(
        recipe_from_tables(
            {**TABLES, "host": {"arch": SMALL, "width": widths[0]}, "slim": slim}, source="test"
        )
    )
    with pytest.raises(SliceError) as caught:
        backbone_tensors(net, width=width)
    assert f"carve width {named}:" in caught.value.problem
    assert caught.value.problem.endswith(f" trained {trained}")


@pytest.fixture
def write_qualities(tmp_path, write_run):
    """Write a checkpoint per quality, each with weights of its own; return the nets' first weights by step."""

    def write(qualities):
        net, stems = write_run(TABLES), {}
        for step, quality in qualities.items():
            with torch.no_grad():
                net.host.backbone.conv_stem.weight.add_(1.0)
            stems[step] = net.slim_tensors()["backbone.conv_stem.weight"].detach().clone()
            quality = quality and {"name": "knn_top1_slim", "value": quality}
            write_step(tmp_path / "run", step, net, quality=quality)
        return stems

    return write


@pytest.mark.parametrize(("checkpoint", "step"), [("newest", 60), ("best", 50)])
def test_newest_or_best_checkpoint_is_carved(write_qualities, tmp_path, checkpoint, step):
    stems = write_qualities({40: 30.0, 50: 60.0, 60: 45.0})
    record = carve(tmp_path / "run", out=tmp_path / "model", checkpoint=checkpoint, recalibrate_norms=False)
    loaded, _ = load_model(tmp_path / "model")
    assert (record.step, record.epoch) == (step, step // 10)
    assert torch.equal(loaded.conv_stem.weight, stems[step])


def test_a_run_without_an_evaluated_checkpoint_has_no_best(write_qualities, tmp_path):
    write_qualities({40: None})
    with pytest.raises(ArtifactError, match="has no whole checkpoint with a quality"):
        carve(tmp_path / "run", out=tmp_path / "model", checkpoint="best")
    assert not (tmp_path / "model").exists()


def test_a_recipe_is_carved_only_for_weights_that_it_starts_from(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(f'[host]\narch = "{SMALL}"\n')
    with pytest.raises(RecipeError, match="starts from no given weights"):
        carve(file, out=tmp_path / "model")
    with pytest.raises(RecipeError, match="leave out --width and --best"):
        carve(file, out=tmp_path / "model", width=1.0)
    assert not (tmp_path / "model").exists()


def test_stem_stride_travels_with_the_model(write_run, tmp_path):
    write_run({**TABLES, "host": {**TABLES["host"], "stem_stride": 1}})
    carve(tmp_path / "run", out=tmp_path / "model", recalibrate_norms=False)
    loaded, _ = load_model(tmp_path / "model")
    assert loaded.conv_stem.stride == (1, 1)


def test_recalibration_changes_norm_statistics_only(write_run, tmp_path, write_pictures):
    write_run(TABLES, data=write_pictures(12))
    for name, recalibrated in (("plain", False), ("fresh", True)):
        record = carve(tmp_path / "run", out=tmp_path / name, recalibrate_norms=recalibrated)
        assert record.recalibrated is recalibrated
    plain = load_file(tmp_path / "plain" / "weights.safetensors")
    fresh = load_file(tmp_path / "fresh" / "weights.safetensors")
    changed = {name for name in plain if not torch.equal(plain[name], fresh[name])}
    assert changed == {name for name in plain if "running" in name or "tracked" in name}


def test_recalibrated_statistics_are_those_of_the_unaugmented_images(write_run, tmp_path, write_pictures):
    from edgecl.data.loading import load_eval_images, normalize
    from edgecl.data.sources import open_source

    folder = write_pictures(12)
    write_run(TABLES, data=folder)
    carve(tmp_path / "run", out=tmp_path / "model")
    loaded, record = load_model(tmp_path / "model")
    recipe = recipe_from_tables(TABLES, source="test")
    pictures = load_eval_images(open_source(str(folder)), resize_size=40, image_size=32).images
    with torch.no_grad():
        outputs = loaded.conv_stem(normalize(pictures, recipe.data.mean, recipe.data.std))
    torch.testing.assert_close(loaded.bn1.running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.bn1.running_var, outputs.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert record.preprocessing == preprocessing_of(recipe)


@pytest.mark.parametrize("same", [True, False])
def test_recalibration_on_other_images_than_the_runs_is_said(
    write_run, tmp_path, write_pictures, capsys, same
):
    from edgecl.data.sources import open_source

    folder = write_pictures(12)
    write_run(TABLES, data=folder)
    record = RunDir(tmp_path / "run").read()
    record.data.fingerprint = open_source(str(folder)).fingerprint
    write_record(RunDir(tmp_path / "run").record_file, record)
    if not same:
        sorted(folder.iterdir())[0].unlink()
    carve(tmp_path / "run", out=tmp_path / "model")
    said = capsys.readouterr().err
    assert ("not those that the run was trained on" in said) is not same


def test_a_run_without_a_checkpoint_is_named(write_run, tmp_path):
    write_run(TABLES)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with pytest.raises(ArtifactError, match=f"'{tmp_path / 'run'}' has no checkpoint") as caught:
        carve(tmp_path / "run", out=tmp_path / "model")
    assert "--force" in caught.value.hint
    assert not (tmp_path / "model").exists()


def test_an_output_in_the_way_is_named(write_run, tmp_path):
    write_run(TABLES)
    carve(tmp_path / "run", out=tmp_path / "model", recalibrate_norms=False)
    with pytest.raises(ArtifactError, match=f"output '{tmp_path / 'model'}' already exists"):
        carve(tmp_path / "run", out=tmp_path / "model", recalibrate_norms=False)
    carve(tmp_path / "run", out=tmp_path / "model", recalibrate_norms=False, force=True)


def test_carving_an_untrained_width_leaves_nothing(write_run, tmp_path):
    write_run(TABLES)
    with pytest.raises(SliceError, match=r"carve width 0\.5: .*trained 1 and 1\.25"):
        carve(tmp_path / "run", out=tmp_path / "model", width=0.5)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("image_size", "views", "refused"),
    [(32, {}, 32), (224, {"local_count": 1}, 112), (224, {"local_count": 1, "local_size": 96}, 96)],
)
def test_a_net_that_takes_one_size_only_is_refused_by_name(image_size, views, refused):
    tables = {
        "host": {"arch": "vit_tiny_patch16_224", "width": 1.0},
        "data": {"image_size": image_size},
        "views": views,
    }
    text = rf"'vit_tiny_patch16_224' .*pictures of {refused} x {refused}"
    with pytest.raises(RecipeError, match=text) as caught:
        create_slimmable(recipe_from_tables(tables, source="test"))
    assert "local_size" in caught.value.hint


def test_in_a_host_too_a_net_that_does_not_take_the_pictures_is_refused_for_that():
    tables = {
        "host": {"arch": "vit_tiny_patch16_224", "width": 2.0, "stem_stride": 1},
        "data": {"image_size": 32},
    }
    with pytest.raises(RecipeError, match=r"'host\.stem_stride' 1 .*pictures of 32 x 32"):
        create_slimmable(recipe_from_tables(tables, source="test"))
