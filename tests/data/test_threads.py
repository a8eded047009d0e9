"""Reading ahead: in order, never for ever, and never a thread that keeps the process alive."""

import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from edgecl.data.threads import read_ahead


class StalledError(Exception):
    pass


def stalled(item, seconds):
    return StalledError(f"{item}, {'yes' if seconds > 0.05 else 'no'}")


def start(read, parts, **options):
    options = {"threads": 3, "ahead": 2, "wait_s": 20.0, "stalled": stalled, **options}
    return read_ahead(read, (np.array(part) for part in parts), **options)


def test_results_come_in_the_order_of_the_items_whoever_is_quicker():
    def read(item):
        time.sleep(0.02 * (item % 3 == 0))
        return 10 * item

    assert list(start(read, [[5, 3, 4, 6], [1], [9, 0]])) == [[50, 30, 40, 60], [10], [90, 0]]


@pytest.mark.parametrize(("ahead", "expected"), [(0, 2), (2, 6)])
def test_so_many_parts_are_read_before_they_are_asked_for(ahead, expected):
    seen = []
    parts = start(seen.append, [[0, 1], [2, 3], [4, 5], [6, 7]], ahead=ahead, threads=1)
    next(parts)
    end = time.monotonic() + 10
    while len(seen) < expected and time.monotonic() < end:
        time.sleep(0.01)
    assert len(seen) == expected
    parts.close()


def test_an_error_while_reading_is_raised_with_its_own_type():
    def read(item):
        if item == 3:
            raise KeyError("three")
        return item

    parts = start(read, [[0, 1], [2, 3]])
    assert next(parts) == [0, 1]
    with pytest.raises(KeyError, match="three"):
        next(parts)


def test_a_thread_that_hangs_is_named_when_the_wait_ends():
    release = threading.Event()

    def read(item):
        return release.wait(60) if item == 7 else item

    parts = start(read, [[0, 1, 2], [6, 7, 8]], wait_s=0.2)
    assert next(parts) == [0, 1, 2]
    with pytest.raises(StalledError, match="7, yes"):
        next(parts)
    release.set()


def test_an_error_is_raised_though_another_thread_hangs():
    release = threading.Event()

    def read(item):
        if item == 1:
            raise KeyError("one")
        return release.wait(60)

    with pytest.raises(KeyError):
        next(start(read, [[0, 1]], threads=2))
    release.set()


def test_closing_ends_the_threads_between_two_items():
    seen = []

    def read(item):
        seen.append(item)
        time.sleep(0.01)

    before = set(threading.enumerate())
    parts = start(read, [range(3), range(3, 3000)], threads=1)
    next(parts)
    parts.close()
    assert not set(threading.enumerate()) - before
    assert len(seen) < 1000


def test_a_process_ends_though_a_thread_is_held():
    code = textwrap.dedent(
        """
        import threading
        import numpy as np
        from edgecl.data.threads import read_ahead

        def read(item):
            return threading.Event().wait() if item else item

        parts = read_ahead(
            read, iter([np.array([0]), np.array([1])]), threads=1, ahead=1, wait_s=0.2,
            stalled=lambda item, seconds: SystemExit(f"held by {item}"),
        )
        print(next(parts))
        next(parts)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "[0]\n", "held by 1\n")
