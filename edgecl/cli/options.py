"""Options that several commands share, spelled once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A packaged recipe (`edgecl ls recipes`) or a TOML file.")
]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A directory that `edgecl carve` or `finetune` wrote.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="URI",
        help="A folder of images, `demo`, shards:PATTERN, csv:FILE, or e.g. cifar10:PATH (`edgecl ls datasets`).",
    ),
]
LabelledOption = Annotated[
    str,
    typer.Option(
        "--data", metavar="URI", help="Labelled images to learn from: class folders, `demo`, cifar10:PATH, …"
    ),
]
TestOption = Annotated[
    str | None,
    typer.Option(
        "--test",
        metavar="URI",
        help="Held-out labelled images [default: the set's own test split, or a fifth held out]",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. optim.lr=0.2. Repeatable."),
]
TargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="NAME", help="A packaged target or a TOML file. Repeatable. [default: ort-cpu]"
    ),
]
ExportPrecisionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        metavar="P[,P]",
        help="fp32, fp16, int8, the preferred one first. Repeatable. [default: the target's]",
    ),
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to train; auto takes a GPU when there is one.")
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Let torchvision fetch a data set that is not there.")
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on where an earlier command stopped; start where there is none."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier output.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON value.")]


def refuse_both(*, resume: bool, force: bool) -> None:
    """Refuse `--resume` beside `--force`: one keeps what the other removes."""
    if resume and force:
        raise typer.BadParameter("--resume goes on, --force starts anew: give one")
