"""labels.txt: the name of each class, a line each."""

from __future__ import annotations

from edgecl.deploy.contract import contract_of
from edgecl.onboard.bundle import LABELS
from edgecl.storage.directories import Bundle
from edgecl.storage.records import Manifest
from edgecl.storage.writing import write_bytes


def write(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Write the names of the classes, where the net has any."""
    labels = contract_of(manifest).labels
    if labels is None:
        return {}
    write_bytes(bundle.path / LABELS, "".join(f"{name}\n" for name in labels).encode())
    return {LABELS: "the name of each class, in the order of the outputs"}
