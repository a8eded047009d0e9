"""The device code as one file, `onboard.pyz`, that a Python 3.6 with NumPy and a runtime can run."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import edgecl.onboard
from edgecl.storage.writing import write_bytes

_SHEBANG = b"#!/usr/bin/env python3\n"
# The oldest moment a zip file can tell: the same sources make the same bytes at any time.
_WHEN = (1980, 1, 1, 0, 0, 0)
# Runs under any Python, 2 as well, so that an old one is told what is wrong and not shown a syntax error.
_MAIN = """\
import sys

if sys.version_info < (3, 6):
    import json

    problem = "Python %d.%d is too old for onboard.pyz, which needs 3.6" % sys.version_info[:2]
    hint = "run it with a newer one, such as `python3.6 onboard.pyz`"
    sys.stderr.write("edgecl: %s\\n  hint: %s\\n" % (problem, hint))
    print(json.dumps({"error": {"name": "device", "problem": problem, "hint": hint, "record": None}}))
    sys.exit(1)

from onboard.__main__ import program

sys.exit(program())
"""


def write_onboard(path: Path) -> None:
    """Write the package `edgecl.onboard` as an executable zip application.

    The same sources give the same bytes, whatever the time and whoever writes them, with one version of zlib.

    Raises:
        ArtifactError: it cannot be written; nothing is left behind.
    """
    write_bytes(path, onboard_bytes())
    path.chmod(0o755)


def onboard_bytes() -> bytes:
    """Return the zip application's content."""
    package = Path(edgecl.onboard.__file__).parent
    sources = {str(path.relative_to(package.parent)): path.read_bytes() for path in package.rglob("*.py")}
    sources["__main__.py"] = _MAIN.encode("ascii")
    packed = io.BytesIO()
    packed.write(_SHEBANG)
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(sources):
            entry = zipfile.ZipInfo(name, _WHEN)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, wherever it is written
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, sources[name])
    return packed.getvalue()
