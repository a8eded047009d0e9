# One command for what CI runs: `make check`, in an environment with `pip install ".[dev]"`. `.ci/run` makes the same
# targets in an environment of its own.

# The folder of the tools, absolute and with a slash at the end; the PATH where empty.
BIN ?=
# What the demo writes, for `make demo`.
DEMO ?= demo-out
# Where `make docs` puts the pages.
SITE ?= site

.PHONY: check lint types test long demo docs coverage format

check: lint types test long docs demo

lint:
	$(BIN)ruff check .
	$(BIN)ruff format --check .

types:
	$(BIN)mypy
	$(BIN)mypy --config-file tests/mypy.ini

test:
	$(BIN)pytest -q --durations=10

# Tests of minutes: every precision of the nets of old compiled by TensorRT-RTX, the device code against the official stubs
# (skipped without `pip install --no-deps "tensorrt-stubs>=10.13"`), campaigns of benchmarks, one more killed run, the notebook and
# the tutorial. Without -k, every net of docs/nets.md.
long:
	$(BIN)pytest -q -m slow tests/deploy/test_rtx.py tests/onboard/test_engine.py tests/test_campaigns.py tests/test_notebook.py \
		tests/test_tutorial.py tests/train/test_resume.py -k "mobilenet or efficientnet or resnet50 or not compiles_in_every_form"

# The README's promises about the demo. Elsewhere, where the working tree is not in the way of an installed edgecl.
demo:
	cd $(dir $(abspath $(DEMO))) && $(BIN)edgecl demo --out $(abspath $(DEMO)) --force
	$(BIN)python .ci/check_demo.py $(DEMO)

# The pages in site/: every link checked, nothing fetched.
docs:
	NO_MKDOCS_2_WARNING=1 $(BIN)mkdocs build --quiet --strict --site-dir $(SITE)

# Which lines the tests run. Processes that the tests start are not counted.
coverage:
	$(BIN)pytest -q --cov=edgecl --cov-report=term:skip-covered --cov-report=xml

format:
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
