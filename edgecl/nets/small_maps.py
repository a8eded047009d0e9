"""Convolutions of small maps on a CPU, as matrix products where oneDNN's own kernels take longer.

oneDNN, by which torch convolves on a CPU, is made for large maps. Nets that learn from pictures of 32 or 64 pixels
spend most of their step elsewhere, on maps of 4 x 4 and 2 x 2. There

- a 1x1 convolution pays more for being set up than for its multiplications, and
- the weight gradient of a depthwise convolution whose kernel is larger than its map has no fast kernel with AVX2 (5x5 on
  4 x 4, 192 channels, batch 32: 4 ms; here 0.3) and a slow one with AVX-512 (0.9 ms; here 0.25).

What is chosen depends on shapes, layout, dtype and device alone, never on time or history, so that a step repeated is
the same step. Measurements: docs/results.md, 2026-11-30.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

# Positions in all maps of a batch together. Up to here a matrix product took less time than oneDNN's convolution, there and
# back, with AVX2 and with AVX-512: by the median 1.1 times at this count, 5 times at 64. Beyond 8,192 oneDNN is faster.
_MOST_POSITIONS = 4096


class SmallMapConv2d(nn.Conv2d):
    """A torch.nn.Conv2d that computes small maps on a CPU another way while it trains, equal to rounding.

    In evaluation it is torch's own, so that a net taken out of a run computes what it computed within, to the bit.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        if self.training and _is_measured_kind(input, weight):
            if self._is_pointwise and input.numel() <= _MOST_POSITIONS * self.in_channels:
                # The channels are last already. A slice of a weight is copied: its strides must not decide a bit.
                flat = weight.flatten(1).contiguous()
                outputs: Tensor = F.linear(input.permute(0, 2, 3, 1), flat, bias)
                return outputs.permute(0, 3, 1, 2)
            if self._is_depthwise and bias is None and input[0, 0].numel() < weight[0].numel():
                return cast(Tensor, _DepthwiseOnSmallMap.apply(input, weight, self.stride, self.padding))
        return cast(Tensor, super()._conv_forward(input, weight, bias))

    @property
    def _is_pointwise(self) -> bool:
        return (
            self.kernel_size == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )

    @property
    def _is_depthwise(self) -> bool:
        return (
            self.groups == self.in_channels == self.out_channels
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )


def _is_measured_kind(images: Tensor, weight: Tensor) -> bool:
    """Return whether a convolution is of the kind that was measured: float32 on a CPU, channels last, in eager mode."""
    return (
        images.device.type == "cpu"
        and images.dtype == weight.dtype == torch.float32
        and images.ndim == 4
        and images.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not cast(Any, torch.jit).is_tracing()
    )


class _DepthwiseOnSmallMap(torch.autograd.Function):
    """A depthwise convolution whose weight gradient is taken from all pairs of positions at once.

    On a map with fewer positions than the kernel has taps, most taps see few positions, some none. Per channel, one matrix
    product over the batch correlates each input position with each output position; the gradient of a tap is the sum over
    the pairs it connects.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = torch.ops.aten.convolution_backward(
                gradients[0],
                images,
                weight,
                None,
                ctx.stride,
                ctx.padding,
                (1, 1),
                False,
                (0, 0),
                len(weight),
                (True, False, False),
            )[0]
        if ctx.needs_input_grad[1]:
            before, after = (maps.flatten(2).transpose(0, 1).contiguous() for maps in (images, gradients[0]))
            pairs = torch.bmm(before.mT, after).flatten(1)
            connected = _pairs_of_taps(
                images.shape[2:], weight.shape[2:], ctx.stride, ctx.padding, dtype=weight.dtype
            )
            of_weight = (pairs @ connected).view_as(weight)
        return of_images, of_weight, None, None


@cache
def _pairs_of_taps(
    size: torch.Size,
    kernel: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return (pairs of an input and an output position, taps): 1 where the tap leads from the one to the other."""
    positions = size[0] * size[1]
    # What each output position sees of a picture of which one position alone is lit.
    lit = torch.eye(positions, dtype=dtype).view(positions, 1, *size)
    seen = F.unfold(lit, kernel, padding=padding, stride=stride)
    return seen.mT.reshape(-1, kernel[0] * kernel[1])


def speed_up_small_maps(net: nn.Module) -> list[nn.Module]:
    """Replace every torch.nn.Conv2d of a net by one that computes small maps as above; names and parameters stay.

    Subclasses of torch.nn.Conv2d, which convolve in a way of their own, are left alone.

    Returns:
        the modules that changed their class.
    """
    changed: list[nn.Module] = [module for module in net.modules() if type(module) is nn.Conv2d]
    for module in changed:
        module.__class__ = SmallMapConv2d
    return changed


@contextlib.contextmanager
def small_maps_sped_up(net: nn.Module) -> Iterator[None]:
    """Do so for a while; afterwards the net consists of torch's convolutions again."""
    changed = speed_up_small_maps(net)
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Conv2d
