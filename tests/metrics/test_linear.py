"""The linear probe against an independent Newton solution of the same penalised objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecl.metrics.linear import PENALTIES, _fit, fit_linear


def newton(x, y, classes, penalty, steps=60):
    """Multinomial logistic regression in float64: mean cross-entropy + penalty / 2 |W|^2, the bias free."""
    n, f = x.shape
    one = np.hstack([x, np.ones((n, 1))])
    theta = np.zeros((classes, f + 1))
    ridge = np.tile(np.r_[np.full(f, penalty), 0.0], classes)
    onehot = np.eye(classes)[y]
    for _ in range(steps):
        logits = one @ theta.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = ((p - onehot).T @ one / n).ravel() + ridge * theta.ravel()
        hessian = np.diag(ridge + 1e-10)
        for a in range(classes):
            for b in range(classes):
                w = p[:, a] * ((a == b) - p[:, b]) / n
                hessian[a * (f + 1) : (a + 1) * (f + 1), b * (f + 1) : (b + 1) * (f + 1)] += (
                    one * w[:, None]
                ).T @ one
        theta -= np.linalg.solve(hessian, gradient).reshape(theta.shape)
    return theta[:, :f], theta[:, f]


def clouds(count=150, features=6, classes=3, distance=1.5, seed=0):
    """Overlapping Gaussian clouds."""
    random = np.random.default_rng(seed)
    centers = random.normal(0, distance, (classes, features))
    labels = np.arange(count) % classes
    x = centers[labels] + random.normal(0, 1.5, (count, features))
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("penalty", PENALTIES[:-1])
def test_weights_are_those_of_a_newton_solution(penalty):
    x, y = clouds()
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = _fit(standard, y, 3, PENALTIES[: PENALTIES.index(penalty) + 1])[-1]
    expected, expected_bias = newton(standard.double().numpy(), y.numpy(), 3, penalty)
    assert weight.numpy() == pytest.approx(expected, abs=5e-3 * max(1, np.abs(expected).max()))
    # Only differences of biases mean anything.
    assert (bias - bias.mean()).numpy() == pytest.approx(expected_bias - expected_bias.mean(), abs=1e-2)


def test_predictions_are_those_of_a_newton_solution_at_the_chosen_penalty():
    x, y = clouds(seed=1)
    fitted = fit_linear(x, y, classes=3)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    weight, bias = newton(((x - mean) / deviation).double().numpy(), y.numpy(), 3, fitted.penalty)
    new, _ = clouds(count=300, seed=2)
    logits = ((new - mean) / deviation).double().numpy() @ weight.T + bias
    assert np.mean(fitted.predict(new).numpy() == logits.argmax(1)) > 0.99


def test_scale_and_place_of_the_features_change_nothing():
    x, y = clouds()
    scale, shift = torch.tensor([1e-3, 10, 1, 500, 1, 1]), torch.tensor([5.0, -100, 0, 0, 3, 0])
    plain, moved = fit_linear(x, y, classes=3), fit_linear(x * scale + shift, y, classes=3)
    new, _ = clouds(count=300, seed=2)
    same = plain.predict(new) == moved.predict(new * scale + shift)
    assert float(same.float().mean()) > 0.99


def test_constant_feature_changes_nothing():
    x, y = clouds()
    with_constant = torch.cat([x, torch.full((len(x), 1), 7.0)], dim=1)
    fitted = fit_linear(with_constant, y, classes=3)
    assert bool(torch.isfinite(fitted.weight).all())
    # Even where it is another number in the test images: training saw nothing of it.
    elsewhere = torch.cat([x, torch.full((len(x), 1), -1e6)], dim=1)
    assert torch.equal(fitted.predict(elsewhere), fit_linear(x, y, classes=3).predict(x))


def test_features_that_are_all_constant_give_chance_and_no_error():
    fitted = fit_linear(torch.ones(30, 4), torch.arange(30) % 3, classes=3)
    assert fitted.top1(torch.ones(30, 4), torch.arange(30) % 3) == pytest.approx(100 / 3)


def test_penalty_does_best_on_the_fifth_of_each_class_that_it_was_chosen_on():
    x, y = clouds(count=300, features=30, distance=0.5)
    fitted = fit_linear(x, y, classes=3)
    standard = ((x - fitted.mean) / fitted.deviation).double().numpy()
    held_out = np.arange(300) // 3 % 5 == 0
    correct = {}
    for penalty in PENALTIES:
        weight, bias = newton(standard[~held_out], y.numpy()[~held_out], 3, penalty)
        found = (standard[held_out] @ weight.T + bias).argmax(1)
        correct[penalty] = int((found == y.numpy()[held_out]).sum())
    assert len(set(correct.values())) > 1
    assert correct[fitted.penalty] >= max(correct.values()) - 1


def test_one_label_per_class_is_enough():
    x, y = clouds(count=3, distance=30)
    assert fit_linear(x, y, classes=3).top1(*clouds(count=99, distance=30)) == 100


def test_class_without_an_image_keeps_its_place():
    x, y = clouds(distance=30)
    fitted = fit_linear(x[y != 1], y[y != 1], classes=3)
    assert fitted.weight.shape == (3, 6)
    assert fitted.top1(x[y != 1], y[y != 1]) == 100
