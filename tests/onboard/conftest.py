"""A whole bundle, each test its own."""

import pytest

from .tiny_bundle import make_bundle


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")
