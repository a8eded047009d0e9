"""Each method's loss against the published formula, written here in plain NumPy; its gradient against finite differences."""

import numpy as np
import pytest
import torch
from methods_of import method_of

from edgecl.config.recipe import read_recipe
from edgecl.methods.dino import Assigner, even_codes
from edgecl.methods.method import Embeddings
from edgecl.methods.momentum import Follower, Queue, rising_momentum
from edgecl.methods.rekd import nearest

N, D, K, FEATURES = 7, 6, 9, 1024
TEACHER = {"arch": "mobilenetv3_small_050", "weights": "untrained"}


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def softmax(x):
    return np.exp(log_softmax(x))


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def embeddings(count, size=D, *, first=0):
    """Give sets of embeddings that are alike, as those of one picture's views are."""
    common = draw(N, size, seed=100)
    return [common + 0.7 * draw(N, size, seed=first + number) for number in range(count)]


@pytest.fixture
def method(make_net):
    def make(name, **settings):
        one = method_of(make_net(host_width=1.0), name, **{"batch_size": K, **settings}).double()
        for queue in (module for module in one.modules() if isinstance(module, Queue)):
            queue.rows.copy_(
                torch.from_numpy(draw(*queue.rows.shape, seed=len(queue.rows) + queue.rows.shape[1]))
            )
        return one

    return make


def rows(queue):
    return queue.rows.numpy().copy()


def check(method, reference, learnt, targets=None, *, held=None, rel=1e-9):
    """Compare value and gradient of a method's loss with a reference of the learnt embeddings, by name."""
    targets = targets or {}
    given = {name: torch.from_numpy(z).requires_grad_() for name, z in learnt.items()}
    frozen = {name: torch.from_numpy(z) for name, z in targets.items()}
    others = {name: torch.from_numpy(z) for name, z in (held or {}).items()}
    total, terms = method.loss(Embeddings({**others, **given}, frozen), 0)
    assert float(total.detach()) == pytest.approx(reference(learnt), rel=rel)
    total.backward()
    step = 1e-5
    for name, z in learnt.items():
        expected = np.zeros_like(z)
        for place in list(np.ndindex(z.shape))[:: max(1, z.size // 17)]:
            sides = []
            for sign in (1, -1):
                moved = z.copy()
                moved[place] += sign * step
                sides.append(reference({**learnt, name: moved}))
            expected[place] = (sides[0] - sides[1]) / (2 * step)
            found = float(given[name].grad[place])
            assert found == pytest.approx(expected[place], rel=1e-5, abs=1e-7), (name, place)
        assert np.abs(expected).max() > 1e-6, name
    return terms


# --- without a teacher ---


def standardized(z):
    return (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)


def barlow(a, b, off_diagonal):
    c = standardized(a).T @ standardized(b) / len(a)
    diagonal = np.diag(c)
    return ((1 - diagonal) ** 2).sum() + off_diagonal * ((c**2).sum() - (diagonal**2).sum())


def test_barlow_twins(method):
    one = method("barlow-twins", off_diagonal=0.1, scale=0.3)
    a, b = embeddings(2)
    check(one, lambda z: 0.3 * barlow(z["view_0"], z["view_1"], 0.1), {"view_0": a, "view_1": b})


def test_xd_decorrelates_each_view_with_itself_held(method):
    one = method("xd", alpha=0.8, off_diagonal=0.1, scale=0.3)
    a, b = embeddings(2)

    def reference(z):
        between = barlow(z["view_0"], z["view_1"], 0.1)
        # The second of each pair is held where it is, as the frozen pass is.
        within = (barlow(z["view_0"], a, 0.1) + barlow(z["view_1"], b, 0.1)) / 2
        return 0.3 * (0.8 * between + 0.2 * within)

    check(one, reference, {"view_0": a, "view_1": b})


def test_vicreg(method):
    one = method("vicreg", invariance=20.0, variance=15.0, covariance=2.0)

    def half(z):
        short = np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()
        covariance = np.cov(z.T)
        return 15 * short / 2 + 2 * ((covariance**2).sum() - (np.diag(covariance) ** 2).sum()) / z.shape[1]

    def reference(z):
        a, b = z["view_0"], z["view_1"]
        return 20 * ((a - b) ** 2).mean() + half(a) + half(b)

    a, b = embeddings(2)
    check(one, reference, {"view_0": 0.6 * a, "view_1": 0.6 * b})


def two_minus_cosine(a, b):
    return (2 - 2 * (unit(a) * unit(b)).sum(-1)).mean()


def rate(z, epsilon=0.5):
    """1/2 logdet(I + D / (N epsilon) U^T U), U the standardized rows at length 1."""
    u = unit(standardized(z))
    return np.linalg.slogdet(np.eye(u.shape[1]) + u.shape[1] / (len(u) * epsilon) * u.T @ u)[1] / 2


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_byol_pairs_each_guess_with_the_other_views_targets_and_rates_the_projections(method, weight):
    one = method("byol", local_count=1, coding_rate={"weight": weight})
    t0, t1 = embeddings(2, first=10)
    g0, g1, local = embeddings(3)
    v0, v1 = embeddings(2, first=20)

    def reference(z):
        pairs = [("guess_0", t1), ("guess_1", t0), ("guess_2", t0), ("guess_2", t1)]
        loss = np.mean([two_minus_cosine(z[name], target) for name, target in pairs])
        return loss - weight * (rate(z["view_0"]) + rate(z["view_1"])) / 2

    guesses, whole = {"guess_0": g0, "guess_1": g1, "guess_2": local}, {"view_0": v0, "view_1": v1}
    if weight:
        check(one, reference, {**whole, **guesses}, {"target_0": t0, "target_1": t1})
    else:  # the projections learn through their guesses alone
        check(one, lambda z: reference({**whole, **z}), guesses, {"target_0": t0, "target_1": t1}, held=whole)


def info_nce(query, key, queue, temperature):
    q, k, others = unit(query), unit(key), unit(queue)
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ others.T], axis=1) / temperature
    return -log_softmax(logits)[:, 0].mean()


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_v2(method, symmetric):
    one = method("moco-v2", queue_steps=1, temperature=0.3, symmetric=symmetric)
    queue = rows(one.queue)
    k0, k1 = embeddings(2, first=10)
    v0, v1 = embeddings(2)
    pairs = [("view_0", k1), ("view_1", k0)][: 1 + symmetric]

    def reference(z):
        return np.mean([info_nce(z[name], key, queue, 0.3) for name, key in pairs])

    learnt = {"view_0": v0, "view_1": v1} if symmetric else {"view_0": v0}
    check(one, reference, learnt, {"key_1": k1, **({"key_0": k0} if symmetric else {})})
    one.after_step(0)
    np.testing.assert_allclose(rows(one.queue), np.concatenate([k1, queue])[:K])


def test_ssl_small_is_moco_v2_with_what_small_nets_need():
    recipe = read_recipe("demo", ["method.name=ssl-small"])
    assert recipe.method.temperature == 0.1
    assert recipe.projector.sizes == (2048, 128)
    assert (recipe.views.jitter, recipe.views.grayscale, recipe.views.blur) == (1.0, 0.5, (0.5, 0.5))


@pytest.mark.parametrize("targets", ["even", "centered"])
def test_dino_assigns_views_as_the_slow_copy_does(method, targets):
    settings = {"student_temperature": 0.2, "teacher_temperature": 0.1, "targets": targets}
    one = method("dino", prototypes=K, local_count=1, **settings)
    center = draw(K, seed=3)
    one.center.copy_(torch.from_numpy(center))
    t0, t1 = (unit(z) for z in embeddings(2, K, first=10))
    v0, v1, local = embeddings(3, K)
    assigned = {"even": lambda t: sinkhorn(t, 0.1), "centered": lambda t: softmax((t - center) / 0.1)}
    aims = [assigned[targets](t) for t in (t0, t1)]

    def reference(z):
        pairs = [("view_0", 1), ("view_1", 0), ("local_0", 0), ("local_0", 1)]
        return np.mean([-(aims[target] * log_softmax(z[name] / 0.2)).sum(1).mean() for name, target in pairs])

    learnt = {"view_0": v0, "view_1": v1, "local_0": local}
    terms = check(one, reference, learnt, {"target_0": t0, "target_1": t1})
    share = np.mean(aims, axis=(0, 1))
    assert float(terms["target_entropy"]) == pytest.approx(-(share * np.log(share)).sum(), rel=1e-9)
    one.after_step(0)
    np.testing.assert_allclose(one.center.numpy(), 0.9 * center + 0.1 * np.mean([t0, t1], axis=(0, 1)))


def test_prototypes_and_projections_are_compared_as_directions():
    torch.manual_seed(0)
    assigner = Assigner(D, K, learn=True).double()
    z = draw(N, D, seed=1)
    expected = unit(standardized(z)) @ unit(assigner.weight.detach().numpy()).T
    np.testing.assert_allclose(assigner(torch.from_numpy(3 * z)).detach().numpy(), expected, atol=1e-4)


# --- with labels ---


def test_supcon(method):
    one = method("supcon", temperature=0.4)
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    a, b = embeddings(2)

    def reference(z):
        views, classes = unit(np.concatenate([z["view_0"], z["view_1"]])), np.tile(labels, 2)
        total = 0.0
        for i in range(2 * N):
            others = [j for j in range(2 * N) if j != i]
            chances = log_softmax(np.array([views[i] @ views[j] for j in others]) / 0.4)
            total -= np.mean([c for c, j in zip(chances, others, strict=True) if classes[j] == classes[i]])
        return total / (2 * N)

    check(one, reference, {"view_0": a, "view_1": b}, {"labels": labels})


# --- with a teacher ---


def test_seed(method):
    one = method("seed", queue=K, student_temperature=0.3, teacher_temperature=0.05, teacher=TEACHER)
    queue = unit(rows(one.queue))
    (guess,), (taught,) = embeddings(1, FEATURES), embeddings(1, FEATURES, first=10)

    def likeness(z, t):
        return np.concatenate([(unit(z) * unit(t)).sum(1, keepdims=True), unit(z) @ queue.T], axis=1)

    def reference(z):
        aim = softmax(likeness(taught, taught) / 0.05)
        return -(aim * log_softmax(likeness(z["view_0"], taught) / 0.3)).sum(1).mean()

    check(one, reference, {"view_0": guess}, {"teacher_0": taught})
    one.after_step(0)
    np.testing.assert_allclose(rows(one.queue)[:N], taught)


def test_disco(method):
    one = method("disco", queue_steps=1, weight=0.5, temperature=0.3, teacher=TEACHER)
    queue = rows(one.queue)
    (v0, v1), (k0, k1) = embeddings(2), embeddings(2, first=10)
    (g0, g1), (t0, t1) = embeddings(2, FEATURES), embeddings(2, FEATURES, first=10)

    def reference(z):
        contrastive = (info_nce(z["view_0"], k1, queue, 0.3) + info_nce(z["view_1"], k0, queue, 0.3)) / 2
        distances = [
            ((unit(z[name]) - unit(t)) ** 2).sum(1).mean() for name, t in (("guess_0", t0), ("guess_1", t1))
        ]
        return contrastive + 0.5 * np.mean(distances)

    learnt = {"view_0": v0, "view_1": v1, "guess_0": g0, "guess_1": g1}
    check(one, reference, learnt, {"key_0": k0, "key_1": k1, "teacher_0": t0, "teacher_1": t1})


def test_rekd_takes_the_teachers_neighbors_for_positives(method):
    one = method("rekd", queue_steps=1, neighbors=3, weight=0.5, temperature=0.3, teacher=TEACHER)
    queue, taught = rows(one.queue), rows(one.taught)
    (query,), (key,), (features,) = embeddings(1), embeddings(1, first=10), embeddings(1, FEATURES)
    alike = np.argsort(-(unit(features) @ unit(taught).T), axis=1)[:, :3]

    def reference(z):
        chances = log_softmax(unit(z["view_0"]) @ unit(queue).T / 0.3)
        relation = -np.take_along_axis(chances, alike, 1).mean()
        return info_nce(z["view_0"], key, queue, 0.3) + 0.5 * relation

    found = nearest(torch.from_numpy(features), torch.from_numpy(taught), count=3).numpy()
    assert np.array_equal(np.sort(found), np.sort(alike))
    check(one, reference, {"view_0": query}, {"key_1": key, "teacher_0": features})
    one.after_step(0)
    np.testing.assert_allclose(rows(one.queue)[:N], key)
    np.testing.assert_allclose(rows(one.taught)[:N], features)


def test_crd_tells_pairs_of_one_picture_from_pairs_of_two(method):
    one = method("crd", temperature=0.5, dimensions=D, teacher=TEACHER)
    (s,), (t,) = embeddings(1), embeddings(1, first=10)

    def h(cosine):
        e = np.exp(cosine / 0.5)
        return e / (e + N - 1)

    def reference(z):
        s, t = unit(z["view_0"]), unit(z["teacher_0"])
        same = -2 * np.log(h((s * t).sum(1))).sum()
        others = [
            -np.log(1 - h(s[i] @ t[j])) - np.log(1 - h(t[i] @ s[j]))
            for i in range(N)
            for j in range(N)
            if i != j
        ]
        return (same + sum(others)) / N

    check(one, reference, {"view_0": s, "teacher_0": t})


def test_xd_with_a_teacher(method):
    one = method("xd-teacher", alpha=0.6, off_diagonal=0.1, scale=0.3, teacher=TEACHER)
    (a, b), (guess_a, guess_b) = embeddings(2), embeddings(2, FEATURES)
    t_a, t_b = embeddings(2, FEATURES, first=10)

    def reference(z):
        taught = (barlow(z["guess_a"], t_a, 0.1) + barlow(z["guess_b"], t_b, 0.1)) / 2
        return 0.3 * (0.6 * barlow(z["host_a"], z["slim_b"], 0.1) + 0.4 * taught)

    learnt = {"host_a": a, "slim_b": b, "guess_a": guess_a, "guess_b": guess_b}
    check(one, reference, learnt, {"teacher_a": t_a, "teacher_b": t_b})


def sinkhorn(likeness, epsilon):
    shares = np.exp(likeness / epsilon)
    shares /= shares.sum()
    for _ in range(3):
        shares /= shares.sum(0) * shares.shape[1]
        shares /= shares.sum(1, keepdims=True) * len(shares)
    return shares * len(shares)


def test_oss_teaches_by_swav_and_distills_from_the_slow_copy(method):
    one = method("oss", prototypes=K, temperature=0.2, evenness=0.3, teacher=TEACHER)
    (v0, v1), (t0, t1), (slow0, slow1) = (
        [unit(z) for z in embeddings(2, K, first=first)] for first in (0, 10, 20)
    )
    # The codes are held, as the published method stops their gradient.
    codes = sinkhorn(t0, 0.3), sinkhorn(t1, 0.3)

    def assigned(aim, z):
        return -(aim * log_softmax(z / 0.2)).sum(1).mean()

    def reference(z):
        swav = (assigned(codes[1], z["teacher_0"]) + assigned(codes[0], z["teacher_1"])) / 2
        aims = softmax(slow0 / 0.2), softmax(slow1 / 0.2)
        return swav + (assigned(aims[0], z["view_0"]) + assigned(aims[1], z["view_1"])) / 2

    learnt = {"view_0": v0, "view_1": v1, "teacher_0": t0, "teacher_1": t1}
    check(one, reference, learnt, {"target_0": slow0, "target_1": slow1})


def test_codes_give_each_prototype_an_even_share():
    codes = even_codes(torch.from_numpy(unit(draw(40, 4, seed=0))), epsilon=0.5, rounds=50).numpy()
    np.testing.assert_allclose(codes.sum(1), 1)
    np.testing.assert_allclose(codes.sum(0), 10, rtol=1e-6)


# --- nets that follow, queues ---


def test_a_follower_is_the_moving_average_of_its_leader():
    torch.manual_seed(0)
    leader = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    follower = Follower(leader)
    first = leader[0].weight.detach().clone()
    with torch.no_grad():
        leader[0].weight.add_(1)
    follower.follow(leader, momentum=0.9)
    torch.testing.assert_close(follower.net[0].weight, first + 0.1)
    before = follower.net[1].running_mean.clone()
    follower(torch.randn(8, 3))
    assert torch.equal(follower.net[1].running_mean, before)
    assert not any(parameter.requires_grad for parameter in follower.parameters())


def test_momentum_rises_from_the_first_to_one():
    momenta = [rising_momentum(0.9, step, total_steps=100) for step in range(101)]
    assert momenta[0] == pytest.approx(0.9)
    assert momenta[50] == pytest.approx(0.95)
    assert momenta[-1] == pytest.approx(1)
    assert momenta == sorted(momenta)


def test_a_queue_keeps_the_newest_and_forgets_what_was_held_in_a_step_left_out():
    queue = Queue(5, 2)
    start = queue.rows.clone()
    queue.hold(torch.full((2, 2), 7.0))  # of a step that is left out: nothing is pushed
    queue.hold(torch.ones(2, 2))
    queue.push()
    assert torch.equal(queue.rows, torch.cat([torch.ones(2, 2), start[:3]]))
    queue.hold(torch.arange(14.0).view(7, 2))
    queue.push()
    assert torch.equal(queue.rows, torch.arange(10.0).view(5, 2))
