"""A timm network at any width, from pictures to pooled features."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

with warnings.catch_warnings():
    # timm scripts two functions while it is imported, which newer torch calls deprecated: not the user's business.
    warnings.simplefilter("ignore", FutureWarning)
    import timm
    from timm.models import is_model, list_models, model_entrypoint

from edgecl.errors import RecipeError, SliceError, first_line, near_matches


def create_backbone(
    arch: str, *, width: float = 1.0, num_classes: int = 0, stem_stride: int | None = None
) -> nn.Module:
    """Build a timm network whose channels are `width` times the architecture's.

    Args:
        width: multiple of the architecture's own channels, > 0; 1.0 is `timm.create_model(arch)` itself.
        num_classes: 0 gives pooled features (N, F); more adds timm's classifier.
        stem_stride: stride of the first convolution; None keeps the architecture's.

    Returns:
        a module from (N, 3, H, W) to (N, F) or (N, num_classes), with random weights.

    Raises:
        RecipeError: timm has no such architecture.
        SliceError: timm cannot build the architecture at another width.
    """
    if not is_model(arch):
        raise RecipeError(f"timm has no architecture '{arch}'", hint=near_matches(arch, list_models()))
    net = (
        timm.create_model(arch, num_classes=num_classes)
        if width == 1.0
        else _create_at_width(arch, width, num_classes=num_classes)
    )
    if stem_stride is not None:
        _set_stem_stride(net, stem_stride)
    if num_classes == 0 and hasattr(net, "drop_rate"):
        # Some nets drop a fifth of their features: that is for their classifier.
        setattr(net, "drop_rate", 0.0)  # noqa: B010 - timm's attribute, unknown to nn.Module's types
    return net


def activate_beside_input(net: nn.Module) -> None:
    """Turn off in-place activations whose gradient is a function of their input, for training.

    timm has them work in place. Autograd then copies the input first, a pass over memory per layer that buys nothing.
    ReLU's gradient is a function of its output: it stays in place.
    """
    for module in net.modules():
        if isinstance(module, (nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish)):
            module.inplace = False


def feature_count(net: nn.Module) -> int:
    """Return F, the length of the feature vector of a backbone with num_classes=0."""
    # timm's num_features is the trunk's; MobileNetV3 and V4 pass it through one more convolution.
    return int(getattr(net, "head_hidden_size", None) or cast(Any, net).num_features)


_Steps = dict[str, int | tuple[int, ...]]
_HEADS: _Steps = {"embed_dim": 64, "num_heads": 1}
_SCALED: dict[str, _Steps] = {
    "_create_byobnet": {"blocks": 8, "stem_chs": 8},
    "_create_deit": _HEADS,
    "_create_efficientformerv2": {"embed_dims": 8},
    "_create_fastvit": {"embed_dims": (8, 16, 32, 64, 128)},
    "_create_lcnetv2": {"scale": 0},
    "_create_lowformer": {"width_list": 4},
    "_create_repghostnet": {"width": 0},
    "_create_repvit": {"embed_dim": 8},
    "_create_resnet": {"channels": 8},
    "_create_starnet": {"base_dim": 4},
    "_create_vision_transformer": _HEADS,
}
"""timm's function that builds a family -> its arguments that are scaled -> a multiple of what; 0 leaves rounding to timm.

Several multiples are those of the stages. A head of a transformer stays 64 wide, and there are more of them; FastViT's
stages double exactly; a ResNet's stem has no width of its own.
"""
_RESNET_CHANNELS = (64, 128, 256, 512)


def _create_at_width(arch: str, width: float, *, num_classes: int) -> nn.Module:
    """Build a net by timm's own entry point, run with functions that scale what it gives them.

    An entry point spells its channels out (`_gen_mobilenet_v3('mobilenetv3_large_100', 1.0, …)`,
    `_create_repvit('repvit_m0_9', embed_dim=(48, 96, 192, 384), …)`), where no argument reaches them. timm's own module is
    left alone.
    """
    entrypoint = cast(types.FunctionType, model_entrypoint(arch))
    scaled: dict[str, Callable[..., nn.Module]] = {}
    for name in entrypoint.__code__.co_names:
        function: Any = entrypoint.__globals__.get(name)
        if name in _SCALED:
            scaled[name] = _scaled_builder(function, _SCALED[name], width)
        elif name.startswith("_gen_"):
            scaled.update(_scaled_generator(name, function, width))
    if not scaled:
        raise SliceError(
            f"timm cannot build '{arch}' at width {width:g}: no function of its entry point is known to take a width",
            hint="`edgecl ls nets` lists nets of any width; or set [host] width = 1.0",
        )
    builder = types.FunctionType(
        entrypoint.__code__,
        {**entrypoint.__globals__, **scaled},
        entrypoint.__name__,
        entrypoint.__defaults__,
        entrypoint.__closure__,
    )
    return cast(nn.Module, builder(pretrained=False, num_classes=num_classes))


def _scaled_generator(
    name: str, generator: Callable[..., nn.Module], width: float
) -> dict[str, Callable[..., nn.Module]]:
    """Return one of timm's generators that scales its channel multiplier, by its name; nothing where it has none."""
    parameters = inspect.signature(generator).parameters
    multiplier = next((one for one in ("channel_multiplier", "model_width") if one in parameters), None)
    if multiplier is None:
        return {}

    def build(variant: str, *positional: Any, **named: Any) -> nn.Module:
        if positional:
            return generator(variant, positional[0] * width, *positional[1:], **named)
        return generator(variant, **{**named, multiplier: named.get(multiplier, 1.0) * width})

    return {name: build}


def _scaled_builder(
    builder: Callable[..., nn.Module], steps: _Steps, width: float
) -> Callable[..., nn.Module]:
    """Return one of timm's builders that scales these of its arguments."""
    configs = cast(types.FunctionType, builder).__globals__.get("model_cfgs", {})

    def build(variant: str, *positional: Any, **named: Any) -> nn.Module:
        own = vars(configs[variant]) if variant in configs else {"channels": _RESNET_CHANNELS}
        scaled = {name: _scale({**own, **named}[name], width, step) for name, step in steps.items()}
        return builder(variant, *positional, **{**named, **scaled})

    return build


def _scale(value: Any, width: float, step: int | tuple[int, ...]) -> Any:
    """Return a number of channels, or each of several, times the width, to the nearest multiple of step."""
    if isinstance(value, (tuple, list)):
        steps = step if isinstance(step, tuple) else (step,) * len(value)
        return tuple(_scale(one, width, each) for one, each in zip(value, steps, strict=False))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # timm's description of a block
        return dataclasses.replace(value, c=_scale(cast(Any, value).c, width, step))
    assert isinstance(step, int)
    return max(step, int(value * width + step / 2) // step * step) if step else value * width


def _set_stem_stride(net: nn.Module, stride: int) -> None:
    """Set the stride of what the picture goes into: one convolution, or the branches of one."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            module.stride = (stride, stride)
        elif hasattr(module, "reparameterize") and getattr(module, "in_chs", None) == 3:
            setattr(module, "stride", stride)  # noqa: B010 - what FastViT's branches are fused into


def example_side(net: nn.Module) -> int:
    """Return the side in pixels of a square picture that a net takes: its own where it takes one size only."""
    for module in net.modules():
        about = getattr(module, "pretrained_cfg", None)
        if about and about.get("fixed_input_size"):
            return int(about["input_size"][-1])
    # Twice the deepest stride, so that no feature map shrinks to one number before the pooling.
    return 64


@contextlib.contextmanager
def taking_pictures(net: str, height: int, width: int, *, hint: str) -> Iterator[None]:
    """Run a net on pictures of a size, and name it where it does not take them.

    Raises:
        RecipeError: it does not.
    """
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as exc:
        raise RecipeError(
            f"{net} does not take pictures of {height} x {width}: {first_line(exc)}", hint=hint
        ) from exc


def count_parameters(net: nn.Module) -> int:
    """Return how many numbers training changes in a net."""
    return sum(parameter.numel() for parameter in net.parameters())


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def recalibrate(net: nn.Module, batches: Any, *, device: torch.device) -> int:
    """Re-estimate every batch norm's statistics as the average over (N, 3, H, W) batches of normalized images.

    Returns:
        how many batches were used.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    was_training = net.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    net.train()
    used = 0
    try:
        with torch.no_grad():
            for images in batches:
                net(images.to(device))
                used += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        net.train(was_training)
    return used
