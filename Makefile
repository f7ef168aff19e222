# make demo | test | lab | notebooks | lint.  PYTHON picks the interpreter that makes .venv (3.10 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lab notebooks lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[lab,test,dev]'
	touch $@

demo: .venv/installed  ## the four notebooks on the drawn character, on the CPU
	$(BIN)/python -m lora_nb run

test: .venv/installed  ## the tests, then the notebooks under nbval
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q --durations=10
	$(BIN)/python -m pytest -q --nbval-lax --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600 notebooks

lab: .venv/installed  ## JupyterLab on the notebooks, on this machine only
	$(BIN)/jupyter lab --ip 127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

notebooks: .venv/installed  ## run the notebooks again and keep them cleaned, with their pictures
	$(BIN)/python tools/make_notebooks.py

lint: .venv/installed
	$(BIN)/ruff check lora_nb tools tests benchmarks

clean:  ## what tests left; never data/ and outputs/, where your LoRAs lie
	rm -rf .pytest_cache .hypothesis .ruff_cache outputs/unpacked
