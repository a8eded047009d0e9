"""The rewritten graph: the same tensors as the exporter's under ONNX Runtime and torch, in the target's opset and forms."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgecl.deploy.graph import portable
from edgecl.deploy.session import open_tensors
from edgecl.errors import ParityError, TargetError
from edgecl.nets.backbone import create_backbone, example_side
from edgecl.nets.catalogue import NETS

from .sketch import kinds, model_of, relative, run


def make_net(arch, *, classes=0):
    """A net whose batch norms did something, so that folding them leaves biases."""
    torch.manual_seed(0)
    net = create_backbone(arch, num_classes=classes).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def export(net, *, dynamic=False):
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    side = example_side(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net,
            (torch.zeros(2 if dynamic else 1, 3, side, side),),
            dynamo=True,
            opset_version=18,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},) if dynamic else None,
            verbose=False,
        )
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "edgecl.mean", "[0.5]"
    return model


def images(count, *, side=64):
    return np.random.default_rng(count).normal(size=(count, 3, side, side)).astype(np.float32)


def opset_of(model):
    return {entry.domain: entry.version for entry in model.opset_import}


CASES = {"small-any-batch": ("mobilenetv3_small_100", 5, True), "features": ("mobilenetv1_100", 0, False)}


@pytest.fixture(scope="module")
def cases():
    """Name -> (torch net, exported graph), made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            arch, classes, dynamic = CASES[name]
            net = make_net(arch, classes=classes)
            made[name] = (net, export(net, dynamic=dynamic))
        return made[name]

    return get


def check_same(net, exported, *, opset, hard_swish, batch):
    rewritten = portable(exported, opset=opset, hard_swish=hard_swish)
    onnx.checker.check_model(rewritten, full_check=True)
    seen = images(batch, side=example_side(net))
    found = run(rewritten, seen)
    with torch.no_grad():
        assert relative(found, net(torch.from_numpy(seen)).numpy()) < 1e-5
    assert relative(found, run(exported, seen)) < 1e-5
    assert opset_of(rewritten) == {"": opset}
    return rewritten


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("opset", "hard_swish"),
    [(13, "hard_sigmoid"), (13, "clip"), (17, "keep"), (18, "keep"), (19, "hard_sigmoid"), (22, "keep")],
)
def test_rewritten_net_computes_what_torch_and_the_exported_graph_compute(cases, name, opset, hard_swish):
    net, exported = cases(name)
    for batch in (1, 3, 8) if CASES[name][2] else (1,):
        rewritten = check_same(net, exported, opset=opset, hard_swish=hard_swish, batch=batch)
        assert not {"ReduceMean", "Reshape"} & set(kinds(rewritten))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("arch", [*NETS, "resnet18"])
def test_every_net_of_the_catalogue_is_rewritten(arch, classes):
    net = make_net(arch, classes=classes)
    for dynamic in (False, True):
        exported = export(net, dynamic=dynamic)
        for opset in (13, 17, 18, 19):
            for hard_swish in ("hard_sigmoid", "clip") if opset == 13 else ("keep",):
                check_same(net, exported, opset=opset, hard_swish=hard_swish, batch=3 if dynamic else 1)


def test_part_of_a_shape_is_sliced_where_opset_15_is_not_there():
    graph = helper.make_graph(
        [helper.make_node("Shape", ["x"], ["y"], start=1, end=-1)],
        "part",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 7, 9])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    rewritten = portable(model, opset=13, hard_swish="keep")
    assert kinds(rewritten) == {"Shape": 1, "Slice": 1}
    assert run(rewritten, np.zeros((3, 5, 7, 9), np.float32)).tolist() == [5, 7]


def test_operators_are_those_asked_for(cases):
    _, exported = cases("small-any-batch")
    assert kinds(exported)["ReduceMean"] == 10, "the exporter changed: look at what it writes now"
    body = {"Conv": 53, "Relu": 14, "GlobalAveragePool": 10, "Add": 6, "Flatten": 1, "Gemm": 1}
    kept = portable(exported, opset=17, hard_swish="keep")
    assert kinds(kept) == {**body, "HardSwish": 19, "HardSigmoid": 9, "Mul": 9}
    sigmoid = portable(exported, opset=17, hard_swish="hard_sigmoid")
    assert kinds(sigmoid) == {**body, "HardSigmoid": 28, "Mul": 28}
    clip = portable(exported, opset=17, hard_swish="clip")
    assert kinds(clip) == {**body, "Add": 6 + 28, "Clip": 28, "Mul": 28 + 28}


@pytest.mark.parametrize(
    ("opset", "ir"), [(13, 7), (14, 7), (15, 8), (17, 8), (18, 8), (19, 9), (20, 9), (21, 10), (22, 10)]
)
def test_file_version_is_the_oldest_that_carries_the_opset(cases, opset, ir):
    _, exported = cases("features")
    rewritten = portable(exported, opset=opset, hard_swish="hard_sigmoid")
    assert (opset_of(rewritten), rewritten.ir_version) == ({"": opset}, ir)
    assert helper.find_min_ir_version_for(list(rewritten.opset_import)) <= ir


def tensors(model, seen, names):
    found = dict(open_tensors(model, names, optimization="NONE")(seen, len(seen)))
    return [found[name] for name in names]


def test_every_tensor_keeps_its_name_and_its_values(cases):
    _, exported = cases("small-any-batch")
    names = [node.output[0] for node in exported.graph.node if node.op_type != "Constant"]
    assert len(names) > 100
    rewritten = portable(exported, opset=13, hard_swish="clip")
    seen = images(2)
    for name, found, expected in zip(
        names, tensors(rewritten, seen, names), tensors(exported, seen, names), strict=True
    ):
        assert relative(found, expected) < 1e-5, name


def test_names_are_unique_and_every_weight_is_read(cases):
    rewritten = portable(cases("small-any-batch")[1], opset=13, hard_swish="clip")
    nodes = [node.name for node in rewritten.graph.node]
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    read = {name for node in rewritten.graph.node for name in node.input}
    assert {tensor.name for tensor in rewritten.graph.initializer} <= read


def test_given_graph_is_left_as_it_was_and_metadata_is_carried_over(cases):
    exported = cases("features")[1]
    before = exported.SerializeToString(deterministic=True)
    rewritten = portable(exported, opset=13, hard_swish="clip")
    assert exported.SerializeToString(deterministic=True) == before
    assert [(entry.key, entry.value) for entry in rewritten.metadata_props] == [("edgecl.mean", "[0.5]")]
    assert not any(node.metadata_props or node.doc_string for node in rewritten.graph.node)
    assert b"site-packages" not in rewritten.SerializeToString()


def graph_of(nodes, *, opset, shape, weights=None, out=None):
    return model_of(nodes, weights or {}, shape=shape, out=out, ends="xy", opset=opset)


@pytest.mark.parametrize("hard_swish", ["hard_sigmoid", "clip"])
def test_forms_of_hard_swish_agree_with_torch_everywhere(hard_swish):
    values = np.linspace(-9, 9, 4001, dtype=np.float32).reshape(1, -1)
    model = graph_of(
        [helper.make_node("HardSwish", ["x"], ["y"])], opset=18, shape=values.shape, out=values.shape
    )
    found = run(portable(model, opset=13, hard_swish=hard_swish), values)
    expected = torch.nn.functional.hardswish(torch.from_numpy(values).double()).numpy()
    assert np.abs(found - expected).max() < 2e-6


@pytest.mark.parametrize(("alpha", "beta"), [(1 / 6, 0.5), (0.2, 0.5), (0.3, 0.25)])
def test_clip_form_of_hard_sigmoid_holds_for_any_slope(alpha, beta):
    values = np.linspace(-9, 9, 4001, dtype=np.float32).reshape(1, -1)
    node = helper.make_node("HardSigmoid", ["x"], ["y"], alpha=alpha, beta=beta)
    model = graph_of([node], opset=18, shape=values.shape, out=values.shape)
    rewritten = portable(model, opset=17, hard_swish="clip")
    assert kinds(rewritten) == {"Add": 1, "Clip": 1, "Mul": 1}
    expected = np.clip(alpha * values.astype(np.float64) + beta, 0, 1)
    assert np.abs(run(rewritten, values) - expected).max() < 1e-5


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_mean_over_height_and_width_is_a_pool(keepdims, axes):
    out = (2, 4, 1, 1) if keepdims else (2, 4)
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)
    model = graph_of([node], opset=18, shape=(2, 4, 5, 6), out=out, weights={"axes": np.array(axes)})
    rewritten = portable(model, opset=13, hard_swish="clip")
    assert list(kinds(rewritten)) == (["GlobalAveragePool"] if keepdims else ["GlobalAveragePool", "Flatten"])
    seen = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    assert relative(run(rewritten, seen), seen.mean((2, 3), keepdims=bool(keepdims))) < 1e-6


def test_other_reductions_take_their_axes_as_the_opset_wants_them():
    seen = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    for kind, reduced in (("ReduceMean", seen.mean((1, 2))), ("ReduceMax", seen.max((1, 2)))):
        node = helper.make_node(kind, ["x", "axes"], ["y"], keepdims=0, noop_with_empty_axes=0)
        new = graph_of([node], opset=18, shape=seen.shape, out=(2, 6), weights={"axes": np.array([1, 2])})
        old = portable(new, opset=17, hard_swish="keep")
        assert [len(node.input) for node in old.graph.node] == [1]
        assert not old.graph.initializer
        assert relative(run(old, seen), reduced) < 1e-6


@pytest.mark.parametrize("target", [(2, -1), (-1, 60), (2, 60), (0, -1)])
def test_reshape_that_keeps_the_first_dimension_is_a_flatten(target):
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    model = graph_of([node], opset=18, shape=(2, 3, 4, 5), out=(2, 60), weights={"shape": np.array(target)})
    assert kinds(portable(model, opset=13, hard_swish="clip")) == {"Flatten": 1}


@pytest.mark.parametrize("target", [(6, 20), (2, 3, 20), (1, 120)])
def test_another_reshape_stays_one(target):
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1)
    model = graph_of([node], opset=18, shape=(2, 3, 4, 5), out=target, weights={"shape": np.array(target)})
    rewritten = portable(model, opset=13, hard_swish="clip")
    assert kinds(rewritten) == {"Reshape": 1}
    assert not rewritten.graph.node[0].attribute, "opset 13 has no allowzero"
    seen = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(run(rewritten, seen), seen.reshape(target))


def test_constant_nodes_become_weights():
    three = numpy_helper.from_array(np.array(3, np.float32))
    nodes = [helper.make_node("Constant", [], ["c"], value=three), helper.make_node("Mul", ["x", "c"], ["y"])]
    rewritten = portable(graph_of(nodes, opset=18, shape=(2,), out=(2,)), opset=13, hard_swish="clip")
    assert kinds(rewritten) == {"Mul": 1}
    np.testing.assert_array_equal(run(rewritten, np.array([1, 2], np.float32)), [3, 6])


def test_operator_that_the_opset_lacks_is_refused():
    model = graph_of([helper.make_node("Gelu", ["x"], ["y"], name="act7")], opset=20, shape=(1, 4, 8, 8))
    with pytest.raises(TargetError, match="opset 17 does not have 'Gelu' of opset 20") as caught:
        portable(model, opset=17, hard_swish="clip")
    assert caught.value.where == {"node": "act7"}


def test_type_that_the_opset_lacks_is_a_parity_error():
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("Relu", ["i"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph_of(nodes, opset=18, shape=(2,), out=(2,))
    with pytest.raises(ParityError, match="the graph does not hold in opset 13") as caught:
        portable(model, opset=13, hard_swish="clip")
    assert "set [graph] opset of the target to 18" in str(caught.value)


@pytest.mark.parametrize("opset", [13, 16, 17, 22])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_is_written_in_every_opset(opset, biased):
    random = np.random.default_rng(0)
    tokens = (3 + 5 * random.normal(size=(2, 4, 6))).astype(np.float32)
    given = {name: random.normal(size=6).astype(np.float32) for name in ("scale", "bias")[: 1 + biased]}
    node = helper.make_node("LayerNormalization", ["x", *given], ["y"], name="norm", epsilon=0.5)
    model = graph_of([node], opset=18, shape=tokens.shape, out=tokens.shape, weights=given)
    written = portable(model, opset=opset, hard_swish="hard_sigmoid")
    assert ("LayerNormalization" in kinds(written)) is (opset >= 17)
    wide = tokens.astype(np.float64)
    centered = wide - wide.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 0.5) * given["scale"]
    np.testing.assert_allclose(run(written, tokens), expected + given.get("bias", 0), rtol=1e-5, atol=1e-5)
