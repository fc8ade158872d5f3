# Two commands matter: `make book` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.complete
# Everything the lock pins is installed at once, so that later targets need no network.
EXTRAS ?= dev
PYTEST := $(PY) -m pytest
SITE := book/_build/html
RUNS := $(patsubst notebooks/%,book/notebooks/%,$(wildcard notebooks/*.ipynb))
PACKAGE := $(shell find patching_demo -type f ! -name '*.pyc')
PAGES := $(wildcard book/*.* book/_ext/*.py book/_assets/* benchmark/*.md)

# Jupyter and model caches want a home; builds and tests write into the checkout.
ifneq ($(shell test -w . && echo yes),yes)
$(error $(CURDIR) cannot be written: work in a copy, or change who may write there)
endif
ifneq ($(shell test -n "$$HOME" && test -d "$$HOME" && test -w "$$HOME" && echo yes),yes)
$(error HOME is "$(HOME)", which is not a folder that can be written: set it, as in "HOME=/tmp/home make")
endif
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
unexport PYTHONPATH
unexport PYTHONHOME

# An environment that was made elsewhere (the checkout was moved or copied) is made again.
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

.DEFAULT_GOAL := venv
.PHONY: FORCE help venv sync book test offline unit slow hub browser colab bench picture address \
	lint format lock clean
.NOTPARALLEL:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' \
		| awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

venv: $(STAMP) ## make .venv with the versions in requirements.lock (the default)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; this is " + sys.version)'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "Could not make $(VENV): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check \
		-c requirements.lock -e ".[$(EXTRAS)]"
	@# pip would compile one file after the other. What does not compile is nothing we import.
	@$(PY) -m compileall -q -j 0 "$(CURDIR)/$(VENV)/lib" >/dev/null 2>&1 || true
	@# Kernels warn at each start that they talk to this machine without encryption.
	@mkdir -p $(VENV)/etc/ipython
	@echo 'c.IPKernelApp.log_level = "ERROR"' >$(VENV)/etc/ipython/ipython_kernel_config.py
	@printf '%s\n' "$(CURDIR)" >$@

sync: venv ## write each notebook's .ipynb from its .py, and keep no outputs
	$(PY) -m jupytext --quiet --update --to ipynb notebooks/*.py
	$(VENV)/bin/jupyter nbconvert --log-level WARN --clear-output --inplace notebooks/*.ipynb

# A run is made again when its notebook, the package, the lock or the model has changed. It lies in
# build/ until its last cell, and no site stays that shows an older one.
$(shell mkdir -p build; echo "$$PATCHING_DEMO_MODEL" | cmp -s - build/model || \
	echo "$$PATCHING_DEMO_MODEL" >build/model)
book/notebooks/%.ipynb: notebooks/%.ipynb $(PACKAGE) build/model $(STAMP)
	@rm -rf $(SITE) && mkdir -p build book/notebooks
	$(PY) -m papermill --execution-timeout 3600 --cwd notebooks $< build/$*.ipynb
	@mv build/$*.ipynb $@

# The site starts empty, for a page that left the book must not linger. Every warning is an error.
$(SITE)/index.html: $(RUNS) $(PAGES)
	@rm -rf book/_build $(filter-out $(RUNS),$(wildcard book/notebooks/*))
	$(VENV)/bin/jupyter-book build book -W --keep-going -q || { rm -rf book/_build; exit 1; }

book: $(SITE)/index.html ## run every notebook and build the book; prints where it is
	@echo "$(CURDIR)/$(SITE)/index.html"

# Cheapest first, so that a mistake shows early.
test: unit book ## unit tests, wheel, pairs, every notebook, and the book
	$(PYTEST) tests/test_book.py
	@echo "make test: everything passed"

offline: venv ## test again with the network cut (Linux); the first make test fetches the model
	$(PY) scripts/offline.py $(MAKE) --no-print-directory test

unit: venv ## unit tests, doctests, the wheel, and what of the package they run
	$(PYTEST) -n 2 --dist loadfile --ignore=tests/test_book.py --cov --cov-report=term-missing:skip-covered

slow: venv ## tests that take minutes, a sweep of every architecture among them
	$(PYTEST) -n 2 -m slow --ignore=tests/test_book.py

hub: venv ## tests that need a model hub
	$(PYTEST) -m hub

browser: book ## open the built book and JupyterLab in headless Chromium
	$(PYTEST) -n 2 -m browser --ignore=tests/test_explorer_browser.py
	$(PYTEST) -m browser tests/test_explorer_browser.py

colab: ## run the notebooks with Colab's versions, in an environment of their own
	$(PYTHON) -m venv .venv-colab
	.venv-colab/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements-colab.txt ".[test]"
	.venv-colab/bin/python -m pip uninstall --quiet --yes patching-demo
	.venv-colab/bin/python -m pytest --import-mode=importlib -p no:randomly --noconftest \
		-o addopts="" -o filterwarnings="" -m colab -s tests/test_colab.py
	.venv-colab/bin/python -m pytest -p no:randomly -o addopts="" -m "not slow" tests/test_explorer.py

bench: venv ## time the sweeps, and plan larger ones: writes benchmark/
	$(PY) scripts/how_far.py
	$(PY) scripts/bench.py

picture: book ## redraw the README's picture from the book's headline figure
	$(PY) scripts/picture.py

address: ## set the repository's address everywhere: make address URL=https://github.com/OWNER/NAME
	scripts/address.sh "$(URL)"

lint: venv ## style checks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: venv ## fix what style checks can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: ## resolve the dependencies again and write requirements.lock
	PYTHON=$(PYTHON) scripts/lock.sh

clean: ## remove what was built, but not the environment or downloaded models
	rm -rf book/notebooks book/_build dist build .pytest_cache .ruff_cache
