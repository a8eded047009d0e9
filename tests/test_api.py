"""The Python API: light to import, the commands' own functions underneath, one call of each verb."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys

import pytest

import edgecl
from edgecl import api
from edgecl.errors import EdgeclError, RecipeError

# The function that each verb calls, and its parameters under other names here, or not here.
BENEATH = {
    "pretrain": ("edgecl.train.pretrain", {"recipe_name"}),
    "carve": ("edgecl.train.carve", set()),
    "probe": ("edgecl.evaluate.probe", set()),
    "finetune": ("edgecl.evaluate.finetune", {"assignments"}),
    "init": ("edgecl.evaluate.init", set()),
    "pick": ("edgecl.evaluate.pick", set()),
    "export": ("edgecl.deploy.export", set()),
    "predict": ("edgecl.deploy.predict", set()),
    "verify": ("edgecl.deploy.device", {"report"}),
    "bench": ("edgecl.deploy.device", {"report"}),
    "publish": ("edgecl.deploy.publish", set()),
    "report": ("edgecl.reports.report", set()),
}
VERBS = [*BENEATH, "cost"]  # which has two beneath


def written(path):
    return json.loads(path.read_text(encoding="utf-8"))


def python(code):
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


# --- the package ---


def test_importing_edgecl_imports_nothing_heavy():
    code = (
        "import edgecl, sys; print({'torch', 'numpy', 'pydantic', 'typer', 'edgecl.api'} & set(sys.modules))"
    )
    assert python(code) == "set()"


def test_naming_every_verb_imports_no_torch():
    code = f"import edgecl, sys; [getattr(edgecl, verb) for verb in {VERBS}]; print('torch' in sys.modules)"
    assert python(code) == "False"


def test_every_verb_is_public_and_listed():
    assert set(edgecl.__all__) == {*api.__all__, "__version__"} == {*VERBS, "__version__"}
    assert set(edgecl.__all__) <= set(dir(edgecl))
    assert all(getattr(edgecl, verb) is getattr(api, verb) for verb in VERBS)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="train_it"):
        _ = edgecl.train_it


# --- against the functions beneath ---


@pytest.mark.parametrize("verb", BENEATH)
def test_verb_has_the_parameters_and_defaults_of_the_function_beneath(verb):
    module, elsewhere = BENEATH[verb]
    beneath = inspect.signature(getattr(importlib.import_module(module), verb)).parameters
    here = inspect.signature(getattr(api, verb)).parameters
    assert set(beneath) - set(here) == elsewhere
    # pretrain names its run directory itself; `say` is silent by None.
    other = {"say"} | ({"out"} if verb == "pretrain" else set())
    for name in (set(beneath) & set(here)) - other:
        assert here[name].default == beneath[name].default, name


@pytest.mark.parametrize("verb", BENEATH)
def test_verb_hands_on_what_it_is_given(verb, monkeypatch):
    module = importlib.import_module(BENEATH[verb][0])
    signature = inspect.signature(getattr(module, verb))
    seen = {}
    monkeypatch.setattr(
        module, verb, lambda *words, **named: seen.update(signature.bind(*words, **named).arguments)
    )
    here = inspect.signature(getattr(api, verb)).parameters
    known = {"recipe": "demo", "dirs": ["<dirs>"], "pictures": ["<pictures>"], "set": {"optim.lr": 0.5}}
    given = {name: known.get(name, f"<{name}>") for name in here}
    getattr(edgecl, verb)(given.pop(next(iter(here))), **given)
    for name in here.keys() & seen.keys() - known.keys():
        assert str(seen[name]) == f"<{name}>"
    assert seen.get("report", "<say>") == "<say>"
    assert seen.get("assignments", ["optim.lr=0.5"]) == ["optim.lr=0.5"]
    if "recipe" in seen:
        assert seen["recipe"].optim.lr == 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_every_parameter_is_documented(verb):
    function = getattr(api, verb)
    for name in inspect.signature(function).parameters:
        assert f"        {name}: " in inspect.getdoc(function).replace("\n    ", "\n        "), name


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.lr": 1e-05, "optim.name": "adamw", "projector.sizes": (8, 16), "host.nested_start": True},
        ["optim.lr=1e-05", "optim.name=adamw", "projector.sizes=[8, 16]", "host.nested_start=true"],
    ],
    ids=["mapping", "assignments"],
)
def test_changes_reach_the_recipe(changes):
    from edgecl.config.recipe import read_recipe

    recipe = read_recipe("demo", api._assignments(changes))
    assert (recipe.optim.lr, recipe.optim.name) == (1e-05, "adamw")
    assert recipe.projector.sizes == (8, 16)
    assert recipe.host.nested_start is True


def test_one_assignment_may_stand_alone():
    assert api._assignments("optim.lr=0.2") == ["optim.lr=0.2"]


def test_unknown_setting_is_named():
    with pytest.raises(RecipeError, match="lrr"):
        edgecl.cost("demo", set={"optim.lrr": 1})


# --- each on a toy ---


@pytest.fixture
def model(tmp_path, carved_model):
    return shutil.copytree(carved_model, tmp_path / "model")


def test_pretrain_takes_a_recipe_by_path_and_changes(tmp_path, recipe_file, image_folder, capsys):
    out = tmp_path / "run"
    record = edgecl.pretrain(
        str(recipe_file), data=image_folder, out=str(out), set={"optim": {"lr": 0.02}}, device="cpu"
    )
    assert record.to_json() == written(out / "run.json")
    assert record.recipe["optim"]["lr"] == 0.02
    assert record.data.images == 60
    assert capsys.readouterr().out == ""


def test_pretrain_writes_to_runs_and_the_recipes_name_by_default(
    tmp_path, recipe_file, image_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    edgecl.pretrain(recipe_file, data=image_folder, device="cpu")
    assert (tmp_path / "runs" / recipe_file.stem / "run.json").is_file()


def test_cost_counts_a_model_and_prices_a_recipe(model, recipe_file):
    counted = edgecl.cost(str(model))
    assert counted.to_json() == written(model / "cost.json")
    priced = edgecl.cost(recipe_file, images=60)
    assert priced.macs == counted.macs
    assert priced.training.images == 60


def test_what_goes_wrong_is_an_edgecl_error(tmp_path):
    for verb in (edgecl.verify, edgecl.bench):
        with pytest.raises(EdgeclError):
            verb(tmp_path / "nothing")
