"""The list of nets is what the check finds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgecl.errors import SliceError
from edgecl.nets.catalogue import NETS, TABLE, list_nets

sys.path.insert(0, str(Path(__file__).parent))
from make_catalogue import entry, widths_of

WHOLE = json.loads(TABLE.read_text(encoding="utf-8"))
LISTED, REFUSED = WHOLE["nets"], WHOLE["refused"]
# The same ones every time, so that a failure stays.
SAMPLE = np.random.default_rng(0).permutation(sorted(LISTED))[:6].tolist()


@pytest.mark.parametrize("arch", [*SAMPLE, *(pytest.param(arch, marks=pytest.mark.slow) for arch in LISTED)])
def test_a_net_of_the_list_nests_and_is_described(arch):
    assert {**entry(arch), "widths": [*widths_of(arch)]} == LISTED[arch]


@pytest.mark.parametrize("arch", ["mixnet_s", "resnet50_gn", "resnext50_32x4d", *REFUSED])
def test_a_net_that_does_not_nest_is_not_in_the_list(arch):
    assert arch not in LISTED


@pytest.mark.parametrize("arch", ["ghostnet_100", "lowformer_b0", "resnet18"])
def test_a_refused_net_is_listed_with_its_reason(arch):
    with pytest.raises(SliceError) as caught:
        widths_of(arch)
    # Exact, for it is no text of the test's: the list and the error give one reason.
    assert caught.value.problem == next(net["reason"] for net in list_nets() if net["name"] == arch)


def test_nets_that_nest_and_nets_that_do_not_are_told_apart():
    nets = {net["name"]: net for net in list_nets()}
    assert [name for name, net in nets.items() if not net["nests"]] == list(REFUSED)
    assert nets["vit_tiny_patch16_224"]["image_size"] == 224
    assert [nets[name]["fused"] for name in ("repvit_m0_9", "mobilenetv3_small_100")] == [True, False]
    assert nets["lowformer_e1"]["widths"] == [1.0, 1.5]


def test_the_nets_that_are_tested_are_in_the_list_and_marked():
    shown = {net["name"]: net["summary"] for net in list_nets()}
    assert [name for name, summary in shown.items() if "tested" in summary] == sorted(NETS)


def test_the_page_about_nets_says_what_the_table_says():
    page = (Path(__file__).parents[2] / "docs" / "nets.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip(" `"): cells[1:]
        for cells in (line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `"))
    }
    nets = {net["name"]: net for net in list_nets()}
    assert rows.keys() == {*NETS, *REFUSED}
    for name, cells in rows.items():
        net = nets[name]
        assert [float(cell) for cell in cells[:2]] == [net["params_m"], net["macs_m"]]
        if net["nests"]:
            assert (cells[2].strip() == "yes") is net["fused"]
            least, most = net["widths"][0], net["widths"][-1]
            assert cells[4].strip().removesuffix(" in thirds") == f"{least:g} to {most:g}"


def test_the_list_is_shown_without_torch():
    code = "import sys; from edgecl.nets.catalogue import list_nets; list_nets(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
