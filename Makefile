# Everything runs in .venv, made here from the versions in constraints.txt: `demo` installs what the package needs, the other
# targets also what its makers need. Nothing is installed twice; a change of constraints.txt, settings.ini or setup.py updates it.
# `demo` may be run again: outputs/demo is its own folder, where the same caption and seed give the same files.
PYTHON  ?= python3
TORCH   ?= torch
CAPTION ?= a frog moves to the right quickly on a blue background
SEED    ?= 0
WORKERS ?= 2
BIN     := .venv/bin
export CAPTION
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test soak lab docs readme sync

help:
	@echo 'make demo     write a video and a contact sheet from the shipped model, and print where'
	@echo 'make test     check the repository, run every notebook, run the tests (15 minutes on two cores)'
	@echo 'make soak     kill a training fifty times and compare what is left (ten minutes)'
	@echo 'make lab      open the notebooks in JupyterLab'
	@echo 'make docs     build the site into site/ from the notebooks as they are stored (two minutes)'
	@echo 'make readme   make README.md from index.ipynb'
	@echo 'make sync     after editing: export the notebooks to snapvideo_nb/, clean them, make README.md'
	@echo
	@echo 'Variables: CAPTION, SEED (of demo); PYTHON, the interpreter .venv is made with; WORKERS, notebooks tested at a time;'
	@echo 'TORCH, what pip installs as torch, options included, for a build of your choice:'
	@echo '  make demo CAPTION="a whale comes closer" SEED=3 TORCH="torch --index-url ADDRESS"'

.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed: set PYTHON=...' >&2; exit 1; }
	@echo 'Installing torch into .venv ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@touch $@

.venv/runtime: .venv/torch settings.ini setup.py
	@echo 'Installing snapvideo-nb into .venv ...'
	@$(PIP) --editable .
	@touch $@

.venv/development: .venv/runtime
	@echo 'Installing what tests and notebooks need into .venv ...'
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: .venv/runtime
	@$(BIN)/snapvideo sample "$$CAPTION" --seeds $(SEED) --format mp4 png --out outputs/demo --force

# One thread per notebook: WORKERS of them run side by side.
test: .venv/development
	$(BIN)/python -m pytest tests/test_repository.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path . --n_workers $(WORKERS) --timing
	$(BIN)/python -m pytest --ignore tests/test_repository.py --durations 10

soak: .venv/development
	KILLS=50 $(BIN)/python -m pytest tests/test_runs.py -k killed_at_any_moment --durations 3

lab: .venv/development
	$(BIN)/jupyter lab index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

docs: .venv/development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'site/index.html is ready. Its search needs a server: $(BIN)/python -m http.server --directory site'

readme: .venv/development
	$(BIN)/python tests/readme.py

sync: .venv/development
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean --fname .
	$(BIN)/python tests/readme.py
