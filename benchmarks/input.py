"""Compare how quickly photographs become two augmented views, by edgecl and by others; a table and one JSON line.

    python benchmarks/input.py                                     # 500 x 375 JPEGs, views of 224 px, one core: minutes
    python benchmarks/input.py --photo 2000 1500 --images 24       # photographs as a camera writes them
    python benchmarks/input.py --device cuda --workers 16 --images 2048 --batch 256     # views, and JPEGs, on a GPU

All ways live in one process pinned to one core with one thread, and take turns, one pass over the folder each per round,
every other round backwards, so that whatever else the machine does meets all of them. What is compared is processor
time: on a quiet machine that is the time on the clock, on a busy one it leaves out the waiting for other processes.
A ratio is the median over rounds of the ratios within a round. (With --device cuda it is the clock, and no core is pinned.)

| way                  | what it is                                                                                 |
| -------------------- | ------------------------------------------------------------------------------------------ |
| edgecl               | data/loading.py and data/views.py as training runs them, with nothing kept in memory       |
| torchvision          | torchvision's v2 transforms over PIL pictures, each decoded once for both views            |
| torchvision, PIL blur| the same with Pillow's blur (three box blurs) in place of torchvision's exact one          |
| lightly              | lightly's BYOL transform, where lightly is installed; it blurs with Pillow too             |

All make the same operators with the same probabilities and ranges, those of edgecl's recipes (BYOL's): crop, flip, color
jitter, grayscale, blur (always in view A, one time in ten in view B), solarize (view B), normalize; and all end in two
float32 batches. Pictures are drawn: shapes over smooth colors, with the noise of a sensor. They are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from timing import conditions_of, in_turns, options_of, ratio_of, table
from torchvision.transforms import v2

from edgecl.config.views import Views
from edgecl.data.decode import read_picture
from edgecl.data.loading import TrainingImages
from edgecl.data.sources import open_source
from edgecl.data.views import make_views
from edgecl.train.allocator import keep_freed_memory

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EDGECL, TORCHVISION, PIL_BLUR, LIGHTLY = "edgecl", "torchvision", "torchvision, PIL blur", "lightly"


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--photo", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--decode-size", type=int, default=SIDE, help="edgecl's [data] decode_size")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--core", type=int, default=0)
    options.add_argument("--device", default="cpu")
    options.add_argument("--workers", type=int, default=1, help="edgecl's decoding threads")
    given = options.parse_args()
    if given.device == "cpu":
        keep_freed_memory()  # as pretrain does
    given.batch = min(given.batch, given.images)
    load_before = os.getloadavg()[0]
    if given.device == "cpu":
        os.sched_setaffinity(0, {given.core})
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"drawing {given.images} photographs", file=sys.stderr, flush=True)
        size = write_photos(Path(scratch), given.images, *given.photo)
        if given.device == "cpu":
            ways, stages = ways_of_a_core(Path(scratch), given), stages_of_edgecl(Path(scratch), given)
            clock = time.process_time
        else:
            ways, stages, clock = ways_of_a_gpu(Path(scratch), given), {}, time.perf_counter
        results = measure(ways, images=given.images, rounds=given.rounds, clock=clock)
        parts = measure(stages, images=given.images, rounds=given.rounds, clock=clock) if stages else {}
    on_gpu = given.device != "cpu"
    conditions = conditions_of(
        load_before,
        ["torch", "torchvision", "pillow", "simplejpeg", "lightly"],
        gpu=torch.cuda.get_device_name(given.device) if on_gpu else None,
        pinned_to_core=None if on_gpu else given.core,
        workers=given.workers,
        photo=given.photo,
        file_bytes=size,
        image_size=SIDE,
        decode_size=given.decode_size,
        images=given.images,
        batch=given.batch,
        rounds=given.rounds,
        clock="time on the clock" if on_gpu else "processor time",
    )
    print_tables(results, parts, conditions)
    print(
        json.dumps(
            {
                "benchmark": "input",
                "conditions": conditions,
                "results": results,
                "stages_of_edgecl": parts,
            }
        )
    )


def write_photos(folder: Path, count: int, width: int, height: int) -> int:
    """Draw photographs and write them as JPEGs of quality 90; returns their mean size in bytes."""
    for number in range(count):
        random = np.random.default_rng(number)
        sky = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = sky.resize((width, height), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(picture)
        for shape in range(12):
            left, top = (int(random.integers(0, side)) for side in (width, height))
            right, bottom = (
                start + int(random.integers(10, side // 2)) for start, side in ((left, width), (top, height))
            )
            color = tuple(random.integers(0, 256, 3).tolist())
            (pen.ellipse if shape % 2 else pen.rectangle)([left, top, right, bottom], fill=color)
        noisy = np.asarray(picture) + random.normal(0, 8, (height, width, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir()) // count


def by_edgecl(folder: Path, given: argparse.Namespace, *, decode: str = "cpu") -> Callable[[], None]:
    images = TrainingImages(
        open_source(str(folder)),
        decode_size=given.decode_size,
        cache_mib=0,
        workers=given.workers,
        decode=decode,
    ).to(given.device)
    epoch = 0

    def go() -> None:
        nonlocal epoch
        epoch += 1
        for batch in images.batches(0, epoch, batch_size=given.batch):
            views = make_views(batch, Views().specs(SIDE), mean=MEAN, std=STD, seed=0, epoch=epoch)
        if given.device != "cpu":
            torch.cuda.synchronize()
        assert views[0].shape[1:] == (3, SIDE, SIDE)

    return go


def by_pil(folder: Path, transforms: tuple[Callable, Callable], batch_size: int) -> Callable[[], None]:
    """What a Dataset and a DataLoader's collate make with transforms over PIL pictures."""
    files = sorted(folder.iterdir())

    def go() -> None:
        for start in range(0, len(files) // batch_size * batch_size, batch_size):
            pairs = []
            for path in files[start : start + batch_size]:
                with Image.open(path) as stored:
                    picture = stored.convert("RGB")
                pairs.append([transform(picture) for transform in transforms])
            views = [torch.stack(view) for view in zip(*pairs, strict=True)]
        assert views[0].shape[1:] == (3, SIDE, SIDE)
        assert views[0].dtype == torch.float32

    return go


class PillowBlur:
    """Pillow's blur with a random sigma."""

    def __init__(self, sigma: tuple[float, float]):
        self._sigma = sigma

    def __call__(self, picture: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(*self._sigma))
        return picture.filter(ImageFilter.GaussianBlur(sigma))


def torchvision_transforms(views: Views, *, pil_blur: bool) -> tuple[v2.Compose, v2.Compose]:
    """Build both views' transforms, with the probabilities and ranges of edgecl's settings."""
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    # The usual kernel for views of 224 px; it reaches 5.5 of the largest sigma.
    blur = PillowBlur(views.blur_sigma) if pil_blur else v2.GaussianBlur(23, views.blur_sigma)
    return tuple(
        v2.Compose(
            [
                v2.RandomResizedCrop(SIDE, scale=views.crop_scale, ratio=views.crop_ratio),
                v2.RandomHorizontalFlip(views.flip),
                v2.RandomApply([jitter], p=views.jitter),
                v2.RandomGrayscale(views.grayscale),
                v2.RandomApply([blur], p=views.blur[number]),
                v2.RandomSolarize(128, views.solarize[number]),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        for number in range(2)
    )


def lightly_transforms(views: Views) -> tuple[Callable, Callable] | None:
    """Build lightly's BYOL transforms; None without lightly."""
    try:
        from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
    except ImportError as exc:
        print(f"lightly is left out: {exc}", file=sys.stderr)
        return None
    common = {
        "input_size": SIDE,
        "cj_prob": views.jitter,
        "cj_strength": 1.0,
        "cj_bright": views.brightness,
        "cj_contrast": views.contrast,
        "cj_sat": views.saturation,
        "cj_hue": views.hue,
        "min_scale": views.crop_scale[0],
        "random_gray_scale": views.grayscale,
        "sigmas": views.blur_sigma,
        "hf_prob": views.flip,
        "normalize": {"mean": MEAN, "std": STD},
    }
    return tuple(
        kind(**common, gaussian_blur=views.blur[number], solarization_prob=views.solarize[number])
        for number, kind in enumerate((BYOLView1Transform, BYOLView2Transform))
    )


def ways_of_a_core(folder: Path, given: argparse.Namespace) -> dict[str, Callable[[], None]]:
    views = Views()
    ways = {
        EDGECL: by_edgecl(folder, given),
        TORCHVISION: by_pil(folder, torchvision_transforms(views, pil_blur=False), given.batch),
        PIL_BLUR: by_pil(folder, torchvision_transforms(views, pil_blur=True), given.batch),
    }
    if transforms := lightly_transforms(views):
        ways[LIGHTLY] = by_pil(folder, transforms, given.batch)
    return ways


def ways_of_a_gpu(folder: Path, given: argparse.Namespace) -> dict[str, Callable[[], None]]:
    return {
        EDGECL: by_edgecl(folder, given),
        "edgecl, decode = cuda": by_edgecl(folder, given, decode="cuda"),
    }


def stages_of_edgecl(folder: Path, given: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The two halves of edgecl's way, each alone."""
    source = open_source(str(folder))
    images = TrainingImages(source, decode_size=given.decode_size).to("cpu")
    (batch,) = images.batches(0, 0, batch_size=given.images)
    return {
        "file to pixels": lambda: [
            read_picture(source, index, given.decode_size) for index in range(given.images)
        ],
        "pixels to two views": lambda: make_views(
            batch, Views().specs(SIDE), mean=MEAN, std=STD, seed=0, epoch=0
        ),
    }


def measure(
    ways: dict[str, Callable[[], object]], *, images: int, rounds: int, clock: Callable[[], float]
) -> dict[str, dict]:
    """Time all ways in turns."""
    for name, way in ways.items():
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in in_turns(ways, rounds):
        started = clock()
        ways[name]()
        times[name].append((clock() - started) / images)
    first = next(iter(ways))
    return {
        name: {
            "ms_per_image": 1e3 * statistics.median(own),
            "images_per_s": 1 / statistics.median(own),
            **ratio_of(times[first], own, "first_is_faster"),
        }
        for name, own in times.items()
    }


def print_tables(results: dict[str, dict], parts: dict[str, dict], conditions: dict) -> None:
    """Print conditions, one row per way, the halves of edgecl's, and the goal."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    print(f"{conditions['gpu'] or conditions['name']}; {versions}")
    print(
        f"files of {conditions['file_bytes'] / 1024:.0f} KiB, two views of {SIDE} px; "
        f"load {conditions['load_before']} before, {conditions['load_after']} after\n"
    )
    body = []
    for name, row in results.items():
        low, high = row["range"]
        faster = "" if name == EDGECL else f"{row['first_is_faster']:.2f}x [{low:.2f}, {high:.2f}]"
        body.append([name, f"{row['ms_per_image']:.2f}", f"{row['images_per_s']:.0f}", faster])
    print(table(["way", "ms per image", "images/s", "edgecl is faster"], body) + "\n")
    for name, row in parts.items():
        print(f"edgecl, {name}: {row['ms_per_image']:.2f} ms per image")


if __name__ == "__main__":
    main()
