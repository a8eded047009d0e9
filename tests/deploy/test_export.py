"""A model directory becomes a bundle, or an error and nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import write_folder
from PIL import Image

import edgecl.deploy.export
from edgecl.artifacts import Bundle, ModelDir, write_sealed
from edgecl.deploy.export import export
from edgecl.deploy.verify import verify
from edgecl.errors import ArtifactError, DataError, ParityError, TargetError
from edgecl.nets.carving import load_model
from edgecl.onboard.bundle import sha256_of_file

TARGET = """\
# Mine.
runtime = "onnxruntime"

[graph]
batch = 2
dynamic_batch = true
max_batch = 4
"""


@pytest.fixture
def quick_onnx(monkeypatch, exported_bundle):
    """Stand in for torch's exporter, which takes seconds: the file it wrote for the same net."""
    outputs = Bundle(exported_bundle).read()["output"]["shape"][1]

    def write(net, path, *, graph, shape, metadata):
        shutil.copy(Bundle(exported_bundle).onnx_file, path)
        return outputs

    monkeypatch.setattr(edgecl.deploy.export, "write_onnx", write)


@pytest.fixture
def manifest(exported_bundle):
    return Bundle(exported_bundle).read()


def test_bundle_holds_net_manifest_and_reference_only(exported_bundle):
    assert {path.name for path in exported_bundle.iterdir()} == {
        "manifest.json",
        "model.onnx",
        "reference.npz",
    }


def test_manifest_holds_the_hash_and_size_of_every_file(exported_bundle, manifest):
    assert manifest["files"] == {
        name: sha256_of_file(exported_bundle / name) for name in ("model.onnx", "reference.npz")
    }
    assert manifest["size_bytes"] == {
        name: (exported_bundle / name).stat().st_size for name in ("model.onnx", "reference.npz")
    }


def test_manifest_names_the_model_it_was_made_from(carved_model, manifest):
    assert manifest["made_from"] == manifest["net"]["model_sha256"] == ModelDir(carved_model).sha256
    record = ModelDir(carved_model).read()
    for key in ("arch", "width", "features", "classes", "params", "origin"):
        assert manifest["net"][key] == record[key]


def test_manifest_says_the_form_of_input_and_output(manifest):
    assert manifest["input"] == {
        "name": "input",
        "shape": [1, 3, 32, 32],
        "dtype": "float32",
        "dynamic_batch": False,
        "max_batch": 1,
    }
    assert manifest["output"] == {"name": "output", "shape": [1, manifest["net"]["features"]]}


def test_preprocessing_is_the_same_in_model_manifest_and_onnx(carved_model, exported_bundle, manifest):
    model = onnx.load(exported_bundle / "model.onnx")
    inside = {
        entry.key.removeprefix("edgecl."): json.loads(entry.value)
        for entry in model.metadata_props
        if entry.key.startswith("edgecl.")
    }
    assert {key: inside[key] for key in manifest["preprocessing"]} == manifest["preprocessing"]
    assert manifest["preprocessing"] == ModelDir(carved_model).read()["preprocessing"]
    assert inside["classes"] == manifest["net"]["classes"]


def test_parity_is_recorded_with_its_images(image_folder, manifest):
    parity = manifest["parity"]
    assert parity["images"] == 60
    assert parity["images_from"] == str(image_folder)
    assert 0 <= parity["mean_abs_difference"] <= parity["max_abs_difference"]
    assert 0 <= parity["max_relative_difference"] <= 1e-3
    assert parity["top1_agreement"] >= 0.99


def test_reference_is_real_images_and_what_torch_says_of_them(carved_model, exported_bundle, manifest):
    with np.load(exported_bundle / "reference.npz", allow_pickle=False) as reference:
        inputs, outputs = reference["inputs"], reference["outputs"]
    assert (inputs.dtype, outputs.dtype) == (np.float32, np.float32)
    assert inputs.shape == (16, 3, 32, 32)
    mean, std = (np.array(manifest["preprocessing"][key]).reshape(3, 1, 1) for key in ("mean", "std"))
    pixels = (inputs * std + mean) * 255
    # Whole numbers from 0 to 255 before normalising: pictures, not noise.
    assert np.abs(pixels - pixels.round()).max() < 1e-2
    assert pixels.min() > -0.5
    assert pixels.max() < 255.5
    net, _ = load_model(carved_model)
    with torch.no_grad():
        expected = net(torch.from_numpy(inputs)).numpy()
    assert np.abs(outputs - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())


def test_outputs_of_the_reference_are_not_all_alike(exported_bundle):
    """Else agreement would be no evidence."""
    with np.load(exported_bundle / "reference.npz") as reference:
        assert reference["outputs"].std(axis=0).max() > 1e-3


def test_fresh_bundle_verifies_in_a_process_without_torch(tmp_path, exported_bundle):
    bundle = shutil.copytree(exported_bundle, tmp_path / "b")
    code = "import sys; sys.modules['torch'] = None; from pathlib import Path; "
    code += "from edgecl.deploy.verify import verify; print(verify(Path(sys.argv[1]))['ok'])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("name", ["model.onnx", "reference.npz"])
def test_one_flipped_byte_is_found(tmp_path, exported_bundle, name):
    bundle = shutil.copytree(exported_bundle, tmp_path / "b")
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"'{name}' does not match its hash"):
        verify(bundle)


def test_target_file_of_the_users_decides_the_form(
    tmp_path, carved_model, exported_bundle, dynamic_file, monkeypatch
):
    """The exporter itself is tried in test_onnx.py; here its file for any batch stands in."""
    asked_for = []

    def write(net, path, *, graph, shape, metadata):
        asked_for.append(graph.model_dump())
        shutil.copy(dynamic_file, path)
        return Bundle(exported_bundle).read()["output"]["shape"][1]

    monkeypatch.setattr(edgecl.deploy.export, "write_onnx", write)
    (tmp_path / "mine.toml").write_text(TARGET)
    found = export(carved_model, target=str(tmp_path / "mine.toml"), out=tmp_path / "b")
    assert found["target_name"] == "mine"
    assert asked_for == [{"opset": 18, "batch": 2, "dynamic_batch": True, "max_batch": 4}]
    assert found["target"]["graph"] == asked_for[0]
    assert (found["input"]["shape"][0], found["input"]["max_batch"]) == (2, 4)
    assert found["input"]["dynamic_batch"] is True
    assert verify(tmp_path / "b")["ok"] is True


# --- what goes wrong leaves nothing ---


class BrokenRunner:
    """A runtime that computes another result than torch."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, *words, **options):
        from edgecl.onboard.runners import open_runner

        self.inner = open_runner(*words, **options)
        return self

    def run(self, images):
        return self.inner.run(images) * self.factor


@pytest.mark.usefixtures("quick_onnx")
def test_net_that_disagrees_with_torch_leaves_no_bundle(tmp_path, carved_model, monkeypatch):
    monkeypatch.setattr(edgecl.deploy.export, "open_runner", BrokenRunner(np.float32(1.01)))
    with pytest.raises(ParityError, match="the exported net disagrees with torch on 60 images"):
        export(carved_model, target="ort-cpu", out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_onnx")
def test_net_that_disagrees_with_torch_leaves_the_earlier_bundle(
    tmp_path, carved_model, exported_bundle, monkeypatch
):
    bundle = shutil.copytree(exported_bundle, tmp_path / "b")
    before = sha256_of_file(bundle / "manifest.json")
    monkeypatch.setattr(edgecl.deploy.export, "open_runner", BrokenRunner(np.float32(np.nan)))
    with pytest.raises(ParityError):
        export(carved_model, target="ort-cpu", out=bundle, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert sha256_of_file(bundle / "manifest.json") == before


@pytest.mark.usefixtures("quick_onnx")
def test_weights_of_another_net_in_the_onnx_file_are_found(tmp_path, carved_model, image_folder):
    """The exporter wrote one net, torch holds another."""
    from edgecl.nets.carving import write_model

    net, record = load_model(carved_model)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    keys = ("arch", "width", "stem_stride", "classes", "preprocessing", "origin", "made_from", "data")
    write_model(tmp_path / "m", net, **{key: record[key] for key in keys})
    with pytest.raises(ParityError, match="disagrees with torch"):
        export(tmp_path / "m", target="ort-cpu", out=tmp_path / "b", calibration=str(image_folder))
    assert not (tmp_path / "b").exists()


def test_existing_output_is_refused(carved_model, exported_bundle):
    with pytest.raises(ArtifactError, match="already exists"):
        export(carved_model, target="ort-cpu", out=exported_bundle)


def test_force_does_not_replace_a_model_directory(carved_model):
    with pytest.raises(ArtifactError, match="--force replaces only a bundle directory"):
        export(carved_model, target="ort-cpu", out=carved_model, force=True)


def test_unknown_target_suggests_a_near_one(tmp_path, carved_model):
    with pytest.raises(TargetError, match=r"unknown target 'ort-cpuu'(.|\n)*did you mean 'ort-cpu'"):
        export(carved_model, target="ort-cpuu", out=tmp_path / "b")


def test_directory_that_is_no_model_is_refused(tmp_path, trained_run):
    with pytest.raises(ArtifactError, match="is not a model directory but a run directory"):
        export(trained_run, target="ort-cpu", out=tmp_path / "b")


def test_model_that_names_no_images_asks_for_them(tmp_path, carved_model):
    model = shutil.copytree(carved_model, tmp_path / "m")
    record = json.loads((model / "model.json").read_text())
    write_sealed(model / "model.json", {**record, "data": None})
    with pytest.raises(DataError) as caught:
        export(model, target="ort-cpu", out=tmp_path / "b")
    assert caught.value.problem == "this model does not say which images it was made from"
    assert caught.value.hint == "name real images for the comparison with --calibration URI"


def test_images_that_are_gone_are_named(tmp_path, carved_model):
    model = shutil.copytree(carved_model, tmp_path / "m")
    record = json.loads((model / "model.json").read_text())
    write_sealed(model / "model.json", {**record, "data": f"{tmp_path}/gone"})
    with pytest.raises(DataError, match=f"no folder '{tmp_path}/gone'"):
        export(model, target="ort-cpu", out=tmp_path / "b")


# --- odd pictures ---


@pytest.mark.usefixtures("quick_onnx")
def test_odd_pictures_will_do_to_compare_on(tmp_path, carved_model):
    odd = tmp_path / "odd"
    odd.mkdir()
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (50, 20), dtype=np.uint8)).save(odd / "grey.png")
    Image.fromarray(random.integers(0, 256, (9, 70, 4), dtype=np.uint8), "RGBA").save(odd / "alpha.webp")
    Image.fromarray(random.integers(0, 256, (40, 40, 4), dtype=np.uint8), "CMYK").save(odd / "cmyk.jpg")
    Image.fromarray(random.integers(0, 256, (33, 31, 3), dtype=np.uint8)).convert("P").save(odd / "p.bmp")
    Image.new("RGB", (1, 1)).save(odd / "dot.png")
    found = export(carved_model, target="ort-cpu", out=tmp_path / "b", calibration=str(odd))
    assert found["parity"]["images"] == 5
    assert found["parity"]["images_from"] == str(odd)


@pytest.mark.usefixtures("quick_onnx")
def test_broken_picture_among_good_ones_does_not_stop_an_export(tmp_path, carved_model):
    folder = write_folder(tmp_path / "pictures", per_class=3)
    (folder / "red" / "000.png").write_bytes(b"")
    found = export(carved_model, target="ort-cpu", out=tmp_path / "b", calibration=str(folder))
    assert found["parity"]["images"] == 8
