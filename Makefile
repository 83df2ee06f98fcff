# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, pinned requirements.
# PYTHON=python3.12 make demo picks another interpreter.
PYTHON ?= python3

# OpenMP's threads otherwise spin long while they wait, which on cores busy with anything else costs many times the work
export GOMP_SPINCOUNT ?= 5000

demo: .venv/ready
	.venv/bin/python demo.py

# resumable: after Ctrl-C the same command goes on
study: .venv/ready
	.venv/bin/python study.py

# likewise resumable; the model comes from the hub: MODEL=folder for one that is there
real: .venv/ready
	.venv/bin/python -m pip install -q reasoning-gym==0.1.25
	.venv/bin/python real.py $(if $(MODEL),--model=$(MODEL))

test: .venv/ready-dev
	.venv/bin/ruff check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --dist worksteal

bench: .venv/ready-dev
	.venv/bin/python tests/bench.py

# torch first and pinned: asked for by another package, pip may take a CUDA build of several GB instead
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv

.PHONY: demo study real test bench clean
