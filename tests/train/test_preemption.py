"""Signals as wishes; that a run saves on them is tested with resuming."""

import signal
import threading

import pytest

from edgecl.train import preemption
from edgecl.train.preemption import StopRequest


def test_sigterm_is_remembered_and_ends_nothing():
    with StopRequest() as stop:
        assert stop.asked == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == signal.SIGTERM


def test_first_ctrl_c_is_a_wish_and_a_later_one_an_end(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGINT
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)  # the same one, passed on by a launcher
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (
        capfd.readouterr().err == "\nedgecl: saving after this step or the next; Ctrl-C again ends at once\n"
    )


def test_a_run_that_was_to_be_preempted_stays_so_on_ctrl_c():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGTERM


def test_the_handlers_before_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_another_thread_the_handlers_stay():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter():
        with StopRequest() as stop:
            seen.extend([signal.getsignal(signal.SIGINT), stop.asked])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before, 0]
