"""Say what would fail on this machine or on a board, before it does, and how to mend it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgecl.config.target import read_target
from edgecl.deploy.process import error_from_onboard
from edgecl.deploy.remote import run_on_board
from edgecl.onboard.errors import OnboardError
from edgecl.storage.directories import Bundle


def doctor(
    bundle: Path | None = None,
    *,
    target: str | None = None,
    host: str | None = None,
    ssh_options: Sequence[str] = (),
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Check a device for a bundle, for a target, or as such.

    Args:
        bundle: a directory, whose own target then counts.
        target: name or file of a target, where there is no bundle.
        host: USER@BOARD[:PORT] to check, by `edgecl.deploy.remote`; this machine where None.
        ssh_options: further arguments for `ssh`.
        report: called with a line on how far a board is.

    Returns:
        ok, device and checks; see `edgecl.onboard.doctor.doctor`.

    Raises:
        TargetError: no such target, or one that cannot be read.
        ArtifactError: not a bundle, or for a board one that is not whole.
        DeviceError: the board cannot be reached or used.
    """
    asked = None if target is None else read_target(target).model_dump(mode="json")
    if bundle is not None:
        Bundle(bundle).read()
    if host is not None:
        try:
            return run_on_board(
                host, "doctor", [], bundle=bundle, target=asked, ssh_options=ssh_options, report=report
            )
        except OnboardError as error:
            where = {"board": host} if bundle is None else {"bundle": bundle, "board": host}
            raise error_from_onboard(error, where=where) from error
    from edgecl.onboard.doctor import doctor as doctor_onboard

    found = doctor_onboard(bundle, target=asked)
    if bundle is None and target is None:
        found["checks"].append(_check_ssh())
    return found


def _check_ssh() -> dict[str, Any]:
    program = shutil.which("ssh")
    status, fix = ("ok", None) if program else ("warn", "sudo apt install openssh-client  # for --host")
    return {"name": "ssh", "status": status, "found": program or "not on the PATH", "fix": fix}
