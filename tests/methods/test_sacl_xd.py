"""SACL-XD: which passes run, what they leave alone, and what the terms add up to."""

import copy

import pytest
import torch
from torch.func import functional_call

from edgecl.methods.losses import coding_rate, cross_correlation_loss
from edgecl.methods.sacl_xd import (
    Comparison,
    Passes,
    SaclXd,
    forward_units,
    other_width_units,
    sandwich,
)

OFF_DIAGONAL = 0.05
ARMS = {
    "Barlow Twins": (1.0, 1.0),
    "XD only": (1.0, 0.8),
    "SACL only": (2.0, 1.0),
    "SACL-XD": (2.0, 0.8),
}


def method(alpha, **settings):
    return SaclXd(alpha=alpha, comparison=Comparison(off_diagonal=OFF_DIAGONAL), **settings)


def correlation_loss(z, other):
    return cross_correlation_loss(z, other, off_diagonal=OFF_DIAGONAL).total


def spy(net):
    """Note every whole pass: which net ran, whether it learned, and on which images."""
    calls = []

    def note(name, forward):
        def run(images):
            calls.append((name, torch.is_grad_enabled(), images))
            return forward(images)

        return run

    net.host.forward = note("host", net.host.forward)
    for width, view in net._views.items():
        name = "slim" if width == net.slim_width else f"slim {width:g}"
        view.skeleton.forward = note(name, view.skeleton.forward)
    return calls


def named(calls, view_a, view_b, *local):
    names = {id(view_a): "A", id(view_b): "B", **{id(view): f"local {n}" for n, view in enumerate(local)}}
    return sorted((net, names[id(images)], "learns" if learns else "frozen") for net, learns, images in calls)


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
    for projection, other in zip(found.tensors(), expected, strict=True):
        assert torch.equal(projection, other)
    assert not torch.equal(found.host_a, found.slim_a)


def test_passes_module_gives_the_methods_projections(make_net, views):
    net = make_net()
    net.eval()
    local = [view[..., :8, :8] for view in views]
    wrapped = Passes(net, method(0.8))([*views, *local], True)
    alone = method(0.8).project(net, *views, local=local, dense=True)
    for projection, other in zip(wrapped.tensors(), alone.tensors(), strict=True):
        assert torch.equal(projection, other)
    assert len(wrapped.tensors()) == 4


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("learn_targets", [False, True])
def test_targets_of_equal_encoders_are_the_learned_projections(make_net, views, dense, learn_targets):
    """Detached, unless targets learn."""
    net = make_net(host_width=2.0 if dense else 1.0)
    one = method(0.0, learn_targets=learn_targets)
    found = one.project(net, *views, dense=dense)
    assert found.slim_a is None
    assert found.host_b is None
    terms = one.losses(found)
    for term, z in ((terms.xd_host, found.host_a), (terms.xd_slim, found.slim_b[0])):
        target = z if learn_targets else z.detach()
        assert torch.equal(term, correlation_loss(z, target).detach())
        pull = torch.autograd.grad(correlation_loss(z, target) / 2, z, retain_graph=True)[0]
        found_pull = torch.autograd.grad(terms.total, z, retain_graph=True)[0]
        torch.testing.assert_close(found_pull, pull, rtol=1e-4, atol=1e-7)


def test_frozen_projections_carry_no_gradient(make_net, views):
    found = method(0.8).project(make_net(), *views)
    assert found.host_a.requires_grad
    assert found.slim_b[0].requires_grad
    assert not found.slim_a.requires_grad
    assert not found.host_b.requires_grad


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
    assert torch.equal(found.slim_a, slim_a)
    assert torch.equal(found.host_b, host_b)


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
    sacl = cross_correlation_loss(projections.host_a, projections.slim_b[0], off_diagonal=OFF_DIAGONAL).total
    assert torch.equal(found.sacl, sacl.detach())
    if alpha == 1:
        assert found.xd_host is None
        assert found.xd_slim is None
        distillation = torch.tensor(0.0)
    else:
        one_net = host_width == 1.0
        host_b = projections.slim_b[0] if one_net else projections.host_b
        xd_slim = correlation_loss(projections.slim_b[0], host_b.detach())
        assert torch.equal(found.xd_slim, xd_slim.detach())
        distillation = xd_slim
        if direction == "both":
            slim_a = projections.host_a if one_net else projections.slim_a
            xd_host = correlation_loss(projections.host_a, slim_a.detach())
            assert torch.equal(found.xd_host, xd_host.detach())
            distillation = (xd_host + xd_slim) / 2
        else:
            assert found.xd_host is None
    expected = 0.1 * (alpha * sacl + (1 - alpha) * distillation)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=0)


def test_distillation_from_the_frozen_host_reaches_the_host_only_inside_the_slim_net(make_net, views):
    net = make_net()
    alone = method(0.0, xd_direction="slim_only")
    alone.losses(alone.project(net, *views)).total.backward()
    gradient = net.host[0].weight.grad
    assert gradient[:8].abs().max() > 0
    assert gradient[8:].abs().max() == 0


@pytest.mark.parametrize(
    "name", ["sacl", "xd_host", "xd_slim", "coding_rate", "diagonal", "off_diagonal_rms"]
)
def test_only_the_total_carries_gradient(make_net, views, name):
    losses = method(0.8).losses(method(0.8).project(make_net(), *views), rate_weight=0.1)
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
    host_width, alpha = ARMS[arm]
    units = forward_units(
        slim_only=host_width == 1.0, distils=alpha < 1, xd_direction=direction, slow_start=slow_start
    )
    assert units == {"host": host, "slim": slim}


@pytest.mark.parametrize("learn_targets", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_forward_units_count_the_passes_that_run(
    make_net, views, arm, dense, direction, symmetric, learn_targets
):
    host_width, alpha = ARMS[arm]
    net = make_net(host_width=host_width)
    calls = spy(net)
    settings = {"xd_direction": direction, "symmetric": symmetric, "learn_targets": learn_targets}
    method(alpha, **settings).project(net, *views, dense=dense)
    units = {"host": 0.0, "slim": 0.0}
    for name, learns, _ in calls:
        units[name] += 3 if learns else 1
    slim_only, distils = host_width == 1.0, alpha < 1
    assert units == forward_units(slim_only=slim_only, distils=distils, slow_start=float(dense), **settings)


# --- several widths ---

WIDTHS = (1.0, 0.75, 0.5)
STEP = [("host", "A", "learns"), ("slim", "B", "learns"), ("slim 0.5", "B", "learns")]


def make_many(make_net, host_width=2.0, widths=WIDTHS):
    return make_net(host_width=host_width, slim_width=widths[0], other_widths=widths[1:])


@pytest.mark.parametrize(
    ("host_width", "alpha", "dense", "widths", "expected"),
    [
        (2.0, 1.0, False, (1.0, 0.5), STEP),
        (2.0, 0.8, False, (1.0, 0.5), STEP + SWAPPED),
        (2.0, 0.8, False, (0.5,), STEP + SWAPPED),
        (2.0, 0.8, False, None, [*STEP, ("slim 0.75", "B", "learns"), *SWAPPED]),
        (2.0, 0.8, True, (1.0, 0.5), HOST_ONLY),
        (1.0, 0.8, False, (1.0, 0.5), [*HOST_ONLY, ("slim 0.5", "B", "learns")]),
        (1.0, 1.0, True, (1.0, 0.5), HOST_ONLY),
    ],
)
def test_a_step_of_several_widths_runs_exactly_its_passes(
    make_net, views, host_width, alpha, dense, widths, expected
):
    net = make_many(make_net, host_width)
    calls = spy(net)
    found = method(alpha).project(net, *views, dense=dense, widths=widths)
    assert named(calls, *views) == sorted(expected)
    assert len(found.slim_b) == (1 if dense else len(WIDTHS if widths is None else {1.0, *widths}))


@pytest.mark.parametrize("host_width", [1.0, 2.0])
def test_projections_of_each_width_stand_in_the_order_asked_for(make_net, views, host_width):
    net = make_many(make_net, host_width).eval()
    found = method(0.8).project(net, *views, widths=(0.5, 1.0, 0.75))
    for projection, width in zip(found.slim_b, (1.0, 0.5, 0.75), strict=True):
        assert torch.equal(projection, net.forward_slim(views[1], width))
    if host_width == 2.0:
        assert torch.equal(found.slim_a, net.forward_slim(views[0]))
        assert torch.equal(found.host_b, net.forward_host(views[1]))
    else:
        assert found.slim_a is None
        assert found.host_b is None


def test_the_module_hands_on_widths_and_can_leave_the_frozen_passes_out(make_net, views):
    net = make_many(make_net).eval()
    calls = spy(net)
    found = Passes(net, method(0.8))(views, False, (1.0, 0.5), True)
    assert named(calls, *views) == sorted(STEP)
    assert found.slim_a is None
    assert found.host_b is None
    assert len(found.slim_b) == 2
    whole = Passes(net, method(0.8))(views, widths=(1.0, 0.5))
    later = method(0.8).frozen_passes(net, *views)
    for part, expected in zip([*found.tensors(), *later], whole.tensors(), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_terms_of_several_widths_are_their_means(make_net, views, alpha, direction):
    scaled = method(alpha, scale=0.1, xd_direction=direction)
    with torch.no_grad():
        projections = scaled.project(make_many(make_net), *views)
    host_a, slim_b, slim_a, host_b, _ = projections
    assert len(slim_b) == 3
    found = scaled.losses(projections)
    single = [cross_correlation_loss(host_a, z, off_diagonal=OFF_DIAGONAL) for z in slim_b]
    sacl = sum(float(loss.total) for loss in single) / 3
    assert float(found.sacl) == pytest.approx(sacl, rel=1e-6)
    assert torch.equal(found.diagonal, single[0].diagonal)
    assert torch.equal(found.off_diagonal_rms, single[0].off_diagonal_rms)
    expected = sacl
    if alpha < 1:
        xd_slim = sum(float(correlation_loss(z, host_b)) for z in slim_b) / 3
        assert float(found.xd_slim) == pytest.approx(xd_slim, rel=1e-6)
        distillation = xd_slim
        if direction == "both":
            xd_host = float(correlation_loss(host_a, slim_a))
            distillation = (xd_host + xd_slim) / 2
        expected = alpha * sacl + (1 - alpha) * distillation
    assert float(found.total) == pytest.approx(0.1 * expected, rel=1e-6)


def plain_step(net, view_a, view_b, *, alpha, direction, dense):
    """One step at one width as it was before there were several, written out; returns its loss."""

    def correlation(a, b):
        return cross_correlation_loss(a, b, off_diagonal=OFF_DIAGONAL).total

    def slim(images):
        if net.slim_width == net.host_width:
            return net.host(images)
        skeleton = net._views[net.slim_width].skeleton
        host = dict(net.host.named_parameters())
        tensors = {}
        for name, parameter in skeleton.named_parameters():
            tensors[name] = (
                parameter
                if not parameter.is_meta
                else host[name][tuple(slice(0, size) for size in parameter.shape)]
            )
        return functional_call(skeleton, tensors, (images,))

    host_a = net.host(view_a)
    slim_b = net.host(view_b) if dense else slim(view_b)
    total = correlation(host_a, slim_b)
    if alpha < 1:
        if dense or net.slim_width == net.host_width:
            slim_a, host_b = host_a.detach(), slim_b.detach()
        else:
            with net.frozen():
                slim_a, host_b = slim(view_a), net.host(view_b)
        distillation = correlation(slim_b, host_b)
        if direction == "both":
            distillation = (correlation(host_a, slim_a) + distillation) / 2
        total = alpha * total + (1 - alpha) * distillation
    return 0.1 * total


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("arm", ARMS)
def test_one_width_trains_as_written_out_bit_for_bit(make_net, views, arm, direction, dense):
    host_width, alpha = ARMS[arm]
    net, plain = make_net(host_width=host_width), make_net(host_width=host_width)
    scaled = method(alpha, scale=0.1, xd_direction=direction)
    for _ in range(3):
        found = scaled.losses(scaled.project(net, *views, dense=dense, widths=(1.0,))).total
        expected = plain_step(plain, *views, alpha=alpha, direction=direction, dense=dense)
        assert torch.equal(found, expected)
        for each, loss in ((net, found), (plain, expected)):
            each.zero_grad()
            loss.backward()
            torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9).step()
    for (name, tensor), other in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((1.0,), (1.0,)),
        ((0.5, 1.0), (1.0, 0.5)),
        ((0.5, 0.75, 1.0), (1.0, 0.75, 0.5)),
        ((1.0, 1.0, 0.5, 0.5), (1.0, 0.5)),
    ],
)
def test_up_to_three_widths_are_all_in_every_step(widths, expected):
    assert all(sandwich(widths, seed=0, step=step) == expected for step in range(20))


def test_a_step_of_many_widths_takes_the_ends_and_one_between():
    widths = (0.25, 0.4, 0.5, 0.75, 1.0)
    steps = [sandwich(widths, seed=0, step=step) for step in range(3000)]
    assert {(step[0], step[-1], len(step)) for step in steps} == {(1.0, 0.25, 3)}
    for width in (0.4, 0.5, 0.75):
        # Four standard deviations of a fair draw of three.
        assert abs(sum(step[1] == width for step in steps) - 1000) < 4 * (3000 * 2 / 9) ** 0.5


def test_the_draw_of_a_width_depends_on_seed_and_step_alone():
    widths = (0.25, 0.4, 0.5, 0.75, 1.0)
    first = [sandwich(widths, seed=1, step=step) for step in range(50)]
    assert [sandwich(widths[::-1], seed=1, step=step) for step in reversed(range(50))] == first[::-1]
    assert [sandwich(widths, seed=2, step=step) for step in range(50)] != first


@pytest.mark.parametrize(
    ("widths", "slow_start", "expected"),
    [
        ((1.0,), 0.0, {}),
        ((1.0, 0.5), 0.0, {0.5: 3}),
        ((0.5, 0.75, 1.0), 0.0, {0.75: 3, 0.5: 3}),
        ((0.5, 0.75, 1.0), 0.25, {0.75: 2.25, 0.5: 2.25}),
        ((0.25, 0.4, 0.5, 0.75, 1.0), 0.0, {0.75: 1, 0.5: 1, 0.4: 1, 0.25: 3}),
    ],
)
def test_units_of_the_further_widths(widths, slow_start, expected):
    assert other_width_units(widths, slow_start=slow_start) == expected


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_units_of_several_widths_count_the_passes_that_run(make_net, views, arm, dense, direction):
    widths = (1.0, 0.875, 0.75, 0.5)
    host_width, alpha = ARMS[arm]
    net = make_many(make_net, host_width, widths)
    calls = spy(net)
    steps = 200
    arms = method(alpha, xd_direction=direction)
    for step in range(steps):
        arms.project(net, *views, dense=dense, widths=sandwich(widths, seed=0, step=step))
    units = dict.fromkeys(["host", "slim", "slim 0.875", "slim 0.75", "slim 0.5"], 0.0)
    for name, learns, _ in calls:
        units[name] += (3 if learns else 1) / steps
    expected = {
        **forward_units(
            slim_only=host_width == 1.0, distils=alpha < 1, xd_direction=direction, slow_start=float(dense)
        ),
        **{
            f"slim {width:g}": count
            for width, count in other_width_units(widths, slow_start=float(dense)).items()
        },
    }
    for name, count in expected.items():
        assert units[name] == pytest.approx(count, abs=0.3 if name in ("slim 0.875", "slim 0.75") else 1e-9)


# --- gradient through all four passes ---

FOUR = [*PAIR, ("slim", "A", "learns"), ("host", "B", "learns")]


@pytest.mark.parametrize(
    ("host_width", "alpha", "settings", "dense", "expected"),
    [
        (2.0, 0.8, {"symmetric": True}, False, FOUR),
        (2.0, 1.0, {"symmetric": True}, False, FOUR),
        (2.0, 0.8, {"symmetric": True, "xd_direction": "slim_only"}, False, FOUR),
        (2.0, 0.8, {"learn_targets": True}, False, FOUR),
        (2.0, 0.8, {"learn_targets": True, "xd_direction": "slim_only"}, False, [*PAIR, FOUR[-1]]),
        (2.0, 1.0, {"learn_targets": True}, False, PAIR),
        (2.0, 0.8, {"symmetric": True}, True, HOST_ONLY),
        (1.0, 0.8, {"symmetric": True, "learn_targets": True}, False, HOST_ONLY),
    ],
)
def test_four_passes_learn_when_asked_to(make_net, views, host_width, alpha, settings, dense, expected):
    net = make_net(host_width=host_width)
    calls = spy(net)
    method(alpha, **settings).project(net, *views, dense=dense)
    assert named(calls, *views) == sorted(expected)


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("learn_targets", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_terms_of_symmetric_passes_are_the_means_over_both_views(
    make_net, views, alpha, learn_targets, direction
):
    settings = {"symmetric": True, "learn_targets": learn_targets, "xd_direction": direction}
    both = method(alpha, scale=0.1, **settings)
    projections = both.project(make_net(), *views)
    host_a, (slim_b,), slim_a, host_b, _ = projections
    found = both.losses(projections)

    def pull(z, target):
        return correlation_loss(z, target if learn_targets else target.detach())

    sacl = (correlation_loss(host_a, slim_b) + correlation_loss(host_b, slim_a)) / 2
    expected = sacl
    if alpha < 1:
        xd_host = (pull(host_a, slim_a) + pull(host_b, slim_b)) / 2
        xd_slim = (pull(slim_b, host_b) + pull(slim_a, host_a)) / 2
        assert (found.xd_host is None) == (direction == "slim_only")
        distillation = xd_slim if direction == "slim_only" else (xd_host + xd_slim) / 2
        expected = alpha * sacl + (1 - alpha) * distillation
    torch.testing.assert_close(found.total, 0.1 * expected, rtol=1e-6, atol=0)
    leaves = (host_a, slim_b, slim_a, host_b)
    pulls = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found.total, 0.1 * expected)]
    for one, other in zip(*pulls, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert one.abs().max() > 0


def test_learnt_targets_are_pulled_and_frozen_ones_are_not(make_net, views):
    net = make_net()
    gradients = {}
    for learn_targets in (False, True):
        arm = method(0.0, learn_targets=learn_targets)
        projections = arm.project(net, *views)
        assert projections.slim_a.requires_grad is projections.host_b.requires_grad is learn_targets
        gradients[learn_targets] = torch.autograd.grad(arm.losses(projections).total, net.host[0].weight)[0]
    assert not torch.allclose(gradients[False], gradients[True], rtol=1e-2)


@pytest.mark.parametrize("alpha", [1.0, 0.8])
@pytest.mark.parametrize("case", ["dense", "one net"])
def test_symmetric_passes_change_nothing_where_one_net_takes_both_views(make_net, views, alpha, case):
    """Total and gradient: a frozen pair among the terms would halve it."""
    pulls = []
    for settings in ({}, {"symmetric": True}):
        net = make_net(host_width=1.0 if case == "one net" else 2.0)
        arm = method(alpha, **settings)
        arm.losses(arm.project(net, *views, dense=case == "dense")).total.backward()
        pulls.append([parameter.grad for parameter in net.host.parameters()])
    for one, other in zip(*pulls, strict=True):
        assert torch.equal(one, other)


# --- local views ---


@pytest.fixture
def local(views):
    return [view[..., :8, 2:10].clone() for view in views]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_local_views_go_through_the_slim_net_and_in_a_slow_start_through_the_host(
    make_net, views, local, dense, symmetric
):
    net = make_many(make_net)
    calls = spy(net)
    found = method(1.0, symmetric=symmetric).project(net, *views, local=local, dense=dense, widths=(1.0,))
    small = [("host" if dense else "slim", f"local {number}", "learns") for number in range(2)]
    whole = HOST_ONLY if dense else FOUR if symmetric else PAIR
    assert named(calls, *views, *local) == sorted([*whole, *small])
    assert len(found.local) == 2


def test_local_views_stand_beside_view_b_in_the_contrastive_term(make_net, views, local):
    arm = method(0.8)
    projections = arm.project(make_net(), *views, local=local)
    found = arm.losses(projections)
    pairs = [correlation_loss(projections.host_a, z) for z in (*projections.slim_b, *projections.local)]
    assert float(found.sacl) == pytest.approx(float(sum(pairs).detach()) / 3, rel=1e-6)
    alone = arm.losses(projections._replace(local=()))
    assert torch.equal(found.xd_slim, alone.xd_slim)
    assert torch.equal(found.diagonal, alone.diagonal)
    for z in projections.local:
        assert torch.autograd.grad(found.total, z, retain_graph=True)[0].abs().max() > 0


@pytest.mark.parametrize("dense", [False, True])
def test_local_views_leave_running_statistics_to_the_whole_ones(make_net, views, local, dense):
    net, other = make_net(), make_net()
    method(0.8).project(net, *views, local=local, dense=dense)
    method(0.8).project(other, *views, dense=dense)
    found, expected = statistics(net), statistics(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- the coding rate, and other losses in every term ---


@pytest.mark.parametrize("encoders", ["both", "host", "slim"])
@pytest.mark.parametrize("settings", [{}, {"symmetric": True}])
def test_rate_is_the_mean_over_the_encoders_asked_for(make_net, views, local, encoders, settings):
    arm = method(0.8, scale=0.1, rate_encoders=encoders, rate_epsilon=0.3, **settings)
    projections = arm.project(make_many(make_net), *views, local=local)
    found, without = arm.losses(projections, rate_weight=0.7), arm.losses(projections)

    def mean_rate(sets):
        return sum(float(coding_rate(z.detach(), epsilon=0.3)) for z in sets) / len(sets)

    learn = bool(settings)
    host = mean_rate([projections.host_a, *([projections.host_b] if learn else [])])
    slim = mean_rate([*projections.slim_b, *([projections.slim_a] if learn else [])])
    expected = {"both": (host + slim) / 2, "host": host, "slim": slim}[encoders]
    assert float(found.coding_rate) == pytest.approx(expected, rel=1e-5)
    assert without.coding_rate is None
    assert float((found.total - without.total).detach()) == pytest.approx(-0.7 * expected, rel=1e-4)


def test_frozen_projections_have_no_rate(make_net, views):
    """Their encoders' rate is that of the passes that learn."""
    arm = method(0.8)
    projections = arm.project(make_net(), *views)
    changed = projections._replace(slim_a=torch.randn(16, 6), host_b=torch.randn(16, 6))
    rates = [arm.losses(given, rate_weight=1.0).coding_rate for given in (projections, changed)]
    assert torch.equal(*rates)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["simclr", "cosine"])
def test_another_loss_stands_in_every_term(make_net, views, arm, name):
    host_width, alpha = ARMS[arm]
    comparison = Comparison(name, temperature=0.3, off_diagonal=OFF_DIAGONAL)
    other = SaclXd(alpha=alpha, comparison=comparison)
    with torch.no_grad():
        projections = other.project(make_net(host_width=host_width), *views)
    host_a, (slim_b,), slim_a, host_b, _ = projections
    found = other.losses(projections)
    expected = float(comparison(host_a, slim_b))
    assert float(found.sacl) == expected
    if alpha < 1:
        xd_host = float(comparison(host_a, host_a if slim_a is None else slim_a))
        xd_slim = float(comparison(slim_b, slim_b if host_b is None else host_b))
        expected = alpha * expected + (1 - alpha) * (xd_host + xd_slim) / 2
    assert float(found.total) == pytest.approx(expected, rel=1e-5)
    # What the alarms look at is that of the correlation, whatever is trained with.
    watched = cross_correlation_loss(host_a, slim_b, off_diagonal=0.0)
    assert torch.equal(found.diagonal, watched.diagonal)
    assert torch.equal(found.off_diagonal_rms, watched.off_diagonal_rms)
