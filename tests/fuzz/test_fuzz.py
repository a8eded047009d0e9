"""Thousands of damaged inputs for every reader: each is read or refused by a named error, and nothing else happens.

The cases are a function of their numbers. EDGECL_FUZZ_CASES sets how many the long form runs, EDGECL_FUZZ_CASE runs one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .mutation import Mutator
from .oracle import evaluator, remove
from .readers import GROUPS, Seeds

CASES = 2_000
LONG = int(os.environ.get("EDGECL_FUZZ_CASES", "50000"))
ONE = os.environ.get("EDGECL_FUZZ_CASE", "")
SHOWN = 10


@pytest.fixture(scope="module")
def seeds(trained_run: Path, carved_model: Path, exported_bundle: Path) -> Seeds:
    return Seeds(trained_run, carved_model, exported_bundle)


def share(group: str, cases: int) -> int:
    return -(-cases * GROUPS[group][0] // sum(parts for parts, _ in GROUPS.values()))


def hold(group: str, numbers: range, seeds: Seeds, place: Path) -> None:
    reader = GROUPS[group][1]
    problems = []
    if ONE:
        wanted, _, number = ONE.partition(":")
        if wanted != group:
            pytest.skip(f"only {ONE} is asked for")
        numbers = range(int(number), int(number) + 1)
    for number in numbers:
        case = f"{group}:{number}"
        folder = place / str(number)
        problem = evaluator(lambda inside, case=case: reader(Mutator(case), seeds, inside), folder)
        if problem is None:
            remove(folder)
            continue
        repeat = f"EDGECL_FUZZ_CASE={case} python -m pytest -n 0 {Path(__file__).relative_to(Path.cwd())}"
        problems.append(f"{problem}\n    its input: {folder}\n    again: {repeat}")
        if len(problems) == SHOWN:
            problems.append("… the rest was not tried")
            break
    assert not problems, f"{len(problems)} of {len(numbers)} cases of {group}:\n" + "\n".join(problems)


@pytest.mark.parametrize("group", GROUPS)
def test_damaged_input_ends_in_success_or_a_named_error(group, seeds, tmp_path):
    hold(group, range(share(group, CASES)), seeds, tmp_path / group)


@pytest.mark.slow
@pytest.mark.skipif(bool(ONE), reason="one case is asked for")
@pytest.mark.parametrize("group", GROUPS)
def test_much_damaged_input_ends_in_success_or_a_named_error(group, seeds, tmp_path):
    hold(group, range(share(group, CASES), share(group, LONG)), seeds, tmp_path / group)
