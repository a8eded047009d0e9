"""A nested start: at step 0 the host computes what its slim nets compute, and then both learn."""

import copy
import shutil

import pytest
import torch
from every_net import LAYER_NORMS, nets_at
from nets.conftest import slim_encoder
from torch import nn

from edgecl.errors import SliceError
from edgecl.nets.backbone import create_backbone, example_side
from edgecl.nets.build import backbone_tensors
from edgecl.nets.model_dir import load_model
from edgecl.nets.slimming import limit_skips
from edgecl.train.carve import carve

SMALL = "mobilenetv3_small_100"
# timm gives one of host and slim net a skip connection that the other lacks: block -> channels that skip in the run.
WITH_OTHER_SKIPS = {
    ("mobilenetv3_large_100", 1.5, 0.5): {"backbone.blocks.0.0": 0},
    ("mobilenetv3_small_050", 1.5, 1.0): {"backbone.blocks.3.0": 24},
}


def nested(arch, *, host_width=1.5, widths=(1.0,)):
    net = slim_encoder(arch, host_width, *widths, projector=[16, 8])
    net.nest()
    return net


@pytest.fixture
def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def hold_to_its_slim_nets(net, images):
    """In training mode, in float32 to its rounding and in float64 to its own."""
    for dtype, allowed in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        net, images = net.to(dtype), images.to(dtype)
        with torch.no_grad():
            host = net.forward_host(images)
            assert float(host.std()) > 0
            for width in net.slim_widths:
                assert apart(host, net.forward_slim(images, width)) < allowed, (width, dtype)


@pytest.mark.parametrize(
    ("arch", "widths"),
    [
        *nets_at([(1.5, 1.0), (2.0, 0.5)], without=LAYER_NORMS),
        *(
            pytest.param(*case.values, marks=pytest.mark.slow)
            for case in nets_at([(1.5, 0.75), (1.5, 0.5), (2.0, 1.0), (2.0, 0.75)], without=LAYER_NORMS)
        ),
    ],
)
def test_a_nested_host_computes_what_its_slim_net_computes(arch, widths):
    net = nested(arch, host_width=widths[0], widths=widths[1:])
    side = 224 if example_side(net.host) == 224 else 32
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(2))
    hold_to_its_slim_nets(net, images)


def test_without_a_nested_start_they_are_strangers(images):
    net = slim_encoder(SMALL, 1.5, 1.0, projector=[16, 8])
    with torch.no_grad():
        assert apart(net.forward_host(images), net.forward_slim(images)) > 0.1


@pytest.mark.parametrize("host_width", [1.0, 1.5])
def test_several_widths_all_begin_as_the_host(images, host_width):
    net = nested("mobilenetv2_100", host_width=host_width, widths=(1.0, 0.75, 0.5))
    assert net.host_skips == {}
    hold_to_its_slim_nets(net, images)


@pytest.mark.parametrize(("case", "skips"), WITH_OTHER_SKIPS.items())
def test_a_host_with_other_skips_takes_those_of_the_slim_net(images, case, skips):
    arch, host_width, slim_width = case
    net = nested(arch, host_width=host_width, widths=(slim_width,))
    assert net.host_skips == skips
    hold_to_its_slim_nets(net, images)


def test_first_channels_alone_skip():
    class Block(nn.Module):
        has_skip = True

        def forward(self, x):
            return 2 * x

    net = nn.Sequential(Block(), Block(), Block())
    limit_skips(net, {"0": 2, "1": 0})
    assert [block.has_skip for block in net] == [False, False, True]
    x = torch.ones(1, 4, 1, 1)
    assert net[0](x).flatten().tolist() == [3, 3, 2, 2]
    assert net[1](x).flatten().tolist() == [2, 2, 2, 2]


def test_widths_that_differ_in_their_skips_are_named():
    with pytest.raises(
        SliceError, match=r"width 1 and 0\.5 differ in the skip connection of 'backbone\."
    ) as caught:
        nested("mobilenetv3_large_100", widths=(1.0, 0.5))
    assert "nested_start = false" in caught.value.hint


def test_only_weights_from_outside_to_inside_become_zero():
    """The slim nets' own weights, and those into the other channels, are what they were."""
    before = slim_encoder(SMALL, 1.5, 1.0, projector=[16, 8])
    net = copy.deepcopy(before)
    net.nest()
    slim = net._views[1.0].index
    changed = 0
    for name, tensor in before.host.state_dict().items():
        expected = tensor.clone()
        if name in slim and tensor.ndim > 1:
            rows, columns, *_ = (part.stop for part in slim[name])
            changed += int(expected[:rows, columns:].count_nonzero())
            expected[:rows, columns:] = 0
        assert torch.equal(net.host.state_dict()[name], expected), name
    assert changed > 0
    for name, tensor in before.slim_tensors().items():
        assert torch.equal(net.slim_tensors()[name], tensor), name


def test_gradients_reach_the_other_channels_at_the_first_step(images):
    """Those into them, for their outputs lead nowhere yet but to each other, and those that lead from them inside."""
    net = nested(SMALL)
    net.forward_host(images).square().sum().backward()
    inward, slim = 0, net._views[1.0].index
    for name, parameter in net.host.named_parameters():
        if name in slim and parameter.ndim > 1 and parameter.shape[1] > slim[name][1].stop:
            rows, columns = slim[name][0].stop, slim[name][1].stop
            assert float(parameter.detach()[:rows, columns:].abs().max()) == 0, name
            assert float(parameter.grad[:rows, columns:].abs().max()) > 0, name
            inward += 1
    assert inward > 20
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad()
    net.forward_host(images).square().sum().backward()
    # From the second step on every weight of the other channels has a gradient.
    stem = net.host.backbone.conv_stem.weight
    assert float(stem.grad[slim["backbone.conv_stem.weight"][0].stop :].abs().max()) > 0


@pytest.mark.parametrize("case", WITH_OTHER_SKIPS)
def test_a_copy_skips_alike(case, images):
    arch, host_width, slim_width = case
    net = nested(arch, host_width=host_width, widths=(slim_width,)).eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        expected = net.forward_host(images)
        assert torch.equal(other.forward_host(images), expected)
        # The copy's own weights, not the first net's.
        other.host.backbone.conv_stem.weight.mul_(-1)
        assert not torch.equal(other.forward_host(images), expected)
        assert torch.equal(net.forward_host(images), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_it_begins_alike(images):
    net = nested("mobilenetv3_small_050")
    assert net.host_skips
    with torch.no_grad():
        expected = net.forward_host(images)
        net.compile_passes()
        assert apart(net.forward_host(images), expected) < 1e-4
        assert apart(net.forward_slim(images), expected) < 1e-4


# --- the nets that come of it ---

TABLES = {
    "host": {"arch": "mobilenetv3_small_050", "width": 1.5, "stem_stride": 1, "nested_start": True},
    "slim": {"width": 1.0},
    "projector": {"sizes": [16, 8]},
    "data": {"image_size": 32, "batch_size": 8},
}


def take_steps(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(3):
        images = torch.randn(4, 3, 32, 32)
        (net.forward_host(images).square().mean() + net.forward_slim(images).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_carved_slim_net_is_its_view_and_timms_own(write_run, tmp_path):
    net = write_run(TABLES, train=take_steps).eval()
    carve(tmp_path / "run", out=tmp_path / "model", recalibrate_norms=False)
    loaded, _ = load_model(tmp_path / "model")
    plain = create_backbone("mobilenetv3_small_050", width=1.0, stem_stride=1).eval()
    plain.load_state_dict(backbone_tensors(net, width=1.0))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = net.forward_slim_part("backbone", images)
        assert float(expected.std()) > 0
        assert torch.equal(loaded(images), expected)
        assert torch.equal(plain(images), expected)


def test_a_host_whose_skips_are_not_timms_cannot_be_carved(write_run, tmp_path):
    write_run(TABLES)
    with pytest.raises(SliceError, match=r"cannot carve the host: .*backbone\.blocks\.3\.0") as caught:
        carve(tmp_path / "run", out=tmp_path / "model", width=1.5, recalibrate_norms=False)
    assert "carve a slim width, 1;" in caught.value.hint
    assert not (tmp_path / "model").exists()


def test_a_nested_host_with_timms_skips_can_be_carved(write_run, tmp_path):
    tables = {**TABLES, "host": {**TABLES["host"], "arch": SMALL}}
    net = write_run(tables, train=take_steps).eval()
    assert net.host_skips == {}
    carve(tmp_path / "run", out=tmp_path / "model", width=1.5, recalibrate_norms=False)
    loaded, _ = load_model(tmp_path / "model")
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), net.host.backbone(images))
