"""Options of the commands that run on a device, spelled once."""

from typing import Annotated

import typer

PrecisionOption = Annotated[
    list[str] | None,
    typer.Option("--precision", metavar="P[,P]", help="fp32, fp16, int8 of those in the bundle. Repeatable."),
]


def _known_runtime(name: str | None) -> str | None:
    from edgecl.onboard.runtimes import option_names

    if name is not None and name not in option_names():
        raise typer.BadParameter(f"'{name}' is not one of {', '.join(option_names())}")
    return name


def _known_to_bench(name: str | None) -> str | None:
    from edgecl.onboard.runtimes import TRTEXEC

    return name if name == TRTEXEC else _known_runtime(name)


_RUNTIME_HELP = "Instead of the one the bundle is made for (`edgecl ls runtimes`)"
RuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--runtime", metavar="NAME", callback=_known_to_bench, help=f"{_RUNTIME_HELP}, or `trtexec`."
    ),
]
# trtexec measures how long a net takes; it gives no outputs.
VerifyRuntimeOption = Annotated[
    str | None,
    typer.Option("--runtime", metavar="NAME", callback=_known_runtime, help=f"{_RUNTIME_HELP}."),
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
    from edgecl.onboard.bundle import PRECISIONS

    names = [name for word in words or [] for name in word.replace(" ", "").split(",") if name]
    for name in names:
        if name not in PRECISIONS:
            raise typer.BadParameter(
                f"'{name}' is not one of {', '.join(PRECISIONS)}", param_hint="--precision"
            )
    if words and not names:
        raise typer.BadParameter("names no precision", param_hint="--precision")
    return list(dict.fromkeys(names)) or None
