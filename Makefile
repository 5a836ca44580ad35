# `make demo` and `make test` need python3 with venv, make and a C++17 compiler; the rest they install
# into .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PARITY := .venv/parity
DOCS := .venv/docs
NATIVE := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/cuda/*)

# Two threads a worker reach the parallel paths of the kernels; passive: workers share the cores.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
	-n auto --maxprocesses 8 --dist worksteal

# With the interpreter as it is, whatever it has: a GPU machine brings its own torch.
OUT ?= gpu-check
RESULTS ?= $(OUT)/results
LIMIT ?= 590
PARTS ?=
WHEELS ?=
# The Python of the GPU machine, for which `make gpu-extensions` builds.
GPU_PYTHON ?= python3.12

.PHONY: venv test test-all demo bench bench-full bench-compare gpu-check gpu-extensions triton-report cuda-report variants sanitize fuzz lint \
	format docs clean

venv: $(INSTALLED)

# Editable: Python files are used where they lie, the extension is rebuilt when its sources change.
# Not without the CPU kernels. Without the CUDA kernels, unless asked for: minutes of nvcc, and the
# tests compile them themselves.
$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	RLHF_KERNELS_CPU=1 RLHF_KERNELS_CUDA=$${RLHF_KERNELS_CUDA-0} \
		$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

# The trainers that the parity tests call. verl and OpenRLHF without their dependencies: they want an
# older transformers than ours and flash-attn; the extra has what verl's functions need, the tests
# have stubs for the rest. OpenRLHF's wheel is for one Python and one platform.
$(PARITY): pyproject.toml constraints.txt | $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt 'rlhf-kernels[parity]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps "verl; python_version < '3.13'"
	$(BIN)/python -m pip install -c constraints.txt --no-deps "openrlhf; python_version == '3.11' \
		and sys_platform == 'linux' and platform_machine == 'x86_64'"
	@touch $@

test: venv $(PARITY)
	$(PYTEST) -m 'not slow and not gpu'

test-all: venv $(PARITY)
	$(PYTEST) -m 'not gpu'

demo: venv
	$(BIN)/rlhf-kernels train ppo --config examples/ppo_arithmetic.yaml

# The points that matter, ten minutes with all peers installed; all of them, growth curves and a whole
# step, over an hour.
bench: venv
	$(BIN)/python -m benchmarks.run

bench-full: venv
	$(BIN)/python -m benchmarks.run --full
	$(BIN)/python -m benchmarks.studies.growth
	$(BIN)/python -m benchmarks.studies.whole_step

# Ratios of a run (NEW=json, or one made now) against an earlier one; fails where one got worse.
BASE ?=
NEW ?=
TOLERANCE ?= 0.1
bench-compare: venv
	$(if $(BASE),,$(error BASE=<json of an earlier run>))
	$(BIN)/python -m benchmarks.reports.compare $(BASE) $(if $(NEW),--new $(NEW)) --tolerance $(TOLERANCE)

gpu-check:
	$(PYTHON) -m benchmarks.gpu.check --out $(OUT) --results $(RESULTS) --limit $(LIMIT) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(WHEELS),--wheels $(WHEELS))

# Here, for a machine with a GPU and little time: build/gpu-extensions travels with the tree.
gpu-extensions:
	test -x .venv-gpu/bin/python || $(GPU_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q 'setuptools>=77' 'pybind11>=2.13'
	.venv-gpu/bin/python -m benchmarks.gpu.prebuilt

# No GPU needed: kernels are compiled, not run. DATE=2026-01-31 names another day.
DATE ?= $(shell date +%F)
triton-report: venv
	$(BIN)/python -m tools.triton_aot --report benchmarks/results/triton-resources.md --date $(DATE)

cuda-report: venv
	$(BIN)/python -m tools.cuda_resources --report benchmarks/results/cuda-resources.md --date $(DATE)
	$(BIN)/python -m tools.cuda_sass --report benchmarks/results/cuda-sass.md --date $(DATE)
	$(BIN)/python -m tools.triton_sass --report benchmarks/results/triton-sass.md --date $(DATE)

# The losses and estimators of the field, our calls, and their differences from the formulas.
variants: venv
	$(BIN)/python -m tools.variants --report docs/variants.md

# Address and undefined behaviour, in the kernels; needs GCC.
sanitize: venv
	$(BIN)/python -m tools.sanitize

# Random calls against float64; prints the command that repeats a finding.
SECONDS ?= 600
fuzz: venv
	$(BIN)/python -m tools.fuzz --seconds $(SECONDS)

# What the type checker reads: the package, and a script as a user writes it.
TYPED := rlhf_kernels tests/package/typing/user.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')
	$(BIN)/mypy $(TYPED)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

# The site, in build/site. Pages open from the disk; its search needs a server:
# python -m http.server -d build/site
$(DOCS): pyproject.toml constraints.txt | $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt 'rlhf-kernels[docs]'
	@touch $@

docs: venv $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-gpu build dist *.egg-info rlhf_kernels/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
