"""Real processes of one run, over gloo on the loopback, as a launcher would start them."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    condition: Callable[[], object], *processes: subprocess.Popen[str], limit_s: float = 120
) -> None:
    """Wait for something that these processes bring about."""
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "never happened"
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def fork_world(main: Callable[[], None], world_size: int) -> None:
    """Run a function in so many processes; for scripts, where all has been imported and nothing computed yet.

    Importing torch takes seconds, and a fork has it already.
    """
    port = free_port()
    gc.freeze()  # or the collector would touch, and so copy, all the memory the processes share
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(launcher_environment(rank, world_size, port))
                main()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    gc.unfreeze()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world_size, codes


def run_script(script: Path, *words: object, timeout_s: float = 600) -> str:
    """Run a script that starts worlds, hold it to exit code 0, and return what it printed; none is left behind."""
    with subprocess.Popen(
        [sys.executable, str(script), *map(str, words)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "EDGECL_WAIT_S": "300",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return out
