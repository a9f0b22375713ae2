# make train    trains the quickstart recipe on this machine; ARGS is passed on, as in make train ARGS='--set train.steps=20'
# make test     runs linters, type checks and tests
# make fast     runs the tests, except those that start whole jobs
# make lock     resolves constraints.txt and deploy/requirements.lock again: the exact versions that these targets, CI and the
#               images install
# make docs     generates docs/reference/ from the code
# make newest   installs the newest versions that the requirements allow, elsewhere, and runs the fast tests with them
PYTHON ?= python3
VENV ?= .venv
LOCK ?= constraints.txt
# Test files that run at once: more than two cores can use, because many tests wait.
JOBS ?= 3
BIN := $(VENV)/bin
TORCH := 2.13.0

# pip before 25.3 applies PIP_CONSTRAINT to build dependencies as well; later versions apply PIP_BUILD_CONSTRAINT.
PIP := $(if $(LOCK),PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK)) $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 1

.PHONY: train test fast lint docs lock newest clean

train: $(VENV)/installed
	$(BIN)/python -m trainer train quickstart $(ARGS)

test: $(VENV)/installed-dev lint
	$(PYTEST)

fast: $(VENV)/installed-dev
	$(PYTEST) -m 'not slow'

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python docs/reference/generate.py

# Removes the CUDA libraries, which torch's wheel selects itself, and packages for systems other than Linux.
lock: $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet 'uv>=0.9'
	printf '%s\n' 'torch==$(TORCH)' 'setuptools>=77' wheel | $(BIN)/uv pip compile --quiet --no-config --upgrade \
	  --universal --fork-strategy fewest --python-version 3.11 --no-annotate --custom-compile-command 'make lock' \
	  --output-file $(VENV)/resolved requirements.txt requirements-dev.txt requirements-eval.txt requirements-serve.txt - > /dev/null
	sed -E '/^(cuda|nvidia)-|^(httpx2-jsfetch|triton|tzdata)=/d' $(VENV)/resolved > $(VENV)/lock
	mv $(VENV)/lock constraints.txt
	$(BIN)/uv pip compile --quiet --no-config requirements.txt --constraint constraints.txt --generate-hashes \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --custom-compile-command 'make lock' \
	  --output-file deploy/requirements.lock > /dev/null

newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest LOCK= .venv-newest/installed-dev
	-.venv-newest/bin/python -m tests.locked
	$(MAKE) VENV=.venv-newest LOCK= fast

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  echo "unipool needs Python 3.11 or newer; $(PYTHON) is $$(v=$$($(PYTHON) --version 2>&1) && echo $$v || echo not installed): name another, as in" \
	    "make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) has no venv or ensurepip: install them (on Debian and Ubuntu the package python3-venv), or name" \
	    "another Python, as in make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml $(LOCK) | $(BIN)/python
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null || { \
	  echo "$(VENV) has no pip and cannot get one: remove it, and run this again" >&2; exit 2; }
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PIP) install -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-newest
