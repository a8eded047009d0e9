"""main.py and main.cpp: the shortest programs from a picture to an answer, the constants filled in."""

from __future__ import annotations

from edgecl.deploy.contract import contract_of, render
from edgecl.storage.directories import Bundle
from edgecl.storage.records import Manifest
from edgecl.storage.writing import write_bytes

PROGRAMS = {
    "main.py": "the answer for a picture, by Python and ONNX Runtime: python3 main.py IMAGE",
    "main.cpp": "the same in C++ by ONNX Runtime's C API",
    "main_tensorrt.cpp": "the same in C++ by TensorRT",
}


def write(bundle: Bundle, manifest: Manifest) -> dict[str, str]:
    """Write the programs for ONNX Runtime, and that for TensorRT where the bundle is for it."""
    contract = contract_of(manifest)
    fitting = {
        name: line
        for name, line in PROGRAMS.items()
        if "tensorrt" not in name or manifest.runtime == "tensorrt"
    }
    for name in fitting:
        write_bytes(bundle.path / name, render(f"{name}.j2", contract=contract).encode())
    return fitting
