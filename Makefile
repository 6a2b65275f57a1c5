# Everything a developer runs. Whatever target comes first builds .venv; nothing else is installed
# by hand. `make PYTHON=python3.12 test` picks the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
NATIVE := src/fanwise/kernel/_native.abi3.so
C_SOURCES := $(wildcard src/fanwise/kernel/*.c src/fanwise/kernel/*.h)

# What the tests need from Debian, as program:package.
DEBIAN = mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs mkfs.ext4:e2fsprogs bindfs:bindfs spin:spin gcc:gcc

.PHONY: help demo test soak lint bench docs promtool clean debian
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | soak | lint | bench | docs | promtool | clean"

demo: $(VENV)/.fanwise
	@$(BIN)/python demo/demo.py

test: $(VENV)/.fanwise $(VENV)/.test debian promtool
	@$(BIN)/python tests/run.py

soak: $(VENV)/.fanwise $(VENV)/.test debian
	@$(BIN)/python -m pytest -m soak --timeout=0 -o faulthandler_timeout=0
	@bash tests/soak/asan.sh

lint: $(VENV)/.fanwise $(VENV)/.test
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

# The peers too, and what the bench itself needs.
bench: DEBIAN += inotifywait:inotify-tools fatrace:fatrace watchman:watchman cc:gcc
bench: $(VENV)/.fanwise $(VENV)/.test debian
	@$(BIN)/python -m bench

docs: $(VENV)/.fanwise $(VENV)/.docs
	@$(BIN)/sphinx-build -W -q docs docs/_build

clean:
	@rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -rf src/*.egg-info $(NATIVE)
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each is made again when what it was made from changes.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fanwise needs Python 3.11 or newer: make PYTHON=...")'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.%: requirements/%.txt $(VENV)/.python
	@echo "installing $<"
	@$(PIP) --require-hashes -r $<
	@touch $@

# The old object goes first: a changed C source that no longer compiles must not leave it behind.
$(VENV)/.fanwise: pyproject.toml $(C_SOURCES) $(VENV)/.build $(VENV)/.run
	@echo "installing fanwise"
	@rm -f $(NATIVE)
	@$(PIP) --no-deps --no-build-isolation -e .
	@test -e $(NATIVE) || echo "note: the native part was not built (no C compiler, or it failed); pure Python is used" >&2
	@touch $@

# Keeps make from deleting the stamps that the pattern rule makes on the way.
.SECONDARY:

# promtool checks the metrics, the alert rules and the dashboard. It is unpacked, not installed.
PROMTOOL := $(VENV)/promtool/usr/bin/promtool
promtool:
	@[ -x $(PROMTOOL) ] || { mkdir -p $(VENV)/promtool && cd $(VENV)/promtool && \
	  { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; } \
	  >/dev/null 2>&1 && dpkg -x prometheus_*.deb . && rm -f prometheus_*.deb; } || \
	echo "note: no promtool: what it checks is not tested" >&2

debian:
	@export PATH="$$PATH:/usr/sbin:/sbin"; missing=; \
	for pair in $(DEBIAN); do command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair#*:}"; done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "note: some things cannot run before you install:$$missing" >&2; exit 0; \
	fi; \
	echo "installing with apt-get:$$missing"; \
	export DEBIAN_FRONTEND=noninteractive; \
	install="apt-get install -y -qq --no-install-recommends $$missing"; \
	$$install >/dev/null 2>&1 || { apt-get update -qq && $$install >/dev/null; }
