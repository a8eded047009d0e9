"""Losses against float64 references written here, and their gradients against closed forms."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from methods_of import method_of

from edgecl.errors import ShapeError
from edgecl.methods.losses import (
    alignment_loss,
    coding_rate,
    contrastive_loss,
    correlation_of,
    cross_correlation,
    cross_correlation_loss,
)
from edgecl.methods.method import Embeddings

SHAPES = [(2, 3), (8, 1), (16, 5), (5, 16), (64, 32)]


def projections(shape, *, seed=0, scale=3.0, shift=1.5):
    draws = np.random.default_rng(seed)
    mixed = draws.normal(size=shape) @ draws.normal(size=(shape[1], shape[1]))
    return scale * mixed + shift * draws.normal(size=shape[1])


def standardized_reference(z):
    mean = z.mean(axis=0)
    variance = ((z - mean) ** 2).mean(axis=0)
    return (z - mean) / np.sqrt(variance + 1e-5)


def correlation_reference(a, b):
    """Correlate by loops, one pair of dimensions at a time."""
    a, b = standardized_reference(a), standardized_reference(b)
    samples, dimensions = a.shape
    c = np.zeros((dimensions, dimensions))
    for i in range(dimensions):
        for j in range(dimensions):
            c[i, j] = sum(a[n, i] * b[n, j] for n in range(samples)) / samples
    return c


def loss_reference(a, b, off_diagonal):
    c = correlation_reference(a, b)
    total = 0.0
    for i in range(len(c)):
        for j in range(len(c)):
            total += (1 - c[i, i]) ** 2 if i == j else off_diagonal * c[i, j] ** 2
    return total


def distillation_loss(z, target, *, off_diagonal):
    """L_D(z, [z]) alone, as the method takes it."""
    widths = SimpleNamespace(host_width=1.0, slim_width=0.5, slim_widths=(0.5,))
    alone = method_of(widths, alpha=0.0, xd_direction="slim_only", off_diagonal=off_diagonal)
    return alone.loss(Embeddings({"host_a": target.detach(), "slim_b": z}, {"host_b": target}), 0)[0]


def pair(shape):
    a = projections(shape, seed=1)
    return a, 0.5 * a + projections(shape, seed=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_is_the_references(shape):
    a, b = pair(shape)
    found = cross_correlation(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found, correlation_reference(a, b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("off_diagonal", [0.0, 0.0051, 1.0])
def test_correlation_loss_is_the_references(shape, off_diagonal):
    a, b = pair(shape)
    found = cross_correlation_loss(torch.from_numpy(a), torch.from_numpy(b), off_diagonal=off_diagonal)
    assert float(found.total) == pytest.approx(loss_reference(a, b, off_diagonal), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_loss_is_the_references_to_single_precision(shape):
    a, b = (z.astype(np.float32) for z in pair(shape))
    found = cross_correlation_loss(torch.from_numpy(a), torch.from_numpy(b), off_diagonal=0.01).total
    assert found.dtype == torch.float32
    expected = loss_reference(a.astype(np.float64), b.astype(np.float64), 0.01)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_watched_diagonal_and_off_diagonal_are_those_of_the_matrix(shape):
    a, b = pair(shape)
    c = correlation_reference(a, b)
    outside = c[~np.eye(len(c), dtype=bool)]
    found = cross_correlation_loss(torch.from_numpy(a), torch.from_numpy(b), off_diagonal=0.01)
    assert float(found.diagonal) == pytest.approx(np.diag(c).mean(), rel=1e-9)
    expected = np.sqrt((outside**2).mean()) if outside.size else 0.0
    assert float(found.off_diagonal_rms) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_constant_dimension_correlates_with_nothing():
    a = torch.from_numpy(projections((16, 3)))
    a[:, 1] = 4.0
    c = cross_correlation(a, a)
    assert c[1].abs().max() == 0
    assert torch.isfinite(c).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_neither_value_nor_dtype(dtype):
    a, b = (torch.from_numpy(z).to(dtype) for z in pair((32, 16)))
    plain = cross_correlation_loss(a, b, off_diagonal=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cross_correlation_loss(a, b, off_diagonal=0.1)
        distilled = distillation_loss(a, b, off_diagonal=0.1)
    assert cast.total.dtype == plain.total.dtype == distilled.dtype == torch.float32
    assert torch.equal(cast.total, plain.total)
    assert torch.equal(distilled, plain.total)


@pytest.mark.parametrize("shape", [(2, 3), (7, 1), (6, 4)])
def test_correlation_loss_has_the_gradient_of_finite_differences(shape):
    a, b = (torch.from_numpy(z).requires_grad_() for z in pair(shape))
    assert torch.autograd.gradcheck(
        lambda a, b: cross_correlation_loss(a, b, off_diagonal=0.3).total, (a, b), atol=1e-5, rtol=1e-4
    )


def distillation_gradient_between_equals(z, off_diagonal):
    """Differentiate L_D(z, [z]) by hand, through its first argument only.

    With r = 1 / sqrt(var(z) + eps), u = (z - mean) r, t = [u], C = u^T t / N and G = dL/dC it is dL/du = t G^T / N, and,
    through the normalization with g = dL/du, dL/dz = r (g - mean_n(g) - u mean_n(g u)). Through t too it were twice that.
    """
    samples = len(z)
    centered = z - z.mean(axis=0)
    r = 1 / np.sqrt((centered**2).mean(axis=0) + 1e-5)
    u = centered * r
    c = u.T @ u / samples
    g_matrix = 2 * off_diagonal * c
    np.fill_diagonal(g_matrix, -2 * (1 - np.diag(c)))
    g = u @ g_matrix.T / samples
    return r * (g - g.mean(axis=0) - u * (g * u).mean(axis=0))


@pytest.mark.parametrize("shape", [(16, 1), (16, 5), (5, 16), (64, 32)])
@pytest.mark.parametrize("off_diagonal", [0.0051, 0.5])
def test_distillation_between_equal_encoders_has_the_closed_gradient(shape, off_diagonal):
    z = projections(shape)
    learned = torch.from_numpy(z).requires_grad_()
    distillation_loss(learned, learned, off_diagonal=off_diagonal).backward()
    expected = distillation_gradient_between_equals(z, off_diagonal)
    np.testing.assert_allclose(learned.grad, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ((4, 3), (5, 3), "projections must be two (N, D) tensors, got (4, 3) and (5, 3)"),
        ((4,), (4,), "projections must be two (N, D) tensors, got (4,) and (4,)"),
        ((1, 3), (1, 3), "a batch of projections needs at least 2 samples, got 1"),
    ],
)
def test_wrong_shapes_are_named(a, b, text):
    for loss in (partial(contrastive_loss, temperature=0.5), alignment_loss, correlation_of):
        with pytest.raises(ShapeError) as caught:
            loss(torch.zeros(a), torch.zeros(b))
        assert str(caught.value) == text


# --- SimCLR's loss, and alignment ---


def contrastive_reference(a, b, temperature):
    """Compute NT-Xent by loops: each view's cross-entropy, its other view against all others of the batch."""
    views = [z / np.sqrt((z**2).sum()) for z in (*a, *b)]
    count, total = len(a), 0.0
    for i, view in enumerate(views):
        scores = {k: float(view @ other) / temperature for k, other in enumerate(views) if k != i}
        partner = (i + count) % (2 * count)
        total += np.log(sum(np.exp(score) for score in scores.values())) - scores[partner]
    return total / (2 * count)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_contrastive_loss_is_the_references(shape, temperature):
    a, b = pair(shape)
    found = contrastive_loss(torch.from_numpy(a), torch.from_numpy(b), temperature=temperature)
    assert float(found) == pytest.approx(contrastive_reference(a, b, temperature), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_alignment_loss_is_the_mean_square_distance_on_the_sphere(shape):
    """Of projections standardized per dimension, as everywhere."""
    a, b = pair(shape)
    rows = [standardized_reference(z) for z in (a, b)]
    x, y = (z / np.sqrt((z**2).sum(axis=1, keepdims=True)) for z in rows)
    distances = ((x - y) ** 2).sum(axis=1)
    found = alignment_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert float(found) == pytest.approx(np.mean(distances), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("comparison", [partial(contrastive_loss, temperature=0.5), alignment_loss])
def test_losses_on_the_sphere_have_the_gradient_of_finite_differences(comparison):
    a, b = (torch.from_numpy(z).requires_grad_() for z in pair((6, 4)))
    assert torch.autograd.gradcheck(comparison, (a, b), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("comparison", [partial(contrastive_loss, temperature=0.5), alignment_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_loss_on_the_sphere(comparison, dtype):
    a, b = (torch.from_numpy(z).to(dtype) for z in pair((32, 16)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = comparison(a, b)
    assert found.dtype == torch.float32
    assert torch.equal(found, comparison(a, b))
    wide = comparison(a.double(), b.double())
    assert float(found) == pytest.approx(float(wide), rel=1e-5)


# --- the coding rate ---

RATE_SHAPES = [(3, 2), (8, 1), (16, 5), (5, 16), (64, 32), (32, 64)]


def rate_reference(z, epsilon):
    """Both forms of the determinant, by NumPy in float64: of the N x N and of the D x D matrix."""
    rows = standardized_reference(z)
    rows = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
    n, d = rows.shape
    forms = [
        np.linalg.slogdet(np.eye(len(product)) + d / (n * epsilon) * product)[1] / 2
        for product in (rows @ rows.T, rows.T @ rows)
    ]
    assert forms[0] == pytest.approx(forms[1], rel=1e-9)
    return forms[0]


def rate_gradient(z, epsilon):
    """Differentiate the rate by hand.

    With U the rows of length 1, c = d / (n eps): dR/dU = c (I + c U U^T)^-1 U. Through u = s / |s|, with g = dR/du,
    dR/ds = (g - u (g . u)) / |s|; through the standardization as in distillation_gradient_between_equals.
    """
    mean = z.mean(axis=0)
    r = 1 / np.sqrt(((z - mean) ** 2).mean(axis=0) + 1e-5)
    s = (z - mean) * r
    lengths = np.sqrt((s**2).sum(axis=1, keepdims=True))
    u = s / lengths
    n, d = u.shape
    c = d / (n * epsilon)
    g = c * np.linalg.solve(np.eye(n) + c * u @ u.T, u)
    g = (g - u * (g * u).sum(axis=1, keepdims=True)) / lengths
    return r * (g - g.mean(axis=0) - s * (g * s).mean(axis=0))


@pytest.mark.parametrize("shape", RATE_SHAPES)
@pytest.mark.parametrize("epsilon", [0.01, 0.5, 4.0])
def test_coding_rate_is_the_references(shape, epsilon):
    z = projections(shape)
    found = coding_rate(torch.from_numpy(z), epsilon=epsilon)
    assert float(found) == pytest.approx(rate_reference(z, epsilon), rel=1e-9)


@pytest.mark.parametrize("shape", [(16, 5), (5, 16), (64, 32), (32, 64)])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_coding_rate_has_the_closed_gradient(shape, epsilon):
    z = projections(shape)
    learned = torch.from_numpy(z).requires_grad_()
    coding_rate(learned, epsilon=epsilon).backward()
    expected = rate_gradient(z, epsilon)
    np.testing.assert_allclose(learned.grad, expected, rtol=1e-6, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize("shape", [*RATE_SHAPES, (128, 512), (512, 128)])
def test_float32_rate_and_gradient_are_the_references_to_single_precision(shape):
    z = projections(shape).astype(np.float32)
    learned = torch.from_numpy(z).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = coding_rate(learned, epsilon=0.5)
    found.backward()
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(rate_reference(z.astype(np.float64), 0.5), rel=1e-5)
    expected = rate_gradient(z.astype(np.float64), 0.5)
    np.testing.assert_allclose(learned.grad, expected, rtol=0, atol=2e-4 * abs(expected).max() + 1e-7)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (64, 512)])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_rate_of_one_function_in_every_dimension_is_that_of_one_direction(shape, noise):
    """Where correlation losses stall. The matrix is I + (d / eps) times a projection: 1/2 log(1 + d / eps)."""
    n, d = shape
    draws = np.random.default_rng(0)
    z = draws.normal(size=(n, 1)) * np.ones((1, d)) + noise * draws.normal(size=shape)
    expected = np.log(1 + d / 0.5) / 2
    for dtype in (torch.float64, torch.float32):
        learned = torch.from_numpy(z).to(dtype).requires_grad_()
        found = coding_rate(learned, epsilon=0.5)
        found.backward()
        assert float(found.detach()) == pytest.approx(expected, rel=1e-3 if noise < 1e-3 else 0.1)
        assert torch.isfinite(learned.grad).all()


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_rate_of_equal_projections_is_nothing_and_pulls_nowhere(shape):
    z = torch.full(shape, 3.0, requires_grad=True)
    rate = coding_rate(z, epsilon=0.5)
    rate.backward()
    assert float(rate.detach()) == 0
    assert float(z.grad.abs().max()) == 0


@pytest.mark.parametrize(("shape", "side"), [((5, 16), 5), ((16, 5), 5), ((8, 8), 8)])
def test_rate_is_taken_of_the_smaller_matrix(shape, side, monkeypatch):
    factor, sides = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda x, **named: (sides.append(len(x)), factor(x, **named))[1]
    )
    coding_rate(torch.from_numpy(projections(shape)), epsilon=0.5)
    assert sides == [side]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rate_of_no_numbers_is_none_and_no_error(bad):
    """The guard leaves such a step out; an exception would end the run."""
    z = torch.from_numpy(projections((8, 4)))
    z[2, 1] = bad
    assert torch.isnan(coding_rate(z, epsilon=0.5))
