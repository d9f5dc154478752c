# The whole project from two commands: `make demo` shows the job, `make test` checks it.
VENV := $(if $(NEXT),.venv-next,.venv)
LOCK := $(if $(NEXT),requirements-next.lock,requirements.lock)
PY := $(VENV)/bin/python
ON_ALL_CORES := -n auto --dist worksteal

.PHONY: demo test test-fast test-gpu test-gpu-emulated gpu-check torture setup lint format doctor lock clean help

demo: setup  ## draw flowers, train on two ranks, evaluate, export, predict, report
	$(PY) -m fastflower.demo

test: setup  ## the whole suite on all cores; pick with ARGS="-k recipe"
	$(PY) -m pytest $(ON_ALL_CORES) $(ARGS)

test-fast: setup  ## the inner loop: single-process tests of a few seconds each
	$(PY) -m pytest $(ON_ALL_CORES) -m "not slow and not dist" $(ARGS)

test-gpu: setup  ## the tests that need a GPU, in one process
	$(PY) -m pytest -m gpu $(ARGS)

test-gpu-emulated: setup  ## memory, waits and exit codes on a CUDA runtime without kernels, where one is at hand
	$(PY) -m pytest tests/training/test_emulated_gpu.py $(ARGS)

gpu-check: setup  ## everything that needs a GPU, in under ten minutes, as a table; ARGS="memory resume" for a part
	PYTHON=$(PY) scripts/gpu_check.sh $(ARGS)

torture: setup  ## kill trainings wherever they could be cut, compare their ends to the bit; ARGS="--points 20 --random 5"
	$(PY) tests/support/torture.py $(ARGS)

setup: $(VENV)/installed  ## system packages and .venv from the hashed lock; NEXT=1: .venv-next, with a newer torch

$(VENV)/installed: $(LOCK) pyproject.toml scripts/setup.sh $(wildcard fastflower/data/decode/*.c fastflower/data/decode/*.h)
	NEXT=$(NEXT) scripts/setup.sh

lint: setup  ## ruff and mypy
	$(PY) -m ruff check -q .
	$(PY) -m ruff format -q --check .
	$(PY) -m mypy

format: setup  ## rewrite in the project's style
	$(PY) -m ruff check -q --fix .
	$(PY) -m ruff format -q .

doctor:  ## what this machine has and lacks
	@$(if $(wildcard $(PY)),$(PY),python3) -m fastflower.doctor

lock:  ## resolve again; needs .venv
	$(PY) -m uv pip compile -q pyproject.toml --extra dev $(if $(NEXT),--override requirements-next.in) \
		--generate-hashes --no-header --no-annotate -o $(LOCK)

clean:  ## remove what was built; data/ and results/ stay
	rm -rf .venv .venv-next build *.egg-info fastflower/data/decode/_decode*.so .pytest_cache .ruff_cache .mypy_cache
	find fastflower code tests -name __pycache__ -prune -exec rm -rf {} +

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12
