# The two commands of this project are `make demo` and `make test`. Everything they need they
# install or build themselves; what is slow to make lies in the user's cache, keyed by its content.
SHELL := /bin/bash
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/modelfleet
PYTHON := python3
VENV := $(CACHE)/venv-$(shell { cat requirements-dev.lock; $(PYTHON) -VV; } | sha256sum | cut -c1-12)
ENGINE := vllm
PYTEST := .venv/bin/python -m pytest
# The tests wait for Slurm far more than they compute, so five run at once; not so those of the real
# engine, which alone keeps both cores busy.
PARALLEL := --numprocesses=5 --dist=loadgroup
ALONE := vllm

.PHONY: help demo test soak bench lint venv packages lab-down clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

demo: packages ## show the main job on the lab (ENGINE=vllm|standin, KEEP=1 leaves it up)
	@.venv/bin/python -m tests.lab.demo --engine $(ENGINE) $(if $(KEEP),--keep)

test: packages ## run all tests: unit, contract on real Slurm, end to end, real vLLM
	@.venv/bin/python -m tests.lab base
	@.venv/bin/python images/build.py vllm-cpu
	$(PYTEST) $(PARALLEL) -k 'not $(ALONE)'
	$(PYTEST) -k $(ALONE)

soak: packages ## run what takes long: many kills, reloads, requests, seeds
	SOAK=1 $(PYTEST) $(PARALLEL) -k 'not $(ALONE)' \
		tests/contract tests/e2e tests/gateway/test_tls.py tests/mutations tests/provisioning
	.venv/bin/python -m tests.simulation --soak 5000

bench: packages ## print how fast plan(), the command line, a cycle of 1,000 jobs, the gateway and a run of site.yml are, as ratios
	.venv/bin/python -m bench.plan
	.venv/bin/python -m bench.cli
	.venv/bin/python -m bench.cycle
	.venv/bin/python -m bench.gateway
	.venv/bin/python -m bench.site

lint: packages ## check style, types, layers, shell scripts and playbooks
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	shellcheck $$(git ls-files '*.sh') .ci/run
	.venv/bin/yamllint --strict .
	for site in example user lab; do \
		.venv/bin/ansible-playbook --syntax-check --inventory inventory/$$site $(wildcard playbooks/*.yml) || exit; done
	.venv/bin/ansible-lint --offline -q

venv: $(VENV)/complete ## make the development environment
	@ln -sfn $(VENV) .venv

$(VENV)/complete:
	@echo "venv: installing the pinned development environment (about half a minute)"
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { apt-get update -q && apt-get install -qy python3-venv; }
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --require-hashes --requirement requirements-dev.lock
	@touch $@

packages: venv ## install this machine's Debian packages that the lab needs
	@.venv/bin/ansible-playbook -i inventory/lab playbooks/lab.yml --tags packages

lab-down: venv ## stop a lab that `make demo KEEP=1` left up
	@.venv/bin/python -m tests.lab down --name demo

clean: ## remove what building left in this checkout (the cache stays)
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
