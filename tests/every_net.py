"""Every net that is tested, for pytest.mark.parametrize; what is not in the quick run is marked slow."""

import pytest

from edgecl.nets.catalogue import NETS

# The first generation, whose widths come from one multiplier, and one net for each way to widen that came later.
QUICK = (
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "resnet50",
    "efficientformerv2_s0",
    "fastvit_t8",
    "lcnetv2_small",
    "mobileone_s0",
    "repghostnet_100",
    "repvit_m0_9",
    "starnet_s1",
    "vit_tiny_patch16_224",
)
LAYER_NORMS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
"""Those whose host cannot begin as its slim net."""


def every_net(*, quick=QUICK, without=()):
    """Name every net, those that are not in the quick run marked."""
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in NETS
        if name not in without
    ]
