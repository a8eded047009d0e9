"""A run that is stuck on the plateau of one dimension is told from one that starts well, early and at its end."""

import json
import math
from pathlib import Path

import pytest
import torch
from reports.conftest import report

from edgecl.methods.losses import cross_correlation_loss
from edgecl.nets.heads import Encoder
from edgecl.storage.directories import ReportDir, RunDir
from edgecl.train.monitor import read_metrics
from edgecl.train.plateau import RECORDS, PlateauAlarm

RECORDED = Path(__file__).with_name("recorded")
DEMO = {"images": 2048, "features": 1024}
STEPS_OF_DEMO = 744


@pytest.fixture
def said():
    return []


@pytest.fixture
def alarm(said):
    return PlateauAlarm(warn=said.append)


def heed(alarm, record):
    return alarm.check(record) if "loss" in record else alarm.check_quality(record, **DEMO)


def recorded(name):
    return read_metrics(RECORDED / f"{name}.jsonl")


def step(number, diagonal=0.5, rms=0.5):
    return {"step": number, "loss": 1.0, "diagonal": diagonal, "off_diagonal_rms": rms}


def test_of_a_method_that_does_not_correlate_its_views_there_is_nothing_to_see(alarm):
    assert alarm.check({"step": 1, "loss": 1.0, "std": 0.5}) is None


def look(number, *, rankme=5.0, knn=None, net="slim"):
    other = {"slim": "host", "host": "slim"}[net]
    absent = None if net == "host" else 500.0
    return {
        "step": number,
        f"rankme_{net}": rankme,
        f"knn_top1_{net}": knn,
        f"rankme_{other}": absent,
        f"knn_top1_{other}": absent and 90.0,
    }


def test_a_recorded_run_that_is_stuck_is_warned_of_within_its_first_tenth(alarm, said):
    warned = [record["step"] for record in recorded("stuck-sacl-xd") if heed(alarm, record)]
    assert warned[0] <= math.ceil(STEPS_OF_DEMO / 10)
    assert len(said) == len(warned)
    for words in ("plateau", "[method.coding_rate] weight", "[host] nested_start", "[optim] lr"):
        assert words in said[0]


def test_a_recorded_run_that_leaves_the_plateau_is_warned_of_once_and_not_called_stuck(alarm):
    """It gets there at step 110."""
    records = recorded("leaves-sacl-xd")
    (warned,) = [record["step"] for record in records if heed(alarm, record)]
    assert 110 < warned < 110 + STEPS_OF_DEMO / 10
    assert alarm.decision() is None


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("starts-*.jsonl")))
def test_a_recorded_run_that_starts_well_is_not_warned_of(alarm, said, name):
    for record in recorded(name):
        assert heed(alarm, record) is None
    assert said == []
    assert alarm.decision() is None


@pytest.mark.parametrize("width", [16, 128])
def test_projections_that_all_say_the_same_are_what_the_alarm_looks_for(alarm, width):
    """A function of the picture, plus noise of each view, in every dimension with a sign of its own."""
    generator = torch.Generator().manual_seed(0)
    alarm.check_quality(look(0, rankme=200.0), **DEMO)
    alarm.check_quality(look(1), **DEMO)
    signs = torch.randn(width, generator=generator).sign()
    for number in range(2, 2 + RECORDS):
        said_of_picture = torch.randn(64, 1, generator=generator)
        z_a, z_b = ((said_of_picture + torch.randn(64, 1, generator=generator)) * signs for _ in range(2))
        seen = cross_correlation_loss(z_a, z_b, off_diagonal=0.01)
        assert alarm.decision() is None
        alarm.check(step(number, float(seen.diagonal), float(seen.off_diagonal_rms)))
    assert alarm.decision()


def test_two_dimensions_are_no_plateau_of_one(alarm):
    generator = torch.Generator().manual_seed(0)
    alarm.check_quality(look(1), **DEMO)
    for number in range(2, 12):
        two = torch.randn(64, 2, generator=generator).repeat(1, 8)
        noise = torch.randn(2, 64, 2, generator=generator).repeat(1, 1, 8)
        seen = cross_correlation_loss(two + noise[0], two + noise[1], off_diagonal=0.01)
        alarm.check(step(number, float(seen.diagonal), float(seen.off_diagonal_rms)))
    assert alarm.decision() is None


def feed(alarm, count, start=1, **numbers):
    for number in range(start, start + count):
        alarm.check(step(number, **numbers))


@pytest.mark.parametrize(
    ("records", "seen"), [(RECORDS - 1, look(RECORDS)), (10, look(0, rankme=1.0, knn=10.0))]
)
def test_neither_few_records_nor_the_look_before_the_first_step_are_enough(alarm, records, seen):
    alarm.check_quality(seen, **DEMO)
    feed(alarm, records)
    assert alarm.decision() is None


def test_a_record_apart_starts_the_count_again(alarm):
    alarm.check_quality(look(1), **DEMO)
    for start in (2, 10, 20):
        feed(alarm, RECORDS - 1, start)
        feed(alarm, 1, start + 5, diagonal=0.9, rms=0.1)
    assert alarm.decision() is None


def test_the_sign_of_the_diagonal_does_not_matter(alarm):
    alarm.check_quality(look(1), **DEMO)
    feed(alarm, RECORDS, diagonal=-0.3, rms=0.3)
    assert alarm.decision()


@pytest.mark.parametrize(("rankme", "stuck"), [(101.0, True), (104.0, False)])
def test_rankme_is_held_to_what_features_and_images_allow(alarm, rankme, stuck):
    alarm.check_quality(look(1, rankme=rankme), **DEMO)
    feed(alarm, RECORDS)
    assert bool(alarm.decision()) is stuck


@pytest.mark.parametrize(("knn", "stuck"), [(20.0, True), (28.0, True), (31.0, False)])
def test_neighbors_are_held_to_those_before_the_first_step_and_their_noise(alarm, knn, stuck):
    """1,024 queries at 26 %: a difference of two has a standard error of 1.9 points."""
    alarm.check_quality(look(0, rankme=200.0, knn=26.0), **DEMO)
    alarm.check_quality(look(1, rankme=200.0, knn=knn), **DEMO)
    feed(alarm, RECORDS)
    assert bool(alarm.decision()) is stuck


def test_without_a_slim_net_the_host_is_evaluated(alarm):
    alarm.check_quality(look(0, knn=26.0, net="host"), **DEMO)
    alarm.check_quality(look(1, rankme=7.0, knn=30.0, net="host"), **DEMO)
    feed(alarm, RECORDS)
    assert "RankMe is 7.0" in alarm.decision().words
    assert "kNN 30.0 % (before the first step 26.0 %)" in alarm.decision().words


def test_features_that_become_good_end_it_too(alarm):
    alarm.check_quality(look(1), **DEMO)
    feed(alarm, RECORDS)
    alarm.check_quality(look(9, rankme=300.0, knn=80.0), **DEMO)
    assert alarm.decision() is None


def test_numbers_that_are_not_finite_are_left_out(alarm):
    alarm.check_quality(look(1), **DEMO)
    feed(alarm, RECORDS - 1)
    feed(alarm, 5, 10, diagonal=math.nan)
    feed(alarm, 1, 20)
    assert alarm.decision()


def test_an_alarm_that_is_resumed_anywhere_says_what_one_that_ran_on_says(said):
    records = recorded("stuck-sacl-xd")
    whole = PlateauAlarm(warn=said.append)
    expected = [heed(whole, record) for record in records]
    for cut in range(len(records)):
        first, second = PlateauAlarm(warn=said.append), PlateauAlarm(warn=said.append)
        found = [heed(first, record) for record in records[:cut]]
        second.restore(json.loads(json.dumps(first.state())))
        assert found + [heed(second, record) for record in records[cut:]] == expected
        assert second.decision() == whole.decision()


def test_a_stuck_run_says_so_on_the_way_at_its_end_and_in_its_report(
    tmp_path, recipe_file, image_folder, edgecl, monkeypatch
):
    """Every projector repeats its first output, so that no training leaves the plateau."""
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: forward(self, images)[:, :1].repeat(1, 16))
    run = tmp_path / "run"
    _, out, err = edgecl("pretrain", recipe_file, "--data", image_folder, "--out", run)
    (warning,) = [
        record for record in read_metrics(run / "metrics.jsonl") if record.get("because") == "plateau"
    ]
    assert warning["step"] == RECORDS
    assert f"edgecl: {warning['words']}" in err
    plateau = RunDir(run).read().plateau
    assert plateau.since == RECORDS
    record = report([run], out=tmp_path / "report")
    assert record["decision"].startswith(plateau.words)
    assert plateau.hint in record["support"][0]
    page = ReportDir(tmp_path / "report").page_file.read_text(encoding="utf-8")
    for place in (out.splitlines()[-1], page.partition("</header>")[0]):
        assert plateau.words in place
        assert plateau.hint in place


def test_a_run_that_is_not_stuck_has_no_plateau_in_its_record(trained_run, tmp_path):
    assert RunDir(trained_run).read().plateau is None
    assert "plateau" not in report([trained_run], out=tmp_path / "report")["decision"]
