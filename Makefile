# `make smoke` is all a newcomer needs. Every target that needs the environment makes it first; it is made once, and again
# when the locks or setup.py change.

VENV ?= .venv
FLAVOUR ?= cpu
IMAGE ?= funmatch:$(FLAVOUR)
BASE ?=
SMOKE_FLAGS ?=
MINIATURE_FLAGS ?=
PYTEST_FLAGS ?=
AUDIT_FLAGS ?=
MUTATION_FLAGS ?=
# As many processes as processors, at most four, because each imports TensorFlow. Tests of one file share its fixtures.
PARALLEL ?= -n logical --maxprocesses=4 --dist=loadfile
# Slow tests wait for buckets that fall silent, leases that run out and gcloud's retries, so two processes share a processor.
PARALLEL_SLOW ?= -n 4 --dist=loadfile
BUILD_FLAGS ?=
SOAK ?= 200

PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation
LOCK := CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-build-isolation --no-emit-index-url --no-emit-trusted-host --no-emit-find-links

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv smoke test test-slow test-kills test-docker mutations soak miniature lint lint-deploy lock image sbom audit clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

smoke: venv  ## Run the whole job on built-in data on the CPU. More flags: SMOKE_FLAGS="--preset=tiny".
	$(PY) -m trainer.smoke $(SMOKE_FLAGS)

test: venv  ## Run the tests that take seconds each.
	$(PY) -m pytest -m "not slow and not kills and not docker" $(PARALLEL) $(PYTEST_FLAGS)

# pytest exits with 5 when it finds no test. That is right while no test is marked slow, and a mistake afterwards.
test-slow: venv  ## Run the tests that take minutes.
	@$(PY) -m pytest -m "slow and not docker" $(PARALLEL_SLOW) $(PYTEST_FLAGS) \
		|| { code=$$?; [ $$code -eq 5 ] && ! grep -rqs --include='*.py' 'mark\.slow' tests || exit $$code; }

test-kills: venv  ## Stop jobs at chosen moments, or take their disk away, and compare to the bit.
	$(PY) -m pytest -m kills $(PYTEST_FLAGS)

test-docker: venv  ## Build the image and test it. Starts an engine of its own (root, Debian) when none runs.
	$(PY) -m pytest -m docker $(PYTEST_FLAGS)

mutations: venv  ## Break each guard in a copy of the project and see its test fail. Some: MUTANT="checkpoint".
	$(PY) tests/mutations.py $(MUTATION_FLAGS) $(if $(MUTANT),"$(MUTANT)")

soak: venv  ## Kill SOAK=200 jobs at random moments and compare to the bit.
	$(PY) tests/soak.py $(SOAK)

miniature: venv  ## The paper's claims on drawn flowers, an hour and more. Shorter: MINIATURE_FLAGS=--quick.
	$(PY) benchmarks/paper_in_miniature.py $(MINIATURE_FLAGS)

lint: lint-deploy  ## Check style, formatting and types, scripts, workflows and the cloud's build.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lint-deploy: venv  ## Of these: shell scripts, GitHub's workflows and Cloud Build's steps.
	$(VENV)/bin/shellcheck -x .ci/run deploy/*.sh requirements/*.sh tests/*.sh
	$(VENV)/bin/zizmor --offline --quiet --persona=auditor .github
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.cloudbuild deploy/cloudbuild.yaml

lock: venv  ## Resolve requirements/*.in again. UPGRADE=--upgrade takes the newest versions.
	$(LOCK) $(UPGRADE) -o requirements/build.txt requirements/build.in
	$(LOCK) $(UPGRADE) -o requirements/cpu.txt requirements/cpu.in
	$(LOCK) $(UPGRADE) -o requirements/tpu.txt requirements/tpu.in
	$(LOCK) $(UPGRADE) -o requirements/gpu.txt requirements/gpu.in
	$(LOCK) $(UPGRADE) -o requirements/audit.txt requirements/audit.in
	$(LOCK) $(UPGRADE) -o requirements/dev.txt requirements/dev.in

image:  ## Build an image: FLAVOUR=cpu, tpu or gpu. A pinned base: BASE=python:3.11-slim-bookworm@sha256:...
	docker build --target $(FLAVOUR) --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) $(BUILD_FLAGS) \
		--build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' trainer/__init__.py)" \
		--build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" .

sbom: venv  ## The bill of materials (CycloneDX) of each image, from its lock, into build/.
	mkdir -p build
	for flavour in cpu tpu gpu; do \
		$(PY) requirements/sbom.py requirements/build.txt requirements/$$flavour.txt > build/sbom-$$flavour.cdx.json || exit 1; done

# In an environment of its own: pip-audit and what it needs have no place beside what is tested.
audit: venv  ## Ask whether what the images hold has known vulnerabilities. AUDIT_FLAGS=--or-say-so: go on if nobody answers.
	$(PY) -m venv --clear build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/audit.txt
	build/audit/bin/python requirements/audit.py $(AUDIT_FLAGS) $(foreach lock,build cpu tpu gpu,requirements/$(lock).txt)

clean:  ## Remove the environment, caches and smoke runs.
	rm -rf $(VENV) build dist smoke *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find trainer tests -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(READY)

# The locks are resolved for Python 3.11 and install on 3.12; Keras 3.15 has left 3.10 behind.
$(READY): requirements/build.txt requirements/dev.txt setup.py
	@python= ; for candidate in $(or $(PYTHON),python3.11 python3); do \
		if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
			python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "Needs Python 3.11 or 3.12, but $(if $(PYTHON),$(PYTHON) is not one,neither python3.11 nor python3 is one)." \
			"Install Python 3.11, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi; \
	echo "Creating $(VENV) with $$python (downloads about 1 GB the first time)"; \
	$$python -m venv --clear $(VENV) \
		|| { echo "$$python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PIP_INSTALL) --require-hashes -r requirements/build.txt
	$(PIP_INSTALL) --require-hashes -r requirements/dev.txt
	@# setuptools warns of every editable installation that the folder it stands in may shadow it. It is the same folder.
	PYTHONWARNINGS=ignore $(PIP_INSTALL) --no-deps --editable .
	@touch $@
