"""Kinds of device and the software of each JetPack, beyond those of the boards in test_device_info.py."""

from __future__ import annotations

import pytest

from edgecl.onboard.devices import DEVICES, device_of_module, jetpack_of_l4t


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("Jetson-AGX Xavier", "jetson-xavier"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "jetson-orin-nx"),
        ("Raspberry Pi 5 Model B Rev 1.0", None),
    ],
)
def test_module_of_the_device_tree_has_its_kind(module, kind):
    assert device_of_module(module) == kind


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("36.3.0", "6.0"),
        ("36.5.0", "6.1"),
        ("39.2.1", "7.2"),
        *((unknown, None) for unknown in ("", "R36", "21.5", "36")),
    ],
)
def test_l4t_release_names_its_jetpack(l4t, jetpack):
    assert jetpack_of_l4t(l4t) == jetpack


def test_only_what_has_dla_says_so():
    cores = {name: device.dla_cores for name, device in DEVICES.items() if device.dla_cores != 0}
    assert cores == {"jetson-xavier": 2, "jetson-orin-nx": 1, "jetson-agx-orin": 2, "jetson-orin": None}
