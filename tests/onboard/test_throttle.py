"""Throttling, on fake systems that change while they are watched."""

import json

import pytest

from edgecl.onboard.throttle import ThrottleWatch

from .recorded.boards import plant

OC = "sys/class/hwmon/hwmon1/"
RAIL = "sys/class/hwmon/hwmon2/"
GPU = "sys/class/devfreq/17000000.gpu/"
ZONE = "sys/class/thermal/thermal_zone8/"
COOLING = "sys/class/thermal/cooling_device"

CALM = {
    OC + "name": "soctherm_oc",
    OC + "oc1_event_cnt": "3",
    OC + "oc2_event_cnt": "0",
    OC + "oc3_event_cnt": "17",
    RAIL + "name": "ina3221",
    RAIL + "curr1_crit_alarm": "0",
    RAIL + "curr1_max_alarm": "0",
    GPU + "cur_freq": "1020000000",
    GPU + "min_freq": "1020000000",
    GPU + "max_freq": "1020000000",
    ZONE + "type": "tj-thermal",
    ZONE + "temp": "55000",
    ZONE + "trip_point_0_type": "critical",
    ZONE + "trip_point_0_temp": "104500",
    ZONE + "trip_point_1_type": "passive",
    ZONE + "trip_point_1_temp": "99000",
    ZONE + "trip_point_2_type": "active",
    ZONE + "trip_point_2_temp": "50000",
    COOLING + "0/type": "cpu-throttle-alert",
    COOLING + "0/cur_state": "0",
    COOLING + "1/type": "pwm-fan",
    COOLING + "1/cur_state": "4",
}


class System:
    """A tree of files, and a watch on it."""

    def __init__(self, root, files):
        self.root = root
        self.write(files)
        self.watch = ThrottleWatch(root)
        self.watch.start()

    def write(self, files):
        plant(self.root, {name: text + "\n" for name, text in files.items()})

    def look(self, times=1):
        for _ in range(times):
            self.watch.sample()

    def marks_after(self, files):
        self.look()
        self.write(files)
        return self.watch.stop()["marks"]


@pytest.fixture
def board(tmp_path):
    return System(tmp_path, CALM)


def test_a_calm_board_is_not_throttled_whatever_it_counted_before(board):
    board.look(3)
    record = json.loads(json.dumps(board.watch.stop()))
    assert record["marks"] == []
    kinds = ("oc1 (under-voltage)", "oc2 (average over-current)", "oc3 (instantaneous over-current)")
    assert record["counters"] == dict.fromkeys(kinds, 0)
    gpu = dict.fromkeys(("min_mhz", "max_mhz", "locked_mhz"), 1020.0)
    assert record["gpu_mhz"] == {**gpu, "below_lock": 0.0}
    assert record["hottest_c"] == {"tj-thermal": {"seen": 55.0, "passive_trip": 99.0}}
    assert record["looks"] == 4


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        ({OC + "oc1_event_cnt": "5"}, "oc1 (under-voltage) counted 2"),
        ({OC + "oc3_event_cnt": "18"}, "oc3 (instantaneous over-current) counted 1"),
        ({RAIL + "curr1_crit_alarm": "1"}, "alarm curr1_crit_alarm of ina3221"),
        ({RAIL + "curr1_max_alarm": "1"}, "alarm curr1_max_alarm of ina3221"),
        ({GPU + "cur_freq": "612000000"}, "GPU clock below its lock of 1020 MHz in 50 % of 2 looks"),
        ({ZONE + "temp": "96500"}, "tj-thermal reached 96.5 C, its passive trip is at 99 C"),
        ({COOLING + "0/cur_state": "2"}, "cooling device cpu-throttle-alert (cooling_device0) at state 2"),
    ],
)
def test_each_kind_of_evidence_marks_the_run(board, change, mark):
    assert board.marks_after(change) == ["throttled: " + mark]


def test_what_happened_only_in_between_is_seen(board):
    board.look()
    board.write({RAIL + "curr1_crit_alarm": "1", ZONE + "temp": "98000", COOLING + "0/cur_state": "1"})
    board.look()
    board.write(CALM)
    board.look(5)
    record = board.watch.stop()
    assert len(record["marks"]) == 3
    assert record["alarms"] == {"curr1_crit_alarm of ina3221": 1}
    assert record["cooling"] == {"cpu-throttle-alert (cooling_device0)": 1}


def test_a_clock_lost_in_one_look_of_a_hundred_is_not_yet_throttling(board):
    board.look(150)
    board.write({GPU + "cur_freq": "918000000"})
    board.look()
    board.write({GPU + "cur_freq": "1020000000"})
    record = board.watch.stop()
    assert record["marks"] == []
    assert record["gpu_mhz"]["below_lock"] == pytest.approx(1 / 152, abs=1e-4)


@pytest.mark.parametrize(
    ("files", "change"),
    [
        (CALM, {ZONE + "temp": "95900"}),  # away from the trip
        ({**CALM, ZONE + "trip_point_1_temp": "16800"}, {}),  # of a PC, near room temperature
        ({**CALM, GPU + "min_freq": "306000000"}, {GPU + "cur_freq": "306000000"}),  # not locked
        *(
            ({COOLING + "0/type": kind, COOLING + "0/cur_state": "0"}, {COOLING + "0/cur_state": "3"})
            for kind in ("pwm-fan", "Fan", "LCD", "TCC Offset")
        ),
    ],
)
def test_what_costs_no_speed_is_no_throttling(tmp_path, files, change):
    assert System(tmp_path, files).marks_after(change) == []


def test_cores_of_a_pc_count_their_throttling(tmp_path):
    counter = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
    files = {counter.format(core, kind): "100" for core in range(4) for kind in ("core", "package")}
    system = System(tmp_path, files)
    marks = system.marks_after({counter.format(2, "core"): "107"})
    assert marks == ["throttled: core_throttle_count counted 7"]


def test_files_that_cannot_be_read_are_left_out(board):
    board.look()
    for name in (OC + "oc1_event_cnt", GPU + "cur_freq", ZONE + "temp"):
        (board.root / name).unlink()
    board.write({RAIL + "curr1_crit_alarm": "?", COOLING + "0/cur_state": "-1"})
    record = board.watch.stop()
    assert record["marks"] == []
    assert "oc1 (under-voltage)" not in record["counters"]


def test_a_system_that_shows_nothing_is_not_throttled(tmp_path):
    system = System(tmp_path, {})
    record = system.watch.stop()
    assert record["marks"] == []
    assert record["gpu_mhz"] is None
