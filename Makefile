# Every target makes .venv when it is missing. PYTHON names the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
# Where row 9 of `make bench` finds real images; Debian's package dataset-fashion-mnist puts them there.
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist

.PHONY: demo test study lint types docs bench torture fuzz clean

demo: .venv/.installed
	$(BIN)/ekd distill --teachers resnet18,vgg16 --student lenet

# Studies 1 and 2 of docs/results.md on the embedded digits, each over five seeds; of the second, a smaller grid.
study: .venv/.installed
	$(BIN)/ekd study regimes --jobs 2
	$(BIN)/ekd study temperature --over loss=kl,kl-unscaled --over soft_weight=.1,.5,1 --over temperature=1,4,20 --jobs 2

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# mypy knows nothing of a package spread over three folders, so it sees a copy laid out as installed.
types: .venv/.dev
	rm -rf build/types && mkdir -p build/types
	cp -r ensemble_kd build/types/
	cp -r teachers analysis build/types/ensemble_kd/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p ensemble_kd

# Pages in build/docs/site. mkdocstrings reads the same kind of copy.
docs: .venv/.docs
	rm -rf build/docs && mkdir -p build/docs/source
	cp -r ensemble_kd build/docs/source/
	cp -r teachers analysis build/docs/source/ensemble_kd/
	$(BIN)/mkdocs build --strict

# Long: large teachers and the memory case at 224 px take tens of minutes on two cores. ROWS=6,7 measures these alone.
bench: .venv/.bench
	$(BIN)/python -m benchmarks $(if $(ROWS),--rows $(ROWS)) $(if $(wildcard $(FASHION_MNIST)),--fashion-mnist $(FASHION_MNIST))

# What must survive kills, flipped bits, malformed files, full disks, signals and a second process.
torture: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py --out benchmarks/results/torture.json

# Malformed files for every reader of files, MINUTES each (22 readers, JOBS at a time).
MINUTES ?= 10
JOBS ?= 1
fuzz: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --minutes $(MINUTES) --jobs $(JOBS) --out benchmarks/results/fuzz.json

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11"; echo "  fix: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --upgrade pip

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -qq -e .
	touch $@

.venv/.bench: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -qq -e '.[dev,bench]'
	touch $@ .venv/.dev .venv/.installed

.venv/.docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -qq -e '.[docs]'
	touch $@ .venv/.installed

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -qq -e '.[dev]'
	touch $@ .venv/.installed
