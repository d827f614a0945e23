"""Several knobs at once: drop-down menus round one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .lesson import _shown
from .output import saving


def dropdowns(render: Callable, choices: Mapping[str, Sequence], start: Mapping[str, object] | None = None):
    """Show `render(**setting)` and, on a running kernel, a drop-down menu for every name in `choices` that draws it
    again.

    render: keyword arguments -> a plotly figure or text, and nothing else: it neither prints nor keeps state. A
    ValueError that it raises for a setting is shown in place of a picture.  choices: name -> the values that the menu
    offers.  start: name -> the value to begin with, where that is not the first. Returns the widget (None in a notebook
    that runs to be saved: widget state does not survive a static view, so the first picture is what is saved).
    ValueError for a menu without values and for a start that no menu offers.
    """
    from IPython.display import display

    choices = {name: list(values) for name, values in choices.items()}
    empty = [name for name, values in choices.items() if not values]
    if empty or not choices:
        raise ValueError(f"choices: expected values for every name, {', '.join(empty) or 'the menus'} have none")
    setting = {name: values[0] for name, values in choices.items()} | dict(start or {})
    for name, value in setting.items():
        if value not in choices.get(name, ()):
            raise ValueError(f"start: expected one of {choices.get(name, list(choices))} for {name!r}, got {value!r}")
    if saving():
        print(", ".join(f"{name} = {value}" for name, value in setting.items()), "  (run this cell to choose)")
        display(_drawn(render, setting), raw=True)
        return None
    import ipywidgets

    def menu(name):
        options = [(str(value), value) for value in choices[name]]
        return ipywidgets.Dropdown(options=options, value=setting[name], description=name)

    menus = {name: menu(name) for name in choices}
    widget = ipywidgets.Box(list(menus.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    display(widget)
    picture = display(_drawn(render, setting), raw=True, display_id=True)

    def redraw(_):
        new = _drawn(render, {name: menu.value for name, menu in menus.items()})
        picture.update({"text/plain": " "}, raw=True)  # JupyterLab's plotly keeps a figure that is not taken away first
        picture.update(new, raw=True)

    for one in menus.values():
        one.observe(redraw, names="value")
    return widget


def _drawn(render: Callable, setting: Mapping) -> dict:
    """The MIME bundle of a setting's picture, or of the reason why there is none."""
    try:
        return _shown(render(**setting))
    except ValueError as error:
        return _shown(f"No picture: {error}")
