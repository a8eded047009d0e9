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
        typer.Option(
            "--labels", metavar="URI", help="Labelled images to learn from later; looked for among PHOTOS."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="URI", help="Held-out labelled images; looked for in place of those."),
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
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="NAME",
            help="timm's name of the net that a file of weights is of [default: that of the recipe `continue`]",
        ),
    ] = None,
    force: ForceOption = False,
    json_: JsonOption = False,
) -> None:
    """Write a recipe for a folder of pictures and this machine."""
    from edgecl.cli.output import print_json, print_line
    from edgecl.evaluate.init import init

    found = init(
        photos,
        out=out,
        labels=labels,
        test=test,
        target=target,
        hours=hours,
        weights=weights,
        arch=arch,
        force=force,
    )
    if json_:
        print_json(found)
        return
    for line in out.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        print_line(line[2:])
    print_line(f"\n-> {out}")
