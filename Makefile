# The commands that everybody needs. `make` lists them; .ci/run calls the same ones.
#
#   make test TESTS="tests/fork/test_fork.py -k group"    one part of the suite
#   make test PYTHON=python3.13                      by a Python that has the packages already; no .venv is made then
#   make c CC=aarch64-linux-gnu-gcc                  by another C compiler

VENV := .venv
PYTHON = $(VENV)/bin/python
TESTS =
DIST := dist
OBJECTS = build/warnings/$(CC)

# Whoever names a Python has prepared it.
ifeq ($(origin PYTHON),file)
environment := $(VENV)/ready
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build test full lint format types c c-binding c-others sanitize wheel bench ci clean

help: ## list these commands
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

build: $(environment) src/aiopidfd/_ext.abi3.so ## make .venv and compile the extension in place, if they are not up to date

test: build ## run the suite as everybody runs it
	$(PYTHON) -m pytest $(TESTS)

full: build ## run each test on every loop and backend
	$(PYTHON) -m pytest --full $(TESTS)

lint: $(environment) ## look for mistakes and for bad form in Python
	$(PYTHON) -m ruff check --output-format=concise .
	$(PYTHON) -m ruff format --check .

format: $(environment) ## mend what lint can mend
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: $(environment) ## check the types
	$(PYTHON) -m mypy

c: c-binding c-others ## compile all C; a warning is an error

sanitize: ## run the tests of the binding under AddressSanitizer and UBSan
	tests/sanitize $(TESTS)

wheel: $(environment) ## build the sdist, build the wheel from it, and check both
	rm -f $(DIST)/aiopidfd-*
	$(PYTHON) -m build --outdir $(DIST)
	$(PYTHON) -m abi3audit --strict --verbose $(DIST)/aiopidfd-*.whl
	$(PYTHON) -m twine check --strict $(DIST)/aiopidfd-*
	$(PYTHON) -m check_wheel_contents $(DIST)/aiopidfd-*.whl

bench: build ## measure for three minutes
	$(PYTHON) -m bench --quick

ci: ## make all checks, in a clone: an hour
	.ci/run

clean: ## remove what was built, but not .venv
	rm -rf build $(DIST) src/aiopidfd/*.so src/*.egg-info

# The tests run the code of this tree, whichever copy was installed last.
build test full bench: export PYTHONPATH = $(CURDIR)/src

$(VENV)/ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

src/aiopidfd/_ext.abi3.so: $(wildcard cffi_build/*) pyproject.toml
	$(PYTHON) -c 'from setuptools import setup; setup()' -q egg_info build_ext --inplace --force

# What goes into the wheel, and what only tests and benchmarks compile. Without -O2, gcc misses variables that are not
# initialised. Warnings about Python's own headers are not ours to mend; the sizes in them are those of every 64-bit Linux.
# -fanalyzer is for the binding alone: gcc 12 takes CMSG_FIRSTHDR for NULL after it was compared with NULL.
python_headers = $(shell python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
warnings := -std=gnu11 -O2 -Wall -Wextra -Wconversion -Wshadow -Werror
binding := $(wildcard cffi_build/*.c)
others := $(wildcard tests/*.c tests/*/*.c bench/*.c)

c-binding: $(binding:%.c=$(OBJECTS)/%.o)
c-others: $(others:%.c=$(OBJECTS)/%.o)
c-binding c-others:
	@echo "$(CC) $$($(CC) -dumpfullversion), $(@:c-%=%): $(words $^) files clean"

$(OBJECTS)/cffi_build/%.o: warnings += -fanalyzer
$(OBJECTS)/%.o: %.c $(wildcard cffi_build/*.h)
	@mkdir -p $(@D)
	$(CC) $(warnings) -DPy_LIMITED_API=0x03090000 -isystem $(python_headers) -iquote cffi_build -c -o $@ $<
