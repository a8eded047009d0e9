"""Read a packaged or user-written TOML file into a checked, frozen pydantic model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgecl.errors import EdgeclError, near_matches

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Settings(BaseModel):
    """A table of a TOML file: frozen, and a key nobody reads is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


def packaged_folder(name: str) -> Path:
    """Return the folder of packaged TOML files: inside an installed wheel, or beside the package in a checkout."""
    installed = Path(__file__).parent / "_data" / name
    return installed if installed.is_dir() else Path(__file__).parent.parent / name


def packaged_files(folder: str) -> dict[str, Path]:
    """Return name -> path of the packaged TOML files, by name."""
    files = sorted(packaged_folder(folder).glob("*.toml"), key=lambda path: path.stem)
    return {path.stem: path for path in files}


def find_settings_file(name: str, *, folder: str, error: type[EdgeclError], noun: str) -> Path:
    """Return the TOML file a name or a path stands for.

    Raises:
        EdgeclError: of the given class, when there is none; near names are suggested.
    """
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise error(f"no {noun} file at '{name}'", hint=f"`edgecl ls {noun}s` lists the packaged ones")
        return path
    known = packaged_files(folder)
    if name not in known:
        raise error(f"unknown {noun} '{name}'", hint=near_matches(name, known))
    return known[name]


def read_text(path: Path, *, error: type[EdgeclError]) -> str:
    """Return the text of a settings file; a byte-order mark, as Windows editors write it, is left out."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as complaint:
        raise error(f"not a text file: {complaint}", where={"file": path}) from complaint


def parse_toml(text: str, *, source: str, error: type[EdgeclError]) -> dict[str, Any]:
    """Parse TOML text, with the parser's complaint turned into a named error."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as complaint:
        raise error(f"not valid TOML: {complaint}", where={"file": source}) from complaint


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
    result = {name: dict(value) if isinstance(value, dict) else value for name, value in tables.items()}
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
        table = result
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            inner = table.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise error(f"cannot set '{key}': '{parent}' is a value, not a table")
            table = inner
        table[leaf] = value
    return result


def validate(
    model: type[SettingsT], tables: dict[str, Any], *, source: str, error: type[EdgeclError]
) -> SettingsT:
    """Validate tables against a model and report every problem at once, unknown keys with their near matches.

    Raises:
        EdgeclError: of the given class, with one line per problem.
    """
    try:
        return model.model_validate(tables)
    except ValidationError as complaint:
        lines = [_describe(problem, model) for problem in complaint.errors()]
        raise error("; ".join(lines), where={"file": source}) from complaint


def _describe(problem: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}' ({near_matches(path[-1], _keys_at(model, path[:-1]))})"
    if problem["type"] == "missing":
        return f"missing key '{key}'"
    message: str = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return message
    if problem["type"] == "literal_error":
        word = str(problem["input"])
        choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = near_matches(word, choices)
        suggestion = f" ({near})" if near.startswith("did") else ""
        return f"'{key}' is {word!r}, not one of {', '.join(choices)}{suggestion}"
    return f"'{key}' is {problem['input']!r}: {message}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
