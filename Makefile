# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Up to four processes, each with one thread: two would wait for one another. One for each core, and one more where a seventh
# of the time is waiting, for Slurm, a followed folder, a page.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check

demo: .venv/demo  ## prepare, train and measure the embedded default
	$(BIN)/python -m examples.openmoji.prepare
	$(BIN)/python train_accelerate.py --config configs/openmoji.yaml $(DEMO_ARGS)

test: .venv/test  ## all tests; PYTEST_ARGS='-m "not slow"' for fewer
	$(PYTEST) -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) $(PYTEST_ARGS)

check: .venv/test  ## what every change passes: style, and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -n auto -m "not slow and not gpu"

# A stamp an extra: made anew when the dependencies change. `test` brings all that `demo` has.
.venv/demo .venv/test: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e ".[$(notdir $@)]"
	touch $@
