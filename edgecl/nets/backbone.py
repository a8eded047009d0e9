"""A timm network at any width, from pictures to pooled features."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

with warnings.catch_warnings():
    # timm scripts two functions while it is imported, which newer torch calls deprecated: not the user's business.
    warnings.simplefilter("ignore", FutureWarning)
    import timm
    from timm.models import is_model, list_models, model_entrypoint

from edgecl.errors import RecipeError, SliceError, near_matches


def create_backbone(
    arch: str, *, width: float = 1.0, num_classes: int = 0, stem_stride: int | None = None
) -> nn.Module:
    """Build a timm network whose channels are `width` times the architecture's.

    Args:
        arch: a timm architecture.
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
        _first_convolution(net).stride = (stem_stride, stem_stride)
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


def _create_at_width(arch: str, width: float, *, num_classes: int) -> nn.Module:
    entrypoint = model_entrypoint(arch)
    settings: dict[str, Any] = {}
    if arch.startswith(("resnet", "wide_resnet", "resnext")):
        # ResNet entry points take their channels as arguments.
        # The stem is left as it is: a plain one has no width of its own to set.
        settings = {"channels": tuple(_round_to_8(channels * width) for channels in (64, 128, 256, 512))}
        builder: Callable[..., nn.Module] = entrypoint
    else:
        builder = _with_scaled_generators(entrypoint, width)
        if builder is entrypoint:
            raise SliceError(
                f"timm cannot build '{arch}' at width {width:g}: its entry point has no channel multiplier",
                hint="use a MobileNet, an EfficientNet or a ResNet, or set [host] width = 1.0",
            )
    return builder(pretrained=False, num_classes=num_classes, **settings)


def _with_scaled_generators(entrypoint: Callable[..., nn.Module], width: float) -> Callable[..., nn.Module]:
    """Return the entry point with every generator it calls building `width` times the channels.

    timm's MobileNets and EfficientNets spell their multiplier inside the entry point
    (`_gen_mobilenet_v3('mobilenetv3_large_100', 1.0, …)`), where no argument reaches it. The same code is
    therefore run with generators that scale what they are given; timm's own module is left alone.
    """
    function = cast(types.FunctionType, entrypoint)
    generators = {
        name: _scaled(function.__globals__[name], width)
        for name in function.__code__.co_names
        if name.startswith("_gen_")
        and "channel_multiplier" in inspect.signature(function.__globals__[name]).parameters
    }
    if not generators:
        return entrypoint
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **generators},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _scaled(generator: Callable[..., nn.Module], width: float) -> Callable[..., nn.Module]:
    def build(variant: str, *positional: Any, **named: Any) -> nn.Module:
        if positional:
            return generator(variant, positional[0] * width, *positional[1:], **named)
        named["channel_multiplier"] = named.get("channel_multiplier", 1.0) * width
        return generator(variant, **named)

    return build


def _round_to_8(channels: float) -> int:
    return max(8, int(channels + 4) // 8 * 8)


def _first_convolution(net: nn.Module) -> nn.Conv2d:
    return next(module for module in net.modules() if isinstance(module, nn.Conv2d))


def count_parameters(net: nn.Module) -> int:
    """Return how many numbers training changes in a net."""
    return sum(parameter.numel() for parameter in net.parameters())


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm, the only kind of layer a slim net does not share."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def recalibrate(net: nn.Module, batches: Any, *, device: torch.device) -> int:
    """Re-estimate every batch norm's statistics as the average over batches of normalized images.

    Args:
        net: a backbone; its running statistics change, nothing else does.
        batches: iterable of (N, 3, H, W) float tensors.
        device: where to run.

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
