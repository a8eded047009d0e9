"""The command line: every error as a text, not a stack, from the first import to the last write.

The commands are listed in `edgecl.cli.commands`, which is imported within `main`: Ctrl-C may come while it is.
"""

import errno
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# What a shell reports of a program that Ctrl-C ended.
INTERRUPTED = 130
# ... and of one that SIGTERM ended.
TERMINATED = 143
RESUMABLE = ("pretrain", "run", "demo")


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as an exception, so that processes here and on boards are stopped and partial files removed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one shall not break that off
    raise SystemExit(TERMINATED)


def _prepare_streams() -> None:
    """Give streams that are closed an end, and let none fail over a letter it has no code for."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one: else the next file opened would get what is printed.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - until the end
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line.

    Exit 0 when done (also when SIGTERM let a run save and end), 1 on a named error, 2 on wrong usage, 130 and 143 on
    SIGINT and SIGTERM otherwise. Of the processes of one run, one shows an error.
    """
    # OpenMP threads of torch's build wait for each other by spinning for milliseconds; where another program has one
    # of the cores, training then slows down tenfold or more. A short spin costs nothing on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _prepare_streams()
        Path.cwd()  # where it is gone, libraries end the process in words of their own
        from edgecl.cli.commands import app

        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        # During the imports; later typer turns it into an exit before anyone can catch it.
        _say_ended(INTERRUPTED)
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as stop:
        if stop.code in (INTERRUPTED, TERMINATED):
            _say_ended(int(stop.code))
        raise
    except Exception as problem:
        code = _say_problem(problem)
        if code is None:
            raise
        if code:
            raise SystemExit(code) from None
    finally:
        from edgecl.distributed import processes

        signal.signal(signal.SIGTERM, before)
        processes.leave()


def _say_ended(code: int) -> None:
    """Say that a signal ended the command, and for a run how it goes on."""
    from edgecl.distributed import processes

    if processes.is_main():
        commands = sys.modules.get("edgecl.cli.commands")  # it may not have been imported yet
        resumable = getattr(getattr(commands, "given", None), "verb", None) in RESUMABLE
        hint = "; --resume goes on from what was saved, if anything was" if resumable else ""
        sys.stderr.write(f"edgecl: {'interrupted' if code == INTERRUPTED else 'terminated'}{hint}\n")


def _say_problem(problem: Exception) -> int | None:
    """Say what ended the command, where that has a name; return the exit code, or None for what needs its stack."""
    from edgecl.cli.commands import given
    from edgecl.distributed import processes
    from edgecl.errors import EdgeclError, Preempted, tell

    if isinstance(problem, Preempted):
        if processes.is_main():
            sys.stdout.write(f"{problem}\n")
        # What the shell would run next needs the whole run.
        return INTERRUPTED if problem.signal == signal.SIGINT else 0
    if given.debug:
        return None
    if isinstance(problem, (OSError, MemoryError)):
        problem = _named(problem)
    if not isinstance(problem, EdgeclError):
        return None
    if processes.claim_report():
        tell(str(problem))
    return 1


def _named(problem: OSError | MemoryError) -> Exception:
    """Return an error of the system as one of edgecl's: the reason, and the file where there is one."""
    from edgecl.errors import EdgeclError

    if isinstance(problem, MemoryError):
        return EdgeclError("not enough memory", hint="`edgecl --debug` before the command shows where")
    if problem.errno == errno.ENOSPC:
        return EdgeclError("no room on the disk for the output")
    if isinstance(problem, FileNotFoundError) and problem.filename is None:
        return EdgeclError("the working directory is gone", hint="`cd` to one that is there")
    reason = problem.strerror or str(problem) or type(problem).__name__
    file = os.fsdecode(problem.filename) if isinstance(problem.filename, (str, bytes)) else problem.filename
    where = {} if file is None else {"file": file}
    hint = None if where else "`edgecl --debug` before the command shows where"
    return EdgeclError(reason[:1].lower() + reason[1:], where=where, hint=hint)


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
