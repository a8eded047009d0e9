"""Where images come from: every scheme of a data URI and the file that opens it."""

from __future__ import annotations

from pathlib import Path

from edgecl.data import demo_images, folder, label_table, shards, torchvision_sets
from edgecl.data.source import ImageSource, Split, expanded
from edgecl.errors import DataError, near_matches
from edgecl.storage.redaction import without_secrets

_SUMMARIES = {
    **demo_images.SUMMARIES,
    **folder.SUMMARIES,
    **torchvision_sets.SUMMARIES,
    **shards.SUMMARIES,
    **label_table.SUMMARIES,
}


def open_source(
    uri: str, *, split: Split = "train", download: bool = False, index_dir: Path | None = None
) -> ImageSource:
    """Open the images that a data URI names.

    Args:
        uri: a folder, `demo`, or SCHEME:PATH as `list_datasets` names them.
        split: 'test' gives held-out images, where `has_test_split`.
        download: let torchvision fetch a set that is missing.
        index_dir: where the index of a folder is kept, so that the next start need not read all of it.

    Raises:
        DataError: unknown, missing or empty; or a test split where there is none.
    """
    if split == "test" and not has_test_split(uri):
        raise DataError(
            f"'{without_secrets(uri)}' has no test split",
            hint="name a second data URI with the held-out images",
        )
    scheme = _scheme(uri)
    try:
        if scheme == "demo":
            return demo_images.open_demo(split)
        if scheme == shards.SCHEME:
            return shards.open_shards(uri)
        if scheme == label_table.SCHEME:
            return label_table.open_table(uri)
        if scheme in torchvision_sets.SETS:
            return torchvision_sets.open_set(uri, split=split, download=download)
        if expanded(uri).is_dir():
            return folder.open_folder(uri, index_dir=index_dir)
        raise _unknown(uri)
    except OSError as exc:
        raise DataError(
            f"'{without_secrets(uri)}' cannot be read: {exc.strerror or exc}",
            where={"place": exc.filename} if exc.filename else None,
        ) from exc


def folder_of(uri: str) -> Path | None:
    """Return the folder of pictures that a data URI names; None where it names none: `demo` beside a folder `demo`, too."""
    root = None if _scheme(uri) else expanded(uri)
    return root if root and root.is_dir() else None


def absolute_uri(uri: str) -> str:
    """Return a data URI that means the same from any working directory, for records that others read later."""
    scheme = _scheme(uri)
    if scheme in (*torchvision_sets.SETS, label_table.SCHEME):
        return f"{scheme}:{Path(uri.partition(':')[2]).absolute()}"
    if scheme == shards.SCHEME:
        return shards.absolute_shards(uri)
    return uri if scheme else str(Path(uri).absolute())


def has_test_split(uri: str) -> bool:
    """Return whether a data URI comes with held-out images of its own."""
    return _scheme(uri) in ("demo", *torchvision_sets.SETS)


def list_datasets() -> list[dict[str, str]]:
    """List the forms of a data URI: name and summary."""
    return [{"name": name, "summary": summary} for name, summary in _SUMMARIES.items()]


def _scheme(uri: str) -> str:
    """Return the scheme of a data URI; "" for a folder."""
    scheme, colon, _ = uri.partition(":")
    known = scheme in torchvision_sets.SETS or (colon and scheme in (shards.SCHEME, label_table.SCHEME))
    return "demo" if uri == "demo" else scheme if known else ""


def _unknown(uri: str) -> DataError:
    """Explain why a data URI names nothing."""
    scheme, colon, _ = uri.partition(":")
    root = expanded(uri)
    if root.exists():
        hint = f"write shards:{uri}" if root.suffix == ".tar" else f"pass the folder: {root.parent}"
        return DataError(f"'{uri}' is a file, not a folder of images", hint=hint)
    if "://" in uri:
        shown = without_secrets(uri)
        return DataError(
            f"'{shown}' is a URL, and folders of images are read from disks",
            hint=f"for tar shards behind it write shards:{shown}",
        )
    if colon and scheme.replace("-", "").replace("_", "").isalnum():
        return DataError(
            f"unknown kind of data '{scheme}' in '{uri}'",
            hint=near_matches(scheme.lower(), [*torchvision_sets.SETS, shards.SCHEME]),
        )
    return DataError(f"no folder '{uri}'", hint="a data URI is one of: " + ", ".join(_SUMMARIES))
