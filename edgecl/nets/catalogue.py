"""The nets that hold narrower ones of their own, and some that are asked for and do not, named without importing torch."""

import json
from pathlib import Path
from typing import Any

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


def list_nets() -> list[dict[str, Any]]:
    """List nets, those that hold any narrower one of theirs first; any other timm net may be tried.

    Returns:
        of each net the name, a summary, millions of parameters and of MACs of one picture of `image_size` pixels, both
        without classifier and the MACs as exported; whether it nests, at which widths that was checked, and whether
        branches are fused before export. One that does not nest has the reason instead of widths.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    listed = []
    for name, net in table["nets"].items():
        about = f"{net['params_m']} M parameters, {net['macs_m']} M MACs; {net['parts']}"
        about += "; fused before export" if net["fused"] else ""
        about += "; tested from training to bundle" if name in NETS else ""
        about += (
            f"; from {net['widths'][0]:g} to {net['widths'][-1]:g} times its width only"
            if net["widths"][0] == 1
            else ""
        )
        listed.append({"name": name, "summary": about, **net, "nests": True})
    for name, net in table["refused"].items():
        about = f"{net['params_m']} M parameters, {net['macs_m']} M MACs; has one width only: {net['reason']}"
        listed.append({"name": name, "summary": about, **net, "nests": False})
    return listed
