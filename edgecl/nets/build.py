"""Build the nets that a recipe trains, and take one width's backbone out of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from edgecl.config.recipe import Recipe, width_as_given
from edgecl.errors import SliceError
from edgecl.nets.backbone import taking_pictures
from edgecl.nets.given import GivenNet
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import SlimmableNet

_BACKBONE = "backbone."


def create_slimmable(recipe: Recipe) -> SlimmableNet:
    """Build the encoder a recipe trains, with random weights.

    Raises:
        RecipeError: unknown architecture, or one that does not take pictures of the recipe's sizes.
        SliceError: a slim net is not a prefix of the host, or the host cannot begin as its slim nets.
    """

    def build(width: float) -> nn.Module:
        return Encoder(
            recipe.host.arch,
            width=width,
            projector=recipe.projector.sizes,
            stem_stride=recipe.host.stem_stride,
        )

    sizes = dict.fromkeys(spec.size for spec in recipe.view_specs)
    try:
        net = SlimmableNet(
            build,
            host_width=recipe.host.width,
            slim_width=recipe.slim.width,
            other_widths=recipe.slim.all_widths[1:],
        )
    except SliceError:
        # Where the net alone does not take the pictures, that is what is wrong.
        _try_image_sizes(build(recipe.slim.width), recipe, sizes)
        raise
    _try_image_sizes(net, recipe, sizes)
    if recipe.host.nested_start:
        net.nest()
    return net


def start_from(net: SlimmableNet, given: GivenNet) -> None:
    """Put a trained net, norms included, in the place of the widest slim net's backbone; the projector stays random."""
    net.start_from({f"{_BACKBONE}{name}": tensor for name, tensor in given.net.state_dict().items()})


def _try_image_sizes(net: nn.Module, recipe: Recipe, sizes: Iterable[int]) -> None:
    """Run one blank picture of each size: some nets, such as transformers, take one size only."""
    forward = net.forward_slim if isinstance(net, SlimmableNet) else net
    stem = f" with 'host.stem_stride' {stride}" if (stride := recipe.host.stem_stride) else ""
    hint = "set [data] image_size or [views] local_size to a size the net takes, or choose another net"
    net.eval()
    for size in sizes:
        with taking_pictures(f"'{recipe.host.arch}'{stem}", size, size, hint=hint), torch.no_grad():
            forward(torch.zeros(1, 3, size, size))
    net.train()


def backbone_tensors(net: SlimmableNet, *, width: float) -> dict[str, Tensor]:
    """Return the backbone of a slim width or the host's as a plain state dict: copies, named as timm names them.

    Raises:
        SliceError: the net was not trained at this width.
    """
    if width not in (*net.slim_widths, net.host_width):
        *first, last = map(width_as_given, sorted({*net.slim_widths, net.host_width}))
        trained = f"{', '.join(first)} and {last}" if first else last
        raise SliceError(
            f"cannot carve width {width_as_given(width)}: this run trained {trained}",
            hint="each width has batch norms of its own, so only a trained width can be carved",
        )
    tensors = net.slim_tensors(width) if width in net.slim_widths else net.host.state_dict()
    return {
        name.removeprefix(_BACKBONE): tensors[name].detach().clone().contiguous()
        for name in net.host.state_dict()
        if name.startswith(_BACKBONE)
    }
