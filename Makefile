# Two commands matter: `make book` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.complete
# Everything the lock pins is installed at once, so that later targets need no network.
EXTRAS ?= dev
PYTEST := $(PY) -m pytest
NBMAKE_TIMEOUT ?= 1800

# A checkout that cannot be written is worked on in a copy, which is kept for the next time. What
# lacks the permission to be written gets it there.
WRITABLE := $(shell test -w . && echo yes)
ifneq ($(WRITABLE),yes)
  COPY := $(or $(TMPDIR),/tmp)/patching_demo-checkout-$(shell id -u)
  GOALS := $(or $(MAKECMDGOALS),venv)
  .PHONY: $(GOALS)
$(GOALS):
	@echo "$(CURDIR) cannot be written: working in $(COPY)"
	@mkdir -p -m 700 "$(COPY)" && test -O "$(COPY)"
	@find "$(COPY)" -mindepth 1 -maxdepth 1 ! -name .venv ! -name .home ! -name book -exec rm -rf {} +
	@tar -cf - --exclude=./.venv --exclude=./.git . | tar -xf - -C "$(COPY)"
	@find "$(COPY)" -name .venv -prune -o ! -type l -exec chmod u+w {} +
	@$(MAKE) -C "$(COPY)" WRITABLE=yes $@
else

# Jupyter, matplotlib and model caches want a home they can write to; lend them one if there is none.
ifneq ($(shell test -n "$$HOME" && test -d "$$HOME" && test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.home
$(shell mkdir -p .home)
endif
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
unexport PYTHONPATH
unexport PYTHONHOME

# An environment that was made elsewhere (the checkout was moved or copied) is made again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): moved
endif

.DEFAULT_GOAL := venv
.PHONY: help venv moved sync book test offline unit pairs notebooks slow hub browser colab bench \
	picture lint format lock clean
.NOTPARALLEL:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' \
		| awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

venv: $(STAMP) ## make .venv with the versions in requirements.lock (the default)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; this is " + sys.version)'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "Could not make $(VENV): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[$(EXTRAS)]"
	@printf '%s\n' "$(CURDIR)" > $@

moved: ;

sync: venv ## write each notebook's .ipynb from its .py
	$(PY) scripts/sync_notebooks.py

book: venv ## run every notebook and build the book; prints where it is
	$(PY) scripts/build_book.py

# Cheapest first, so that a mistake shows early.
test: pairs unit notebooks ## unit tests, wheel, pairs, every notebook, and the book
	$(PY) scripts/build_book.py
	$(PYTEST) tests/test_book.py
	@echo "make test: everything passed"

offline: venv ## test again with the network cut (Linux); the first make test fetches the model
	$(PY) scripts/offline.py $(MAKE) --no-print-directory test

unit: venv ## unit tests, doctests, the wheel, and what of the package they run
	$(PYTEST) --ignore=tests/test_book.py --cov --cov-report=term-missing:skip-covered

pairs: venv ## check that notebooks agree with their .py pairs and carry no outputs
	$(PY) scripts/sync_notebooks.py --check

notebooks: venv ## run every notebook from top to bottom, in a fresh kernel each
	$(PYTEST) -p no:randomly -o addopts="" --nbmake --nbmake-timeout=$(NBMAKE_TIMEOUT) \
		--durations=0 notebooks

slow: venv ## tests that take minutes on the offline language model
	$(PYTEST) -m slow --ignore=tests/test_book.py

hub: venv ## tests that need a model hub
	$(PYTEST) -m hub

browser: venv ## open the built book and JupyterLab in headless Chromium
	$(PYTEST) -m browser

colab: ## run the notebooks with Colab's versions, in an environment of their own
	$(PYTHON) -m venv .venv-colab
	.venv-colab/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements-colab.txt ".[test]"
	.venv-colab/bin/python -m pip uninstall --quiet --yes patching-demo
	.venv-colab/bin/python -m pytest --import-mode=importlib -p no:randomly --noconftest \
		-o addopts="" -o filterwarnings="" -m colab -s tests/test_colab.py
	.venv-colab/bin/python -m pytest -p no:randomly -o addopts="" -m "not slow" tests/test_explorer.py

bench: venv ## time the sweeps and write benchmark/results.json
	$(PY) scripts/bench.py

picture: book ## redraw the README's picture from the book's headline figure
	$(PY) scripts/picture.py

lint: venv ## style checks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: venv ## fix what style checks can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: ## resolve the dependencies again and write requirements.lock
	PYTHON=$(PYTHON) scripts/lock.sh

clean: ## remove what was built, but not the environment or downloaded models
	rm -rf book/notebooks book/generated book/_build dist build .pytest_cache .ruff_cache

endif
