"""The processes of one run: joining them, what they must agree on, and one error shown once.

torch.distributed is the engine; torchrun or `accelerate launch` start the processes and say in the environment who is who.
torch is imported only where there is more than one process.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from edgecl.distributed.rendezvous import meet
from edgecl.errors import DeviceError, ProcessError, RecipeError, first_line

_T = TypeVar("_T")

WAIT_VARIABLE = "EDGECL_WAIT_S"
DEFAULT_WAIT_S = 600.0

# A process that fails reports it; the others wait this long before they report it instead.
_PATIENCE_S = 3.0
_REPORT_KEY = "edgecl/reported"
# An agent that holds a store is on this machine or has just answered; longer than this it is not there.
_AGENT_S = 10.0
# How gloo, NCCL and the store word that the other side is gone or silent.
_LOST = re.compile(
    r"closed by peer|connection reset|broken pipe|connection refused|timed? ?out|remote process|"
    r"socket closed|recv, \d+|failed to recv|nccl|gloo",
    re.IGNORECASE,
)

_store: Any = None
# The names of this attempt and of the first one of the launch, drawn by chance.
_attempt: str | None = None
_launch: str | None = None
# True if each process sees only its own GPU, so that one may fail alone.
_on_its_own = False


def world_size() -> int:
    """Return how many processes the run has."""
    group = _group()
    return int(group.get_world_size()) if group else _from_launcher("WORLD_SIZE", 1)


def rank() -> int:
    """Return which of the processes this is, from 0."""
    group = _group()
    return int(group.get_rank()) if group else _from_launcher("RANK", 0)


def is_main() -> bool:
    """Return whether this is the process that writes and prints."""
    return rank() == 0


def wait_s() -> float:
    """Return the longest wait for another process, seconds: EDGECL_WAIT_S, or ten minutes.

    Raises:
        DeviceError: EDGECL_WAIT_S is no positive number.
    """
    text = os.environ.get(WAIT_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_WAIT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise DeviceError(f"{WAIT_VARIABLE} is {text!r}, not a number of seconds above 0")
    return seconds


def check_device(device: str) -> None:
    """Check that there is a GPU where one is asked for.

    Raises:
        DeviceError: there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available", hint="use --device auto or --device cpu")


def launch() -> str | None:
    """Return the name of this launch, drawn by chance, the same in all its processes and all its attempts; see `join`.

    A launch lives as long as the agent of torchrun that holds its store; where none does, every attempt is a launch of
    its own. None before `join`, where one process under torchrun cannot reach its agent, and where the caller has set
    up torch.distributed itself.
    """
    return _launch


def started_again() -> bool:
    """Return whether an earlier attempt of this launch had met already; torchrun's own count differs between machines."""
    return _launch != _attempt


def join(device: str = "auto") -> None:
    """Meet the other processes that a launcher started: NCCL between GPUs, gloo between CPUs; alone, do nothing.

    One process that torchrun started meets nobody; it only asks torchrun's agent for the name of the launch.

    Raises:
        DeviceError: more processes than GPUs on this machine.
        ProcessError: the others did not come.
    """
    global _store, _attempt, _launch, _on_its_own
    if world_size() == 1:
        if _launch is None and is_launched() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            from torch.distributed.rendezvous import rendezvous

            # Best effort: without a name there is just no automatic resume.
            with contextlib.suppress(RuntimeError, ValueError):
                store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_AGENT_S)))
                _attempt, _launch = meet(store, 0, 1, limit_s=_AGENT_S)
        return
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        _store = _store or distributed.distributed_c10d._get_default_store()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        _take_gpu()
    limit_s = wait_s()
    limit = timedelta(seconds=limit_s)
    _on_its_own = True
    try:
        store, number, count = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        _attempt, _launch = meet(store, number, count, limit_s=limit_s)
        # Kept, since the group may be gone, or never come to be, when an error is to be shown.
        _store = PrefixStore(f"edgecl/{_attempt}", store)
        distributed.init_process_group(
            # gloo beside NCCL: small decisions on the CPU need no kernel.
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=_store,
            rank=number,
            world_size=count,
            timeout=limit,
        )
    except (RuntimeError, ValueError, OSError) as exc:
        raise ProcessError(
            f"the {world_size()} processes of the run did not find each other: "
            f"{first_line(exc) or type(exc).__name__}",
            where={
                "this process": f"{rank()} of {world_size()} on {os.uname().nodename}",
                "meeting point": f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            },
            hint="start them with torchrun, with the same --rdzv-endpoint on every machine",
        ) from exc


def _take_gpu() -> None:
    """Select the GPU of this process's number; refuse in all processes of the machine alike, before any of them waits.

    Raises:
        DeviceError: more processes than GPUs on this machine.
    """
    global _on_its_own
    import torch

    number, gpus = _from_environment("LOCAL_RANK", 0), torch.cuda.device_count()
    need = max(number + 1, _from_environment("LOCAL_WORLD_SIZE", 1))
    if re.fullmatch("[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        # Perhaps each process was given its own, as number 0 (torchrun --virtual-local-rank): each can evaluate only itself.
        _on_its_own, need = True, number + 1
    if need > gpus:
        raise DeviceError(
            f"{need} processes on this machine need as many GPUs, it has {gpus}",
            hint="start as many processes per machine as it has GPUs (--nproc-per-node), or use --device cpu",
        )
    torch.cuda.set_device(number)


def leave() -> None:
    """Part from the other processes, so that the interpreter can end quietly."""
    group = _group()
    if group:
        with contextlib.suppress(Exception):
            group.destroy_process_group()


def from_main(value: _T) -> _T:
    """Return the main process's value in every process."""
    if world_size() == 1:
        return value
    from torch import distributed

    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def agree(facts: Mapping[str, str]) -> None:
    """Check that all processes have the same facts, e.g. the hash of the recipe.

    Raises:
        RecipeError: in every process, naming the first that differs, the fact and both values.
    """
    if world_size() == 1:
        return
    from torch import distributed

    everyone: list[Any] = [None] * world_size()
    distributed.all_gather_object(everyone, (os.uname().nodename, dict(facts)))
    _, expected = everyone[0]
    for number, (host, found) in enumerate(everyone):
        for name, value in found.items():
            if value != expected.get(name):
                raise RecipeError(
                    f"process {number} does not see the same {name} as process 0",
                    where={
                        f"process 0 on {everyone[0][0]}": expected.get(name),
                        f"process {number} on {host}": value,
                    },
                    hint="give every process the same recipe, the same --set and the same images",
                )


@contextlib.contextmanager
def explain_lost_peers() -> Iterator[None]:
    """Turn a collective that failed because another process is gone into a named error, with the memory figures."""
    try:
        yield
    except RuntimeError as exc:
        first = first_line(exc)
        if world_size() == 1 or not _LOST.search(first):
            raise
        if threading.current_thread() is threading.main_thread():
            # A launcher that saw the same may already be ending the others: report what is known first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _wait_for_a_report()
        problem, hint = (
            "ended without a word",
            "a process that the system killed was most often out of memory (see `dmesg`): lower [data] batch_size or "
            "cache_mib, or start fewer processes per machine; then go on with --resume",
        )
        if re.search("timed? ?out", first, re.IGNORECASE):
            problem, hint = (
                f"did not answer for {wait_s():g} s",
                "it was stopped, its machine swaps or hangs, or the network between is dead: look at the run's "
                f"machines, then go on with --resume. {WAIT_VARIABLE} sets the wait",
            )
        raise ProcessError(
            f"another process of the run {problem}",
            where={
                "this process": f"{rank()} of {world_size()} on {os.uname().nodename}",
                "memory": memory_figures(),
                "seen": first,
            },
            hint=hint,
        ) from exc


def claim_report() -> bool:
    """Return whether this process is the one to show its error: the first that asks, among all of the run.

    Before the processes have met nobody can be asked: then every process that waited for others shows its own, and of
    what all processes of a machine find alike, the first of the machine.
    """
    if _store is None:
        return _on_its_own or _from_launcher("LOCAL_RANK", 0) == 0
    try:
        mine = str(rank())
        claimed: bytes = _store.compare_set(_REPORT_KEY, "", mine)
    except Exception:
        # Nobody is left to ask.
        return True
    return claimed.decode() == mine


def _wait_for_a_report() -> None:
    until = time.monotonic() + _PATIENCE_S
    while _store is not None and time.monotonic() < until:
        try:
            if _store.check([_REPORT_KEY]):
                return
        except Exception:
            return
        time.sleep(0.05)


def memory_figures() -> str:
    """Return how much memory this process holds and the machine has left, and whether the system killed for memory."""
    import psutil

    memory, held = psutil.virtual_memory(), psutil.Process().memory_info().rss
    parts = [
        f"this process holds {held / 2**30:.1f} GiB",
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
    ]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        events = Path("/sys/fs/cgroup/memory.events").read_text(encoding="ascii").splitlines()
        killed = int(next(line.split()[1] for line in events if line.startswith("oom_kill ")))
        if killed:
            parts.append(f"the system has killed {killed} processes here for memory")
    return ", ".join(parts)


def _group() -> Any:
    """Return torch.distributed where the processes have met; torch is not imported to find out."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed
    return None


def is_launched() -> bool:
    """Return whether torchrun or the like started this process."""
    # All of these, or nobody launched us: a shell may well have a WORLD_SIZE of its own.
    return all(variable in os.environ for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def _from_launcher(name: str, otherwise: int) -> int:
    return _from_environment(name, otherwise) if is_launched() else otherwise


def _from_environment(name: str, otherwise: int) -> int:
    try:
        return int(os.environ.get(name, otherwise))
    except ValueError:
        return otherwise
