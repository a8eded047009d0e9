"""`edgecl predict`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecl.cli.device_options import VerifyRuntimeOption
from edgecl.cli.options import ForceOption, JsonOption, Precision

if TYPE_CHECKING:
    from edgecl.storage.records import Predictions


def predict_command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR|BUNDLE",
            help="A classifier that `edgecl finetune` wrote, or a bundle of one.",
            show_default=False,
        ),
    ],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="What to look at.", show_default=False)
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to name of each picture.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A .csv or .jsonl to write, a line a picture."),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="Which net of a bundle to run [default: its own]")
    ] = None,
    runtime: VerifyRuntimeOption = None,
    json_: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Name what is on pictures; exit 1 if one of them cannot be read, after the others."""
    from edgecl.cli.output import print_json, print_line
    from edgecl.deploy.predict import predict
    from edgecl.errors import counted, tell

    record = predict(
        model, pictures, top=top, out=out, precision=precision, runtime=runtime, force=force, say=tell
    )
    if json_:
        print_json(record)
    elif out is None:
        _print_pictures(record)
    else:
        print_line(f"{counted(record.images, 'picture')} -> {out}")
    if record.unreadable:
        tell(f"{record.unreadable:,} of {record.images:,} pictures could not be read")
        raise typer.Exit(1)


def _print_pictures(record: "Predictions") -> None:
    from edgecl.cli.output import print_line

    for one in record.predictions:
        named = "  ".join(f"{guess.name} {guess.score:.1%}" for guess in one.top)
        print_line(f"{one.file}: {named or f'unreadable: {one.problem}'}")
