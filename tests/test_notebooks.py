"""The form of the notebooks: what a reader finds in each, and what must not be saved in one."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ragged"]["repository"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    content = json.loads(request.param.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        cell["source"] = "".join(cell["source"])
    return content | {"path": request.param}


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(notebook):
    return "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def test_the_header(notebook):
    header = notebook["cells"][0]["source"]
    assert len(header.splitlines()) <= 12
    assert f"colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{notebook['path'].name}" in header
    for part in ("**The question:**", "you will be able to", "*Prerequisites:*", "*Time:*", "*Hardware:*"):
        assert part in header, part


def test_the_ending(notebook):
    text = prose(notebook)
    for part in ("**Recap.**", "**Recall**", "## What next", "## References"):
        assert part in text, part


def test_the_measure_of_cells_and_prose(notebook):
    lines = [len(cell["source"].splitlines()) for cell in code(notebook)]
    assert 20 <= len(lines) <= 35 and 6 <= statistics.median(lines) <= 10 and max(lines) <= 40
    assert 5 <= len(prose(notebook).split()) / sum(lines) <= 9


def test_saved_outputs(notebook):
    """All cells ran in order; figures have JSON and a picture; neither HTML nor widget state is saved."""
    assert notebook["path"].stat().st_size < 300_000
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and "widgets" not in notebook["metadata"]
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for output in (output for cell in code(notebook) for output in cell["outputs"]):
        assert output["output_type"] != "error"
        kinds = set(output.get("data", {}))
        assert not kinds & {"text/html", "application/vnd.jupyter.widget-view+json"}
        assert ("application/vnd.plotly.v1+json" in kinds) == ("image/png" in kinds)


def test_nothing_of_the_machine_is_saved(notebook):
    """Paths and host names of whoever ran it last have no place in a saved notebook."""
    found = re.findall(r"/(?:home|root|tmp|work|Users)/\S*", notebook["path"].read_text(encoding="utf-8"))
    assert not found
