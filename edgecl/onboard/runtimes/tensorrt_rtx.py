"""TensorRT for RTX on a desktop GPU; engines are compiled when the bundle is exported, and carried in it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from ..runtime import Runtime, Session

if TYPE_CHECKING:
    from ..device_state import Check


def _open(bundle: Path, manifest: Dict[str, Any], **options: Any) -> Session:
    from ..tensorrt_session import TensorrtSession  # NumPy and CUDA

    return TensorrtSession(bundle, manifest, runtime="tensorrt_rtx", **options)


def _checks(root: Path, target: Dict[str, Any]) -> "List[Optional[Check]]":
    from ..cuda_checks import check_cuda

    return check_cuda(target)


RUNTIME = Runtime(
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    install='pip install "edgecl[rtx]"',
    open=_open,
    int8_forms=("int8-trt-fp16", "int8-trt"),
    devices=("gpu",),
    builds_engines=True,
    checks=_checks,
)
