"""A notebook alone in an empty folder, beside an installed package: what Colab has of this project.

The package is installed from the checkout as a copy, not editable, and found before anything else of that name. Triton
is hidden: a T4's Triton is of no use, and many machines have none. Two notebooks stand for all; the others, which would
double the time of a test run, are run with RAGGED_EVERY_NOTEBOOK=1.
"""

import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from notebook_files import LESSONS, ROOT, SOLUTIONS, read

pytest.importorskip("nbconvert")
pytest.importorskip("ipykernel")
pytest.importorskip("plotly")

SECONDS = 600  # for a cell, and for the start of a kernel; far beyond what they need
REPRESENTATIVE = ("00", "02")  # the tour of everything, and the one that is about Triton
ON_DEMAND = pytest.mark.skipif(not os.environ.get("RAGGED_EVERY_NOTEBOOK"), reason="RAGGED_EVERY_NOTEBOOK is not set")
PROBE = """import importlib.metadata, importlib.util
import ragged, torch
from ragged import data
versions = [d.version for d in importlib.metadata.distributions(name="triton")]
print(ragged.__file__, data.data_dir(), importlib.util.find_spec("triton"), versions, sep="\\n")
print(ragged.BACKENDS["triton"].why_not("cuda", torch.float16, 64))"""
# Not an error in place of the import, which no machine without Triton would raise: simply nothing is found.
HIDE_TRITON = """import importlib.machinery

find, distributions = importlib.machinery.PathFinder.find_spec, importlib.machinery.PathFinder.find_distributions


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else find(name, path, target)


def find_distributions(context=None):
    return iter(()) if context is not None and context.name == "triton" else distributions(context)


# static, for some call them on an instance
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
importlib.machinery.PathFinder.find_distributions = staticmethod(find_distributions)
"""


@pytest.fixture(scope="module")
def without_triton(tmp_path_factory):
    """A folder whose presence on the path hides Triton: Python runs its sitecustomize.py at the start."""
    folder = tmp_path_factory.mktemp("hide")
    (folder / "sitecustomize.py").write_text(HIDE_TRITON)
    return folder


def run_alone(path, folder, *first_on_path):
    """Run a copy of the notebook in `folder`, with these folders first on Python's path; what PROBE printed."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_code_cell(PROBE))
    nbformat.write(notebook, folder / path.name)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, first_on_path)), "PLOTLY_RENDERER": "colab"}
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", path.name,
               "--ExecutePreprocessor.kernel_name=python3", f"--ExecutePreprocessor.timeout={SECONDS}",
               f"--ExecutePreprocessor.startup_timeout={SECONDS}"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    printed = "".join(output["text"] for output in read_back(folder / path.name) if output.get("name") == "stdout")
    return printed.splitlines()


def read_back(path):
    """The outputs of the last cell."""
    outputs = read(path)["cells"][-1]["outputs"]
    return [output | {"text": "".join(output["text"])} for output in outputs if output["output_type"] == "stream"]


def check_alone(path, folder, installed, without_triton):
    """The installed package and its data were used; Triton was neither found nor taken for installed."""
    package, data, spec, versions, why_not = run_alone(path, folder, without_triton, installed)
    assert package.startswith(str(installed)) and data.startswith(str(installed)), (package, data)
    assert (spec, versions) == ("None", "[]") and "Triton is not installed" in why_not
    assert {entry.name for entry in folder.iterdir()} <= {path.name, ".ipynb_checkpoints"}, "a notebook leaves files"


@pytest.mark.parametrize("path", [p for p in LESSONS if p.name.startswith(REPRESENTATIVE)], ids=lambda p: p.stem)
def test_a_notebook_runs_alone_and_without_triton(path, tmp_path, installed, without_triton):
    check_alone(path, tmp_path, installed, without_triton)


@ON_DEMAND
@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in LESSONS if not p.name.startswith(REPRESENTATIVE)], ids=lambda p: p.stem)
def test_every_other_notebook_runs_alone_and_without_triton(path, tmp_path, installed, without_triton):
    check_alone(path, tmp_path, installed, without_triton)


@ON_DEMAND
@pytest.mark.slow
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_solutions_run_alone(path, tmp_path, installed, without_triton):
    check_alone(path, tmp_path, installed, without_triton)


def test_the_set_up_cell_names_a_package_that_pip_can_build():
    """`ragged-vit[notebooks]` in the set-up cell: the distribution's name, and an extra that exists."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source = read(LESSONS[0])["cells"][1]["source"]
    name, extra = source.split('"')[1].split(" @ ")[0].rstrip("]").split("[")
    assert f'\nname = "{name}"' in pyproject and f"\n{extra} = [" in pyproject
