# Two commands do everything: `make demo` and `make test`. Each makes .venv first, from requirements.lock.

PYTHON ?= $(shell command -v /usr/bin/python3 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test lint bench interop guests clean help

help:
	@echo "make demo      a live migration between two processes"
	@echo "make test      the tests"
	@echo "make lint      ruff, mypy, import-linter"
	@echo "make bench     the benchmarks"
	@echo "make interop   with Debian's QEMU (apt install qemu-system-x86)"
	@echo "make guests    assemble the guests again, and compare with the committed images"

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed ($(PYTHON) is not)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv is not whole: apt install python3-venv"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)
	$(RUN) -m pyvcpu demo

test: $(READY)
	$(RUN) -m pytest -n $(WORKERS) -m "not interop" tests

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(READY)
	$(RUN) -m benchmarks

interop: $(READY)
	$(RUN) -m pytest -m interop tests

guests: $(READY)
	$(RUN) guests/build.py --check

clean:
	rm -rf $(VENV) build *.egg-info .benchmarks .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
