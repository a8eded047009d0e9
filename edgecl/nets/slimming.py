"""A wide host net and the slim net inside it: prefix slices of the host's weights, batch norm of its own.

No layer is patched. The slim net is an ordinary, smaller net whose tensors are, name by name, the leading
block `host[name][:o, :i, …]` of the host's, put in place for one call by `torch.func.functional_call`; gradients
flow through the slices. Only batch norm is private to each width, since statistics of one width are wrong
for the other (METHOD: evaluation features drift by standard deviations when they are shared).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgecl.errors import SliceError
from edgecl.nets.backbone import is_norm

_NESTING_HINT = "this architecture changes with its width; `edgecl ls nets` lists those that nest"


class SlimmableNet(nn.Module):
    """A host, and slim nets that share its weights.

    Args:
        build: makes the net at a width; called once per width. All its tensors must have the same names at
            every width, and each must be at least as large in the host in every dimension.
        host_width: width of the host.
        slim_width: width of the slim net, at most the host's; when equal, the slim net is the host itself.

    Raises:
        SliceError: the slim net is not a prefix of the host.
    """

    def __init__(self, build: Callable[[float], nn.Module], *, host_width: float, slim_width: float):
        super().__init__()
        if slim_width > host_width:
            raise SliceError(
                f"slim width {slim_width:g} is above the host's {host_width:g}",
                hint="the slim net is a part of the host: widen the host or narrow the slim net",
            )
        self.host_width = host_width
        self.slim_width = slim_width
        self.host = build(host_width)
        self.slim_norms = nn.ModuleDict()
        self._skeleton: tuple[nn.Module, ...] = ()
        self.watched: dict[str, Tensor] | None = None
        """When set to a dict, the slim passes that learn leave their slices here, with gradients retained."""
        if slim_width == host_width:
            return
        with torch.device("meta"):
            skeleton = build(slim_width)
        check_nesting(
            {name: tensor.shape for name, tensor in skeleton.state_dict().items()},
            {name: tensor.shape for name, tensor in self.host.state_dict().items()},
            slim_width=slim_width,
            host_width=host_width,
        )
        for name, module in skeleton.named_modules():
            if is_norm(module):
                module.to_empty(device="cpu")
                module.reset_parameters()
                self.slim_norms[_key(name)] = module
        # In a tuple, so that the skeleton is no submodule: its convolutions stay on the meta device for good,
        # only its norms (registered above) are parameters.
        self._skeleton = (skeleton,)
        private = {
            f"{_name(key)}.{leaf}"
            for key, norm in self.slim_norms.items()
            for leaf, _ in [*norm.named_parameters(), *norm.named_buffers()]
        }
        self._slices = {
            name: tuple(slice(0, size) for size in tensor.shape)
            for name, tensor in skeleton.state_dict().items()
            if name not in private
        }
        self._copy_host_norms()
        self._check_function()

    def _copy_host_norms(self) -> None:
        """Start the slim norms at the host's values: architectures initialise some norms at zero."""
        host = dict(self.host.named_parameters())
        with torch.no_grad():
            for key, norm in self.slim_norms.items():
                for leaf, parameter in norm.named_parameters():
                    parameter.copy_(host[f"{_name(key)}.{leaf}"][: parameter.shape[0]])

    def _check_function(self) -> None:
        """Hold the host, with everything outside the slim net set to zero, to computing what the slim net computes.

        Shapes that nest are not enough: grouped convolutions, attention heads and norms over channels change
        their meaning with the width. Norms get random values here, since some start at zero and would hide it.
        """
        generator = torch.Generator().manual_seed(0)
        host, skeleton = self.host, self._skeleton[0]
        # As large as its deepest stride, so that no feature map shrinks to nothing.
        images = torch.randn(2, 3, 64, 64, generator=generator)
        slim, masked = {}, {}
        for name, tensor in self.slim_tensors().items():
            value = tensor.detach()
            if name not in self._slices and value.is_floating_point():
                value = torch.rand(value.shape, generator=generator) + 0.5
            slim[name] = value
        for name, tensor in host.state_dict().items():
            masked[name] = torch.zeros_like(tensor)
            masked[name][tuple(slice(0, size) for size in slim[name].shape)] = slim[name]
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), _common_skips(host, skeleton):
                expected = functional_call(skeleton, slim, (images,))
                found = functional_call(host, masked, (images,))
        except RuntimeError as complaint:
            raise SliceError(
                f"cannot slice this net: a slim forward pass fails ({str(complaint).splitlines()[0]})",
                where=self._widths,
                hint=_NESTING_HINT,
            ) from complaint
        finally:
            self.train(training)
        found = found[:, : expected.shape[1]]
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if not difference < 1e-3:
            raise SliceError(
                "cannot slice this net: with the channels outside the slim net switched off, "
                f"the host's output differs by {difference:.2g} of its largest value",
                where=self._widths,
                hint=_NESTING_HINT,
            )

    @property
    def _widths(self) -> dict[str, object]:
        return {"host width": f"{self.host_width:g}", "slim width": f"{self.slim_width:g}"}

    @property
    def has_slim(self) -> bool:
        """Whether the slim net is another net than the host."""
        return bool(self._skeleton)

    def train(self, mode: bool = True) -> SlimmableNet:
        """Set training mode on the host and on the slim net's skeleton."""
        super().train(mode)
        for skeleton in self._skeleton:
            skeleton.train(mode)
        return self

    def slim_tensors(self) -> dict[str, Tensor]:
        """Return the slim net's parameters and buffers by name: views of the host's weights, and private norms."""
        if not self.has_slim:
            return dict(self.host.state_dict(keep_vars=True))
        host = {**dict(self.host.named_parameters()), **dict(self.host.named_buffers())}
        tensors = {name: host[name][block] for name, block in self._slices.items()}
        for key, norm in self.slim_norms.items():
            prefix = _name(key)
            for leaf, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                tensors[f"{prefix}.{leaf}"] = tensor
        return tensors

    def forward_host(self, images: Tensor) -> Tensor:
        """Run the host."""
        outputs: Tensor = self.host(images)
        return outputs

    def forward_slim(self, images: Tensor) -> Tensor:
        """Run the slim net inside the host."""
        if not self.has_slim:
            return self.forward_host(images)
        tensors = self.slim_tensors()
        if self.watched is not None and torch.is_grad_enabled():
            for name in self._slices:
                if tensors[name].requires_grad:
                    tensors[name].retain_grad()
                    self.watched[name] = tensors[name]
        outputs: Tensor = functional_call(self._skeleton[0], tensors, (images,))
        return outputs

    def forward_slim_part(
        self, part: str, images: Tensor, *, replaced: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Run one part of the slim net inside the host, such as its 'backbone'.

        Args:
            part: name of the submodule.
            images: what it takes.
            replaced: tensors to put in place of the host's, by their name within the part.
        """
        prefix = f"{part}."
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.slim_tensors().items()
            if name.startswith(prefix)
        }
        net = (self._skeleton[0] if self.has_slim else self.host).get_submodule(part)
        outputs: Tensor = functional_call(net, {**tensors, **(replaced or {})}, (images,))
        return outputs

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Give passes that learn nothing: no gradient, batch statistics used, running statistics left alone."""
        norms: list[Any] = [module for module in self.modules() if is_norm(module)]
        tracked = [norm.track_running_stats for norm in norms]
        for norm in norms:
            norm.track_running_stats = False
        try:
            with torch.no_grad():
                yield
        finally:
            for norm, track in zip(norms, tracked, strict=True):
                norm.track_running_stats = track


@contextlib.contextmanager
def _common_skips(host: nn.Module, skeleton: nn.Module) -> Iterator[None]:
    """Let both nets skip only where both do.

    timm adds a skip connection wherever the two ends of a block are equally wide, and rounding makes them so at
    some widths only. Such a slim net is still a slice of its host, layer by layer, so the comparison of functions
    must not stumble over it.
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


def check_nesting(
    slim: dict[str, torch.Size], host: dict[str, torch.Size], *, slim_width: float, host_width: float
) -> None:
    """Hold a slim net to being a prefix of its host.

    Args:
        slim: name -> shape of the slim net's tensors.
        host: name -> shape of the host's.
        slim_width: for the error.
        host_width: for the error.

    Raises:
        SliceError: a tensor is missing on one side, has another rank, or is larger in the slim net.
    """
    where = {"host width": f"{host_width:g}", "slim width": f"{slim_width:g}"}
    missing = sorted(slim.keys() ^ host.keys())
    if missing:
        raise SliceError(
            f"cannot slice this net: '{missing[0]}' is in one width and not in the other "
            f"({len(missing)} such tensors)",
            where=where,
            hint=_NESTING_HINT,
        )
    for name, shape in slim.items():
        if len(shape) != len(host[name]) or any(
            small > large for small, large in zip(shape, host[name], strict=True)
        ):
            raise SliceError(
                f"cannot slice '{name}' to {tuple(shape)}: the host has {tuple(host[name])}",
                where=where,
                hint="the host must be at least as wide as the slim net in every layer",
            )


# Module names hold dots, which nn.ModuleDict refuses in a key.
def _key(name: str) -> str:
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
