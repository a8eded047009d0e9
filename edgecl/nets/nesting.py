"""Where each tensor of a slim net lies in its host: a rule for each type of module.

A rule is a function of a slim module and the host's of the same name. It returns an index into the host's tensor for each
tensor of its own, or raises ValueError where the slim module is no part of the host's. An index is what `tensor[index]`
takes: slices for leading blocks, LongTensors for rows that lie apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from edgecl.errors import SliceError
from edgecl.nets.backbone import example_side, is_norm

Index = tuple[slice | Tensor, ...]
Rule = Callable[[nn.Module, nn.Module], dict[str, Index]]

HINT = "this architecture changes with its width; `edgecl ls nets` lists those that nest"
_TOLERANCE = 1e-3
_LAYER_NORMS = (nn.LayerNorm, timm.layers.LayerNorm)


def prefix(slim: nn.Module, host: nn.Module) -> dict[str, Index]:
    """Dense layers, those of squeeze-and-excitation too, and all that has no rule of its own: the leading block."""
    hosts = _own_tensors(host)
    found: dict[str, Index] = {}
    for leaf, tensor in _own_tensors(slim).items():
        shape, whole = tuple(tensor.shape), tuple(hosts[leaf].shape)
        if len(shape) != len(whole) or any(small > large for small, large in zip(shape, whole, strict=True)):
            raise ValueError(f"'{leaf}' to {shape}: the host has {whole}")
        found[leaf] = tuple(slice(0, size) for size in shape)
    return found


def convolution(slim: nn.Module, host: nn.Module) -> dict[str, Index]:
    """A dense or a depthwise convolution: the leading block. Groups of several channels have other members in the host."""
    assert isinstance(slim, _ConvNd)
    assert isinstance(host, _ConvNd)
    groups = {_grouping(layer) for layer in (slim, host)}
    if groups not in ({"dense"}, {"depthwise"}):
        raise ValueError(f"its {slim.groups} groups of channels: the host has {host.groups}")
    return prefix(slim, host)


def attention(slim: nn.Module, host: nn.Module) -> dict[str, Index]:
    """Query, key and value in one matrix, head after head in each: its leading heads. They are as wide in the host."""
    own, other = cast(Any, slim), cast(Any, host)
    if own.head_dim != other.head_dim:
        raise ValueError(f"its heads of {own.head_dim} channels: the host has heads of {other.head_dim}")
    found: dict[str, Index] = {}
    for leaf, index in prefix(own.qkv, other.qkv).items():
        count, whole = own.qkv.out_features // 3, other.qkv.out_features // 3
        rows = torch.cat([part * whole + torch.arange(count) for part in range(3)])
        found[f"qkv.{leaf}"] = (rows, *index[1:])
    return found


def channel_norm(slim: nn.Module, host: nn.Module) -> dict[str, Index]:
    """A norm over channels that is not private: only where the host has no more of them."""
    found, hosts = prefix(slim, host), _own_tensors(host)
    if any(tensor.shape != hosts[leaf].shape for leaf, tensor in _own_tensors(slim).items()):
        raise ValueError("a norm over channels, of which the host has more")
    return found


RULES: list[tuple[type[nn.Module], Rule]] = [
    (_ConvNd, convolution),
    (timm.layers.Attention, attention),
    (timm.models.fastvit.Attention, attention),
    (nn.GroupNorm, channel_norm),
    (timm.layers.LayerNorm2d, channel_norm),
]
"""The first whose type a slim module has holds, before those of its parts; `prefix` holds for all others."""


def is_private(module: nn.Module) -> bool:
    """Return whether a slim net has a module of its own, since statistics of one width are wrong for another.

    These are batch norms, and layer norms over the last dimension: a slim net takes their mean and variance over the
    channels it has.
    """
    return is_norm(module) or type(module) in _LAYER_NORMS


def index_of(slim: nn.Module, host: nn.Module, *, where: Mapping[str, object]) -> dict[str, Index]:
    """Return where each tensor of a slim net lies in its host; for private modules, what they begin as.

    Args:
        slim: the slim net; may be on the meta device.

    Raises:
        SliceError: a tensor is missing on one side, is larger in the slim net, or a rule refuses.
    """
    missing = sorted(slim.state_dict().keys() ^ host.state_dict().keys())
    if missing:
        raise SliceError(
            f"cannot slice this net: '{missing[0]}' is in one width and not in the other "
            f"({len(missing)} such tensors)",
            where=dict(where),
            hint=HINT,
        )
    hosts = dict(host.named_modules())
    found: dict[str, Index] = {}
    for name, module in slim.named_modules():
        rule = next((rule for kind, rule in RULES if isinstance(module, kind)), None)
        if rule is None and _own_tensors(module):
            rule = prefix
        if rule is None:
            continue
        try:
            index = rule(module, hosts[name])
        except ValueError as exc:
            raise SliceError(
                f"cannot slice '{name or type(module).__name__}': {exc}", where=dict(where), hint=HINT
            ) from exc
        found = {**{f"{name}.{leaf}" if name else leaf: place for leaf, place in index.items()}, **found}
    return found


def check_function(
    host: nn.Module,
    skeleton: nn.Module,
    tensors: Mapping[str, Tensor],
    index: Mapping[str, Index],
    *,
    where: Mapping[str, object],
) -> None:
    """Check that the host computes what the slim net computes, once everything outside the slim net is zero.

    Shapes that nest are not enough: channels that are split, attention heads and means over channels change with the width.
    A layer norm of the host, whose mean and variance would be of other channels, takes the slim net's channels here, as the
    slim net's own does in training; so equality says that everything between the layer norms nests. Norms get random
    values here, and so does what is constant or almost zero at the start and would hide a difference.

    Args:
        skeleton: the slim net, whose own tensors are not used.
        tensors: of the slim net, by name.
        index: where each of them lies in the host.

    Raises:
        SliceError: it does not, or a forward pass fails.
    """
    generator = torch.Generator().manual_seed(0)
    side = example_side(host)
    images = torch.randn(2, 3, side, side, generator=generator)
    private = {name for name, module in skeleton.named_modules() if is_private(module)}
    slim, masked, learnt = {}, {}, host.state_dict()
    for name, tensor in tensors.items():
        value = tensor.detach()
        drawn = name.rpartition(".")[0] in private or _hides(value)
        if drawn and name in learnt and value.is_floating_point():
            value = torch.rand(value.shape, generator=generator) + 0.5
        slim[name] = value
    for name, tensor in learnt.items():
        masked[name] = torch.zeros_like(tensor)
        masked[name][index[name]] = slim[name]
    modes = host.training, skeleton.training
    try:
        with torch.no_grad(), _common_skips(host, skeleton), _common_layer_norms(host, skeleton):
            expected = functional_call(skeleton.eval(), slim, (images,))
            found = functional_call(host.eval(), masked, (images,))
    except RuntimeError as exc:
        raise SliceError(
            f"cannot slice this net: a slim forward pass fails ({str(exc).splitlines()[0]})",
            where=dict(where),
            hint=HINT,
        ) from exc
    finally:
        host.train(modes[0])
        skeleton.train(modes[1])
    found = found[:, : expected.shape[1]]
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference < _TOLERANCE:
        raise SliceError(
            "cannot slice this net: with the channels outside the slim net switched off, "
            f"the host's output differs by {difference:.2g} of its largest value",
            where=dict(where),
            hint=HINT,
        )


def inward_weights(whole: Tensor, index: Index) -> Tensor:
    """Return a mask of a host's weight: what leads from channels outside a slim net to those inside it."""
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[index] = True
    rows = inside.flatten(1).any(1)
    return rows.view(-1, *[1] * (whole.ndim - 1)) & ~inside


@contextlib.contextmanager
def _common_skips(host: nn.Module, skeleton: nn.Module) -> Iterator[None]:
    """Turn off skip connections that only one of two nets has.

    timm adds a skip connection wherever the two ends of a block are equally wide, and rounding makes them so at some widths
    only. Such a slim net still nests, layer by layer, so the comparison of functions leaves these connections out.
    """
    hosts = dict(host.named_modules())
    before: list[tuple[Any, bool]] = [
        (module, cast(Any, module).has_skip)
        for name, block in skeleton.named_modules()
        if getattr(block, "has_skip", None) != getattr(hosts[name], "has_skip", None)
        for module in (block, hosts[name])
    ]
    for block, _ in before:
        block.has_skip = False
    try:
        yield
    finally:
        for block, skips in before:
            block.has_skip = skips


@contextlib.contextmanager
def _common_layer_norms(host: nn.Module, skeleton: nn.Module) -> Iterator[None]:
    """Let each layer norm of a host work on the leading channels that the slim net has, and leave the others at zero."""
    hosts = dict(host.named_modules())
    handles = [
        hosts[name].register_forward_hook(partial(_lead, norm.normalized_shape[0]))
        for name, norm in wider_layer_norms(host, skeleton)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lead(count: int, norm: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Normalize the first channels alone, as a forward hook."""
    weight, bias = (None if one is None else one[:count] for one in (norm.weight, norm.bias))
    normed = F.layer_norm(inputs[0][..., :count], (count,), weight, bias, norm.eps)
    return F.pad(normed, (0, output.shape[-1] - count))


def wider_layer_norms(host: nn.Module, slim: nn.Module) -> list[tuple[str, nn.LayerNorm]]:
    """Return the layer norms of a slim net, by name, of which the host's are over more channels."""
    hosts = dict(host.named_modules())
    return [
        (name, cast(nn.LayerNorm, norm))
        for name, norm in slim.named_modules()
        if type(norm) in _LAYER_NORMS
        and cast(Any, norm).normalized_shape != cast(Any, hosts[name]).normalized_shape
    ]


def _hides(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all() or tensor.abs().max() < 1e-3)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module, without those of its children."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _grouping(layer: _ConvNd) -> str:
    return "dense" if layer.groups == 1 else "depthwise" if layer.groups == layer.in_channels else "grouped"
