"""Recipes: the packaged ones, what a recipe refuses, and that no setting is dead."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import edgecl
from edgecl.config.recipe import (
    Recipe,
    find_method,
    flatten,
    list_methods,
    list_recipes,
    read_recipe,
    recipe_from_tables,
    recipe_name,
)
from edgecl.config.settings import header_comment, packaged_files
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
@pytest.mark.parametrize("word", ["Reproduces:", "Cost:", "Command:"])
def test_packaged_recipe_says_what_it_reproduces_costs_and_its_command(name, word):
    assert re.search(rf"^{word} \S", header_of(name), re.MULTILINE)


@pytest.mark.parametrize("name", PACKAGED)
def test_name_of_a_packaged_recipe_says_its_arm(name):
    for prefix, arm in (("sacl-xd-", "SACL-XD"), ("xd-", "XD only")):
        if name.startswith(prefix):
            assert read_recipe(name).arm == arm


def test_list_gives_name_and_summary_of_each():
    listed = list_recipes()
    assert [entry["name"] for entry in listed] == sorted(PACKAGED)
    assert all(entry.keys() == {"name", "summary"} and entry["summary"] for entry in listed)


def test_unknown_name_suggests_a_near_one():
    with pytest.raises(RecipeError) as caught:
        read_recipe("cifar10-smok")
    assert caught.value.problem == "unknown recipe 'cifar10-smok'"
    assert caught.value.hint == "did you mean 'cifar10-smoke'?"


def test_file_of_the_users_is_read(write):
    assert read_recipe(write(MINIMAL)).host.arch == "mobilenetv3_small_100"


def test_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "mine.toml").write_text("\ufeff" + MINIMAL, encoding="utf-8")
    assert read_recipe(str(tmp_path / "mine.toml")).host.width == 1.5


def test_file_that_is_no_text_is_a_named_error(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00[host]")
    with pytest.raises(RecipeError, match=r"not a text file: .*(.|\n)*file: .*mine\.toml"):
        read_recipe(str(tmp_path / "mine.toml"))


def test_assignments_are_applied_over_the_file(write):
    recipe = read_recipe(
        write(MINIMAL), ["optim.lr=0.2", "data.batch_size=8", "method.xd_direction=slim_only"]
    )
    assert (recipe.optim.lr, recipe.data.batch_size, recipe.method.xd_direction) == (0.2, 8, "slim_only")


def test_settings_that_only_together_are_wrong_are_blamed_on_file_and_assignment(write):
    path = write(MINIMAL)
    with pytest.raises(RecipeError, match="slim width 2 is above the host's") as caught:
        read_recipe(path, ["slim.width=2.0"])
    assert caught.value.where == {"file": path, "--set": "slim.width=2.0"}


def test_recipe_without_an_architecture_says_so(write):
    with pytest.raises(RecipeError, match=r"missing key 'host\.arch'"):
        read_recipe(write("[host]\nwidth = 1.5\n"))


def test_slim_net_a_little_wider_than_its_host_is_shown_with_all_its_digits(write):
    with pytest.raises(RecipeError, match=r"slim width 1\.50000001 is above the host's 1\.5"):
        read_recipe(write(MINIMAL + "[slim]\nwidth = 1.50000001\n"))


def test_range_written_backwards_is_refused(write):
    with pytest.raises(RecipeError, match=r"'views\.crop_scale' runs from 0\.9 down to 0\.2"):
        read_recipe(write(MINIMAL + "[views]\ncrop_scale = [0.9, 0.2]\n"))


def test_resize_below_the_crop_is_refused(write):
    with pytest.raises(RecipeError, match=r"'data\.resize_size' 32 is below 'data\.image_size' 64"):
        read_recipe(write(MINIMAL + "[data]\nresize_size = 32\nimage_size = 64\n"))


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("method.alpha=1.5", "method.alpha"),
        ("host.width=4.5", "host.width"),
        ("data.batch_size=1", "data.batch_size"),
        ("optim.lr=0", "optim.lr"),
        ("run.epochs=0", "run.epochs"),
        ("projector.sizes=[]", "projector.sizes"),
        ("probe.draws=1", "probe.draws"),
        ("views.hue=0.6", "views.hue"),
        ("method.coding_rate.weight=-0.1", "method.coding_rate.weight"),
        ("method.coding_rate.weight=nan", "method.coding_rate.weight"),
        ("method.coding_rate.weight=inf", "method.coding_rate.weight"),
        ("method.coding_rate.epsilon=0.001", "method.coding_rate.epsilon"),
        ("method.coding_rate.until=0.0", "method.coding_rate.until"),
        ("method.coding_rate.until=1.5", "method.coding_rate.until"),
        ("method.loss='cosine'", "method.coding_rate.weight"),
        ("method.temperature=0.0", "method.temperature"),
        ("views.local_count=-1", "views.local_count"),
        ("views.local_size=4", "views.local_size"),
        ("views.local_scale=[0.4, 0.1]", "local_scale"),
    ],
)
def test_value_out_of_range_is_refused_by_key(write, assignment, key):
    with pytest.raises(RecipeError, match=re.escape(key)):
        read_recipe(write(MINIMAL), [assignment])


def test_coding_rate_needs_more_than_two_images(write):
    with pytest.raises(RecipeError, match=r"data\.batch_size"):
        read_recipe(write(MINIMAL), ["method.coding_rate.weight=0.1", "data.batch_size=2"])


def test_the_papers_recipes_have_neither_rate_nor_nested_start_nor_local_views():
    for name in PACKAGED:
        if re.match("(sacl-)?xd-", name):
            recipe = read_recipe(name)
            assert recipe.method.coding_rate.weight == 0
            assert not recipe.host.nested_start
            assert recipe.views.local_count == 0
            assert recipe.method.loss == "barlow-twins"
            assert [recipe.method.symmetric, recipe.method.learn_targets] == [False, False]


@pytest.mark.parametrize(
    ("image_size", "asked", "side"), [(32, None, 16), (224, None, 112), (12, None, 8), (32, 24, 24)]
)
def test_a_local_view_is_half_as_wide_unless_said_otherwise(image_size, asked, side):
    tables = {
        "host": {"arch": "mobilenetv3_small_100"},
        "data": {"image_size": image_size},
        "views": {"local_size": asked},
    }
    assert (
        recipe_from_tables(tables, source="test")
        .views.model_copy(update={"local_count": 1})
        .specs(image_size)[-1]
        .size
        == side
    )


@pytest.mark.parametrize(
    ("loss", "alpha", "host", "arm"),
    [
        ("simclr", 1.0, 1.0, "SimCLR"),
        ("simclr", 0.9, 1.0, "XD only (SimCLR)"),
        ("simclr", 0.9, 1.5, "SACL-XD (SimCLR)"),
        ("cosine", 1.0, 1.0, "cosine and coding rate"),
        ("cosine", 1.0, 1.5, "SACL only (cosine and coding rate)"),
    ],
)
def test_another_loss_is_in_the_arms_name(write, loss, alpha, host, arm):
    assignments = [
        f"method.loss='{loss}'",
        f"method.alpha={alpha}",
        f"host.width={host}",
        "method.coding_rate.weight=0.1",
    ]
    assert read_recipe(write(MINIMAL), assignments).arm == arm


@pytest.mark.parametrize(
    ("host", "widths", "alpha", "arm"),
    [
        (1.0, [1.0], 1.0, "Barlow Twins"),
        (1.0, [1.0], 0.95, "XD only"),
        (1.5, [1.0], 1.0, "SACL only"),
        (1.5, [0.5, 1.0], 0.95, "SACL-XD"),
        # Narrower nets inside a slim net as wide as the host are slimmed.
        (1.0, [0.5, 1.0], 1.0, "SACL only"),
        (1.0, [0.5, 1.0], 0.95, "SACL-XD"),
    ],
)
def test_widths_and_alpha_name_the_arm(write, host, widths, alpha, arm):
    settings = [f"host.width={host}", f"slim.widths={widths}", f"method.alpha={alpha}"]
    assert read_recipe(write(MINIMAL), settings).arm == arm


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


def test_slim_widths_are_put_in_order_with_the_widest_first(write):
    assert read_recipe(write(MINIMAL)).slim.all_widths == (1.0,)
    recipe = read_recipe(write(MINIMAL), ["slim.widths=[0.5, 1.0, 0.75]"])
    assert recipe.slim.all_widths == (1.0, 0.75, 0.5)


def test_the_slim_width_is_the_widest_of_its_widths(write):
    slim = read_recipe(write(MINIMAL), ["slim.widths=[0.5, 0.75]"]).slim
    assert (slim.width, slim.all_widths) == (0.75, (0.75, 0.5))
    with pytest.raises(RecipeError, match=r"'slim.widths' must have 'slim.width' 1 as its widest, not 0.75"):
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


def test_a_width_named_twice_is_refused(write):
    with pytest.raises(RecipeError, match=r"'slim.widths' names a width twice: \[0.5, 0.5, 1.0\]"):
        read_recipe(write(MINIMAL), ["slim.widths=[0.5, 0.5, 1.0]"])


# --- the method ---


def test_methods_are_the_files_of_their_folder():
    assert list_methods() == ["emp-ssl", "sacl-xd", "simclr"]


@pytest.mark.parametrize("name", ["emp-ssl", "sacl-xd", "simclr"])
def test_a_method_brings_its_own_table(write, name):
    recipe = read_recipe(write(MINIMAL), [f"method.name={name}", "host.width=1.0"])
    assert isinstance(recipe, Recipe)
    assert type(recipe.method) is find_method(name).Config
    assert recipe_from_tables(recipe.model_dump(mode="json"), source="run.json") == recipe


def test_an_unknown_method_is_named_with_those_there_are(write):
    with pytest.raises(RecipeError, match="'simclrr', not one of emp-ssl, sacl-xd, simclr") as caught:
        read_recipe(write(MINIMAL), ["method.name=simclrr"])
    assert caught.value.hint == "did you mean 'simclr'?"


def test_a_key_of_another_method_is_unknown(write):
    with pytest.raises(RecipeError, match=r"unknown key 'method\.alpha'"):
        read_recipe(write(MINIMAL), ["method.name=simclr", "method.alpha=0.5", "host.width=1.0"])


def test_a_key_in_a_table_of_the_method_is_suggested(write):
    with pytest.raises(
        RecipeError, match=r"unknown key 'method\.coding_rate\.wieght' \(did you mean 'weight'"
    ):
        read_recipe(write(MINIMAL), ["method.coding_rate.wieght=0.5"])


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


def test_emp_ssl_without_the_coding_rate_is_refused(write):
    assignments = ["method.name=emp-ssl", "host.width=1.0", "method.coding_rate.weight=0.0"]
    with pytest.raises(RecipeError, match=r"method\.coding_rate\.weight"):
        read_recipe(write(MINIMAL), assignments)


def test_settings_are_named_as_set_takes_them():
    tables = {"run": {"seed": 0}, "method": {"coding_rate": {"weight": 0.1}}}
    assert flatten(tables) == {"run.seed": 0, "method.coding_rate.weight": 0.1}
