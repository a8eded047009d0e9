"""What kinds of device there are: their precisions, DLA cores and JetPacks.

Sources: NVIDIA's TensorRT support matrices and `jetson_stats`; the DLA cores of each module are general knowledge.
"""

from typing import Dict, NamedTuple, Optional, Tuple

from .versions import numbers_of


class Device(NamedTuple):
    """One kind of device.

    compute_capability is 'major.minor' of its GPU, or None for a processor and for GPUs at large. modules are
    the names a device tree calls it by. dla_cores is None where the modules of the kind differ.
    """

    title: str
    precisions: Tuple[str, ...]
    dla_cores: Optional[int] = 0
    compute_capability: Optional[str] = None
    modules: Tuple[str, ...] = ()


DEVICES: Dict[str, Device] = {
    "cpu": Device("a CPU", ("fp32", "fp16", "int8")),
    "gpu": Device("a desktop or data-center GPU", ("fp32", "fp16", "int8", "fp8")),
    "jetson-nano": Device("Jetson Nano", ("fp32", "fp16"), 0, "5.3", ("Jetson Nano", "Jetson TX1")),
    "jetson-tx2": Device("Jetson TX2", ("fp32", "fp16"), 0, "6.2", ("Jetson TX2", "quill")),
    "jetson-xavier": Device("Jetson Xavier", ("fp32", "fp16", "int8"), 2, "7.2", ("Xavier",)),
    "jetson-orin-nano": Device("Jetson Orin Nano", ("fp32", "fp16", "int8"), 0, "8.7", ("Orin Nano",)),
    "jetson-orin-nx": Device("Jetson Orin NX", ("fp32", "fp16", "int8"), 1, "8.7", ("Orin NX",)),
    "jetson-agx-orin": Device("Jetson AGX Orin", ("fp32", "fp16", "int8"), 2, "8.7", ("AGX Orin",)),
    "jetson-orin": Device("any Jetson Orin", ("fp32", "fp16", "int8"), None, "8.7", ("Orin",)),
    "jetson-thor": Device("Jetson Thor", ("fp32", "fp16", "int8", "fp8"), 0, "11.0", ("Thor",)),
}


# L4T release and revision -> JetPack. A revision that is not listed belongs to the newest one below it.
JETPACKS: Dict[Tuple[int, int], str] = {
    (32, 6): "4.6",
    (32, 7): "4.6.1",
    (35, 1): "5.0.2",
    (35, 2): "5.1",
    (36, 3): "6.0",
    (36, 4): "6.1",
    (38, 2): "7.0",
    (39, 2): "7.2",
}


def device_of_module(module: str) -> Optional[str]:
    """Return the kind of device that a device tree's model text names, the most exact one, or None."""
    best, length = None, 0
    for name, device in DEVICES.items():
        for part in device.modules:
            if part.lower() in module.lower() and len(part) > length:
                best, length = name, len(part)
    return best


def jetpack_of_l4t(l4t: str) -> Optional[str]:
    """Return the JetPack of an L4T release such as '36.4.3', or None for one before those listed."""
    release, revision = (numbers_of(l4t) + (0, 0))[:2]
    fitting = [key for key in JETPACKS if key[0] == release and key[1] <= revision]
    return JETPACKS[max(fitting)] if fitting else None
