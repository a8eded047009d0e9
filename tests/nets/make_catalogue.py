"""Make the table that `edgecl ls nets` shows: every small timm net that holds narrower ones, by the check itself.

python -m tests.nets.make_catalogue            # half an hour on one core; writes edgecl/nets/catalogue.json
python -m tests.nets.make_catalogue NAME …     # these nets alone, nesting or not, among the others that are in it
"""

from __future__ import annotations

import contextlib
import json
import sys
from itertools import combinations

import timm
import torch
from torch import nn

from edgecl.errors import EdgeclError, SliceError
from edgecl.evaluate.cost import forward_cost
from edgecl.nets.backbone import count_parameters, create_backbone, example_side
from edgecl.nets.catalogue import NETS, TABLE
from edgecl.nets.folding import fuse_branches, has_branches
from edgecl.nets.nesting import index_of
from edgecl.nets.slimming import SlimmableNet

WIDTHS = (0.5, 0.6, 0.75, 1.0, 1.5, 2.5, 4.0)
"""Between any two of these the tensors must nest, or between those from 1 on, or 1 and 1.5."""
HOST, SLIM = 1.5, (1.0, 0.75, 0.5)
"""Between these the functions must agree, too."""
LARGEST = 12e6
"""Parameters without the classifier: beyond, a net is none for an edge device; those of `NETS` are listed all the same."""


def check(arch: str, widths: tuple[float, ...]) -> None:
    """Check that an architecture holds itself at any narrower of these widths.

    Raises:
        SliceError: it does not.
    """
    with torch.device("meta"):
        nets = {width: create_backbone(arch, width=width) for width in widths}
    for slim, host in combinations(widths, 2):
        index_of(nets[slim], nets[host], where={})
    first, *others = (width for width in SLIM if width in widths)
    SlimmableNet(
        lambda width: create_backbone(arch, width=width),
        host_width=HOST,
        slim_width=first,
        other_widths=others,
    )


def widths_of(arch: str) -> tuple[float, ...]:
    """Return the widths of which an architecture holds any narrower one.

    Raises:
        SliceError: there are none.
    """
    for widths in (WIDTHS, WIDTHS[3:], WIDTHS[3:5]):
        try:
            check(arch, widths)
        except SliceError as exc:
            last = exc
        else:
            return widths
    raise last


def entry(arch: str) -> dict[str, str | float | bool]:
    """Describe an architecture, without its classifier and as it is exported."""
    net = create_backbone(arch)
    side = max(224, example_side(net))
    kinds = {type(module).__name__ for module in net.modules()}
    depthwise = any(isinstance(one, nn.Conv2d) and 1 < one.groups == one.in_channels for one in net.modules())
    parts = ["depthwise"] if depthwise else []
    parts += (
        ["squeeze-and-excitation"]
        if any("SqueezeExcite" in kind or kind == "SEModule" for kind in kinds)
        else []
    )
    parts += ["attention"] if any("Attention" in kind for kind in kinds) else []
    parts += sorted(
        kinds & {"ReLU", "ReLU6", "SiLU", "Hardswish", "HardSwish", "PReLU", "GELU", "GELUTanh", "LayerNorm"}
    )
    return {
        "params_m": round(count_parameters(net) / 1e6, 2),
        "macs_m": round(forward_cost(fuse_branches(net), (1, 3, side, side)).macs / 1e6, 1),
        "image_size": side,
        "fused": has_branches(net),
        "parts": ", ".join(parts),
    }


def candidates() -> list[str]:
    """Return timm's small nets that can be built at another width."""
    found = []
    for arch in timm.list_models():
        with contextlib.suppress(Exception), torch.device("meta"):
            create_backbone(arch, width=HOST)  # most say at once that they have one width only
            if arch in NETS or count_parameters(create_backbone(arch)) <= LARGEST:
                found.append(arch)
    return found


def main(names: list[str]) -> None:
    """Check all of timm's nets, or those that are named, and write those that nest."""
    torch.set_num_threads(1)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found, refused = table["nets"] if names else {}, table["refused"]
    for arch in names or [*candidates(), *refused]:
        found.pop(arch, None)
        with contextlib.suppress(
            EdgeclError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError
        ):
            about = entry(arch)
            try:
                found[arch] = {**about, "widths": widths_of(arch)}
            except SliceError as exc:
                if names or arch in refused:
                    refused[arch] = {**about, "reason": exc.problem}
        sys.stderr.write(f"{arch}: {found.get(arch, 'does not nest')}\n")
    table = {
        "timm": timm.__version__,
        "nets": dict(sorted(found.items())),
        "refused": dict(sorted(refused.items())),
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
