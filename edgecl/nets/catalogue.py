"""The nets that hold narrower ones of their own, named without importing torch."""

import json
from pathlib import Path

TABLE = Path(__file__).with_name("catalogue.json")
"""Made by `python -m tests.nets.make_catalogue`, which checks every small net of timm."""

NETS = (
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "resnet50",
    "deit_tiny_patch16_224",
    "efficientformerv2_s0",
    "efficientformerv2_s1",
    "fastvit_s12",
    "fastvit_t12",
    "fastvit_t8",
    "fbnetv3_b",
    "lcnetv2_base",
    "lcnetv2_small",
    "lowformer_e1",
    "lowformer_e2",
    "mnasnet_100",
    "mobilenetv4_conv_medium",
    "mobilenetv4_hybrid_medium",
    "mobileone_s0",
    "mobileone_s1",
    "repghostnet_100",
    "repvit_m0_9",
    "repvit_m1_0",
    "starnet_s1",
    "tinynet_a",
    "vit_tiny_patch16_224",
)
"""Those that the tests take from training to a bundle."""


def list_nets() -> list[dict[str, str]]:
    """List nets that hold any narrower one of theirs at widths from 0.5 to 4; any other timm net may be tried."""
    nets = json.loads(TABLE.read_text(encoding="utf-8"))["nets"]
    return [
        {
            "name": name,
            "summary": f"{net['params_m']} M parameters; {net['parts']}"
            + ("; tested from training to bundle" if name in NETS else ""),
        }
        for name, net in nets.items()
    ]
