"""Train, then compile: small vision networks from unlabelled images, measured on the device that runs them.

Importing edgecl imports nothing heavy. Each verb of the command line is one function in one module,
for example `from edgecl.nets.carving import carve`; `docs/architecture.md` lists them.
"""

import os

# Libraries that report what they are used for read these while they are imported; onnxruntime's own switch acts too late.
# `edgecl.onboard`, which travels alone, says the first for itself.
os.environ.update(ORT_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")

__version__ = "0.3.0"
__all__ = ["__version__"]
