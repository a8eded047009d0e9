"""The structure of a graph: its groups, its first block, and what each form may quantize."""

from __future__ import annotations

from collections import Counter

from edgecl.deploy.graph_index import baseline_keep, default_keep, first_block, quantizable

from .sketch import TENSORRT_FORMS, named, sketch_net


def test_groups_are_found_by_structure():
    assert default_keep(sketch_net()) == {
        "squeeze_excite": ["reduce_Conv", "reduce_act_Relu", "excite_Conv", "gate_HardSigmoid"],
        "first_conv": ["stem_Conv"],
        "classifier": ["output_Gemm"],
    }


def test_pool_before_the_head_is_no_squeeze_and_excitation():
    assert default_keep(sketch_net(classifier=False))["classifier"] == []
    groups = default_keep(sketch_net())
    assert "head_Conv" not in {name for names in groups.values() for name in names}


def test_baseline_is_disjoint_from_what_is_quantized():
    model = sketch_net()
    assert baseline_keep(model, "int8-cpu") == ["stem_Conv"]
    assert quantizable(model, "int8-cpu") == [
        "expand_Conv", "depth_Conv", "reduce_Conv", "excite_Conv", "project_Conv", "head_Conv", "output_Gemm",
    ]  # fmt: skip
    for form in TENSORRT_FORMS:
        assert quantizable(model, form) == ["expand_Conv", "depth_Conv", "project_Conv", "head_Conv"]
        assert {"stem_Conv", "output_Gemm", "reduce_Conv", "excite_Conv"} <= set(baseline_keep(model, form))


def test_first_block_ends_before_the_first_pointwise_convolution(exported):
    model, _ = exported("mobilenetv1_100")
    names = set(first_block(model))
    weighted = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name in names for node in weighted[:4]] == [True, True, False, False]


def test_first_block_with_a_residual_sum_ends_behind_it(exported):
    model, _ = exported("mobilenetv3_large_100")
    names = set(first_block(model))
    weighted = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name in names for node in weighted[:5]] == [True, True, True, False, False]
    assert sum(node.op_type == "Add" and node.name in names for node in model.graph.node) == 1


def test_squeeze_and_excitation_of_mobilenet_v3_is_found(exported):
    model, _ = exported("mobilenetv3_large_100")
    groups = default_keep(model)
    found = Counter(named(model, name).op_type for name in groups["squeeze_excite"])
    assert found == {"Conv": 16, "Relu": 8, "HardSigmoid": 8}
    weights = {named(model, name).input[1] for name in groups["squeeze_excite"] if "Conv" in name}
    assert all(".se.conv_" in name for name in weights)
    assert named(model, groups["first_conv"][0]).input[1] == "conv_stem.weight"
    assert named(model, groups["classifier"][0]).input[1] == "classifier.weight"
