"""Lessons and solutions as the tests read them, and their code run without a kernel."""

import ast
import contextlib
import json
import linecache
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("[0-9]*.ipynb"))
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"


def read(path):
    """A notebook's dict, with every cell's source as one text."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        cell["source"] = "".join(cell["source"])
    return content | {"path": path}


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(notebook):
    return "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def outputs(notebook):
    return [(cell, output) for cell in code(notebook) for output in cell["outputs"]]


def tags(cell):
    return cell["metadata"].get("tags", [])


def tagged(notebook, kind):
    """{number: cell} of the cells tagged `kind`-number; a number that stands twice is an error."""
    found = {}
    for cell in code(notebook):
        for tag in tags(cell):
            if match := re.fullmatch(rf"{kind}-(\d+)", tag):
                assert int(match[1]) not in found, f"{notebook['path'].name}: two cells are tagged {tag}"
                found[int(match[1])] = cell
    return found


def exercise_headings(notebook):
    return re.findall(r"^### Exercise (\d+) · (.+)$", prose(notebook), re.MULTILINE)


def run(source, names, name="cell"):
    """Run a cell's code among `names`; the value of its last line, if that is an expression."""
    from IPython.core.inputtransformer2 import TransformerManager
    from IPython.display import display

    names.setdefault("display", display)  # as in a kernel
    source = TransformerManager().transform_cell(source)
    linecache.cache[name] = len(source), None, source.splitlines(True), name  # as a kernel does: Triton reads it
    tree = ast.parse(source, filename=name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return eval(compile(ast.Expression(last.value), name, "eval"), names) if last else None


@contextlib.contextmanager
def as_in_a_notebook(folder):
    """The working folder of a notebook, figures as data and neither browser windows nor PNGs; `course.setup`'s changes
    undone."""
    from unittest import mock

    import plotly.io as pio
    import torch

    before = torch.is_grad_enabled(), pio.renderers.default, os.getcwd()
    pio.renderers.default = "plotly_mimetype"
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, PLOTLY_RENDERER="plotly_mimetype"):
            yield
    finally:
        torch.set_grad_enabled(before[0])
        pio.renderers.default = before[1]
        os.chdir(before[2])
