# make train: set up, then train, attack and show MWPB-AT on an embedded data set
# make test:  set up with the development tools, then run the test suite, linters and type checks included
#             (make test-slow: the long fuzzing, kill and real-image runs besides; make test-avx2: the test suite as
#             on a processor without AVX-512)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
NO_NATIVE := mwpb-fast: no C++ compiler was of use here; the CPU ops run as plain PyTorch, several times slower
BUILD_FILES := setup.py pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: train test test-slow test-avx2 lint bench setup setup-dev clean
.DELETE_ON_ERROR:

train: setup
	$(BIN)/mwpb-fast train digits.mwpb_at

test: setup-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup-dev
	$(BIN)/python -m pytest -m slow

# what the linters and type checks say (tests/test_repository.py) does not depend on the processor
test-avx2: setup-dev
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -m "not slow" \
	  --ignore=tests/test_repository.py

lint: setup-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup-dev
	$(BIN)/mwpb-fast bench kernels

setup: $(VENV)/.built
setup-dev: $(VENV)/.built $(VENV)/.dev

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mwpb-fast needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.venv requirements/run.lock
	$(PIP) -r requirements/run.lock
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.lock requirements/peers.lock
	$(PIP) -r requirements/dev.lock
	$(PIP) --no-deps -r requirements/peers.lock
	@touch $@

$(VENV)/.built: $(VENV)/.run $(BUILD_FILES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import mwpb_kernels as k; k.native_library or print("$(NO_NATIVE)")'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/mwpb_kernels/*.so
