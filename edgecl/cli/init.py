"""`edgecl init`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.options import ForceOption, JsonOption


def init_command(
    photos: Annotated[str, typer.Argument(metavar="PHOTOS", help="A folder of images, or another data URI.")],
    out: Annotated[Path, typer.Option("--out", help="The recipe to write, a .toml file.")],
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="URI", help="Labelled images, to be looked for among the others."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="NAME", help="What the net is for (`edgecl ls targets`), or a TOML file."
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            "--hours",
            min=0.01,
            max=10_000,
            help="That training may take on this machine [default: the recipe's epochs]",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="PATH", help="Weights to start from, as [host] init takes them."),
    ] = None,
    force: ForceOption = False,
    json_: JsonOption = False,
) -> None:
    """Write a recipe for a folder of pictures and this machine."""
    from edgecl.cli.output import print_json, print_line
    from edgecl.evaluate.init import init

    found = init(photos, out=out, labels=labels, target=target, hours=hours, weights=weights, force=force)
    if json_:
        print_json(found)
        return
    for line in out.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        print_line(line[2:])
    print_line(f"\n-> {out}")
