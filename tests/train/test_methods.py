"""Every method that there is, by the public way: it logs what its panels draw, and parts give the whole's gradient."""

import math

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from edgecl.config.recipe import Data, find_method, list_methods, recipe_from_tables
from edgecl.errors import DataError, RecipeError
from edgecl.methods.teacher import Teacher, load_teacher
from edgecl.nets.backbone import create_backbone
from edgecl.nets.build import create_slimmable
from edgecl.nets.given import load_given
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.train.step import create_step

from .conftest import assert_close_gradients, gradients_of, steps_of, train, train_until

COMMON = {"step", "epoch", "loss", "std", "grad_norm_host", "grad_norm_slim", "lr", "images_per_s"}


TAUGHT = [name for name in list_methods() if "teacher" in find_method(name).Config.model_fields]
SMALL = {"seed": {"queue": 24}, "dino": {"prototypes": 32}}


@pytest.fixture
def recipe_of(tables):
    def make(name, *, teacher=None, **changed):
        method = {"name": name, **SMALL.get(name, {})}
        if name in TAUGHT:
            method["teacher"] = {"arch": "test_efficientnet", "weights": "untrained", **(teacher or {})}
        own = {"method": method, "host": {**tables["host"], "width": 0.5}}
        return recipe_from_tables({**tables, **own, **changed}, source="test")

    return make


@pytest.fixture
def images_of(pictures, labelled_pictures):
    def find(name):
        return labelled_pictures if find_method(name).Config.needs_labels else pictures

    return find


@pytest.mark.parametrize("name", list_methods())
def test_a_run_logs_what_its_panels_draw(tmp_path, recipe_of, images_of, name):
    train(recipe_of(name, views={"local_count": 1}), tmp_path / "run", images_of(name))
    run = RunDir(tmp_path / "run")
    records = steps_of(run.path)
    assert len(records) == 10
    drawn = {key for panel in run.read().panels for key in panel["lines"]}
    for record in records:
        assert drawn <= record.keys()
        assert {"diagonal", "off_diagonal_rms", "coding_rate"} <= record.keys()
        assert all(math.isfinite(record[key]) for key in COMMON - {"grad_norm_slim"})
    assert (tmp_path / "run" / "views.png").exists()


@pytest.mark.parametrize("name", list_methods())
def test_parts_take_the_whole_batchs_gradient_for_every_method(recipe_of, tables, name):
    """Without batch norm in training mode the parts see what the whole sees."""

    def gradients(parts):
        recipe = recipe_of(name, run={**tables["run"], "accumulate": parts}, views={"local_count": 1})
        torch.manual_seed(0)
        net = create_slimmable(recipe).double()
        step = create_step(recipe, net, accelerator=Accelerator(cpu=True), steps_per_epoch=5)
        generator = torch.Generator().manual_seed(1)
        whole = torch.randn(step.method.whole_views, 8, 3, 32, 32, generator=generator, dtype=torch.float64)
        known = [torch.arange(8) % 3] if recipe.method.needs_labels else []
        return gradients_of(step, [*whole, whole[0][..., :16, :16], *known])[1]

    assert_close_gradients(gradients(4), gradients(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", list_methods())
def test_a_stopped_run_of_every_method_goes_on_as_if_it_had_not_been(tmp_path, recipe_of, images_of, name):
    recipe = recipe_of(name)
    train(recipe, tmp_path / "whole", images_of(name))
    train_until(3, recipe, tmp_path / "parts", images_of(name))
    train(recipe, tmp_path / "parts", images_of(name), resume=True)
    whole, parts = (read_newest(RunDir(tmp_path / run)) for run in ("whole", "parts"))
    assert whole.model.keys() == parts.model.keys()
    assert all(torch.equal(parts.model[key], tensor) for key, tensor in whole.model.items())
    assert not [key for key in whole.model if "method.teacher." in key and name != "oss"]


@pytest.mark.parametrize("name", [name for name in TAUGHT if name != "oss"])
def test_features_of_plain_views_kept_on_the_disk_are_those_found_on_the_way(
    tmp_path, recipe_of, pictures, name
):
    for run, cache in (("kept", True), ("found", False), ("again", True)):
        train(recipe_of(name, teacher={"view": "plain", "cache": cache}), tmp_path / run, pictures)
    kept, found, again = (read_newest(RunDir(tmp_path / run)).model for run in ("kept", "found", "again"))
    assert len(list((tmp_path / ".edgecl").glob("teacher-*.npy"))) == 1
    for key, tensor in found.items():
        assert torch.equal(kept[key], tensor), key
        assert torch.equal(again[key], tensor), key


def test_a_damaged_file_of_features_is_made_anew(tmp_path, recipe_of, pictures):
    recipe = recipe_of("seed", teacher={"view": "plain"})
    train(recipe, tmp_path / "one", pictures)
    (file,) = (tmp_path / ".edgecl").glob("teacher-*.npy")
    whole = file.read_bytes()
    for damaged in (whole[:200], b"", b"x" * 100):
        file.write_bytes(damaged)
        train(recipe, tmp_path / "one", pictures, force=True)
        assert file.read_bytes() == whole


def test_the_teacher_of_another_picture_size_is_named_before_pictures_are_read(tmp_path, recipe_of):
    # Its patches have 14 pixels.
    recipe = recipe_of("seed", teacher={"arch": "vit_small_patch14_dinov2"})
    with pytest.raises(RecipeError, match="'vit_small_patch14_dinov2' does not take pictures of 32 x 32"):
        train(recipe, tmp_path / "run", tmp_path / "no pictures")


def test_a_vit_teaches_at_any_size_that_its_patches_divide():
    given = load_given("untrained", arch="vit_tiny_patch16_224")
    teacher = Teacher(given, Data(image_size=64))
    # As timm builds it for this size, given the same tensors, the positions interpolated.
    expected = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    tensors = given.net.state_dict()
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], new_size=[4, 4])
    expected.load_state_dict(tensors)
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(teacher(pictures), expected(pictures))
    assert given.net.patch_embed.img_size == (224, 224)


def test_a_method_that_learns_from_classes_refuses_pictures_without(tmp_path, recipe_of, pictures):
    with pytest.raises(DataError, match="supcon learns from classes"):
        train(recipe_of("supcon"), tmp_path / "run", pictures)


def test_a_teacher_is_no_part_of_a_checkpoint_and_does_not_change(tmp_path, recipe_of, pictures):
    recipe = recipe_of("disco")
    before = {key: one.clone() for key, one in load_teacher(recipe.method.teacher).net.state_dict().items()}
    train(recipe, tmp_path / "run", pictures)
    after = load_teacher(recipe.method.teacher).net.state_dict()
    assert all(torch.equal(after[key], one) for key, one in before.items())
    tensors = read_newest(RunDir(tmp_path / "run")).model
    assert {key.split(".")[1] for key in tensors if key.startswith("method.")} == {
        "adapter",
        "target",
        "queue",
    }


def test_another_teacher_is_refused_when_a_run_is_resumed(tmp_path, recipe_of, pictures):
    weights = tmp_path / "teacher.safetensors"
    net = create_backbone("test_efficientnet")
    save_file(net.state_dict(), weights)
    recipe = recipe_of("seed", teacher={"weights": str(weights)})
    train_until(3, recipe, tmp_path / "run", pictures)
    load_teacher.cache_clear()
    save_file(create_backbone("test_efficientnet").state_dict(), weights)
    with pytest.raises(RecipeError, match="another teacher"):
        train(recipe, tmp_path / "run", pictures, resume=True)
    load_teacher.cache_clear()
    save_file(net.state_dict(), weights)
    train(recipe, tmp_path / "run", pictures, resume=True)
