"""Recipes: the packaged ones, what a recipe refuses, and that no setting is dead."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import edgecl.methods
from edgecl.config.recipe import (
    Recipe,
    find_method,
    list_methods,
    read_recipe,
    recipe_from_tables,
    recipe_name,
)
from edgecl.config.settings import header_comment, packaged_files
from edgecl.config.views import Views
from edgecl.errors import RecipeError

PACKAGED = packaged_files("recipes")
MINIMAL = '[host]\narch = "mobilenetv3_small_100"\n'
PACKAGE = Path(edgecl.__file__).parent


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


def header_of(name):
    return header_comment(PACKAGED[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipe_says_what_it_reproduces_costs_and_its_command(name):
    assert isinstance(read_recipe(name), Recipe)
    for word in ("Reproduces:", "Cost:"):
        assert re.search(rf"^{word} \S", header_of(name), re.MULTILINE)
    command = re.search(r"^Command: (.*)", header_of(name), re.MULTILINE)[1]
    assert re.match(rf"edgecl (demo$|demo |(run|pretrain) {re.escape(name)}( |$))", command)


def test_unknown_name_suggests_a_near_one():
    with pytest.raises(RecipeError, match="unknown recipe 'cifar10-smok'") as caught:
        read_recipe("cifar10-smok")
    assert "'cifar10-smoke'" in caught.value.hint


def test_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "mine.toml").write_text("\ufeff" + MINIMAL, encoding="utf-8")
    assert read_recipe(str(tmp_path / "mine.toml")).host.width == 1.5


@pytest.mark.parametrize(
    ("content", "problem"), [(b"\xff\xfe\x00[host]", "not a text file"), (b"[host\n", "not valid TOML")]
)
def test_file_that_is_no_toml_is_a_named_error(tmp_path, content, problem):
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"{problem}: .*(.|\n)*file: .*mine\.toml"):
        read_recipe(str(tmp_path / "mine.toml"))


def test_assignments_are_applied_over_the_file(write):
    recipe = read_recipe(write(MINIMAL), ["optim.lr=0.2", "method.xd_direction=slim_only"])
    assert (recipe.optim.lr, recipe.method.name, recipe.method.xd_direction) == (0.2, "sacl-xd", "slim_only")


def test_settings_that_only_together_are_wrong_are_blamed_on_file_and_assignment(write):
    path = write(MINIMAL)
    with pytest.raises(RecipeError, match="slim width 2 is above the host's") as caught:
        read_recipe(path, ["slim.width=2.0"])
    assert caught.value.where == {"file": path, "--set": "slim.width=2.0"}


@pytest.mark.parametrize(
    ("assignment", "example"),
    [
        ("slim.widths=0.5", "[0.5, 1.0]"),
        ("run.trackers=wandb", '["tensorboard"]'),
        ("views.blur=1.0", "[1.0, 0.1]"),
    ],
)
def test_single_value_where_a_list_belongs_is_refused_with_a_list(write, assignment, example):
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(MINIMAL), [assignment])
    assert caught.value.problem.endswith(f"list such as {example}")
    assert caught.value.where == {"--set": assignment}


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        (["method.alpha=1.5"], "'method.alpha' is"),
        (["projector.sizes=[]"], "'projector.sizes' is"),
        (["optim.lrr=0.2"], "unknown key 'optim.lrr' (did you mean 'lr"),
        (
            ["slim.width=2.0"],
            "slim width 2 is above the host's 1.5; the slim net is a part of the host: widen [host] width",
        ),
        (["slim.width=1.50000001"], "slim width 1.50000001 is above the host's 1.5"),
        (["slim.widths=[0.5, 0.5, 1.0]"], "'slim.widths' names a width twice: [0.5, 0.5, 1.0]"),
        (["views.crop_scale=[0.9, 0.2]"], "'views.crop_scale' runs from 0.9 down to 0.2"),
        (
            ["data.resize_size=32", "data.image_size=64"],
            "'data.resize_size' 32 is below 'data.image_size' 64",
        ),
        (["optim.name=adam"], "'optim.name' is 'adam', not one of lars, adamw, sgd (did you mean 'adamw'?)"),
        (["method.name=simclr", "method.alpha=0.5", "host.width=1.0"], "unknown key 'method.alpha'"),
        (["method.coding_rate.wieght=0.5"], "unknown key 'method.coding_rate.wieght' (did you mean 'weight'"),
        (
            ["method.name=emp-ssl", "host.width=1.0", "method.coding_rate.weight=0.0"],
            "method.coding_rate.weight",
        ),
        (["method.coding_rate.weight=nan"], "method.coding_rate.weight"),
        (["method.coding_rate.weight=0.1", "data.batch_size=2"], "data.batch_size"),
        (["method.loss='cosine'"], "method.coding_rate.weight"),
        (["views.local_scale=[0.4, 0.1]"], "local_scale"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(write, assignments, problem):
    with pytest.raises(RecipeError, match=re.escape(problem)):
        read_recipe(write(MINIMAL), assignments)


def test_the_papers_recipes_have_neither_rate_nor_nested_start_nor_local_views():
    papers = [name for name in PACKAGED if re.match("(sacl-)?xd-", name)]
    assert len(papers) == 6
    for name in papers:
        recipe = read_recipe(name)
        assert recipe.title == ("SACL-XD" if name.startswith("sacl") else "XD only")
        assert (recipe.method.coding_rate.weight, recipe.views.local_count) == (0, 0)
        assert recipe.method.loss == "barlow-twins"
        assert not any((recipe.host.nested_start, recipe.method.symmetric, recipe.method.learn_targets))


@pytest.mark.parametrize(
    ("image_size", "asked", "side"), [(32, None, 16), (224, None, 112), (12, None, 8), (32, 24, 24)]
)
def test_a_local_view_is_half_as_wide_unless_said_otherwise(image_size, asked, side):
    assert Views(local_count=1, local_size=asked).specs(image_size)[-1].size == side


@pytest.mark.parametrize(
    ("loss", "host", "widths", "alpha", "title"),
    [
        ("simclr", 1.0, [], 1.0, "SimCLR"),
        ("simclr", 1.0, [], 0.9, "XD only (SimCLR)"),
        ("simclr", 1.5, [], 0.9, "SACL-XD (SimCLR)"),
        ("cosine", 1.0, [], 1.0, "cosine and coding rate"),
        ("cosine", 1.5, [], 1.0, "SACL only (cosine and coding rate)"),
        ("barlow-twins", 1.0, [], 1.0, "Barlow Twins"),
        ("barlow-twins", 1.0, [], 0.95, "XD only"),
        ("barlow-twins", 1.5, [], 1.0, "SACL only"),
        ("barlow-twins", 1.5, [], 0.95, "SACL-XD"),
        # Narrower nets inside a slim net as wide as the host are slimmed, too.
        ("barlow-twins", 1.0, [0.5, 1.0], 1.0, "SACL only"),
        ("barlow-twins", 1.0, [0.5, 1.0], 0.95, "SACL-XD"),
        ("barlow-twins", 1.0, [1.0], 0.95, "XD only"),
        ("barlow-twins", 1.5, [0.5, 1.0], 0.95, "SACL-XD"),
    ],
)
def test_loss_widths_and_alpha_give_the_title(write, loss, host, widths, alpha, title):
    settings = [f"method.loss={loss}", f"host.width={host}", f"slim.widths={widths}", f"method.alpha={alpha}"]
    rate = ["method.coding_rate.weight=0.1"] if loss == "cosine" else []
    assert read_recipe(write(MINIMAL), [*settings, *rate]).title == title


def test_recipe_kept_in_a_run_reads_back_equal(write):
    recipe = read_recipe(write(MINIMAL), ["run.trackers=['wandb']", "optim.clip_norm=1.0"])
    assert recipe_from_tables(recipe.model_dump(mode="json"), source="run.json") == recipe


@pytest.mark.parametrize(
    ("name", "short"),
    [("demo", "demo"), ("mine.toml", "mine"), ("../a/mine.toml", "mine"), ("/a/mine", "mine")],
)
def test_short_name_holds_no_path(name, short):
    assert recipe_name(name) == short


def fields():
    shared = [
        (table, key)
        for table, field in Recipe.model_fields.items()
        if table != "method"
        for key in field.annotation.model_fields
    ]
    own = [("config", key) for name in list_methods() for key in find_method(name).Config.model_fields]
    return sorted({*shared, *own} - {("config", "name")})


def reads():
    """Every (owner, attribute) that the package reads outside recipe.py, e.g. ("optim", "lr")."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "recipe.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    owner = node.value
                    found.add((getattr(owner, "attr", None) or getattr(owner, "id", None), node.attr))
    return found


READS = reads()


@pytest.mark.parametrize(("table", "key"), fields())
def test_no_setting_is_dead(table, key):
    if (table, key) == ("slim", "widths"):
        key = "all_widths"  # the property that puts it together with the slim width
    assert READS & {
        (owner, key) for owner in (table, "settings", *(["self"] if table in ("config", "views") else []))
    }


def test_the_slim_width_is_the_widest_of_its_widths(write):
    assert read_recipe(write(MINIMAL)).slim.all_widths == (1.0,)
    slim = read_recipe(write(MINIMAL), ["slim.widths=[0.5, 0.75]"]).slim
    assert (slim.width, slim.all_widths) == (0.75, (0.75, 0.5))
    with pytest.raises(RecipeError, match=r"'slim\.width' 1 .*widest, not 0\.75"):
        read_recipe(write(MINIMAL), ["slim.width=1.0", "slim.widths=[0.5, 0.75]"])
    with pytest.raises(RecipeError, match=r"slim width 2 is above the host's 1.5"):
        read_recipe(write(MINIMAL), ["slim.widths=[0.5, 2]"])


@pytest.mark.parametrize("widths", ["[]", '["a"]', "0.5", '"wide"', "[0.5, nan]"])
def test_widths_that_are_no_numbers_decide_no_width(write, widths):
    try:
        slim = read_recipe(write(MINIMAL), [f"slim.widths={widths}"]).slim
    except RecipeError as error:
        assert "slim.widths" in str(error)  # noqa: PT017 - an empty list is none
    else:
        assert (widths, slim.width) == ("[]", 1.0)


# --- the method ---


def test_methods_are_the_files_of_their_folder():
    files = {file.stem for file in Path(edgecl.methods.__file__).parent.glob("[!_]*.py")}
    shared = {"losses", "method", "momentum", "pairs", "teacher"}
    assert list_methods() == sorted(name.replace("_", "-") for name in files - shared)
    for name in list_methods():
        assert find_method(name).Config.model_fields["name"].default == name


TAUGHT = [name for name in list_methods() if "teacher" in find_method(name).Config.model_fields]


def assignments_of(name):
    taught = ["method.teacher.arch=resnet18", "method.teacher.weights=untrained"] if name in TAUGHT else []
    return [f"method.name={name}", *taught]


@pytest.mark.parametrize("name", list_methods())
def test_a_method_brings_its_own_table(write, name):
    recipe = read_recipe(write(MINIMAL), assignments_of(name))
    assert isinstance(recipe, Recipe)
    assert type(recipe.method) is find_method(name).Config
    assert recipe_from_tables(recipe.model_dump(mode="json"), source="run.json") == recipe


def test_an_unknown_method_is_named_with_those_there_are(write):
    with pytest.raises(RecipeError, match="'BYOL', not one of barlow-twins, byol,") as caught:
        read_recipe(write(MINIMAL), ["method.name=BYOL"])
    assert "'byol'" in caught.value.hint


@pytest.mark.parametrize("table", ["loss", "coding_rate"])
def test_tables_of_older_recipes_name_the_new_ones(write, table):
    with pytest.raises(RecipeError, match=rf"\[{table}\] is now \[method"):
        read_recipe(write(MINIMAL + f"[{table}]\n"))
    with pytest.raises(RecipeError, match=rf"\[{table}\] is now \[method"):
        read_recipe(write(MINIMAL), [f"{table}.weight=1.0"])


@pytest.mark.parametrize(
    "settings", [["host.width=1.5"], ["slim.widths=[0.5, 1.0]"], ["slim.slow_start=0.5"]]
)
@pytest.mark.parametrize("name", ["emp-ssl", "simclr"])
def test_a_method_of_one_encoder_refuses_a_second_width(write, name, settings):
    with pytest.raises(RecipeError, match="trains one encoder"):
        read_recipe(write(MINIMAL), [f"method.name={name}", "host.width=1.0", *settings])


@pytest.mark.parametrize("packaged", ["demo", "photos", "sacl-xd-mobilenetv3-large-200"])
@pytest.mark.parametrize("name", list_methods())
def test_any_recipe_takes_any_method_with_that_methods_defaults(packaged, name):
    recipe = read_recipe(packaged, assignments_of(name))
    own = find_method(name).Config
    if name != read_recipe(packaged).method.name:  # whose settings the recipe has
        default = {key: value for key, value in own().model_dump().items() if key != "teacher"}
        assert {
            key: value for key, value in recipe.method.model_dump().items() if key != "teacher"
        } == default
    if not own.has_host:
        assert recipe.host.width == recipe.slim.width
        assert not recipe.slim.widths
    for table, settings in own.brings.items():
        for key, value in settings.items():
            assert getattr(getattr(recipe, table), key) == (
                tuple(value) if isinstance(value, list) else value
            )


def test_what_a_method_brings_gives_way_to_what_is_said(write):
    recipe = read_recipe(write(MINIMAL), ["method.name=dino", "views.hue=0.3"])
    assert (recipe.views.hue, recipe.views.brightness) == (0.3, 0.4)
    text = MINIMAL + '\n[method]\nname = "ssl-small"\n[projector]\nsizes = [64]\n'
    recipe = read_recipe(write(text), ["host.width=1.0"])
    assert (recipe.projector.sizes, recipe.views.jitter) == ((64,), 1.0)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_missing_teacher_is_named(write, name):
    with pytest.raises(RecipeError, match=rf"{name} .*set 'method\.teacher\.weights'"):
        read_recipe(write(MINIMAL), [f"method.name={name}"])


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (
            ["method.name=rekd", "method.neighbors=9000"],
            "neighbors' 9000 is above the 1024 pictures",
        ),
        (["method.name=oss", "method.teacher.view=plain"], "teacher that learns"),
        (["method.name=xd-teacher", "slim.widths=[0.5, 1.0]"], "trains one slim width"),
        (["method.name=byol", "slim.widths=[0.5, 1.0]"], "trains one encoder"),
        (["method.name=moco-v2", "method.queue_steps=0"], "'method.queue_steps' is 0"),
        (["method.name=seed", "method.teacher.view=whole"], "'whole', not one of augmented, plain"),
        (["method.name=byol", "method.teacher.arch=resnet18"], r"unknown key 'method\.teacher'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_table_of_a_method_is_named(write, assignments, words):
    name = assignments[0].partition("=")[2]
    with pytest.raises(RecipeError, match=words):
        read_recipe(write(MINIMAL), [*assignments_of(name)[1:], *assignments])


@pytest.mark.parametrize("page", ["method.md", "settings.md"])
def test_every_method_is_documented(page):
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    for name in list_methods():
        assert f"`{name}`" in text or f'name = "{name}"' in text, name
