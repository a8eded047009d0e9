"""Energy: rails of each board, lines of tegrastats, the integral, and real sampler processes on trees that change."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipapp
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import edgecl.onboard
from edgecl.onboard import power
from edgecl.onboard.power import PowerMeter, integrate, module_rails, rails_of_tegrastats

from .recorded.boards import BOARDS, hwmon, plant


def add_tegrastats(root, body):
    path = root / "usr/bin/tegrastats"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -S\nimport sys, time\nassert sys.argv[1] == '--interval'\n{body}")
    path.chmod(0o755)
    return root


def gone(pid, within_s=5.0):
    """Say whether a process ends in time; one that nobody waited for counts as ended."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def energy_over(meter, seconds, inferences=1):
    start = time.monotonic()
    time.sleep(seconds)
    return meter.energy_of([(start, time.monotonic())], inferences)


# --- rails ---


@pytest.mark.parametrize("board", BOARDS)
def test_rails_of_the_module_are_found_and_add_up(tmp_path, board):
    expected = BOARDS[board]
    with PowerMeter(plant(tmp_path, expected.files)) as meter:
        pid = meter._process.pid
        assert (meter.source, meter.rails, meter.reason) == ("ina3221", expected.rails, None)
        energy = energy_over(meter, 0.4, 10)
    assert gone(pid)
    assert energy["rails"] == list(expected.rails)
    assert energy["load_w"] == pytest.approx(expected.sysfs_w, abs=1e-3)
    assert energy_over(meter, 0) is None
    meter.stop()  # a second time does nothing


@pytest.mark.parametrize("board", BOARDS)
def test_lines_of_tegrastats_give_the_module_at_that_moment(board):
    expected = BOARDS[board]
    found = rails_of_tegrastats(expected.line)
    assert module_rails(list(found)) == expected.rails
    assert sum(found[name] for name in expected.rails) == pytest.approx(expected.line_w)


def test_nothing_but_rails_is_read_from_a_line():
    line = "VDD_GPU -392mW/-392mW VDD_IN 5765mW VIC_FREQ 115 RAM 3/9MB (cached 0MB)"
    assert rails_of_tegrastats(line) == {"VDD_GPU": -0.392, "VDD_IN": 5.765}
    assert rails_of_tegrastats("") == {}
    assert module_rails(["VDD_IN", "VDD_IN"]) is None  # which of them is not guessed at
    assert module_rails(["VDD_GPU_SOC", "VDD_CPU_CV"]) is None  # the third is missing


# --- the integral ---


LINE = [(i / 8, 2.0 + 3.0 * i / 8) for i in range(20)]
LOADS = [(0.1 * i, 4.0 if 10 <= i < 20 else 90.0) for i in range(30)]
SLOPE = [(0.1 * i, 10.0 * i) for i in range(9)]


@pytest.mark.parametrize(
    ("samples", "window", "joules"),
    [
        (LINE, (0.25, 1.75), 1.5 * (2 + 3 * (0.25 + 1.75) / 2)),
        # The ends hold the window's own samples and not the next load.
        (LOADS, (0.95, 1.95), 4.0),
        ([(1.0, 4.0), (1.2, 4.0), (1.4, 4.0)], (0.9, 1.6), 0.7 * 4),
        # A short window takes straight lines between two samples, around one, up to the last one.
        (SLOPE, (0.32, 0.38), 0.06 * 35),
        (SLOPE, (0.35, 0.45), 0.1 * 40),
        (SLOPE, (0.75, 0.85), 0.05 * 77.5 + 0.05 * 80),
    ],
)
def test_the_integral_is_exact(samples, window, joules):
    assert integrate(samples, window) == pytest.approx(joules, rel=1e-12)


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        ((0.0, 0.0), "the window of 0.000 s is empty"),
        ((0.0, 3.5), "no sample for 1.10 s, from 0.90 s after the window began"),
        ((1.2, 1.3), "no sample for 1.10 s, from -0.30 s after the window began"),
        ((-1.5, 0.9), "no sample for 1.50 s, from 0.00 s after the window began"),
        ((2.1, 4.5), "no sample for 1.60 s, from 0.80 s after the window began"),
    ],
)
def test_a_window_that_was_not_seen_whole_has_no_energy(window, reason):
    samples = [(0.1 * i, 1.0) for i in range(10)] + [(2.0 + 0.1 * i, 1.0) for i in range(10)]
    assert integrate(samples, window) == reason


# --- a sampler on a tree that changes ---


class Board:
    """A module whose power follows a curve, written to its files by a thread; remembers what it wrote and when."""

    def __init__(self, root, watts):
        plant(root, hwmon("1-0040", 1, [("VDD_IN", 5000, 0), ("VDD_SOC", 5000, 100)]))
        self.file = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input"
        self.watts, self.written, self.ended = watts, [], False
        self.begin = time.monotonic()
        self.write()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def write(self):
        milliamperes = round(1e3 * self.watts(time.monotonic() - self.begin) / 5)
        with self.file.open("r+") as file:  # in place and of one length: never empty for a reader
            file.write(f"{milliamperes:6d}\n")
        self.written.append((time.monotonic(), milliamperes * 5 / 1e3))

    def run(self):
        while not self.ended:
            self.write()
            time.sleep(0.005)

    def exact(self, start, end):
        """Joules between two moments: what was written holds until the next was."""
        joules = 0.0
        for (at, watts), (until, _) in zip(self.written, [*self.written[1:], (math.inf, 0)], strict=True):
            joules += max(0.0, min(until, end) - max(at, start)) * watts
        return joules

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended = True
        self.thread.join()


def test_energy_of_a_changing_load_is_the_exact_integral(tmp_path):
    def watts(at):
        return 5.0 if at < 0.9 else 12.0 + 4.0 * math.sin(2 * math.pi * at)

    with Board(tmp_path, watts) as board, PowerMeter(tmp_path) as meter:
        meter.measure_idle(max(0.2, 0.7 - (time.monotonic() - board.begin)))
        time.sleep(max(0.0, 1.0 - (time.monotonic() - board.begin)))
        start = time.monotonic()
        time.sleep(1.7)  # no whole number of waves
        end = time.monotonic()
        energy = meter.energy_of([(start, end)], 500)
    exact = board.exact(start, end)
    assert energy["source"] == "ina3221"
    assert energy["rails"] == ["VDD_IN"]
    assert energy["idle_w"] == pytest.approx(5.0, abs=0.01)
    assert energy["load_w"] == pytest.approx(exact / (end - start), rel=0.03)
    assert energy["j_per_inference"] == pytest.approx(energy["load_w"] * (end - start) / 500, rel=1e-3)
    above = (energy["load_w"] - energy["idle_w"]) * (end - start) / 500
    assert energy["j_per_inference_above_idle"] == pytest.approx(above, rel=1e-3)
    assert energy["rate_hz"] == pytest.approx(energy["samples"] / (end - start), rel=1e-2)
    assert energy["samples"] >= 5  # 34 on a machine that is not busy


def test_blocks_of_two_precisions_are_told_apart(tmp_path):
    with (
        Board(tmp_path, lambda at: 4.0 if int(at / 0.5) % 2 else 10.0) as board,
        PowerMeter(tmp_path) as meter,
    ):
        windows = {0: [], 1: []}
        first = int((time.monotonic() - board.begin) / 0.5) + 1
        for block in range(first, first + 4):
            start = board.begin + 0.5 * block + 0.1  # well within, as the clock's blocks are
            windows[block % 2].append((start, start + 0.3))
        time.sleep(max(0.0, board.begin + 0.5 * (first + 4) - time.monotonic()))
        fast, slow = (meter.energy_of(windows[kind], 6) for kind in (0, 1))
    assert fast["load_w"] == pytest.approx(10.0, abs=0.3)
    assert slow["load_w"] == pytest.approx(4.0, abs=0.3)
    assert fast["j_per_inference"] == pytest.approx(1.0, abs=0.03)
    assert fast["idle_w"] is fast["j_per_inference_above_idle"] is None  # no baseline was taken


def test_a_rail_that_fails_now_and_then_is_read_on(tmp_path):
    plant(tmp_path, BOARDS["agx-orin"].files)
    file = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon2/curr3_input"
    with PowerMeter(tmp_path) as meter:
        start = time.monotonic()
        for _ in range(3):
            time.sleep(0.2)
            file.rename(file.with_name("away"))
            time.sleep(0.15)
            file.with_name("away").rename(file)
        time.sleep(0.2)
        energy = meter.energy_of([(start, time.monotonic())], 1)
    # A sum without the missing rail would lie 3 W lower.
    assert energy["load_w"] == pytest.approx(BOARDS["agx-orin"].sysfs_w, abs=1e-3)


# --- the sampler's life ---


@pytest.fixture
def steady(tmp_path):
    return plant(tmp_path, BOARDS["orin-nano"].files)


def test_a_killed_sampler_leaves_what_it_saw_and_a_reason(steady):
    with PowerMeter(steady) as meter:
        start = time.monotonic()
        time.sleep(0.5)
        middle = time.monotonic()
        time.sleep(0.2)
        meter._process.send_signal(signal.SIGKILL)
        meter._process.wait()
        time.sleep(1.1)
        assert meter.energy_of([(start, middle)], 1)["load_w"] == pytest.approx(
            BOARDS["orin-nano"].sysfs_w, abs=1e-3
        )
        assert meter.energy_of([(start, time.monotonic())], 1) is None
    assert meter.reason.startswith("the sampler ended: killed by SIGKILL; no sample for 1.")


def test_a_sampler_that_stands_still_does_not_hold_up_the_end(steady):
    with PowerMeter(steady) as meter:
        pid = meter._process.pid
        meter._process.send_signal(signal.SIGSTOP)
    assert gone(pid)


PARENT = """
import os, sys, time
from edgecl.onboard.power import PowerMeter
meter = PowerMeter(sys.argv[1])
assert meter.start(), meter.reason
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(30)  # a sibling that holds the sampler's standard input open
    os._exit(0)
print(meter._process.pid, flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("sibling", ["alone", "fork"])
def test_the_sampler_dies_with_a_parent_that_is_killed(steady, sibling):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(steady), sibling],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(edgecl.__file__).parents[1],
    )
    try:
        pid = int(parent.stdout.readline())
        assert not gone(pid, within_s=0.2)
        parent.kill()
        parent.wait()
        assert gone(pid)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the sibling, and whatever else was left
        parent.wait()
        parent.stdout.close()


def test_the_sampler_survives_ctrl_c_meant_for_the_run(steady):
    with PowerMeter(steady) as meter:
        meter._process.send_signal(signal.SIGINT)
        assert energy_over(meter, 0.4) is not None


def test_the_sampler_starts_from_within_an_archive(steady, tmp_path):
    source = tmp_path / "source"
    copytree(Path(edgecl.onboard.__file__).parent, source / "onboard", ignore=ignore_patterns("__pycache__"))
    main = "import sys, time; from onboard.power import PowerMeter\nwith PowerMeter(sys.argv[1]) as meter:\n"
    main += "    start = time.monotonic(); time.sleep(0.4)\n"
    main += "    print(meter.energy_of([(start, time.monotonic())], 2)['rails'], meter.reason)\n"
    (source / "__main__.py").write_text(main)
    archive = tmp_path / "folder with space" / "onboard.pyz"
    archive.parent.mkdir()
    zipapp.create_archive(source, archive, compressed=True)
    done = subprocess.run(
        [sys.executable, "-I", archive.name, str(steady)], cwd=archive.parent, capture_output=True, text=True
    )
    assert done.stdout == "['VDD_IN'] None\n", done.stderr


def test_a_window_of_a_few_samples_is_too_short(steady):
    with PowerMeter(steady) as meter:
        start = time.monotonic()
        assert meter.energy_of([(start, start + 0.002)], 1) is None
        assert re.match(r"[01] samples within 0\.00 s are too few$", meter.reason)
        time.sleep(0.5)
        assert meter.energy_of([(start, start + 0.002), (start + 0.1, start + 0.4)], 1) is not None


# --- tegrastats and jtop ---

LINES = """
line = %r
for i in range(1000):
    print(line, flush=True)
    time.sleep(int(sys.argv[2]) / 1000)
"""


def test_tegrastats_is_read_where_the_kernel_shows_no_monitor(tmp_path):
    expected = BOARDS["agx-orin"]
    with PowerMeter(add_tegrastats(tmp_path, LINES % expected.line)) as meter:
        assert (meter.source, meter.rails) == ("tegrastats", expected.rails)
        energy = energy_over(meter, 0.6)
    assert energy["load_w"] == pytest.approx(expected.line_w, abs=1e-3)
    assert energy["source"] == "tegrastats"


def test_tegrastats_ends_with_the_sampler_even_a_killed_one(tmp_path):
    note = "import os; open(sys.argv[0] + '.pids', 'a').write('%d\\n' % os.getpid())\n".format()
    add_tegrastats(tmp_path, note + LINES % BOARDS["nano"].line)
    for kill in (False, True):
        with PowerMeter(tmp_path) as meter:
            if kill:
                meter._process.kill()
        pids = (tmp_path / "usr/bin/tegrastats.pids").read_text().split()
        assert all(gone(int(pid)) for pid in pids)
    assert len(pids) == 2


def test_tegrastats_that_ends_is_a_reason(tmp_path):
    body = "print({!r}, flush=True)\ntime.sleep(0.3)\n".format(BOARDS["nano"].line)
    with PowerMeter(add_tegrastats(tmp_path, body)) as meter:
        assert energy_over(meter, 1.6) is None
    assert meter.reason.startswith(f"the sampler ended: {tmp_path}/usr/bin/tegrastats ended; ")


def test_jtop_is_read_where_nothing_else_is(tmp_path, monkeypatch):
    # What jetson-stats offers, as its documentation describes it: a context whose `power` is a dictionary in mW.
    (tmp_path / "jtop.py").write_text(
        "import time\n"
        "class jtop:\n"
        "    def __init__(self, interval): self.interval = interval\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): pass\n"
        "    def ok(self): time.sleep(self.interval); return True\n"
        "    power = {'tot': {'power': 7250, 'avg': 7000}, 'rail': {}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with PowerMeter(tmp_path) as meter:
        assert (meter.source, meter.rails) == ("jtop", ("total of jtop",))
        assert energy_over(meter, 0.5)["load_w"] == pytest.approx(7.25)


# --- no meter ---


def test_a_machine_without_a_meter_says_why_and_measures_on(tmp_path):
    with PowerMeter(tmp_path) as meter:
        meter.measure_idle(60.0)  # at once
        assert meter.energy_of([(0.0, 1.0)], 1) is None
    assert (meter.source, meter.rails) == (None, ())
    assert meter.reason == (
        f"ina3221: no power monitor under {tmp_path}/sys/bus/i2c/drivers; "
        f"tegrastats: there is no {tmp_path}/usr/bin/tegrastats; "
        "jtop: jetson-stats is not installed"
    )


def test_rails_that_edgecl_does_not_know_are_named(tmp_path):
    plant(tmp_path, hwmon("1-0040", 1, [("VDD_MOON", 5000, 1000), ("VDD_SUN", 5000, 100)]))
    add_tegrastats(tmp_path, LINES % "RAM 1/2MB GR3D_FREQ 3%")
    with PowerMeter(tmp_path) as meter:
        pass
    assert meter.reason == (
        "ina3221: edgecl does not know which of the rails VDD_MOON, VDD_SUN make up the whole module; "
        "tegrastats: it shows no power rails; jtop: jetson-stats is not installed"
    )


def test_tegrastats_that_prints_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "FIRST_SAMPLE_S", 0.3)
    with PowerMeter(add_tegrastats(tmp_path, "time.sleep(60)")) as meter:
        pass
    assert "tegrastats: no sample within 0.3 s" in meter.reason
