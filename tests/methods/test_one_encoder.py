"""SimCLR and EMP-SSL: against SACL-XD's arm of one net, and against a reference written here."""

import numpy as np
import pytest
import torch
from methods_of import method_of

from edgecl.methods.losses import coding_rate, cross_correlation_loss
from edgecl.methods.method import Embeddings


@pytest.fixture
def local(views):
    return [view[..., :8, 2:10].clone() for view in views]


def one_net(make_net):
    return make_net(host_width=1.0)


def gradients(method, net, views):
    net.zero_grad()
    total, terms = method.loss(method(views, 0), 0)
    total.backward()
    return total.detach(), terms, [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_simclr_is_sacl_xds_arm_of_one_net_bit_for_bit(make_net, views, local, weight):
    net, given = one_net(make_net), [*views, *local]
    settings = {"temperature": 0.3, "coding_rate": {"weight": weight}}
    arm = method_of(net, alpha=1.0, loss="simclr", local_count=2, **settings)
    simclr = method_of(net, "simclr", local_count=2, **settings)
    (total, terms, found), (expected, arms, pulls) = (gradients(one, net, given) for one in (simclr, arm))
    assert torch.equal(total, expected)
    assert torch.equal(terms["contrastive"], arms["sacl"])
    for name in ("coding_rate", "diagonal", "off_diagonal_rms"):
        assert terms[name] is arms[name] is None or torch.equal(terms[name], arms[name])
    assert all(torch.equal(one, other) for one, other in zip(found, pulls, strict=True))


def standardized(z):
    return (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)


def test_emp_ssl_is_the_reference_of_any_number_of_views(make_net):
    net = one_net(make_net)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 16, 6, generator=generator, dtype=torch.float64) + torch.arange(6)
    rate = {"weight": 0.2, "epsilon": 0.4}
    method = method_of(net, "emp-ssl", views=4, local_count=1, coding_rate=rate)
    names = [*(f"view_{number}" for number in range(4)), "local_0"]
    found, terms = method.loss(Embeddings(dict(zip(names, z, strict=True)), {}), 0)
    middle = standardized(z.mean(0).numpy())
    distances = []
    for one in map(standardized, z.numpy()):
        cosine = (one * middle).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(middle, axis=1)
        distances.append((2 - 2 * cosine).mean())
    rates = [float(coding_rate(one, epsilon=0.4)) for one in z[:4]]  # of whole views alone
    assert float(terms["alignment"]) == pytest.approx(np.mean(distances), rel=1e-9)
    assert float(terms["coding_rate"]) == pytest.approx(np.mean(rates), rel=1e-9)
    assert float(found) == pytest.approx(np.mean(distances) - 0.2 * np.mean(rates), rel=1e-9)
    watched = cross_correlation_loss(z[0], z[1], off_diagonal=0.0)
    assert torch.equal(terms["diagonal"], watched.diagonal)


@pytest.mark.parametrize("name", ["simclr", "emp-ssl"])
def test_every_view_goes_once_through_the_one_encoder_and_local_ones_leave_its_statistics(
    make_net, views, local, name
):
    net = one_net(make_net)
    method = method_of(net, name, local_count=2, **({"views": 3} if name == "emp-ssl" else {}))
    whole = [*views, views[0].flip(0)][: method.whole_views]
    embeddings = method([*whole, *local], 0)
    assert list(embeddings.learnt) == [
        *(f"view_{number}" for number in range(len(whole))),
        "local_0",
        "local_1",
    ]
    assert embeddings.targets == {}
    assert all(z.requires_grad for z in embeddings.learnt.values())
    assert {int(norm.num_batches_tracked) for norm in net.host.modules() if hasattr(norm, "momentum")} == {
        len(whole)
    }


def test_what_a_method_draws_for_its_own_modules_leaves_the_runs_numbers_alone(make_net):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    method_of(one_net_of_another_seed(make_net), "simclr")
    assert torch.equal(torch.rand(3), expected)


def one_net_of_another_seed(make_net):
    state = torch.get_rng_state()
    net = one_net(make_net)
    torch.set_rng_state(state)
    return net
