# The two commands: `make demo` and `make test`. Each does all its own set-up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The pinned cmake and ninja before the system's
export PATH := $(CURDIR)/$(BIN):$(PATH)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)

# What an installed llamita is made of: when one of these changes, it is installed anew.
SOURCES := $(shell find src native -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test test-all test-lowest test-newest test-arm test-clients clients lint types format native-checks mutations clean help

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 18

demo: $(VENV)/.lean  ## the main job on the embedded model, with the lean installation alone
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev   ## the whole default suite, on all cores
	$(BIN)/python -m pytest -q -n auto --dist loadfile --durations=10

test-all: $(VENV)/.dev  ## the slow tests too
	$(BIN)/python -m pytest -q -m "slow or not slow"

test-lowest: VERSIONS = --constraint constraints-lowest.txt
test-lowest:     ## the lean side's tests with the lowest versions that pyproject.toml allows, in .venv-lowest
test-newest:     ## the lean side's tests with the newest versions that there are, in .venv-newest
test-lowest test-newest:
	$(PYTHON) -m venv $(VENV)-$(@:test-%=%)
	$(VENV)-$(@:test-%=%)/bin/python -m pip install --quiet --disable-pip-version-check $(VERSIONS) $(PIP_FLAGS) . pytest pytest-xdist hypothesis safetensors
	$(VENV)-$(@:test-%=%)/bin/python -m pytest -q -n auto --dist loadfile --durations=10

test-arm: $(VENV)/.dev  ## the tests of kernels on Arm's instruction sets, cross-compiled, under qemu
	$(BIN)/python tools/arm.py $(ARM_FLAGS)

test-clients: $(VENV)/.dev clients  ## the tests with LangChain, LiteLLM, Llama Stack and an older openai package, in .venv-clients
	$(BIN)/python -m pytest -q tests/clients

clients: $(VENV)-clients/.made $(VENV)-schemathesis/.made  ## the environments of these tests alone; `make test` uses it if it is there

lint: $(VENV)/.dev   ## ruff and clang-format, without changing anything
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inc')

types: $(VENV)/.dev  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev ## format Python and C++ in place
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inc')

native-checks: $(VENV)/.dev  ## the native tests under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python tools/sanitize.py
	$(BIN)/python tools/sanitize.py --thread

mutations: $(VENV)/.dev      ## break a dozen lines by hand, one at a time, and see the suite fail
	$(BIN)/python tools/mutations.py

clean:           ## remove everything that make built
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-clients $(VENV)-schemathesis build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lean: $(BIN)/python $(SOURCES)
	$(PIP) .
	@touch $@

# Torch first and alone: without a pinned version already there, other packages pull the newest CUDA build.
$(VENV)/.dev: $(BIN)/python $(SOURCES)
	$(PIP) torch
	$(PIP) '.[export,serve,dev]'
	@touch $@ $(VENV)/.lean

$(VENV)-clients/.made: tests/clients/requirements.txt tests/clients/constraints.txt
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/clients/constraints.txt $(PIP_FLAGS) --requirement $<
	@touch $@

$(VENV)-schemathesis/.made: tests/clients/schemathesis.txt
	$(PYTHON) -m venv $(VENV)-schemathesis
	$(VENV)-schemathesis/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --requirement $<
	@touch $@
