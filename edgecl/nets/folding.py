"""What a net trains with and runs without: branches are fused, batch norms folded into the convolution before them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgecl.errors import RecipeError
from edgecl.nets.backbone import example_side, is_norm, taking_pictures

# Of the largest output. Rounding alone makes 1e-6, 1e-4 in a net with random weights; a wrong fold, the order of 1.
_TOLERANCE = 1e-2

_SERVED = "this serves nets of convolutions, each followed by its norm: MobileNets, EfficientNets, ResNets"
# What timm calls the method of a module that fuses its branches.
_FUSES = ("fuse", "reparameterize", "switch_to_deploy")
# timm's modules keep it, and some cannot be fused twice.
_FUSED = "branches_are_fused"


@dataclass
class Walk:
    """What happened in one forward pass, in the order in which it happened.

    Tensors are held so that two of them can be told apart by identity.

    Attributes:
        calls: (name, module, input) of every module that was given a tensor, containers included.
        outputs: the tensor each call gave, by name; the last one of a module called twice.
        sums: (name of the module whose forward added, left, right) of every sum of two tensors.
    """

    calls: list[tuple[str, nn.Module, Tensor]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    sums: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)


def walk(net: nn.Module) -> Walk:
    """Run a net once on a picture of noise, in evaluation mode, and note what its modules were given.

    Raises:
        RecipeError: the net does not take the picture.
    """
    found = Walk()
    inside: list[str] = []

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            inside.append(name)
            if inputs and isinstance(inputs[0], Tensor):
                found.calls.append((name, module, inputs[0]))

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            inside.pop()
            if isinstance(output, Tensor):
                found.outputs[name] = output

        return hook

    handles = []
    for name, module in net.named_modules():
        # First, before hooks of the module's own change what its forward is given.
        handles.append(module.register_forward_pre_hook(entering(name), prepend=True))
        handles.append(module.register_forward_hook(leaving(name)))
    try:
        with _Sums(found, inside):
            run_example(net)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Sums(TorchFunctionMode):
    """Note every `left + right` and `left += right` of two tensors."""

    def __init__(self, found: Walk, inside: list[str]):
        super().__init__()
        self.found, self.inside = found, inside

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        if name in ("add", "iadd") and len(args) == 2 and all(isinstance(each, Tensor) for each in args):
            self.found.sums.append((self.inside[-1], args[0], args[1]))
        return function(*args, **(kwargs or {}))


def run_example(net: nn.Module) -> Tensor:
    """Return a net's output for one picture of noise, in evaluation mode.

    Raises:
        RecipeError: the net does not take the picture.
    """
    was_training = net.training
    net.eval()
    like = next(net.parameters())
    side = example_side(net)
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        with taking_pictures("the net", side, side, hint=_SERVED), torch.no_grad():
            output: Tensor = net(noise.to(like.device, like.dtype))
    finally:
        net.train(was_training)
    return output


def has_branches(net: nn.Module) -> bool:
    """Return whether a net has layers that timm fuses, parallel branches most of all, and has not fused yet."""
    return not getattr(net, _FUSED, False) and any(
        hasattr(module, name) for module in net.modules() for name in _FUSES
    )


def fuse_branches(net: nn.Module) -> nn.Module:
    """Make one convolution of those that run side by side, as RepViT, MobileOne, FastViT, LCNetV2 and RepGhost train them.

    Training keeps the branches, and so do the weights of a model directory.

    Args:
        net: (N, 3, H, W) -> (N, F) or (N, K); left as it is.

    Returns:
        a copy in evaluation mode that computes what `net` computes then, up to float32 rounding; `net` itself where there
        is nothing to fuse.

    Raises:
        RecipeError: fusing changes the output.
    """
    if not has_branches(net):
        return net
    with torch.no_grad():
        fused: nn.Module = reparameterize_model(copy.deepcopy(net).eval(), inplace=True)
    setattr(fused, _FUSED, True)
    _check_same(net, fused, "fuse the branches")
    return fused


def fold_batch_norm(net: nn.Module) -> nn.Module:
    """Fuse a net's branches, and fold every batch norm that comes right after a convolution into it.

    A norm's place in the net stays: an nn.Identity, or for timm's BatchNormAct2d its `drop` and `act`. All other
    modules keep their names and every convolution that had a norm gains a bias. A norm that no convolution feeds stays,
    as does one whose convolution goes into a sum, too.

    Args:
        net: (N, 3, H, W) -> (N, F) or (N, K); left as it is.

    Returns:
        a copy that computes what `net` computes in evaluation mode, up to float32 rounding; in evaluation mode.

    Raises:
        RecipeError: a convolution that feeds two norms, or a net in which folding changes the output.
    """
    folded = copy.deepcopy(fuse_branches(net)).eval()
    seen = walk(folded)
    makers: dict[int, tuple[str, nn.Conv2d]] = {
        id(seen.outputs[name]): (name, module)
        for name, module, _ in seen.calls
        if isinstance(module, nn.Conv2d)
    }
    added = {id(tensor) for _, *both in seen.sums for tensor in both}
    taken: dict[str, str] = {}
    for name, norm, given in seen.calls:
        if not is_norm(norm) or id(given) not in makers or id(given) in added:
            continue
        convolution_name, convolution = makers[id(given)]
        if taken.setdefault(convolution_name, name) != name:
            raise RecipeError(
                f"cannot fold '{name}': '{convolution_name}' feeds '{taken[convolution_name]}' too",
                hint=_SERVED,
            )
        _fold(convolution, norm)
        folded.set_submodule(name, _remains(norm))
    _check_same(net, folded, "fold the batch norms")
    return folded


def _check_same(net: nn.Module, changed: nn.Module, what: str) -> None:
    expected, found = run_example(net), run_example(changed)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference < _TOLERANCE:
        raise RecipeError(
            f"cannot {what}: the output changes by {difference:.2g} of its largest value", hint=_SERVED
        )


def _fold(convolution: nn.Conv2d, norm: Any) -> None:
    """Set the convolution's weights to those that make `norm(convolution(x))`."""
    with torch.no_grad():
        factor = 1 / (norm.running_var.double() + norm.eps).sqrt()
        if norm.weight is not None:
            factor *= norm.weight.double()
        bias = -norm.running_mean.double() * factor
        if norm.bias is not None:
            bias += norm.bias.double()
        if convolution.bias is not None:
            bias += convolution.bias.double() * factor
        weight = convolution.weight.double() * factor.view(-1, 1, 1, 1)
        convolution.weight = nn.Parameter(weight.to(convolution.weight.dtype))
        convolution.bias = nn.Parameter(bias.to(convolution.weight.dtype))


def _remains(norm: nn.Module) -> nn.Module:
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children) if children else nn.Identity()
