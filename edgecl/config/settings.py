"""Read a packaged or user-written TOML file into a checked, frozen pydantic model."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from edgecl.errors import EdgeclError, bounded, near_matches
from edgecl.storage.reading import read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Config(BaseModel):
    """A table of a TOML file: frozen, and a key nobody reads is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# A settings file of edgecl has a few kB.
_MOST_BYTES = 1 << 20

# What a setting may be, with the reason, which an error says.
Count = Annotated[int, Field(ge=1, le=10**9, description="nothing is counted that far")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="torch takes seeds of 63 bits")]
LARGER_PICTURES = "larger pictures do not fit into memory by the batch"
Side = Annotated[int, Field(ge=8, le=4096, description=LARGER_PICTURES)]
Fraction = Annotated[float, Field(ge=0, le=1)]
_ONE_STEP = "weights of float32 do not survive one step of a larger one"
Rate = Annotated[float, Field(gt=0, le=1e4, description=_ONE_STEP)]
Decay = Annotated[float, Field(ge=0, le=1e4, description=_ONE_STEP)]
Weight = Annotated[
    float, Field(ge=0, le=1e6, description="beside a larger one nothing else in the sum counts")
]
Factor = Annotated[float, Field(gt=0, le=1e6, description="a larger one leaves the range of float32")]

ConfigT = TypeVar("ConfigT", bound=Config)


def packaged_folder(name: str) -> Path:
    """Return the folder of packaged TOML files: inside an installed wheel, or beside the package in a checkout."""
    installed = Path(__file__).parents[1] / "_data" / name
    return installed if installed.is_dir() else Path(__file__).parents[2] / name


def packaged_files(folder: str) -> dict[str, Path]:
    """Return name -> path of the packaged TOML files, by name."""
    files = sorted(packaged_folder(folder).glob("*.toml"), key=lambda path: path.stem)
    return {path.stem: path for path in files}


def _find_file(name: str, *, folder: str, error: type[EdgeclError], noun: str) -> Path:
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if path.exists() and not path.is_file():
            raise error(f"'{name}' is not a regular file", hint=f"copy the {noun} to a file of its own")
        if not path.is_file():
            raise error(f"no {noun} file at '{name}'", hint=f"`edgecl ls {noun}s` lists the packaged ones")
        return path
    known = packaged_files(folder)
    if name not in known:
        raise error(f"unknown {noun} '{name}'", hint=near_matches(name, known))
    return known[name]


def parse_toml(text: str, *, source: str, error: type[EdgeclError]) -> dict[str, Any]:
    """Parse TOML text; what is wrong with it is an error of the given class."""
    try:
        return tomllib.loads(text)
    except ValueError as exc:  # of numbers with too many digits it is Python's
        raise error(f"not valid TOML: {exc}", where={"file": source}) from exc
    except RecursionError:
        raise error("nested too deep to be read", where={"file": source}) from None


def read_tables(
    name: str, *, folder: str, error: type[EdgeclError], noun: str
) -> tuple[Path, dict[str, Any]]:
    """Return the file that a name or a path stands for, and its tables.

    Raises:
        EdgeclError: of the given class, when there is none, with near names, or it is no TOML.
    """
    path = _find_file(name, folder=folder, error=error, noun=noun)
    try:
        # Windows editors begin a file with a byte-order mark.
        text = read_bytes(path, most=_MOST_BYTES, error=error).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise error(f"not a text file: {exc}", where={"file": path}) from exc
    return path, parse_toml(text, source=str(path), error=error)


def list_packaged(folder: str) -> list[dict[str, str]]:
    """List the packaged TOML files: name and the first line of the header."""
    return [
        {"name": name, "summary": header_comment(path.read_text(encoding="utf-8")).partition("\n")[0]}
        for name, path in packaged_files(folder).items()
    ]


def header_comment(text: str) -> str:
    """Return the comment lines a file begins with, without their marks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return "\n".join(lines).strip()


def override(tables: dict[str, Any], assignments: list[str], *, error: type[EdgeclError]) -> dict[str, Any]:
    """Return the tables with `table.key=value` assignments applied; values are TOML, or bare words.

    Raises:
        EdgeclError: of the given class, for an assignment without a '='.
    """
    result = copy.deepcopy(tables)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise error(
                f"cannot read --set '{assignment}'", hint="write it as table.key=value, e.g. optim.lr=0.2"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        except (ValueError, RecursionError) as exc:
            raise error(f"cannot read --set '{bounded(assignment, 100)}': {exc}") from exc
        table = result
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            inner = table.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise error(
                    f"cannot set '{key.strip()}': '{parent}' is a value, not a table",
                    where={"--set": assignment},
                )
            table = inner
        table[leaf] = value
    return result


def validate(
    model: type[ConfigT],
    tables: dict[str, Any],
    *,
    source: str,
    error: type[EdgeclError],
    assignments: Sequence[str] = (),
) -> ConfigT:
    """Validate tables against a model and report every problem at once, unknown keys with their near matches.

    `source` is the file they were read from; the assignments that `override` applied answer for the keys they set.

    Raises:
        EdgeclError: of the given class, with one line per problem.
    """
    try:
        return model.model_validate(tables)
    except ValidationError as exc:
        problems = exc.errors()
        # A list that lost a wrong entry is also too short, of which nobody needs to hear.
        lists = {one["loc"][:-1] for one in problems if one["loc"] and isinstance(one["loc"][-1], int)}
        problems = [problem for problem in problems if problem["loc"] not in lists]
        places = [".".join(map(str, problem["loc"])) for problem in problems]
        where = _where_set(places, source=source, assignments=assignments)
        raise error("; ".join(_describe(one, model) for one in problems), where=where) from exc


def _where_set(places: Sequence[str], *, source: str, assignments: Sequence[str]) -> dict[str, object]:
    """Return whether the file or `--set` holds the keys; one without a name is of several together, from either."""
    given = {assignment.partition("=")[0].strip(): assignment for assignment in assignments}
    blamed = {place: [key for key in given if _overlap(key, place)] for place in places}
    chosen = [given[key] for key in given if any(key in keys for keys in blamed.values())]
    where: dict[str, object] = {"--set": ", ".join(chosen)} if chosen else {}
    return where if all(place and keys for place, keys in blamed.items()) else {"file": source, **where}


def _overlap(key: str, place: str) -> bool:
    return not place or f"{place}.".startswith(f"{key}.") or f"{key}.".startswith(f"{place}.")


def _describe(problem: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = bounded(".".join(path), 200)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}' ({near_matches(path[-1], _fields_at(model, path[:-1]))})"
    if problem["type"] == "missing":
        if isinstance(problem["loc"][-1], int):  # of a list that is too short
            return f"'{'.'.join(path[:-1])}' is {_shown(problem['input'])}: {_must_be_list(problem, model, path[:-1])}"
        return f"missing key '{key}'"
    message: str = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return message
    if problem["type"] == "literal_error":
        word = problem["input"] if isinstance(problem["input"], str) else _shown(problem["input"])
        word = bounded(word, 200)
        choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = near_matches(word, choices)
        suggestion = f" ({near})" if near.startswith("did") else ""
        return f"'{key}' is {word!r}, not one of {', '.join(choices)}{suggestion}"
    if problem["type"] == "model_type":
        message = "must be a table"
    if problem["type"] in ("tuple_type", "too_long", "too_short"):
        message = _must_be_list(problem, model, path)
    if problem["type"].startswith("less_than"):
        # An entry of a list has the reason of the list.
        field = next((key for key in reversed(path) if not key.isdigit()), "")
        reason = _fields_at(model, path[: path.index(field)]).get(field) if field else None
        message += f"; {reason.description}" if reason and reason.description else ""
    return f"'{key}' is {_shown(problem['input'])}: {message}"


def _shown(value: Any) -> str:
    try:
        return bounded(repr(list(value) if isinstance(value, tuple) else value), 200)
    except ValueError:  # hexadecimal may have any number of digits
        return "a number of thousands of digits"


def _must_be_list(problem: Any, model: type[BaseModel], path: list[str]) -> str:
    """Return how a list is written, by the field's default or, where that is empty, by an example."""
    field = _fields_at(model, path[:-1]).get(path[-1])
    default = field.default if field and isinstance(field.default, tuple) else ()
    example = default or (field.examples[0] if field and field.examples else [problem["input"]])
    return f"must be a list such as {json.dumps(list(example))}"


def _fields_at(model: type[BaseModel], path: list[str]) -> dict[str, FieldInfo]:
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return {}
        model = inner
    return dict(model.model_fields)
