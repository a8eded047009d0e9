"""The clock, on a fake net with a scripted time."""

import gc

import pytest

from edgecl.onboard.clock import measure


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


def test_warm_up_waits_for_a_net_that_speeds_up():
    net = FakeNet(lambda now: (1 - min(now, 6) / 12) / 128)
    seen = net.measure()
    assert seen.steady
    assert seen.warmup_s > 6
    assert set(seen.samples_s) == {1 / 256}


def test_warm_up_waits_for_a_net_that_slows_down():
    net = FakeNet(lambda now: 0.005 * (1 + min(now, 8) / 8))
    seen = net.measure()
    assert seen.steady
    assert seen.warmup_s > 8
    assert min(seen.samples_s) == pytest.approx(0.01)


def test_warm_up_of_a_net_that_never_settles_ends_at_its_limit_and_says_so():
    seen = FakeNet(lambda now: 0.001 * (1 + now)).measure(max_warmup_s=5.0)
    assert not seen.steady
    assert 5.0 <= seen.warmup_s < 5.1
    assert seen.samples_s[0] > 0.005


def test_warm_up_makes_one_run_even_without_time_for_it():
    seen = FakeNet(lambda now: 1 / 128).measure(max_warmup_s=0.0)
    assert (seen.warmup_samples, seen.steady) == (1, False)


def test_a_slow_net_warms_up_on_fewer_runs():
    seen = FakeNet(lambda now: 0.5).measure(duration_s=2.0)
    assert seen.steady
    assert 30 <= seen.warmup_samples <= 40


def test_sampling_goes_on_to_a_thousand_samples():
    seen = FakeNet(lambda now: 1 / 128).measure(duration_s=2.0)
    assert len(seen.samples_s) == 1000
    assert seen.duration_s == 1000 / 128


def test_sampling_goes_on_to_the_asked_duration():
    seen = FakeNet(lambda now: 1 / 1024).measure(duration_s=4.0)
    assert len(seen.samples_s) == 4096


def test_a_net_too_slow_for_a_thousand_samples_is_cut_off_at_six_durations():
    seen = FakeNet(lambda now: 0.25).measure(duration_s=5.0)
    assert len(seen.samples_s) == 120
    assert seen.duration_s == 30.0


def test_a_short_duration_still_leaves_ten_seconds_for_a_thousand_samples():
    seen = FakeNet(lambda now: 0.25).measure(duration_s=0.5)
    assert seen.duration_s == 10.0


def test_garbage_collection_rests_while_measuring_and_returns():
    collecting = []
    net = FakeNet(lambda now: 1 / 128)
    measure(
        lambda: (net.run_once(), collecting.append(gc.isenabled())),
        duration_s=1.0,
        max_warmup_s=1.0,
        timer=net.timer,
    )
    assert not any(collecting)
    assert gc.isenabled()


def test_garbage_collection_returns_after_a_failing_run():
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0, duration_s=1.0, max_warmup_s=1.0)
    assert gc.isenabled()


def test_progress_is_told_once_a_second_between_runs():
    lines = []
    FakeNet(lambda now: 1 / 128).measure(report=lines.append)
    # The first run of a stage starts its first second.
    assert lines[0] == "warming up: 1 s, 129 runs, 128 runs/s"
    assert "measuring: 1 s, 129 runs, 128 runs/s, 9 s left" in lines
    assert len(lines) == 2 + 9
