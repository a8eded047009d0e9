import pytest

from edgecl.storage.directories import RunDir


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")
