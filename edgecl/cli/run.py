"""`edgecl run` and `edgecl demo`, which is `edgecl run demo`."""

from pathlib import Path
from typing import Annotated

import typer

from edgecl.cli.device_options import split_precisions
from edgecl.cli.options import (
    DataOption,
    DeviceOption,
    DownloadOption,
    ExportPrecisionOption,
    ForceOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    TargetsOption,
    TestOption,
    refuse_both,
)


def run_command(
    recipe: RecipeArgument,
    data: DataOption = None,
    test: TestOption = None,
    target: TargetsOption = None,
    precision: ExportPrecisionOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to write [default: runs/RECIPE]")
    ] = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    force: ForceOption = False,
    download: DownloadOption = False,
) -> None:
    """Go the whole road, from images to report."""
    refuse_both(resume=resume, force=force)
    from edgecl.config.recipe import read_recipe, recipe_name

    name = recipe_name(recipe)
    settings = read_recipe(recipe, set_)
    out = out or Path("runs") / name
    from edgecl.cli.output import print_line
    from edgecl.cli.report import print_report
    from edgecl.errors import tell
    from edgecl.pipeline import run
    from edgecl.storage.directories import PipelineDir, ReportDir

    record = run(
        settings,
        recipe_name=name,
        out=out,
        data=data,
        test=test,
        targets=target or ["ort-cpu"],
        precisions=split_precisions(precision),
        device=device,
        resume=resume,
        force=force,
        download=download,
        say=tell,
    )
    print_report(record.report)
    print_line(f"report: {ReportDir(PipelineDir(out).report).page_file}")


def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("edgecl-demo"),
    resume: ResumeOption = False,
    force: ForceOption = False,
) -> None:
    """Go the whole road on pictures edgecl draws."""
    run_command("demo", out=out, precision=["fp32,int8"], resume=resume, force=force, device="cpu")
