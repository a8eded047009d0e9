"""Signals as wishes, each in a process of its own; that a run saves on them is tested with resuming."""

import subprocess
import sys
import textwrap

import pytest

SAVING = "\nedgecl: saving after this step or the next; Ctrl-C again ends at once\n"


def signalled(code):
    """Run code that signals itself; give what it printed and what it said."""
    start = """
        import signal, threading, time
        from edgecl.train import preemption
        from edgecl.train.preemption import StopRequest

        preemption._SAME_CTRL_C_S = 0.2
        signal.signal(signal.SIGINT, signal.default_int_handler)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_first_ctrl_c_is_a_wish_and_a_later_one_an_end():
    printed, said = signalled(
        """
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            print(int(stop.asked))
            signal.raise_signal(signal.SIGINT)  # the same one, passed on by a launcher
            time.sleep(0.3)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                print("ended")
        """
    )
    assert (printed, said) == (["2", "ended"], SAVING)


def test_a_run_that_was_to_be_preempted_stays_so_on_ctrl_c():
    printed, said = signalled(
        """
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            print(int(stop.asked))
        """
    )
    assert (printed, said) == (["15"], SAVING)


@pytest.mark.parametrize(("where", "changed"), [("here", "True"), ("in another thread", "False")])
def test_handlers_stand_while_a_run_does_and_in_the_main_thread_alone(where, changed):
    printed, _ = signalled(
        f"""
        def handlers():
            return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

        def enter():
            with StopRequest():
                print(handlers() != before)

        before = handlers()
        if {where!r} == "here":
            enter()
        else:
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()
        print(handlers() == before)
        """
    )
    assert printed == [changed, "True"]
