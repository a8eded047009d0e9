"""A folder of pictures, at any depth; its sub-folders are classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgecl.data.index import list_folder
from edgecl.data.source import ImageSource, Labels, expanded, read_plain_file
from edgecl.errors import DataError
from edgecl.onboard.pictures import EXTENSIONS

SUMMARIES = {"FOLDER": "JPEG, PNG, WebP and BMP files at any depth; sub-folders are classes"}

_SPLIT_FOLDERS = {"train", "training", "test", "testing", "val", "valid", "validation"}


def open_folder(uri: str, *, index_dir: Path | None) -> ImageSource:
    """Open a folder, links to folders included, dot files left out.

    When every image lies under at least one sub-folder, and there are two or more of these, the first path component
    below the root is the class.

    Raises:
        DataError: no images, or folders named after splits.
        OSError: a folder cannot be read.
    """
    root = expanded(uri)
    listing, memory = list_folder(root, index_dir=index_dir)
    names = listing.names
    if not names:
        raise DataError(f"no images in the folder '{uri}'", hint="looked for " + ", ".join(EXTENSIONS))
    classes, labels = _classes_from_names(uri, names)
    return ImageSource(
        uri=uri,
        fingerprint=listing.fingerprint,
        length=len(names),
        opener=None,
        reader=lambda index: read_plain_file(f"{root}/{names[index]}"),
        namer=lambda index: str(root / names[index]),
        classes=classes,
        labels=labels,
        memory=memory,
        sizes=listing.sizes,
    )


def _classes_from_names(uri: str, names: list[str]) -> tuple[tuple[str, ...] | None, Labels | None]:
    if not all("/" in name for name in names):
        return None, None
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, None
    if _SPLIT_FOLDERS.issuperset(classes):
        raise DataError(
            f"the folder '{uri}' holds the splits {' and '.join(classes)}, not classes",
            hint=f"pass one of them: {Path(uri) / ('train' if 'train' in classes else classes[0])}",
        )
    positions = {name: position for position, name in enumerate(classes)}
    return tuple(classes), np.array([positions[folder] for folder in folders], dtype=np.int64)
