"""Fuzz one reader by coverage: `python -m tests.fuzz.guided READER FOLDER RUNS`, where atheris is installed.

FOLDER keeps the inputs that reached new code, and the one that broke the reader, if any. Exit 0 when none did.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgecl", "tarfile", "zipfile", "json"]):
    from edgecl.data.tar_index import read_index
    from edgecl.errors import EdgeclError
    from edgecl.onboard.bundle import check_self_contained, read_manifest
    from edgecl.onboard.errors import OnboardError
    from edgecl.reports.collect import read_metrics

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tar": ("x.tar", lambda file: read_index(file, shown=file.name)),
    "manifest": ("manifest.json", lambda file: read_manifest(file.parent)),
    "metrics": ("metrics.jsonl", read_metrics),
    "onnx": ("model.onnx", check_self_contained),
}
"""Name -> what the file is called, and what reads it."""


def main() -> None:
    reader, folder, runs = sys.argv[1:]
    name, read = READERS[reader]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / name

        def read_one(content: bytes) -> None:
            file.write_bytes(content)
            with contextlib.suppress(EdgeclError, OnboardError):
                read(file)

        options = [f"-runs={runs}", "-seed=1", "-max_len=24576", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/broke-", folder], read_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
