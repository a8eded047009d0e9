"""Make the table that `edgecl ls nets` shows: every small timm net that holds narrower ones, by the check itself.

python -m tests.nets.make_catalogue            # some minutes on one core; writes edgecl/nets/catalogue.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from itertools import combinations

import timm
import torch
from torch import nn

from edgecl.errors import EdgeclError
from edgecl.nets.backbone import count_parameters, create_backbone
from edgecl.nets.catalogue import NETS, TABLE
from edgecl.nets.nesting import index_of
from edgecl.nets.slimming import SlimmableNet

WIDTHS = (0.5, 0.6, 0.75, 1.0, 1.5, 2.5, 4.0)
"""Between any two of these the tensors must nest."""
HOST, SLIM = 1.5, (1.0, 0.75, 0.5)
"""Between these the functions must agree, too."""
LARGEST = 12e6
"""Parameters without the classifier: beyond, a net is none for an edge device; those of `NETS` are listed all the same."""


def nests(arch: str) -> bool:
    """Check whether an architecture holds any narrower one of its own."""
    with torch.device("meta"):
        nets = {width: create_backbone(arch, width=width) for width in WIDTHS}
    for slim, host in combinations(WIDTHS, 2):
        index_of(nets[slim], nets[host], where={})
    SlimmableNet(
        lambda width: create_backbone(arch, width=width),
        host_width=HOST,
        slim_width=SLIM[0],
        other_widths=SLIM[1:],
    )
    return True


def entry(arch: str) -> dict[str, str | float]:
    """Describe an architecture."""
    with torch.device("meta"):
        net = create_backbone(arch)
    kinds = {type(module).__name__ for module in net.modules()}
    depthwise = any(isinstance(one, nn.Conv2d) and 1 < one.groups == one.in_channels for one in net.modules())
    parts = ["depthwise"] if depthwise else []
    parts += (
        ["squeeze-and-excitation"]
        if any("SqueezeExcite" in kind or kind == "SEModule" for kind in kinds)
        else []
    )
    parts += sorted(kinds & {"ReLU", "ReLU6", "SiLU", "Hardswish", "HardSwish", "PReLU", "GELU"})
    return {"params_m": round(count_parameters(net) / 1e6, 2), "parts": ", ".join(parts)}


def main() -> None:
    """Check all of timm's nets and write those that nest."""
    torch.set_num_threads(1)
    found = {}
    for arch in timm.list_models():
        with contextlib.suppress(
            EdgeclError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError
        ):
            with torch.device("meta"):
                create_backbone(arch, width=HOST)  # most say at once that they have one width only
                if arch not in NETS and count_parameters(create_backbone(arch)) > LARGEST:
                    continue
            if nests(arch):
                found[arch] = entry(arch)
                sys.stderr.write(f"{arch}: {found[arch]}\n")
    TABLE.write_text(json.dumps({"timm": timm.__version__, "nets": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
