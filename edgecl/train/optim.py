"""The optimizer and its schedule, from timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from edgecl.config.recipe import Optim


def create_optimizer(net: nn.Module, settings: Optim, *, batch_size: int) -> torch.optim.Optimizer:
    """Build the optimizer; biases and norms get neither weight decay nor, under LARS, a trust ratio.

    Args:
        batch_size: images per step over all processes, for the linear scaling of the rate.
    """
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    chosen: dict[str, dict[str, Any]] = {
        # One kernel for all tensors: small nets have hundreds of tiny ones.
        "adamw": {"opt": "adamw", "fused": True},
        # timm's "sgd" is Nesterov's.
        "sgd": {"opt": "momentum", "momentum": settings.momentum},
        "lars": {
            "opt": "lars",
            "momentum": settings.momentum,
            "trust_coeff": settings.trust_coefficient,
            "trust_clip": settings.trust_clip,
        },
    }
    if settings.name == "lars":
        # Left to itself, timm's LARS drops the trust ratio, too, of a group without weight decay.
        groups[0]["always_adapt"] = True
    return create_optimizer_v2(groups, lr=peak_rate(settings, batch_size=batch_size), **chosen[settings.name])


def peak_rate(settings: Optim, *, batch_size: int) -> float:
    """Return the learning rate at the end of the warm-up."""
    return settings.lr * (batch_size / settings.lr_batch if settings.lr_batch else 1.0)


def create_schedule(
    optimizer: torch.optim.Optimizer,
    settings: Optim,
    *,
    batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
) -> CosineLRScheduler:
    """Build a schedule: a linear warm-up to the peak, then a cosine; a pure function of the step."""
    warmup_steps = min(round(settings.warmup_epochs * steps_per_epoch), total_steps - 1)
    lowest = peak_rate(settings, batch_size=batch_size) * settings.final_lr_fraction
    return cosine_schedule(optimizer, warmup_steps=warmup_steps, total_steps=total_steps, lowest=lowest)


def cosine_schedule(
    optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int, lowest: float = 0.0
) -> CosineLRScheduler:
    """Build a schedule of an optimizer that has the peak rates: a linear warm-up to them, then a cosine."""
    return CosineLRScheduler(
        optimizer,
        # timm's cosine needs two steps or more; the first of two equals a single one.
        t_initial=max(2, total_steps - warmup_steps),
        lr_min=lowest,
        warmup_t=warmup_steps,
        # Above zero, so that the first step changes the net.
        warmup_lr_init=min(group["lr"] for group in optimizer.param_groups) / (warmup_steps + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
