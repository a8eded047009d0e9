"""Processes with a share of the batch each learn what one process learns from the whole batch.

Real processes over gloo take a training step with every variant, as `edgecl selftest ddp` does: a real net with synchronized
batch norms, trained by the engine's own step through accelerate's DistributedDataParallel.

In float64. In float32 the same step, summed in another order, differs by 2e-5 in half of the tensors and by 4e-3 in the
worst: thirty batch norms amplify rounding, and now and then it takes an activation to the other side of a kink. In float64
it is less than 1e-9, so that the 1e-5 allowed here are far above rounding and far below any mistake.

A tensor is measured by its own largest number; one whose largest is under a millionth of the largest of its kind, by that:
the gradient of a norm's bias that the next norm takes away is zero but for rounding.
"""

import json

import pytest
from worlds import run_script

from edgecl.config.recipe import list_methods
from edgecl.train.selftest import TOLERANCE, VARIANTS

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from worlds import fork_world

from edgecl.distributed import processes
from edgecl.methods import losses
from edgecl.train import selftest

FOLDER, WORLDS = sys.argv[1], json.loads(sys.argv[2])
UNSYNCED = selftest.Variant("norms of a share", {"run": {"sync_norms": "none"}})
TWINS, SACL_XD = ([variant for variant in selftest.VARIANTS if variant.name == name] for name in ("Barlow Twins", "SACL-XD"))
IN_PARTS = [variant for variant in selftest.VARIANTS if "run" in variant.settings]


def plain(x):
    total = x.clone()
    distributed.all_reduce(total.detach())  # in place, as in public codes; autograd does not hear of it
    return total


def take(variants, shares):
    return selftest.run_variants(
        device="cpu", world_size=processes.world_size(), rank=processes.rank(), shares=shares, report=lambda _: None,
        variants=variants,
    )


def whole():
    in_parts = [(int(count), IN_PARTS) for count in WORLDS if count != "1"]
    for shares, variants in [(1, [*selftest.VARIANTS, UNSYNCED]), *in_parts]:
        for variant, found in take(variants, shares).items():
            save_file({key: value.contiguous() for key, value in found.items()}, f"{FOLDER}/{variant} for {shares}")


def gradients_of_the_host(found):
    names = [name for name in found if name.startswith("gradients/host.")]
    return [found[name] for name in names]


def compare(variants):
    count = processes.world_size()
    rows = {}
    for variant, found in take(variants, count).items():
        in_parts = count > 1 and variant in [other.name for other in IN_PARTS]
        expected = load_file(f"{FOLDER}/{variant} for {count if in_parts else 1}")
        assert found.keys() == expected.keys()
        mine, right = gradients_of_the_host(found), gradients_of_the_host(expected)
        lengths = [torch.stack([part.norm() for part in parts]).norm() for parts in (mine, right)]
        rows[variant] = {
            **{kind: selftest.difference(found, expected, kind=kind) for kind in selftest.KINDS},
            "too short by": float(lengths[1] / lengths[0]),
            "gradients times the world size": selftest.difference(
                {name: value * count for name, value in found.items()}, expected, kind="gradients"
            ),
            "gradients of the host": [len(right), sum(bool(part.any()) for part in right)],
            "batches tracked": float(found["statistics/host.backbone.bn1.num_batches_tracked"]),
        }
    return rows


def shared():
    count = processes.world_size()
    processes.join("cpu")
    results = {"right": compare([variant for variant in selftest.VARIANTS if variant.name in WORLDS[str(count)]])}
    if count == 2:
        results["norms of a share"] = compare([UNSYNCED])
    if count > 1:
        losses._sum_of_matrices = plain
        results["plain for the matrix"] = compare(TWINS)
    if count == 2:
        losses.sum_over_processes = plain
        results["plain"] = compare(SACL_XD)
        losses._sum_of_matrices = losses.sum_over_processes = lambda x: x
        losses.process_count = lambda: 1
        results["loss of a share"] = compare(SACL_XD)
    with open(f"{FOLDER}/{count}-{processes.rank()}.json", "w") as file:
        json.dump(results, file)
    processes.leave()


# Made once, not in every process.
for variant in selftest.VARIANTS:
    recipe = selftest.recipe_of(variant, batch_size=4)
    selftest.fresh_net(recipe.host.width, recipe.slim.all_widths)
fork_world(whole, 1)
for count in WORLDS:
    fork_world(shared, int(count))
"""

NAMES = [variant.name for variant in VARIANTS]
# What four processes do takes most of the time; the slow test gives them every variant.
QUICK = {"1": ["SACL-XD"], "2": NAMES, "4": ["SACL-XD", "SACL-XD, 4 widths"]}
RANKS = ["2-0", "2-1", "4-0", "4-1", "4-2", "4-3"]


def run(folder, worlds):
    script = folder / "processes.py"
    script.write_text(SCRIPT, encoding="utf-8")
    run_script(script, folder, json.dumps(worlds))
    ranks = [f"{count}-{rank}" for count in worlds for rank in range(int(count))]
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in ranks}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("processes"), QUICK)


def test_arms_are_all_ways_to_train():
    assert set(NAMES) >= {"SACL only", "XD only", "SACL-XD", *list_methods()} - {"sacl-xd"}


def hold_to_the_whole(results, worlds):
    for rank, rows in results.items():
        assert list(rows["right"]) == worlds[rank[0]]
        for variant, found in rows["right"].items():
            for kind in ("loss", "gradients", "statistics"):
                assert found[kind] <= TOLERANCE, (rank, variant, kind)


def test_a_step_of_each_process_is_that_of_the_whole_batch(results):
    hold_to_the_whole(results, QUICK)


@pytest.mark.slow
def test_a_step_of_each_of_four_processes_is_that_of_the_whole_batch_for_every_arm(tmp_path):
    every = {"1": NAMES, "4": NAMES}
    hold_to_the_whole(run(tmp_path, every), every)


@pytest.mark.parametrize("variant", NAMES)
def test_arm_gives_the_optimizer_gradients_and_moves_the_statistics(results, variant):
    """Nothing is compared with nothing."""
    found = results["2-1"]["right"][variant]
    tensors, with_gradient = found["gradients of the host"]
    assert tensors == with_gradient > 50
    assert found["batches tracked"] > 0


@pytest.mark.parametrize("rank", RANKS)
def test_plain_all_reduce_of_the_matrix_fails_by_the_number_of_processes(results, rank):
    """As in several public codes: the loss is right, and every gradient too small by the world size."""
    found, count = results[rank]["plain for the matrix"]["Barlow Twins"], int(rank[0])
    assert found["loss"] <= TOLERANCE
    assert found["gradients"] == pytest.approx(1 - 1 / count, rel=1e-3)
    assert found["gradients times the world size"] <= TOLERANCE


@pytest.mark.parametrize("rank", ["2-0", "2-1"])
def test_plain_all_reduce_everywhere_fails_by_about_the_number_of_processes(results, rank):
    found = results[rank]["plain"]["SACL-XD"]
    assert found["loss"] <= TOLERANCE
    assert found["gradients"] > 0.1
    assert found["too short by"] == pytest.approx(int(rank[0]), rel=0.3)


RATE = """
import json, sys
import torch
from worlds import fork_world

from edgecl.distributed import processes
from edgecl.methods.losses import coding_rate


def value_and_gradient(z):
    z = z.clone().requires_grad_()
    rate = coding_rate(z, epsilon=0.5)
    rate.backward()
    return rate.detach(), z.grad


def shared():
    # One process computes the whole before the others are met.
    z = torch.randn(12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:6] += 1
    whole, gradient = value_and_gradient(z)
    processes.join("cpu")
    rank, count = processes.rank(), processes.world_size()
    mine, pull = value_and_gradient(z.chunk(count)[rank])
    # Data-parallel training averages what the processes find.
    part = gradient.chunk(count)[rank]
    found = [float(abs(mine - whole) / abs(whole)), float((pull / count - part).abs().max() / part.abs().max())]
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(found, file)
    processes.leave()


fork_world(shared, 2)
"""


def test_rate_of_more_dimensions_than_samples_is_of_the_global_batch(tmp_path):
    """One process alone takes the smaller matrix; the variants above have as many samples as dimensions."""
    script = tmp_path / "rate.py"
    script.write_text(RATE, encoding="utf-8")
    run_script(script, tmp_path)
    for rank in range(2):
        assert max(json.loads((tmp_path / f"{rank}.json").read_text())) < 1e-12


@pytest.mark.parametrize("rank", ["2-0", "2-1"])
@pytest.mark.parametrize("kind", ["loss", "gradients"])
def test_loss_of_a_share_fails(results, kind, rank):
    assert results[rank]["loss of a share"]["SACL-XD"][kind] > 1e-2


@pytest.mark.parametrize("rank", ["2-0", "2-1"])
@pytest.mark.parametrize("kind", ["loss", "gradients", "statistics"])
def test_norms_of_a_share_fail(results, kind, rank):
    assert results[rank]["norms of a share"]["norms of a share"][kind] > 1e-2
