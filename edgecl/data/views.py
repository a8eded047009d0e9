"""A batch of pictures -> a batch of each view that specifications ask for, every sample varied differently.

They are made in batches, on the pictures' device. The operators and their order are torchvision's (random resized crop,
flip, color jitter, grayscale, blur, solarize), and so are the distributions of their parameters; the tests hold both to
torchvision.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgecl.config.views import ViewSpec
from edgecl.data.loading import Batch
from edgecl.data.randomness import uniforms
from edgecl.storage.writing import write_bytes

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

# Blur is stated for this side (BYOL's) and scales with the view.
_BLUR_VIEW_SIZE = 224
# Below this sigma the nearest neighbor weighs under 4e-6: no blur.
_SIGMA_WITHOUT_EFFECT = 0.2
# Beyond so many sigmas a neighbor weighs under 2e-8, less than float32 tells apart.
_SIGMAS_TO_NOTHING = 6.0
_BLUR_PIECE = 32
# On one core, views of this side or more are made one after another.
_ALONE_FROM = 112
_CROP_ATTEMPTS = 10
_SOLARIZE_THRESHOLD = 0.5
_GRAYSCALE = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it
_ORDERS = np.array(list(itertools.permutations(range(4))))
_TILE = 96
_GAP = 4


class Parameters(NamedTuple):
    """What happens to each sample of one view."""

    boxes: Floats
    """(N, 4) crops: top, left, height, width, in whole pixels of the true picture."""
    flip: NDArray[np.bool_]
    flip_vertical: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]
    """(N, 4) operators in the order they are applied: 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    factors: Floats
    """(N, 4) of brightness, contrast and saturation; of hue the shift, in turns."""
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: Floats
    """(N,) pixels of this view."""
    solarize: NDArray[np.bool_]


def make_views(
    batch: Batch,
    specs: Sequence[ViewSpec],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    epoch: int,
) -> list[Tensor]:
    """Make the views that specifications ask for, of every picture.

    Args:
        batch: pictures, on the device where the views are wanted.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        epoch: 0-based.

    Returns:
        (N, 3, size, size) for each name of each specification, in their order; normalized, on the batch's device;
        float32 even under autocast.
    """
    sizes = batch.sizes.cpu().numpy()
    wanted = [(spec, name) for spec in specs for name in spec.names]
    drawn = [
        draw_parameters(batch.indices, sizes, spec, name=name, seed=seed, epoch=epoch)
        for spec, name in wanted
    ]
    device = batch.images.device
    count, largest = len(sizes), max(spec.size for spec in specs)
    # All at once on a GPU, and where threads share the work. On one core a large picture alone stays in its cache:
    # half the time.
    alone = device.type == "cpu" and largest >= _ALONE_FROM and torch.get_num_threads() == 1
    pieces: list[list[Tensor]] = [[] for _ in wanted]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for rows in [slice(row, row + 1) for row in range(count)] if alone else [slice(count)]:
            pictures = batch.images[rows].float().div_(255)
            for (spec, _), parameters, made in zip(wanted, drawn, pieces, strict=True):
                part = Parameters._make(column[rows] for column in parameters)
                made.append(standardized(render_view(pictures, sizes[rows], part, spec), mean, std))
    return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in pieces]


def draw_parameters(
    indices: Rows,
    sizes: NDArray[np.integer[Any]],
    spec: ViewSpec,
    *,
    name: str,
    seed: int,
    epoch: int,
) -> Parameters:
    """Draw what happens to each sample: a function of (seed, epoch, index, name) and the specification alone.

    Args:
        indices: (N,) pictures.
        sizes: (N, 2) true height and width, pixels.
        epoch: 0-based.
    """

    def draw(what: str, count: int) -> Floats:
        return uniforms(seed, epoch, indices, stream=f"view-{name} {what}", count=count)

    chance = draw("chances", 6)
    strengths = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    low = np.array([*(1 - strengths[:3]).clip(0), -strengths[3]])
    high = np.array([*(1 + strengths[:3]), strengths[3]])
    sigma_low, sigma_high = (sigma * spec.size / _BLUR_VIEW_SIZE for sigma in spec.blur_sigma)
    return Parameters(
        boxes=_crop_boxes(draw("crop", 2 * _CROP_ATTEMPTS + 2), sizes, spec.scale, spec.ratio),
        flip=chance[:, 0] < spec.flip,
        flip_vertical=chance[:, 1] < spec.flip_vertical,
        jitter=chance[:, 2] < spec.jitter,
        order=_ORDERS[(draw("order", 1)[:, 0] * len(_ORDERS)).astype(np.int64)],
        factors=low + (high - low) * draw("factors", 4),
        grayscale=chance[:, 3] < spec.grayscale,
        blur=chance[:, 4] < spec.blur,
        sigma=sigma_low + (sigma_high - sigma_low) * draw("sigma", 1)[:, 0],
        solarize=chance[:, 5] < spec.solarize,
    )


def render_view(
    pictures: Tensor,
    sizes: NDArray[np.integer[Any]],
    parameters: Parameters,
    spec: ViewSpec,
) -> Tensor:
    """Apply drawn parameters.

    Args:
        pictures: (N, 3, S, S) float32 in 0..1: whole pictures, squeezed to squares.
        sizes: (N, 2) true height and width, pixels.
        spec: the one that the parameters were drawn with.

    Returns:
        (N, 3, size, size) float32 in 0..1, a new tensor.
    """
    view = _crop(pictures, sizes, parameters, spec.size)
    _jitter(view, parameters, spec)
    _change(view, np.flatnonzero(parameters.grayscale), lambda part: _grayscale(part).expand_as(part))
    blurred = np.flatnonzero(parameters.blur & (parameters.sigma > _SIGMA_WITHOUT_EFFECT))
    sigma = _sent(parameters.sigma[blurred], view)
    _change(view, blurred, lambda part: _blur(part, sigma))
    _change(
        view,
        np.flatnonzero(parameters.solarize),
        lambda part: torch.where(part >= _SOLARIZE_THRESHOLD, 1 - part, part),
    )
    return view


def write_views_grid(
    path: Path | str,
    batch: Batch,
    views: Sequence[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    count: int = 8,
) -> None:
    """Write a PNG: pictures in their true proportions above, below them a row for each view.

    Args:
        views: (N, 3, H, W) float32 each, normalized with mean and std; all are drawn at the side of the first.
        count: of pictures shown, the first of the batch.

    Raises:
        ArtifactError: the disk is full.
    """
    count = min(count, len(batch.indices))
    side = views[0].shape[-1]
    tile = side * max(1, math.ceil(_TILE / side))
    step = tile + _GAP
    page = Image.new("RGB", (count * step - _GAP, (1 + len(views)) * step - _GAP), "white")
    for column in range(count):
        height, width = (int(pixels) for pixels in batch.sizes[column])
        shape = (max(1, tile * width // max(height, width)), max(1, tile * height // max(height, width)))
        whole = _image(batch.images[column]).resize(shape, Image.Resampling.BILINEAR)
        page.paste(whole, (column * step + (tile - shape[0]) // 2, (tile - shape[1]) // 2))
        for row, view in enumerate(views, start=1):
            part = _image(_denormalized(view[column], mean, std))
            page.paste(part.resize((tile, tile), Image.Resampling.NEAREST), (column * step, row * step))
    png = io.BytesIO()
    page.save(png, format="PNG")
    write_bytes(Path(path), png.getvalue())


def _crop_boxes(
    draws: Floats,
    sizes: NDArray[np.integer[Any]],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Floats:
    """Draw crops as torchvision's RandomResizedCrop.get_params does, ten attempts and all."""
    heights, widths = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    areas = heights * widths * (scale[0] + (scale[1] - scale[0]) * draws[:, :_CROP_ATTEMPTS])
    logs = np.log(ratio)
    ratios = np.exp(logs[0] + (logs[1] - logs[0]) * draws[:, _CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS])
    tried_w, tried_h = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (tried_w > 0) & (tried_w <= widths) & (tried_h > 0) & (tried_h <= heights)
    rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
    picture_h, picture_w = heights[:, 0], widths[:, 0]
    h, w = tried_h[rows, first], tried_w[rows, first]
    top = np.floor(draws[:, -2] * (picture_h - h + 1))
    left = np.floor(draws[:, -1] * (picture_w - w + 1))

    none_fits = ~fits.any(axis=1)
    if none_fits.any():
        # The largest central crop of an allowed ratio.
        central_w = np.minimum(picture_w, np.rint(picture_h * ratio[1]))
        central_h = np.minimum(picture_h, np.rint(picture_w / ratio[0]))
        h, w = np.where(none_fits, central_h, h), np.where(none_fits, central_w, w)
        top = np.where(none_fits, (picture_h - h) // 2, top)
        left = np.where(none_fits, (picture_w - w) // 2, left)
    return np.stack([top, left, h, w], axis=1)


def _crop(pictures: Tensor, sizes: NDArray[np.integer[Any]], parameters: Parameters, side: int) -> Tensor:
    # Crops become fractions of the picture, and so hold for the decoded square whatever its side.
    start = parameters.boxes[:, :2] / sizes
    extent = parameters.boxes[:, 2:] / sizes
    flips = np.stack([parameters.flip_vertical, parameters.flip], axis=1)
    start, extent = np.where(flips, start + extent, start), np.where(flips, -extent, extent)
    # The grid runs over -1..1 from edge to edge. (affine_grid would take three times as long.)
    centers = (np.arange(side) + 0.5) / side
    places = 2 * (start[:, :, None] + extent[:, :, None] * centers) - 1
    y, x = _sent(places, pictures).unbind(1)
    shape = (len(sizes), side, side)
    grid = torch.stack((x[:, None, :].expand(shape), y[:, :, None].expand(shape)), dim=-1)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jitter(view: Tensor, parameters: Parameters, spec: ViewSpec) -> None:
    operators = (_brightness, _contrast, _saturation, _hue)
    strengths = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    chosen = np.flatnonzero(parameters.jitter)
    if len(chosen) == 0:
        return
    for turn in range(4):
        for number, (operator, strength) in enumerate(zip(operators, strengths, strict=True)):
            rows = chosen[parameters.order[chosen, turn] == number]
            if strength > 0 and len(rows) > 0:
                factor = _sent(parameters.factors[rows, number], view).view(-1, 1, 1, 1)
                _change(view, rows, partial(operator, factor=factor))


def _change(view: Tensor, rows: Rows, operator: Callable[[Tensor], Tensor]) -> None:
    """Replace some samples of a view, in place, by what an operator makes of them."""
    if len(rows) == 0:
        return
    if len(view) == 1:
        changed = operator(view)
        if changed is not view:
            view.copy_(changed)
        return
    where = torch.from_numpy(rows).to(view.device, non_blocking=True)
    view.index_copy_(0, where, operator(view.index_select(0, where)))


def _brightness(part: Tensor, factor: Tensor) -> Tensor:
    return part.mul_(factor).clamp_(0, 1)


def _contrast(part: Tensor, factor: Tensor) -> Tensor:
    mean = _grayscale(part).mean(dim=(1, 2, 3), keepdim=True)
    return part.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(part: Tensor, factor: Tensor) -> Tensor:
    grayscale = _grayscale(part).mul_(1 - factor)
    return part.mul_(factor).add_(grayscale).clamp_(0, 1)


def _hue(part: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by a fraction of a circle: to hue, chroma and minimum, and back channel by channel."""
    red, green, blue = part.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    # Which channel is the largest, of equal ones the first, as 0 and 1: arithmetic is faster than `where` on a CPU.
    is_green = torch.eq(value, green, out=torch.empty_like(value))
    is_red = value.eq_(red)
    rest = 1 - is_red
    is_green.mul_(rest)
    is_blue = rest.sub_(is_green)
    sixths = (green - blue).mul_(is_red).addcmul_(blue - red, is_green).addcmul_(red - green, is_blue)
    sixths.mul_(chroma.clamp(min=1e-12).reciprocal_()).add_(is_green, alpha=2).add_(is_blue, alpha=4)
    sixths.add_(6 * factor.view(-1, 1, 1))
    sixths.sub_((sixths / 6).floor_(), alpha=6)
    # Red is full within 60 degrees of 0, green of 120, blue of 240; each fades over the next 60.
    part[:, 0] = sixths.sub(3).abs_().sub_(1)
    part[:, 1] = sixths.sub(2).abs_().neg_().add_(2)
    part[:, 2] = sixths.sub(4).abs_().neg_().add_(2)
    return part.clamp_(0, 1).mul_(chroma.unsqueeze(1)).add_(low.unsqueeze(1))


def _grayscale(part: Tensor) -> Tensor:
    red, green, blue = (part[:, channel : channel + 1] for channel in range(3))
    return (red * _GRAYSCALE[0]).add_(green, alpha=_GRAYSCALE[1]).add_(blue, alpha=_GRAYSCALE[2])


def _blur(part: Tensor, sigma: Tensor) -> Tensor:
    """Blur each sample with its own sigma, mirrored at the border."""
    if len(part) == 1 and part.device.type == "cpu" and part.shape[-1] >= _ALONE_FROM:
        reach = math.ceil(_SIGMAS_TO_NOTHING * float(sigma))
        if 2 * reach < part.shape[-1]:
            return _blur_alone(part, float(sigma), reach)
    return _blur_together(part, sigma)


def _blur_alone(part: Tensor, sigma: float, reach: int) -> Tensor:
    """Blur one picture, columns and then rows, in overlapping pieces: each is mixed by the same banded matrix."""
    side, piece = part.shape[-1], _BLUR_PIECE
    weights = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    weights /= weights.sum()
    # Row i holds the weights from column i on: it makes pixel i of a piece from the piece and its surroundings.
    band = F.pad(weights, (0, piece)).repeat(piece)[: piece * (piece + 2 * reach)]
    band = band.view(piece, piece + 2 * reach)
    starts = torch.arange(0, side, piece).unsqueeze(1)
    wanted = (starts + torch.arange(-reach, piece + reach)).abs()
    wanted = torch.where(wanted >= side, 2 * (side - 1) - wanted, wanted).clamp_(min=0).flatten()
    lines = part[0]
    for _ in range(2):
        pieces = lines.index_select(1, wanted).view(-1, piece + 2 * reach, side)
        mixed = torch.bmm(band.expand(len(pieces), -1, -1), pieces)
        lines = mixed.view(3, -1, side)[:, :side].mT.contiguous()
    return lines.unsqueeze(0)


def _blur_together(part: Tensor, sigma: Tensor) -> Tensor:
    """Blur many samples.

    One matrix per sample mixes its rows, then its columns. For small views this is quicker than a depthwise
    convolution, which oneDNN also plans anew for every number of samples.
    """
    side = part.shape[-1]
    here, there = torch.meshgrid(*[torch.arange(side, device=part.device)] * 2, indexing="ij")
    # A pixel is met directly and in the mirrors at 0 and side - 1; pixels on a mirror have no image in it.
    direct = (here - there).abs()
    nowhere = torch.full_like(direct, 2 * side)
    low = torch.where(there == 0, nowhere, here + there)
    high = torch.where(there == side - 1, nowhere, 2 * (side - 1) - here - there)
    distances = torch.arange(2 * side + 1, device=part.device) / sigma.unsqueeze(1)
    weights = torch.exp(-(distances**2) / 2)
    # Far tails are subnormal numbers, which a processor multiplies many times slower.
    weights = torch.where((weights < 1e-9) | (distances == distances[:, -1:]), 0.0, weights)
    mix = weights.index_select(1, torch.stack([direct, low, high]).flatten())
    mix = mix.view(-1, 3, side, side).sum(1, keepdim=True)
    mix = mix / mix.sum(-1, keepdim=True)
    return mix @ part @ mix.mT


def standardized(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean of each channel and divide by its standard deviation, in place."""
    return view.sub_(_per_channel(mean, view)).div_(_per_channel(std, view))


def _denormalized(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    scaled = view.float() * _per_channel(std, view) + _per_channel(mean, view)
    return scaled.mul(255).round().clamp(0, 255).to(torch.uint8)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return _sent(np.array(values), like).view(3, 1, 1)


def _sent(numbers: Floats, like: Tensor) -> Tensor:
    # Nothing here waits for a GPU: what it is to compute with is copied while it still computes the last batch.
    return torch.from_numpy(numbers.astype(np.float32)).to(like.device, non_blocking=True)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
