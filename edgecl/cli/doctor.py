"""`edgecl doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.device_options import HostOption
from edgecl.cli.options import JsonOption


def doctor_command(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="A bundle to run on the device.")
    ] = None,
    host: HostOption = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="NAME", help="A target to check the device for, without a bundle."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Check what would fail on this machine or on a board, and how to fix it."""
    from edgecl.cli.output import print_json, print_line, status_line
    from edgecl.deploy.device import doctor

    if bundle is not None and target is not None:
        raise typer.BadParameter("give BUNDLE, which has its own target, or --target", param_hint="--target")
    with status_line() as report:
        record = doctor(bundle, target=target, host=host, report=report)
    if json_:
        print_json(record)
    else:
        device = record.device
        about = [device.name, device.os, f"JetPack {device.jetpack}" if device.jetpack else None]
        print_line(", ".join(part for part in about if part))
        width = max(len(check.name) for check in record.checks)
        for check in record.checks:
            status = "FAIL" if check.status == "fail" else check.status
            print_line(f"{status:<4}  {check.name:<{width}}  {check.found}")
            if check.fix:
                print_line(f"{'':<{width + 8}}-> {check.fix}")
    if not record.ok:
        raise typer.Exit(1)
