"""ONNX files with weights elsewhere, as the onnx package and as a hostile writer put them."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecl.onboard.bundle import check_files, check_self_contained, read_manifest, sha256_of_file
from edgecl.onboard.errors import BundleError

from .tiny_bundle import make_bundle, write_manifest


def external(name, location="../secret.bin"):
    """A tensor whose data lies elsewhere."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def inside(name="inside"):
    return numpy_helper.from_array(np.ones(2, np.float32), name)


def graph(nodes=(), initializers=(), sparse=()):
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    made = helper.make_graph(list(nodes), "g", [], [value], list(initializers))
    made.sparse_initializer.extend(sparse)
    return made


def sparse_tensor(values):
    indices = numpy_helper.from_array(np.array([0, 1], np.int64), "indices")
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[4])


def constant(**attribute):
    return helper.make_node("Constant", [], ["y"], **attribute)


def function_with(node):
    return helper.make_function(
        "mine", "F", [], ["y"], [node], opset_imports=[helper.make_opsetid("", 13)], attributes=[]
    )


def if_node(depth, tensor):
    """A Constant within branches within branches."""
    inner = constant(value=tensor)
    for _ in range(depth):
        branch = graph([inner])
        inner = helper.make_node(
            "If", ["c"], ["y"], then_branch=graph([constant(value=inside())]), else_branch=branch
        )
    return inner


PLACES = {
    "initializer": lambda: helper.make_model(graph(initializers=[inside(), external("w")])),
    "sparse initializer": lambda: helper.make_model(graph(sparse=[sparse_tensor(external("w"))])),
    "constant": lambda: helper.make_model(graph([constant(value=external("w"))])),
    "subgraph of a subgraph": lambda: helper.make_model(graph([if_node(3, external("w"))])),
    "function": lambda: helper.make_model(graph(), functions=[function_with(constant(value=external("w")))]),
}


@pytest.mark.parametrize("place", PLACES)
def test_data_elsewhere_is_found_wherever_a_tensor_may_stand(tmp_path, place):
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES[place]().SerializeToString())
    with pytest.raises(BundleError, match=r"'model\.onnx' keeps weights in another file") as caught:
        check_self_contained(path)
    assert caught.value.hint.startswith("do not run this bundle")


@pytest.mark.parametrize("length", [b"\x88\x00", b"\x88\x80\x00", b"\x88\x80\x80\x80\x00"])
def test_a_key_with_a_length_of_more_bytes_than_it_needs_is_found(tmp_path, length):
    entry = b"\x0a" + length + b"location" + b"\x12\x0d../secret.bin"
    pair = onnx.StringStringEntryProto.FromString(entry)
    assert (pair.key, pair.value) == ("location", "../secret.bin")  # as every runtime reads it
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07" + entry)
    with pytest.raises(BundleError, match="keeps weights in another file"):
        check_self_contained(path)


def test_data_elsewhere_as_onnx_itself_saves_it_is_refused_before_a_net_is_loaded(bundle):
    check_files(bundle, read_manifest(bundle))
    path = bundle / "model.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    manifest = read_manifest(bundle)
    manifest["files"]["model.onnx"] = sha256_of_file(path)
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match="keeps weights in another file"):
        check_files(bundle, read_manifest(bundle))


def test_a_class_called_location_is_no_file(tmp_path):
    path = make_bundle(tmp_path / "bundle") / "model.onnx"
    model = onnx.load(path)
    model.metadata_props.add(key="edgecl.classes", value=json.dumps(["location", "dislocation"]))
    onnx.save(model, path)
    check_self_contained(path)


@pytest.mark.parametrize("content", [b"", b"not a net", b"<net name='ir'/>", b"\x3a\x05"])
def test_a_file_that_is_no_net_is_named(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"'model\.onnx' is no ONNX file"):
        check_self_contained(tmp_path / "model.onnx")
