"""`edgecl selftest`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from edgecl.cli.options import Device, JsonOption

if TYPE_CHECKING:
    from edgecl.storage.records import SelftestReport

selftest_app = typer.Typer(
    help="Try on this machine what a result rests on.", no_args_is_help=True, rich_markup_mode=None
)


@selftest_app.callback()
def _selftest() -> None:
    """Keep `ddp` a command of its own while it is the only one."""


@selftest_app.command("ddp")
def ddp_command(
    count: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            help="How many to start on this machine [default: one per GPU; two on the CPU with fewer than two GPUs]",
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option("--device", help="auto takes a GPU per process when there are.")
    ] = "auto",
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME",
            help="Only this way to train: a method (`edgecl ls methods`), or a variant of SACL-XD as the table of all names "
            "it. Repeatable. [default: all]",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Compare gradients under many processes with those of one process, for every way to train.

    Alone it starts the processes on this machine; under torchrun, also over several machines, it uses those that are there.
    """
    from edgecl.cli.output import status_line
    from edgecl.distributed import processes
    from edgecl.errors import RecipeError
    from edgecl.train.selftest import STATUS, chosen_variants, compare, launch

    try:
        chosen_variants(variant or ())
    except RecipeError as exc:
        raise typer.BadParameter(f"{exc.problem}; {exc.hint}", param_hint="--variant") from exc
    if not processes.is_launched():
        with status_line() as report:
            record = launch(count=count, device=device, report=report, names=variant or ())
    elif count not in (None, processes.world_size()):
        raise typer.BadParameter(
            f"the launcher has started {processes.world_size()} processes", param_hint="--processes"
        )
    else:
        main = processes.is_main()

        def say(line: str) -> None:
            if main:
                sys.stderr.write(f"{STATUS}{line}\n")
                sys.stderr.flush()

        record = compare(device=device, report=say, names=variant or ())
    if processes.is_main():
        _print(record, as_json=json_)
    if not record.exact:
        raise typer.Exit(1)


def _print(record: "SelftestReport", *, as_json: bool) -> None:
    from edgecl.cli.output import print_json, print_rows

    if as_json:
        print_json(record)
        return

    def shown(value: float | None) -> str:
        return "not a number" if value is None else f"{value:.1e}"

    print_rows(
        f"{record.processes} processes on {', '.join(record.hosts)} ({record.device}, {record.backend}) "
        f"against one: largest relative differences, allowed {record.tolerance:g}",
        ["variant", "loss", "gradients", "running statistics", "decision"],
        [
            (
                row.variant,
                *map(shown, (row.loss, row.gradients, row.statistics)),
                "exact" if row.exact else "DIFFERS",
            )
            for row in record.variants
        ],
    )
