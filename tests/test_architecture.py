"""The shape of the house: imports run one way, functions stay short, names say something, the wheel holds the data."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edgecl
from edgecl.config.settings import packaged_files

PACKAGE = Path(edgecl.__file__).parent
# Not the package's parent: the package may be the installed one.
REPOSITORY = Path(__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))


def read_layers():
    """The layers that docs/architecture.md draws, the highest first; a file imports from its own and from those below."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(
        r"^## Which way imports run$.*?^```text$\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return [line.split() for line in block.splitlines()]


LAYERS = read_layers()
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path, *, at_import=False):
    """Every module of edgecl that a file imports; with at_import, only while it is itself being imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found = set()

    def visit(node):
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if at_import and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*base, *([source] if source else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES else source)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name for name in found if name.partition(".")[0] == "edgecl"}


def part_of(module):
    """The part of the package a module belongs to: 'edgecl.nets.slimming' -> 'nets'."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_part_of_the_package_has_its_layer():
    parts = {part_of(module) for module in MODULES}
    assert parts == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    above = {
        name
        for name in imports_of(MODULES[module])
        if part_of(name) != part_of(module) and LEVEL[part_of(name)] <= LEVEL[part_of(module)]
    }
    if module == "edgecl":
        above -= {"edgecl.api"}  # loaded when a verb is first asked for
    assert not above


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imports_of(path, at_import=True) - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError


@pytest.mark.parametrize("path", sorted((PACKAGE / "onboard").rglob("*.py")), ids=lambda path: path.name)
def test_device_code_imports_nothing_of_edgecl_but_itself(path):
    assert all(part_of(name) == "onboard" for name in imports_of(path))


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_command_files_import_only_what_is_light_at_the_top(path):
    tops = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add(node.module if node.module.startswith("edgecl") else node.module.partition(".")[0])
    light = "typer pathlib typing contextlib json errno signal types os sys collections __future__ edgecl"
    assert {name for name in tops if not name.startswith("edgecl.cli.")} <= set(light.split())


def test_no_function_is_longer_than_80_lines_its_docstring_apart():
    long = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                if node.end_lineno - node.lineno + 1 - said > 80:
                    long.add(node.name)
    assert not long


@pytest.mark.parametrize("word", ["utils", "util", "helpers", "helper", "common", "misc", "base"])
def test_no_module_has_a_name_that_says_nothing(word):
    assert not [path for path in PACKAGE.rglob("*") if path.stem == word]


def test_few_tables_have_no_model():
    """What travels between modules is a record; the rest is JSON at an edge, and what libraries take and give."""
    untyped = {path: path.read_text(encoding="utf-8").count("dict[str, Any]") for path in FILES}
    assert sum(untyped.values()) - untyped[PACKAGE / "storage" / "records.py"] < 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_nothing_is_unpickled():
    """Weights and records load without running code that is in them."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec"), path
                if ast.unparse(node.func) == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
                assert "allow_pickle=True" not in ast.unparse(node), path


# --- the README's tree ---


def readme_tree():
    """The fenced block of the README that draws edgecl/, as names with slashes."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tree,) = [block for block in blocks if re.search(r"^edgecl/(\s|$)", block, re.MULTILINE)]
    names, folders = [], []
    for line in tree.splitlines():
        match = re.match(r"^([\s│├└─]*)([\w\-]*\.[\w.\-]+|[\w.\-]+/)(\s|$)", line)
        if match:
            # A line within a folder is indented deeper than the folder's own.
            depth = len(match[1])
            while folders and folders[-1][0] >= depth:
                folders.pop()
            name = "".join(folder for _, folder in folders) + match[2]
            names.append(name)
            if name.endswith("/"):
                folders.append((depth, match[2]))
    return names


def test_every_name_in_the_readmes_tree_is_on_the_disk():
    missing = [name for name in readme_tree() if not (REPOSITORY / name).exists()]
    assert not missing


def test_every_file_and_folder_of_the_package_is_in_the_readmes_tree():
    drawn = set(readme_tree())
    there = {
        f"edgecl/{path.name}{'/' if path.is_dir() else ''}"
        for path in PACKAGE.iterdir()
        if path.name not in ("__pycache__", "_data", "__init__.py", "py.typed")
    }
    assert there - drawn == set()


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for tool in ("build", "hatchling"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"the package '{tool}' is not installed")
    source = tmp_path_factory.mktemp("source") / "edgecl"
    source.mkdir()
    for name in ("edgecl", "recipes", "export", "pyproject.toml", "LICENSE", "README.md"):
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("folder", ["recipes", "export"])
def test_wheel_holds_every_packaged_settings_file(wheel, folder):
    held = {name for name in wheel if name.startswith(f"edgecl/_data/{folder}/")}
    assert held == {f"edgecl/_data/{folder}/{name}.toml" for name in packaged_files(folder)}


def test_wheel_holds_every_module_and_what_lies_beside_it(wheel):
    there = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "_data" not in path.parts
    }
    assert there <= wheel


def test_wheel_puts_nothing_but_edgecl_into_site_packages(wheel):
    assert {name.partition("/")[0] for name in wheel if ".dist-info/" not in name} == {"edgecl"}
