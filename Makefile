# make bench  - environment, install, and the main job: results/BENCHMARK_RESULTS.md on this machine
# make test   - environment, install, and every test that needs no minutes of model time (JOBS processes, 1-2 GB each)
# make docs   - the documentation site, in site/
# make check  - lint, types and staleness, in seconds
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PROFILE ?= default
JOBS ?= 2
TESTS ?= tests

.PHONY: bench test check docs fresh faults format report clean

bench: $(VENV)/.installed
	$(BIN)/veloxbench doctor
	$(BIN)/veloxbench run --profile $(PROFILE) --out results

# glibc keeps the memory that tests free: without that a tenth of their time is page faults
test: export MALLOC_MMAP_MAX_ = 0
test: export MALLOC_TRIM_THRESHOLD_ = 4294967296
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TESTS) suites --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory fresh

# the documentation site, in site/; a warning is an error
docs: $(VENV)/.installed
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . site

# $(call pages,--out) writes the generated pages, $(call pages,--check) compares them with what their sources say
define pages
$(BIN)/veloxbench report records $(1) BENCHMARK_RESULTS.md --details docs/results
$(BIN)/veloxbench peers report records/peers $(1) docs/peers.md
$(BIN)/veloxbench trial damages $(1) docs/damages.md
$(BIN)/veloxbench trial timing report records/timing-gate/error-rates.json $(1) docs/gate-error-rates.md
$(BIN)/veloxbench trial travelling $(1) docs/travelling.md
$(BIN)/veloxbench trial instruments $(1) docs/instruments.md
endef

# generated files are what their sources say
fresh: $(VENV)/.installed
	$(BIN)/veloxbench schema | cmp - schema/record.json
	$(call pages,--check)

# damaged files and attacks by the thousand (hours; one that was broken off goes on), and the page that counts them
faults: $(VENV)/.installed
	$(BIN)/python tests/faults/mutants.py --count 3000 --record records/faults.json
	$(BIN)/python tests/faults/mutants.py --page

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

report: $(VENV)/.installed
	$(BIN)/veloxbench schema > schema/record.json
	$(call pages,--out)
	$(BIN)/python -m veloxbench.report.guide

# pip reads dependency groups from 25.1 on; a module is compiled where it is first imported, and few of them ever are
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --no-compile --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
