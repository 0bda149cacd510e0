# One word per job. README, CI and pre-commit call these and nothing else; `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
SOURCES := $(shell find src -name '*.rs') build.rs Cargo.toml Cargo.lock pyproject.toml
CHECKED := python tests/python benchmarks

# As many tests at once as there are cores, each with one thread unless it asks for more. torch's idle workers spin by
# default, which slows everything on a machine with few cores.
TESTS_AT_ONCE ?= auto
PYTEST = OMP_WAIT_POLICY=PASSIVE $(1)/bin/python -m pytest --numprocesses $(TESTS_AT_ONCE) --dist worksteal

.PHONY: help demo test test-rust test-python test-oldest-torch lint lint-rust lint-python format wheel bench bench-models bench-wavelets clean
.DELETE_ON_ERROR:

help: ## List the jobs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(STAMPS)/module ## Train a small encoder twice, with torch's attention and with ours (about 3 minutes)
	$(BIN)/python -m benchmarks.demo

test: lint test-rust test-python ## Everything that must hold

test-rust: ## Tests of the Rust crate, at every instruction set of this machine
	cargo test --locked

test-python: $(STAMPS)/module ## Tests of the Python package
	$(call PYTEST,$(VENV))

# What test_wheel and test_public_api say of the installed package needs it installed there too, hence its own build.
test-oldest-torch: $(STAMPS)/environment ## Tests of the Python package with the oldest torch that is supported
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --upgrade "pip>=25.1"
	.venv-oldest/bin/python -m pip install "torch==2.5.*" numpy --group test --group demo
	VIRTUAL_ENV=$(abspath .venv-oldest) $(BIN)/maturin develop --release --locked --extras analysis
	$(call PYTEST,.venv-oldest)

# One after the other: what is timed wants the machine for itself.
bench: $(STAMPS)/module ## Check, time and record: speed, long sequences, quality (about 25 minutes; 10 more with Gemma)
	$(BIN)/python -m benchmarks.speed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.long
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.quality

bench-models: $(STAMPS)/module ## What a budget costs two pretrained models, and saves in time (about 15 minutes)
	$(BIN)/python -m pip install --group models
	$(BIN)/python -m benchmarks.models

bench-wavelets: $(STAMPS)/module ## What the heads of two pretrained models have of wavelets (about 15 minutes)
	$(BIN)/python -m pip install --group models
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.wavelets

lint: lint-rust lint-python ## Formatting, lints, types; the stub against the module

# With abi3 no Python is needed to compile the bindings, so this need not wait for the environment.
lint-rust:
	cargo fmt --all --check
	cargo clippy --locked --all-targets -- -D warnings
	PYO3_NO_PYTHON=1 PYO3_BUILD_EXTENSION_MODULE=1 cargo clippy --locked --all-targets --features python,abi3 -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet

lint-python: $(STAMPS)/module
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/pyright
	$(BIN)/python -m mypy.stubtest mra_attention._core

format: $(STAMPS)/environment ## Format everything
	cargo fmt --all
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

wheel: $(STAMPS)/environment ## Build the wheel into dist/
	$(BIN)/maturin build --release --locked --out dist

clean: ## Remove everything that was made here
	rm -rf target build dist $(VENV) .venv-oldest .hypothesis .pytest_cache .ruff_cache .mypy_cache python/mra_attention/_core*.so

# The environment: torch is most of it (a download of gigabytes, minutes).
$(STAMPS)/environment: pyproject.toml
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust 1.89 or later (https://rustup.rs)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the tools into $(VENV): minutes, the first time"
	$(BIN)/python -m pip install --upgrade "pip>=25.1"
	$(BIN)/python -m pip install "torch>=2.5" numpy --group dev
	@mkdir -p $(@D) && touch $@

# The native module, built in place: the package is imported from python/.
$(STAMPS)/module: $(STAMPS)/environment $(SOURCES)
	@echo "Building the native module: about two minutes, the first time"
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --locked --extras analysis
	@touch $@
