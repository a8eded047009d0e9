"""`edgecl verify`."""

from pathlib import Path
from typing import Annotated

import typer


def verify_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory that `edgecl export` wrote.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Check a bundle: every file's hash, and the reference outputs."""
    from edgecl.cli.output import print_json, print_rows
    from edgecl.deploy.verify import verify

    record = verify(bundle)
    if json_:
        print_json(record)
        return
    tolerance = record["tolerance"]
    print_rows(
        f"{bundle}: verified with {record['runtime']} ({record['precision']})",
        ["check", "found", "allowed"],
        [
            ("hashes", "match", "match"),
            (
                "largest relative difference",
                f"{record['max_relative_difference']:.2g}",
                f"<= {tolerance['max_relative_difference']:.2g}",
            ),
            ("top-1 agreement", f"{record['top1_agreement']:.4g}", f">= {tolerance['top1_agreement']:.4g}"),
            ("images", record["images"], ""),
        ],
    )
