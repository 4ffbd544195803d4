PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Two processes, a file at a time; with more cores: make test PARALLEL="-n 8 --dist loadfile".
PARALLEL ?= -n 2 --dist loadfile

.PHONY: demo test slow bench lint

demo: $(READY)
	$(BIN)/spectral-callbacks demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

# No slow test at all (status 5) is no failure.
slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m slow || [ $$? -eq 5 ]

# Every file directly in benchmarks/ whose name does not start with _ is a claim, and exits 1 when it fails.
bench: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/requirements.txt
	@failed=; for claim in benchmarks/[!_]*.py; do \
		echo "== $$claim"; $(BIN)/python "$$claim" || failed="$$failed $$claim"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pyright

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@
