"""`edgecl verify`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.device_options import HostOption, PrecisionOption, VerifyRuntimeOption, split_precisions
from edgecl.cli.options import JsonOption


def verify_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory that `edgecl export` wrote.")],
    precision: PrecisionOption = None,
    runtime: VerifyRuntimeOption = None,
    host: HostOption = None,
    json_: JsonOption = False,
) -> None:
    """Check a bundle, here or on a board: every file's hash, and the reference outputs in every precision."""
    from edgecl.cli.output import print_json, print_rows, status_line
    from edgecl.deploy.device import verify

    precisions = split_precisions(precision)
    with status_line() as report:
        record = verify(bundle, precisions=precisions, runtime=runtime, host=host, report=report)
    if json_:
        print_json(record)
        return
    rows = []
    for name, found in record.precisions.items():
        difference, agreement, allowed = found.max_relative_difference, found.top1_agreement, found.tolerance
        if difference is None or agreement is None or allowed is None:
            continue
        most, least = allowed.max_relative_difference, allowed.top1_agreement
        rows.append((name, "largest relative difference", f"{difference:.2g}", f"<= {most:.2g}"))
        rows.append((name, "top-1 agreement", f"{agreement:.4g}", f">= {least:.4g}"))
    print_rows(
        f"{bundle}: hashes match; {record.runtime} against torch on {record.images} real images",
        ["precision", "check", "found", "allowed"],
        rows,
    )
