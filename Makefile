# What can be run in a clone, one target each. `make test` makes the environment .venv that the others use.
PYTHON = .venv/bin/python
PROCESSES = 2

.PHONY: help docs test test-all test-slow test-wheel test-distributed test-interruption kills test-recipes test-lowest fuzz benchmarks
.PHONY: results dist lint

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

AREA =

test: ## all tests but the slow ones, by the README's own command; AREA=masking: those of one folder
	@if [ -n "$(AREA)" ]; then $(PYTHON) -m pytest -n $(PROCESSES) tests/$(AREA); else $(MAKE) test-all; fi

test-all:
	bash -euo pipefail -c "$$(sed -n '/<!-- test -->/,/^```$$/p' README.md | sed -e '1,2d' -e '$$d')"

test-slow: ## the slow tests
	$(PYTHON) -m pytest -m slow -n $(PROCESSES)

test-wheel: ## the wheel, installed alone in a fresh environment, prunes an image folder
	$(PYTHON) -m pytest -m "slow or not slow" tests/test_packaging.py

test-distributed: ## tests that launch several processes, slow ones too
	$(PYTHON) -m pytest -m "slow or not slow" tests/training/test_distributed.py

test-interruption: ## runs that are killed and resumed, slow ones too
	$(PYTHON) -m pytest -m "slow or not slow" tests/training/test_interruption.py tests/training/test_faults.py

kills: ## 100 runs killed at random moments, 20 stopped by signals to their groups, and every kill point of a save
	PYTHONPATH=tests $(PYTHON) tests/helpers/kill_runs.py
	$(PYTHON) -m pytest -m "slow or not slow" tests/test_saved_folder.py

test-recipes: ## the notebook, and the app in a headless Chromium; needs `pip install -e ".[test-recipes]"` and Chromium
	$(PYTHON) -m pytest -m "slow or not slow" tests/recipes

test-lowest: ## all tests but the slow ones, with the lowest version of every direct dependency; needs uv
	uv venv --clear --python 3.11 .venv-lowest
	uv pip install --python .venv-lowest --torch-backend cpu --resolution lowest-direct -e ".[test]"
	.venv-lowest/bin/python -m pytest -n $(PROCESSES)

fuzz: ## damaged packed files, 100,000 of them, and 10,000 damaged folders
	$(PYTHON) -m pytest -m slow tests/storage

benchmarks: ## every benchmark, one after the other
	for file in $$(grep -l __main__ benchmarks/*.py); do $(PYTHON) $$file || exit 1; done

docs: ## the documentation, in site/; needs `pip install -e ".[docs]"`
	$(PYTHON) -m mkdocs build --strict

results: ## tables and picture of the README, and model_cards/results.csv, from results that are committed
	$(PYTHON) model_cards/make_results.py
	$(PYTHON) recipes/comparison/make_readme.py

dist: ## wheel and sdist, in dist/; needs `pip install build twine`
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*

lint: ## style and types; needs `pip install -e ".[quality]"`
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
