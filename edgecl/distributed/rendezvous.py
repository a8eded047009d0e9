"""A name for each attempt of a launch, drawn by the processes themselves.

torchrun's agent keeps its store from one attempt to the next, and with it the addresses of processes that are gone; a new
attempt that reads them connects to nobody (https://github.com/pytorch/pytorch/issues/135712). The maintainers' workaround,
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, must be in the environment of torchrun itself, which a process that it started cannot
change. This file goes when torch clears the store between attempts in every version that edgecl takes.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

# Where a process of this launch wrote the name of the first attempt.
_LAUNCH_KEY = "edgecl/launch"
# Between two looks at who has come.
_POLL_S = 0.02


def meet(store: Any, number: int, count: int, *, limit_s: float) -> tuple[str, str]:
    """Agree with the living processes on a name for this attempt that no dead process has used.

    The count of restarts is no name: every agent counts its own. So process 0 draws one and tells it to whoever answers:

    - process r leaves a nonce under hello/r and waits for welcome/NONCE, which holds the name;
    - process 0 answers every nonce it has not yet answered, until each process has acknowledged the name.

    The hello of a dead process is answered too, and never acknowledged.

    Returns:
        The names of this attempt and of the first attempt that met in this store, which is the name of the launch.

    Raises:
        TimeoutError: not all came in time; says who.
    """
    until = time.monotonic() + limit_s
    pause_s = _POLL_S * max(1.0, count / 100)  # a thousand processes ask no more often than a hundred
    own = secrets.token_hex(8)
    if number > 0:
        store.set(f"edgecl/hello/{number}", own)
        while not store.check([f"edgecl/welcome/{own}"]):
            _pause(pause_s, until, f"process 0 did not answer within {limit_s:g} s")
        attempt, launch_name = store.get(f"edgecl/welcome/{own}").decode().split()
        store.set(f"edgecl/ack/{attempt}/{number}", "yes")
        return attempt, launch_name
    launch_name = store.compare_set(_LAUNCH_KEY, "", own).decode()
    # The nonce answered last to each process that has yet to acknowledge.
    answered = dict.fromkeys(range(1, count), "")
    while True:
        for other in list(answered):
            if store.check([f"edgecl/ack/{own}/{other}"]):
                del answered[other]
            elif store.check([f"edgecl/hello/{other}"]):
                nonce = store.get(f"edgecl/hello/{other}").decode()
                if nonce != answered[other]:
                    store.set(f"edgecl/welcome/{nonce}", f"{own} {launch_name}")
                    answered[other] = nonce
        if not answered:
            return own, launch_name
        first = ", ".join(str(other) for other in list(answered)[:8]) + (", …" if len(answered) > 8 else "")
        _pause(
            pause_s, until, f"of the processes 1 to {count - 1}, {first} did not come within {limit_s:g} s"
        )


def _pause(seconds: float, until: float, exc: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(exc)
    time.sleep(seconds)
