"""`edgecl carve`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.options import ForceOption


def carve_command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR|RECIPE.toml",
            help="A directory that `edgecl pretrain` wrote; or a recipe, for the weights that it starts from.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Model directory to write.")],
    width: Annotated[
        float | None,
        typer.Option(
            "--width",
            help="A trained width: a slim one, or the host's for the host itself "
            "[default: the widest slim one, usually 1.0]",
        ),
    ] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="Take the checkpoint with the best features (kNN or, without labels, RankMe), not the newest.",
        ),
    ] = False,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate/--no-recalibrate",
            help="Re-estimate batch-norm statistics on the run's own images; without, a bit-for-bit copy.",
        ),
    ] = True,
    force: ForceOption = False,
) -> None:
    """Carve a slim net out of its host: a plain timm net."""
    from edgecl.cli.output import print_line
    from edgecl.train.carve import carve

    record = carve(
        run,
        out=out,
        width=width,
        checkpoint="best" if best else "newest",
        recalibrate_norms=recalibrate,
        force=force,
    )
    step = "as given" if record.step is None else f"step {record.step:,}"
    print_line(
        f"{record.arch} at width {record.width:g}, {step}: "
        f"{record.params:,} parameters, {record.features} features -> {out}"
    )
