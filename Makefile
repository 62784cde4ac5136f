# Bare `make` lists the targets; anything longer than a line is in .ci/ or a tool's own file.
.DEFAULT_GOAL := help
.PHONY: help setup setup-tests demo test check lint test-fast test-python test-bounds bench bench-full bench-quick bench-tcp bench-uplink bench-takeover bench-isolation bench-load soak format clean

BIN := .venv/bin
# Two at a time, a file as a whole: most of a test is waiting, and a file shares a switch.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
UNIT := tests/control tests/datapath tests/ports tests/test_architecture.py

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

setup: .stamps/demo ## make .venv; as root also install missing Debian packages

setup-tests: .stamps/tests ## the same, with what only the tests need

.stamps/%: pyproject.toml .ci/setup.sh
	@.ci/setup.sh $* && mkdir -p $(@D) && touch $@

demo: setup ## two real guests talk through the switch, then throughput
	@$(BIN)/vswitch demo

test: setup-tests ## run every test; with CI=true a skipped test is a failure
	@$(BIN)/python -m pytest $(PARALLEL)

check: lint test ## what CI runs: format, lint, types, spelling, tests

lint: setup-tests
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/codespell

test-fast: setup-tests ## run the tests that need no processes
	@$(BIN)/python -m pytest $(UNIT)

test-python: setup-tests ## run the unit tests with Numba switched off
	@NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest $(UNIT)

test-bounds: setup-tests ## run the unit tests with every array index checked
	@NUMBA_BOUNDSCHECK=1 $(BIN)/python -m pytest $(UNIT)

bench: setup-tests ## measure this switch beside its peers, those that are installed
	@$(BIN)/python -m bench

bench-full: setup-tests ## the same with all cases and more slices
	@$(BIN)/python -m bench --full

bench-quick: setup-tests ## tell whether this switch has become slower (bench/baseline.json)
	@$(BIN)/python -m bench.baseline

bench-tcp: setup-tests ## measure TCP between real guests, with and without offloads
	@$(BIN)/python -m bench.tcp

bench-uplink: setup-tests ## measure taps and interfaces beside the kernel's bridge and OVS
	@$(BIN)/python -m bench.uplink

bench-takeover: setup-tests ## measure how long frames stop when a worker is killed
	@$(BIN)/python -m bench.takeover

bench-isolation: setup-tests ## measure what a misbehaving neighbour costs a pair of guests
	@$(BIN)/python -m bench.isolation

bench-load: setup-tests ## measure what 126 idle guests cost two streams
	@$(BIN)/python -m bench.load

soak: setup-tests ## try what can go wrong at random for MINUTES (10), from SEED, or one PART of it
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(addprefix --seed ,$(SEED)) $(addprefix --part ,$(PART))

format: setup-tests ## rewrite the sources as ruff likes them
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## remove what was made here; caches in the home directory stay
	@rm -rf .venv .stamps .mypy_cache .ruff_cache .pytest_cache .hypothesis bench-report dist build
