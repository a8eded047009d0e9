"""A wide host net and the slim nets inside it: parts of the host's weights, batch norm of their own.

No layer is patched. A slim net is an ordinary, smaller net whose tensors are, name by name, a part of the host's, most often
the leading block `host[name][:o, :i, …]` (`edgecl.nets.nesting`), put in place for one call by
`torch.func.functional_call`; gradients flow through the parts. Only norms are private to each width, batch norms and layer
norms, since statistics of one width are wrong for another (METHOD: evaluation features drift by standard deviations when
they are shared).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgecl.errors import SliceError
from edgecl.nets.backbone import is_norm
from edgecl.nets.nesting import Index, check_function, index_of, inward_weights, is_private, wider_layer_norms


@dataclass
class SlimView:
    """What one width needs to be run inside the host.

    Attributes:
        width: multiple of the architecture's own channels.
        skeleton: the net at this width, its tensors on the meta device apart from its norms.
        norms: those norms by key, each the very module that stands in the skeleton.
        index: name of a tensor that it shares -> where it lies in the host's.
        norm_index: name of a tensor of its norms -> which part of the host's it began as.
    """

    width: float
    skeleton: nn.Module
    norms: nn.ModuleDict
    index: dict[str, Index]
    norm_index: dict[str, Index]

    @classmethod
    def create(
        cls,
        build: Callable[[float], nn.Module],
        width: float,
        host: nn.Module,
        *,
        where: Mapping[str, object],
    ) -> SlimView:
        """Build a width without memory for the weights it shares; its norms begin as the host's.

        Raises:
            SliceError: it does not nest in the host.
        """
        with torch.device("meta"):
            skeleton = build(width)
        index = index_of(skeleton, host, where=where)
        norms = nn.ModuleDict()
        for name, module in skeleton.named_modules():
            if is_private(module):
                module.to_empty(device="cpu")
                cast(Any, module).reset_parameters()
                norms[_key(name)] = module
        view = cls(width, skeleton, norms, index, {})
        view.norm_index = {name: index.pop(name) for name in view.private_tensors()}
        # Not as a fresh norm: architectures initialize some norms at zero.
        whole = dict(host.named_parameters())
        with torch.no_grad():
            for name, tensor in view.private_tensors().items():
                if name in whole:
                    tensor.copy_(whole[name][view.norm_index[name]])
        return view

    def private_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the norms, by their name within the net."""
        return {
            f"{_name(key)}.{leaf}": tensor
            for key, norm in self.norms.items()
            for leaf, tensor in [*norm.named_parameters(), *norm.named_buffers()]
        }

    def tensors_in(self, host: nn.Module) -> dict[str, Tensor]:
        """Return all parameters and buffers by name: views of the host's, and the norms'."""
        whole = {**dict(host.named_parameters()), **dict(host.named_buffers())}
        return {
            **{name: whole[name][block] for name, block in self.index.items()},
            **self.private_tensors(),
        }

    def blocks_of(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the shared tensors by name, each as large as in this width and without gaps."""
        whole = {**dict(host.named_parameters()), **dict(host.named_buffers())}
        found = {name: whole[name][block] for name, block in self.index.items()}
        smaller = [name for name, block in found.items() if block.shape != whole[name].shape]
        dense = _dense_blocks([whole[name] for name in smaller], [self.index[name] for name in smaller])
        return {**found, **dict(zip(smaller, dense, strict=True))}

    def replace_norm(self, name: str, norm: nn.Module) -> None:
        """Replace the norm of this name."""
        self.skeleton.set_submodule(name, norm)
        self.norms[_key(name)] = norm


class SlimmableNet(nn.Module):
    """A host, and slim nets that share its weights.

    Args:
        build: makes the net at a width; called once per width. All its tensors must have the same names at
            every width, and each must be at least as large in the host in every dimension.
        slim_width: width of the slim net, at most the host's; when equal, the slim net is the host itself.
        other_widths: widths of further slim nets, each below slim_width.

    Methods that take the width of a slim net take one of slim_widths, or None for slim_width.

    Raises:
        SliceError: a slim net is not a prefix of the host.
    """

    def __init__(
        self,
        build: Callable[[float], nn.Module],
        *,
        host_width: float,
        slim_width: float,
        other_widths: Sequence[float] = (),
    ):
        super().__init__()
        self.host_width = host_width
        self.slim_width = slim_width
        self.slim_widths = (slim_width, *sorted(set(other_widths), reverse=True))
        """Every slim width, widest first."""
        self.host = build(host_width)
        self.slim_norms = nn.ModuleDict()
        self.other_norms = nn.ModuleDict()
        # No submodules: of a skeleton only the norms, registered below, are parameters, and its convolutions stay
        # on the meta device for good. A slim net as wide as the host is the host and has no view.
        self._views: dict[float, SlimView] = {}
        self.host_skips: dict[str, int] = {}
        """Blocks of the host whose skip connection `nest` changed -> how many of their first channels have one."""
        self.watched: dict[str, Tensor] | None = None
        """When set to a dict, a backward pass adds here the gradients of the slices of the slim width's passes, by name."""
        for width in self.slim_widths:
            if width != host_width:
                self._add_view(build, width)

    def _add_view(self, build: Callable[[float], nn.Module], width: float) -> None:
        where = {"host width": f"{self.host_width:g}", "slim width": f"{width:g}"}
        view = SlimView.create(build, width, self.host, where=where)
        self._views[width] = view
        if width == self.slim_width:
            self.slim_norms = view.norms
        else:
            self.other_norms[_key(str(width))] = view.norms
        check_function(
            self.host,
            view.skeleton,
            view.tensors_in(self.host),
            {**view.index, **view.norm_index},
            where=where,
        )

    def nest(self) -> None:
        """Start the host as its slim nets plus channels that do not touch them yet.

        Every weight that leads from a channel outside a slim net to one inside it becomes zero, so that the host computes
        exactly what the slim net computes on the outputs they share. The weights into the other channels stay, so
        gradients reach them and they join in as they learn. Where only one of host and slim net has a skip connection,
        the host is made like the slim net: `host_skips` tells which blocks.

        Raises:
            SliceError: two slim nets differ in their skip connections, so that the host cannot be like both; or a layer
                norm takes its mean over more channels in the host, so that it never computes what the slim net's does.
        """
        for view in self._views.values():
            for name, _ in wider_layer_norms(self.host, view.skeleton):
                raise SliceError(
                    f"a host cannot begin as its slim nets where a layer norm is over more channels in it, as '{name}' is",
                    hint="set [host] nested_start = false, or [host] width to the slim net's",
                )
        whole = dict(self.host.named_parameters())
        with torch.no_grad():
            for view in self._views.values():
                for name, index in view.index.items():
                    if name in whole and len(index) > 1:
                        whole[name].masked_fill_(inward_weights(whole[name], index), 0)
        self._match_skips()

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of the widest slim net's; after `nest`, the host computes what they do.

        Narrower nets begin as the leading part of these, the statistics of their norms too. The tensors are parameters and
        buffers by name, all that their layers have.
        """
        whole, widest = self.host.state_dict(), self._view(None)
        places: dict[str, Any] = {} if widest is None else {**widest.index, **widest.norm_index}
        with torch.no_grad():
            for name, tensor in tensors.items():
                whole[name][places.get(name, ...)] = tensor
            for view in self._views.values():
                for name, mine in view.private_tensors().items():
                    if name in tensors:
                        mine.copy_(whole[name][view.norm_index[name]])

    def _match_skips(self) -> None:
        """Set the host's skip connections to those of the slim nets."""
        if not self._views:
            return
        hosts = dict(self.host.named_modules())
        views = list(self._views.values())
        for name, block in views[0].skeleton.named_modules():
            skips = getattr(block, "has_skip", None)
            for other in views[1:]:
                if getattr(other.skeleton.get_submodule(name), "has_skip", None) != skips:
                    raise SliceError(
                        f"the slim nets of width {views[0].width:g} and {other.width:g} differ in the skip connection of "
                        f"'{name}', so no host can begin as both",
                        hint="set [host] nested_start = false, or choose other [slim] widths",
                    )
            if skips is not None and skips != getattr(hosts[name], "has_skip", None):
                last = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)][-1]
                self.host_skips[name] = last.out_channels if skips else 0
        limit_skips(self.host, self.host_skips)

    @property
    def has_slim(self) -> bool:
        """Whether the slim net is another net than the host."""
        return self.slim_width != self.host_width

    def train(self, mode: bool = True) -> SlimmableNet:
        """Set training mode on the host and on the skeletons of the slim nets."""
        super().train(mode)
        for view in self._views.values():
            view.skeleton.train(mode)
        return self

    def _view(self, width: float | None) -> SlimView | None:
        """Return the view of a slim width, None being the widest; None where that is the host itself."""
        chosen = self.slim_width if width is None else width
        assert chosen in self.slim_widths
        return self._views.get(chosen)

    def slim_tensors(self, width: float | None = None) -> dict[str, Tensor]:
        """Return a slim net's parameters and buffers by name: views of the host's weights, and private norms."""
        view = self._view(width)
        return dict(self.host.state_dict(keep_vars=True)) if view is None else view.tensors_in(self.host)

    @property
    def slim_index(self) -> Mapping[str, Index]:
        """Where the widest slim net's shared tensors lie in the host, by name; empty where it is the host itself."""
        view = self._view(None)
        return {} if view is None else view.index

    def norms_of(self, width: float | None = None) -> nn.ModuleDict:
        """Return the private norms of a slim width, by key; empty where that is the host itself."""
        view = self._view(width)
        return nn.ModuleDict() if view is None else view.norms

    def map_norms(self, replace: Callable[[str, nn.Module], nn.Module]) -> None:
        """Replace every batch norm of the host and of each slim width.

        Args:
            replace: from a norm's name and the norm to what stands in its place, itself a batch norm with tensors
                of the same names. Names are those of the state dict with dots throughout: 'host.projector.1',
                'slim_norms.projector.1', 'other_norms.0.5.projector.1'.
        """
        for name, norm in list(self.host.named_modules()):
            if is_norm(norm):
                self.host.set_submodule(name, replace(f"host.{name}", norm))
        for width, view in self._views.items():
            prefix = "slim_norms" if width == self.slim_width else f"other_norms.{width}"
            for key, norm in list(view.norms.items()):
                if not is_norm(norm):
                    continue
                view.replace_norm(_name(key), replace(f"{prefix}.{_name(key)}", norm))

    def compile_passes(self) -> None:
        """Compile the host and every slim net with torch.compile, in place; names of tensors stay."""
        for net in (self.host, *(view.skeleton for view in self._views.values())):
            net.compile()

    def forward_host(self, images: Tensor) -> Tensor:
        """Run the host."""
        outputs: Tensor = self.host(images)
        return outputs

    def forward_slim(self, images: Tensor, width: float | None = None) -> Tensor:
        """Run a slim net inside the host.

        Args:
            images: (N, 3, H, W).
        """
        view = self._view(width)
        if view is None:
            return self.forward_host(images)
        # Its norms stand in the skeleton already.
        blocks = view.blocks_of(self.host)
        if self.watched is not None and torch.is_grad_enabled() and view.width == self.slim_width:
            for name, block in blocks.items():
                if block.requires_grad:
                    block.register_hook(partial(_add_to, self.watched, name))
        # No tensor has two names here, which torch would look for in every pass.
        outputs: Tensor = functional_call(view.skeleton, blocks, (images,), tie_weights=False)
        return outputs

    def forward_slim_part(
        self,
        part: str,
        images: Tensor,
        *,
        replaced: dict[str, Tensor] | None = None,
        width: float | None = None,
    ) -> Tensor:
        """Run one part of a slim net inside the host, such as its 'backbone'.

        Args:
            replaced: tensors to put in place of the host's, by their name within the part.
        """
        prefix = f"{part}."
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.slim_tensors(width).items()
            if name.startswith(prefix)
        }
        view = self._view(width)
        net = (self.host if view is None else view.skeleton).get_submodule(part)
        outputs: Tensor = functional_call(net, {**tensors, **(replaced or {})}, (images,))
        return outputs

    @contextlib.contextmanager
    def untracked(self) -> Iterator[None]:
        """Run training passes with batch statistics, the running ones left alone."""
        norms: list[Any] = [module for module in self.modules() if is_norm(module)]
        tracked = [norm.track_running_stats for norm in norms]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm, track in zip(norms, tracked, strict=True):
                norm.track_running_stats = track

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Run passes that learn nothing: no gradient, batch statistics used, running statistics left alone."""
        with self.untracked(), torch.no_grad():
            yield


def _add_to(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    sums[name] = sums[name] + gradient if name in sums else gradient


class _DenseBlocks(torch.autograd.Function):
    """Blocks of tensors without gaps; backward, their gradients amid zeros. One step of autograd for a whole net."""

    @staticmethod
    def forward(ctx: Any, blocks: list[Index], *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*whole)
        ctx.blocks = blocks
        return tuple(tensor[block].clone() for tensor, block in zip(whole, blocks, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = []
        for tensor, block, gradient in zip(ctx.saved_tensors, ctx.blocks, gradients, strict=True):
            found.append(torch.zeros_like(tensor))
            found[-1][block] = gradient
        return None, *found


def _dense_blocks(whole: list[Tensor], blocks: list[Index]) -> tuple[Tensor, ...]:
    """Copy blocks once for a whole pass.

    A view with the host's strides would be copied by its convolution, and again on the way back, where each dimension
    that is cut would fill a gradient of its own.
    """
    return cast(tuple[Tensor, ...], _DenseBlocks.apply(blocks, *whole)) if whole else ()


def limit_skips(net: nn.Module, skips: dict[str, int]) -> None:
    """Limit skip connections of blocks to their first channels.

    Args:
        net: of timm's blocks; changed in place.
        skips: name of a block -> how many channels, 0 for none.
    """
    for name, channels in skips.items():
        block = net.get_submodule(name)
        setattr(block, "has_skip", False)  # noqa: B010 - timm's attribute, unknown to nn.Module's types
        if channels:
            block.register_forward_hook(partial(_skip_first, channels))


def _skip_first(channels: int, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Add the first channels of a block's input to those of its output, as a forward hook."""
    return torch.cat([output[:, :channels] + inputs[0][:, :channels], output[:, channels:]], dim=1)


# Module names hold dots, which nn.ModuleDict refuses in a key.
def _key(name: str) -> str:
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
