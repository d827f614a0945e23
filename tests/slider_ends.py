"""A slider at both ends: something is drawn, and the two ends differ. notebooks/conftest.py has every slider of a
notebook tried so, in the notebook's own kernel."""

import functools


def shown(result):
    """What of a slider's picture must change, as text: everything but the title."""
    import plotly.graph_objects as go

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
    """Takes what `course.slider` takes, and calls `render` for the first and the last stop."""
    values = list(values)
    assert len(values) >= 2, f"{label}: a slider needs two stops"
    assert start is None or start in values, f"{label}: starts at {start!r}, which is no stop"
    first, last = (shown(render(value)) for value in (values[0], values[-1]))
    assert first != last, f"{label}: {values[0]!r} and {values[-1]!r} show the same"


def watch():
    """From now on `course.slider` tries both ends before it shows the first picture."""
    from ragged import course

    slider = course.slider
    if hasattr(slider, "__wrapped__"):
        return

    @functools.wraps(slider)
    def tried(render, values, start=None, label="value"):
        at_both_ends(render, values, start, label)
        return slider(render, values, start, label)

    course.slider = tried
