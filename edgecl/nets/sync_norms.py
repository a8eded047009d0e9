"""Batch norms whose statistics are those of the global batch, and the sum over processes they are made of.

Gradients follow the rule of torch.distributed: every process holds the same loss, each differentiates its own copy, and
data-parallel training averages what comes out. A sum over processes therefore has as its gradient the sum over processes.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.distributed
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgecl.errors import RecipeError
from edgecl.nets.slimming import SlimmableNet

_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


def synchronize_norms(
    net: SlimmableNet, *, which: Literal["none", "projector", "all"], device: torch.device
) -> None:
    """Replace batch norms by those that take statistics over all processes; the names of all tensors stay.

    Args:
        net: host and slim nets; its norms are replaced, sharing the parameters and buffers they have.
        which: 'projector' leaves the backbone's norms alone, 'none' all of them.
        device: where the net will run: on a GPU they are torch's SyncBatchNorm, which has no form for the CPU.

    Raises:
        RecipeError: a norm of a kind that cannot be synchronized.
    """
    if which == "none" or process_count() == 1:
        return

    def replace(name: str, norm: nn.Module) -> nn.Module:
        if which == "projector" and "projector" not in name.split("."):
            return norm
        if type(norm) not in _KNOWN:
            raise RecipeError(
                f"the norm '{name}' is a {type(norm).__name__}, which has no form with statistics over all processes",
                hint="set run.sync_norms to 'projector' or 'none', or choose another net",
            )
        return _synchronized(norm, device)

    net.map_norms(replace)


def synchronize_heads(
    method: nn.Module, *, which: Literal["none", "projector", "all"], device: torch.device
) -> None:
    """Replace the batch norms of a method's own nets, such as a predictor; copies of its `net` have what that has.

    Args:
        method: its `net` is left alone.
        which: 'projector' leaves two-dimensional norms alone, 'none' all of them.
    """
    if which == "none" or process_count() == 1:
        return
    kinds = _KNOWN if which == "all" else (nn.BatchNorm1d,)
    for name, module in list(method.named_modules()):
        if type(module) in kinds and not name.startswith("net."):
            method.set_submodule(name, _synchronized(module, device))


def _synchronized(norm: nn.Module, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        converted: nn.Module = cast(Any, convert_sync_batchnorm)(norm)
        return converted
    return GlobalBatchNorm(cast(_BatchNorm, norm))


class GlobalBatchNorm(_BatchNorm):
    """A batch norm over the global batch, in plain tensor operations: torch has none that runs on the CPU.

    In evaluation, and where there is one process, it is the norm it was made from.

    Args:
        norm: the norm whose parameters, buffers and settings it takes over, with timm's dropout and activation.
    """

    def __init__(self, norm: _BatchNorm):
        super().__init__(0, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.num_features = norm.num_features
        self.affine = norm.affine
        self.track_running_stats = norm.track_running_stats
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        # timm's norms with an activation: the names stay, since an activation can have weights too.
        for name, part in norm.named_children():
            self.add_module(name, part)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C) or (N, C, H, W) activations; the result has their dtype."""
        y = self._normalize(x) if self.training and process_count() > 1 else super().forward(x)
        for part in self.children():  # dropout, activation
            y = part(y)
        return y

    def _normalize(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            count, mean, variance = _global_moments(wide)
            if self.track_running_stats:
                self._track(count, mean.detach(), variance.detach())
            scale = torch.rsqrt(variance + self.eps)
            if self.weight is not None:
                scale = scale * self.weight
            shift = -mean * scale
            if self.bias is not None:
                shift = shift + self.bias
            shape = (1, -1, *(1,) * (x.ndim - 2))
            return torch.addcmul(shift.to(wide.dtype).view(shape), wide, scale.to(wide.dtype).view(shape)).to(
                x.dtype
            )

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        mine = cast(Any, self)
        mine.num_batches_tracked.add_(1)
        share = 1.0 / float(mine.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running.lerp_(new.to(running.dtype), share)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim not in (2, 4):
            raise ValueError(f"expected (N, C) or (N, C, H, W), got {tuple(x.shape)}")


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and biased variance (C,) of each channel over all processes, in float64.

    The moments of a share are exact in its own precision; put together in float64, they need one sum over processes
    and no second look at the data, and the mean's square takes nothing off the variance's digits.
    """
    count = x.numel() // x.shape[1]
    variance, mean = (part.double() for part in torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0))
    sums = sum_over_processes(
        torch.cat([mean.new_full((1,), count), count * mean, count * (variance + mean.square())])
    )
    total = sums[0].detach()
    mean, square = (sums[1:] / total).chunk(2)
    return total, mean, (square - mean.square()).clamp(min=0)


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum a tensor over all processes that have met, with a gradient; alone, return it as it is.

    A plain `torch.distributed.all_reduce` is no substitute: autograd does not hear of it, and gradients come out too
    small by about the number of processes. This is the differentiable form that torch names as the successor of
    torch.distributed.nn.functional.all_reduce, deprecated since 2.15; its gradient is the same in 2.11.
    """
    if process_count() == 1:
        return x
    from torch.distributed import _functional_collectives as collectives

    total = collectives.all_reduce(x, "sum", cast(Any, torch.distributed.group.WORLD))
    return cast(Tensor, collectives.wait_tensor(total))


def process_count() -> int:
    """Count the processes that have met: launched together is not yet joined."""
    met = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if met else 1
