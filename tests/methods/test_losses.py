"""Losses against float64 references written here, and their gradients against closed forms."""

import numpy as np
import pytest
import torch

from edgecl.errors import ShapeError
from edgecl.methods.losses import cross_correlation, cross_correlation_loss

SHAPES = [(2, 3), (8, 1), (16, 5), (5, 16), (64, 32)]


def projections(shape, *, seed=0, scale=3.0, shift=1.5):
    draws = np.random.default_rng(seed)
    mixed = draws.normal(size=shape) @ draws.normal(size=(shape[1], shape[1]))
    return scale * mixed + shift * draws.normal(size=shape[1])


def standardised_reference(z):
    mean = z.mean(axis=0)
    variance = ((z - mean) ** 2).mean(axis=0)
    return (z - mean) / np.sqrt(variance + 1e-5)


def correlation_reference(a, b):
    """Correlate by loops, one pair of dimensions at a time."""
    a, b = standardised_reference(a), standardised_reference(b)
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


def pair(shape):
    a = projections(shape, seed=1)
    return a, 0.5 * a + projections(shape, seed=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_is_the_references(shape):
    a, b = pair(shape)
    found = cross_correlation(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found, correlation_reference(a, b), rtol=1e-9, atol=1e-12)


def test_correlation_is_pearsons_for_projections_far_above_epsilon():
    a, b = pair((64, 6))
    pearson = np.corrcoef(a.T, b.T)[:6, 6:]
    np.testing.assert_allclose(
        cross_correlation(torch.from_numpy(a), torch.from_numpy(b)), pearson, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("off_diagonal", [0.0, 0.0051, 1.0])
def test_correlation_loss_is_the_references(shape, off_diagonal):
    a, b = pair(shape)
    found = cross_correlation_loss(torch.from_numpy(a), torch.from_numpy(b), off_diagonal=off_diagonal)
    assert float(found.total) == pytest.approx(loss_reference(a, b, off_diagonal), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_distillation_loss_is_the_references(shape):
    a, b = pair(shape)
    found = cross_distillation_loss(torch.from_numpy(a), torch.from_numpy(b), off_diagonal=0.3)
    assert float(found) == pytest.approx(loss_reference(a, b, 0.3), rel=1e-9)


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


@pytest.mark.parametrize("power", [0, 1, 3])
def test_correlation_does_not_depend_on_scale_or_offset(power):
    a, b = (torch.from_numpy(z) for z in pair((32, 4)))
    moved = cross_correlation(a * 10.0**power + 7, b)
    torch.testing.assert_close(moved, cross_correlation(a, b), rtol=1e-3, atol=1e-3)


def test_first_index_is_the_dimension_of_the_first_argument():
    a = torch.from_numpy(projections((64, 2), seed=3))
    b = torch.stack([a[:, 1], torch.from_numpy(projections((64, 2), seed=4))[:, 0]], dim=1)
    c = cross_correlation(a, b)
    assert float(c[1, 0]) == pytest.approx(1, abs=1e-4)
    assert abs(float(c[0, 1])) < 0.7


def test_a_constant_dimension_correlates_with_nothing():
    a = torch.from_numpy(projections((16, 3)))
    a[:, 1] = 4.0
    c = cross_correlation(a, a)
    assert c[1].abs().max() == 0
    assert torch.isfinite(c).all()


def test_one_dimension_has_no_redundancy():
    z = torch.from_numpy(projections((16, 1)))
    small = cross_correlation_loss(z, z, off_diagonal=0.0)
    large = cross_correlation_loss(z, z, off_diagonal=1e6)
    assert float(large.total) == pytest.approx(float(small.total), abs=1e-8)
    assert float(large.off_diagonal_rms) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_neither_value_nor_dtype(dtype):
    a, b = (torch.from_numpy(z).to(dtype) for z in pair((32, 16)))
    plain = cross_correlation_loss(a, b, off_diagonal=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cross_correlation_loss(a, b, off_diagonal=0.1)
        distilled = cross_distillation_loss(a, b, off_diagonal=0.1)
    assert cast.total.dtype == plain.total.dtype == distilled.dtype == torch.float32
    assert torch.equal(cast.total, plain.total)
    assert torch.equal(distilled, plain.total)


@pytest.mark.parametrize("shape", [(2, 3), (7, 1), (6, 4)])
def test_correlation_loss_has_the_gradient_of_finite_differences(shape):
    a, b = (torch.from_numpy(z).requires_grad_() for z in pair(shape))
    assert torch.autograd.gradcheck(
        lambda a, b: cross_correlation_loss(a, b, off_diagonal=0.3).total, (a, b), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(7, 1), (6, 4)])
def test_distillation_loss_has_the_gradient_of_finite_differences(shape):
    a, b = (torch.from_numpy(z) for z in pair(shape))
    assert torch.autograd.gradcheck(
        lambda z: cross_distillation_loss(z, b, off_diagonal=0.3), (a.requires_grad_(),), atol=1e-5, rtol=1e-4
    )


def distillation_gradient_between_equals(z, off_diagonal):
    """Differentiate L_D(z, [z]) by hand, through its first argument only.

    With r = 1 / sqrt(var(z) + eps) per dimension, u = (z - mean) r, and t = [u], a constant of the same value:
    C = u^T t / N, and L = sum_i (1 - C_ii)^2 + w sum_{i != j} C_ij^2, so

        G = dL/dC,  G_ii = -2 (1 - C_ii),  G_ij = 2 w C_ij
        dL/du_ni = sum_j G_ij t_nj / N, that is t G^T / N

    and, through the normalisation, per dimension with g = dL/du,

        dL/dz = r (g - mean_n(g) - u mean_n(g u)).

    If gradient also flowed through t, C would be symmetric in z and the result twice as large.
    """
    samples = len(z)
    centred = z - z.mean(axis=0)
    r = 1 / np.sqrt((centred**2).mean(axis=0) + 1e-5)
    u = centred * r
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
    cross_distillation_loss(learned, learned, off_diagonal=off_diagonal).backward()
    expected = distillation_gradient_between_equals(z, off_diagonal)
    np.testing.assert_allclose(learned.grad, expected, rtol=1e-8, atol=1e-12)


def test_diagonal_is_one_between_equal_encoders():
    z = torch.from_numpy(projections((64, 32))).float()
    c = cross_correlation(z, z)
    torch.testing.assert_close(c.diagonal(), torch.ones(32), rtol=0, atol=1e-4)


def test_only_decorrelation_is_left_between_equal_encoders():
    z = projections((64, 8))
    c = correlation_reference(z, z)
    redundancy = (c**2).sum() - (np.diag(c) ** 2).sum()
    found = cross_distillation_loss(torch.from_numpy(z), torch.from_numpy(z), off_diagonal=0.2)
    assert float(found) == pytest.approx(0.2 * redundancy, rel=1e-6)


def test_no_gradient_flows_into_frozen_projections():
    a, b = (torch.from_numpy(z).requires_grad_() for z in pair((16, 4)))
    cross_distillation_loss(a, b, off_diagonal=0.1).backward()
    assert a.grad.abs().max() > 0
    assert b.grad is None


def test_watched_numbers_carry_no_gradient():
    a, b = (torch.from_numpy(z).requires_grad_() for z in pair((16, 4)))
    losses = cross_correlation_loss(a, b, off_diagonal=0.1)
    assert losses.total.requires_grad
    assert not losses.diagonal.requires_grad
    assert not losses.off_diagonal_rms.requires_grad


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ((4, 3), (4, 2), "projections must be two (N, D) tensors, got (4, 3) and (4, 2)"),
        ((4, 3), (5, 3), "projections must be two (N, D) tensors, got (4, 3) and (5, 3)"),
        ((4,), (4,), "projections must be two (N, D) tensors, got (4,) and (4,)"),
        ((4, 3, 1), (4, 3, 1), "projections must be two (N, D) tensors, got (4, 3, 1) and (4, 3, 1)"),
        ((1, 3), (1, 3), "a correlation needs at least 2 samples, got 1"),
    ],
)
def test_wrong_shapes_are_named(a, b, text):
    for loss in (cross_correlation_loss, cross_distillation_loss):
        with pytest.raises(ShapeError) as caught:
            loss(torch.zeros(a), torch.zeros(b), off_diagonal=0.1)
        assert str(caught.value) == text
