"""The benchmarks run, and what they compare is comparable; how fast anything is, no test says."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))

# One whose slim net has its skips where the host has them.
ARCH = "mobilenetv3_small_100"
TINY = ["--net", ARCH, "--size", "32", "--batch", "8", "--projector", "24", "24"]


def environment():
    paths = [str(REPOSITORY), str(BENCHMARKS), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(name, *words):
    """Run a benchmark in a process of its own; return what it printed, and its last line as JSON."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


# --- step.py ---


@pytest.fixture(scope="module")
def step():
    return importlib.import_module("step")


def step_options(*, batch=8):
    return argparse.Namespace(
        device="cpu", size=32, batch=batch, projector=[24, 24], precision="fp32", compile=False
    )


@pytest.fixture
def ways(step):
    return step.Ways(ARCH, step_options())


def test_slices_masks_and_plain_nets_compute_the_same_loss_and_gradient(step, ways):
    found = step.check_agreement(ways)
    assert found["loss"] < 1e-5
    assert found["loss of plain nets"] < 1e-5
    assert found["gradient"] < 1e-3
    assert found["next loss"] < 1e-3


def test_masks_that_let_channels_through_are_found_before_anything_is_timed(step, ways):
    for mask in ways.masked._masks.values():
        mask.fill_(1)
    with pytest.raises(SystemExit, match="slices and masks differ in the loss by"):
        step.check_agreement(ways)


def test_flops_of_a_step_are_four_units_of_both_nets_and_of_masks_eight_of_the_host(step):
    flops = step.flops_of_step(ARCH, step_options(batch=1))
    losses = 7 * 2 * 24**2
    host = (flops["masks"] - losses) / 8
    slim = (flops["slices"] - losses) / 4 - host
    assert 1.5 < host / slim < 2.25
    assert flops["masks_over_slices"] == pytest.approx(2 * host / (host + slim), rel=1e-2)


def test_step_benchmark_prints_a_table_and_json():
    said, found = run(
        "step", "--nets", ARCH, "--size", 32, "--batch", 8, "--projector", 24, 24, "--rounds", 1
    )
    assert found["conditions"]["threads"] == 1
    result = found["results"][ARCH]
    names = ["slices", "masks", "plain nets", "four passes", "losses", "optimizer", "Barlow Twins"]
    assert list(result["times"]) == names
    assert all(result["times"][name]["ms"] > 0 for name in names)
    low, high = result["ratios"]["masks"]["range"]
    assert low <= result["ratios"]["masks"]["over_slices"] <= high
    assert result["agreement"]["loss"] < 1e-5
    for name in names:
        assert f"| {name} | {result['times'][name]['ms']:.1f} ms" in said
    assert "the same step by plain nets" in said


def test_step_benchmark_times_a_recipe_with_and_without_small_maps():
    said, found = run("step", "--recipe", BENCHMARKS / "tiny.toml", "--rounds", 1)
    assert list(found["ms"]) == ["torch's convolutions", "small maps as products"]
    assert f"ratio {found['ratio']:.2f}" in said


# --- scaling.py ---


@pytest.fixture(scope="module")
def scaling():
    return importlib.import_module("scaling")


COUNT = """\
import argparse, json, sys, warnings

import accelerate, torch, torch.profiler
import edgecl.train.carve, edgecl.train.step

import scaling
import worlds

given = argparse.Namespace(net="mobilenetv3_small_100", size=32, batch=4, projector=[24, 20])


def main():
    from edgecl.distributed import processes

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    processes.join("cpu")
    for arm in sys.argv[1:]:
        run, sums = scaling.stepping(given, arm)
        found = scaling.count_bytes(run, sums, batch=4)
        if processes.is_main():
            print(json.dumps({"arm": arm, **found}), flush=True)
    processes.leave()


worlds.fork_world(main, 2)
"""


def test_bytes_of_the_arms_are_those_of_the_formula(scaling, tmp_path):
    # The others differ from these in nothing that is sent.
    arms = ["SACL-XD, slim_only", "Barlow Twins"]
    assert set(arms) < set(scaling.ARMS)
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    done = subprocess.run(
        [sys.executable, str(script), *arms],
        capture_output=True,
        text=True,
        env={
            **environment(),
            "PYTHONPATH": f"{REPOSITORY / 'tests'}{os.pathsep}{environment()['PYTHONPATH']}",
        },
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["arm"] for one in found] == arms
    for one in found:
        expected = scaling.loss_bytes(20, one["arm"])
        assert one["losses"] == expected["matrices"] + expected["vectors"] + scaling.VOTE_BYTES, one["arm"]
        host = scaling.ARMS[one["arm"]].settings.get("host", {}).get("width", 1.5)
        parameters = scaling.changed_parameters("mobilenetv3_small_100", [24, 20], host_width=host)
        assert one["gradients"] == 4 * parameters, one["arm"]


def test_loss_bytes_of_sacl_xd_are_three_matrices_and_twenty_vectors(scaling):
    assert scaling.loss_bytes(10) == {"matrices": 4 * 3 * 100, "vectors": 4 * 20 * 10, "calls": 23}


def test_a_ring_moves_almost_twice_the_bytes_and_nothing_alone(scaling):
    assert scaling.ring_s(1e9, scaling.Cluster(1, 1e9, "")) == 0
    assert scaling.ring_s(1e9, scaling.Cluster(8, 1e9, "")) == pytest.approx(1.75)
    assert scaling.latency_s(2, scaling.Cluster(8, 1, "")) == pytest.approx(2 * (10e-6 + 6 * 2e-6))


def test_the_numbers_of_docs_scaling_are_computed(scaling, capsys):
    tables = scaling.paper(timed=[scaling.TIMES_OF])
    scaling.print_paper(tables)
    text = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 40
    missing = [row for row in rows if row not in text]
    assert not missing
    for arch, dimensions in tables["crossover_dimensions"].items():
        assert f"`{arch}` {dimensions}" in " ".join(text.split())


@pytest.mark.slow
def test_scaling_benchmark_counts_in_real_jobs():
    said, found = run("scaling", *TINY, "--processes", 1, 2, "--force", "--rounds", 1, "--steps", 1)
    assert list(found["results"]) == ["1", "2"]
    for result in found["results"].values():
        assert result["bytes"] == result["expected_bytes"]
        assert set(result["weak"]) == {"images_per_s", "efficiency", "range", "efficiency_by_processor_time"}
    assert found["results"]["1"]["bytes"] == {"gradients": 0, "losses": 0}
    assert found["results"]["2"]["bytes"]["losses"] > 0
    assert "2 process(es): the bytes are those of the formula" in said


# --- startup.py ---


def test_startup_benchmark_prints_tables_and_json():
    said, found = run("startup", "--rounds", 1, "--only", "help", "ls")
    assert list(found["results"]) == ["python -c pass", "help", "ls"]
    assert found["results"]["python -c pass"]["processor_s"] < found["results"]["ls"]["processor_s"]
    assert list(found["imports"]) == ["help", "ls"]
    assert "typer" in found["imports"]["help"]["packages"]
    # What the house promises: no torch before training starts.
    assert "torch" not in found["imports"]["ls"]["packages"]
    assert "| edgecl --help |" in said


@pytest.mark.slow
def test_startup_benchmark_waits_for_the_first_step_of_a_run():
    _, found = run("startup", "--rounds", 1)
    assert list(found["results"])[-2:] == ["bench", "pretrain"]
    results = found["results"]
    assert results["pretrain"]["processor_s"] > results["python -c 'import torch'"]["processor_s"]
    assert "torch" in found["imports"]["pretrain"]["packages"]
    assert "torch" not in found["imports"]["bench"]["packages"]


# --- nets.py ---


def test_nets_take_turns_in_both_precisions():
    names = ["mobilenetv4_conv_small", "mobileone_s0"]
    table, found = run("nets", "--nets", *names, "--size", 32, "--rounds", 3, "--inferences", 2)
    assert [row["net"] for row in found["nets"]] == names
    assert all(name in table for name in names)
    for row in found["nets"]:
        for precision in ("fp32", "int8"):
            low, high = row[f"{precision}_middle_half_ms"]
            assert 0 < low <= row[f"{precision}_p50_ms"] <= high


# --- methods.py ---


def test_methods_take_turns_by_their_own_settings():
    names = ["moco-v2", "supcon", "seed"]
    table, found = run("methods", "--recipe", BENCHMARKS / "tiny.toml", "--methods", *names, "--rounds", 2)
    assert list(found["methods"]) == ["simclr", *names]
    assert all(name in table for name in names)
    steps = found["methods"]
    assert steps["simclr"]["range"] == [1, 1]
    assert steps["moco-v2"]["gflop"] < steps["simclr"]["gflop"] < steps["seed"]["gflop"]
    assert all(0 < one["range"][0] <= one["ratio"] <= one["range"][1] for one in steps.values())
