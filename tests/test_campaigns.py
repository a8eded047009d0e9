"""Benchmarks that train for hours: stopped and gone on with they give what they give in one go, and count right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from edgecl.config.recipe import read_recipe
from edgecl.errors import CollapseError, RecipeError
from edgecl.evaluate.cost import forward_cost
from edgecl.nets.backbone import create_backbone, feature_count

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))

import arms  # noqa: E402
import campaign  # noqa: E402
import gpu  # noqa: E402
import start  # noqa: E402

TINY = f"""\
recipe = "{BENCHMARKS / "tiny.toml"}"
set = ["data.limit=40", "run.checkpoint_steps=1", "run.log_every=1"]
epochs = 4
seeds = 1
evaluate_on = "demo:validation"
labels_per_class = 2
draws = 2

[arms.sacl-xd]

[arms.barlow-twins]
set = ["host.width=0.5", "method.alpha=1.0"]
"""


def environment():
    paths = [str(REPOSITORY), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def begin(name, *words):
    """Start a benchmark in a process group of its own, so that it and its runs can be killed at once."""
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def complete(process):
    said, complaints = process.communicate(timeout=1800)
    assert process.returncode == 0, complaints
    lines = said.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


def lines_of(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def accuracy(line):
    return {key: line[key] for key in ("knn_top1", "linear_top1", "few", "rankme", "diagonal", "steps")}


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    file = tmp_path_factory.mktemp("campaign") / "tiny.toml"
    file.write_text(TINY)
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory, listed):
    """A campaign that two processes finished together, and what they printed."""
    out = tmp_path_factory.mktemp("finished")
    both = [begin("arms", listed, "--data", "demo", "--out", out) for _ in range(2)]
    return out, [complete(process) for process in both]


# --- stopping, resuming, sharing ---


@pytest.mark.slow
def test_two_processes_on_one_directory_do_each_run_once(finished):
    out, _ = finished
    assert Counter(line["arm"] for line in lines_of(out)) == {"sacl-xd": 1, "barlow-twins": 1}
    records = [json.loads(file.read_text()) for file in out.glob("runs/*/pretrain/run.json")]
    assert [record["state"] for record in records] == ["done", "done"]
    assert not any(record["resumed_with"] for record in records)


@pytest.mark.slow
def test_a_campaign_that_was_killed_and_stopped_gives_what_it_gives_in_one_go(finished, listed, tmp_path):
    (whole,) = [accuracy(line) for line in lines_of(finished[0]) if line["arm"] == "sacl-xd"]
    alone = listed.with_name("alone.toml")
    alone.write_text(TINY.partition("[arms.barlow-twins]")[0])

    def stop_after(step, number):
        process = begin("arms", alone, "--data", "demo", "--out", tmp_path)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            records = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/pretrain/run.json")]
            if any(step <= record["step"] < record["total_steps"] for record in records):
                break
            time.sleep(0.01)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.communicate(timeout=300)
        return process.returncode

    assert stop_after(1, signal.SIGKILL) == -signal.SIGKILL
    assert stop_after(3, signal.SIGTERM) == 0
    assert not (tmp_path / "results.jsonl").exists()
    complete(begin("arms", alone, "--data", "demo", "--out", tmp_path))
    assert [accuracy(line) for line in lines_of(tmp_path)] == [whole]
    (record,) = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/pretrain/run.json")]
    assert record["resumed_with"]


@pytest.mark.slow
def test_ctrl_c_ends_the_script_around_a_campaign_too(listed, tmp_path):
    process = begin("arms", listed, "--data", "demo", "--out", tmp_path)
    while process.poll() is None and not list(tmp_path.glob("runs/*/log.txt")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, complaints = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "goes on" in complaints
    assert "Unfinished, 2 of 2 runs" in said


@pytest.mark.slow
def test_a_run_that_is_finished_is_evaluated_on_test_images_without_being_trained_again(
    finished, listed, tmp_path, monkeypatch
):
    out, _ = finished
    given = arms.read_campaign(listed)
    (row,) = [
        row for row in arms.plan(given, data="demo", evaluate_on="demo", split="test") if row.arm == "sacl-xd"
    ]
    monkeypatch.setattr("edgecl.train.pretrain.pretrain", None)
    line = campaign.finish(row.runs[0], out / "runs" / row.runs[0].key)
    (before,) = [line for line in lines_of(out) if line["arm"] == "sacl-xd"]
    assert line["split"] == "test"
    assert line["run"] == before["run"]
    assert line["identity"] != before["identity"]
    assert line["diagonal"] == before["diagonal"]


def test_test_images_are_not_looked_at_by_accident(listed, tmp_path, capsys, monkeypatch):
    words = ["arms.py", str(listed), "--data", "demo", "--out", str(tmp_path), "--on-test"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        arms.main()
    assert "--test" in capsys.readouterr().err


def test_a_run_that_collapses_is_a_result_and_not_tried_again(monkeypatch, tmp_path):
    run = campaign.Run(
        "x", str(BENCHMARKS / "tiny.toml"), (), 0, data="demo", evaluate_on=campaign.DEMO_VALIDATION
    )

    def collapse(*given):
        raise CollapseError("the embedding collapsed", where={"step": 3})

    monkeypatch.setattr(campaign, "train", collapse)
    campaign.append_result(tmp_path, campaign.finish(run, tmp_path))
    assert campaign.read_results(tmp_path)[run.identity]["failed"] == "the embedding collapsed"
    monkeypatch.setattr(campaign, "_process_of", None)
    assert campaign.work([run], tmp_path) == 0


def test_a_torn_line_is_left_out_and_the_next_stands_whole(tmp_path):
    campaign.append_result(tmp_path, {"identity": "a"})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"identity": "b", "kn')
    campaign.append_result(tmp_path, {"identity": "c"})
    assert list(campaign.read_results(tmp_path)) == ["a", "c"]


def test_equal_settings_are_one_run_and_others_another(tmp_path):
    def run(*assignments, **more):
        return campaign.Run("x", "demo", assignments, 0, data="demo", evaluate_on="", **more)

    default = read_recipe("demo").method.alpha
    assert run().key == run(f"method.alpha={default}").key
    others = [run("method.alpha=0.5"), run("method.name=simclr"), run("method.name=byol"), run(threads=2)]
    assert len({one.identity for one in (run(), *others, run(machine="another"))}) == 6
    assert run().key == run(labels_per_class=3).key
    assert run().identity != run(labels_per_class=3).identity


# --- what is held out ---


def test_held_out_images_are_an_even_share_and_no_longer_trained_on(image_folder, tmp_path):
    train, validation = (Path(part) for part in campaign.hold_out(tmp_path, str(image_folder), 6))
    pictures = {path.relative_to(image_folder) for path in image_folder.rglob("*.*")}
    parts = [{path.relative_to(part) for path in part.rglob("*.*")} for part in (train, validation)]
    assert parts[0] | parts[1] == pictures
    assert not parts[0] & parts[1]
    shares = Counter(path.parts[0] for path in parts[1])
    assert sum(shares.values()) == 6
    assert len(set(shares.values())) == 1
    assert campaign.hold_out(tmp_path, str(image_folder), 6) == (str(train), str(validation))
    with pytest.raises(SystemExit, match="other images"):
        campaign.hold_out(tmp_path, str(image_folder), 3)


# --- what is counted ---


def test_an_arm_that_matches_flops_trains_for_as_long_as_the_other_costs(listed):
    file = listed.with_name("matched.toml")
    file.write_text(TINY.replace("epochs = 4", "epochs = 100") + 'match_flops = ["sacl-xd"]\n')
    rows = arms.plan(arms.read_campaign(file), data="demo", evaluate_on="")
    (matched,) = [row for row in rows if row.target]
    price = {}
    for width in (0.75, 0.5):
        net = create_backbone("test_efficientnet", width=width)
        projector = feature_count(net) * 16 + 16 * 16
        price[width] = forward_cost(net, (1, 3, 32, 32)).training_flops + 2 * projector
    assert matched.epochs == round(100 * 4 * (price[0.75] + price[0.5]) / (6 * price[0.5]))
    assert matched.runs[0].settings().run.epochs == matched.epochs


TABLE = """\
compare = [{ these = ["sacl-xd"], others = ["barlow-twins"] }]
anchors = [{ name = "ResNet-18, SimCLR", epochs = "1, 10, 30", knn = "28.2, 56.5, 66.3" }]
"""


def test_the_table_gives_paired_intervals_and_lists_what_is_unfinished(listed, tmp_path, capsys):
    file = listed.with_name("table.toml")
    file.write_text(TINY.replace("seeds = 1\n", "seeds = 3\n" + TABLE) + 'match_flops = ["sacl-xd"]\n')
    given = arms.read_campaign(file)
    rows = arms.plan(given, data="demo", evaluate_on="")
    numbers = {
        # Differences at equal epochs: 1, 2, 3 and 2.0, 2.1, 1.9; at equal FLOPs there is one seed.
        ("sacl-xd", None): [(51.0, 62.0), (52.0, 62.1), (53.0, 61.9)],
        ("barlow-twins", None): [(50.0, 60.0), (50.0, 60.0), (50.0, 60.0)],
        ("barlow-twins", "sacl-xd"): [(49.0, 63.0)],
    }
    for row in rows:
        for run, (knn, linear) in zip(row.runs, numbers[row.arm, row.target], strict=False):
            line = {"identity": run.identity, "knn_top1": knn, "linear_top1": linear, "few": [40.0, 42.0]}
            campaign.append_result(
                tmp_path,
                {**line, "rankme": 60, "training_flops": 2e15, "projector_flops": 1e14, "wall_s": 1800},
            )
    counted = arms.print_tables(given, rows, tmp_path)
    said = capsys.readouterr().out
    # Student's t at two degrees of freedom: 4.303; 4.303 x 1 / sqrt(3) = 2.48, 4.303 x 0.1 / sqrt(3) = 0.25.
    assert (
        "| sacl-xd | 4 | 3 | 52.0 [49.5, 54.5] | 62.0 [61.8, 62.2] | 41.0 [41.0, 41.0] | 60 | 2 + 0.1 | 0.50 |"
        in said
    )
    assert (
        "| sacl-xd - barlow-twins | epochs | 3 | +2.0 [-0.5, 4.5], not resolved | +2.0 [1.8, 2.2] | "
        "+0.0 [0.0, 0.0], not resolved |"
    ) in said
    matched = rows[-1].epochs
    assert f"FLOPs, those of sacl-xd (4 and {matched} epochs) | 1 | +2.0 (one seed) | -1.0 (one seed)" in said
    assert "| ResNet-18, SimCLR | 1, 10, 30 | published | 28.2, 56.5, 66.3 |" in said
    assert "Unfinished, 2 of 9 runs" in said
    assert "- barlow-twins, FLOPs of sacl-xd, seed 1: not begun" in said
    assert (counted["finished"], counted["runs"]) == (7, 9)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (TINY + 'match_flops = ["sacl-dx"]\n', "sacl-dx"),
        (TINY.replace("draws = 2", 'compare = [{ these = ["a"], others = ["sacl-xd"] }]'), "'a'"),
        (TINY.replace('evaluate_on = "demo:validation"', ""), "evaluate_on"),
    ],
)
def test_what_a_campaign_names_must_be_in_it(tmp_path, text, named):
    (tmp_path / "campaign.toml").write_text(text)
    with pytest.raises(RecipeError, match=named):
        arms.read_campaign(tmp_path / "campaign.toml")


@pytest.mark.parametrize(
    "file", sorted((BENCHMARKS / "campaigns").glob("*.toml")), ids=lambda file: file.stem
)
def test_every_campaign_can_be_planned(file):
    given = arms.read_campaign(file)
    rows = arms.plan(given, data="demo", evaluate_on="")
    assert {row.arm for row in rows} == set(given.arms)
    found = {run.identity for row in rows if not row.target for run in row.runs}
    assert len(found) == given.seeds * len(given.arms)


# --- start.py ---


@pytest.mark.slow
def test_start_runs_each_thread_count_in_a_process_of_its_own(tmp_path):
    words = ["--recipe", BENCHMARKS / "tiny.toml", "--set", "data.limit=60", "--seeds", 1, "--threads", "1,2"]
    said, found = complete(begin("start", "--out", tmp_path, *words))
    assert [line["threads"] for line in lines_of(tmp_path)] == [1, 2]
    assert (found["finished"], found["runs"]) == (2, 2)
    assert all(line["n_evaluated"] == 1000 for line in lines_of(tmp_path))
    assert "| all | **worst** |" in said
    assert campaign.processor()[0] in said


def test_the_worst_and_the_median_are_those_of_each_number_alone():
    lines = [
        {"knn_top1": 70, "few": [50, 60], "linear_top1": 90, "rankme": 5, "plateau": "stuck"},
        {"knn_top1": 80, "few": [40, 44], "linear_top1": 92, "rankme": 50, "plateau": None},
        {"knn_top1": 85, "few": [70, 71], "linear_top1": 91, "rankme": 60, "plateau": None},
    ]  # fmt: skip
    found = start.summarize(lines)
    assert found["worst"] == {"knn_top1": 70, "few": 42, "linear_top1": 90, "rankme": 5}
    assert found["median"] == {"knn_top1": 80, "few": 55, "linear_top1": 91, "rankme": 50}
    assert (found["on_plateau"], found["count"]) == (1, 3)


# --- gpu.sh ---


@pytest.mark.slow
def test_the_gpu_run_goes_through_as_a_toy_on_a_cpu(tmp_path):
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), "--toy", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    parts = {
        line["part"]: line for line in map(json.loads, (tmp_path / "parts.jsonl").read_text().splitlines())
    }
    assert list(parts) == ["machine", "pretrain fp32", "input", "arms"]
    # There is no nvJPEG on a CPU: that part fails, is written down, and the others go on.
    assert [name for name, line in parts.items() if line["exit"]] == ["input"]
    assert "failed" in parts["input"]
    assert "absent" in parts["machine"]["found"]["nccl"]
    assert parts["pretrain fp32"]["found"]["images_per_s"] > 0
    assert {line["arm"] for line in lines_of(tmp_path)} == {"sacl-xd", "barlow-twins"}
    assert "| sacl-xd - barlow-twins | epochs | 1 |" in (tmp_path / "table.md").read_text()


def test_a_part_that_takes_too_long_is_ended_and_one_without_time_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST_S", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    turn = gpu.Turn(tmp_path, time.monotonic() + 60)
    turn.measure(gpu.Part("sleeps", 0.2, ("-c", "import time; time.sleep(600)")), keep_s=0)
    turn.measure(gpu.Part("speaks", 30, ("-c", "print('{\"x\": 1}')")), keep_s=0)
    turn.measure(gpu.Part("late", 30, ("-c", "")), keep_s=120)
    sleeps, speaks, late = map(json.loads, (tmp_path / "parts.jsonl").read_text().splitlines())
    assert "ended after" in sleeps["failed"]
    assert speaks["found"] == {"x": 1}
    assert late["left_out"] == "no time left"
