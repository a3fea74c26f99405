# Each target sets up the environment itself, so `make test` and `make demo` work on a fresh checkout.
PYTHON ?= python3
VENV ?= .venv
VARIANT ?= conditional
JOBS ?= 3
WHEELS ?= .whl
GPU_FLAGS ?=

python := $(VENV)/bin/python
# Marks the environment as ready and records its checkout: an editable install points to one folder, so an environment
# shared by several checkouts must be installed again when the checkout changes.
stamp := $(VENV)/.enact-installed
other_checkout := $(if $(filter-out "$(CURDIR)","$(shell cat $(stamp) 2>/dev/null)"),force)

.PHONY: help install test wheel docs soak lint audit demo gpu clean force

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1:/p' Makefile | awk -F: '{ printf "  make %-10s%s\n", $$1, $$2 }'
	@echo "Settings, with their current values:"
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  VARIANT=$(VARIANT)  JOBS=$(JOBS)"

install: $(stamp)  ## create the environment and install the package into it

# A file runs in one process, so that its fixtures are made once, in the order of tests/conftest.py.
jobs = -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(stamp)  ## run the tests, in JOBS processes
	$(python) -m pytest $(jobs)

test-fast: $(stamp)  ## run the tests without the slow ones, in about 80 seconds
	$(python) -m pytest $(jobs) -m "not slow"

wheel: $(stamp)  ## build the wheel, install it into a clean environment, and test it there
	$(python) tests/installed.py

docs: $(stamp)  ## build the documentation site into site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet

soak: $(stamp)  ## run the long loops of docs/dev/reliability.md, about half an hour, and record the results
	$(python) tests/soak.py

lint: $(stamp)  ## check the code with ruff, and the other files by schema and hadolint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m check_jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(python) -m check_jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(python) -m check_jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[bfq]*.yml
	@if [ -x $(VENV)/bin/hadolint ]; then echo "hadolint Dockerfile" && $(VENV)/bin/hadolint Dockerfile; \
	else echo "hadolint is missing on this system: the Dockerfile is not checked"; fi

# Not part of the tests, since the answer of the vulnerability service changes over time.
audit: $(stamp)  ## look up known vulnerabilities of the versions in constraints.txt
	$(python) -m pip install -c constraints.txt pip-audit
	$(python) -m pip_audit --strict --no-deps --disable-pip -r constraints.txt

demo: $(stamp)  ## train a small model on made-up images; the results go to demo/
	$(python) -m enact_common.demo --variant $(VARIANT) --output_dir demo

# Does not depend on `install`, since a GPU server may bring its own PyTorch and may not reach a package index. Missing
# packages (pycocotools) are installed from wheels in WHEELS.
gpu_python := $(if $(wildcard $(python)),$(CURDIR)/$(python),$(PYTHON))
gpu:  ## check and measure on a GPU, about ten minutes; uses wheels in WHEELS; the results go to gpu_run/
	@if ls $(WHEELS)/*.whl >/dev/null 2>&1; then \
	    $(gpu_python) -m pip install -q --no-index --no-deps --upgrade --target $(WHEELS)/site $(WHEELS)/*.whl; fi
	PYTHONPATH="$(CURDIR)/$(WHEELS)/site:$(CURDIR)" $(gpu_python) -m enact_common.gpu run --output_dir gpu_run $(GPU_FLAGS)

clean:  ## remove files of earlier runs (keeps the environment and outputs/)
	rm -rf demo gpu_run site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

# An environment without a working pip is incomplete, so it is created again.
$(stamp): pyproject.toml constraints.txt $(other_checkout)
	@if ! $(python) -m pip --version >/dev/null 2>&1; then \
	    fail() { echo "error: $$1" >&2; exit 1; }; \
	    command -v $(PYTHON) >/dev/null \
	        || fail "$(PYTHON) not found; name a Python 3.10 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	        || fail "$(PYTHON) is older than Python 3.10; name another: make PYTHON=python3.11 $(MAKECMDGOALS)"; \
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	        || fail "$(PYTHON) cannot create environments; on Debian and Ubuntu: apt install python3-venv"; \
	    $(PYTHON) -m venv $(VENV); \
	fi
	$(python) -m pip install -c constraints.txt -e ".[dev]"
	@echo "$(CURDIR)" > $(stamp)

force:
