"""Losses between two sets of projections, and the coding rate of one set; all of the global batch.

Two sets are (N, D) projections of views A and B of the same pictures, at any scale; where they are not, or of fewer than two
samples, it is a ShapeError. All are computed in float32 at least, autocast or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from edgecl.config.recipe import Recipe
from edgecl.config.settings import Config, Weight
from edgecl.errors import ShapeError
from edgecl.nets.sync_norms import process_count, sum_over_processes

# nn.BatchNorm1d's, which the public Barlow Twins codes normalize with.
VARIANCE_EPSILON = 1e-5


class CorrelationLoss(NamedTuple):
    """A loss on a correlation matrix, and what to watch of the matrix.

    Attributes:
        total: () loss, differentiable.
        diagonal: () mean of the diagonal, detached; 1 means the views agree.
        off_diagonal_rms: () root mean square off the diagonal, detached; 0 means no redundancy.
    """

    total: Tensor
    diagonal: Tensor
    off_diagonal_rms: Tensor


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Correlate the dimensions of two sets of projections over the batch, over all processes.

    Returns:
        (D, D) matrix, float32 even under autocast (float64 for float64 inputs); entry (i, j) correlates
        dimension i of A with dimension j of B.

    Source: Zbontar et al. 2021, arXiv:2103.03230, equation 2, with the biased variance and epsilon of batch norm.
    """
    check_pair(z_a, z_b)
    with torch.autocast(device_type=z_a.device.type, enabled=False):
        a, count = _standardize(wide(z_a))
        b, _ = _standardize(wide(z_b))
        return _sum_of_matrices(a.T @ b) / count


def check_pair(z_a: Tensor, z_b: Tensor) -> None:
    """Raise ShapeError of projections that are not two (N, D) sets of 2 or more."""
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ShapeError(
            f"projections must be two (N, D) tensors, got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
        )
    if z_a.shape[0] < 2:
        raise ShapeError(f"a batch of projections needs at least 2 samples, got {z_a.shape[0]}")


def wide(z: Tensor) -> Tensor:
    """Return a tensor as float32, or as it is where it has more digits."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _standardize(z: Tensor) -> tuple[Tensor, int]:
    count = z.shape[0] * process_count()
    centered = z - sum_over_processes(z.sum(0)) / count
    variance = sum_over_processes(centered.square().sum(0)) / count
    return centered * torch.rsqrt(variance + VARIANCE_EPSILON), count


def cross_correlation_loss(z_a: Tensor, z_b: Tensor, *, off_diagonal: float) -> CorrelationLoss:
    """Pull the cross-correlation of two views towards the identity.

    Args:
        off_diagonal: weight of the redundancy term, unitless, >= 0.

    Returns:
        the loss sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2, and what to watch of C.

    Source: Zbontar et al. 2021, arXiv:2103.03230, equation 1.
    """
    correlation = cross_correlation(z_a, z_b)
    dimensions = correlation.shape[0]
    diagonal = torch.diagonal(correlation)
    redundancy = correlation.square().sum() - diagonal.square().sum()
    total = (1 - diagonal).square().sum() + off_diagonal * redundancy
    pairs = max(dimensions * (dimensions - 1), 1)
    return CorrelationLoss(
        total,
        diagonal.detach().mean(),
        (redundancy.detach().clamp(min=0) / pairs).sqrt(),
    )


@torch.no_grad()
def correlation_of(z_a: Tensor, z_b: Tensor) -> dict[str, Tensor]:
    """Return what the alarms watch of two (N, D) views, as a method logs it: "diagonal" and "off_diagonal_rms" of C."""
    _, diagonal, off_diagonal_rms = cross_correlation_loss(z_a, z_b, off_diagonal=0.0)
    return {"diagonal": diagonal, "off_diagonal_rms": off_diagonal_rms}


def mean_of(terms: list[Tensor]) -> Tensor:
    """Return the () mean of () losses."""
    return torch.stack(terms).mean()


def mean_over_batch(values: Tensor) -> Tensor:
    """Return the () mean of (n,) values, one a sample, over the samples of all processes."""
    return sum_over_processes(values.sum()) / (len(values) * process_count())


def global_covariance(z: Tensor) -> Tensor:
    """Return the (D, D) unbiased covariance of (N, D) projections over the samples of all processes."""
    count = z.shape[0] * process_count()
    centered = z - sum_over_processes(z.sum(0)) / count
    return _sum_of_matrices(centered.T @ centered) / (count - 1)


def contrastive_loss(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """Tell each picture's other view from all other views of the batch (NT-Xent).

    Args:
        temperature: of the softmax over cosines, > 0.

    Returns:
        () mean cross-entropy over the 2N views of the global batch, nats.

    Source: Chen et al. 2020 (SimCLR), arXiv:2002.05709, equation 1.
    """
    check_pair(z_a, z_b)
    with torch.autocast(device_type=z_a.device.type, enabled=False):
        views = torch.cat([of_all_processes(functional.normalize(wide(z), dim=1)) for z in (z_a, z_b)])
        similarity = views @ views.T / temperature
        # A view is no candidate for itself.
        similarity = similarity.masked_fill(
            torch.eye(len(views), dtype=torch.bool, device=views.device), float("-inf")
        )
        other_view = torch.arange(len(views), device=views.device).roll(len(views) // 2)
        return functional.cross_entropy(similarity, other_view)


def queue_contrastive_loss(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Tell each picture's key from the keys of earlier pictures (InfoNCE).

    Args:
        queries: (N, D) projections; any scale.
        keys: (N, D) of the same pictures, without gradient; any scale.
        queue: (K, D) of other pictures; any scale.
        temperature: of the softmax over cosines, > 0.

    Returns:
        () mean cross-entropy over the global batch, nats.

    Source: He et al. 2020 (MoCo), arXiv:1911.05722, equation 1.
    """
    check_pair(queries, keys)
    with torch.autocast(device_type=queries.device.type, enabled=False):
        q, k, others = (functional.normalize(wide(z), dim=1) for z in (queries, keys, queue))
        same = (q * k).sum(1, keepdim=True)
        chances = (torch.cat([same, q @ others.T], dim=1) / temperature).log_softmax(1)
        return mean_over_batch(-chances[:, 0])


def alignment_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Turn the projections of two views into the same direction.

    Nothing in it keeps the projections apart: it needs the coding rate beside it.

    Returns:
        () mean of 2 - 2 cos of the standardized projections over the global batch.

    Source: Tong et al. 2023 (EMP-SSL), arXiv:2304.03977, the similarity term of equation 5.
    """
    check_pair(z_a, z_b)
    with torch.autocast(device_type=z_a.device.type, enabled=False):
        # Standardized as in the coding rate: a mean that all projections share would align them for nothing.
        a, b = (_standardize(wide(z))[0] for z in (z_a, z_b))
        return 2 - 2 * mean_over_batch(functional.cosine_similarity(a, b, dim=1))


class CodingRate(Config):
    """L <- L - weight R: R, the coding rate, is large when the projections fill all their dimensions."""

    weight: Weight = 0.0
    epsilon: float = Field(0.5, ge=0.01, le=1e6)
    """Precision of the code: the smaller, the more small directions count; below 0.01 float32 has too few digits."""
    until: float | None = Field(None, gt=0, le=1, examples=[0.5])
    """Fraction of the run at which the weight has fallen to 0, in a line; None keeps it constant."""

    def __call__(self, z: Tensor) -> Tensor:
        """Return the () rate of (N, D) projections."""
        return coding_rate(z, epsilon=self.epsilon)

    def weight_at(self, step: int, *, total_steps: int) -> float:
        """Return the weight in a step, 0-based."""
        if self.until is None:
            return self.weight
        return self.weight * max(0.0, 1 - step / (self.until * total_steps))

    def take_off(
        self, total: Tensor, groups: Sequence[Sequence[Tensor]], step: int, *, total_steps: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return a loss less w R, and R for the log, detached; None in a step whose weight is 0.

        Args:
            groups: (N, D) projections; R is the mean over the groups of the mean within a group.
        """
        weight = self.weight_at(step, total_steps=total_steps)
        if weight <= 0:
            return total, None
        rate = mean_of([mean_of([self(z) for z in group]) for group in groups])
        return total - weight * rate, rate.detach()

    def check(self, recipe: Recipe) -> None:
        """Refuse a batch of two."""
        if self.weight > 0 and recipe.data.batch_size < 3:
            raise ValueError(
                "'method.coding_rate.weight' needs a 'data.batch_size' of 3 or more: of two standardized projections "
                "one is always the other's opposite"
            )


def coding_rate(z: Tensor, *, epsilon: float) -> Tensor:
    """Measure how many directions a batch of projections fills: 1/2 logdet(I + D / (N epsilon) Z^T Z).

    Rows of Z are the projections, standardized per dimension over the batch and then scaled to length 1. The
    determinant pulls hardest on the smallest eigenvalues, where the correlation losses hardly pull at all.

    Args:
        z: (N, D) projections; any scale.
        epsilon: precision of the code, > 0: the smaller, the more small directions count.

    Returns:
        () rate in nats, to be made large; float32 even under autocast (float64 for float64 inputs); not a number where
            the projections are none.

    Source: Yu et al. 2020 (MCR2), arXiv:2006.08558, equation 7; standardized as SACL-XD's projections are.
    """
    check_pair(z, z)
    with torch.autocast(device_type=z.device.type, enabled=False):
        rows, count = _standardize(wide(z))
        rows = functional.normalize(rows, dim=1)
        dimensions = rows.shape[1]
        # Both products give the same determinant (Sylvester). Only the D x D one is a sum over processes.
        few = count < dimensions and process_count() == 1
        product = rows @ rows.T if few else _sum_of_matrices(rows.T @ rows)
        identity = torch.eye(len(product), dtype=rows.dtype, device=rows.device)
        # Its eigenvalues are at least 1, so it has a Cholesky factor however few directions are filled. `cholesky` would
        # wait for the device to say so, and raise where the guard leaves the step out.
        factor, failed = torch.linalg.cholesky_ex(
            identity + dimensions / (count * epsilon) * product, check_errors=False
        )
        rate: Tensor = factor.diagonal().log().sum()
        return rate.masked_fill(failed != 0, torch.nan)


def of_all_processes(x: Tensor) -> Tensor:
    """Join the rows of all processes, in the order of their ranks, with a gradient."""
    if process_count() == 1:
        return x
    whole = x.new_zeros(process_count(), *x.shape)
    whole[torch.distributed.get_rank()] = x
    return sum_over_processes(whole).flatten(0, 1)


def _sum_of_matrices(x: Tensor) -> Tensor:
    """Sum the matrices of all processes: the correlation is that of the global batch, not of each share."""
    if process_count() == 1:
        return x
    total: Tensor = _SumForOneLoss.apply(x)
    return total


class _SumForOneLoss(torch.autograd.Function):
    """A sum over processes whose result is all that the loss, the same in every process, depends on.

    The gradient of a sum over processes is the sum of the gradients. Here these are equal, since every process computes
    the same loss of the same matrix, so the sum needs no communication: of D x D numbers that halves the traffic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sum over processes."""
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Multiply instead of summing equal gradients."""
        return gradient * process_count()
