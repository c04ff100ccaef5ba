.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rdma test-all check lint format bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and the models of the tests, or whatever of them is missing
	@scripts/setup.sh

demo: setup ## serve a model with kvrdma (BASELINE=1: without it)
	@exec .venv/bin/python examples/demo.py $(if $(filter 1,$(BASELINE)),--baseline)

test: setup ## run lint and all tiers of tests
	@exec scripts/test.sh

test-rdma: setup ## run the tests that need RDMA devices, in a guest that has some (ARGS="-k name")
	@exec scripts/rdma/test.sh $(ARGS)

test-all: setup ## test with long matrices and a hundred times the fuzzing, then the demo
	@scripts/test.sh --thorough
	@$(MAKE) --no-print-directory demo

check: setup ## lint and the unit tests: what to run before a commit
	@scripts/format.sh --check
	@exec .venv/bin/pytest tests/unit -q

lint: setup ## check style, types and imports
	@exec scripts/format.sh --check

format: setup ## repair style, then check types and imports
	@exec scripts/format.sh

bench: setup ## measure the transports on this machine
	@exec .venv/bin/kvrdma bench transport

clean: ## remove caches and built packages; .venv and .models stay
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . \( -name .venv -o -name .models -o -name .git \) -prune -o -name __pycache__ -exec rm -rf {} +
