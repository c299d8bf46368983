# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
TORCH_PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
BENCH := .venv-bench
BENCH_READY := $(BENCH)/.ready
PROTOS := $(wildcard protos/sharpwatch/v1/*.proto)

.PHONY: demo docs test test-all test-matrix check bench bench-curvature proto clean

# torch first, so that a CPU build can be asked for: TORCH_PIP_FLAGS="--index-url <PyTorch's CPU index>".
$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH_PIP_FLAGS) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(READY): $(DEMO_READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DOCS_READY): $(DEMO_READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: $(DEMO_READY)
	$(BIN)/sharpwatch demo

# A warning is an error. NO_MKDOCS_2_WARNING: the theme advertises another generator.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Most tests wait for processes, the slow ones most of all: two at a time, and three of those.
# `make test` leaves out the slow tests, `make test-all` is what CI runs.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m "not matrix"

test-matrix: $(READY)
	$(BIN)/python -m pytest --verbose -m "" tests/distributed/test_matrix.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	$(MAKE) proto
	git diff --exit-code -- sharpwatch/v1

bench: $(READY)
	$(BIN)/python benchmarks/overhead.py

# The peers get an environment of their own. None of them imports torchvision, whose build must fit torch's.
$(BENCH_READY): pyproject.toml constraints.txt benchmarks/curvature/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --constraint constraints.txt $(TORCH_PIP_FLAGS) torch
	$(BENCH)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo]' \
		--requirement benchmarks/curvature/requirements.txt
	$(BENCH)/bin/pip uninstall --quiet --yes torchvision
	touch $@

bench-curvature: $(BENCH_READY)
	$(BENCH)/bin/python -m benchmarks.curvature.run
	$(BENCH)/bin/python -m benchmarks.curvature.covered
	$(BENCH)/bin/python -m benchmarks.curvature.gnb_price

proto: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --grpc_python_out=. --mypy_out=quiet:. \
		--mypy_grpc_out=quiet:. $(PROTOS)
	rm -f sharpwatch/v1/types_pb2_grpc.py sharpwatch/v1/types_pb2_grpc.pyi

clean:
	rm -rf $(VENV) $(BENCH) build dist *.egg-info
