"""TOML text and `--set` assignments become checked settings, and every mistake becomes a sentence."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from pydantic import Field

from edgecl.config.settings import Config, header_comment, override, read_tables, validate
from edgecl.errors import RecipeError


class Inner(Config):
    speed: float = 1.0
    color: Literal["red", "green", "blue"] = "red"
    sizes: tuple[int, ...] = Field((), examples=[(3, 5)])
    area: tuple[float, float] = (0.08, 1.0)
    names: tuple[str, ...] = ()


class Outer(Config):
    name: str
    inner: Inner = Inner()


def exc(tables, *assignments):
    """What is wrong with tables after assignments."""
    tables = override(tables, list(assignments), error=RecipeError)
    with pytest.raises(RecipeError) as caught:
        validate(Outer, tables, source="x.toml", error=RecipeError, assignments=assignments)
    return caught.value


def test_all_problems_are_reported_at_once():
    problem = exc({"inner": {"sped": 1, "speed": "fast", "color": "gren"}}).problem
    assert problem.count("; ") >= 3
    for part in (
        "missing key 'name'",
        "unknown key 'inner.sped'",
        "'inner.speed' is 'fast'",
        "'inner.color' is 'gren'",
    ):
        assert part in problem


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ({"sped": 2.0}, r"unknown.*'inner\.sped'.*mean 'speed'"),
        ({"color": "bleu"}, r"'inner\.color' is 'bleu'.*red, green, blue.*mean 'blue'"),
        ({"color": "zzz"}, r"'inner\.color' is 'zzz'.*red, green, blue$"),
        ({"sizes": 3}, r"'inner\.sizes' is 3:.*list.*\[3, 5\]"),
        ({"area": 0.5}, r"'inner\.area' is 0\.5:.*list.*\[0\.08, 1\.0\]"),
        ({"area": [0.5]}, r"'inner\.area' is \[0\.5\]:.*list.*\[0\.08, 1\.0\]"),
        ({"area": [0, 1, 2]}, r"'inner\.area' is \[0, 1, 2\]:.*list.*\[0\.08, 1\.0\]"),
        ({"names": "a"}, r"""'inner\.names' is 'a':.*list.*\["a"\]"""),
        (3, "'inner' is 3:.*table"),
        ({"speed": float("nan")}, r"'inner\.speed' is nan:.*finite"),
        ({"speed": float("inf")}, r"'inner\.speed' is inf:.*finite"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(inner, words):
    problem = exc({"name": "a", "inner": inner}).problem
    assert re.search(words, problem)
    assert "; " not in problem  # one problem only


def test_place_inside_a_list_is_named_and_what_is_known_is_listed():
    assert "'inner.sizes.1' is 'two'" in exc({"name": "a", "inner": {"sizes": [1, "two"]}}).problem
    assert re.search("unknown.*'zzz'.*known: inner, name", exc({"name": "a", "zzz": 1}).problem)


@pytest.mark.parametrize(
    ("file", "assignments", "where"),
    [
        ({"name": "a"}, ["inner.speed=fast"], {"--set": "inner.speed=fast"}),
        ({"name": "a"}, ["inner.sped = 2"], {"--set": "inner.sped = 2"}),
        ({"name": "a"}, ["inner=3"], {"--set": "inner=3"}),
        ({"name": "a"}, ["inner.sizes=[1, 'b']"], {"--set": "inner.sizes=[1, 'b']"}),
        ({"name": "a"}, ["inner.speed=2", "nam=1", "inner.speed=x"], {"--set": "inner.speed=x, nam=1"}),
        ({"name": 3}, ["inner.speed=2"], {"file": "x.toml"}),
        ({}, ["inner.speed=2"], {"file": "x.toml"}),
        ({"name": 3}, ["inner.speed=x"], {"file": "x.toml", "--set": "inner.speed=x"}),
    ],
)
def test_a_wrong_key_or_value_is_blamed_on_what_set_it(file, assignments, where):
    assert exc(file, *assignments).where == where


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("inner.speed=2.5", 2.5),
        ("inner.speed = 1e-3", 1e-3),
        ("inner.sizes=[3, 4]", [3, 4]),
        ("inner.color=blue", "blue"),
        ('inner.color="blue"', "blue"),
        ("inner.flag=true", True),
        ("inner.uri=/data/my pictures", "/data/my pictures"),
        ("inner.uri=cifar10:/data", "cifar10:/data"),
        ("inner.uri=a=b", "a=b"),
    ],
)
def test_assigned_values_are_toml_or_bare_words(assignment, expected):
    tables = override({}, [assignment], error=RecipeError)
    assert list(tables["inner"].values()) == [expected]


def test_later_assignments_win_and_leave_the_given_tables_alone():
    tables = {"name": "a", "inner": {"speed": 1.0}}
    changed = override(tables, ["inner.speed=1", "inner.speed=2", "name=b"], error=RecipeError)
    assert changed == {"name": "b", "inner": {"speed": 2}}
    assert tables == {"name": "a", "inner": {"speed": 1.0}}


@pytest.mark.parametrize("assignment", ["inner.speed", "=2", " = 2", ""])
def test_assignment_of_a_bad_form_says_how_to_write_it(assignment):
    with pytest.raises(RecipeError, match=f"--set '{re.escape(assignment)}'") as caught:
        override({}, [assignment], error=RecipeError)
    assert "table.key=value" in caught.value.hint


def test_assignment_below_a_value_is_refused():
    with pytest.raises(RecipeError, match=r"'name\.first'.*'name' is a value") as caught:
        override({"name": "a"}, ["name.first=b"], error=RecipeError)
    assert caught.value.where == {"--set": "name.first=b"}


def test_header_is_the_comment_at_the_top_only():
    text = "# Summary.\n#\n# Command: edgecl run x\n\n# Not this.\n[host]\n"
    assert header_comment(text) == "Summary.\n\nCommand: edgecl run x"


@pytest.mark.parametrize(("name", "problem"), [("no.toml", "no recipe file at"), ("", "not a regular file")])
def test_what_is_no_settings_file_is_named(tmp_path, name, problem):
    with pytest.raises(RecipeError, match=problem):
        read_tables(f"{tmp_path}/{name}", folder="recipes", error=RecipeError, noun="recipe")
