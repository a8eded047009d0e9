"""The errors: their tree, and the text a user sees."""

from __future__ import annotations

import inspect
import re

from edgecl import errors
from edgecl.errors import EdgeclError, near_matches


def classes():
    return [
        item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == "edgecl.errors"
    ]


def test_docstring_draws_every_class_below_its_parent():
    drawn = re.findall(r"^([│ ├└─]*)(\w+Error)\b", errors.__doc__, re.MULTILINE)
    parents, tree = {}, {}
    for branch, name in drawn:
        depth = len(branch) // 4
        parents[depth] = name
        tree[name] = parents.get(depth - 1, "Exception")
    assert tree == {
        item.__name__: item.__base__.__name__ for item in classes() if issubclass(item, EdgeclError)
    }


def test_an_end_that_was_asked_for_is_no_error():
    """`except EdgeclError` must not swallow it: the run goes on elsewhere."""
    assert not issubclass(errors.Preempted, EdgeclError)


def test_problem_alone_is_one_line():
    assert str(EdgeclError("no such thing")) == "no such thing"


def test_places_and_hint_stand_in_one_column_below_the_problem():
    error = EdgeclError("it broke", where={"file": "a.toml", "directory": "/x"}, hint="mend it")
    # Exact: the words are this test's own, the layout is what it checks.
    assert str(error).splitlines() == [
        "it broke",
        "  file:      a.toml",
        "  directory: /x",
        "  hint:      mend it",
    ]


def test_without_a_near_match_all_are_listed_in_order():
    assert near_matches("zzz", ["b", "a"]) == "known: a, b"


def test_names_that_hold_a_comma_are_listed_with_semicolons():
    known = ["SACL-XD", "SACL-XD, 2 parts", "XD only"]
    assert near_matches("zzz", known) == "known: SACL-XD; SACL-XD, 2 parts; XD only"
