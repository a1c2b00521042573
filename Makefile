# The two commands of a newcomer are `make demo` and `make test`; both set everything up first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Three at a time, with a thread each: those that drive a Slurm mostly wait.
TEST := OMP_NUM_THREADS=1 $(RUN)/pytest --numprocesses 3 --dist worksteal

.PHONY: demo test slow lint check soak api dist format clean

demo: $(INSTALLED)
	$(RUN)/vidfill demo --out runs/demo

test: $(INSTALLED)
	$(TEST) -m "not slow"

slow: $(INSTALLED)
	$(TEST) -m slow --durations 20

lint: $(INSTALLED)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

check: lint test slow

soak: $(INSTALLED)
	$(RUN)/python -m benchmarks.soak

# Pages of the public names and their docstrings, from runs/api/index.html on.
api: $(INSTALLED)
	$(RUN)/python -W ignore -m pdoc --docformat google --no-show-source --output-directory runs/api \
	    vidfill '!vidfill.setup'

# dist/*.tar.gz, and from it dist/*.whl.
dist: $(INSTALLED)
	$(RUN)/python -m build --no-isolation

format: $(INSTALLED)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	mkdir -p $(VENV)/src && ln -sfn $(CURDIR) $(VENV)/src/vidfill
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
