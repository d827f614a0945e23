"""Drop-down menus: every change draws again, a refusal is shown, and a saved notebook keeps the first picture."""

import pytest

pytest.importorskip("ipywidgets")

from ragged import course
from ragged.course import output as notebook_output

MENUS = {"keep": [0.1, 0.5], "model": ["small", "large"]}


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, bundle, raw):
        assert raw
        self.shown.append(bundle)


@pytest.fixture
def shown(monkeypatch):
    """A display handle, and what was displayed beside it."""
    import IPython.display

    handle, things = Handle(), []

    def display(thing, raw=False, display_id=False):
        if raw:
            handle.shown.append(thing)
            return handle
        things.append(thing)

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    return handle, things


def draw(keep, model):
    if (keep, model) == (0.1, "large"):
        raise ValueError("nothing recorded")
    return f"{model} at {keep}"


def test_every_menu_draws_again(shown):
    handle, things = shown
    widget = course.dropdowns(draw, MENUS, start={"keep": 0.5})
    assert things == [widget] and [menu.description for menu in widget.children] == ["keep", "model"]
    widget.children[1].value = "large"
    widget.children[0].value = 0.1
    texts = [bundle["text/plain"] for bundle in handle.shown if bundle["text/plain"].strip()]
    assert texts == ["small at 0.5", "large at 0.5", "No picture: nothing recorded"]


def test_a_saved_notebook_gets_the_first_picture(shown, monkeypatch, capsys):
    monkeypatch.setenv("PLOTLY_RENDERER", notebook_output.SAVING)
    assert course.dropdowns(draw, MENUS) is None
    assert shown[0].shown == [{"text/plain": "small at 0.1"}] and shown[1] == []
    assert "keep = 0.1, model = small" in capsys.readouterr().out


@pytest.mark.parametrize("menus, start, said", [
    ({}, None, "the menus have none"), ({"keep": []}, None, "keep have none"),
    (MENUS, {"keep": 0.7}, r"expected one of \[0.1, 0.5\] for 'keep', got 0.7"),
    (MENUS, {"kept": 0.1}, "for 'kept', got 0.1"),
])  # fmt: skip
def test_menus_without_sense_are_refused(menus, start, said):
    with pytest.raises(ValueError, match=said):
        course.dropdowns(draw, menus, start)
