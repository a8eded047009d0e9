"""The command line: every command in one visible list, and every error as a text, not a stack."""

import errno
import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from edgecl import __version__
from edgecl.cli.bench import bench_command
from edgecl.cli.carve import carve_command
from edgecl.cli.cost import cost_command
from edgecl.cli.doctor import doctor_command
from edgecl.cli.export import export_command
from edgecl.cli.finetune import finetune_command
from edgecl.cli.ls import ls_command
from edgecl.cli.pretrain import pretrain_command
from edgecl.cli.probe import probe_command
from edgecl.cli.report import ReportCommand, report_command
from edgecl.cli.run import demo_command, run_command
from edgecl.cli.selftest import selftest_app
from edgecl.cli.verify import verify_command

# What a shell reports of a program that Ctrl-C ended.
INTERRUPTED = 130
# ... and of one that SIGTERM ended.
TERMINATED = 143
RESUMABLE = ("pretrain", "run", "demo")

app = typer.Typer(
    name="edgecl",
    help="Train, then compile: small vision networks from unlabelled images, measured on the device that runs them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: loading rich for it would take longer than all the rest of the start.
    rich_markup_mode=None,
)
app.command("ls")(ls_command)
app.command("run")(run_command)
app.command("demo")(demo_command)
app.command("pretrain")(pretrain_command)
app.command("carve")(carve_command)
app.command("probe")(probe_command)
app.command("finetune")(finetune_command)
app.command("cost")(cost_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("bench")(bench_command)
app.command("doctor")(doctor_command)
app.command("report", cls=ReportCommand)(report_command)
app.add_typer(selftest_app, name="selftest")


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
    _root.debug = debug  # type: ignore[attr-defined]
    _root.verb = context.invoked_subcommand  # type: ignore[attr-defined]


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as an exception, so that processes here and on boards are stopped and partial files removed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one shall not break that off
    raise SystemExit(TERMINATED)


def main() -> None:
    """Run the command line.

    Exit 0 when done (also when SIGTERM let a run save and end), 1 on a named error, 2 on wrong usage, 130 and 143 on
    SIGINT and SIGTERM otherwise. Of the processes of one run, one shows an error.
    """
    from edgecl import processes
    from edgecl.errors import EdgeclError, Preempted

    # OpenMP threads of torch's build wait for each other by spinning for milliseconds; where another program has one
    # of the cores, training then slows down tenfold or more. A short spin costs nothing on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Preempted as end:
        if processes.is_main():
            sys.stdout.write(f"{end}\n")
        if end.signal == signal.SIGINT:
            # What the shell would run next needs the whole run.
            raise SystemExit(INTERRUPTED) from None
    except EdgeclError as error:
        if getattr(_root, "debug", False):
            raise
        if processes.claim_report():
            sys.stderr.write(f"edgecl: {error}\n")
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
    except SystemExit as stop:
        # typer turns Ctrl-C into this exit before anyone can catch it.
        if stop.code in (INTERRUPTED, TERMINATED) and processes.is_main():
            resumable = getattr(_root, "verb", None) in RESUMABLE
            hint = "; --resume goes on from what was saved, if anything was" if resumable else ""
            sys.stderr.write(f"edgecl: {'interrupted' if stop.code == INTERRUPTED else 'terminated'}{hint}\n")
        raise
    except OSError as complaint:
        if complaint.errno != errno.ENOSPC:
            raise
        sys.stderr.write("edgecl: no room on the disk for the output\n")
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        processes.leave()


def program() -> None:
    """Run the command line as a process of its own.

    One that Ctrl-C ended dies of that signal, once all is written: a shell, which reports 130, then ends its script or its
    loop too. After an ordinary exit it would start the next command.
    """
    try:
        main()
    except SystemExit as stop:
        if stop.code == INTERRUPTED and os.name == "posix":
            sys.stdout.flush()
            sys.stderr.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        raise
