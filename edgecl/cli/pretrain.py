"""`edgecl pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.options import (
    DataOption,
    DeviceOption,
    DownloadOption,
    ForceOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    refuse_both,
)


def pretrain_command(
    recipe: RecipeArgument,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory [default: runs/RECIPE]")] = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="KEY",
            help="With --resume: a setting that may differ, e.g. run.epochs. Repeatable.",
        ),
    ] = None,
    force: ForceOption = False,
    download: DownloadOption = False,
) -> None:
    """Pretrain from unlabelled images."""
    refuse_both(resume=resume, force=force)
    import shlex

    from edgecl.cli.output import print_line
    from edgecl.config.recipe import read_recipe, recipe_name
    from edgecl.distributed import processes

    # First, so that an error of any process is shown once.
    processes.join(device)
    name = recipe_name(recipe)
    settings = read_recipe(recipe, set_)
    out = out or Path("runs") / name
    from edgecl.train.pretrain import pretrain

    record = pretrain(
        settings,
        recipe_name=name,
        out=out,
        data=data,
        device=device,
        resume=resume,
        allow=allow or (),
        force=force,
        download=download,
    )
    if not processes.is_main():
        return
    print_line(
        f"{record.method} on {record.data.images} images: {record.total_steps} steps "
        f"in {record.wall_s:.0f} s; next: edgecl carve {shlex.quote(str(out))} --out MODEL_DIR"
    )
    if plateau := record.plateau:
        # Last, where it is read.
        print_line(f"{plateau.words} Before you use this net, start anew: {plateau.hint}.")
