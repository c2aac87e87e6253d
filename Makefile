# Everything a developer or CI runs. `make` alone lists the targets.
PYTHON_BIN := .venv/bin/python
PACKAGES := proto models server client
TYPED := $(addprefix build/typed/layercast/,$(PACKAGES))

.DEFAULT_GOAL := help
.PHONY: help setup serve compile test soak fuzz overload bench check format proto clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## build .venv for running the server (a second run does nothing)
	@scripts/setup.sh serve

serve: ## start the server with the models of the zoo; ARGS="--grpc-port 9001" passes options on
	@scripts/setup.sh serve
	@exec .venv/bin/layercast serve $(ARGS)

compile: ## make native code of what runs for every request, and kernels for ResNets and text models (C and C++ compilers, 80 s); the server uses it from then on
	@scripts/setup.sh serve
	@$(PYTHON_BIN) -c 'import mypyc' 2>/dev/null || $(PYTHON_BIN) -m pip install -q -c .venv/constraints.txt -e '.[compile]'
	@.venv/bin/layercast compile

test: ## run every test, two at a time; ARGS="-k codec" passes options on
	@scripts/setup.sh dev
	$(PYTHON_BIN) -m pytest -n 2 --dist loadfile $(ARGS)

soak: ## mixed load against the oracle for SOAK_SECONDS (default 600), with clients killed and memory watched
	@scripts/setup.sh dev
	PYTHONPATH=tests $(PYTHON_BIN) -m oracle --seconds $(or $(SOAK_SECONDS),600) $(ARGS)

fuzz: ## coverage-guided fuzzing of the decoders, FUZZ_SECONDS each (default 60)
	@scripts/setup.sh dev
	@$(PYTHON_BIN) -c 'import atheris' 2>/dev/null || $(PYTHON_BIN) -m pip install -q 'atheris>=3'
	for target in infer extract; do \
	  PYTHONPATH=tests $(PYTHON_BIN) -m fuzz $$target -max_total_time=$(or $(FUZZ_SECONDS),60) || exit 1; done

overload: ## goodput, latency and probes at ten times a model's capacity; ARGS="--seconds 60"
	@scripts/setup.sh dev
	$(PYTHON_BIN) benchmarks/overload.py $(ARGS)

bench: ## rates and ratios beside peers, in turn; ARGS="--peers DIR --rounds 3 --json FILE"
	@scripts/setup.sh dev
	$(PYTHON_BIN) benchmarks/side_by_side.py $(ARGS)

check: $(TYPED) ## lint, formatting, types, Dockerfile
	@scripts/setup.sh dev
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy $(PACKAGES:%=-p layercast.%)
	.venv/bin/hadolint Dockerfile

format: ## apply the linter's fixes and the formatter
	@scripts/setup.sh dev
	$(PYTHON_BIN) -m ruff check --fix .
	$(PYTHON_BIN) -m ruff format .

proto: ## generate the descriptors and message types from the .proto files
	@scripts/setup.sh dev
	$(PYTHON_BIN) -m layercast.proto.generate

clean: ## remove build outputs and caches; `rm -rf .venv*` removes the environments
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The editable install is an import hook, which type checkers cannot follow: they find the packages through these links.
build/typed/layercast/%:
	@mkdir -p $(@D)
	@ln -sfn ../../../$* $@
