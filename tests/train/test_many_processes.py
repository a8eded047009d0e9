"""A run in several real processes over gloo: the same as in one, and one error where there is one."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from worlds import free_port, run_script, wait_until

from edgecl.config.recipe import recipe_from_tables
from edgecl.data.sources import open_source
from edgecl.nets.backbone import create_backbone
from edgecl.nets.build import create_slimmable
from edgecl.storage.checkpoint import read_newest
from edgecl.storage.directories import RunDir
from edgecl.train.pretrain import pretrain
from edgecl.train.quality import QualityWatch

from .conftest import looks_of, steps_of

STEPS = 5
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
}
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# One process imports torch; every scenario's processes are forks of it that run the command line.
SCRIPT = """
import json, os, signal, sys, time, traceback, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
import edgecl.train.pretrain
from edgecl.cli import main
from accelerate import Accelerator
from worlds import free_port, launcher_environment

folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])


def start(name, rank, world_size, port, words):
    child = os.fork()
    if child:
        return child
    for stream, number in (("out", 1), ("err", 2)):
        handle = os.open(folder / f"{name}-{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    if world_size > 1:
        os.environ.update(launcher_environment(rank, world_size, port))
    sys.argv = ["edgecl", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


codes = {}
for name, scenario in scenarios.items():
    port, ranks = free_port(), scenario["ranks"]
    os.environ.update(scenario.get("environment", {}))
    children = [start(name, rank, len(ranks), port, words) for rank, words in enumerate(ranks)]
    if "kill" in scenario:
        rank, number, when, step = scenario["kill"]
        until = time.monotonic() + 120
        while time.monotonic() < until:
            lines = Path(when).read_text().splitlines() if Path(when).is_file() else []
            if len(lines) >= step:
                break
            time.sleep(0.01)
        for each in range(len(ranks)) if rank is None else [rank]:
            os.kill(children[each], getattr(signal, number))
    codes[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory, tables, labelled_pictures):
    """Run every scenario once; give the folder and the exit codes of each scenario's processes."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = write_recipe(folder, tables)
    # Plain small steps: AdamW's first ones divide rounding by rounding, and large ones let it grow.
    plain = {"optim.name": "sgd", "optim.lr": 2e-5, "run.sync_norms": "all"}

    def words(out, *more, **settings):
        chosen = {**plain, **settings}
        assignments = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in chosen.items()]
        return [
            "pretrain",
            str(recipe),
            *("--data", str(labelled_pictures), "--device", "cpu", "--out", str(folder / out)),
            *(word for assignment in assignments for word in ("--set", assignment)),
            *more,
        ]

    # Norms over four samples of one pixel divide rounding by next to nothing; these have ten of four.
    apart = {"run__sync_norms": "none", "data__batch_size": 20, "host__stem_stride": 1}
    torch.save(
        create_backbone(tables["host"]["arch"], width=0.5, stem_stride=1).state_dict(), folder / "start.pth"
    )
    everything = {
        "host__init": str(folder / "start.pth"),
        "host__stem_stride": 1,
        "host__nested_start": True,
        "data__batch_size": 20,
        "method__coding_rate__weight": 0.1,
        "method__symmetric": True,
        "views__local_count": 2,
        "views__local_size": 24,
        "run__epochs": 1,
        # The rate's gradient is large where projections are almost alike, and rounding grows with it.
        "optim__lr": 2e-6,
    }
    # Norms of their own: every synchronized one waits for the other process, dozens of times a step.
    alone = {"run__sync_norms": "none"}
    long = {**alone, "run__epochs": 500, "run__quality_epochs": 500}
    table = {
        "one": {"ranks": [words("one")]},
        "two": {"ranks": [words("two", run__checkpoint_steps=STEPS)] * 2},
        "parts": {"ranks": [words("parts", **apart, run__accumulate=2)]},
        "two apart": {"ranks": [words("two-apart", **apart)] * 2},
        "whole": {"ranks": [words("whole", **apart, run__epochs=1)]},
        "all in one": {"ranks": [words("all-one", **everything)]},
        "all in two": {"ranks": [words("all-two", **everything)] * 2},
        "slow start": {"ranks": [words("slow", **alone, slim__slow_start=0.5, run__quality_epochs=2)] * 2},
        "uneven": {"ranks": [words("uneven", data__batch_size=7)] * 2},
        "other recipe": {"ranks": [words("other"), words("other", optim__lr=2e-4)]},
        "no such images": {"ranks": [words("gone"), [*words("gone"), "--data", "nowhere"]]},
        "killed": {
            "ranks": [words("killed", **long)] * 2,
            "kill": [1, "SIGKILL", str(folder / "killed" / "metrics.jsonl"), 3],
        },
        "preempted": {
            "ranks": [words("preempted", **long)] * 2,
            "kill": [1, "SIGTERM", str(folder / "preempted" / "metrics.jsonl"), 3],
        },
        "interrupted": {
            "ranks": [words("interrupted", **long)] * 2,
            "kill": [1, "SIGINT", str(folder / "interrupted" / "metrics.jsonl"), 3],
        },
    }
    script = folder / "processes.py"
    script.write_text(SCRIPT, encoding="utf-8")
    codes = json.loads(run_script(script, folder, json.dumps(table)).splitlines()[-1])
    return folder, codes


def said(folder, name, count=2):
    return [(folder / f"{name}-{rank}.err").read_text() for rank in range(count)]


def printed(folder, name, count=2):
    return [(folder / f"{name}-{rank}.out").read_text() for rank in range(count)]


def assert_close_runs(one, other):
    """Hold two runs to the same metrics and weights but for rounding, which grows from step to step."""
    first, second = steps_of(one), steps_of(other)
    assert [record["step"] for record in first] == [record["step"] for record in second]
    for before, after in zip(first, second, strict=True):
        for key in before.keys() - {"images_per_s"}:
            if before[key] is None:
                assert after[key] is None, key
            else:
                assert after[key] == pytest.approx(before[key], rel=2e-3, abs=5e-4), (before["step"], key)
    for key in ("loss", "diagonal", "std", "grad_norm_host", "grad_norm_slim"):
        assert second[0][key] == pytest.approx(first[0][key], rel=1e-4, abs=1e-5), key
    for before, after in zip(looks_of(one), looks_of(other), strict=True):
        assert after["rankme_slim"] == pytest.approx(before["rankme_slim"], rel=1e-2)
    weights, others = (read_newest(RunDir(path)).model for path in (one, other))
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_are_one(scenarios):
    folder, codes = scenarios
    assert codes["one"] == [0]
    assert codes["two"] == [0, 0], said(folder, "two")
    assert RunDir(folder / "two").read().processes == 2
    assert_close_runs(folder / "one", folder / "two")


def test_two_processes_are_one_with_given_weights_rate_symmetric_passes_and_local_views(scenarios):
    folder, codes = scenarios
    assert codes["all in one"] == [0]
    assert codes["all in two"] == [0, 0], said(folder, "all in two")
    assert steps_of(folder / "all-one")[0]["coding_rate"] > 0
    assert_close_runs(folder / "all-one", folder / "all-two")


def test_looks_at_quality_are_of_the_net_that_is_saved(scenarios, labelled_pictures):
    """Norms that are not synchronized differ between processes; what is saved are the first one's."""
    run = RunDir(scenarios[0] / "two-apart")
    recipe = recipe_from_tables(run.read().recipe, source="run.json")
    net = create_slimmable(recipe)
    net.load_state_dict(read_newest(run).model)
    alone = QualityWatch(
        open_source(str(labelled_pictures)),
        images=40,
        data=recipe.data,
        host=recipe.host,
        accelerator=Accelerator(cpu=True),
    ).measure(net)
    last = looks_of(run.path)[-1]
    for key, value in alone.items():
        assert last[key] == pytest.approx(value, rel=1e-4), key


def test_a_batch_in_parts_is_a_batch_in_processes(scenarios):
    """Batch norms see a part either way; correlations and gradients are those of the whole batch."""
    folder, codes = scenarios
    assert codes["parts"] == [0]
    assert codes["two apart"] == [0, 0]
    first, second = steps_of(folder / "parts"), steps_of(folder / "two-apart")
    for key in ("loss", "diagonal", "std", "grad_norm_host", "grad_norm_slim"):
        assert second[0][key] == pytest.approx(first[0][key], rel=1e-4, abs=1e-5), key
    # Step for step; with the norms of the whole batch the loss is another.
    assert len(first) == 4
    assert [record["loss"] for record in second] == pytest.approx(
        [record["loss"] for record in first], rel=2e-3
    )
    whole = steps_of(folder / "whole")
    assert first[0]["loss"] != pytest.approx(whole[0]["loss"], rel=1e-3)


def test_the_result_is_printed_once(scenarios):
    folder, _ = scenarios
    first, second = printed(folder, "two")
    assert "SACL-XD on 40 images: 10 steps" in first
    assert second == ""
    assert all("pretrain:" not in text for text in said(folder, "two")[1:])


def test_slow_start_trains_the_host_alone_at_first(scenarios):
    """In the dense epochs the slim norms get no gradient, which data-parallel training must be told."""
    folder, codes = scenarios
    assert codes["slow start"] == [0, 0], said(folder, "slow start")
    pulls = [step["grad_norm_slim"] for step in steps_of(folder / "slow")]
    assert pulls[:STEPS] == [0.0] * STEPS
    assert min(pulls[STEPS:]) > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("uneven", "a batch of 7 cannot be shared evenly by 2 processes"),
        ("other recipe", "process 1 does not see the same setting optim.lr as process 0"),
        ("no such images", "no folder 'nowhere'"),
    ],
)
def test_an_error_ends_all_and_is_shown_once(scenarios, name, text):
    folder, codes = scenarios
    assert codes[name] == [1, 1]
    texts = said(folder, name)
    assert sum(text in each for each in texts) == 1
    assert sum(each.count("edgecl:") for each in texts) == 1, texts
    assert "Traceback" not in "".join(texts)


def test_a_process_that_is_killed_is_spoken_for(scenarios):
    folder, codes = scenarios
    assert codes["killed"][1] == -9
    assert codes["killed"][0] == 1
    text = said(folder, "killed")[0]
    assert "edgecl: another process of the run ended without a word" in text
    assert re.search(r"memory: +this process holds \d+\.\d GiB, \d+\.\d of \d+\.\d GiB free", text)
    assert "go on with --resume" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("name", "by", "status"), [("preempted", "SIGTERM", 0), ("interrupted", "Ctrl-C", 130)]
)
def test_a_signal_to_one_process_saves_and_ends_all(scenarios, name, by, status):
    folder, codes = scenarios
    assert codes[name] == [status] * 2, said(folder, name)
    first, second = printed(folder, name)
    found = re.match(
        rf"stopped by {by} after step (\d+) of 2500, and saved; "
        r"go on, in every process as it was launched, with: edgecl pretrain .*--resume\n$",
        first,
    )
    assert found, first
    assert second == ""
    assert read_newest(RunDir(folder / name)).step == int(found[1])


def test_another_number_of_processes_goes_on(scenarios, tmp_path):
    """Two processes began; one goes on, in the same order of samples."""
    folder, _ = scenarios
    run = shutil.copytree(folder / "two", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000000010")
    record = RunDir(run).read()
    recipe = recipe_from_tables(record.recipe, source="test")
    finished = pretrain(recipe, recipe_name="tiny", out=run, data=record.data.uri, device="cpu", resume=True)
    assert (finished.state, finished.processes) == ("done", 1)
    assert_close_runs(folder / "two", run)


def write_recipe(folder, tables, **run):
    lines = []
    for table, values in {**tables, "run": {**tables["run"], **run}}.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    recipe = folder / "tiny.toml"
    recipe.write_text("\n".join(lines), encoding="utf-8")
    return recipe


def launched(launcher, *words, tmp_path, tables, pictures, **run):
    """Start a run of two processes by a launcher's own command; give its directory and what it printed."""
    recipe, out = write_recipe(tmp_path, tables, **run), tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", *launcher, *words),
            *("pretrain", str(recipe), "--data", str(pictures), "--device", "cpu", "--out", str(out)),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return RunDir(out), done.stdout


@pytest.mark.slow
def test_accelerate_launches_two_processes(tmp_path, labelled_pictures, tables):
    """Its launcher of several processes is the one for GPUs; without MPI it starts a single one for `--cpu`."""
    run, printed = launched(
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        *("-m", "edgecl"),
        tmp_path=tmp_path,
        tables=tables,
        pictures=labelled_pictures,
    )
    record = run.read()
    assert (record.state, record.processes) == ("done", 2)
    assert printed.count("SACL-XD on 40 images") == 1


@pytest.mark.slow
def test_torchrun_starts_a_failed_run_again_where_it_was(tmp_path, labelled_pictures, tables):
    """--max-restarts: one process is killed, and all go on from the last checkpoint to the end."""
    saboteur = tmp_path / "sabotage.py"
    saboteur.write_text(
        "import os, signal, sys\n"
        "from edgecl.train import loop\n"
        "end = loop.Training._end_step\n"
        "def sabotage(self, outcome, done):\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and self.step == 7 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return end(self, outcome, done)\n"
        "loop.Training._end_step = sabotage\n"
        "from edgecl.cli import main\n"
        "main()\n",
        encoding="utf-8",
    )
    run, printed = launched(
        [*TORCHRUN, "--max-restarts", "1"],
        str(saboteur),
        tmp_path=tmp_path,
        tables=tables,
        pictures=labelled_pictures,
        epochs=6,
        checkpoint_steps=1,
    )
    record = run.read()
    assert (record.state, record.step) == ("done", 30)
    assert record.resumed_with
    assert printed.count("SACL-XD on 40 images") == 1


@pytest.mark.slow
def test_ctrl_c_at_torchruns_terminal_saves_once(tmp_path, labelled_pictures, tables):
    """The terminal tells every process, and torchrun passes the signal on to its own, which hear it twice."""
    recipe, out = write_recipe(tmp_path, tables, epochs=500, quality_epochs=500), tmp_path / "run"
    with subprocess.Popen(
        [
            *(sys.executable, "-m", *TORCHRUN),
            *("-m", "edgecl", "pretrain", str(recipe), "--data", str(labelled_pictures)),
            *("--device", "cpu", "--out", str(out)),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        wait_until(lambda: (out / "metrics.jsonl").is_file() and len(steps_of(out)) > 3, launcher)
        os.killpg(launcher.pid, signal.SIGINT)
        printed, err = launcher.communicate(timeout=60)
    found = re.match(
        r"stopped by Ctrl-C after step (\d+) of 2500, and saved; "
        r"go on with: (torchrun --standalone --nproc-per-node 2 -m edgecl pretrain .*--resume)\n$",
        printed,
    )
    assert found, (printed, err)
    assert read_newest(RunDir(out)).step == int(found[1])
    assert err.count("edgecl: saving after this step") == 1


# Meets twice: waits to be killed the first time, and parts the second time.
MEETING = """
import os, sys, time
from pathlib import Path
from edgecl.distributed import processes

processes.join("cpu")
name = "again" if processes.started_again() else "first"
words = [os.getpid(), processes.launch(), os.environ["TORCHELASTIC_RESTART_COUNT"]]
file = Path(sys.argv[1]) / f"{name}-{processes.rank()}"
file.with_suffix(".part").write_text(" ".join(map(str, words)))
file.with_suffix(".part").replace(file)
if name == "first":
    time.sleep(120)
processes.from_main(None)
processes.leave()
"""


@pytest.mark.slow
def test_processes_of_two_agents_meet_again_after_one_is_killed(tmp_path):
    """Only the agent whose process died counts a restart, so no count can name where they meet."""
    script = tmp_path / "meeting.py"
    script.write_text(MEETING, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"),
        *("--rdzv-id", "x", "--local-addr", "localhost", str(script), str(tmp_path)),
    ]

    def words_of(name):
        files = [tmp_path / f"{name}-{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() for file in files), limit_s=90)
        return [file.read_text().split() for file in files]

    with contextlib.ExitStack() as stack:
        agents = []
        for number in range(2):
            log = stack.enter_context((tmp_path / f"agent-{number}.txt").open("w"))
            agents.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT))
            # An agent that gets this one ends its process, too.
            stack.callback(agents[-1].terminate)
        first = words_of("first")
        os.kill(int(first[1][0]), signal.SIGKILL)
        again = words_of("again")
        assert [agent.wait(60) for agent in agents] == [0, 0]
    assert len({launch for _, launch, _ in first + again}) == 1
    assert [count for _, _, count in again] == ["0", "1"]
