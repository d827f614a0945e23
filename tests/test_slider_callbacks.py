"""What the notebooks' sliders call, at both ends of every slider: something is drawn, and the two ends differ.

A slider's cell is run without a kernel, after the earlier cells that it needs and no others: which those are is read
off the names that each cell uses and binds. `course.slider` only records.
"""

import linecache

import pytest
from cell_names import needed
from notebook_files import LESSONS, as_in_a_notebook, code, read, run, tags

pytest.importorskip("plotly")

import plotly.graph_objects as go

from ragged import course, launch

# ---- which cells does a cell need? ----


@pytest.mark.parametrize(
    "cells, wanted",
    [
        (["import a", "b = a.x", "c = 2", "f(b)"], [0, 1, 3]),
        (["b = 1", "b = 2", "f(b)"], [1, 2]),
        (["b = 1", "b += 2", "f(b)"], [0, 1, 2]),
        (["b = []", "b.append(1)", "b[0] = 2", "c = 0", "f(b)"], [0, 1, 2, 4]),
        (["b = {}", "for c in 1, 2:\n    b[c] = 1", "f(b)"], [0, 1, 2]),
        (["b = []", "fill(b)", "f(b)"], [0, 1, 2]),
        (["b = 1", "def f(b):\n    c = b\n    return c", "c = 3", "f(4)"], [1, 3]),
        (["b = 1", "def f():\n    return b", "b = 2", "f()"], [0, 1, 2, 3]),
        (["def f():\n    return g()", "def g():\n    return 1", "f()"], [0, 1, 2]),
        (["b = 1", "c = [b for _ in range(3)]", "f(c)"], [0, 1, 2]),
        (["n = 1", "c = [n for n in range(3) if [n for n in (n, 1)]]", "f(c)"], [1, 2]),
        (["import plots", "plots.draw(1)", "f(plots)"], [0, 2]),
        (["def b():\n    return 1", "b().show()", "f(b())"], [0, 2]),
        (["b = 1", "print(b)", "print(f(b))"], [0, 2]),
        (["b = 1", "if b:\n    print(b)", "c = f(b)\nc.show()", "g(b)"], [0, 3]),
        (["b = 1", "b = 2\nf(b)", "b = 3", "a = b\nf(a)"], [2, 3]),
        (["b = 1", "b = 2\nf(b)"], [1]),
        (["b = 1", "for b in range(3):\n    f(b)"], [1]),
        (["b = 1", "if a:\n    b = 2", "f(b)"], [0, 1, 2]),
        (["b = 1", "if a:\n    b = 2\nelse:\n    b = 3", "f(b)"], [1, 2]),
        (["a = 1", "@a.jit\ndef f():\n    pass", "f()"], [0, 1, 2]),
        (["b = 1", "f = lambda: b", "f()"], [0, 1, 2]),
        (["%pip install nothing\nimport b", "f(b)"], [0, 1]),
    ],
)
def test_the_cells_that_a_cell_needs(cells, wanted):
    assert needed(cells, len(cells) - 1) == wanted


# ---- the sliders ----


def shown(result):
    """What of a slider's picture must change, as text: everything but the title."""
    if isinstance(result, str):
        assert result.strip(), "the text is empty"
        return result
    assert isinstance(result, go.Figure), f"neither a figure nor text but {type(result).__name__}"
    drawn = result.to_plotly_json()
    layout = drawn["layout"]
    assert drawn["data"] or layout.get("images") or layout.get("shapes"), "the figure is empty"
    layout.pop("title", None)
    return go.Figure(drawn).to_json()


def at_both_ends(render, values, start=None, label="value"):
    """In the place of `course.slider`: the callback at the first and the last stop."""
    values = list(values)
    assert len(values) >= 2, f"{label}: a slider needs two stops"
    assert start is None or start in values, f"{label}: starts at {start!r}, which is no stop"
    first, last = (shown(render(value)) for value in (values[0], values[-1]))
    assert first != last, f"{label}: {values[0]!r} and {values[-1]!r} show the same"
    return label


@pytest.mark.parametrize(
    "render, values, said",
    [
        (lambda k: "always the same", [1, 2], "show the same"),
        (lambda k: " ", [1, 2], "text is empty"),
        (lambda k: None, [1, 2], "NoneType"),
        (lambda k: go.Figure(layout_title_text=str(k)), [1, 2], "figure is empty"),
        (lambda k: go.Figure(go.Bar(y=[1]), layout_title_text=str(k)), [1, 2], "show the same"),
        (str, [1], "two stops"),
    ],
)
def test_a_slider_that_shows_nothing_new_is_found(render, values, said):
    with pytest.raises(AssertionError, match=said):
        at_both_ends(render, values)
    assert at_both_ends(lambda k: go.Figure(go.Bar(y=[k])), [1, 2]) == "value"


@pytest.fixture
def recorded(monkeypatch):
    """The labels of the sliders that were tried; nothing is displayed, and what a cell sets is set back."""
    tried = []
    monkeypatch.setattr(course, "slider", lambda *a, **k: tried.append(at_both_ends(*a, **k)))
    monkeypatch.setattr(go.Figure, "show", lambda *a, **k: None)
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: None)
    monkeypatch.setattr(launch, "INTERPRET", launch.INTERPRET)
    monkeypatch.setenv("TRITON_INTERPRET", "")
    monkeypatch.delenv("TRITON_INTERPRET")
    return tried


SLOW = {"00_start_here", "04_pruning"}  # their sliders show what earlier cells measured or traced
NOTEBOOKS = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in LESSONS]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_sliders_of_a_notebook(path, recorded):
    cells = code(read(path))
    sources = [cell["source"] for cell in cells]
    sliders = [i for i, cell in enumerate(cells) if "slider" in tags(cell)]
    if not sliders:
        pytest.skip("no slider in this notebook")
    wanted = sorted(set().union(*(needed(sources, i) for i in sliders)))
    names = {"__name__": "__main__"}
    with as_in_a_notebook(path.parent):
        for i in wanted:
            place = f"<{path.name} {cells[i]['id']}>"
            lines = sources[i].splitlines(keepends=True)
            linecache.cache[place] = (len(sources[i]), None, lines, place)  # Triton reads the source of its kernels
            run(sources[i], names, place)
    assert len(recorded) == len(sliders)
