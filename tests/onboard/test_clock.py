"""The clock, on a fake net with a scripted time."""

import contextlib
import gc

import pytest

from edgecl.onboard.clock import measure_interleaved


def measure(run_once, **settings):
    """A task alone."""
    return measure_interleaved([("", run_once)], **settings)[""]


class FakeNet:
    """A net whose run takes `latency(now)` seconds of a time that only it moves."""

    def __init__(self, latency):
        self.latency = latency
        self.now = 100.0
        self.runs = 0

    def run_once(self):
        self.now += self.latency(self.now - 100.0)
        self.runs += 1

    def timer(self):
        return self.now

    def measure(self, **settings):
        settings = {"duration_s": 10.0, "max_warmup_s": 30.0, **settings}
        return measure(self.run_once, timer=self.timer, **settings)


def test_samples_are_exactly_the_runs_after_warm_up():
    net = FakeNet(lambda now: 1 / 128)  # a power of two: sums of it are exact
    seen = net.measure()
    assert seen.steady
    assert list(seen.samples_s) == [1 / 128] * 1280
    assert seen.duration_s == 10.0
    assert seen.warmup_samples == net.runs - 1280
    assert seen.warmup_s == seen.warmup_samples / 128


def test_warm_up_of_a_steady_net_is_three_growing_windows():
    seen = FakeNet(lambda now: 1 / 1024).measure()
    assert seen.warmup_s == pytest.approx(0.5 * (1 + 1.5 + 1.5**2), abs=0.01)


@pytest.mark.parametrize(
    ("latency", "settles_s", "then"),
    [
        (lambda now: (1 - min(now, 6) / 12) / 128, 6, 1 / 256),
        (lambda now: 0.005 * (1 + min(now, 8) / 8), 8, 0.01),
    ],
    ids=["speeds up", "slows down"],
)
def test_warm_up_waits_for_a_net_that_changes(latency, settles_s, then):
    seen = FakeNet(latency).measure()
    assert seen.steady
    assert seen.warmup_s > settles_s
    assert (min(seen.samples_s), max(seen.samples_s)) == pytest.approx((then, then))


def test_warm_up_of_a_net_that_never_settles_ends_at_its_limit_and_says_so():
    seen = FakeNet(lambda now: 0.001 * (1 + now)).measure(max_warmup_s=5.0)
    assert not seen.steady
    assert 5.0 <= seen.warmup_s < 5.1
    seen = FakeNet(lambda now: 1 / 128).measure(max_warmup_s=0.0)
    assert (seen.warmup_samples, seen.steady) == (1, False)


def test_a_slow_net_warms_up_on_fewer_runs():
    seen = FakeNet(lambda now: 0.5).measure(duration_s=2.0)
    assert seen.steady
    assert 30 <= seen.warmup_samples <= 40


@pytest.mark.parametrize(
    ("latency_s", "asked_s", "samples", "seconds"),
    [
        (1 / 128, 2.0, 1024, 1024 / 128),  # on to 1,024 samples
        (1 / 1024, 4.0, 4096, 4.0),  # on to the asked duration
        (0.25, 5.0, 120, 30.0),  # too slow: cut off at six durations
        (0.25, 0.5, 40, 10.0),  # or at ten seconds
    ],
)
def test_when_sampling_ends(latency_s, asked_s, samples, seconds):
    seen = FakeNet(lambda now: latency_s).measure(duration_s=asked_s)
    assert (len(seen.samples_s), seen.duration_s) == (samples, seconds)


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_collection_rests_while_measuring_and_returns(fails):
    collecting = []
    net = FakeNet(lambda now: 1 / 128)

    def run_once():
        net.run_once()
        collecting.append(gc.isenabled())
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        measure(run_once, duration_s=1.0, max_warmup_s=1.0, timer=net.timer)
    assert not any(collecting)
    assert gc.isenabled()


def test_progress_is_told_once_a_second_between_runs():
    lines = []
    FakeNet(lambda now: 1 / 128).measure(report=lines.append)
    # The first run of a stage starts its first second.
    assert lines[0] == "warming up: 1 s, 129 runs, 128 runs/s"
    assert "measuring: 1 s, 129 runs, 128 runs/s, 9 s left" in lines
    assert len(lines) == 2 + 9


class FakeDevice:
    """Several nets on one device, whose time only they move; it writes down who ran when."""

    def __init__(self, **latencies):
        self.latencies = latencies
        self.now = 0.0
        self.log = []

    def task(self, name, *, device_timed=False):
        def run_once():
            start = self.now
            self.now += self.latencies[name](start)
            self.log.append((start, name))
            return (self.now - start) / 2 if device_timed else None

        return name, run_once

    def measure(self, tasks, **settings):
        settings = {"duration_s": 10.0, "max_warmup_s": 30.0, **settings}
        return measure_interleaved(tasks, timer=lambda: self.now, **settings)


def two_nets(a=1 / 256, b=1 / 128):
    return FakeDevice(a=lambda now: a, b=lambda now: b)


def test_tasks_alternate_in_blocks_and_every_sample_lies_in_one():
    device = two_nets()
    seen = device.measure([device.task("a"), device.task("b")])
    assert list(seen) == ["a", "b"]
    order = sorted((block.begin_s, name) for name in seen for block in seen[name].blocks)
    assert [name for _, name in order] == ["a", "b"] * 20
    for name, latency in (("a", 1 / 256), ("b", 1 / 128)):
        blocks = seen[name].blocks
        assert [block.first for block in blocks] == [sum(b.runs for b in blocks[:i]) for i in range(20)]
        assert sum(block.runs for block in blocks) == len(seen[name].samples_s)
        assert all(block.end_s - block.begin_s == block.runs * latency for block in blocks)
        assert set(seen[name].samples_s) == {latency}
        assert seen[name].duration_s == 10.0


def test_runs_right_after_a_switch_are_not_recorded():
    """Each net is ten times as slow for the three runs after another ran."""
    device = FakeDevice(a=lambda now: 0.0, b=lambda now: 0.0)

    def slow_after_switch(name):
        def latency(now):
            return 1 / 128 * (10 if [ran for _, ran in device.log[-3:]] != [name] * 3 else 1)

        return latency

    device.latencies = {name: slow_after_switch(name) for name in "ab"}
    seen = device.measure([device.task("a"), device.task("b")])
    assert set(seen["a"].samples_s) == set(seen["b"].samples_s) == {1 / 128}


def test_a_change_of_the_device_meets_all_tasks_alike():
    """The device slows down by half midway."""
    device = FakeDevice(
        a=lambda now: (1 if now < 15 else 1.5) / 256, b=lambda now: (1 if now < 15 else 1.5) / 128
    )
    seen = device.measure([device.task("a"), device.task("b")])
    slow = {}
    for name, one in seen.items():
        slow[name] = sum(sample > min(one.samples_s) for sample in one.samples_s) / len(one.samples_s)
    assert slow["a"] == pytest.approx(slow["b"], abs=0.05)


def test_seconds_that_the_device_measured_are_taken_and_time_still_passes():
    device = two_nets()
    seen = device.measure([device.task("a", device_timed=True), device.task("b")])
    assert set(seen["a"].samples_s) == {1 / 512}
    assert seen["a"].duration_s == 10.0
    assert set(seen["b"].samples_s) == {1 / 128}


def test_interleaving_goes_on_until_the_slowest_has_1024_samples():
    device = two_nets(a=1 / 1024, b=1 / 64)
    seen = device.measure([device.task("a"), device.task("b")], duration_s=4.0)
    assert 1024 <= len(seen["b"].samples_s) <= 1024 + 32
    assert len(seen["a"].blocks) == len(seen["b"].blocks)


def test_slow_tasks_are_cut_off_and_switches_cost_them_one_run():
    device = two_nets(a=0.25, b=0.5)
    seen = device.measure([device.task("a"), device.task("b")], duration_s=5.0)
    for name in "ab":
        assert 30.0 <= seen[name].duration_s < 30.0 + 2.0
        assert all(block.end_s - block.begin_s == 2.0 for block in seen[name].blocks)
    runs = sum(name == "b" for _, name in device.log)
    assert runs == len(seen["b"].samples_s) + seen["b"].warmup_samples + len(seen["b"].blocks)


def test_a_short_measurement_still_has_ten_rounds():
    device = two_nets(a=1 / 8192, b=1 / 4096)
    seen = device.measure([device.task("a"), device.task("b")], duration_s=0.5)
    assert len(seen["a"].blocks) >= 10


def test_the_device_is_looked_at_between_blocks_only():
    device = two_nets()
    looks = []
    seen = device.measure([device.task("a"), device.task("b")], between=lambda: looks.append(device.now))
    assert len(looks) == 41
    for block in (*seen["a"].blocks, *seen["b"].blocks):
        assert not any(block.begin_s < look < block.end_s for look in looks)


def test_a_lone_task_is_one_block_unless_there_is_something_to_look_at():
    net = FakeNet(lambda now: 1 / 128)
    assert [block.runs for block in net.measure().blocks] == [1280]
    device = two_nets()
    seen = device.measure([device.task("a")], between=lambda: None)
    assert len(seen["a"].blocks) == 20


def test_progress_of_several_tasks_names_the_one_that_warms_up():
    lines = []
    device = two_nets()
    device.measure([device.task("a"), device.task("b")], report=lines.append)
    assert lines[0] == "warming up a: 1 s, 257 runs, 256 runs/s"
    assert any(line.startswith("warming up b: 1 s") for line in lines)
    assert any(line.startswith("measuring: 10 s") and line.endswith("10 s left") for line in lines)
