"""What a bundle hands to programs that know nothing of edgecl: a file a kind, found by listing this folder.

Each has `write(bundle, manifest)`: it writes its files into the bundle, and returns a line of the bundle's README for
each that a person begins with, by name; nothing where the bundle is not for that program.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from edgecl.storage.directories import Bundle
from edgecl.storage.records import Manifest

KINDS = sorted(file.stem for file in Path(__path__[0]).glob("[!_]*.py"))


def write_handover(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Write every kind of file that fits the bundle, and return the lines about them: file -> what it is for."""
    lines: dict[str, str] = {}
    for kind in KINDS:
        lines.update(importlib.import_module(f"{__name__}.{kind}").write(bundle, manifest))
    return lines
