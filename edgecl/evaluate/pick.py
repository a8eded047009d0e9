"""The verb `pick`: which pictures to label first, as a list and as a page to look at."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor
from torch.nn import functional

from edgecl.data.loading import load_eval_images, normalize
from edgecl.data.source import ImageSource
from edgecl.data.sources import open_source
from edgecl.data.survey import alike, perceptual_hash
from edgecl.data.thumbnail import small_jpeg
from edgecl.errors import ArtifactError, DataError, counted, first_of, printable, tell
from edgecl.evaluate.probe import load_feature_net
from edgecl.metrics.collapse import extract_features
from edgecl.metrics.diversity import clusters, isolation, outliers, typical_first
from edgecl.storage.outputs import refuse_existing_file
from edgecl.storage.records import ModelRecord, PickedImage
from edgecl.storage.writing import disk_errors, write_bytes

# Pictures in memory at a time; of each only features and a hash stay.
_AT_A_TIME = 2048
_MOST_OUTLIERS = 20
_THUMBNAIL = 160  # pixels
_SUFFIXES = (".csv", ".jsonl", ".txt")


def pick(photos: str, *, model: Path, count: int = 200, out: Path, force: bool = False) -> list[PickedImage]:
    """Pick the pictures that are most typical of groups of like pictures, the largest group first.

    `edgecl.api.pick` says what the arguments are and what is raised.

    What that gains, and why it is not k-centers: docs/results.md.
    """
    if out.suffix not in _SUFFIXES:
        raise ArtifactError(f"'{out}' is no name of a list", hint="let it end in " + ", ".join(_SUFFIXES))
    page = out.with_suffix(".html")
    for file in (out, page):
        refuse_existing_file(file, force=force)
    net, record = load_feature_net(model)
    source = open_source(photos)
    if count > len(source):
        raise DataError(
            f"{count:,} pictures cannot be picked from {len(source):,}",
            where={"data": photos},
            hint="lower --count",
        )
    seen = _look(net, record, source)
    picked = _choose(seen, source, count=min(count, len(seen.places)))
    broken = [
        PickedImage(path=name, order=None, reason="unreadable", near_duplicates=[], readable=False)
        for name in seen.unreadable
    ]
    pictures = [(one, _thumbnail(source, index)) for one, index in picked]
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(page, _page(pictures, photos=photos, model=model, seen=seen).encode())
        found = [*(one for one, _ in picked), *broken]
        write_bytes(out, _list_text(found, out.suffix).encode(errors="surrogateescape"))
    if broken:
        tell(f"{len(broken):,} of {len(source):,} pictures could not be read: {first_of(seen.unreadable)}")
    return found


class _Seen(NamedTuple):
    """What is known of the readable pictures, by their places in the source; and the names of the others."""

    places: list[int]
    features: Tensor
    """(N, F)."""
    hashes: Tensor
    """(N, 120)."""
    unreadable: list[str]


def _look(net: torch.nn.Module, record: ModelRecord, source: ImageSource) -> _Seen:
    about = record.preprocessing
    parts = -(-len(source) // _AT_A_TIME)
    index: list[int] = []
    unreadable: list[str] = []
    features, hashes = [], []
    for part in range(parts):
        # Every so manieth: a folder of broken files is spread over the parts.
        rows = np.arange(part, len(source), parts)
        images = load_eval_images(
            source.take(rows),
            resize_size=about.resize_size,
            image_size=about.image_size,
            max_bad_fraction=1.0,
        )
        bad = set(images.skipped)
        unreadable += images.skipped
        index += [row for row in rows.tolist() if source.describe(row) not in bad]
        features.append(
            extract_features(
                net, images.images, normalize=lambda batch: normalize(batch, about.mean, about.std)
            )
        )
        small = functional.interpolate(images.images.float(), (32, 32), mode="bilinear", antialias=True)
        hashes.append(perceptual_hash(small))
    order = np.argsort(index)
    rank = torch.from_numpy(order)
    return _Seen(
        [index[place] for place in order],
        torch.cat(features)[rank],
        torch.cat(hashes)[rank],
        sorted(unreadable),
    )


def _choose(seen: _Seen, source: ImageSource, *, count: int) -> list[tuple[PickedImage, int]]:
    """Return what to label and what is unlike all else, each with its place in the source."""
    alone = outliers(isolation(seen.features), most=_MOST_OUTLIERS)
    # On the sphere: small features lie close together, and are those of pictures in which the net sees little.
    lonely = isolation(functional.normalize(seen.features, dim=1))
    group = clusters(seen.features, count, seed=0)
    size = torch.bincount(group)[group]
    chosen: list[int] = []
    for row in typical_first(group, lonely).tolist():
        known = seen.hashes[chosen]
        if row not in alone and not alike(seen.hashes[row : row + 1], known).any():
            chosen.append(row)
        if len(chosen) == count:
            break
    reasons = [f"typical of {counted(int(size[row]), 'picture')}" for row in chosen]
    reasons += ["outlier: unlike all others; broken, or of something else?"] * len(alone)
    same = alike(seen.hashes[chosen + alone], seen.hashes)
    picked = []
    for number, (row, reason) in enumerate(zip(chosen + alone, reasons, strict=True), start=1):
        twins = [
            source.describe(seen.places[other])
            for other in same[number - 1].nonzero()[:, 0].tolist()
            if other != row
        ]
        one = PickedImage(
            path=source.describe(seen.places[row]),
            order=number if number <= len(chosen) else None,
            reason=reason
            + (f"; {counted(len(twins), 'near-duplicate')}: {first_of(twins)}" if twins else ""),
            near_duplicates=twins,
        )
        picked.append((one, seen.places[row]))
    return picked


def _list_text(picked: list[PickedImage], suffix: str) -> str:
    """Return the list as CSV, as JSON lines, or as the paths alone of what to label."""
    if suffix == ".jsonl":
        return "".join(json.dumps(one.to_json()) + "\n" for one in picked)
    if suffix == ".txt":
        return "".join(f"{one.path}\n" for one in picked if one.order)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["order", "path", "reason"])
    rows.writerows((one.order or "", one.path, one.reason) for one in picked)
    return text.getvalue()


def _thumbnail(source: ImageSource, index: int) -> str:
    """Return a small JPEG of a picture, in base64."""
    image = source.read_reduced(index, at_least=_THUMBNAIL)[0]
    return small_jpeg(image, side=_THUMBNAIL, quality=80)


def _page(pictures: list[tuple[PickedImage, str]], *, photos: str, model: Path, seen: _Seen) -> str:
    """Return the contact sheet; nothing on it is fetched, and all text is escaped."""
    env = Environment(
        loader=PackageLoader("edgecl.evaluate"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    env.filters.update(shown=printable, name=lambda path: "/".join(path.split("/")[-2:]))
    return env.get_template("contact_sheet.html.j2").render(
        picked=[(one, data) for one, data in pictures if one.order],
        outliers=[(one, data) for one, data in pictures if not one.order],
        photos=printable(photos),
        model=printable(model),
        images=len(seen.places),
        unreadable=seen.unreadable,
        some=first_of(seen.unreadable),
    )
