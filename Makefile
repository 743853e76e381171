# Two commands: `make demo` and `make test`. Everything that they make stays in this checkout: .venv, .cache, runs.
#
#   make setup       .venv with the versions of constraints.txt; PYTHON=python3.12 chooses an interpreter (3.11 or later)
#   make demo        pretrains ELMo, GPT and BERT small on the embedded corpus and names the page that compares them
#   make test        lint and all tests but the slow ones; make test-full runs the slow ones too; ARGS='-k masked' chooses
#   make test-bucket runs, sweeps and reports in a bucket, whose server is a stand-in (.venv-bucket)
#   make test-slurm  a sweep on a real Slurm, which it installs (Debian, Ubuntu; as root) and runs on this machine
#   make test-browser   the report's pages in a real browser, which it installs (.venv-browser; Debian, Ubuntu; as root)
#   make bench       a training step of each model, and embedding texts, beside the same mathematics in PyTorch
#   make bench-scaling   a step of 1, 2, 4 and 8 devices and processes, the work of each the same
#   make test-plan   the papers' models planned by the TPU's compiler (.venv-plan; minutes each)
#   make parity      the same weights in Transformers and here, both ways (.venv-peers)
#   make lint        ruff; make format mends what it can
#   make clean       removes caches; make distclean the environments too; neither touches runs

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-bucket test-slurm test-browser test-plan bench bench-scaling parity
.PHONY: lint format clean distclean
.SUFFIXES:

# An environment that is there keeps its Python until PYTHON asks for another.
PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || echo python3)
ARGS ?=
DEMO ?= runs/demo
# A test often waits for a process that it started: three at a time fill two cores.
JOBS ?= 3
SUITES := ngrams,samples,pseudo_words

export PLM_CACHE ?= $(CURDIR)/.cache/plm
export PIP_DISABLE_PIP_VERSION_CHECK := 1

comma := ,
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
RUN := .venv/bin/python -m
# Python's -c programs are given on one line: make has no other quoting that every shell reads alike.
SAME_VERSION = -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")'
SUPPORTED = -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON=$(PYTHON) is Python $(VERSION): plm needs 3.11 or later")'

help:
	@sed -n 's/^#   //p' Makefile

# $(call environment,FOLDER,EXTRAS): a virtual environment with this checkout and the pinned versions of what it needs.
# The build backend is pinned and installed too, so nothing is fetched that constraints.txt does not name; setuptools-scm
# is part of seqeval's, which has no wheel.
define environment
	@$(PYTHON) $(SUPPORTED)
	@$(1)/bin/python $(SAME_VERSION) 2>/dev/null || $(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --constraint constraints.txt setuptools setuptools-scm
	$(1)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(2)]'
	@touch $@
endef

setup: .venv/.installed-$(VERSION)

.venv/.installed-$(VERSION): pyproject.toml constraints.txt
	$(call environment,.venv,test$(comma)static)

.venv-peers/.installed-$(VERSION): pyproject.toml constraints.txt
	$(call environment,.venv-peers,peers)

.venv-plan/.installed-$(VERSION): pyproject.toml constraints.txt
	$(call environment,.venv-plan,test$(comma)plan)

.venv-bucket/.installed-$(VERSION): pyproject.toml constraints.txt
	$(call environment,.venv-bucket,test$(comma)bucket)

.venv-browser/.installed-$(VERSION): pyproject.toml constraints.txt
	$(call environment,.venv-browser,test$(comma)browser)

# Typed again, every part finds its work done.
demo: setup
	$(RUN) launch.sweep --config=experiments/compare.py:tiny --backend=local --root=$(DEMO)
	@for run in $(DEMO)/*/config.json; do \
		$(RUN) plm.evaluate --model=$$(dirname $$run) --suite=$(SUITES) || exit $$?; \
	done
	$(RUN) plm.report $(DEMO) --output=$(DEMO)/report.html
	@echo "The page that compares the three models: $(CURDIR)/$(DEMO)/report.html"

test: lint
	$(RUN) pytest -n $(JOBS) -m 'not slow' $(ARGS)

test-full: lint
	$(RUN) pytest -n $(JOBS) $(ARGS)

test-bucket: .venv-bucket/.installed-$(VERSION)
	.venv-bucket/bin/python -m pytest -n 0 tests/test_bucket.py $(ARGS)

# The daemons have their own key, ports and folders, and end with the tests.
test-slurm: setup
	@command -v slurmctld munged > /dev/null || { apt-get update --quiet && \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge; }
	PLM_TEST_SLURM=1 $(RUN) pytest -n 0 tests/test_slurm.py $(ARGS)

# Playwright drives the system's browser and downloads none.
test-browser: .venv-browser/.installed-$(VERSION)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { apt-get update --quiet && \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; }
	PLM_TEST_BROWSER=1 .venv-browser/bin/python -m pytest -n 0 tests/test_browser.py $(ARGS)

bench: .venv-peers/.installed-$(VERSION)
	.venv-peers/bin/python -m tests.benchmarks.bench --output=runs/bench $(ARGS)

bench-scaling: setup
	$(RUN) tests.benchmarks.scaling --output=runs/bench $(ARGS)

test-plan: .venv-plan/.installed-$(VERSION)
	.venv-plan/bin/python -m pytest tests/test_golden_plans.py $(ARGS)

parity: .venv-peers/.installed-$(VERSION)
	.venv-peers/bin/python -m pytest tests/parity $(ARGS)

lint: setup
	$(RUN) ruff check
	$(RUN) ruff format --check

format: setup
	$(RUN) ruff check --fix
	$(RUN) ruff format

clean:
	rm -rf .cache .pytest_cache .ruff_cache

distclean: clean
	rm -rf .venv .venv-peers .venv-plan .venv-bucket .venv-browser plm.egg-info
