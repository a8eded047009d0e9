"""The command line that later work and outside scripts call: verbs, options, exit codes, where output goes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from onboard.tiny_bundle import make_bundle, read_manifest, write_manifest

from edgecl.cli.commands import app

# The contract of issue 2, and beside it what was added since; nothing is added by accident.
OPTIONS = {
    "ls": ("--json", ""),
    "run": ("--data --target --out --set --resume --force", "--precision --test --device --download"),
    "demo": ("--out --force", "--resume"),
    "pretrain": ("--data --out --set --device --resume --force", "--download --allow"),
    "selftest": ("", ""),
    "init": ("", "--out --labels --test --arch --target --hours --weights --force --json"),
    "pick": ("", "--model --out --count --force --json"),
    "carve": ("--out --width --recalibrate --no-recalibrate --force", "--best"),
    "probe": ("--data --test --labels-per-class --seeds --json", "--download"),
    "finetune": ("--data --test --out --epochs --quantize --set --force", "--download"),
    "cost": ("--json --table", "--images --set"),
    "export": (
        "--target --out --precision --calibration --eval --force",
        "--run --json --download --input --softmax",
    ),
    "predict": ("--top --json", "--out --precision --runtime --force"),
    "verify": ("--host --json", "--precision --runtime"),
    "bench": ("--precision --runtime --host --duration-s --threads --json", ""),
    "doctor": ("--host --target --json", ""),
    "publish": ("--out --push --force", "--bundle --json"),
    "report": ("--out --json", "--force"),
    "watch": ("", "--port"),
}
DEFAULTS = {
    ("probe", "seeds"): 3,
    ("bench", "duration_s"): 10.0,
    ("carve", "recalibrate"): True,
    ("pretrain", "device"): "auto",
}
COMMANDS = typer.main.get_command(app).commands
LIGHT_HEAVY = ("torch", "timm", "torchvision", "matplotlib", "onnx", "accelerate", "fvcore", "PIL")


# --- verbs and options ---


def test_verbs_are_those_of_the_contract():
    assert set(COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("verb", OPTIONS)
def test_verb_has_the_options_of_the_contract_and_those_added_on_purpose(verb):
    found = {
        name
        for parameter in COMMANDS[verb].params
        if parameter.param_type_name == "option"
        for name in [*parameter.opts, *parameter.secondary_opts]
    }
    contract, added = (set(part.split()) for part in OPTIONS[verb])
    assert found - {"--help"} == contract | added


@pytest.mark.parametrize(("verb", "name"), DEFAULTS)
def test_default_is_that_of_the_contract(verb, name):
    (parameter,) = [parameter for parameter in COMMANDS[verb].params if parameter.name.rstrip("_") == name]
    assert parameter.default == DEFAULTS[verb, name]


@pytest.mark.parametrize("verb", OPTIONS)
def test_every_option_says_what_it_does(verb):
    for parameter in COMMANDS[verb].params:
        if "--help" not in getattr(parameter, "opts", []):
            assert getattr(parameter, "help", None), parameter.name


def test_set_target_and_precision_can_be_repeated():
    many = {parameter.name for parameter in COMMANDS["run"].params if getattr(parameter, "multiple", False)}
    assert many == {"set_", "target", "precision"}


# --- exit codes and errors ---


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["ls", "nonsense"],
        ["bench", "x", "--duration-s", "0"],
        ["bench", "x", "--precision", "fp64"],
        ["export", "x", "--target", "ort-cpu", "--out", "y", "--precision", ""],
        ["bench", "x", "--runtime", "caffe"],
        ["verify", "x", "--runtime", "trtexec"],  # which gives no outputs
        ["doctor", "x", "--target", "jetson"],
        ["cost"],
        ["cost", "demo", "--table"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_says_so_on_stderr(edgecl, words):
    code, out, err = edgecl(*words)
    assert code == 2
    assert out == ""
    assert err


@pytest.mark.parametrize("words", [["pretrain", "demo"], ["run", "demo"], ["demo"]], ids=" ".join)
def test_resume_and_force_together_are_wrong_usage(edgecl, words):
    code, _, err = edgecl(*words, "--resume", "--force")
    assert code == 2
    assert "--resume goes on, --force starts anew: give one" in err


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["run", "dem"], "edgecl: unknown recipe 'dem'"),
        (["pretrain", "cifar10-smoke"], "edgecl: the recipe 'cifar10-smoke' names no images"),
        (["pretrain", "cifar10-smoke", "--set", "a"], "edgecl: cannot read --set 'a'"),
        (["carve", "DIR", "--out", "x"], "edgecl: 'DIR' is not a run directory: it has no run.json"),
        (["probe", "DIR", "--data", "x"], "edgecl: 'DIR' is not a model directory: it has no model.json"),
        (["cost", "DIR"], "edgecl: 'DIR' is not a model directory: it has no model.json"),
        (["cost", "demoo"], "edgecl: unknown recipe 'demoo'"),
        (["export", "DIR", "--target", "ort", "--out", "x"], "edgecl: unknown target 'ort'"),
        (["verify", "DIR"], "edgecl: 'DIR' is not a bundle directory: it has no manifest.json"),
        (["bench", "DIR"], "edgecl: 'DIR' is not a bundle directory: it has no manifest.json"),
        (["doctor", "DIR"], "edgecl: 'DIR' is not a bundle directory: it has no manifest.json"),
        (["doctor", "--host", "a@b;touch x"], "edgecl: --host 'a@b;touch x' is not of the form"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_named_error_is_1_with_a_sentence_and_no_stack(edgecl, tmp_path, monkeypatch, words, first):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").mkdir()
    code, out, err = edgecl(*words)
    assert code == 1
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith(first)
    # Below the problem: places and a hint, each on an indented line.
    assert all(line.startswith("  ") and ": " in line for line in lines[1:])
    assert "Traceback" not in err


def test_debug_shows_the_stack(edgecl_process):
    done = edgecl_process("--debug", "run", "dem")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "RecipeError" in done.stderr


def test_version(edgecl):
    from edgecl import __version__

    assert edgecl("--version")[:2] == (0, f"edgecl {__version__}\n")


# --- nothing heavy ---


def heavy_after(*words):
    """What of the heavy packages a command has loaded when it is done."""
    code = (
        "import sys\nfrom edgecl.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write('loaded:' + ' '.join(name for name in {LIGHT_HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True
    )
    return done.stderr.rpartition("loaded:")[2].split()


@pytest.mark.parametrize(
    "words", [["--help"], ["ls"], ["ls", "--json"], ["run", "--help"], ["run", "dem"]], ids=" ".join
)
def test_light_command_loads_nothing_heavy(words):
    assert [name for name in heavy_after(*words) if name != "PIL"] == []


def test_verify_bench_and_report_never_load_torch(tmp_path, exported_bundle):
    bundle = shutil.copytree(exported_bundle, tmp_path / "b")
    for words in (
        ["verify", bundle],
        ["bench", bundle, "--duration-s", "0.1"],
        ["report", bundle, "--out", tmp_path / "r"],
    ):
        assert "torch" not in heavy_after(*words), words


# --- what --json prints ---


@pytest.mark.parametrize("shelf", ["recipes", "methods", "targets", "runtimes", "nets", "datasets"])
def test_ls_of_a_shelf_is_a_list_of_names_and_summaries(edgecl, shelf):
    code, out, err = edgecl("ls", shelf, "--json")
    entries = json.loads(out)
    assert (code, err) == (0, "")
    assert entries
    assert all(entry["name"] and entry["summary"] for entry in entries)
    others = {key for entry in entries for key in entry} - {"name", "summary"}
    of_nets = {"params_m", "macs_m", "image_size", "parts", "fused", "nests", "widths", "reason"}
    of_methods = {"needs_teacher", "needs_labels", "settings"}
    assert others == {"nets": of_nets, "methods": of_methods}.get(shelf, set())


def test_methods_alone_are_listed_with_what_they_need_and_their_defaults(edgecl):
    found = {entry["name"]: entry for entry in json.loads(edgecl("ls", "methods", "--json")[1])}
    assert found["moco-v2"]["settings"]["temperature"] == 0.2
    assert [name for name, entry in found.items() if entry["needs_labels"]] == ["supcon"]
    taught = {"seed", "disco", "rekd", "crd", "xd-teacher", "oss"}
    assert {name for name, entry in found.items() if entry["needs_teacher"]} == taught


def test_verify_and_bench_print_one_json_value(edgecl, tmp_path, exported_bundle):
    bundle = shutil.copytree(exported_bundle, tmp_path / "b")
    _, out, err = edgecl("verify", bundle, "--json")
    assert (json.loads(out)["ok"], err) == (True, "")
    record = json.loads(edgecl("bench", bundle, "--duration-s", "0.1", "--json")[1])
    (measured,) = record["measurements"]
    assert {"p50", "p90", "p99", "mean", "ci95_p50"} <= measured["latency_ms"].keys()


def test_doctor_prints_one_json_value_and_its_exit_code_is_the_decision(edgecl):
    code, out, _ = edgecl("doctor", "--target", "jetson-nano-jp4", "--json")
    record = json.loads(out)
    assert {"ok", "device", "checks"} == record.keys()
    assert (record["ok"], code) == (False, 1)
    assert edgecl("doctor", "--target", "ort-cpu")[0] == 0


def test_probe_prints_one_json_value(edgecl, tmp_path, carved_model, image_folder):
    model = shutil.copytree(carved_model, tmp_path / "m")
    code, out, _ = edgecl("probe", model, "--data", image_folder, "--labels-per-class", 2, "--json")
    few = json.loads(out)["few_label_top1"]
    assert (code, few["labels_per_class"], len(few["draws"])) == (0, 2, 3)


def test_cost_of_a_model_and_of_a_recipe_which_has_its_training_too(
    edgecl, tmp_path, carved_model, recipe_file
):
    record = json.loads(edgecl("cost", shutil.copytree(carved_model, tmp_path / "m"), "--json")[1])
    assert (record["flops"], record["input"]) == (2 * record["macs"], [1, 3, 32, 32])
    assert "training" not in record
    training = json.loads(edgecl("cost", recipe_file, "--images", 60, "--json")[1])["training"]
    assert training["total_flops"] == pytest.approx(training["flops_per_image"] * 60)


def test_cost_table_is_a_list_of_rows(edgecl, monkeypatch):
    # By its name in sys.modules: as an attribute of the package, `cost` is the verb.
    pricing = importlib.import_module("edgecl.evaluate.cost")
    rows = [{"method": "SACL-XD", "total_flops": 1e17}]
    monkeypatch.setattr(pricing, "cost_table", lambda: rows)
    assert json.loads(edgecl("cost", "--table", "--json")[1]) == rows


# --- carve ---


def test_carve_with_recalibration_changes_norm_statistics_only(edgecl, tmp_path, trained_run, carved_model):
    import torch
    from safetensors.torch import load_file

    edgecl("carve", trained_run, "--out", tmp_path / "m", "--no-recalibrate")
    plain = load_file(tmp_path / "m" / "weights.safetensors")
    recalibrated = load_file(carved_model / "weights.safetensors")
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, recalibrated[name])}
    assert changed
    assert {name.rpartition(".")[2] for name in changed} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_run_without_a_checkpoint_cannot_be_carved(edgecl, tmp_path, trained_run):
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    code, _, err = edgecl("carve", run, "--out", tmp_path / "m")
    assert code == 1
    assert err.startswith(f"edgecl: the run directory '{run}' has no checkpoint\n")


# --- manifests that lie ---


@pytest.mark.parametrize("verb", ["verify", "bench"])
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"precisions": ["fp32"]}, "'precisions': input should be"),
        ({"input": {"name": "input"}}, "'input.shape': field required"),
        (
            {"runtime": "onnxruntime", "precision": "int8"},
            "'precision' is 'int8', expected one of its precisions",
        ),
    ],
)
def test_sealed_manifest_of_another_form_is_a_named_error(edgecl, tmp_path, verb, changed, problem):
    bundle = make_bundle(tmp_path / "b")
    write_manifest(bundle, {**read_manifest(bundle), **changed})
    code, out, err = edgecl(verb, bundle)
    assert (code, out) == (1, "")
    assert "manifest.json'" in err.splitlines()[0]
    assert problem in err.splitlines()[0]
    assert err.splitlines()[-1].split(maxsplit=1)[0] == "hint:"
    assert "Traceback" not in err


# --- signals ---


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def at_a_terminal(command):
    """Start a command as the first of a process group, which a terminal signals as one."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "code", "last"),
    [(signal.SIGTERM, 143, "edgecl: terminated"), (signal.SIGINT, -signal.SIGINT, "edgecl: interrupted")],
)
def test_signal_ends_the_measuring_process_too(tmp_path, number, code, last):
    bundle = make_bundle(tmp_path / "b")
    with at_a_terminal([sys.executable, "-m", "edgecl", "bench", bundle, "--duration-s", "60"]) as process:
        assert process.stderr.readline()  # it measures
        measuring = children_of(process.pid)
        assert measuring
        process.send_signal(number)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert err.splitlines()[-1] == last
    assert not any(map(is_running, measuring))
    assert not list(bundle.glob("bench-*"))


def test_ctrl_c_ends_the_script_around_it_too(tmp_path):
    """As a terminal does it: the shell and the command get the signal, and a loop must not begin its next turn."""
    bundle = make_bundle(tmp_path / "b")
    command = f"'{sys.executable}' -m edgecl bench '{bundle}' --duration-s 60"
    script = f"for turn in 1 2; do echo turn $turn; {command}; done; echo next"
    with at_a_terminal(["bash", "-c", script]) as shell:
        assert shell.stderr.readline()  # it measures
        os.killpg(shell.pid, signal.SIGINT)
        printed, err = shell.communicate(timeout=60)
    assert shell.returncode == -signal.SIGINT
    assert printed == "turn 1\n"
    assert err.splitlines()[-1] == "edgecl: interrupted"


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("verb", ["pretrain", "run", "bench"])
def test_interrupted_training_says_how_to_go_on_and_nothing_else_does(
    edgecl, monkeypatch, verb, number, status, said
):
    def interrupted(*_, **__):
        signal.raise_signal(number)

    monkeypatch.setattr("edgecl.config.recipe.read_recipe", interrupted)
    monkeypatch.setattr("edgecl.deploy.device.bench", interrupted)
    code, _, err = edgecl(verb, "x")
    assert code == status
    hint = "; --resume goes on from what was saved, if anything was" if verb != "bench" else ""
    assert err == f"edgecl: {said}{hint}\n"
