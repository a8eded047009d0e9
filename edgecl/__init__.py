"""Train, then compile: small vision networks from unlabelled images, measured on the device that runs them.

The verbs of the command line are functions here: `edgecl.init`, `pretrain`, `carve`, `probe`, `pick`, `finetune`, `cost`,
`predict`, `export`, `verify`, `bench`, `publish` and `report`; see `edgecl.api`. Importing edgecl imports neither them nor
torch before they are used.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecl.api import (
        bench,
        carve,
        cost,
        export,
        finetune,
        init,
        pick,
        predict,
        pretrain,
        probe,
        publish,
        report,
        verify,
    )

# Libraries that report what they are used for read these while they are imported; onnxruntime's own switch acts too late.
# `edgecl.onboard`, which travels alone, says the first for itself.
os.environ.update(ORT_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")

__version__ = "0.3.0"
__all__ = [
    "__version__",
    "bench",
    "carve",
    "cost",
    "export",
    "finetune",
    "init",
    "pick",
    "predict",
    "pretrain",
    "probe",
    "publish",
    "report",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a verb when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'edgecl' has no attribute '{name}'")
    from edgecl import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
