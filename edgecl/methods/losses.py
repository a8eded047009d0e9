"""Cross-correlation and cross-distillation losses, as functions of projections."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from edgecl.errors import ShapeError
from edgecl.nets.sync_norms import process_count, sum_over_processes

# nn.BatchNorm1d's, which the public Barlow Twins codes normalise with.
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

    Args:
        z_a: (N, D) projections of view A; any scale.
        z_b: (N, D) projections of view B; same dtype and device as z_a.

    Returns:
        (D, D) matrix, float32 even under autocast (float64 for float64 inputs); entry (i, j) correlates
        dimension i of A with dimension j of B.

    Raises:
        ShapeError: shapes differ, are not (N, D), or N < 2.

    Source: Zbontar et al. 2021, arXiv:2103.03230, equation 2, with the biased variance and epsilon of batch norm.
    """
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ShapeError(
            f"projections must be two (N, D) tensors, got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
        )
    if z_a.shape[0] < 2:
        raise ShapeError(f"a correlation needs at least 2 samples, got {z_a.shape[0]}")
    with torch.autocast(device_type=z_a.device.type, enabled=False):
        dtype = torch.promote_types(z_a.dtype, torch.float32)
        a, count = _standardise(z_a.to(dtype))
        b, _ = _standardise(z_b.to(dtype))
        return _sum_of_matrices(a.T @ b) / count


def _standardise(z: Tensor) -> tuple[Tensor, int]:
    count = z.shape[0] * process_count()
    centred = z - sum_over_processes(z.sum(0)) / count
    variance = sum_over_processes(centred.square().sum(0)) / count
    return centred * torch.rsqrt(variance + VARIANCE_EPSILON), count


def cross_correlation_loss(z_a: Tensor, z_b: Tensor, *, off_diagonal: float) -> CorrelationLoss:
    """Pull the cross-correlation of two views towards the identity.

    Args:
        z_a: (N, D) projections of view A; normalised here over N, any scale.
        z_b: (N, D) projections of view B; same dtype and device as z_a.
        off_diagonal: weight of the redundancy term, unitless, >= 0.

    Returns:
        the loss sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2, and what to watch of C.

    Raises:
        ShapeError: shapes differ, or N < 2.

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


def cross_distillation_loss(z: Tensor, frozen_z: Tensor, *, off_diagonal: float) -> Tensor:
    """Pull projections towards those of the other, frozen encoder on the same view.

    Args:
        z: (N, D) projections that learn.
        frozen_z: (N, D) projections [z] of the same images by the other encoder; no gradient flows into them.
        off_diagonal: weight of the redundancy term, unitless, >= 0.

    Returns:
        () the correlation loss between z and [z]. Between equal encoders the diagonal is 1 and only the
        decorrelation of z's own dimensions is left.

    Raises:
        ShapeError: shapes differ, or N < 2.

    Source: Meng et al. 2023 (SACL-XD, NeurIPS), equation 10: L_D has the form of L_SACL.
    """
    return cross_correlation_loss(z, frozen_z.detach(), off_diagonal=off_diagonal).total


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
