# Each target sets up what it needs in .venv: pinned packages and the compiled extension.
PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
FUZZ_ARGS ?=
RELEASE_ARGS ?=
MUTATE_ARGS ?=
MINUTES ?= 10
# as many processes as processors; two threads in each, so that kernels share their work, asleep while they wait
IN_PARALLEL = OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# without a GPU, the build of this tree only serves tests: one architecture is enough
ifeq (,$(shell command -v nvidia-smi))
export TORCH_CUDA_ARCH_LIST ?= 9.0
endif

.PHONY: help demo test test-examples lint docs bench fuzz sanitize mutate gpu env release-check clean

help:
	@echo "make demo   train on real images and write runs/demo/report.md (about 4 minutes on 2 cores)"
	@echo "make test   build and run all tests (about 10 minutes on 2 cores)"
	@echo "make test-examples   install what the examples import, and run each of them (5 minutes)"
	@echo "make lint   check style and types"
	@echo "make docs   the site in build/site; a broken link is an error"
	@echo "make bench  time the operators beside other ways to compute the same (about 9 minutes on 2 cores)"
	@echo "make fuzz   random cases over every function for MINUTES=10; FUZZ_ARGS='--seed N' repeats one"
	@echo "make sanitize   tests and random cases with ASan and UBSan, threads, leaks (about 15 minutes on 2 cores)"
	@echo "make mutate   change single places of the sources and see that tests notice, for MINUTES=10, after those of the record"
	@echo "make gpu    on a machine with a GPU: build, test, time, train, sanitize (installs nothing; GPU_ARGS=--rehearse: anywhere)"
	@echo "make env    versions, build and devices, for a bug report"
	@echo "make release-check   install the source distribution in empty environments of several torch; prints the support table"
	@echo "make clean  remove the build and .venv"

demo: .venv/built
	.venv/bin/python -m train demo --out runs/demo $(DEMO_ARGS)

test: .venv/built
	$(IN_PARALLEL) .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-examples: .venv/built
	.venv/bin/python -m pip install --quiet --no-build-isolation --requirement examples/requirements.txt
	.venv/bin/python -m pytest tests/examples

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: .venv/installed
	.venv/bin/pre-commit run --all-files --show-diff-on-failure

bench: .venv/built
	.venv/bin/python -m benchmarks $(BENCH_ARGS)

fuzz: .venv/built
	PYTHONPATH=tests .venv/bin/python -m fuzz --minutes $(MINUTES) $(FUZZ_ARGS)

sanitize: .venv/installed
	.venv/bin/python tests/sanitize.py --minutes $(MINUTES)

mutate: .venv/built
	PYTHONPATH=tests .venv/bin/python -m mutate --minutes $(MINUTES) $(MUTATE_ARGS)

# with the Python that is there, because a machine with a GPU often has its own PyTorch and no network
gpu:
	$(PYTHON) scripts/gpu.py $(GPU_ARGS)

release-check: .venv/installed
	.venv/bin/python scripts/release_check.py $(RELEASE_ARGS)

env: .venv/built
	.venv/bin/python -m pixcontrast.env

.venv/installed: requirements.txt
	$(PYTHON) scripts/check_system.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/built: .venv/installed setup.py pyproject.toml $(shell find csrc -type f)
	@echo "building the extension (a minute; with CUDA kernels, where there is nvcc, about three)"
	.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build *.egg-info pixcontrast/_C*.so
