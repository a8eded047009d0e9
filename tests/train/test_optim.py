"""The optimizer's groups and the learning rate of every step."""

import math

import pytest
import torch
from torch import nn

from edgecl.config.recipe import Optim
from edgecl.nets.backbone import is_norm
from edgecl.nets.build import create_slimmable
from edgecl.train.optim import create_optimizer, create_schedule, peak_rate

NAMES = ["lars", "adamw", "sgd"]


def rates(settings, *, batch_size=8, steps_per_epoch=10, total_steps=100):
    optimizer = create_optimizer(nn.Linear(3, 2), settings, batch_size=batch_size)
    schedule = create_schedule(
        optimizer,
        settings,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    found = []
    for step in range(total_steps):
        schedule.step_update(step)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_optimized_once_norms_and_biases_without_weight_decay(make_recipe, name):
    net = create_slimmable(make_recipe())
    optimizer = create_optimizer(net, Optim(name=name, weight_decay=0.03), batch_size=8)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    plain = {id(p) for module in net.modules() if is_norm(module) for p in module.parameters()}
    plain |= {id(p) for n, p in net.named_parameters() if n.endswith("bias")}
    assert len(plain) > 50
    for name, parameter in net.named_parameters():
        assert decay[id(parameter)] == (0.0 if id(parameter) in plain else 0.03), name
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())


@pytest.mark.parametrize(("lr_batch", "expected"), [(None, 0.4), (256, 0.8), (512, 0.4), (1024, 0.2)])
def test_rate_scales_with_the_batch(lr_batch, expected):
    settings = Optim(lr=0.4, lr_batch=lr_batch)
    assert peak_rate(settings, batch_size=512) == pytest.approx(expected)
    optimizer = create_optimizer(nn.Linear(3, 2), settings, batch_size=512)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(expected)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_a_line_and_then_a_cosine(name):
    settings = Optim(name=name, lr=0.4, lr_batch=16, warmup_epochs=2.0, final_lr_fraction=0.1)
    found = rates(settings, batch_size=8)
    peak, floor = 0.2, 0.02
    for step in (0, 1, 5, 19):
        assert found[step] == pytest.approx(peak * (step + 1) / 21)
    for step in (20, 50, 75, 99):
        expected = floor + (peak - floor) * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert found[step] == pytest.approx(expected)


def test_warm_up_longer_than_the_run_still_ends():
    found = rates(Optim(name="sgd", lr=0.4, warmup_epochs=50.0), total_steps=10)
    assert all(math.isfinite(rate) for rate in found)
    assert found[:9] == pytest.approx([0.4 * (step + 1) / 10 for step in range(9)])


def test_the_rate_of_a_step_does_not_hang_on_the_steps_before():
    settings = Optim(name="sgd", lr=0.4, warmup_epochs=1.0)
    optimizer = create_optimizer(nn.Linear(3, 2), settings, batch_size=8)
    schedule = create_schedule(optimizer, settings, batch_size=8, steps_per_epoch=10, total_steps=100)
    schedule.step_update(57)
    assert optimizer.param_groups[0]["lr"] == rates(settings)[57]


def lars_step(settings, *, lr):
    """Take one step on a weight of norm 4 and a bias, both with gradients of norm 0.02."""
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(1.0)
    net.weight.grad = torch.full_like(net.weight, 0.005)
    net.bias.grad = torch.full_like(net.bias, 0.01)
    optimizer = create_optimizer(net, settings, batch_size=8)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return 1 - float(net.weight.detach()[0, 0]), 1 - float(net.bias.detach()[0])


# The trust ratio is 0.001 * 4 / 0.02 = 0.2 times a rate of 0.1 (unclipped), or at most 1 after division by the rate.
@pytest.mark.parametrize(
    ("trust_clip", "trust_coefficient", "expected"),
    [(False, 0.001, 0.1 * 0.2 * 0.005), (True, 0.001, 0.1 * 0.005), (True, 0.0001, 0.1 * 0.2 * 0.005)],
)
@pytest.mark.parametrize("weight_decay", [0.0, 1e-9])
def test_lars_takes_the_step_of_its_trust_ratio(trust_clip, trust_coefficient, expected, weight_decay):
    settings = Optim(
        name="lars",
        weight_decay=weight_decay,
        trust_clip=trust_clip,
        trust_coefficient=trust_coefficient,
    )
    weight, bias = lars_step(settings, lr=0.1)
    assert weight == pytest.approx(expected, rel=2e-3)
    assert bias == pytest.approx(0.1 * 0.01, rel=2e-3)


@pytest.mark.parametrize("trust_clip", [True, False])
def test_lars_stands_still_at_rate_zero(trust_clip):
    assert lars_step(Optim(name="lars", trust_clip=trust_clip), lr=0.0) == (0.0, 0.0)
