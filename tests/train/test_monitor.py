"""What is logged, and when a run must stop."""

import contextlib
import json
import math

import pytest
import torch
from methods_of import method_of

from edgecl.errors import CollapseError
from edgecl.methods.losses import cross_correlation_loss
from edgecl.methods.method import Embeddings
from edgecl.nets.build import create_slimmable
from edgecl.train.monitor import CollapseAlarm, MetricsFile, gradient_norms, read_metrics


def record(step=1, *, loss=1.0, std=0.9, diagonal=0.9):
    return {"step": step, "loss": loss, "diagonal": diagonal, "std": std}


@pytest.fixture
def alarm(tmp_path, said):
    return CollapseAlarm(run=tmp_path, warn=said.append)


@pytest.fixture
def said():
    return []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_not_taken_for_a_collapse(alarm, loss):
    for step in range(10):
        assert alarm.check(record(step, loss=loss, std=math.nan, diagonal=math.nan)) is None


def test_a_spread_that_stays_low_is_warned_of_and_stops_the_run(alarm, tmp_path, said):
    for step in range(1, 5):
        assert alarm.check(record(step, std=0.05, diagonal=0.1)) == "collapse"
    (warning,) = said
    assert "step 1: the embedding may be collapsing" in warning
    with pytest.raises(CollapseError) as caught:
        alarm.check(record(5, std=0.04, diagonal=0.02))
    assert "0.04, below 0.1" in caught.value.problem
    assert caught.value.where == {"run": tmp_path, "step": 5}
    assert "a higher [method.coding_rate] weight" in caught.value.hint


def test_a_spread_that_recovers_goes_on(alarm):
    for step in range(40):
        alarm.check(record(step, std=0.5 if step % 5 == 4 else 0.01, diagonal=0.0))


def test_a_large_mean_is_no_collapse_while_the_views_agree(alarm):
    for step in range(40):
        alarm.check(record(step, std=0.01, diagonal=0.9))


def look(step, rank_me):
    return {"step": step, "rankme_host": 50.0, "rankme_slim": rank_me}


def test_a_method_that_does_not_correlate_its_views_is_evaluated_by_the_spread(alarm, said):
    known = {key: value for key, value in record(std=0.05).items() if key != "diagonal"}
    assert alarm.check(known) == "collapse"
    assert "diagonal" not in said[0]
    assert alarm.check({**known, "std": 0.5}) is None


def test_rankme_that_falls_three_times_in_a_row_is_warned_of(alarm, said):
    for step, value in enumerate([9.0, 8.0, 8.5, 8.0, 7.0]):
        assert alarm.check_quality(look(step, value)) is None
    assert alarm.check_quality(look(5, 6.0)) == "rankme falls"
    assert "step 5: RankMe fell 3 times in a row, 8.5 > 8.0 > 7.0 > 6.0" in said[0]


def test_an_alarm_goes_on_where_it_was(alarm, tmp_path, said):
    for step, value in enumerate([9.0, 8.0, 7.0]):
        alarm.check_quality(look(step, value))
        alarm.check(record(step, std=0.05, diagonal=0.1))
    resumed = CollapseAlarm(run=tmp_path, warn=said.append)
    resumed.restore(json.loads(json.dumps(alarm.state())))
    assert resumed.check_quality(look(3, 6.0)) == "rankme falls"
    assert resumed.check(record(4, std=0.05, diagonal=0.1)) == "collapse"
    with pytest.raises(CollapseError):
        resumed.check(record(5, std=0.05, diagonal=0.1))


def write_metrics(path, *records):
    with contextlib.closing(MetricsFile(path)) as metrics:
        for record in records:
            metrics.append(record)


STEPS = [{"step": step} for step in (1, 2, 3)]


def test_records_after_a_step_are_dropped_while_the_file_is_open(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in STEPS:
        metrics.append(step)
    metrics.keep_until(1)
    metrics.append({"step": 2, "again": True})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "again": True}]


def test_metrics_that_are_no_numbers_become_null(tmp_path):
    write_metrics(
        tmp_path / "metrics.jsonl", {"step": 1, "loss": math.nan, "std": math.inf, "lr": 0.1, "knn": None}
    )
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "std": None, "lr": 0.1, "knn": None}
    ]


def test_a_run_that_starts_again_keeps_what_happened_but_not_its_first_look(tmp_path):
    """The look before the first step is taken again."""
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, {"step": 0, "rankme_host": 9.0}, {"step": 0, "event": "went back"}, {"step": 1})
    MetricsFile(path, after_step=0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "event": "went back"}]


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, *STEPS[:2])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_line_that_is_no_record_costs_no_other(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, *STEPS)
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, b"[]", b"\xff", b'{"no step": 1}', second, third]) + b"\n")
    MetricsFile(path, after_step=2).close()
    said = capsys.readouterr().err
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert all(f"line {number} of '{path}' is no record and left out" in said for number in (2, 3, 4))


def norm(gradients):
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


@pytest.mark.parametrize("direction", ["both", "slim_only"])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradient_norms_are_those_of_the_two_passes_apart(make_recipe, alpha, direction, scale):
    """Each pass apart: the other's projections are taken as constants, and autograd asked again."""
    torch.manual_seed(0)
    net = create_slimmable(make_recipe())
    views = torch.randn(2, 8, 3, 32, 32)
    method = method_of(net, alpha=alpha, off_diagonal=0.05, xd_direction=direction)

    net.watched = {}
    (method.loss(method(views, 0), 0)[0] * scale).backward()
    found = gradient_norms(net, net.watched, scale=scale)
    net.watched = None

    parameters = list(net.parameters())
    expected = {}
    for name in ("host", "slim"):
        learnt, targets = method(views, 0)
        other = {"host": "slim_b", "slim": "host_a"}[name]
        cut = Embeddings({**learnt, other: learnt[other].detach()}, targets)
        gradients = torch.autograd.grad(method.loss(cut, 0)[0], parameters, allow_unused=True)
        expected[f"grad_norm_{name}"] = norm(gradient for gradient in gradients if gradient is not None)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found["grad_norm_host"] != pytest.approx(found["grad_norm_slim"], rel=1e-2)


def test_one_net_has_no_slim_gradient(make_recipe):
    net = create_slimmable(make_recipe("host.width=0.5"))
    views = torch.randn(2, 8, 3, 32, 32)
    net.watched = {}
    cross_correlation_loss(
        net.forward_host(views[0]), net.forward_host(views[1]), off_diagonal=0.1
    ).total.backward()
    found = gradient_norms(net, net.watched, scale=1.0)
    assert found["grad_norm_slim"] is None
    assert found["grad_norm_host"] == pytest.approx(norm(p.grad for p in net.parameters()), rel=1e-6)
