"""`edgecl watch`."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_PORT = 8470


def watch_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.", show_default=False)],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="On this machine alone; 0 takes a free one.")
    ] = DEFAULT_PORT,
) -> None:
    """Show a run in a browser on this machine while it trains."""
    from edgecl.cli.output import print_line
    from edgecl.reports.watch import watch

    with watch(run_dir, port=port) as server:
        print_line(
            f"http://{server.server_address[0]!s}:{server.server_port}/ shows {run_dir}; Ctrl-C ends it"
        )
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
