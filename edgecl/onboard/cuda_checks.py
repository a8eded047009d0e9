"""What `doctor` checks of a GPU."""

from typing import Any, Dict, List, Optional

from .device_state import Check, check
from .errors import OnboardError


def check_cuda(target: Dict[str, Any]) -> List[Optional[Check]]:
    """Fail without a GPU that CUDA can use, and for one that the bundle's engines are not compiled for."""
    try:
        from .cudart import Cudart
    except ImportError:  # NumPy, which has its own check
        return []
    try:
        cuda = Cudart()
        gpu = cuda.gpu()
    except OnboardError as error:
        return [check("CUDA", "fail", error.problem.partition(";")[0], error.hint)]
    found = check("CUDA", "ok", "%s, %s" % (gpu.name, cuda.path))
    return [found, check_capability(gpu.compute_capability, target)]


def check_capability(capability: str, target: Dict[str, Any]) -> Optional[Check]:
    """Check a GPU's compute capability, such as '8.6', against those that engines were compiled for ahead of time."""
    compiled = list((target.get("build") or {}).get("compute_capabilities") or ())
    if not compiled:
        return None
    here = "SM" + capability.replace(".", "")
    if here in compiled:
        return check("GPU", "ok", here)
    return check(
        "GPU",
        "fail",
        "%s; the engines are for %s" % (here, ", ".join(compiled)),
        "add it to build.compute_capabilities of a target if TensorRT for RTX knows it, or use --target tensorrt",
    )
