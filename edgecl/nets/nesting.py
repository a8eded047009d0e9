"""Where each tensor of a slim net lies in its host: a rule for each type of module.

A rule is a function of a slim module and the host's of the same name. It returns an index into the host's tensor for each
tensor of its own, or raises ValueError where the slim module is no part of the host's. An index is what `tensor[index]`
takes: slices for leading blocks, LongTensors for rows that lie apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from edgecl.errors import SliceError
from edgecl.nets.backbone import is_norm

Index = tuple[slice | Tensor, ...]
Rule = Callable[[nn.Module, nn.Module], dict[str, Index]]

HINT = "this architecture changes with its width; `edgecl ls nets` lists those that nest"
# As large as the deepest stride of the usual nets, so that no feature map shrinks to nothing.
_SIDE = 64
_TOLERANCE = 1e-3


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


def channel_norm(slim: nn.Module, host: nn.Module) -> dict[str, Index]:
    """A norm over channels: only where the host has no more of them."""
    found, hosts = prefix(slim, host), _own_tensors(host)
    if any(tensor.shape != hosts[leaf].shape for leaf, tensor in _own_tensors(slim).items()):
        raise ValueError("a norm over channels, of which the host has more")
    return found


RULES: list[tuple[type[nn.Module], Rule]] = [
    (_ConvNd, convolution),
    (nn.GroupNorm, channel_norm),
    (nn.LayerNorm, channel_norm),
]
"""The first whose type a slim module has holds; `prefix` holds for all others."""


def is_private(module: nn.Module) -> bool:
    """Return whether a slim net has a module of its own: batch norm, since statistics of one width are wrong for another."""
    return is_norm(module)


def index_of(slim: nn.Module, host: nn.Module, *, where: Mapping[str, object]) -> dict[str, Index]:
    """Return where each tensor of a slim net lies in its host; for private modules, what they begin as.

    Args:
        slim: the slim net; may be on the meta device.
        host: the host.
        where: both widths, for the error.

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
    hosts, found = dict(host.named_modules()), {}
    for name, module in slim.named_modules():
        if not _own_tensors(module):
            continue
        rule = next((rule for kind, rule in RULES if isinstance(module, kind)), prefix)
        try:
            index = rule(module, hosts[name])
        except ValueError as exc:
            raise SliceError(
                f"cannot slice '{name or type(module).__name__}': {exc}", where=dict(where), hint=HINT
            ) from exc
        found.update({f"{name}.{leaf}" if name else leaf: place for leaf, place in index.items()})
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
    Norms get random values here, since some start at zero and would hide a difference.

    Args:
        host: the host.
        skeleton: the slim net, whose own tensors are not used.
        tensors: of the slim net, by name.
        index: where each of them lies in the host.
        where: both widths, for the error.

    Raises:
        SliceError: it does not, or a forward pass fails.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, _SIDE, _SIDE, generator=generator)
    private = {name for name, module in skeleton.named_modules() if is_private(module)}
    slim, masked = {}, {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        if name.rpartition(".")[0] in private and value.is_floating_point():
            value = torch.rand(value.shape, generator=generator) + 0.5
        slim[name] = value
    for name, tensor in host.state_dict().items():
        masked[name] = torch.zeros_like(tensor)
        masked[name][index[name]] = slim[name]
    modes = host.training, skeleton.training
    try:
        with torch.no_grad(), _common_skips(host, skeleton):
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
    pairs = [
        (block, hosts[name])
        for name, block in skeleton.named_modules()
        if getattr(block, "has_skip", None) != getattr(hosts[name], "has_skip", None)
    ]
    before = [(block.has_skip, other.has_skip) for block, other in pairs]
    for block, other in pairs:
        setattr(block, "has_skip", False)  # noqa: B010 - timm's attribute, unknown to nn.Module's types
        setattr(other, "has_skip", False)  # noqa: B010
    try:
        yield
    finally:
        for (block, other), (block_skips, other_skips) in zip(pairs, before, strict=True):
            setattr(block, "has_skip", block_skips)  # noqa: B010
            setattr(other, "has_skip", other_skips)  # noqa: B010


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module that its state dict has, without those of its children."""
    buffers = dict(module.named_buffers(recurse=False))
    kept = {name: one for name, one in buffers.items() if name not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=False)), **kept}


def _grouping(layer: _ConvNd) -> str:
    return "dense" if layer.groups == 1 else "depthwise" if layer.groups == layer.in_channels else "grouped"
