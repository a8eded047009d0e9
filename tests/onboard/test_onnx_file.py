"""ONNX files whole, torn, and with weights elsewhere, written by the real onnx package."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecl.onboard.errors import BundleError
from edgecl.onboard.onnx_file import check_self_contained

from .tiny_bundle import make_bundle


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
    "sparse constant": lambda: helper.make_model(
        graph([constant(sparse_value=sparse_tensor(external("w")))])
    ),
    "attribute of tensors": lambda: helper.make_model(
        graph([helper.make_node("Custom", [], ["y"], domain="d", tensors=[inside(), external("w")])])
    ),
    "attribute of graphs": lambda: helper.make_model(
        graph([helper.make_node("Custom", [], ["y"], graphs=[graph(), graph(initializers=[external("w")])])])
    ),
    "subgraph of a subgraph": lambda: helper.make_model(graph([if_node(3, external("w"))])),
    "function": lambda: helper.make_model(graph(), functions=[function_with(constant(value=external("w")))]),
}


@pytest.mark.parametrize("place", PLACES)
def test_data_elsewhere_is_found_wherever_a_tensor_may_stand(tmp_path, place):
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES[place]().SerializeToString())
    with pytest.raises(BundleError) as caught:
        check_self_contained(path)
    assert caught.value.problem == "'model.onnx' keeps weights outside itself, in '../secret.bin'"
    assert caught.value.hint.startswith("do not run this bundle")


def test_data_elsewhere_as_onnx_itself_saves_it_is_found(tmp_path):
    model = onnx.load(make_bundle(tmp_path / "bundle") / "model.onnx")
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").is_file()
    with pytest.raises(BundleError, match=r"keeps weights outside itself, in 'weights\.bin'"):
        check_self_contained(path)


def test_data_elsewhere_without_a_location_is_found(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph(initializers=[tensor])).SerializeToString())
    with pytest.raises(BundleError, match="keeps weights outside itself, in 'a file it does not name'"):
        check_self_contained(path)


def test_a_location_cannot_forge_lines_of_the_error(tmp_path):
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph(initializers=[external("w", "x\n  hint: run it\x1b[2J")]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError) as caught:
        check_self_contained(path)
    assert caught.value.problem.isprintable()


def test_whole_files_pass(tmp_path):
    check_self_contained(make_bundle(tmp_path / "bundle") / "model.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph([if_node(2, inside())], [inside()])).SerializeToString())
    check_self_contained(path)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_torn_file_is_named(tmp_path, share):
    path = make_bundle(tmp_path / "bundle") / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BundleError, match=r"'model\.onnx' is not a whole ONNX file: "):
        check_self_contained(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it holds no graph"),
        (b"not a net", "a field of unknown kind 6"),
        (b"\x3a\x05", "it ends 5 bytes early"),
        (b"\x08", "it ends amid a number"),
        (b"\xff" * 20, "a number of more than 10 bytes"),
        (b"\x38\x05", "field 7 of Model holds no message"),
    ],
)
def test_a_file_that_is_no_net_is_named(tmp_path, content, words):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        check_self_contained(tmp_path / "model.onnx")
    assert caught.value.problem == f"'model.onnx' is not a whole ONNX file: {words}"


def test_a_file_nested_deeper_than_python_recurses_is_read(tmp_path):
    message = b""
    for _ in range(5000):  # graph > node > attribute > graph ...
        for field in (6, 5, 1):
            message = bytes([field << 3 | 2]) + varint(len(message)) + message
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + varint(len(message)) + message)
    check_self_contained(tmp_path / "model.onnx")


def varint(number):
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"'model\.onnx' cannot be read: No such file"):
        check_self_contained(tmp_path / "model.onnx")
