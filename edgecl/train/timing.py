"""A few steps of a recipe on this machine, timed: what `edgecl init` rests its hours on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from edgecl.config.recipe import Recipe
from edgecl.data.loading import Batch, TrainingImages
from edgecl.data.source import ImageSource
from edgecl.data.views import make_views
from edgecl.nets.build import create_slimmable
from edgecl.onboard.device_info import read_device_info
from edgecl.progress import Progress
from edgecl.storage.records import Machine, Timing
from edgecl.train.allocator import keep_freed_memory
from edgecl.train.pretrain import create_accelerator
from edgecl.train.step import create_step

# The first steps choose kernels and fill the memory.
_WARM_UP = 2
_LONGEST_S = 20.0
_MOST_STEPS = 30
_BATCHES = 6


def look_at_machine() -> Machine:
    """Look at the processor or GPU that `pretrain` would take, and at the memory that is free."""
    about = read_device_info(threads=None, versions={})
    memory = psutil.virtual_memory().available
    gpu = torch.cuda.is_available()
    if gpu:
        memory = min(memory, torch.cuda.mem_get_info()[0])
    return Machine(
        device="cuda" if gpu else "cpu",
        name=torch.cuda.get_device_name() if gpu else about["cpu_model"] or "a processor without a name",
        cores=about["cores"],
        memory_mib=memory >> 20,
        bf16=gpu and torch.cuda.is_bf16_supported(including_emulation=False),
    )


def time_steps(recipe: Recipe, source: ImageSource) -> Timing:
    """Train for a few steps on a few of the pictures, from files to weights, and keep nothing of it.

    Pictures that the run would hold in memory are read before the clock starts, as there.

    Raises:
        DataError: fewer pictures that can be read than a batch.
        EdgeclError: of another class, as `pretrain` lists them for a recipe that cannot be trained.
        torch.OutOfMemoryError: a step does not fit into the GPU's memory.
    """
    data = recipe.data
    accelerator = create_accelerator(recipe, device="auto", out=Path())
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(recipe.run.seed)
    side = data.decode_size or data.image_size
    fits = 3 * side**2 * len(source) <= data.cache_mib * 2**20
    few = np.linspace(0, len(source) - 1, min(len(source), _BATCHES * data.batch_size)).astype(np.int64)
    images = TrainingImages(
        source.take(few),
        decode_size=side,
        cache_mib=data.cache_mib if fits else 0,
        max_bad_fraction=1.0,
        workers=data.workers,
    ).to(accelerator.device)
    per_epoch = images.steps_per_epoch(data.batch_size)
    step = create_step(recipe, create_slimmable(recipe), accelerator=accelerator, steps_per_epoch=per_epoch)
    began, number = time.monotonic(), 0
    with Progress("a few steps", total=None, unit="steps") as progress:
        for epoch, batch in _endless(images, recipe):
            views = make_views(
                batch, recipe.view_specs, mean=data.mean, std=data.std, seed=recipe.run.seed, epoch=epoch
            )
            float(step(views, number=number).loss.detach())  # waits for the device
            number += 1
            progress.advance()
            now = time.monotonic()
            if number == _WARM_UP:
                began = now
            elif number > _WARM_UP and (number == _MOST_STEPS or now - began > _LONGEST_S):
                break
    timed = number - _WARM_UP
    on_gpu = accelerator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return Timing(
        steps=timed,
        images_per_s=round(timed * data.batch_size / (now - began), 2),
        peak_mib=float(peak >> 20),
    )


def _endless(images: TrainingImages, recipe: Recipe) -> Iterator[tuple[int, Batch]]:
    for epoch in itertools.count():
        for batch in images.batches(recipe.run.seed, epoch, batch_size=recipe.data.batch_size):
            yield epoch, batch
