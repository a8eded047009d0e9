"""Every net that is tested, for pytest.mark.parametrize; what is not in the quick run is marked slow."""

import pytest

from edgecl.nets.catalogue import NETS

# One net for each way to widen that came after the multiplier of MobileNets and EfficientNets.
FAMILIES = (
    "efficientformerv2_s0",
    "fastvit_t8",
    "lcnetv2_small",
    "mobileone_s0",
    "repghostnet_100",
    "repvit_m0_9",
    "starnet_s1",
    "vit_tiny_patch16_224",
)
QUICK = (
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "resnet50",
    *FAMILIES,
)
LAYER_NORMS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
"""Those whose host cannot begin as its slim net."""


# Other kinds of blocks below the first and beyond the last of these widths.
WIDTHS = {"lowformer_e1": (1.0, 1.5), "lowformer_e2": (1.0, 4.0)}


def nets_at(widths, *, without=()):
    """Name every net with each width, or tuple of widths, at which it nests; those not in the quick run marked."""
    found = []
    for name in NETS:
        least, most = WIDTHS.get(name, (0.0, 4.0))
        for width in widths:
            inside = all(least <= one <= most for one in (width if isinstance(width, tuple) else (width,)))
            if inside and name not in without:
                found.append(pytest.param(name, width, marks=() if name in QUICK else pytest.mark.slow))
    return found


def every_net(*, quick=QUICK, without=()):
    """Name every net, those that are not in the quick run marked."""
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in NETS
        if name not in without
    ]
