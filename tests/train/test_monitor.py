"""What is logged, and when a run must stop."""

import math

import pytest
import torch

from edgecl.errors import CollapseError, NonFiniteError
from edgecl.methods.losses import cross_correlation_loss
from edgecl.methods.sacl_xd import SaclXd
from edgecl.nets.carving import create_slimmable
from edgecl.train.monitor import CollapseAlarm, MetricsFile, gradient_norms, read_metrics


def record(step=1, *, loss=1.0, std=0.9, diagonal=0.9, xd_host=0.5):
    return {
        "step": step,
        "loss": loss,
        "sacl": loss,
        "xd_host": xd_host,
        "xd_slim": 0.5,
        "diagonal": diagonal,
        "std": std,
        "lr": 0.1,
    }


@pytest.fixture
def alarm(tmp_path):
    return CollapseAlarm(run=tmp_path)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_run(alarm, tmp_path, loss):
    with pytest.raises(NonFiniteError) as caught:
        alarm.check(record(7, loss=loss))
    assert caught.value.problem == (
        f"the loss is {loss:g} (sacl {loss:g}, xd_host 0.5, xd_slim 0.5; learning rate 0.1)"
    )
    assert caught.value.where == {"run": tmp_path, "step": 7}
    assert "lower [optim] lr" in caught.value.hint


def test_terms_that_an_arm_lacks_are_not_named(alarm):
    with pytest.raises(NonFiniteError, match=r"\(sacl nan, xd_slim 0.5; learning rate 0.1\)"):
        alarm.check(record(loss=math.nan, xd_host=None))


def test_a_spread_that_stays_low_stops_the_run(alarm, tmp_path):
    for step in range(1, 5):
        alarm.check(record(step, std=0.05, diagonal=0.1))
    with pytest.raises(CollapseError) as caught:
        alarm.check(record(5, std=0.04, diagonal=0.02))
    assert caught.value.problem == (
        "the embedding collapsed: the spread of the projections was 0.04, below 0.1 (1 is an even spread), "
        "and the diagonal of the correlation 0.02, in 5 records in a row"
    )
    assert caught.value.where == {"run": tmp_path, "step": 5}
    assert "raise [loss] off_diagonal" in caught.value.hint


def test_a_spread_that_recovers_goes_on(alarm):
    for step in range(40):
        alarm.check(record(step, std=0.5 if step % 5 == 4 else 0.01, diagonal=0.0))


def test_a_large_mean_is_no_collapse_while_the_views_agree(alarm):
    for step in range(40):
        alarm.check(record(step, std=0.01, diagonal=0.9))


def test_metrics_that_are_no_numbers_become_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "loss": math.nan, "std": math.inf, "lr": 0.1, "knn": None})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "std": None, "lr": 0.1, "knn": None}
    ]


def write_metrics(path, steps):
    metrics = MetricsFile(path)
    for step in steps:
        metrics.append({"step": step})
    metrics.close()


def test_a_resumed_run_drops_the_records_it_will_make_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [1, 2, 2, 3, 4])
    metrics = MetricsFile(path, after_step=2)
    metrics.append({"step": 3})
    metrics.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2, 3]


def test_a_fresh_run_drops_everything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [1, 2])
    MetricsFile(path).close()
    assert read_metrics(path) == []


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [1, 2])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


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
    method = SaclXd(alpha=alpha, off_diagonal=0.05, xd_direction=direction)

    net.watched = {}
    (method.losses(method.project(net, views[0], views[1])).total * scale).backward()
    found = gradient_norms(net, net.watched, scale=scale)
    net.watched = None

    parameters = list(net.parameters())
    expected = {}
    for name in ("host", "slim"):
        projections = method.project(net, views[0], views[1])
        if name == "host":
            projections = projections._replace(slim_b=projections.slim_b.detach())
        else:
            projections = projections._replace(host_a=projections.host_a.detach())
        gradients = torch.autograd.grad(method.losses(projections).total, parameters, allow_unused=True)
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
