"""SACL-XD: which passes run, what they leave alone, and what the terms add up to."""

import copy

import pytest
import torch
from torch.func import functional_call

from edgecl.methods.losses import cross_correlation_loss, cross_distillation_loss
from edgecl.methods.sacl_xd import (
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
    for width, view in net._views.items():
        name = "slim" if width == net.slim_width else f"slim {width:g}"
        view.skeleton.forward = note(name, view.skeleton.forward)
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


def flat(projections):
    """Projections as a plain list of tensors, the slim widths in a row."""
    return [
        projections.host_a,
        *projections.slim_b,
        *(frozen for frozen in projections[2:] if frozen is not None),
    ]


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
    for projection, other in zip(flat(found), expected, strict=True):
        assert torch.equal(projection, other)
    assert not torch.equal(found.host_a, found.frozen_slim_a)


def test_passes_module_gives_the_methods_projections(make_net, views):
    net = make_net()
    net.eval()
    wrapped = Passes(net, method(0.8))(*views, True)
    alone = method(0.8).project(net, *views, dense=True)
    for projection, other in zip(flat(wrapped), flat(alone), strict=True):
        assert torch.equal(projection, other)
    assert len(flat(wrapped)) == 4


@pytest.mark.parametrize("dense", [False, True])
def test_frozen_projections_of_equal_encoders_are_the_learned_ones_detached(make_net, views, dense):
    net = make_net(host_width=2.0 if dense else 1.0)
    found = method(0.8).project(net, *views, dense=dense)
    assert torch.equal(found.frozen_slim_a, found.host_a)
    assert torch.equal(found.frozen_host_b, found.slim_b[0])
    assert not found.frozen_slim_a.requires_grad
    assert not found.frozen_host_b.requires_grad


def test_frozen_projections_carry_no_gradient(make_net, views):
    found = method(0.8).project(make_net(), *views)
    assert found.host_a.requires_grad
    assert found.slim_b[0].requires_grad
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
    sacl = cross_correlation_loss(projections.host_a, projections.slim_b[0], off_diagonal=OFF_DIAGONAL).total
    assert torch.equal(found.sacl, sacl.detach())
    if alpha == 1:
        assert found.xd_host is None
        assert found.xd_slim is None
        distillation = torch.tensor(0.0)
    else:
        host_b = projections.frozen_host_b
        xd_slim = cross_distillation_loss(projections.slim_b[0], host_b, off_diagonal=OFF_DIAGONAL)
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
    assert torch.equal(found.frozen_slim_a, net.forward_slim(views[0]))
    assert torch.equal(found.frozen_host_b, net.forward_host(views[1]))


def test_the_module_hands_on_widths_and_can_leave_the_frozen_passes_out(make_net, views):
    net = make_many(make_net).eval()
    calls = spy(net)
    found = Passes(net, method(0.8))(*views, False, (1.0, 0.5), True)
    assert named(calls, *views) == sorted(STEP)
    assert found.frozen_slim_a is None
    assert found.frozen_host_b is None
    assert len(found.slim_b) == 2
    whole = Passes(net, method(0.8))(*views, widths=(1.0, 0.5))
    later = method(0.8).frozen_passes(net, *views, (found.host_a, found.slim_b))
    for part, expected in zip([*flat(found), *later], flat(whole), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_terms_of_several_widths_are_their_means(make_net, views, alpha, direction):
    scaled = method(alpha, scale=0.1, xd_direction=direction)
    with torch.no_grad():
        projections = scaled.project(make_many(make_net), *views)
    host_a, slim_b, slim_a, host_b = projections
    assert len(slim_b) == 3
    found = scaled.losses(projections)
    single = [cross_correlation_loss(host_a, z, off_diagonal=OFF_DIAGONAL) for z in slim_b]
    sacl = sum(float(loss.total) for loss in single) / 3
    assert float(found.sacl) == pytest.approx(sacl, rel=1e-6)
    assert torch.equal(found.diagonal, single[0].diagonal)
    assert torch.equal(found.off_diagonal_rms, single[0].off_diagonal_rms)
    expected = sacl
    if alpha < 1:
        xd_slim = (
            sum(float(cross_distillation_loss(z, host_b, off_diagonal=OFF_DIAGONAL)) for z in slim_b) / 3
        )
        assert float(found.xd_slim) == pytest.approx(xd_slim, rel=1e-6)
        distillation = xd_slim
        if direction == "both":
            xd_host = float(cross_distillation_loss(host_a, slim_a, off_diagonal=OFF_DIAGONAL))
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
        **forward_units(arm=arm, xd_direction=direction, slow_start=float(dense)),
        **{
            f"slim {width:g}": count
            for width, count in other_width_units(widths, slow_start=float(dense)).items()
        },
    }
    for name, count in expected.items():
        assert units[name] == pytest.approx(count, abs=0.3 if name in ("slim 0.875", "slim 0.75") else 1e-9)
