"""Fake quantization: a float net that computes what its int8 form will compute, and can be trained so.

int8 from -128 to 127, zero point 0: one scale per tensor for what goes into a convolution and for the skip input of a
residual sum, one per output channel for weights. Biases and everything else stay float. A net exported with its fake
quantizers in place holds exactly one QuantizeLinear/DequantizeLinear pair for each of them, as TensorRT reads it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgecl.errors import NonFiniteError, RecipeError, near_matches
from edgecl.nets.folding import Walk, fold_batch_norm, walk

LOWEST, HIGHEST = -128, 127

_BATCH = 32
_BINS = 2048
# Clipping thresholds tried, as fractions of the largest value seen.
_CLIPS = 100
_SMALLEST_CLIP = 0.1


class FakeQuant(nn.Module):
    """Round a tensor to int8 and back.

    Args:
        channels: how many scales, one for each index of the first dimension; None gives one for the whole tensor.

    Attributes:
        scale: () or (channels,), the width of one int8 step; > 0.
        log_scale: the parameter that stands for `scale` while it is being learnt, else None. Its logarithm, so that
            a learning rate means the same relative change for every scale.
    """

    scale: Tensor
    zero_point: Tensor
    log_scale: nn.Parameter | None

    def __init__(self, channels: int | None = None):
        super().__init__()
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32), persistent=False)
        self.register_parameter("log_scale", None)

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` on the int8 grid, as float."""
        if self.log_scale is None:
            return _rounded(values, self.scale, self.zero_point)
        return cast(Tensor, _LearntRounding.apply(values, self.log_scale.exp(), self.zero_point))


def _rounded(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        # torch's own operators have no rule for the shape of their output, so they export with a fixed batch only.
        axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
        zero = zero_point.to(torch.int8)
        steps = torch.onnx.ops.symbolic(
            "QuantizeLinear", (values, scale, zero), axis, dtype=torch.int8, shape=values.shape, version=13
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (steps, scale, zero),
            axis,
            dtype=torch.float32,
            shape=values.shape,
            version=13,
        )
    if scale.ndim:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, LOWEST, HIGHEST)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, LOWEST, HIGHEST)


class _LearntRounding(torch.autograd.Function):
    """Rounding with a gradient for the values (straight through, zero where clipped) and for the scale.

    Source: Esser et al. 2020, arXiv:1902.08153, equations 3 and 5; their factor on the scale's gradient is left out,
    since Adam divides every factor out again.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        rounded = _rounded(values, scale, zero_point)
        ctx.save_for_backward(values, scale, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, scale, rounded = ctx.saved_tensors
        step = scale.view(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale
        inside = (values > LOWEST * step) & (values < HIGHEST * step)
        through = gradient * inside
        # Equation 3 times the scale: rounded - values inside, the clipping bound outside.
        per_value = gradient * torch.where(inside, rounded - values, rounded)
        dims = list(range(1, values.ndim)) if scale.ndim else list(range(values.ndim))
        return through, per_value.sum(dims) / scale, None


class QuantConv2d(nn.Conv2d):
    """A convolution whose weights are fake-quantized, and whose input may be; made by `_quantize_layer`."""

    input_quantizer: nn.Module
    weight_quantizer: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        """Convolve."""
        weight = self.weight_quantizer(self.weight)
        output: Tensor = self._conv_forward(self.input_quantizer(images), weight, self.bias)
        return output


class QuantLinear(nn.Linear):
    """A linear layer whose weights are fake-quantized, and whose input may be; made by `_quantize_layer`."""

    input_quantizer: nn.Module
    weight_quantizer: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        """Multiply."""
        weight = self.weight_quantizer(self.weight)
        return nn.functional.linear(self.input_quantizer(features), weight, self.bias)


def quantize_net(
    net: nn.Module, images: Tensor, *, keep: Sequence[str] | None = None
) -> tuple[nn.Module, list[str]]:
    """Fold a net's batch norms, insert fake quantizers and calibrate them.

    Args:
        net: (N, 3, H, W) -> (N, F) or (N, K); left as it is.
        images: (N, 3, H, W) float32, normalized as the net expects.
        keep: names of modules that stay float with all they hold; None keeps what `kept_by_default` names.

    Returns:
        the quantized copy in evaluation mode, and the names that were kept: enough, with the state dict, to build it
        again by `insert_fake_quant`.

    Raises:
        RecipeError: a net that cannot be folded, an unknown name to keep, or nothing left to quantize.
        NonFiniteError: a value inside the net is not a number.
    """
    folded = fold_batch_norm(net)
    kept = kept_by_default(folded) if keep is None else sorted(set(keep))
    for name in kept:
        if name not in dict(folded.named_modules()):
            raise RecipeError(
                f"the net has no module '{name}' to keep in float",
                hint=near_matches(name, [each for each, _ in folded.named_modules() if each]),
            )
    quantized = insert_fake_quant(folded, keep=kept)
    _calibrate_weights(quantized)
    _calibrate_activations(quantized, images)
    return quantized, kept


def kept_by_default(net: nn.Module) -> list[str]:
    """Name what costs accuracy in int8 and gives next to no speed.

    The first convolution, the gates of squeeze-and-excitation, the classifier.
    """
    order = [name for name, module, _ in walk(net).calls if isinstance(module, nn.Conv2d)]
    gates = [
        name for name, module in net.named_modules() if isinstance(getattr(module, "gate", None), nn.Module)
    ]
    linears = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return sorted({*order[:1], *gates, *linears})


def insert_fake_quant(net: nn.Module, *, keep: Sequence[str]) -> nn.Module:
    """Insert fake quantizers with scales of 1.

    A tensor that several convolutions read, or a convolution and a residual sum, gets one quantizer, at the input of
    the block that holds them all; a convolution to keep that reads it too is given the quantized tensor.

    Args:
        net: without batch norms; left as it is.
        keep: names of modules that stay float with all they hold; names that the net lacks say nothing.

    Returns:
        a copy in evaluation mode; all modules keep their names.

    Raises:
        RecipeError: a kind of convolution this does not know, or nothing left to quantize.
    """
    quantized = copy.deepcopy(net).eval()
    seen = walk(quantized)
    layers: dict[str, nn.Module] = {}
    readers: dict[int, list[str]] = {}
    for name, module, given in seen.calls:
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not _within(name, keep):
            layers[name] = module
            readers.setdefault(id(given), []).append(name)
    if not layers:
        raise RecipeError("nothing is left to quantize", hint="keep fewer modules in float")
    skips = _skips(seen, layers)
    blocks = _blocks_to_quantize_at(seen, readers, skips)
    for tensor, names in readers.items():
        for name in names:
            quantized_already = tensor in blocks and _within(name, [blocks[tensor]])
            own = nn.Identity() if quantized_already else FakeQuant()
            _quantize_layer(name, layers[name], own)
    for name in blocks.values():
        block = quantized.get_submodule(name)
        # A net made by `without_fake_quant` has the hook already.
        if not hasattr(block, "input_quantizer"):
            block.register_forward_pre_hook(_quantize_input)
        block.add_module("input_quantizer", FakeQuant())
    for _, maker in skips.values():
        if maker is not None:
            quantized.get_submodule(maker).add_module("skip_quantizer", FakeQuant())
    return quantized.eval()


def _within(name: str, holders: Sequence[str]) -> bool:
    return any(not holder or name == holder or name.startswith(f"{holder}.") for holder in holders)


def _skips(seen: Walk, layers: dict[str, nn.Module]) -> dict[int, tuple[str, str | None]]:
    """Find the skip input of every residual sum in a block that holds quantized layers.

    Returns:
        id of the tensor -> (name of the block, name of the nn.Sequential in it that made the tensor, or None where
        it is the block's own input). A sum of another form is left in float.
    """
    entered = {name: given for name, _, given in seen.calls}
    sequences = {
        id(seen.outputs[name]): name
        for name, module, _ in seen.calls
        if isinstance(module, nn.Sequential) and name in seen.outputs
    }
    found: dict[int, tuple[str, str | None]] = {}
    for block, left, right in seen.sums:
        if not any(_within(name, [block]) for name in layers):
            continue
        own = entered.get(block)
        # timm writes `main + shortcut`, so a shortcut that is made within the block is the right one.
        maker = sequences.get(id(right))
        if left is own or right is own:
            found[id(own)] = (block, None)
        elif maker is not None and _within(maker, [block]):
            found[id(right)] = (block, maker)
    return found


def _blocks_to_quantize_at(
    seen: Walk, readers: dict[int, list[str]], skips: dict[int, tuple[str, str | None]]
) -> dict[int, str]:
    """Return the block at whose input a tensor is quantized, for each tensor that is a skip or has several readers."""
    found = {tensor: block for tensor, (block, maker) in skips.items() if maker is None}
    for name, module, given in seen.calls:
        names = readers.get(id(given), [])
        # A child added to an nn.Sequential would run as its last step.
        if isinstance(module, nn.Sequential) or len(names) < 2 or next(module.children(), None) is None:
            continue
        if all(_within(reader, [name]) for reader in names):
            # Blocks are entered from the outside in: the last one is the smallest.
            found[id(given)] = name
    return found


def _quantize_input(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(Any, block).input_quantizer(inputs[0]), *inputs[1:])


def _quantize_layer(name: str, layer: nn.Module, input_quantizer: nn.Module) -> None:
    """Give a layer the class that quantizes, and its quantizers."""
    if isinstance(layer, nn.Linear):
        layer.__class__ = QuantLinear
    elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        layer.__class__ = QuantConv2d
    else:
        raise RecipeError(
            f"cannot quantize '{name}': it is a {type(layer).__name__}, not a plain convolution",
            hint=f"keep it in float with --set 'keep=[\"{name}\"]', or choose another net",
        )
    layer.add_module("input_quantizer", input_quantizer)
    layer.add_module("weight_quantizer", FakeQuant(len(layer.weight)))


def _calibrate_weights(net: nn.Module) -> None:
    """Calibrate weights per output channel, symmetric, by their maximum."""
    for module in net.modules():
        if isinstance(module, (QuantConv2d, QuantLinear)):
            largest = module.weight.detach().flatten(1).abs().amax(1)
            cast(FakeQuant, module.weight_quantizer).scale = torch.where(largest > 0, largest / HIGHEST, 1.0)


def _calibrate_activations(net: nn.Module, images: Tensor) -> None:
    """Calibrate every activation: the scale of least squared rounding error over the images, the net itself in float.

    Raises:
        NonFiniteError: a value inside the net is not a number.
    """
    peaks: dict[FakeQuant, Tensor] = {}
    counts: dict[FakeQuant, Tensor] = {}

    def watch_peak(quantizer: FakeQuant, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        peak = inputs[0].abs().max()
        peaks[quantizer] = torch.maximum(peaks.get(quantizer, peak), peak)
        return inputs[0]

    def count(quantizer: FakeQuant, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found = torch.histc(inputs[0].abs(), _BINS, 0, float(peaks[quantizer].clamp(min=1e-30)))
        counts[quantizer] = counts.get(quantizer, torch.zeros_like(found)) + found
        return inputs[0]

    _run_watched(net, images, watch_peak)
    names = {module: name for name, module in net.named_modules()}
    for quantizer, peak in peaks.items():
        if not torch.isfinite(peak):
            raise NonFiniteError(
                f"'{names[quantizer]}' was given {float(peak):g} while calibrating",
                hint="the net's own outputs are not finite: train it again with a lower rate",
            )
    _run_watched(net, images, count)
    for quantizer, peak in peaks.items():
        if peak > 0:
            quantizer.scale = scale_of_least_error(counts[quantizer], peak)


@torch.no_grad()
def _run_watched(net: nn.Module, images: Tensor, watch: Any) -> None:
    """Run all images, each activation's quantizer replaced by what `watch` returns."""

    def keep_float(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return inputs[0]

    handles = [
        # The weights stay float too: their rounding is no reason for another range.
        module.register_forward_hook(keep_float if name.endswith("weight_quantizer") else watch)
        for name, module in net.named_modules()
        if isinstance(module, FakeQuant)
    ]
    try:
        for batch in images.split(_BATCH):
            net(batch)
    finally:
        for handle in handles:
            handle.remove()


def scale_of_least_error(counts: Tensor, peak: Tensor) -> Tensor:
    """Return the int8 step of least squared error for values of a known distribution.

    Args:
        counts: (B,) how many values lie in each of B equal bins of magnitude from 0 to `peak`.
        peak: () largest magnitude, > 0.
    """
    centers = (torch.arange(len(counts)) + 0.5) * peak / len(counts)
    scales = torch.linspace(_SMALLEST_CLIP, 1, _CLIPS) * peak / HIGHEST
    rounded = (centers / scales[:, None]).round().clamp(max=HIGHEST) * scales[:, None]
    errors = ((rounded - centers).square().double() * counts.double()).sum(1)
    return scales[errors.argmin()]


@contextlib.contextmanager
def learning_scales(net: nn.Module) -> Iterator[None]:
    """Make every scale of a net a parameter, and settle on the values learnt at the end."""
    quantizers = [module for module in net.modules() if isinstance(module, FakeQuant)]
    for quantizer in quantizers:
        quantizer.log_scale = nn.Parameter(quantizer.scale.log())
    try:
        yield
    finally:
        for quantizer in quantizers:
            assert quantizer.log_scale is not None
            quantizer.scale = quantizer.log_scale.detach().exp()
            quantizer.log_scale = None


def without_fake_quant(net: nn.Module) -> nn.Module:
    """Return a float copy of a quantized net: its weights as training left them, nothing rounded.

    Its state dict names what the folded net's names.
    """
    plain = copy.deepcopy(net)
    layers: list[Any] = [each for each in plain.modules() if isinstance(each, (QuantConv2d, QuantLinear))]
    for layer in layers:
        del layer.input_quantizer, layer.weight_quantizer
        layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    for name, module in list(plain.named_modules()):
        if isinstance(module, FakeQuant):
            plain.set_submodule(name, nn.Identity())
    return plain
