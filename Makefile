# `make demo` and `make test` set up everything they need on a new machine.
PYTHON ?= python3
BIN := .venv/bin
# Up to four processes with one thread each, because threads of several processes would compete for the cores. `make test`
# uses one process more than there are cores: about a seventh of its time is waiting for Slurm, followed folders and pages.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check docs dist

demo: .venv/demo  ## prepare, train and measure the demo
	$(BIN)/python -m examples.openmoji.prepare
	$(BIN)/python train_accelerate.py --config configs/openmoji.yaml $(DEMO_ARGS)

test: .venv/test  ## all tests; PYTEST_ARGS='-m "not slow"' for fewer
	$(PYTEST) -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) $(PYTEST_ARGS)

check: .venv/test  ## style and fast tests, required for every change
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -n auto -m "not slow and not gpu"

docs: .venv/docs  ## the documentation site, in build/docs; warnings are errors, and every link and anchor is checked
	$(BIN)/python -m sphinx -q -E -W --keep-going docs build/docs

dist: .venv/test  ## wheel and source archive in dist/, checked; CONTRIBUTING.md says how to publish them
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/dist_contents.py dist

# One stamp file per extra; it is remade when the dependencies change. The extra `test` includes `demo` and `docs`.
.venv/demo .venv/test .venv/docs: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e ".[$(notdir $@)]"
	touch $@
