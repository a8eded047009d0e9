"""Triton Inference Server: the configuration, and a script that puts the net into a model repository.

A repository is DIR/NAME/config.pbtxt with DIR/NAME/1/model.onnx, and most hold several nets; the script spares the bundle
a second copy of the weights.
"""

from __future__ import annotations

from edgecl.deploy.contract import contract_of, render
from edgecl.onboard.bundle import slug
from edgecl.storage.directories import Bundle
from edgecl.storage.records import Manifest
from edgecl.storage.writing import write_bytes

CONFIG = "config.pbtxt"
SCRIPT = "triton.sh"


def write(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Write the configuration and the script."""
    contract = contract_of(manifest)
    assert manifest.net is not None
    name = slug(f"{manifest.net.arch}-{manifest.net.width:g}")
    write_bytes(bundle.path / CONFIG, render("config.pbtxt.j2", contract=contract).encode())
    write_bytes(bundle.path / SCRIPT, render("triton.sh.j2", contract=contract, name=name).encode())
    return {SCRIPT: f"into a model repository of Triton Inference Server: sh {SCRIPT} REPOSITORY"}
