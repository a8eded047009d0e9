"""Every command in one visible list."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from edgecl import __version__
from edgecl.cli.bench import bench_command
from edgecl.cli.carve import carve_command
from edgecl.cli.cost import cost_command
from edgecl.cli.doctor import doctor_command
from edgecl.cli.export import export_command
from edgecl.cli.finetune import finetune_command
from edgecl.cli.init import init_command
from edgecl.cli.ls import ls_command
from edgecl.cli.pick import pick_command
from edgecl.cli.predict import predict_command
from edgecl.cli.pretrain import pretrain_command
from edgecl.cli.probe import probe_command
from edgecl.cli.publish import publish_command
from edgecl.cli.report import ReportCommand, report_command
from edgecl.cli.run import demo_command, run_command
from edgecl.cli.selftest import selftest_app
from edgecl.cli.verify import verify_command
from edgecl.cli.watch import watch_command


@contextlib.contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        from edgecl.errors import bounded, printable

        if hasattr(problem, "format_message"):  # an error of usage, whichever library's typer builds on
            problem.message = printable(bounded(problem.message))  # type: ignore[attr-defined]
        raise


class Root(typer.core.TyperGroup):
    """`edgecl`, whose errors of usage are printable: a shell's `*` may stand for a stranger's file name."""

    def make_context(self, *args: Any, **named: Any) -> Any:
        """Read the words before the command."""
        with _printable_usage():
            return super().make_context(*args, **named)

    def invoke(self, ctx: Any) -> Any:
        """Read the command's own words, and run it."""
        with _printable_usage():
            return super().invoke(ctx)


app = typer.Typer(
    name="edgecl",
    cls=Root,
    help="Train, then compile: small vision networks from unlabelled images, measured on the device that runs them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: loading rich for it would take longer than all the rest of the start.
    rich_markup_mode=None,
)
app.command("ls")(ls_command)
app.command("init")(init_command)
app.command("run")(run_command)
app.command("demo")(demo_command)
app.command("pretrain")(pretrain_command)
app.command("watch")(watch_command)
app.command("carve")(carve_command)
app.command("probe")(probe_command)
app.command("pick")(pick_command)
app.command("finetune")(finetune_command)
app.command("cost")(cost_command)
app.command("predict")(predict_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("bench")(bench_command)
app.command("doctor")(doctor_command)
app.command("publish")(publish_command)
app.command("report", cls=ReportCommand)(report_command)
app.add_typer(selftest_app, name="selftest")


class Given:
    """What was given to `edgecl` itself, before the command's own options."""

    debug: bool = False
    verb: str | None = None


given = Given()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgecl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    given.debug, given.verb = debug, context.invoked_subcommand
