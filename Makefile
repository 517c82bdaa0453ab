# Every target is one command a person would type; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check format test-gpu bench-gpu bench-cpu bench-data bench-checkpoint bench-plan chaos doctor clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create the virtual environment and install everything
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV): torch, transformers and what they need; some minutes where nothing is cached"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## train a small Llama on embedded text with 2 ranks, show its curve and let it write
	@rm -rf $(DEMO_DIR)
	$(BIN)/hypershard train --model tiny_llama --nproc_per_node 2 --max_steps 120 --checkpoint_freq 60 --validation_freq 60 --run_dir $(DEMO_DIR)
	@echo
	$(BIN)/hypershard report $(DEMO_DIR)
	@echo
	$(BIN)/hypershard generate $(DEMO_DIR) --prompt "The value of the expression"

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest

check: $(INSTALLED) ## lint, format, types, and the rules of the layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

format: $(INSTALLED) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The GPU targets use the python3 at hand: a cluster's own torch, not the environment above.
test-gpu: ## numerics on one GPU: NCCL, bf16
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests

bench-gpu: ## speed and memory of 1B, 3B and 8B shapes on one GPU; OUTPUT=dir for the JSON files
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_train.py $(if $(OUTPUT),--output $(OUTPUT))

bench-cpu: $(INSTALLED) ## a small Llama on 2 ranks against Hugging Face Trainer with FSDP2
	$(BIN)/python benchmarks/cpu_train.py

bench-fine-tune: ## LoRA and QLoRA on one GPU (or a small model on a CPU) against Hugging Face Trainer with PEFT, taking turns
	PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/fine_tune.py $(if $(OUTPUT),--output $(OUTPUT))

bench-data: $(INSTALLED) ## prepare and loaders against Hugging Face datasets and torch's DataLoader
	$(BIN)/python benchmarks/data.py $(if $(OUTPUT),--output $(OUTPUT))

bench-checkpoint: $(INSTALLED) ## stall, bandwidth and restore time of every tier against plain copies, torch's and AWS's writers
	$(BIN)/python benchmarks/checkpoint.py $(if $(OUTPUT),--output $(OUTPUT))

bench-plan: $(INSTALLED) ## plan runs, run them, and print predicted against measured time and memory; on a GPU 1B and 3B
	$(BIN)/python benchmarks/plan.py $(if $(OUTPUT),--output $(OUTPUT))

chaos: $(INSTALLED) ## break a training 200 times (FAULTS=n) on two nodes of namespaces (root; some 20 minutes); SEED=n replays
	$(BIN)/python -m tests.faults.chaos --faults $(or $(FAULTS),200) $(if $(SEED),--seed $(SEED))

# On clusters. A login node needs no torch: without an installed environment the python3 at hand runs the source.
HYPERSHARD ?= $(if $(wildcard $(BIN)/hypershard),$(BIN)/hypershard,PYTHONPATH=src $(PYTHON) -m hypershard.cli.main)
LAUNCH ?= $(if $(shell command -v sbatch 2>/dev/null),slurm)

%-train: ## p5-train, g6e-train, ...: MODEL=name or RECIPE=name, NODES=n; DRY_RUN=1 prints it; LAUNCH=sagemaker; FLAGS="of training"
	@test -n '$(MODEL)$(RECIPE)' || { echo 'make $@: set MODEL, as in: make $@ MODEL=llama3_8b NODES=4; or RECIPE, a file of recipes/' >&2; exit 2; }
	@test -n '$(LAUNCH)' || { echo 'make $@: no sbatch here; set LAUNCH=sagemaker or kubernetes (or slurm, with DRY_RUN=1)' >&2; exit 2; }
	@$(HYPERSHARD) launch $(LAUNCH) $(if $(MODEL),--model '$(MODEL)') $(if $(RECIPE),--config 'recipes/$(RECIPE:.yaml=).yaml') --instance '$*' $(if $(NODES),--nodes '$(NODES)') $(if $(filter-out 0,$(DRY_RUN)),--dry_run) $(FLAGS)

doctor: ## what this machine or cluster is, what is missing, and how to mend it
	@$(HYPERSHARD) doctor

clean: ## remove the environment and caches, keep runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
