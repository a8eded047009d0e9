"""`edgecl pick`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.options import ForceOption, JsonOption


def pick_command(
    photos: Annotated[str, typer.Argument(metavar="PHOTOS", help="A folder of images, or another data URI.")],
    model: Annotated[
        Path,
        typer.Option("--model", metavar="MODEL_DIR", help="The net that tells which pictures are alike."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="List to write, .csv, .jsonl or .txt; a page to look at lies beside it, as .html."
        ),
    ],
    count: Annotated[int, typer.Option("--count", min=1, max=100_000, help="How many to pick.")] = 200,
    force: ForceOption = False,
    json_: JsonOption = False,
) -> None:
    """Pick the pictures to label first; exit 1 if one of them all cannot be read, after the list is written."""
    from edgecl.cli.output import print_json, print_line
    from edgecl.errors import counted
    from edgecl.evaluate.pick import pick

    picked = pick(photos, model=model, count=count, out=out, force=force)
    readable = [one for one in picked if one.readable]
    if json_:
        print_json(picked)
    else:
        alone = sum(one.order is None for one in readable)
        print_line(
            f"{counted(len(readable) - alone, 'picture')} to label, {counted(alone, 'outlier')} named -> {out}, "
            f"{out.with_suffix('.html')}"
        )
    if len(readable) < len(picked):
        raise typer.Exit(1)
