"""The catalogue's promise: every net listed holds any narrower one of its own, at widths from 0.5 to 4."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import pytest
import torch

from edgecl.nets.catalogue import NETS, list_nets
from edgecl.nets.heads import Encoder
from edgecl.nets.slimming import check_nesting


@lru_cache
def shapes(arch, width):
    with torch.device("meta"):
        net = Encoder(arch, width=width, projector=[16, 8])
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("arch", NETS)
def test_nets_nest_at_the_widths_that_are_promised(arch):
    for slim, host in combinations((0.5, 0.6, 0.75, 1.0, 1.5, 2.5, 4.0), 2):
        check_nesting(shapes(arch, slim), shapes(arch, host), slim_width=slim, host_width=host)


def test_list_has_a_summary_of_each():
    assert [entry["name"] for entry in list_nets()] == list(NETS)
    assert all(entry["summary"] for entry in list_nets())
    assert "at widths from 0.5 to 4" in list_nets.__doc__
