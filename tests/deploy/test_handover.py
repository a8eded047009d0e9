"""What a bundle hands to other programs is run, compiled or parsed here as far as the machine goes."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgecl.data.loading import eval_image, normalize
from edgecl.deploy.contract import contract_of
from edgecl.deploy.handover import deepstream, write_handover
from edgecl.deploy.readme import bundle_readme
from edgecl.onboard.pictures import read_picture
from edgecl.storage.directories import Bundle
from edgecl.storage.records import (
    BundlePrecision,
    ExportedNet,
    InputForm,
    Manifest,
    OutputForm,
    Preprocessing,
    Tolerance,
)

SIDE = 24
IMAGES = Preprocessing(image_size=SIDE, resize_size=29, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
HOSTILE = ['a "quoted" \\ name', "two\nlines;\x1b[2J", "плёс"]
HEADERS = Path(__file__).parent / "headers"
RANDOM = np.random.default_rng(0)


def float_net(*, batch):
    """Three outputs from normalized pictures, by a convolution whose zero padding counts."""
    weights = RANDOM.normal(size=(3, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node(
            "Conv", ["input", "weights"], ["conv"], pads=[1, 1, 1, 1], strides=[2, 2], name="conv"
        ),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["output"], name="flatten"),
    ]
    return model_of(
        nodes, TensorProto.FLOAT, [batch, 3, SIDE, SIDE], [numpy_helper.from_array(weights, "weights")]
    )


def byte_net(*, batch):
    """The mean of each channel of raw pictures, channels last."""
    axes = numpy_helper.from_array(np.array([1, 2]), "axes")
    nodes = [
        helper.make_node("Cast", ["input"], ["cast"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("ReduceMean", ["cast", "axes"], ["output"], keepdims=0, name="mean"),
    ]
    return model_of(nodes, TensorProto.UINT8, [batch, SIDE, SIDE, 3], [axes])


def model_of(nodes, kind, shape, weights):
    inputs = [helper.make_tensor_value_info("input", kind, shape)]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [shape[0], 3])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def write_bundle(out, *, runtime="onnxruntime", bytes_in=False, batch=1, max_batch=None, classes=HOSTILE):
    out.mkdir()
    net = (byte_net if bytes_in else float_net)(batch="batch" if max_batch else batch)
    onnx.checker.check_model(net, full_check=True)
    onnx.save(net, out / "model.onnx")
    fp32 = BundlePrecision(
        model="model.onnx",
        form="fp32",
        tolerance=Tolerance(max_relative_difference=1e-3, top1_agreement=0.99),
    )
    form = {"dtype": "uint8", "layout": "nhwc", "normalization": "inside"} if bytes_in else {}
    shape = [SIDE, SIDE, 3] if bytes_in else [3, SIDE, SIDE]
    manifest = Manifest(
        made_from=None,
        target_name="mine",
        runtime=runtime,
        precision="fp32",
        precisions={"fp32": fp32},
        input=InputForm(
            name="input",
            shape=[batch, *shape],
            dynamic_batch=max_batch is not None,
            max_batch=max_batch or batch,
            **form,
        ),
        output=OutputForm(name="output", shape=[batch, 3]),
        net=ExportedNet(arch="mobilenetv3_small_050", width=0.5),
        preprocessing=IMAGES,
        classes=classes,
        files={},
    )
    return manifest, write_handover(Bundle(out), manifest)


@pytest.fixture
def without_trtexec(monkeypatch):
    """Leave out trtexec.sh, which has tests of its own and needs a target's commands."""
    monkeypatch.setattr("edgecl.deploy.handover.trtexec.write", lambda bundle, manifest: {})


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A photograph's stand-in: wider than high, and of another color everywhere."""
    path = tmp_path_factory.mktemp("picture") / "wide.png"
    rows, columns = np.mgrid[0:61, 0:83]
    pixels = np.stack([columns * 3, rows * 4, (rows + columns) % 251], axis=2)
    Image.fromarray((pixels + RANDOM.integers(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)).save(path)
    return path


def cropped(picture):
    """The (3, H, W) uint8 pixels that edgecl itself evaluates."""
    with Image.open(picture) as image:
        return eval_image(image.convert("RGB"), resize_size=IMAGES.resize_size, image_size=SIDE)


def expected_scores(bundle, picture, **form):
    return scores_of(bundle, cropped(picture), **form)


def scores_of(bundle, pixels, *, bytes_in=False, batch=1, **_):
    pixels = pixels[None]
    images = pixels.permute(0, 2, 3, 1) if bytes_in else normalize(pixels, IMAGES.mean, IMAGES.std)
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"input": np.repeat(images.numpy(), batch, axis=0)})[0][0]


FORMS = pytest.mark.parametrize(
    "form", [{"batch": 2}, {"batch": 2, "max_batch": 4}, {"bytes_in": True}], ids=str
)


def check_answer(lines, scores, labels):
    """The best class first, each with its score."""
    found = [line.split("\t")[-2:] for line in lines]
    order = np.argsort(-scores)
    assert [name for name, _ in found] == [labels[place] for place in order]
    assert [float(score) for _, score in found] == pytest.approx(scores[order].tolist(), rel=1e-4, abs=1e-5)


# --- labels ---


def test_labels_are_a_line_each_whatever_the_classes_are_called(tmp_path):
    manifest, _ = write_bundle(tmp_path / "b")
    lines = (tmp_path / "b" / "labels.txt").read_text(encoding="utf-8").split("\n")
    assert lines == ['a "quoted" \\ name', "two\\nlines;\\x1b[2J", "плёс", ""]
    assert manifest.classes == HOSTILE


def test_net_without_classifier_has_neither_labels_nor_their_readers(tmp_path, picture):
    _, lines = write_bundle(tmp_path / "b", classes=None)
    assert not (tmp_path / "b" / "labels.txt").exists()
    assert "labels" not in "".join(path.read_text() for path in (tmp_path / "b").glob("*.p*"))
    assert "labels.txt" not in lines
    done = run(sys.executable, tmp_path / "b" / "main.py", picture)
    scores = expected_scores(tmp_path / "b", picture)
    assert [float(one) for one in done.stdout.split("\t")[1:]] == pytest.approx(scores.tolist(), rel=1e-4)


# --- programs ---


def run(*words, **options):
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=True, timeout=60, **options
    )


@FORMS
def test_python_program_answers_as_edgecl_evaluates(tmp_path, picture, form):
    manifest, _ = write_bundle(tmp_path / "b", **form)
    done = run(sys.executable, tmp_path / "b" / "main.py", picture)
    scores = expected_scores(tmp_path / "b", picture, **form)
    check_answer(done.stdout.splitlines(), scores, contract_of(manifest).labels)


def odd_pictures(folder):
    """Pictures that are turned, of 16 bits or transparent, of sides that ImageMagick rounds as edgecl does."""
    pixels = RANDOM.integers(0, 256, (61, 122, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3].copy()).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(pixels).save(folder / "transparent.png")
    return sorted(folder.iterdir())


def test_python_program_reads_odd_pictures_as_edgecl_does(tmp_path):
    manifest, _ = write_bundle(tmp_path / "b")
    (tmp_path / "odd").mkdir()
    labels, found = contract_of(manifest).labels, {}
    files = odd_pictures(tmp_path / "odd")
    done = run(sys.executable, tmp_path / "b" / "main.py", *files)
    for line in done.stdout.splitlines():
        name, label, score = line.split("\t")
        found[name, label] = float(score)
    for file in files:
        square, _ = read_picture(file, resize_size=IMAGES.resize_size, image_size=SIDE)
        scores = scores_of(tmp_path / "b", torch.from_numpy(square).permute(2, 0, 1))
        assert [found[str(file), label] for label in labels] == pytest.approx(scores.tolist(), abs=1e-4)


def magick_is_there():
    """Some other program may have the name."""
    convert = shutil.which("convert")
    return convert and b"ImageMagick" in subprocess.run([convert, "--version"], capture_output=True).stdout


@pytest.mark.skipif(not magick_is_there(), reason="no ImageMagick on the PATH")
def test_imagemagicks_line_gives_edgecls_pixels(tmp_path):
    write_bundle(tmp_path / "b")
    (line,) = re.findall("//   convert photo.jpg (.*) picture.ppm", (tmp_path / "b" / "main.cpp").read_text())
    (tmp_path / "odd").mkdir()
    for file in odd_pictures(tmp_path / "odd"):
        run("convert", file, *line.split(), tmp_path / "found.ppm")
        found, _ = read_picture(tmp_path / "found.ppm", resize_size=SIDE, image_size=SIDE)
        expected, _ = read_picture(file, resize_size=IMAGES.resize_size, image_size=SIDE)
        assert np.abs(found.astype(int) - expected).max() <= 2, file.name


compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")


def compiled(source, *words):
    program = source.with_suffix("")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    run("g++", "-std=c++17", *warnings, source, f"-I{HEADERS}", *words, "-o", program)
    return program


def write_ppm(picture, path):
    Image.fromarray(cropped(picture).permute(1, 2, 0).numpy()).save(path)
    return path


@compiles
@FORMS
def test_cpp_program_answers_as_edgecl_evaluates(tmp_path, picture, form):
    """By the library of onnxruntime's wheel, and declarations of our own of what is called."""
    manifest, _ = write_bundle(tmp_path / "b", **form)
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    program = compiled(tmp_path / "b" / "main.cpp", tmp_path / "libonnxruntime.so.1")
    options = {"cwd": tmp_path / "b", "env": {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}}
    done = run(program, write_ppm(picture, tmp_path / "p.ppm"), **options)
    scores = expected_scores(tmp_path / "b", picture, **form)
    check_answer(done.stdout.splitlines(), scores, contract_of(manifest).labels)

    Image.new("RGB", (SIDE, SIDE + 1)).save(tmp_path / "wrong.ppm")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(program, tmp_path / "wrong.ppm", **options)
    assert f"not a binary PPM of {SIDE} x {SIDE} pixels" in caught.value.stderr


@compiles
@pytest.mark.usefixtures("without_trtexec")
def test_tensorrt_program_hands_the_picture_over_and_prints_what_comes_back(tmp_path, picture):
    """Against declarations of our own, behind which each output is the mean of a channel of the input."""
    manifest, _ = write_bundle(tmp_path / "b", runtime="tensorrt")
    program = compiled(tmp_path / "b" / "main_tensorrt.cpp")
    (tmp_path / "engine.plan").write_bytes(b"plan")
    ppm = write_ppm(picture, tmp_path / "p.ppm")
    done = run(program, tmp_path / "engine.plan", ppm, cwd=tmp_path / "b")
    means = normalize(cropped(picture)[None], IMAGES.mean, IMAGES.std).mean((0, 2, 3)).numpy()
    check_answer(done.stdout.splitlines(), means, contract_of(manifest).labels)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(program, tmp_path / "none.plan", ppm, cwd=tmp_path / "b")
    assert "cannot load the engine" in caught.value.stderr


# --- Triton ---


def triton_config(text):
    """Parse a configuration by Triton's own descriptor, without the rest of its client."""
    client = importlib.util.find_spec("tritonclient")
    if client is None:
        pytest.skip("tritonclient is not installed")
    path = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(text, module.ModelConfig())


@FORMS
def test_triton_repository_says_what_the_file_in_it_takes_and_gives(tmp_path, form):
    write_bundle(tmp_path / "b", **form)
    done = run("sh", tmp_path / "b" / "triton.sh", tmp_path / "models of mine")
    net = tmp_path / "models of mine" / "mobilenetv3-small-050-0-5"
    assert done.stdout == f"{net}\n"
    session = onnxruntime.InferenceSession(net / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    config = triton_config((net / "config.pbtxt").read_text())
    assert (config.backend, config.max_batch_size) == ("onnxruntime", form.get("max_batch", 0))
    kinds = {"tensor(float)": "TYPE_FP32", "tensor(uint8)": "TYPE_UINT8"}
    for said, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        ((one,), (other,)) = said, found
        assert one.name == other.name
        assert (
            type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[one.data_type].name
            == kinds[other.type]
        )
        assert list(one.dims) == (other.shape[1:] if config.max_batch_size else other.shape)
    labels = (net / config.output[0].label_filename).read_text(encoding="utf-8")
    assert labels.count("\n") == 3
    assert [group.Kind.Name(group.kind) for group in config.instance_group] == ["KIND_CPU"]


# --- DeepStream ---


@pytest.fixture
def for_deepstream(tmp_path, without_trtexec):
    write_bundle(tmp_path / "b", runtime="tensorrt")
    config = configparser.ConfigParser()
    config.read(tmp_path / "b" / "deepstream.txt")
    return tmp_path / "b", dict(config["property"])


def test_deepstreams_net_gives_the_probabilities_of_the_bundles_net(for_deepstream, picture):
    """Padding included: the formula in float32, as nvinfer computes it, into the file that the configuration names."""
    bundle, config = for_deepstream
    offsets = np.float32(config["offsets"].split(";")).reshape(3, 1, 1)
    images = np.float32(config["net-scale-factor"]) * (cropped(picture).numpy().astype(np.float32) - offsets)
    net = onnxruntime.InferenceSession(bundle / config["onnx-file"], providers=["CPUExecutionProvider"])
    found = net.run([config["output-blob-names"]], {"input": images[None]})[0][0]
    scores = np.exp(expected_scores(bundle, picture).astype(np.float64))
    assert found == pytest.approx(scores / scores.sum(), rel=1e-5)
    assert config["infer-dims"] == f"3;{SIDE};{SIDE}"
    names = (bundle / config["labelfile-path"]).read_text(encoding="utf-8")
    assert names.removesuffix("\n").split(";") == ['a "quoted" \\ name', "two\\nlines,\\x1b[2J", "плёс"]


def test_net_that_ends_in_softmax_gets_no_second_one(tmp_path, without_trtexec):
    manifest, _ = write_bundle(tmp_path / "b", runtime="tensorrt")
    for softmax in (False, True):
        manifest.output.softmax = softmax
        write_handover(Bundle(tmp_path / "b"), manifest)
        nodes = onnx.load(tmp_path / "b" / "deepstream.onnx").graph.node
        assert [node.op_type for node in nodes].count("Softmax") == (not softmax)


def test_several_classes_in_a_picture_are_no_classifier_of_nvinfers(tmp_path, without_trtexec):
    manifest, _ = write_bundle(tmp_path / "b", runtime="tensorrt")
    manifest.net.label_sets = True
    lines = write_handover(Bundle(tmp_path / "b"), manifest)
    text = (tmp_path / "b" / "deepstream.txt").read_text()
    assert "network-type=100" in text
    assert "labelfile" not in text
    assert "Softmax" not in {
        node.op_type for node in onnx.load(tmp_path / "b" / "deepstream.onnx").graph.node
    }
    assert "the sigmoid of each output" in bundle_readme(manifest, lines)


def test_net_that_begins_otherwise_multiplies_its_input(picture):
    images = RANDOM.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    ratios = [1.5, 0.25, 3.0]
    pool = helper.make_node("GlobalAveragePool", ["input"], ["pool"], name="pool")
    flat = helper.make_node("Flatten", ["pool"], ["output"], name="flatten")
    model = model_of([pool, flat], TensorProto.FLOAT, [1, 3, SIDE, SIDE], [])
    folded = deepstream.fold_scale(model, ratios).SerializeToString()
    found = onnxruntime.InferenceSession(folded, providers=["CPUExecutionProvider"]).run(
        None, {"input": images}
    )
    assert found[0][0] == pytest.approx(images[0].mean((1, 2)) * ratios, abs=1e-5)


def test_deepstream_is_for_tensorrt_and_normalized_pictures_alone(tmp_path, without_trtexec):
    for name, form in (("cpu", {}), ("bytes", {"runtime": "tensorrt", "bytes_in": True})):
        _, lines = write_bundle(tmp_path / name, **form)
        assert not [file for file in (tmp_path / name).iterdir() if "deepstream" in file.name]
        assert not [line for line in lines if "deepstream" in line]


# --- the README ---


def test_readme_says_what_happens_to_a_picture_and_what_each_file_is_for(tmp_path):
    manifest, lines = write_bundle(tmp_path / "b")
    text = bundle_readme(manifest, lines)
    for words in ("shorter side resized to 29 pixels", "bilinear, antialiased", f"center {SIDE} x {SIDE}"):
        assert words in text
    for name in ("labels.txt", "triton.sh", "main.py", "main.cpp"):
        assert f"\n{name} " in text
        assert (tmp_path / "b" / name).is_file()
