"""How the processes of a run meet, what names their launch, and who shows an error before they have met."""

import re
import threading
import time

import pytest
import torch
from torch.distributed import TCPStore
from worlds import free_port, launcher_environment

from edgecl.distributed import processes, rendezvous
from edgecl.errors import DeviceError, ProcessError

LIMIT_S = 20.0


@pytest.fixture
def open_store():
    """Give a function that returns the launcher's store as one more process sees it."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # The server lives as long as its first handle.
    return lambda server=server: TCPStore("127.0.0.1", server.port, is_master=False)


@pytest.fixture
def alone(monkeypatch):
    """A process that no launcher started and that has met nobody."""
    for name in (*launcher_environment(0, 1, 0), "TORCHELASTIC_USE_AGENT_STORE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"_store": None, "_attempt": None, "_launch": None, "_on_its_own": False}.items():
        monkeypatch.setattr(processes, name, value)


@pytest.fixture
def become(alone, monkeypatch):
    """Give a function that makes this process one that torchrun started."""

    def start(rank, world_size, port, **more):
        for name, value in {**launcher_environment(rank, world_size, port), **more}.items():
            monkeypatch.setenv(name, value)

    return start


def meet_all(open_store, count, late_s=0.0, late=None):
    """What each of so many processes takes away from a meeting; `late` comes later than the others."""
    found = {}

    def come(number):
        if number == late:
            time.sleep(late_s)
        found[number] = rendezvous.meet(open_store(), number, count, limit_s=LIMIT_S)

    threads = [threading.Thread(target=come, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S + 10)
    return found


@pytest.mark.parametrize("late", [None, 0, 2])
def test_all_take_away_the_same_names(open_store, late):
    found = meet_all(open_store, 4, late_s=0.3, late=late)
    assert sorted(found) == [0, 1, 2, 3]
    assert len(set(found.values())) == 1
    attempt, launch = found[0]
    assert attempt == launch


def test_attempts_of_a_launch_have_names_of_their_own(open_store):
    """Fewer come again, then more: what the earlier ones left behind in the store holds up nobody."""
    attempts, launches = zip(*(meet_all(open_store, count)[0] for count in (3, 2, 4)), strict=True)
    assert len(set(attempts)) == 3
    assert set(launches) == {attempts[0]}


def test_the_hello_of_a_dead_process_is_answered_in_vain(open_store):
    store = open_store()
    store.set("edgecl/hello/1", "dead")
    found = {}
    waiting = threading.Thread(
        target=lambda: found.update({0: rendezvous.meet(store, 0, 2, limit_s=LIMIT_S)})
    )
    waiting.start()
    other = open_store()
    until = time.monotonic() + LIMIT_S
    while not other.check(["edgecl/welcome/dead"]) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert waiting.is_alive()
    assert rendezvous.meet(other, 1, 2, limit_s=LIMIT_S)
    waiting.join(LIMIT_S)
    assert 0 in found


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "of the processes 1 to 2, 1, 2 did not come within 0.2 s"),
        (1, "process 0 did not answer within 0.2 s"),
    ],
)
def test_who_did_not_come_is_said_and_waited_for_no_longer_than_allowed(open_store, number, text):
    store = open_store()
    store.set("edgecl/hello/2", "dead")
    with pytest.raises(TimeoutError, match=re.escape(text)):
        rendezvous.meet(store, number, 3, limit_s=0.2)


@pytest.mark.parametrize(
    ("rank", "text"), [(0, "of the processes 1 to 1, 1 did not come"), (1, "process 0 did not answer")]
)
def test_who_waits_in_vain_shows_it(become, rank, text):
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    become(rank, 2, agent.port, TORCHELASTIC_USE_AGENT_STORE="True", EDGECL_WAIT_S="0.3")
    with pytest.raises(ProcessError, match=rf"2 processes .*did not find each other: {text}") as caught:
        processes.join("cpu")
    assert caught.value.where["meeting point"] == f"127.0.0.1:{agent.port}"
    assert processes.claim_report()


def test_a_meeting_point_that_is_down_is_shown(become):
    become(1, 2, free_port(), EDGECL_WAIT_S="0.5")
    with pytest.raises(ProcessError, match=r"2 processes .*did not find each other"):
        processes.join("cpu")
    assert processes.claim_report()


def test_a_wait_that_is_no_number_is_shown_once_per_machine(become):
    for rank, shown in ((0, True), (1, False)):
        become(rank, 2, free_port(), EDGECL_WAIT_S="long")
        with pytest.raises(DeviceError, match="EDGECL_WAIT_S is 'long'"):
            processes.join("cpu")
        assert processes.claim_report() is shown


@pytest.fixture
def one_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_too_few_gpus_end_all_processes_of_the_machine_before_they_wait(become, one_gpu):
    """The one that has a GPU would else wait for the others; one of them says so."""
    for rank, shown in ((0, True), (1, False)):
        become(rank, 2, free_port())
        with pytest.raises(DeviceError, match=r"2 processes .*as many GPUs, it has 1"):
            processes.join("cuda")
        assert processes.claim_report() is shown
    assert one_gpu == []


def test_a_gpu_for_each_process_as_number_0_is_enough(become, one_gpu):
    """As of `torchrun --virtual-local-rank`; a process with a higher number then fails alone, and says so."""
    become(0, 2, free_port(), CUDA_VISIBLE_DEVICES="3", EDGECL_WAIT_S="0.1")
    with pytest.raises(ProcessError):
        processes.join("cuda")
    assert one_gpu == [0]
    become(1, 2, free_port(), CUDA_VISIBLE_DEVICES="3")
    with pytest.raises(DeviceError, match="2 processes on this machine"):
        processes.join("cuda")
    assert processes.claim_report()


def test_one_process_learns_the_name_of_its_launch_from_the_agent(become, monkeypatch):
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    become(0, 1, agent.port, TORCHELASTIC_USE_AGENT_STORE="True")
    names = []
    for again in (False, True):
        monkeypatch.setattr(processes, "_launch", None)
        processes.join("cpu")
        names.append(processes.launch())
        assert processes.started_again() is again
    assert names[0]
    assert names[0] == names[1]
    assert not torch.distributed.is_initialized()


def test_without_a_launcher_there_is_no_launch(alone, monkeypatch):
    processes.join("cpu")
    assert processes.launch() is None
    assert not processes.started_again()
    # What is left of a launcher in the environment holds up nobody for long.
    for name, value in launcher_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(processes, "_AGENT_S", 0.2)
    processes.join("cpu")
    assert processes.launch() is None


@pytest.mark.parametrize(
    ("exc", "problem", "hint"),
    [
        (
            "Timed out waiting 5000ms for recv operation",
            "did not answer for 600 s",
            "the network between is dead",
        ),
        ("Connection closed by peer [127.0.0.1]:4242", "ended without a word", "most often out of memory"),
    ],
)
def test_silence_and_an_end_have_hints_of_their_own(become, monkeypatch, exc, problem, hint):
    become(0, 2, free_port())
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    with pytest.raises(ProcessError) as caught, processes.explain_lost_peers():
        raise RuntimeError(exc)
    assert problem in caught.value.problem
    assert hint in caught.value.hint
    assert "--resume" in caught.value.hint
