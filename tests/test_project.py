"""What the project promises to whoever joins: one list of checks, a true citation, documents that name what is there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgecl
from edgecl.onboard.runtimes import RUNTIMES

yaml = pytest.importorskip("yaml", reason='needs pip install ".[dev]"')

REPOSITORY = Path(__file__).parents[1]
PACKAGE = Path(edgecl.__file__).parent


def text(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def makefile_targets():
    """Target -> the targets before it and its commands."""
    targets, name = {}, None
    for line in text("Makefile").splitlines():
        match = re.match(r"^([a-z]+):(?!=)(.*)$", line)
        if match:
            name = match[1]
            targets[name] = (match[2].split(), [])
        elif line.startswith("\t"):
            targets[name][1].append(line.strip())
    return targets


# --- one list of checks ---


def test_ci_makes_every_part_of_make_check():
    parts, commands = makefile_targets()["check"]
    assert {"lint", "types", "test", "docs", "demo"} <= set(parts)
    assert not commands
    made = re.findall(r"^make (.*)$", text(".ci/run"), re.MULTILINE)
    assert {word for words in made for word in words.split() if "=" not in word} == set(parts)


def test_ci_has_no_check_of_its_own():
    assert not re.search(
        r"\b(pytest|ruff|mypy|mkdocs)\b *[^\"]", re.sub(r"(?m)^(#|step).*$", "", text(".ci/run"))
    )


def test_workflow_makes_check_on_the_oldest_and_a_new_python():
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    commands = [step.get("run", "") for step in jobs["check"]["steps"]]
    assert "make check" in commands
    pythons = jobs["check"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', text("pyproject.toml"))[1]
    assert oldest in pythons
    assert len(pythons) > 1


def test_hooks_run_the_environments_own_tools():
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert {hook["entry"].split()[0] for hook in repository["hooks"]} == {"ruff", "mypy"}
    assert all(hook["language"] == "system" for hook in repository["hooks"])


@pytest.mark.parametrize("path", sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.md")), ids=str)
def test_issue_templates_have_the_head_that_shows_them(path):
    _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert {"name", "about", "labels"} <= yaml.safe_load(head).keys()
    assert body.strip()


# --- the citation ---


def test_citation_is_of_this_version_and_its_release():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "date-released"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == edgecl.__version__
    assert f"## {edgecl.__version__} ({citation['date-released']})" in text("CHANGELOG.md")
    assert f'license = "{citation["license"]}"' in text("pyproject.toml")


# --- documents ---


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text(page)):
        path, _, anchor = target.partition("#")
        assert (REPOSITORY / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text(path or page), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            ]


def test_contributing_names_files_that_are_there():
    named = set(
        re.findall(r"`((?:edgecl|tests|recipes|export|docs|benchmarks)/[\w./-]+)`", text("CONTRIBUTING.md"))
    )
    assert len(named) > 20
    # NAME stands for a file that the reader adds; several folders of tests have a recorded/.
    there = {name for name in named if not re.search("[A-Z]", name)} - {"tests/recorded/"}
    assert not [name for name in there if not (REPOSITORY / name).exists()]


def test_every_error_has_its_place_in_the_docs():
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    errors = {
        node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    assert set(re.findall(r"::: edgecl\.errors\.(\w+)", text("docs/errors.md"))) == errors


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The docs as `make docs` builds them, with nothing installed but edgecl in the way of the docstrings."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip('needs pip install ".[docs]"')
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site):
    pages = {path.stem for path in (REPOSITORY / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    for path in site.glob("*.html"):
        loads = r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//"
        assert not re.search(loads, path.read_text(encoding="utf-8")), path.name


def test_every_public_function_has_its_place_in_the_docs(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    assert not [
        name for name in edgecl.__all__ if name != "__version__" and f'id="edgecl.api.{name}"' not in page
    ]


def test_the_table_of_runtimes_is_made_from_their_records():
    rows = ["| runtime | `--runtime` | runs on | precisions | forms of INT8, the best first | install |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for name, runtime in RUNTIMES.items():
        names = ", ".join(f"`{one}`" for one in (name, runtime.alias) if one)
        cells = [runtime.title, names, ", ".join(runtime.devices), ", ".join(runtime.precisions)]
        cells += [", ".join(f"`{form}`" for form in runtime.int8_forms), runtime.install]
        rows.append(f"| {' | '.join(cells)} |")
    assert "\n".join(rows) in text("docs/devices.md")
