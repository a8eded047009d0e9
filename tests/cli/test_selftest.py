"""`edgecl selftest ddp`, with the real processes it starts and those a launcher has started."""

import json
import re
import subprocess
import sys

import pytest
import torch
import typer
from worlds import run_script

from edgecl.cli import main
from edgecl.cli.commands import app
from edgecl.train.selftest import VARIANTS, _error_among

# What torchrun starts, as one script that forks: `python -m edgecl selftest ddp …` in two processes, once per case.
LAUNCHED = """
import contextlib, functools, io, json, os, sys, warnings
warnings.simplefilter("ignore")
from worlds import fork_world

import edgecl.train.selftest as selftest
from edgecl.distributed import processes
from edgecl.cli import main
from edgecl.methods import losses
from edgecl.train import step
from torch import distributed


def plain(x):
    total = x.clone()
    if distributed.is_initialized():
        distributed.all_reduce(total.detach())
    return total


def as_it_is():
    pass


def plain_all_reduce():
    losses._sum_of_matrices = plain


def other_images_in_one():
    # The other process alone sees other images; the first one's numbers are wrong all the same.
    views = selftest._views
    selftest._views = lambda recipe: [view * (1 + processes.rank()) for view in views(recipe)]


def norms_of_a_share():
    step.synchronize_norms = lambda *_, **__: None


def no_number():
    losses._sum_of_matrices = lambda x: plain(x) * (float("nan") if distributed.is_initialized() else 1)


def run(case, words):
    rank = processes.rank()
    case()
    sys.argv = ["edgecl", "selftest", "ddp", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    with open(f"{folder}/{case.__name__} {len(words)} {rank}.json", "w") as file:
        json.dump([code, out.getvalue(), err.getvalue()], file)


folder = sys.argv[1]
os.environ["COLUMNS"] = "200"
one_arm = ["--device", "cpu", "--variant", "Barlow Twins"]
for case, words in (
    (as_it_is, [*one_arm, "--json"]),
    (as_it_is, ["--processes", "3"]),
    (plain_all_reduce, one_arm),
    (other_images_in_one, [*one_arm, "--json"]),
    (norms_of_a_share, [*one_arm, "--json"]),
    (no_number, one_arm),
):
    fork_world(functools.partial(run, case, words), 2)
"""
ONE_ARM = ("--device", "cpu", "--variant", "Barlow Twins")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(exit code, stdout, stderr) of each of two processes, by case and number of words."""
    folder = tmp_path_factory.mktemp("launched")
    script = folder / "launched.py"
    script.write_text(LAUNCHED, encoding="utf-8")
    run_script(script, folder)

    def read(case, words=5):
        return [json.loads((folder / f"{case} {words} {rank}.json").read_text()) for rank in range(2)]

    return read


def test_launched_processes_compare_themselves_and_the_first_prints(launched):
    (code, out, err), other = launched("as_it_is")
    assert (code, other) == (0, [0, "", ""])
    record = json.loads(out)
    assert (record["exact"], record["processes"], record["backend"]) == (True, 2, "gloo")
    (row,) = record["variants"]
    assert 0 < row["gradients"] < 1e-8
    assert 0 < row["statistics"] < 1e-8
    assert row["loss"] < 1e-8
    assert err.splitlines() == ["selftest: one process: Barlow Twins", "selftest: 2 processes: Barlow Twins"]


def cells(table):
    (row,) = [line for line in table.splitlines() if "Barlow Twins" in line]
    return [cell.strip() for cell in row.split("│")[1:-1]]


def test_plain_all_reduce_differs_and_every_process_fails(launched):
    (code, out, _), other = launched("plain_all_reduce", 4)
    assert (code, other) == (1, [1, "", ""])
    assert out.startswith("2 processes on ")
    assert cells(out)[2] == "5.0e-01"
    assert cells(out)[4] == "DIFFERS"


def test_a_difference_in_one_process_is_the_decision_of_all(launched):
    (code, out, _), (other_code, _, _) = launched("other_images_in_one")
    assert (code, other_code) == (1, 1)
    assert json.loads(out)["exact"] is False


def test_norms_that_are_not_synchronized_differ(launched):
    (code, out, _), _ = launched("norms_of_a_share")
    (row,) = json.loads(out)["variants"]
    assert code == 1
    assert min(row["loss"], row["gradients"], row["statistics"]) > 1e-2


def test_numbers_that_are_none_differ(launched):
    (code, out, _), (other_code, _, _) = launched("no_number", 4)
    assert (code, other_code) == (1, 1)
    assert cells(out)[1:3] == ["not a number", "not a number"]


def test_another_number_of_processes_than_launched_is_wrong_usage(launched):
    (code, _, err), _ = launched("as_it_is", 2)
    assert code == 2
    assert "the launcher has started 2 processes" in " ".join(err.split())


# --- alone ---


def test_alone_it_starts_its_processes_and_prints_a_table(edgecl_process):
    done = edgecl_process("selftest", "ddp", "--processes", 2, *ONE_ARM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 processes on ")
    assert cells(done.stdout)[4] == "exact"
    assert done.stderr.splitlines() == ["one process: Barlow Twins", "2 processes: Barlow Twins"]


@pytest.mark.slow
def test_every_arm_is_exact_with_three_processes(edgecl_process):
    done = edgecl_process("selftest", "ddp", "--processes", 3, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["processes"] == 3
    assert [row["exact"] for row in record["variants"]] == [True] * len(VARIANTS)


@pytest.mark.slow
def test_error_of_a_process_is_shown_once(edgecl_process):
    environment = {"GLOO_SOCKET_IFNAME": "nonesuch", "EDGECL_WAIT_S": "20"}
    done = edgecl_process("selftest", "ddp", "--processes", 2, *ONE_ARM, env=environment)
    assert done.returncode == 1
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if line.startswith("edgecl: ")]
    assert len(told) == 1
    assert re.search("2 processes .*find each other.*nonesuch", told[0])
    assert "Traceback" not in done.stderr


def test_words_of_processes_that_end_without_a_result_are_kept():
    error = _error_among(["W1122 torchrun starts", "edgecl: no GPU", "  hint: buy one", "Root Cause:"], 1)
    # Exact, for these are the test's own words: neither the prefix nor a line of torchrun's is left.
    assert str(error) == "no GPU\n  hint: buy one"
    error = str(_error_among(["", "Segmentation fault", ""], 139))
    assert "exit status 139 and no result" in error
    assert error.endswith("\n  they said: Segmentation fault")
    assert str(_error_among([], 1)).endswith("\n  they said: nothing")


@pytest.fixture
def refusal(monkeypatch, capsys):
    """What the command says, in this process, when it refuses to start any."""

    def say(*words, code=1, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["edgecl", "selftest", "ddp", *words])
        monkeypatch.setattr(subprocess, "Popen", None)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == code
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return say


def test_unknown_arm_is_wrong_usage_with_the_near_ones(refusal):
    said = refusal("--variant", "SACL XD", code=2)
    assert re.search("--variant.*'SACL XD'.*mean 'SACL-XD' or 'SACL only'", said)


def test_wait_that_is_no_number_is_named_before_anything_is_started(refusal):
    assert re.fullmatch("edgecl: .*EDGECL_WAIT_S.*'none'.*number.*above 0\n", refusal(EDGECL_WAIT_S="none"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named(refusal):
    said = refusal("--device", "cuda")
    assert re.fullmatch("edgecl: .*no CUDA.*\n  hint: .*--device auto.*--device cpu\n", said)


def test_options_of_the_command_are_these():
    command = typer.main.get_command(app).commands["selftest"].commands["ddp"]
    names = {name for parameter in command.params for name in parameter.opts}
    assert names - {"--help"} == {"--processes", "--device", "--variant", "--json"}
    assert all(parameter.help for parameter in command.params)
