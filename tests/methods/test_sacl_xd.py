"""SACL-XD: which passes run, what they leave alone, and what the terms add up to."""

import copy

import pytest
import torch

from edgecl.methods.losses import cross_correlation_loss, cross_distillation_loss
from edgecl.methods.sacl_xd import Passes, SaclXd, forward_units

OFF_DIAGONAL = 0.05
ARMS = {
    "Barlow Twins": (1.0, 1.0),
    "XD only": (1.0, 0.8),
    "SACL only": (2.0, 1.0),
    "SACL-XD": (2.0, 0.8),
}


def method(alpha, **settings):
    return SaclXd(alpha=alpha, off_diagonal=OFF_DIAGONAL, **settings)


def spy(net):
    """Note every whole pass: which net ran, whether it learned, and on which images."""
    calls = []

    def note(name, forward):
        def run(images):
            calls.append((name, torch.is_grad_enabled(), images))
            return forward(images)

        return run

    net.host.forward = note("host", net.host.forward)
    if net.has_slim:
        net._skeleton[0].forward = note("slim", net._skeleton[0].forward)
    return calls


def named(calls, view_a, view_b):
    return sorted(
        (net, "A" if images is view_a else "B" if images is view_b else "?", "learns" if learns else "frozen")
        for net, learns, images in calls
    )


HOST_ONLY = [("host", "A", "learns"), ("host", "B", "learns")]
PAIR = [("host", "A", "learns"), ("slim", "B", "learns")]
SWAPPED = [("slim", "A", "frozen"), ("host", "B", "frozen")]


@pytest.mark.parametrize(
    ("host_width", "alpha", "direction", "dense", "expected"),
    [
        (1.0, 1.0, "both", False, HOST_ONLY),
        (1.0, 0.8, "both", False, HOST_ONLY),
        (1.0, 0.8, "slim_only", False, HOST_ONLY),
        (2.0, 1.0, "both", False, PAIR),
        (2.0, 0.8, "both", False, PAIR + SWAPPED),
        (2.0, 0.8, "slim_only", False, [*PAIR, ("host", "B", "frozen")]),
        (2.0, 0.0, "both", False, PAIR + SWAPPED),
        (2.0, 1.0, "both", True, HOST_ONLY),
        (2.0, 0.8, "both", True, HOST_ONLY),
        (2.0, 0.8, "slim_only", True, HOST_ONLY),
    ],
)
def test_an_arm_runs_exactly_its_passes(make_net, views, host_width, alpha, direction, dense, expected):
    net = make_net(host_width=host_width)
    calls = spy(net)
    method(alpha, xd_direction=direction).project(net, *views, dense=dense)
    assert named(calls, *views) == sorted(expected)


def test_projections_are_those_of_their_nets_and_views(make_net, views):
    net = make_net()
    net.eval()
    found = method(0.8).project(net, *views)
    with torch.no_grad():
        expected = (
            net.forward_host(views[0]),
            net.forward_slim(views[1]),
            net.forward_slim(views[0]),
            net.forward_host(views[1]),
        )
    for projection, other in zip(found, expected, strict=True):
        assert torch.equal(projection, other)
    assert not torch.equal(found.host_a, found.frozen_slim_a)


def test_passes_module_gives_the_methods_projections(make_net, views):
    net = make_net()
    net.eval()
    wrapped = Passes(net, method(0.8))(*views, True)
    for projection, other in zip(wrapped, method(0.8).project(net, *views, dense=True), strict=True):
        assert torch.equal(projection, other)


@pytest.mark.parametrize("dense", [False, True])
def test_frozen_projections_of_equal_encoders_are_the_learned_ones_detached(make_net, views, dense):
    net = make_net(host_width=2.0 if dense else 1.0)
    found = method(0.8).project(net, *views, dense=dense)
    assert torch.equal(found.frozen_slim_a, found.host_a)
    assert torch.equal(found.frozen_host_b, found.slim_b)
    assert not found.frozen_slim_a.requires_grad
    assert not found.frozen_host_b.requires_grad


def test_frozen_projections_carry_no_gradient(make_net, views):
    found = method(0.8).project(make_net(), *views)
    assert found.host_a.requires_grad
    assert found.slim_b.requires_grad
    assert not found.frozen_slim_a.requires_grad
    assert not found.frozen_host_b.requires_grad


def batch_statistics_outputs(net, view):
    """Run host and slim net in training mode on copies, so that nothing of the original changes."""
    other = copy.deepcopy(net)
    other.train()
    with torch.no_grad():
        return other.forward_host(view), other.forward_slim(view)


def test_frozen_passes_use_batch_statistics(make_net, views):
    net = make_net()
    slim_a = batch_statistics_outputs(net, views[0])[1]
    host_b = batch_statistics_outputs(net, views[1])[0]
    found = method(0.8).project(net, *views)
    assert torch.equal(found.frozen_slim_a, slim_a)
    assert torch.equal(found.frozen_host_b, host_b)


def statistics(net):
    return {
        name: tensor.clone()
        for name, tensor in net.state_dict().items()
        if "running" in name or "tracked" in name
    }


def test_frozen_passes_change_no_statistics(make_net, views):
    net = make_net()
    before = statistics(net)
    with net.frozen():
        net.forward_host(views[0])
        net.forward_slim(views[0])
    after = statistics(net)
    assert len(before) == 12
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_statistics_after_a_step_are_those_of_the_learning_passes_alone(make_net, views):
    net, other = make_net(), make_net()
    method(0.8).project(net, *views)
    other.forward_host(views[0])
    other.forward_slim(views[1])
    found, expected = statistics(net), statistics(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_learning_passes_update_private_statistics(make_net, views):
    net = make_net()
    before = statistics(net)
    method(0.8).project(net, *views)
    after = statistics(net)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(int(after[name]) == 1 for name in after if "tracked" in name)


def test_tracking_comes_back_after_a_frozen_pass_that_fails(make_net):
    net = make_net()
    with pytest.raises(RuntimeError), net.frozen():
        net.forward_host(torch.zeros(2, 5, 8, 8))
    assert all(
        module.track_running_stats for module in net.modules() if hasattr(module, "track_running_stats")
    )
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("arm", ARMS)
def test_total_is_the_formula_of_its_terms(make_net, views, arm, direction):
    host_width, alpha = ARMS[arm]
    scaled = method(alpha, scale=0.1, xd_direction=direction)
    projections = scaled.project(make_net(host_width=host_width), *views)
    found = scaled.losses(projections)
    sacl = cross_correlation_loss(projections.host_a, projections.slim_b, off_diagonal=OFF_DIAGONAL).total
    assert torch.equal(found.sacl, sacl.detach())
    if alpha == 1:
        assert found.xd_host is None
        assert found.xd_slim is None
        distillation = torch.tensor(0.0)
    else:
        host_b = projections.frozen_host_b
        xd_slim = cross_distillation_loss(projections.slim_b, host_b, off_diagonal=OFF_DIAGONAL)
        assert torch.equal(found.xd_slim, xd_slim.detach())
        distillation = xd_slim
        if direction == "both":
            slim_a = projections.frozen_slim_a
            xd_host = cross_distillation_loss(projections.host_a, slim_a, off_diagonal=OFF_DIAGONAL)
            assert torch.equal(found.xd_host, xd_host.detach())
            distillation = (xd_host + xd_slim) / 2
        else:
            assert found.xd_host is None
    expected = 0.1 * (alpha * sacl + (1 - alpha) * distillation)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=0)


def test_distillation_from_the_frozen_host_reaches_the_host_only_inside_the_slim_net(make_net, views):
    net = make_net()
    alone = SaclXd(alpha=0.0, off_diagonal=OFF_DIAGONAL, xd_direction="slim_only")
    alone.losses(alone.project(net, *views)).total.backward()
    gradient = net.host[0].weight.grad
    assert gradient[:8].abs().max() > 0
    assert gradient[8:].abs().max() == 0


@pytest.mark.parametrize("name", ["sacl", "xd_host", "xd_slim", "diagonal", "off_diagonal_rms"])
def test_only_the_total_carries_gradient(make_net, views, name):
    losses = method(0.8).losses(method(0.8).project(make_net(), *views))
    assert losses.total.requires_grad
    assert not getattr(losses, name).requires_grad


@pytest.mark.parametrize(
    ("arm", "direction", "slow_start", "host", "slim"),
    [
        ("Barlow Twins", "both", 0.0, 6, 0),
        ("XD only", "both", 0.0, 6, 0),
        ("XD only", "slim_only", 0.0, 6, 0),
        ("XD only", "both", 0.5, 6, 0),
        ("SACL only", "both", 0.0, 3, 3),
        ("SACL only", "slim_only", 0.0, 3, 3),
        ("SACL-XD", "both", 0.0, 4, 4),
        ("SACL-XD", "slim_only", 0.0, 4, 3),
        ("SACL-XD", "both", 0.25, 4.5, 3),
        ("SACL-XD", "both", 1.0, 6, 0),
        ("SACL only", "both", 0.5, 4.5, 1.5),
    ],
)
def test_forward_units_of_an_arm(arm, direction, slow_start, host, slim):
    assert forward_units(arm=arm, xd_direction=direction, slow_start=slow_start) == {
        "host": host,
        "slim": slim,
    }


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_forward_units_count_the_passes_that_run(make_net, views, arm, dense, direction):
    host_width, alpha = ARMS[arm]
    net = make_net(host_width=host_width)
    calls = spy(net)
    method(alpha, xd_direction=direction).project(net, *views, dense=dense)
    units = {"host": 0.0, "slim": 0.0}
    for name, learns, _ in calls:
        units[name] += 3 if learns else 1
    assert units == forward_units(arm=arm, xd_direction=direction, slow_start=float(dense))
