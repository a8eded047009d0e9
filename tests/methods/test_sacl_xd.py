"""SACL-XD: which passes run, what they leave alone, and what the terms add up to."""

from functools import partial

import pytest
import torch
from methods_of import losses, method_of, project
from torch.func import functional_call

from edgecl.methods.losses import alignment_loss, coding_rate, contrastive_loss, cross_correlation_loss
from edgecl.methods.method import Embeddings
from edgecl.methods.sacl_xd import other_width_units, sandwich

OFF_DIAGONAL = 0.05
ARMS = {
    "Barlow Twins": (1.0, 1.0),
    "XD only": (1.0, 0.8),
    "SACL only": (2.0, 1.0),
    "SACL-XD": (2.0, 0.8),
}


def method(net, alpha, *, dense=False, **settings):
    settings = {"off_diagonal": OFF_DIAGONAL, **settings}
    return method_of(net, alpha=alpha, slow_start=float(dense), **settings)


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


WIDTHS = (1.0, 0.75, 0.5)
HOST_ONLY = [("host", "A", "learns"), ("host", "B", "learns")]
PAIR = [("host", "A", "learns"), ("slim", "B", "learns")]
SWAPPED = [("slim", "A", "frozen"), ("host", "B", "frozen")]
FOUR = [*PAIR, ("slim", "A", "learns"), ("host", "B", "learns")]
STEP = [*PAIR, ("slim 0.5", "B", "learns")]
SLIM_ONLY = {"xd_direction": "slim_only"}


def make_many(make_net, host_width=2.0, widths=WIDTHS):
    return make_net(host_width=host_width, slim_width=widths[0], other_widths=widths[1:])


@pytest.mark.parametrize(
    ("widths", "alpha", "settings", "expected"),
    [
        ((1.0, 1.0), 1.0, {}, HOST_ONLY),
        ((1.0, 1.0), 0.8, {}, HOST_ONLY),
        ((1.0, 1.0), 0.8, SLIM_ONLY, HOST_ONLY),
        ((2.0, 1.0), 1.0, {}, PAIR),
        ((2.0, 1.0), 0.8, {}, PAIR + SWAPPED),
        ((2.0, 1.0), 0.8, SLIM_ONLY, [*PAIR, ("host", "B", "frozen")]),
        ((2.0, 1.0), 0.0, {}, PAIR + SWAPPED),
        ((2.0, 1.0), 1.0, {"dense": True}, HOST_ONLY),
        ((2.0, 1.0), 0.8, {"dense": True}, HOST_ONLY),
        ((2.0, 1.0), 0.8, {"dense": True, **SLIM_ONLY}, HOST_ONLY),
        # several widths
        ((2.0, 1.0, 0.5), 1.0, {}, STEP),
        ((2.0, 1.0, 0.5), 0.8, {}, STEP + SWAPPED),
        ((2.0, *WIDTHS), 0.8, {}, [*STEP, ("slim 0.75", "B", "learns"), *SWAPPED]),
        ((2.0, 1.0, 0.5), 0.8, {"dense": True}, HOST_ONLY),
        ((1.0, 1.0, 0.5), 0.8, {}, [*HOST_ONLY, ("slim 0.5", "B", "learns")]),
        ((1.0, 1.0, 0.5), 1.0, {"dense": True}, HOST_ONLY),
        # gradient through all four passes
        ((2.0, 1.0), 0.8, {"symmetric": True}, FOUR),
        ((2.0, 1.0), 1.0, {"symmetric": True}, FOUR),
        ((2.0, 1.0), 0.8, {"symmetric": True, **SLIM_ONLY}, FOUR),
        ((2.0, 1.0), 0.8, {"learn_targets": True}, FOUR),
        ((2.0, 1.0), 0.8, {"learn_targets": True, **SLIM_ONLY}, [*PAIR, FOUR[-1]]),
        ((2.0, 1.0), 1.0, {"learn_targets": True}, PAIR),
        ((2.0, 1.0), 0.8, {"symmetric": True, "dense": True}, HOST_ONLY),
        ((1.0, 1.0), 0.8, {"symmetric": True, "learn_targets": True}, HOST_ONLY),
    ],
)
def test_a_step_runs_exactly_its_passes(make_net, views, widths, alpha, settings, expected):
    """The first width is the host's."""
    net = make_many(make_net, widths[0], widths[1:])
    calls = spy(net)
    found = project(method(net, alpha, **settings), *views)
    assert named(calls, *views) == sorted(expected)
    assert len(found.slim_b) == (1 if settings.get("dense") else len(widths) - 1)


def test_views_are_swapped_by_the_step_in_all_passes_alike(make_net, views):
    net = make_net().eval()
    arm, straight = method(net, 0.8, swap_views=0.5), method(net, 0.8)
    swapped = 0
    for step in range(40):
        found = project(arm, *views, step=step)
        orders = [project(straight, *pair) for pair in (views, views[::-1])]
        same = [
            all(
                torch.equal(getattr(found, name), getattr(order, name))
                for name in ("host_a", "slim_a", "host_b")
            )
            and torch.equal(found.slim_b[0], order.slim_b[0])
            for order in orders
        ]
        assert sum(same) == 1
        swapped += same[1]
    assert 8 < swapped < 32


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("learn_targets", [False, True])
def test_targets_of_equal_encoders_are_the_learned_projections(make_net, views, dense, learn_targets):
    """Detached, unless targets learn."""
    net = make_net(host_width=2.0 if dense else 1.0)
    one = method(net, 0.0, dense=dense, learn_targets=learn_targets)
    found = project(one, *views)
    assert found.slim_a is None
    assert found.host_b is None
    terms = losses(one, found)
    for term, z in ((terms.xd_host, found.host_a), (terms.xd_slim, found.slim_b[0])):
        target = z if learn_targets else z.detach()
        assert torch.equal(term, correlation_loss(z, target).detach())
        pull = torch.autograd.grad(correlation_loss(z, target) / 2, z, retain_graph=True)[0]
        found_pull = torch.autograd.grad(terms.total, z, retain_graph=True)[0]
        torch.testing.assert_close(found_pull, pull, rtol=1e-4, atol=1e-7)


def test_frozen_passes_use_batch_statistics(make_net, views):
    net, other = make_net(), make_net()
    found = project(method(net, 0.8), *views)
    with torch.no_grad():
        assert torch.equal(found.slim_a, other.train().forward_slim(views[0]))
        assert torch.equal(found.host_b, other.forward_host(views[1]))


def statistics(net):
    return {
        name: tensor.clone()
        for name, tensor in net.state_dict().items()
        if "running" in name or "tracked" in name
    }


def test_statistics_after_a_step_are_those_of_the_learning_passes_alone(make_net, views):
    net, other = make_net(), make_net()
    project(method(net, 0.8), *views)
    other.forward_host(views[0])
    other.forward_slim(views[1])
    found, expected = statistics(net), statistics(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tracking_comes_back_after_a_frozen_pass_that_fails(make_net):
    net = make_net()
    with pytest.raises(RuntimeError), net.frozen():
        net.forward_host(torch.zeros(2, 5, 8, 8))
    assert all(
        module.track_running_stats for module in net.modules() if hasattr(module, "track_running_stats")
    )
    assert torch.is_grad_enabled()


def test_only_the_total_carries_gradient(make_net, views):
    arm = method(make_net(), 0.8, coding_rate={"weight": 0.1})
    found = vars(losses(arm, project(arm, *views)))
    assert [name for name, term in found.items() if term.requires_grad] == ["total"]
    assert len(found) == 7


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
    one = method(net, alpha, dense=dense, **settings)
    project(one, *views)
    units = {"host": 0.0, "slim": 0.0}
    for name, learns, _ in calls:
        units[name] += 3 if learns else 1
    assert units == one.config.forward_units(one_net=host_width == 1.0, slow_start=float(dense))


# --- several widths ---


@pytest.mark.parametrize("host_width", [1.0, 2.0])
def test_projections_of_each_width_stand_from_the_widest_on(make_net, views, host_width):
    net = make_many(make_net, host_width).eval()
    found = project(method(net, 0.8), *views)
    assert torch.equal(found.host_a, net.forward_host(views[0]))
    for projection, width in zip(found.slim_b, WIDTHS, strict=True):
        assert torch.equal(projection, net.forward_slim(views[1], width))
    if host_width == 2.0:
        assert torch.equal(found.slim_a, net.forward_slim(views[0]))
        assert torch.equal(found.host_b, net.forward_host(views[1]))
    else:
        assert found.slim_a is None
        assert found.host_b is None


def test_the_frozen_passes_can_be_left_out(make_net, views):
    net = make_many(make_net, widths=(1.0, 0.5)).eval()
    calls = spy(net)
    learnt, targets = method(net, 0.8)(views, 0, True)
    assert named(calls, *views) == sorted(STEP)
    assert list(learnt) == ["host_a", "slim_b", "slim_b@0.5"]
    assert targets == {}
    whole = method(net, 0.8)(views, 0)
    assert list(whole.targets) == ["slim_a", "host_b"]
    for name, part in learnt.items():
        assert torch.equal(part, whole.learnt[name])


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_terms_of_several_widths_are_their_means(make_net, views, alpha, direction):
    scaled = method(make_many(make_net), alpha, scale=0.1, xd_direction=direction)
    with torch.no_grad():
        projections = project(scaled, *views)
    host_a, slim_b = projections.host_a, projections.slim_b
    assert len(slim_b) == 3
    found = losses(scaled, projections)
    single = [cross_correlation_loss(host_a, z, off_diagonal=OFF_DIAGONAL) for z in slim_b]
    sacl = sum(float(loss.total) for loss in single) / 3
    assert float(found.sacl) == pytest.approx(sacl, rel=1e-6)
    assert torch.equal(found.diagonal, single[0].diagonal)
    assert torch.equal(found.off_diagonal_rms, single[0].off_diagonal_rms)
    expected = sacl
    if alpha < 1:
        xd_slim = sum(float(correlation_loss(z, projections.host_b)) for z in slim_b) / 3
        assert float(found.xd_slim) == pytest.approx(xd_slim, rel=1e-6)
        distillation = xd_slim
        if direction == "both":
            xd_host = float(correlation_loss(host_a, projections.slim_a))
            distillation = (xd_host + xd_slim) / 2
            assert float(found.xd_host) == pytest.approx(xd_host, rel=1e-6)
        expected = alpha * sacl + (1 - alpha) * distillation
    assert (found.xd_slim is None) == (alpha == 1)
    assert (found.xd_host is None) == (alpha == 1 or direction == "slim_only")
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
    scaled = method(net, alpha, dense=dense, scale=0.1, xd_direction=direction)
    for _ in range(3):
        found = losses(scaled, project(scaled, *views)).total
        expected = plain_step(plain, *views, alpha=alpha, direction=direction, dense=dense)
        assert torch.equal(found, expected)
        for each, loss in ((net, found), (plain, expected)):
            each.zero_grad()
            loss.backward()
            torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9).step()
    for (name, tensor), other in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("widths", [(1.0,), (0.5, 1.0), (0.5, 0.75, 1.0), (1.0, 1.0, 0.5, 0.5)])
def test_up_to_three_widths_are_all_in_every_step(widths):
    expected = tuple(sorted(set(widths), reverse=True))
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


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_units_of_several_widths_count_the_passes_that_run(make_net, views, arm, dense, direction):
    widths = (1.0, 0.875, 0.75, 0.5)
    host_width, alpha = ARMS[arm]
    net = make_many(make_net, host_width, widths)
    calls = spy(net)
    steps = 200
    arms = method(net, alpha, dense=dense, xd_direction=direction, total_steps=steps)
    for step in range(steps):
        project(arms, *views, step=step)
    units = dict.fromkeys(["host", "slim", "slim 0.875", "slim 0.75", "slim 0.5"], 0.0)
    for name, learns, _ in calls:
        units[name] += (3 if learns else 1) / steps
    expected = {
        **arms.config.forward_units(one_net=host_width == 1.0, slow_start=float(dense)),
        **{
            f"slim {width:g}": count
            for width, count in other_width_units(widths, slow_start=float(dense)).items()
        },
    }
    for name, count in expected.items():
        assert units[name] == pytest.approx(count, abs=0.3 if name in ("slim 0.875", "slim 0.75") else 1e-9)


# --- gradient through all four passes ---


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("learn_targets", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_terms_of_symmetric_passes_are_the_means_over_both_views(
    make_net, views, alpha, learn_targets, direction
):
    settings = {"symmetric": True, "learn_targets": learn_targets, "xd_direction": direction}
    both = method(make_net(), alpha, scale=0.1, **settings)
    projections = project(both, *views)
    host_a, (slim_b,) = projections.host_a, projections.slim_b
    slim_a, host_b = projections.slim_a, projections.host_b
    found = losses(both, projections)

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
        arm = method(net, 0.0, learn_targets=learn_targets)
        projections = project(arm, *views)
        assert projections.slim_a.requires_grad is projections.host_b.requires_grad is learn_targets
        gradients[learn_targets] = torch.autograd.grad(losses(arm, projections).total, net.host[0].weight)[0]
    assert not torch.allclose(gradients[False], gradients[True], rtol=1e-2)


@pytest.mark.parametrize("alpha", [1.0, 0.8])
@pytest.mark.parametrize("case", ["dense", "one net"])
def test_symmetric_passes_change_nothing_where_one_net_takes_both_views(make_net, views, alpha, case):
    """Total and gradient: a frozen pair among the terms would halve it."""
    pulls = []
    for settings in ({}, {"symmetric": True}):
        net = make_net(host_width=1.0 if case == "one net" else 2.0)
        arm = method(net, alpha, dense=case == "dense", **settings)
        losses(arm, project(arm, *views)).total.backward()
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
    net = make_net()
    calls = spy(net)
    found = project(method(net, 1.0, dense=dense, symmetric=symmetric), *views, local=local)
    small = [("host" if dense else "slim", f"local {number}", "learns") for number in range(2)]
    whole = HOST_ONLY if dense else FOUR if symmetric else PAIR
    assert named(calls, *views, *local) == sorted([*whole, *small])
    assert len(found.local) == 2


def test_local_views_stand_beside_view_b_in_the_contrastive_term(make_net, views, local):
    arm = method(make_net(), 0.8)
    projections = project(arm, *views, local=local)
    found = losses(arm, projections)
    pairs = [correlation_loss(projections.host_a, z) for z in (*projections.slim_b, *projections.local)]
    assert float(found.sacl) == pytest.approx(float(sum(pairs).detach()) / 3, rel=1e-6)
    learnt, targets = projections.embeddings
    alone = losses(arm, Embeddings({name: learnt[name] for name in ("host_a", "slim_b")}, targets))
    assert torch.equal(found.xd_slim, alone.xd_slim)
    assert torch.equal(found.diagonal, alone.diagonal)
    for z in projections.local:
        assert torch.autograd.grad(found.total, z, retain_graph=True)[0].abs().max() > 0


@pytest.mark.parametrize("dense", [False, True])
def test_local_views_leave_running_statistics_to_the_whole_ones(make_net, views, local, dense):
    net, other = make_net(), make_net()
    project(method(net, 0.8, dense=dense), *views, local=local)
    project(method(other, 0.8, dense=dense), *views)
    found, expected = statistics(net), statistics(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- the coding rate, and other losses in every term ---


@pytest.mark.parametrize("encoders", ["both", "host", "slim"])
@pytest.mark.parametrize("settings", [{}, {"symmetric": True}])
def test_rate_is_the_mean_over_the_encoders_asked_for(make_net, views, local, encoders, settings):
    net, rate = make_many(make_net), {"encoders": encoders, "epsilon": 0.3, "weight": 0.7}
    arm, plain = (method(net, 0.8, scale=0.1, **settings, **more) for more in ({"coding_rate": rate}, {}))
    projections = project(arm, *views, local=local)
    found, without = losses(arm, projections), losses(plain, projections)

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
    arm = method(make_net(), 0.8, coding_rate={"weight": 1.0})
    found = arm(views, 0)
    changed = Embeddings(found.learnt, {name: torch.randn(16, 6) for name in found.targets})
    rates = [losses(arm, given).coding_rate for given in (found, changed)]
    assert torch.equal(*rates)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["simclr", "cosine"])
def test_another_loss_stands_in_every_term(make_net, views, arm, name):
    host_width, alpha = ARMS[arm]
    # The weight of the rate is the least that lets the cosine pass.
    rate = {"weight": 1e-30}
    other = method(make_net(host_width=host_width), alpha, loss=name, temperature=0.3, coding_rate=rate)
    with torch.no_grad():
        projections = project(other, *views)
    host_a, (slim_b,) = projections.host_a, projections.slim_b
    slim_a, host_b = projections.slim_a, projections.host_b
    found = losses(other, projections)
    comparison = {"simclr": partial(contrastive_loss, temperature=0.3), "cosine": alignment_loss}[name]
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
