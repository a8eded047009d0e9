"""A model directory becomes a bundle, or an error and nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import write_folder
from every_net import every_net
from sealed import write_sealed

import edgecl.deploy.session
import edgecl.deploy.variants
from edgecl.deploy.device import verify as verify_bundle
from edgecl.deploy.export import export as export_model
from edgecl.errors import DataError, DeviceError, ParityError
from edgecl.nets.backbone import create_backbone, example_side, is_norm
from edgecl.nets.model_dir import load_model, write_model
from edgecl.onboard.bundle import sha256_of_file
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.records import Preprocessing


def export(*arguments, **settings):
    """The manifest as it stands in its file."""
    return export_model(*arguments, **settings).to_json()


def verify(bundle, **settings):
    return verify_bundle(bundle, **settings).to_json()


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
    """Stand in for torch's exporter, which takes seconds: the model it wrote for the same net."""

    def read(net, *, graph, shape, metadata):
        return onnx.load(exported_bundle / "model.onnx")

    monkeypatch.setattr(edgecl.deploy.variants, "onnx_from_net", read)


@pytest.fixture
def manifest(exported_bundle):
    return Bundle(exported_bundle).read().to_json()


FILES = {
    *("README.txt", "model.onnx", "onboard.pyz", "reference.npz"),
    *("config.pbtxt", "main.cpp", "main.py", "triton.sh"),
}


def test_readme_names_the_net_and_the_verbs_that_the_runtime_has(exported_bundle):
    lines = (exported_bundle / "README.txt").read_text().splitlines()
    assert not any("build" in line for line in lines)  # nothing is built for a processor
    assert lines[0].startswith("test_efficientnet at width 0.5, features, for ort-cpu")
    for verb in ("doctor", "verify", "bench"):
        assert sum(f"python3 onboard.pyz {verb}" in line for line in lines) == 1


def test_manifest_holds_the_hash_and_size_of_every_file(exported_bundle, manifest):
    assert manifest["files"] == {name: sha256_of_file(exported_bundle / name) for name in FILES}
    assert manifest["size_bytes"] == {name: (exported_bundle / name).stat().st_size for name in FILES}


def test_manifest_names_the_model_it_was_made_from(carved_model, manifest):
    assert manifest["made_from"] == manifest["net"]["model_sha256"] == ModelDir(carved_model).sha256
    record = ModelDir(carved_model).read().to_json()
    for key in ("arch", "width", "features", "classes", "params", "origin"):
        assert manifest["net"][key] == record[key]


def test_manifest_says_the_form_of_input_and_output(manifest):
    assert manifest["input"] == {
        "name": "input",
        "shape": [1, 3, 32, 32],
        "dtype": "float32",
        "layout": "nchw",
        "normalization": "outside",
        "dynamic_batch": False,
        "max_batch": 1,
    }
    features = manifest["net"]["features"]
    assert manifest["output"] == {"name": "output", "shape": [1, features], "softmax": False}


def test_preprocessing_is_the_same_in_model_manifest_and_onnx(carved_model, exported_bundle, manifest):
    model = onnx.load(exported_bundle / "model.onnx")
    inside = {
        entry.key.removeprefix("edgecl."): json.loads(entry.value)
        for entry in model.metadata_props
        if entry.key.startswith("edgecl.")
    }
    assert {key: inside[key] for key in manifest["preprocessing"]} == manifest["preprocessing"]
    assert manifest["preprocessing"] == ModelDir(carved_model).read().to_json()["preprocessing"]
    assert inside["classes"] == manifest["net"]["classes"]


def test_parity_is_recorded_with_its_images(image_folder, manifest):
    parity = manifest["precisions"]["fp32"]["parity"]
    assert manifest["parity"][0] == parity
    (last,) = manifest["parity"][1:]
    assert (last["from"], last["to"]) == ("JPEG file through torch", "JPEG file through model.onnx")
    assert last["max_relative_difference"] < 1e-4
    assert (parity["from"], parity["to"]) == ("carved torch net", "ONNX fp32")
    # A fifth of the 60 is held out for judging.
    assert parity["images"] == 48
    assert manifest["images_from"] == str(image_folder)
    assert 0 <= parity["mean_abs_difference"] <= parity["max_abs_difference"]
    assert 0 <= parity["max_relative_difference"] <= 1e-3
    assert parity["top1_agreement"] >= 0.99
    assert parity["first_diverging_layer"] is None


def test_reference_is_real_images_and_what_torch_says_of_them(carved_model, exported_bundle, manifest):
    with np.load(exported_bundle / "reference.npz", allow_pickle=False) as reference:
        inputs, outputs = reference["inputs"], reference["outputs"]
    assert (inputs.dtype, outputs.dtype) == (np.float32, np.float32)
    assert inputs.shape == (16, 3, 32, 32)
    mean, std = (np.array(manifest["preprocessing"][key]).reshape(3, 1, 1) for key in ("mean", "std"))
    pixels = (inputs * std + mean) * 255
    # Whole numbers from 0 to 255 before normalizing: pictures, not noise.
    assert np.abs(pixels - pixels.round()).max() < 1e-2
    assert pixels.min() > -0.5
    assert pixels.max() < 255.5
    net, _ = load_model(carved_model)
    with torch.no_grad():
        expected = net(torch.from_numpy(inputs)).numpy()
    assert np.abs(outputs - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())


def test_target_file_of_the_users_decides_the_form(tmp_path, carved_model, dynamic_file, monkeypatch):
    """The exporter itself is tried in test_onnx.py; here its model for any batch stands in."""
    asked_for = []

    def read(net, *, graph, shape, metadata):
        asked_for.append(graph)
        return onnx.load(dynamic_file)

    monkeypatch.setattr(edgecl.deploy.variants, "onnx_from_net", read)
    (tmp_path / "mine.toml").write_text(TARGET)
    found = export(carved_model, target=str(tmp_path / "mine.toml"), out=tmp_path / "b")
    assert found["target_name"] == "mine"
    graph = asked_for[0]
    assert (graph.batch, graph.dynamic_batch, graph.max_batch) == (2, True, 4)
    assert found["target"]["graph"] == graph.model_dump()
    assert (found["input"]["shape"][0], found["input"]["max_batch"]) == (2, 4)
    assert found["input"]["dynamic_batch"] is True
    assert verify(tmp_path / "b")["ok"] is True


# --- several precisions ---


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, carved_model):
    """A net fine-tuned on pictures it tells apart, and the pictures."""
    from edgecl.evaluate.finetune import finetune

    root = tmp_path_factory.mktemp("classifier")
    folder = write_folder(root / "pictures", per_class=340)
    finetune(carved_model, data=str(folder), out=root / "model", epochs=3, assignments=["lr=0.003"])
    return root / "model", folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, classifier):
    out = tmp_path_factory.mktemp("three") / "b"
    model, _ = classifier
    told = []
    export(model, target="ort-cpu", precisions=["int8", "fp16"], out=out, say=told.append)
    return out, told


def test_bundle_holds_what_was_asked_for_and_fp32_to_fall_back_on(three):
    manifest = Bundle(three[0]).read().to_json()
    assert list(manifest["precisions"]) == ["int8", "fp16", "fp32"]
    assert {about["form"] for about in manifest["precisions"].values()} == {"int8-cpu", "fp16", "fp32"}
    for name, about in manifest["precisions"].items():
        assert about["model"] == ("model.onnx" if name == "fp32" else f"model.{name}.onnx")
        assert manifest["files"][about["model"]] == sha256_of_file(three[0] / about["model"])


def test_every_precision_is_evaluated_on_the_held_out_images(three, classifier):
    manifest = Bundle(three[0]).read().to_json()
    for about in manifest["precisions"].values():
        assert (about["accuracy"]["metric"], about["accuracy"]["n"]) == ("top1", 204)
        assert about["accuracy"]["data"] == f"{classifier[1]} (held out)"
        low, high = about["accuracy"]["ci95"]
        assert low <= about["accuracy"]["value"] <= high
    assert manifest["precisions"]["fp32"]["accuracy"]["mean_cosine"] == pytest.approx(1)


def test_accuracy_of_int8_is_that_of_its_file(three, classifier):
    """Counted again by hand, from the file in the bundle and the pictures."""
    from edgecl.data.loading import load_eval_images, normalize, split_holdout
    from edgecl.data.sources import open_source

    bundle, (model, folder) = three[0], classifier
    preprocessing = ModelDir(model).read().to_json()["preprocessing"]
    source = open_source(str(folder))
    source = source.take(split_holdout(source.labels, 0.2, seed=0)[1])
    loaded = load_eval_images(source, resize_size=32, image_size=32)
    images = normalize(loaded.images, preprocessing["mean"], preprocessing["std"]).numpy()
    session = onnxruntime.InferenceSession(
        str(bundle / "model.int8.onnx"), providers=["CPUExecutionProvider"]
    )
    right = [
        session.run(None, {"input": image[None]})[0].argmax() == label
        for image, label in zip(images, loaded.labels.tolist(), strict=True)
    ]
    manifest = Bundle(bundle).read().to_json()
    assert manifest["precisions"]["int8"]["accuracy"]["value"] == pytest.approx(100 * np.mean(right))


def test_decision_says_what_int8_costs_and_how_fast_it_is(three):
    manifest = Bundle(three[0]).read().to_json()
    decision = manifest["precisions"]["int8"]["decision"]
    assert decision["method"] in decision["methods"]
    assert set(decision["methods"]) == {"minmax", "entropy", "percentile"}
    assert (decision["calibration_images"], decision["holdout_images"]) == (256, 256)
    assert decision["speed"]["against"] == "fp16"
    assert decision["speed"]["ratio"] > 0
    assert decision["words"].startswith("kept" if decision["kept"] else "rejected")
    assert manifest["precision"] == ("int8" if decision["kept"] else "fp16")


def test_parity_report_goes_from_torch_to_int8(three):
    parity = Bundle(three[0]).read().to_json()["parity"]
    assert [(step["from"], step["to"]) for step in parity] == [
        ("carved torch net", "ONNX fp32"),
        ("ONNX fp32", "ONNX fp16"),
        ("ONNX fp32", "ONNX int8"),
        *[
            ("JPEG file through torch", f"JPEG file through {name}")
            for name in ("model.onnx", "model.fp16.onnx", "model.int8.onnx")
        ],
    ]
    fp32, fp16, int8 = (step["max_abs_difference"] for step in parity[:3])
    assert fp32 < fp16 < int8


def test_too_few_images_to_calibrate_on_are_refused(tmp_path, carved_model):
    with pytest.raises(DataError) as caught:
        export(carved_model, target="jetson", out=tmp_path / "b")
    for words in ("INT8", "64 images to calibrate", "there are 48 beside the fifth"):
        assert words in caught.value.problem
    for words in ("--calibration URI", "--precision fp16,fp32"):
        assert words in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_too_few_images_for_a_reference_are_refused(tmp_path, carved_model):
    folder = write_folder(tmp_path / "pictures", per_class=6)
    with pytest.raises(DataError, match="16 real images, there are 15 beside the fifth"):
        export(carved_model, target="ort-cpu", out=tmp_path / "b", calibration=str(folder))


def test_images_that_fine_tuning_held_out_are_evaluated_on(tmp_path, classifier, carved_model):
    from edgecl.evaluate.finetune import finetune

    test = write_folder(tmp_path / "test", per_class=4)
    finetune(carved_model, data=str(classifier[1]), test=str(test), out=tmp_path / "m", epochs=1)
    manifest = export(tmp_path / "m", target="ort-cpu", precisions=["fp32", "fp16"], out=tmp_path / "b")
    accuracy = manifest["precisions"]["fp32"]["accuracy"]
    assert (accuracy["data"], accuracy["n"]) == (str(test), 12)


@pytest.fixture
def lenient(tmp_path):
    """A target for TensorRT that takes INT8 as it comes: a net of seconds may be near no tolerance."""
    lines = ["runtime = 'tensorrt'", "device = 'gpu'", "precisions = ['fp16', 'int8']", "[tolerance.int8]"]
    lines += ["max_relative_difference = 100", "top1_agreement = 0", "mean_cosine = 0"]
    (tmp_path / "lenient.toml").write_text("\n".join(lines))
    return str(tmp_path / "lenient.toml")


def test_few_images_give_no_decision(tmp_path, classifier, lenient):
    few = write_folder(tmp_path / "few", per_class=5)
    manifest = export(
        classifier[0], target=lenient, eval_uri=str(few), precisions=["int8"], out=tmp_path / "b"
    )
    assert manifest["precision"] == "fp32"
    said = manifest["precisions"]["int8"]["decision"]["words"]
    for words in ("not evaluated", "15 images", "200 are needed", "--eval URI"):
        assert words in said


def test_classifier_without_labelled_images_is_not_evaluated(tmp_path, classifier, lenient):
    other = write_folder(tmp_path / "other", per_class=60, classes={"x": (1, 2, 3), "y": (200, 1, 9)})
    model = shutil.copytree(classifier[0], tmp_path / "m")
    record = json.loads((model / "model.json").read_text())
    write_sealed(model / "model.json", {**record, "data": str(other)})
    manifest = export(model, target=lenient, precisions=["int8"], out=tmp_path / "b")
    assert manifest["precisions"]["int8"]["decision"]["words"].startswith(
        "not evaluated: no images labelled with the net's classes"
    )


def test_jetson_bundle_verifies_here_by_its_onnx_files_and_carries_trtexec(tmp_path, classifier):
    out = tmp_path / "b"
    manifest = export(classifier[0], target="jetson", out=out)
    assert manifest["target_name"] == "jetson-orin-jp6"
    assert list(manifest["precisions"]) == ["fp16", "int8", "fp32"]
    int8 = manifest["precisions"]["int8"]
    assert (int8["form"], int8["opset"]) == ("int8-trt", 17)
    assert int8["decision"]["speed"] is None
    script = (out / "trtexec.sh").read_text()
    for about in manifest["precisions"].values():
        assert f"--onnx={about['model']}" in script
    assert verify(out, runtime="onnxruntime")["ok"] is True
    assert (out / "deepstream-labels.txt").read_text() == "blue;green;red\n"
    with pytest.raises(DeviceError, match="tensorrt"):
        verify(out)


def test_target_decides_the_size_of_the_input(tmp_path, carved_model):
    (tmp_path / "large.toml").write_text('runtime = "onnxruntime"\n[graph]\nopset = 17\nimage_size = 48\n')
    manifest = export(carved_model, target=str(tmp_path / "large.toml"), out=tmp_path / "b")
    assert manifest["input"]["shape"] == [1, 3, 48, 48]
    assert manifest["preprocessing"]["image_size"] == 48
    assert verify(tmp_path / "b")["ok"] is True


# --- what goes wrong leaves nothing ---


def scaled(factor):
    """A way to run models that gives another result than the model's."""

    def session_of(model, *, runtime, form="fp32"):
        run = edgecl.deploy.session.session_of(model, runtime=runtime, form=form)
        return lambda images: run(images) * np.float32(factor)

    return session_of


@pytest.mark.usefixtures("quick_onnx")
def test_net_that_disagrees_with_torch_leaves_the_earlier_bundle(
    tmp_path, carved_model, exported_bundle, monkeypatch
):
    bundle = shutil.copytree(exported_bundle, tmp_path / "b")
    before = sha256_of_file(bundle / "manifest.json")
    monkeypatch.setattr(edgecl.deploy.variants, "session_of", scaled(np.nan))
    with pytest.raises(ParityError):
        export(carved_model, target="ort-cpu", out=bundle, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert sha256_of_file(bundle / "manifest.json") == before


@pytest.mark.usefixtures("quick_onnx")
def test_weights_of_another_net_in_the_onnx_file_are_found(tmp_path, carved_model, image_folder):
    """The exporter wrote one net, torch holds another."""
    from edgecl.nets.model_dir import write_model

    net, record = load_model(carved_model)

    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    keys = ("arch", "width", "stem_stride", "classes", "preprocessing", "origin", "made_from", "data")
    write_model(tmp_path / "m", net, **{key: getattr(record, key) for key in keys})
    with pytest.raises(ParityError, match="disagrees with carved torch net") as caught:
        export(tmp_path / "m", target="ort-cpu", out=tmp_path / "b", calibration=str(image_folder))
    assert caught.value.where == {"first layer outside": "conv_stem"}
    assert not (tmp_path / "b").exists()


def test_model_that_names_no_images_asks_for_them(tmp_path, carved_model):
    model = shutil.copytree(carved_model, tmp_path / "m")
    record = json.loads((model / "model.json").read_text())
    write_sealed(model / "model.json", {**record, "data": None})
    with pytest.raises(DataError) as caught:
        export(model, target="ort-cpu", out=tmp_path / "b")
    assert "does not say which images" in caught.value.problem
    assert "--calibration URI" in caught.value.hint


@pytest.mark.parametrize("images", [64, 16])
def test_int8_outside_its_tolerance_is_left_out_and_the_rest_is_written(
    tmp_path, carved_model, monkeypatch, images
):
    """On all images, or only on those that a device will be held to, with which verifying would fail."""
    pictures = write_folder(tmp_path / "pictures", per_class=40)

    def breaches(step, tolerance):
        return ["too far"] if (step.variant, step.images) == ("ONNX int8", images) else []

    monkeypatch.setattr(edgecl.deploy.variants, "breaches", breaches)
    manifest = export(
        carved_model, target="ort-cpu", precisions=["int8"], calibration=str(pictures), out=tmp_path / "b"
    )
    assert list(manifest["precisions"]) == ["fp32"]
    decision = manifest["left_out"]["int8"]["decision"]
    assert (decision["kept"], decision["outside_tolerance"]) == (False, ["too far"])
    assert decision["words"].startswith("rejected because its outputs are too far from fp32's: too far; ")


# --- odd pictures ---


def write_random_model(path, arch):
    """Write a model directory of a net whose norms do something, at the smallest pictures it takes."""
    torch.manual_seed(0)
    net = create_backbone(arch).eval()
    for module in net.modules():
        if is_norm(module):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    side = example_side(net)
    preprocessing = Preprocessing(
        image_size=side, resize_size=side, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    return write_model(
        path,
        net,
        arch=arch,
        width=1.0,
        stem_stride=None,
        classes=None,
        preprocessing=preprocessing,
        origin="random",
        made_from=None,
        data="demo",
    )


@pytest.mark.parametrize("arch", every_net(quick=("mobileone_s0",)))
def test_every_net_passes_the_parity_checks(tmp_path, arch):
    write_random_model(tmp_path / "model", arch)
    manifest = export_model(
        tmp_path / "model", target="ort-cpu", precisions=["fp32", "int8"], out=tmp_path / "bundle"
    )
    # The torch net still has its branches: it is what fp32 is compared with.
    assert manifest.precisions["fp32"].parity
    assert "int8" in manifest.precisions
    assert verify_bundle(tmp_path / "bundle").ok
