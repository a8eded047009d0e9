"""A published folder is loaded by timm and ONNX Runtime, its card is true, and a hub gets it only when asked."""

from __future__ import annotations

import ast
import json
import re
import shutil
import socket
from typing import Any

import huggingface_hub.constants
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image

from deploy.hub import TOKEN, running_hub
from edgecl.data.loading import eval_image, normalize
from edgecl.deploy import publish as publishing
from edgecl.deploy.publish import crop_fraction, publish
from edgecl.errors import ArtifactError, DeviceError, ParityError
from edgecl.nets.backbone import create_backbone
from edgecl.nets.model_dir import load_model, write_model
from edgecl.onboard.pictures import read_picture
from edgecl.storage.directories import Bundle, ModelDir
from edgecl.storage.record_files import write_record
from edgecl.storage.records import (
    BenchMeasurement,
    BenchRecord,
    CostRecord,
    DeviceInfo,
    EvaluationRecord,
    FewLabelAccuracy,
    Latency,
    Preprocessing,
    ProbeRecord,
    Quantization,
)

# Of these sizes timm's rounding down would miss one pixel.
IMAGES = Preprocessing(image_size=97, resize_size=117, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
HOSTILE = ["plain", "two\nlines | `tick` <b>", "\x1b[2J:"]
SECRET = "/home/me/secret-project"


def write_net(out, *, arch="mobilenetv3_small_100", width=0.5, stem_stride=None, classes=HOSTILE):
    torch.manual_seed(0)
    net = create_backbone(arch, width=width, num_classes=len(classes or ()), stem_stride=stem_stride)
    about = {"width": width, "stem_stride": stem_stride, "classes": classes, "preprocessing": IMAGES}
    data = f"{SECRET}/photos"
    return write_model(out, net, arch=arch, **about, origin="finetuned", made_from=None, data=data, epoch=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier with settled records beside it, made from pictures in a place that is nobody's business."""
    out = tmp_path_factory.mktemp("publish") / "model"
    write_net(out)
    directory = ModelDir(out)
    sides = [1, 3, 97, 97]
    cost = CostRecord(made_from=None, macs=1_234_567, flops=2_469_134, params=5, input=sides)
    write_record(directory.cost_file, cost)
    data = {"data": f"{SECRET}/photos", "test": f"{SECRET}/a|b `c` <i> (held out)"}
    counts = {"n_test": 204, "n_train": 816}
    few = FewLabelAccuracy(mean=71.3, ci95=[68.1, 74.5], draws=[70.0, 72.6], labels_per_class=5)
    probe = ProbeRecord(
        **(data | counts),
        made_from=None,
        knn_top1=81.04,
        knn_ci95=[78.2, 83.3],
        linear_top1=85.0,
        linear_ci95=[82.0, 87.5],
        few_label_top1=few,
        classes=3,
    )
    write_record(directory.probe_file, probe)
    evaluation = EvaluationRecord(
        **(data | counts), made_from=None, top1=91.66, top1_ci95=[87.0, 94.7], epochs=30, settings={}
    )
    write_record(directory.evaluation_file, evaluation)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """The published folder, made while every connection is refused."""
    out = tmp_path_factory.mktemp("published") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        publish(model, out=out)
    return out


def refuse(*_):
    raise AssertionError("a connection was opened")


def from_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def outputs_of(net, images):
    with torch.no_grad():
        return net(images).numpy()


NOISE = torch.randn(3, 3, 97, 97, generator=torch.Generator().manual_seed(1))


# --- what others load ---


def test_timm_loads_the_folder_with_equal_logits_and_the_names_of_the_classes(folder, model):
    net, (own, _) = from_timm(folder), load_model(model)
    assert np.array_equal(outputs_of(net, NOISE), outputs_of(own, NOISE))
    assert net.pretrained_cfg["label_names"] == HOSTILE
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("mobilenetv3_small_050", 3)
    assert not {"tag", "license", "url", "hf_hub_id"} & set(config["pretrained_cfg"])


@pytest.mark.parametrize("size", [(183, 161), (61, 240)])
def test_timms_transform_gives_the_net_what_edgecl_gives_it(folder, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    settings = timm.data.resolve_model_data_config(from_timm(folder))
    found = timm.data.create_transform(**settings, is_training=False)(picture)
    own = eval_image(picture, resize_size=IMAGES.resize_size, image_size=IMAGES.image_size)
    assert torch.allclose(found, normalize(own[None], IMAGES.mean, IMAGES.std)[0], atol=1e-6)


def test_cards_own_code_answers_as_edgecl_does(tmp_path, monkeypatch, capsys, folder, model):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (183, 161, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    done: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), done)
    sizes = {"resize_size": IMAGES.resize_size, "image_size": IMAGES.image_size}
    square = torch.from_numpy(read_picture(tmp_path / "photo.jpg", **sizes)[0]).permute(2, 0, 1)
    expected = outputs_of(load_model(model)[0], normalize(square[None], IMAGES.mean, IMAGES.std))
    assert done["scores"].detach().numpy() == pytest.approx(expected, abs=1e-5)
    assert capsys.readouterr().out == f"{HOSTILE[expected.argmax()]}\n"


def test_crop_fraction_survives_timms_rounding_down():
    for resize in range(8, 400):
        for side in {resize, resize * 7 // 8, resize * 5 // 6}:
            images = IMAGES.model_copy(update={"image_size": side, "resize_size": resize})
            assert int(side / crop_fraction(images)) == resize


def test_onnx_file_computes_the_logits_for_any_batch_and_names_the_classes(folder, model):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    expected = outputs_of(load_model(model)[0], NOISE)
    for count in (1, 3):
        found = session.run(None, {"input": NOISE[:count].numpy()})[0]
        assert np.abs(found - expected[:count]).max() < 1e-4 * np.abs(expected).max()
    names = session.get_modelmeta().custom_metadata_map["names"]
    assert ast.literal_eval(names) == dict(enumerate(HOSTILE))
    assert (folder / "labels.txt").read_text() == "plain\ntwo\\nlines | `tick` <b>\n\\x1b[2J:\n"


# --- the card ---


def test_card_has_a_head_that_yaml_reads_and_leaves_the_licence_to_its_owner(folder):
    _, head, page = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["edgecl", "onnx", "timm"],
    }
    assert "# license: choose one" in head
    assert "mobilenetv3_small_100` at width 0.5, timm's `mobilenetv3_small_050`" in page


def test_card_has_each_measured_number_with_its_conditions(folder):
    page = (folder / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    found = {what: (value, conditions) for what, value, conditions in rows[2:]}
    test = "204 held-out pictures of a\\|b \\`c\\` &lt;i> (held out)"
    assert found["multiply-adds"][0] == "1,234,567"
    assert found["top-1"] == (
        "91.7 % \\[87.0, 94.7\\]",
        f"{test}; fine-tuned on 816 of photos, 30 epochs",
    )
    assert found["kNN top-1"] == (
        "81.0 % \\[78.2, 83.3\\]",
        f"{test}; frozen features, 816 labels of photos",
    )
    assert found["few-label top-1"][1] == f"{test}; frozen features, 5 labels per class, 2 draws"


def test_nothing_published_tells_where_the_pictures_lie(folder):
    for file in folder.iterdir():
        content = file.read_bytes()
        assert b"secret" not in content, file.name
        assert b"/home" not in content, file.name


# --- what timm cannot build ---


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"stem_stride": 1}, "stem of this one has stride 1"),
        ({"width": 0.6}, "no 'mobilenetv3_small_100' at width 0.6"),
        ({"arch": "mobilenetv3_small_075", "width": 0.5}, "at width 0.5"),
    ],
    ids=str,
)
def test_net_that_timm_cannot_build_is_published_as_onnx_alone_and_says_why(
    tmp_path, monkeypatch, folder, about, words
):
    write_net(tmp_path / "model", **about)
    monkeypatch.setattr(publishing, "_checked_onnx", lambda net, record: onnx.load(folder / "model.onnx"))
    record = publish(tmp_path / "model", out=tmp_path / "out")
    assert record.timm is None
    assert words in record.why_not_timm
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("README.md", "edgecl.json", "labels.txt", "model.onnx")
    }
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"{record.why_not_timm}. It is published as ONNX alone" in page
    assert yaml.safe_load(page.split("---\n")[1])["library_name"] == "onnx"


def test_net_trained_for_int8_is_none_of_timms(model):
    net, record = load_model(model)
    record = record.model_copy(update={"quantization": Quantization(keep=[])})
    assert "trained for INT8" in publishing._from_timm(net, record)


# --- a bundle's files ---


@pytest.fixture
def measured_bundle(tmp_path, exported_bundle):
    """The bundle of the carved net, with a measurement."""
    bundle = shutil.copytree(exported_bundle, tmp_path / "bundle")
    latency = Latency(p50=1.2345, ci95_p50=[1.2, 1.3])
    headline = BenchMeasurement(
        precision="fp32", mode="inference", headline=True, latency_ms=latency, marks=["noisy"]
    )
    record = BenchRecord(
        made_from=None,
        runtime="onnxruntime 1.30",
        batch=1,
        threads=2,
        device=DeviceInfo(name="Some | board"),
        measurements=[headline],
    )
    write_record(bundle / "bench-some.json", record)
    return bundle


def test_bundle_gives_its_files_and_what_was_measured_of_them(tmp_path, carved_model, measured_bundle):
    record = publish(carved_model, out=tmp_path / "out", bundle=measured_bundle)
    manifest = Bundle(measured_bundle).read()
    assert record.files["model.onnx"] == manifest.files["model.onnx"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| fp32: median latency | 1.23 ms \\[1.2, 1.3\\] | "
        "Some \\| board, onnxruntime 1.30, inference, batch 1, 2 threads; marked noisy |"
    ) in page
    assert "no classifier" in page


def test_bundle_of_another_net_is_refused(tmp_path, model, measured_bundle):
    with pytest.raises(ArtifactError, match="was not made from"):
        publish(model, out=tmp_path / "out", bundle=measured_bundle)
    (measured_bundle / "model.onnx").write_bytes(b"\x08other")
    with pytest.raises(ArtifactError, match="hash"):
        publish(model, out=tmp_path / "out", bundle=measured_bundle)
    assert not (tmp_path / "out").exists()


# --- what goes wrong leaves nothing ---


def test_onnx_file_that_computes_something_else_is_not_published(tmp_path, model, monkeypatch, folder):
    other = onnx.load(folder / "model.onnx")
    for tensor in other.graph.initializer:
        if tensor.name.startswith("classifier"):
            tensor.raw_data = bytes(len(tensor.raw_data))
    monkeypatch.setattr(publishing, "onnx_from_net", lambda *_, **__: other)
    with pytest.raises(ParityError, match="disagrees") as caught:
        publish(model, out=tmp_path / "out")
    assert "nothing was published" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_published_folder_and_nothing_else(tmp_path, folder, model):
    with pytest.raises(ArtifactError, match="already exists"):
        publish(model, out=folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="replaces only a published directory"):
        publish(model, out=tmp_path / "mine", force=True)
    with pytest.raises(ArtifactError, match="lies inside"):
        publish(model, out=model / "out")


# --- the hub ---


def test_pushed_files_are_those_of_the_folder(tmp_path, edgecl_process, model):
    """By the command, in a process of its own: what the hub holds then is what timm loads."""
    with running_hub() as hub:
        # The store of chunks that Xet speaks to is not the hub's API.
        settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        words = ["publish", model, "--out", tmp_path / "out"]
        done = edgecl_process(
            *words, "--push", "me/flowers", env={**settings, "HF_HOME": str(tmp_path / "hf")}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"-> {tmp_path / 'out'}, {hub.address}/me/flowers"
        pushed = hub.repositories["me/flowers"]
    assert pushed == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert len(hub.stored) == sum(name.endswith((".onnx", ".safetensors")) for name in pushed)
    assert '"hf-hub:me/flowers"' in pushed["README.md"].decode()


@pytest.mark.parametrize("name", ["flowers", "me/flo wers", "me/../you", "a/b/c", "--me/x", ""])
def test_wrong_name_of_a_repository_is_refused_before_work(tmp_path, model, name):
    with pytest.raises(DeviceError, match="USER/NAME"):
        publish(model, out=tmp_path / "out", push=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trouble", ["no login", "no network"])
def test_hub_that_refuses_or_is_away_is_a_named_error_and_the_folder_stays(
    tmp_path, monkeypatch, carved_model, exported_bundle, trouble
):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with running_hub() as hub:
        address = hub.address if trouble == "no login" else "http://127.0.0.1:9"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(DeviceError, match="'me/flowers' was not pushed") as caught:
            publish(carved_model, out=tmp_path / "out", bundle=exported_bundle, push="me/flowers")
    assert ("401" in caught.value.problem) == (trouble == "no login")
    assert caught.value.where == {"hub": address}
    assert f"hf upload me/flowers {tmp_path / 'out'}" in caught.value.hint
    assert (tmp_path / "out" / "edgecl.json").is_file()
