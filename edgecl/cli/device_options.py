"""Options of the commands that run on a device, spelled once."""

from typing import Annotated, Literal

import typer

PrecisionOption = Annotated[
    list[str] | None,
    typer.Option("--precision", metavar="P[,P]", help="fp32, fp16, int8 of those in the bundle. Repeatable."),
]
RuntimeOption = Annotated[
    Literal["ort", "openvino", "tensorrt", "tensorrt_rtx", "trtexec"] | None,
    typer.Option("--runtime", help="Instead of the one the bundle is made for."),
]
# trtexec tells how long a net takes, not what it answers.
VerifyRuntimeOption = Annotated[
    Literal["ort", "openvino", "tensorrt", "tensorrt_rtx"] | None,
    typer.Option("--runtime", help="Instead of the one the bundle is made for."),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        metavar="USER@BOARD[:PORT]",
        help="A board to do it on, over ssh; its key must be known and no password asked.",
    ),
]


def split_precisions(words: list[str] | None) -> list[str] | None:
    """Return the precisions that options such as `--precision fp32,int8` name, each once, or None for none."""
    names = [name for word in words or [] for name in word.replace(" ", "").split(",") if name]
    for name in names:
        if name not in ("fp32", "fp16", "int8"):
            raise typer.BadParameter(f"'{name}' is not fp32, fp16 or int8", param_hint="--precision")
    if words and not names:
        raise typer.BadParameter("names no precision", param_hint="--precision")
    return list(dict.fromkeys(names)) or None
