"""Train a classifier with labels: what fine-tuning and the from-scratch baseline share."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from edgecl.config.settings import Config, Decay, Fraction, Rate, Seed
from edgecl.config.views import Views
from edgecl.data.loading import normalize
from edgecl.data.randomness import permutation
from edgecl.data.views import draw_parameters, render_view, standardized
from edgecl.errors import DeviceError, NonFiniteError
from edgecl.evaluate.labelled import Part
from edgecl.nets.small_maps import small_maps_sped_up
from edgecl.progress import Progress
from edgecl.storage.records import Preprocessing
from edgecl.train.allocator import keep_freed_memory
from edgecl.train.optim import cosine_schedule


class FinetuneConfig(Config):
    """How a classifier is trained; every key can be set with `--set KEY=VALUE`."""

    lr: Rate = 1e-3
    """Peak learning rate of AdamW, after a warm-up over a tenth of the steps; then a cosine to zero."""
    backbone_lr_fraction: Fraction = 1.0
    """Rate of the backbone as a fraction of the classifier's; 0 freezes the backbone and its norms."""
    weight_decay: Decay = 0.02
    batch_size: int = Field(64, ge=2, le=10**9)
    label_smoothing: Fraction = 0.1
    crop_min: float = Field(0.5, gt=0, le=1)
    """Smallest area of a training crop, as a fraction of the picture."""
    flip: Fraction = 0.5
    flip_vertical: Fraction = 0.0
    jitter: Fraction = 0.0
    """Probability of color jitter."""
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def views(self) -> Views:
        """Return the variation of the images: crop, flips and color, neither blur nor solarization."""
        return Views(
            crop_scale=(self.crop_min, 1.0),
            flip=self.flip,
            flip_vertical=self.flip_vertical,
            jitter=self.jitter,
            grayscale=0.0,
            blur=(0.0, 0.0),
            solarize=(0.0, 0.0),
        )


class QuantizedFinetuneConfig(FinetuneConfig):
    """How a quantized classifier is trained on: gently, since it has been trained before."""

    lr: Rate = 5e-4
    """Peak learning rate of AdamW; of a scale it is the relative change per step."""
    crop_min: float = Field(0.7, gt=0, le=1)
    """Smallest area of a training crop, as a fraction of the picture."""
    learn_scales: bool = True
    """Train the scales beside the weights; else they stay as calibrated."""
    keep: tuple[str, ...] | None = None
    """Modules that stay float, with all they hold; by default the first convolution, gates and the classifier."""


def train_classifier(
    net: nn.Module,
    part: Part,
    *,
    steps: int,
    settings: FinetuneConfig,
    preprocessing: Preprocessing,
    what: str | None = None,
    views: Views | None = None,
) -> None:
    """Train a net in place, on views of the images that differ at every step.

    Args:
        net: (N, 3, H, W) -> (N, K) logits, with timm's classifier.
        part: labelled images, prepared to the net's size.
        steps: optimizer steps.
        settings: how.
        preprocessing: of the net.
        what: for the progress bar; without, none is shown.
        views: how the images are varied, in place of the settings' own.

    Raises:
        NonFiniteError: the loss is not a number.
    """
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    net.to(device)
    # Several times faster than the default layout for the depthwise convolutions of small nets on a CPU.
    net.to(memory_format=torch.channels_last)
    optimizer = _create_optimizer(net, settings)
    schedule = cosine_schedule(optimizer, warmup_steps=min(max(1, steps // 10), steps - 1), total_steps=steps)
    batch = min(settings.batch_size, len(part))
    per_epoch = max(1, len(part) // batch)
    size = part.images.shape[-1]
    sizes = torch.full((len(part), 2), size).numpy()
    spec = (views or settings.views()).specs(size)[0]
    net.train()
    if settings.backbone_lr_fraction == 0:
        net.eval()
    order = permutation(settings.seed, 0, len(part))
    with small_maps_sped_up(net), Progress(what, total=steps, unit="steps") as progress:
        for step in range(steps):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = permutation(settings.seed, epoch, len(part))
            index = order[place * batch : (place + 1) * batch]
            drawn = draw_parameters(
                index, sizes[index], spec, name=spec.names[0], seed=settings.seed, epoch=epoch
            )
            pictures = part.images[torch.from_numpy(index)].to(device).float().div_(255)
            images = render_view(pictures, sizes[index], drawn, spec)
            images = standardized(images, preprocessing.mean, preprocessing.std)
            loss = functional.cross_entropy(
                net(images.contiguous(memory_format=torch.channels_last)),
                part.labels[torch.from_numpy(index)].to(device),
                label_smoothing=settings.label_smoothing,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            schedule.step_update(step)
            optimizer.step()
            if step % 20 == 0 or step == steps - 1:
                value = float(loss.detach())
                if not value < float("inf"):
                    raise NonFiniteError(
                        f"the loss is {value:g} at step {step + 1}", hint="lower the rate, e.g. --set lr=3e-4"
                    )
                progress.advance(0, note=f"loss {value:.3g}")
            progress.advance()
    net.eval().to("cpu").to(memory_format=torch.contiguous_format)


def _create_optimizer(net: nn.Module, settings: FinetuneConfig) -> torch.optim.Optimizer:
    head = {id(parameter) for parameter in cast(Any, net).get_classifier().parameters()}
    groups: list[dict[str, Any]] = []
    for in_head, rate in ((True, settings.lr), (False, settings.lr * settings.backbone_lr_fraction)):
        if rate == 0:
            continue
        for decays in (True, False):
            parameters = [
                p for p in net.parameters() if (id(p) in head) == in_head and (p.ndim > 1) == decays
            ]
            groups.append(
                {"params": parameters, "lr": rate, "weight_decay": settings.weight_decay if decays else 0.0}
            )
    return torch.optim.AdamW(groups, fused=True)


def classifier_top1(net: nn.Module, part: Part, preprocessing: Preprocessing) -> float:
    """Return the accuracy of a classifier in evaluation mode, percent."""
    return top1_of(classifier_logits(net, part, preprocessing), part)


@torch.no_grad()
def classifier_logits(net: nn.Module, part: Part, preprocessing: Preprocessing) -> Tensor:
    """Return the (N, K) logits of a classifier in evaluation mode."""
    net.eval()
    return torch.cat(
        [net(normalize(images, preprocessing.mean, preprocessing.std)) for images in part.images.split(256)]
    )


def top1_of(logits: Tensor, part: Part) -> float:
    """Return the accuracy of (N, K) logits, percent."""
    return 100 * int((logits.argmax(1) == part.labels).sum()) / len(part)


def choose_device(name: str) -> torch.device:
    """Return the device a name stands for; 'auto' takes a GPU when there is one.

    Raises:
        DeviceError: no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available", hint="use the device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
