"""What the notebooks' sliders call is tried at both ends of every slider, by notebooks/conftest.py where the notebooks
are run. Here: that a slider which shows nothing new is found, and that every slider is looked at."""

import importlib.util
from types import SimpleNamespace

import pytest
from notebook_files import LESSONS, ROOT, code, read, run, tags
from slider_ends import at_both_ends

pytest.importorskip("plotly")

import plotly.graph_objects as go

from ragged import course


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
    at_both_ends(lambda k: go.Figure(go.Bar(y=[k])), [1, 2])


def sent_to_the_kernel(cell):
    """The source of a cell as notebooks/conftest.py hands it over."""
    spec = importlib.util.spec_from_file_location("conftest_of_the_notebooks", ROOT / "notebooks" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    cell = SimpleNamespace(source=cell["source"], metadata=cell["metadata"])
    config = SimpleNamespace(option=SimpleNamespace(nbval_cell_timeout=1))
    conftest.pytest_runtest_setup(SimpleNamespace(cell=cell, config=config))
    return cell.source


def test_every_slider_of_a_notebook_is_tried(monkeypatch):
    """With a callback that always shows the same in place of the notebook's, its cell fails."""
    monkeypatch.setattr(course, "slider", course.slider)  # set back afterwards
    sliders = [cell for path in LESSONS for cell in code(read(path)) if "slider" in tags(cell)]
    assert len(sliders) >= len(LESSONS) / 2
    for cell in sliders:
        assert cell["source"].startswith("course.slider("), "called by another name it would not be tried"
        before = sent_to_the_kernel(cell).removesuffix(cell["source"])
        with pytest.raises(AssertionError, match="1 and 2 show the same"):
            run(f"{before}course.slider(lambda k: 'the same', [1, 2])", {"course": course})
