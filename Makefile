# Two commands for a fresh machine:
#   make demo    own virtual environment, install, run the op forward and backward, two tables
#   make test    the same set-up, every test that can run there
#
#   make gpu-test   the tests that need a GPU; fails where there is none
#   make memcheck   those of the kernels, but for slow ones, under compute-sanitizer: no access outside a tensor
#   make coverage   tests with line coverage of gdn2_ext, at least 95%
#   make develop    editable install; run it again after a change in csrc: only what changed is compiled
#   make lint       ruff and clang-format, checking only; `make format` rewrites
#   make wheel      dist/*.whl, built in isolation as a user's pip does it
#   make clean      removes the virtual environment and everything built
#
#   PYTHON=python3.12 make demo      another interpreter (with another VENV, or after make clean)
#   GDN2_CUDA=OFF make demo          no kernels though nvcc is there
#   PYTEST_ARGS='-k varlen' make test

PYTHON ?= python3
VENV ?= .venv
# Kept between installs, one folder for each Python and nvcc, so that a reinstall compiles only what changed.
BUILD_DIR ?= build/{wheel_tag}-cuda$(NVCC_RELEASE)
TEST_JOBS ?= 2
GPU_TEST_JOBS ?= 4
TEST_TIMEOUT ?= 600
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c constraints.txt
export GDN2_CUTLASS_DIR ?= $(abspath $(VENV))/cutlass/cutlass_library/source

# ---- with kernels or without -------------------------------------------------------------------------------

# CMakeLists.txt looks for nvcc in the same places and has the last word on its version; this only spares a
# machine without a usable nvcc the error. GDN2_CUDA=ON asks for the error.
NVCC := $(or $(CUDACXX),$(shell PATH="$$PATH:$(CUDA_HOME)/bin:$(CUDA_PATH)/bin" command -v nvcc 2>/dev/null))
ifneq ($(NVCC),)
NVCC_RELEASE := $(shell $(NVCC) --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
endif
NVCC_FITS := $(shell printf '12.4\n%s\n' '$(NVCC_RELEASE)' | sort -V | head -n 1 | grep -qx 12.4 && echo yes)

ifeq ($(GDN2_CUDA),)
ifeq ($(NVCC_FITS),yes)
GDN2_CUDA := ON
WHY := with kernels for sm_90a, by $(NVCC) of CUDA $(NVCC_RELEASE)
else ifeq ($(NVCC),)
GDN2_CUDA := OFF
WHY := without kernels (GDN2_CUDA=OFF): no nvcc on PATH: torch backend only
else
GDN2_CUDA := OFF
WHY := without kernels (GDN2_CUDA=OFF): $(NVCC) is no nvcc of CUDA 12.4 or newer: torch backend only
endif
else
WHY := with GDN2_CUDA=$(GDN2_CUDA), as asked for
endif
export GDN2_CUDA

# ---- set-up ------------------------------------------------------------------------------------------------

# Stamps lie in the virtual environment: whoever removes it removes them. Folders are among the sources, for
# their times tell of removed files.
TOOLS := $(VENV)/.gdn2-build-tools
INSTALLED := $(VENV)/.gdn2-installed-$(GDN2_CUDA)
TEST_TOOLS := $(VENV)/.gdn2-test-tools
LINT_TOOLS := $(VENV)/.gdn2-lint-tools
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE \
           $(shell find csrc gdn2_ext -name __pycache__ -prune -o -print)
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test gpu-test memcheck coverage develop lint format wheel install test-tools lint-tools clean
.DELETE_ON_ERROR:

# No build isolation in this environment: it keeps BUILD_DIR valid from one install to the next (isolation
# puts the headers of pybind11 and CUTLASS in a new folder every time, and everything would be compiled
# again). CUTLASS lies beside the installed packages and not among them: its headers are needed, the packages
# that its Python code asks for are not.
$(TOOLS): constraints.txt pyproject.toml
	@echo "== virtual environment $(VENV), build tools"
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"gdn2_ext needs Python 3.10 or newer: make clean, then name one with make PYTHON=...")'
	$(PIP) install $(CONSTRAINTS) scikit-build-core pybind11 cmake ninja
	$(PIP) install --no-deps --upgrade --target $(VENV)/cutlass \
	  "$$(sed -n 's/^build.requires.*"\(nvidia-cutlass==[^"]*\)".*/\1/p' pyproject.toml)"
	@touch $@

# A real install and no editable one: demo and tests run what a user gets, so a file that the wheel lacks is
# noticed. Tests therefore start as `pytest` and the demo as `python -I -m`: neither puts this folder, with
# its gdn2_ext, on the path. Installing again takes seconds, and the stamp makes it happen whenever a source
# is newer. The wheel is installed twice, for pip brings either what it depends on or the same version anew.
$(INSTALLED): $(TOOLS) $(SOURCES)
	@echo "== gdn2_ext $(WHY)"
	@rm -rf build/wheel
	$(PIP) wheel $(SHOW_BUILD) --no-deps --no-build-isolation -C build-dir='$(BUILD_DIR)' -w build/wheel .
	$(PIP) install $(CONSTRAINTS) build/wheel/*.whl
	$(PIP) install --quiet --no-deps --force-reinstall build/wheel/*.whl
	@rm -f $(VENV)/.gdn2-installed-*
	@touch $@

# Compiling takes a while: show its progress.
$(VENV)/.gdn2-installed-ON: SHOW_BUILD := -v

$(TEST_TOOLS): $(TOOLS) | $(INSTALLED)
	@echo "== test tools"
	$(PIP) install $(CONSTRAINTS) "$$(echo build/wheel/*.whl)[test]"
	@touch $@

$(LINT_TOOLS): $(TOOLS)
	$(PIP) install $(CONSTRAINTS) ruff clang-format
	@touch $@

install: $(INSTALLED)
test-tools: $(TEST_TOOLS)
lint-tools: $(LINT_TOOLS)

# ---- what people run ---------------------------------------------------------------------------------------

demo: $(INSTALLED)
	@$(BIN)/python -I -m gdn2_ext

# One thread a worker: the workers are as many as the cores they are meant for.
test: $(INSTALLED) $(TEST_TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_JOBS) --timeout $(TEST_TIMEOUT) $(PYTEST_ARGS)

# Without such a GPU all tests would skip, and pass.
NEEDS_HOPPER = @$(BIN)/python -I -c 'import sys, torch; \
	hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0); \
	sys.exit(not hopper and "$@ needs a GPU of compute capability 9.0, and torch sees none")'

# Several workers on one device: what takes time is the host. No test takes times, and memory is read by process.
gpu-test: $(INSTALLED) $(TEST_TOOLS)
	$(NEEDS_HOPPER)
	$(BIN)/pytest python_tests -m gpu -n $(GPU_TEST_JOBS) --timeout $(TEST_TIMEOUT) \
	  --record bench/results/gpu_tests.json $(PYTEST_ARGS)

# An access outside a tensor is seen where every tensor is an allocation by itself, which graphs cannot do with.
# Instrumented are the kernels of gdn2_ext.
MEMCHECK := compute-sanitizer --tool memcheck --kernel-name kns=gdn2 --target-processes all --error-exitcode 1 \
            $(BIN)/pytest python_tests --numpy-reference --timeout $(TEST_TIMEOUT) $(PYTEST_ARGS)
memcheck: $(INSTALLED) $(TEST_TOOLS)
	$(NEEDS_HOPPER)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(MEMCHECK) -n $(TEST_JOBS) -m "gpu and not slow"
	$(MEMCHECK) -m caching_allocator

coverage: $(INSTALLED) $(TEST_TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_JOBS) --timeout $(TEST_TIMEOUT) --cov --cov-report=term-missing \
	  $(PYTEST_ARGS)

# Redirects imports of gdn2_ext to this folder and takes _C from the last build. The next `make test` or `make
# demo` puts the real install back.
develop: $(TOOLS)
	@echo "== gdn2_ext $(WHY), editable"
	$(PIP) install $(CONSTRAINTS) --no-build-isolation -C build-dir='$(BUILD_DIR)' -e '.[test]'
	@rm -f $(VENV)/.gdn2-installed-*

lint: $(LINT_TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(LINT_TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(TOOLS)
	@echo "== wheel $(WHY)"
	env -u GDN2_CUTLASS_DIR $(PIP) wheel $(if $(filter ON,$(GDN2_CUDA)),-v) --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache .coverage .coverage.* htmlcov
	find csrc gdn2_ext python_tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
