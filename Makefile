# make train: set up, then train, attack and show MWPB-AT on an embedded data set
# make test:  set up with the development tools, then run the test suite, linters and type checks included
#             (make test-slow: the long fuzzing, kill and real-image runs besides; make test-avx2: the test suite as
#             on a processor without AVX-512)
# make torture: kills, signals, damage, full disks and hostile input at length, with a table of what failed; the same
#             command goes on after any stop
# make wheels: wheels and source distributions of both packages in dist/, checked, installed and tried in empty
#             environments; PYTHONS names Pythons with a PyTorch to try them with (the default is .venv's)
# make docs:  the documentation as a site, in site/
# make golden BASE=REV: whether this checkout computes to the bit what the revision REV does

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SLOW := mwpb-kernels: no native CPU ops, so they run as plain PyTorch, several times slower:
# a process for each core (tests/conftest.py counts them); what the tests of a file share is made once
PARALLEL := -n auto --dist loadfile
BUILD_FILES := setup.py pyproject.toml $(wildcard kernels/setup.py kernels/*.t* kernels/csrc/*)

.PHONY: train test test-slow test-avx2 torture lint bench docs golden wheels setup setup-dev clean FORCE
.DELETE_ON_ERROR:

train: setup
	$(BIN)/python -m mwpb_fast train digits.mwpb_at

test: setup-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: setup-dev
	$(BIN)/python -m pytest -m slow

# what the linters and type checks say (tests/test_repository.py) does not depend on the processor
test-avx2: setup-dev
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest $(PARALLEL) \
	  -m "not slow" --ignore=tests/test_repository.py

torture: setup-dev
	$(BIN)/python bench/torture.py --json bench/results/torture.json; status=$$?; \
	  $(BIN)/python bench/tables.py && exit $$status

lint: setup-dev
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . && $(BIN)/python -m mypy

bench: setup-dev
	$(BIN)/python -m mwpb_fast bench kernels

docs: setup-dev $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

wheels: setup-dev
	$(BIN)/python install/wheels.py $(PYTHONS)

golden: setup-dev
	$(BIN)/python bench/golden.py $(BASE)

setup: $(VENV)/.built
setup-dev: $(VENV)/.built $(VENV)/.dev

# An environment knows its place and its Python: it is made anew where the clone has moved, where that Python is
# gone, and where it was left half made.
$(VENV)/.venv: FORCE
	@[ -e $@ ] && $(BIN)/python -c 'import pip' 2>/dev/null && grep -qF "$(CURDIR)/$(VENV)" $(BIN)/activate || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "mwpb-fast needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }; \
	  echo "$(PYTHON) -m venv $(VENV)"; \
	  rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && touch $@; }

$(VENV)/.run: $(VENV)/.venv requirements/run.lock
	$(PIP) -r requirements/run.lock
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.lock requirements/peers.lock
	$(PIP) -r requirements/dev.lock
	$(PIP) --no-deps -r requirements/peers.lock
	@touch $@

$(VENV)/.docs: $(VENV)/.dev requirements/docs.lock
	$(PIP) -r requirements/docs.lock
	@touch $@

$(VENV)/.built: $(VENV)/.run $(BUILD_FILES)
	$(PIP) --no-build-isolation --no-deps --editable ./kernels
	$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import mwpb_kernels as k; k.native_library or print("$(SLOW)", k.native_problem)'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/build kernels/*.egg-info kernels/mwpb_kernels/*.so kernels/mwpb_kernels/no_native.txt
