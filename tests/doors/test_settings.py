"""Settings that parse and cannot be are refused with the reason, before anything is written."""

from __future__ import annotations

import pytest

from edgecl.config.recipe import Recipe, find_method, list_methods, read_recipe
from edgecl.config.settings import override, parse_toml, validate
from edgecl.config.target import read_target
from edgecl.errors import RecipeError, TargetError
from edgecl.evaluate.supervised import FinetuneConfig

IMPOSSIBLE = [
    "run.seed=9223372036854775808",
    "data.image_size=100000000000000000000",
    # The test of all bounds leaves out what is optional.
    "data.decode_size=100000000000000000000",
    "data.resize_size=1000000",
    "data.read_timeout_s=1e300",
    "data.limit=100000000000000000000",
    "views.local_size=100000",
    "data.mean=[1e300, 0.0, 0.0]",
    "data.std=[0.0, 1.0, 1.0]",
    "views.blur_sigma=[0.1, 1e300]",
    "views.crop_ratio=[1e-300, 1.0]",
    "projector.sizes=[100000000000000000000]",
    f"projector.sizes={[8] * 1000}",
    "optim.lr=1e300",
    "method.coding_rate.weight=1e308",
]


@pytest.mark.parametrize("assignment", IMPOSSIBLE, ids=lambda text: text[:40])
def test_a_value_that_cannot_be_is_refused_by_its_key(assignment):
    key = assignment.partition("=")[0]
    with pytest.raises(RecipeError, match=f"'{key}"):
        read_recipe("demo", [assignment])


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ("run.seed=9223372036854775808", "63 bits"),
        ("data.image_size=100000", "memory"),
        ("data.decode_size=1000000", "memory"),
        ("projector.sizes=[1000000000]", "4 GiB"),
        ("optim.lr=1e300", "float32"),
        ("data.read_timeout_s=1e300", "week"),
    ],
)
def test_a_bound_says_its_reason(assignment, reason):
    with pytest.raises(RecipeError, match=reason):
        read_recipe("demo", [assignment])


def test_the_reason_of_the_upper_bound_is_not_that_of_the_lower():
    with pytest.raises(RecipeError, match="greater than 0") as caught:
        read_recipe("demo", ["optim.lr=-1"])
    assert "float32" not in caught.value.problem


def test_a_wrong_entry_of_a_list_is_one_problem():
    with pytest.raises(RecipeError) as caught:
        read_recipe("demo", ["projector.sizes=[1000000000]"])
    assert caught.value.problem.count("projector.sizes") == 1


def test_every_number_of_a_recipe_has_both_bounds():
    """Of whatever setting comes later too: a number that any reader writes has a largest value."""

    def numbers(schema, where):
        if schema.get("type") in ("integer", "number") and "const" not in schema and "enum" not in schema:
            yield where, schema
        for key, inner in schema.items():
            for place, one in enumerate(inner if isinstance(inner, list) else [inner]):
                if isinstance(one, dict):
                    yield from numbers(one, f"{where}.{key}.{place}")

    bounds = [
        (
            where,
            "minimum" in schema or "exclusiveMinimum" in schema,
            "maximum" in schema or "exclusiveMaximum" in schema,
        )
        for model in (Recipe, *(find_method(name).Config for name in list_methods()))
        for where, schema in numbers(model.model_json_schema(), "")
    ]
    assert len(bounds) > 50
    # An optional setting has its bounds beside its type.
    assert [where for where, low, high in bounds if not (low and high) and ".anyOf." not in where] == []


def test_the_largest_seed_is_taken():
    assert read_recipe("demo", [f"run.seed={2**63 - 1}"]).run.seed == 2**63 - 1


@pytest.mark.parametrize(
    "assignment", ["seed=9223372036854775808", "lr=1e300", "weight_decay=1e308", "batch_size=1e20"]
)
def test_settings_of_supervised_training_are_bounded_too(assignment):
    with pytest.raises(RecipeError, match=assignment.partition("=")[0]):
        validate(
            FinetuneConfig, override({}, [assignment], error=RecipeError), source="--set", error=RecipeError
        )


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("graph", "batch = 100000000000000000000"),
        ("graph", "image_size = 100000"),
        ("build", "workspace_mib = 100000000000000000000"),
        ("quantization", "calibration_images = 100000000000000000000"),
        ("", f"versions = '>={'9' * 5000}'"),
    ],
)
def test_a_targets_values_are_bounded(tmp_path, table, line):
    file = tmp_path / "t.toml"
    head = line if not table else f"[{table}]\n{line}"
    file.write_text(f"runtime = 'onnxruntime'\n{head}\n", encoding="utf-8")
    with pytest.raises(TargetError, match=line.partition(" ")[0]):
        read_target(str(file))


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text", [f"a = {DEEP}", f"a = {'9' * 5000}", "a = " + "{b=" * 50_000 + "1" + "}" * 50_000]
)
def test_toml_too_deep_or_with_too_many_digits_is_a_named_error(text):
    with pytest.raises(RecipeError) as caught:
        parse_toml(text, source="x.toml", error=RecipeError)
    assert "x.toml" in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("value", [DEEP, "9" * 5000])
def test_an_assignment_too_deep_or_with_too_many_digits_is_a_named_error(value):
    with pytest.raises(RecipeError, match="--set"):
        read_recipe("demo", [f"run.seed={value}"])


@pytest.mark.parametrize(
    "key", ["run.seed", "optim.name", "run.channels_last", "host.arch", "host.stem_stride"]
)
def test_a_number_that_cannot_be_written_in_decimals_is_refused(key):
    """Hexadecimal may have any number of digits, and Python does not print so many."""
    with pytest.raises(RecipeError, match=key):
        read_recipe("demo", [f"{key}=0x{'f' * 5000}"])


def test_a_settings_file_of_megabytes_is_refused_before_it_is_parsed(tmp_path):
    file = tmp_path / "large.toml"
    file.write_text("a = [" + "1," * 1_000_000 + "]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        read_recipe(str(file))
