"""Train a classifier with labels: what fine-tuning and the from-scratch baseline share."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgecl.config.settings import Config, Decay, Fraction, Rate, Seed
from edgecl.config.views import Views
from edgecl.data.loading import normalize, split_holdout
from edgecl.data.randomness import permutation
from edgecl.data.views import draw_parameters, render_view, standardized
from edgecl.errors import DeviceError, NonFiniteError
from edgecl.evaluate.augment import mixed, rand_augmented
from edgecl.evaluate.labelled import Part, strata_of
from edgecl.metrics.label_sets import image_f1
from edgecl.nets.small_maps import small_maps_sped_up
from edgecl.progress import Progress
from edgecl.storage.records import Preprocessing
from edgecl.train.allocator import keep_freed_memory
from edgecl.train.optim import cosine_schedule

_HELD_OUT = 0.1


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
    rand_augment: int = Field(0, ge=0, le=30)
    """Magnitude of RandAugment's two operations on each picture; 0 does none."""
    mixup: float = Field(0.0, ge=0, le=100)
    """Blend pictures in pairs, by shares of a Beta(alpha, alpha) distribution; 0 does not."""
    cutmix: float = Field(0.0, ge=0, le=100)
    """Paste a part of each picture into another, its area drawn in the same way; 0 does not."""
    class_weights: Literal["none", "balanced"] = "none"
    """Whether the loss of rare classes weighs more: N / (K n_k) each."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Keep a moving average of the weights, with this share of the old at each step; 0 keeps the last weights."""
    early_stop: int | None = Field(None, ge=1, le=10**6)
    """Hold a tenth of the labelled pictures out, keep the weights that are best on it, and stop after so many epochs
    without better ones; None trains to the end on all."""
    test_size: int | None = Field(None, ge=8, le=8192)
    """Height and width of pictures when it is evaluated and deployed, pixels: a net takes larger ones than it was trained
    on, often to its gain. None keeps those of the training."""
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def deployed(self, preprocessing: Preprocessing) -> Preprocessing:
        """Return how pictures are prepared when the net is evaluated and deployed."""
        size = self.test_size or preprocessing.image_size
        resize = round(preprocessing.resize_size * size / preprocessing.image_size)
        return preprocessing.model_copy(update={"image_size": size, "resize_size": resize})

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
) -> int:
    """Train a net in place, on views of the images that differ at every step.

    Args:
        net: (N, 3, H, W) -> (N, K) logits, with timm's classifier.
        part: labelled images, prepared to the net's size.
        what: for the progress bar; without, none is shown.
        views: how the images are varied, in place of the settings' own.

    Returns:
        the steps that were taken: fewer where it stopped early.

    Raises:
        NonFiniteError: the loss is not a number.
    """
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    net.to(device)
    # Several times faster than the default layout for the depthwise convolutions of small nets on a CPU.
    net.to(memory_format=torch.channels_last)
    best = None
    if settings.early_stop:
        part, held_out = hold_out(part, seed=settings.seed)
        held_out = Part(held_out.images.to(device), held_out.labels.to(device))
        best = _Best(held_out, preprocessing, patience=settings.early_stop)
    classes = cast(Any, net).num_classes
    batches = _Batches(part, settings, views or settings.views(), preprocessing, device, classes=classes)
    average = None
    if settings.ema:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
    optimizer = _create_optimizer(net, settings)
    schedule = cosine_schedule(optimizer, warmup_steps=min(max(1, steps // 10), steps - 1), total_steps=steps)
    net.train(settings.backbone_lr_fraction > 0)
    taken = 0
    with small_maps_sped_up(net), Progress(what, total=steps, unit="steps") as progress:
        for step in range(steps):
            images, targets = batches.at(step)
            loss = batches.loss(net(images), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            schedule.step_update(step)
            optimizer.step()
            taken = step + 1
            if average:
                average.update_parameters(net)
            if step % 20 == 0 or taken == steps:
                progress.advance(0, note=f"loss {_finite(loss, step):.3g}")
            progress.advance()
            if best and taken % batches.per_epoch == 0 and best.is_over(average.module if average else net):
                break
    if average:
        net.load_state_dict(average.module.state_dict())
    if best and best.state:
        net.load_state_dict(best.state)
    net.eval().to("cpu").to(memory_format=torch.contiguous_format)
    return taken


class _Batches:
    """The batches of a training: which pictures, varied how, is a function of the seed and the step."""

    def __init__(
        self,
        part: Part,
        settings: FinetuneConfig,
        views: Views,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        classes: int,
    ):
        self._part, self._settings, self._preprocessing, self._device = part, settings, preprocessing, device
        size = part.images.shape[-1]
        self._sizes = torch.full((len(part), 2), size).numpy()
        self._spec = views.specs(size)[0]
        self._batch = min(settings.batch_size, len(part))
        balanced = settings.class_weights == "balanced"
        self._weights = class_weights(part.labels, classes).to(device) if balanced else None
        self.per_epoch = max(1, len(part) // self._batch)
        self._classes = classes
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the () cross-entropy of (N, K) logits; a binary one for each class where pictures are of several."""
        smoothing = self._settings.label_smoothing
        if self._part.labels.ndim == 1:
            return functional.cross_entropy(logits, targets, weight=self._weights, label_smoothing=smoothing)
        targets = targets * (1 - smoothing) + smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=self._weights)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return (N, 3, H, W) standardized images and their labels, or (N, K) shares of classes where images are mixed."""
        settings, spec = self._settings, self._spec
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(settings.seed, epoch, len(self._part))
        index = self._order[place * self._batch : (place + 1) * self._batch]
        sizes, rows = self._sizes[index], torch.from_numpy(index)
        drawn = draw_parameters(index, sizes, spec, name=spec.names[0], seed=settings.seed, epoch=epoch)
        pictures = self._part.images[rows].to(self._device).float().div_(255)
        images = render_view(pictures, sizes, drawn, spec)
        if settings.rand_augment:
            images = rand_augmented(
                images, index, magnitude=settings.rand_augment, seed=settings.seed, epoch=epoch
            )
        images = standardized(images, self._preprocessing.mean, self._preprocessing.std)
        targets = self._part.labels[rows].to(self._device)
        if settings.mixup or settings.cutmix:
            images, targets = mixed(
                images,
                targets,
                classes=self._classes,
                mixup=settings.mixup,
                cutmix=settings.cutmix,
                seed=settings.seed,
                step=step,
            )
        return images.contiguous(memory_format=torch.channels_last), targets


class _Best:
    """The weights that are best on held-out images; over after `patience` epochs without better ones."""

    def __init__(self, held_out: Part, preprocessing: Preprocessing, *, patience: int):
        self._held_out, self._preprocessing, self._patience = held_out, preprocessing, patience
        self._accuracy, self._without = -1.0, 0
        self.state: dict[str, Tensor] = {}

    def is_over(self, net: nn.Module) -> bool:
        """Evaluate a net, keep its weights if they are the best, and return whether the patience is at its end."""
        was_training = net.training
        accuracy = classifier_accuracy(net, self._held_out, self._preprocessing)
        net.train(was_training)
        self._without += 1
        if accuracy > self._accuracy:
            self._accuracy, self._without = accuracy, 0
            self.state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        return self._without >= self._patience


def hold_out(part: Part, *, seed: int) -> tuple[Part, Part]:
    """Split a tenth off, an even share of each class.

    Raises:
        DataError: every class has one image only.
    """
    stay, held_out = split_holdout(strata_of(part.labels), _HELD_OUT, seed=seed)
    return part.take(torch.from_numpy(stay)), part.take(torch.from_numpy(held_out))


def steps_per_epoch(part: Part, settings: FinetuneConfig) -> int:
    """Return how many steps go once through a part, less what is held out of it; no picture is copied for it."""
    images = len(part)
    if settings.early_stop:
        images = len(split_holdout(strata_of(part.labels), _HELD_OUT, seed=settings.seed)[0])
    return max(1, images // min(settings.batch_size, images))


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return (K,) weights under which every class counts the same: N / (K n_k) of (N,) labels, (N - n_k) / n_k of (N, K)."""
    if labels.ndim == 2:
        counts = labels.sum(0).clamp(min=1)
        return (len(labels) - counts).clamp(min=1) / counts
    counts = labels.bincount(minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not value < float("inf"):
        raise NonFiniteError(
            f"the loss is {value:g} at step {step + 1}", hint="lower the rate, e.g. --set lr=3e-4"
        )
    return value


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


def classifier_accuracy(net: nn.Module, part: Part, preprocessing: Preprocessing) -> float:
    """Return the accuracy of a classifier in evaluation mode, percent: top-1, or where images have sets of classes, F1."""
    return float(accuracies(classifier_logits(net, part, preprocessing), part).mean())


@torch.no_grad()
def classifier_logits(net: nn.Module, part: Part, preprocessing: Preprocessing) -> Tensor:
    """Return the (N, K) logits of a classifier in evaluation mode."""
    net.eval()
    return torch.cat(
        [net(normalize(images, preprocessing.mean, preprocessing.std)) for images in part.images.split(256)]
    )


def accuracies(logits: Tensor, part: Part) -> Tensor:
    """Return (N,) how right (N, K) logits are, percent: 0 or 100, or where images have sets of classes, the F1 of each."""
    if part.labels.ndim == 2:
        return 100 * image_f1(logits, part.labels)
    return 100 * (logits.argmax(1) == part.labels).double()


def choose_device(name: str) -> torch.device:
    """Return the device a name stands for; 'auto' takes a GPU when there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available", hint="use the device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
