# make demo: the whole pipeline on the small model, with a table and a contact sheet.
# make paper-tiny: every table and figure of the paper on it, within an hour.
# make test: everything that must hold. All set up .venv by themselves; PYTHON picks the interpreter.
PYTHON ?= python3
SERIES := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
RUN := .venv/bin/python
INSTALLED := .venv/.installed-$(SERIES)
INSTALLED_DEV := .venv/.installed-dev-$(SERIES)
export TOKENIZERS_PARALLELISM = false

.PHONY: demo paper-tiny test lint
demo: $(INSTALLED)
	sh runs/demo.sh $(RUN)

paper-tiny: $(INSTALLED)
	sh runs/tiny.sh $(RUN)

# Two processes of one thread are faster here than one process of two.
test: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED_DEV)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy utils
	.venv/bin/hadolint Dockerfile

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt requirements-app.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
