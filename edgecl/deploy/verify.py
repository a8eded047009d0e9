"""Hold a bundle to its hashes and reference outputs on this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from edgecl.artifacts import Bundle, record_header, write_json
from edgecl.errors import ArtifactError, DeviceError, EdgeclError, ParityError
from edgecl.onboard import errors as onboard_errors
from edgecl.onboard.bundle import sha256_of_file
from edgecl.onboard.errors import OnboardError

_ERRORS: dict[str, type[EdgeclError]] = {
    onboard_errors.BundleError.name: ArtifactError,
    onboard_errors.DisagreementError.name: ParityError,
    onboard_errors.DeviceError.name: DeviceError,
}


def verify(bundle: Path) -> dict[str, Any]:
    """Check a bundle's files and outputs with the code that runs on devices, and keep the verdict beside it.

    Args:
        bundle: the directory; `verify.json` is written into it, for a failed check too.

    Returns:
        The record; see `edgecl.onboard.verify.verify` for its numbers.

    Raises:
        ArtifactError: not a bundle, or a file is missing or changed.
        ParityError: outputs further from torch's than the manifest allows.
        DeviceError: the runtime is not installed, or cannot load the net.
    """
    from edgecl.onboard.verify import verify as verify_onboard

    directory = Bundle(bundle)
    directory.read()
    header = record_header("verify", made_from=sha256_of_file(directory.record_file))
    try:
        found = verify_onboard(bundle)
    except OnboardError as error:
        if error.name != onboard_errors.DeviceError.name:  # without a runtime there is no verdict
            verdict = {
                "ok": False,
                "files_ok": False,
                **getattr(error, "record", {}),
                "problem": error.problem,
            }
            with contextlib.suppress(ArtifactError):  # the verdict matters more than its record
                write_json(directory.verify_file, {**header, **verdict})
        raise error_from_onboard(error.name, error.problem, error.hint, bundle=bundle) from error
    record = {**header, **found}
    write_json(directory.verify_file, record)
    return record


def error_from_onboard(name: str, problem: str, hint: str | None, *, bundle: Path) -> EdgeclError:
    """Return the host's error for one of the device code's, with the same text."""
    return _ERRORS.get(name, EdgeclError)(problem, where={"bundle": bundle}, hint=hint)
