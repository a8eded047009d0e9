"""From a JPEG file to a class: the same in torch, in a bundle on the host, and by onboard.pyz."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from onboard.tiny_bundle import make_bundle
from PIL import Image

import edgecl
from edgecl.data.loading import load_eval_images, normalize
from edgecl.data.sources import open_source
from edgecl.errors import ArtifactError, DataError, TargetError
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import write_model
from edgecl.storage.directories import Bundle
from edgecl.storage.records import Preprocessing

COUNT = 200
PREPROCESSING = Preprocessing(
    image_size=32, resize_size=36, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """The demo's pictures as JPEG files of many sizes."""
    folder, source = tmp_path_factory.mktemp("pictures") / "jpegs", open_source("demo", split="test")
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(COUNT):
        size = [int(side) for side in random.integers(24, 200, 2)]
        picture = source.read(index % len(source)).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:03}.jpg", quality=int(random.integers(60, 96)))
    return folder


def write(out, net, classes):
    about = {"arch": "mobilenetv3_small_050", "width": 1.0, "stem_stride": None, "data": None}
    write_model(
        out, net, **about, classes=classes, preprocessing=PREPROCESSING, origin="random", made_from=None
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory, jpegs):
    """A classifier with random weights and an opinion of every picture."""
    torch.manual_seed(0)
    net = create_backbone("mobilenetv3_small_050", num_classes=7)
    pixels = load_eval_images(open_source(str(jpegs)), resize_size=36, image_size=32, limit=64).images
    images = normalize(pixels, PREPROCESSING.mean, PREPROCESSING.std)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.9
    with torch.no_grad():
        net.train()(images)
        head, logits = net.get_classifier(), net.eval()(images)
        head.weight.mul_(3 / logits.std())
        head.bias.sub_(logits.mean(0)).mul_(3 / logits.std())
    out = tmp_path_factory.mktemp("model") / "classifier"
    write(out, net.eval(), [f"class {letter}" for letter in "abcdefg"])
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, model, jpegs):
    """It takes bytes and gives probabilities, in two precisions."""
    out = tmp_path_factory.mktemp("bundle") / "bytes"
    edgecl.export(
        model,
        target="ort-cpu",
        out=out,
        precisions=["fp32", "fp16"],
        input="uint8",
        softmax=True,
        calibration=jpegs,
    )
    return out


@pytest.fixture(scope="module")
def in_torch(model, jpegs):
    return edgecl.predict(model, jpegs, top=7)


def by_onboard(bundle, *words):
    done = subprocess.run(
        [sys.executable, "onboard.pyz", "predict", ".", *map(str, words)],
        cwd=bundle,
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def scores(record):
    predictions = record["predictions"]
    assert not any(one["problem"] for one in predictions)
    found = np.zeros((len(predictions), 7))
    for row, one in zip(found, predictions, strict=True):
        row[[guess["label"] for guess in one["top"]]] = [guess["score"] for guess in one["top"]]
    return found


def test_manifest_and_report_say_what_goes_in_and_what_comes_out(bundle):
    manifest = Bundle(bundle).read()
    assert manifest.input.shape == [1, 32, 32, 3]
    assert (manifest.input.dtype, manifest.input.layout, manifest.input.normalization) == (
        "uint8",
        "nhwc",
        "inside",
    )
    assert manifest.output.softmax
    steps = [step for step in manifest.parity if step.source == "JPEG file through torch"]
    assert [step.variant for step in steps] == [
        "JPEG file through model.onnx",
        "JPEG file through model.fp16.onnx",
    ]
    assert steps[0].max_relative_difference < 1e-5
    with np.load(bundle / "reference.npz") as reference:
        assert reference["inputs"].dtype == np.uint8
        np.testing.assert_allclose(reference["outputs"].sum(1), 1, rtol=1e-5)


def test_verify_and_bench_know_the_input(bundle):
    assert edgecl.verify(bundle).ok
    (measured,) = edgecl.bench(bundle, duration_s=0.1, threads=1, power=False).measurements
    assert measured.latency_ms.p50 > 0


@pytest.mark.parametrize(("precision", "far"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_host_and_device_agree_on_200_jpegs(in_torch, bundle, jpegs, precision, far):
    code, found, _ = by_onboard(bundle, jpegs, "--top", 7, "--precision", precision)
    assert (code, found["images"], found["precision"]) == (0, COUNT, precision)
    expected = scores(in_torch.to_json())
    assert len(set(expected.argmax(1))) > 2
    agree = scores(found).argmax(1) == expected.argmax(1)
    # Two classes closer than the precision tells may change places.
    lead = np.diff(np.sort(expected, axis=1)[:, -2:]).ravel()
    assert agree[lead > 2 * far].all()
    assert agree.mean() >= 0.99
    np.testing.assert_allclose(scores(found), expected, rtol=0, atol=far)
    on_host = edgecl.predict(bundle, jpegs, top=7, precision=precision).to_json()
    assert [one["top"] for one in on_host["predictions"]] == [one["top"] for one in found["predictions"]]
    assert on_host["decoders"] == found["decoders"] == in_torch.decoders


def test_an_unreadable_picture_is_a_line_and_an_exit_code(bundle, model, jpegs, tmp_path, edgecl):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((jpegs / "000.jpg").read_bytes()[:300])
    for asked in (bundle, model):
        out = tmp_path / f"{asked.name}.csv"
        code, said, err = edgecl("predict", asked, broken, jpegs / "001.jpg", "--out", out, "--top", 2)
        assert (code, said) == (1, f"2 pictures -> {out}\n")
        assert "1 of 2 pictures" in err
        first, second = csv.DictReader(out.read_text().splitlines())
        assert (first["file"], first["class_1"]) == (str(broken), "")
        assert first["problem"]
        assert second["class_1"].startswith("class ")
        assert float(second["score_1"]) >= float(second["score_2"]) > 0
        assert second["problem"] == ""
    code, found, err = by_onboard(bundle, "--json", broken, jpegs / "001.jpg")
    assert (code, found["unreadable"], [bool(one["problem"]) for one in found["predictions"]]) == (
        1,
        1,
        [True, False],
    )
    assert "1 of 2 pictures" in err
    code, found, err = by_onboard(bundle, "nowhere.jpg")
    assert (code, found["error"]["name"]) == (1, "data")
    assert "'nowhere.jpg'" in err


def test_json_lines_hold_a_prediction_each(model, jpegs, in_torch, tmp_path):
    out = tmp_path / "found.jsonl"
    edgecl.predict(model, [jpegs / "000.jpg", jpegs / "001.jpg"], top=7, out=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line, one in zip(lines, in_torch.predictions[:2], strict=True):
        assert line["file"] == one.file
        assert [guess["label"] for guess in line["top"]] == [guess.label for guess in one.top]
        assert [guess["score"] for guess in line["top"]] == pytest.approx(
            [guess.score for guess in one.top], abs=1e-5
        )
    with pytest.raises(ArtifactError, match="already exists"):
        edgecl.predict(model, jpegs, out=out)


def test_what_cannot_be_done_is_said_before_it_begins(model, jpegs, tmp_path):
    features = tmp_path / "features"
    write(features, create_backbone("mobilenetv3_small_050", num_classes=0), None)
    before = [features, make_bundle(tmp_path / "bundle")]
    for asked in before:
        with pytest.raises(ArtifactError, match="features"):
            edgecl.predict(asked, jpegs)
    with pytest.raises(DataError, match="nowhere"):
        edgecl.predict(model, tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"\.csv"):
        edgecl.predict(model, jpegs, out=tmp_path / "found.txt")
    with pytest.raises(ArtifactError, match="bundle"):
        edgecl.predict(model, jpegs, precision="fp16")
    with pytest.raises(TargetError, match="classifier"):
        edgecl.export(features, target="ort-cpu", out=tmp_path / "b", softmax=True)
    with pytest.raises(TargetError, match=r"8\.5"):
        edgecl.export(model, target="jetson-nano-jp4", out=tmp_path / "b", input="uint8")
    assert sorted(tmp_path.iterdir()) == sorted(before)
