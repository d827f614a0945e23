"""Figures of what happens inside a kernel: they show the numbers given to them, and refuse what they cannot draw."""

import re

import numpy as np
import pytest

pytest.importorskip("plotly")

from ragged import plots
from ragged.plots import kernel as plots_kernel

STEPS = [
    {"weights": [0.5, 1.0], "new": 2, "top": 1.0, "total": 1.5},
    {"weights": [0.25, 0.5, 1.0], "new": 1, "top": 2.0, "total": 1.75},
]
PANELS = [
    {"name": "64 wide", "tokens": 197, "rows": [64] * 4, "keys": [64] * 4},
    {"name": "pieces", "tokens": 197, "rows": [64] * 4, "keys": [128, 64, 16]},
]
CURVES = {"64": [(1, 0.9), (64, 0.0)], "16": [(1, 0.5), (16, 0.0)]}
PLANS = {"one": [(0, 0, 16, 0), (1, 0, 4, 1)], "several": [(0, 0, 4, 0), (1, 0, 4, 2)]}
ERRORS = {"good": 1e-4, "bad": 3e-2}
TOUCHED = np.array([[1, 1, 0, 1, 0, 0]] * 2, dtype=bool)  # rows of images of 3 and 2 tokens, and one past the end
NEEDED = np.array([[1, 1, 1, 0, 0, 0]] * 2, dtype=bool)
FIGURES = {
    "softmax_steps": lambda: plots.softmax_steps(STEPS, below="two tiles"),
    "tile_cover": lambda: plots.tile_cover(PANELS, columns=1, below="197 tokens"),
    "tile_waste": lambda: plots.tile_waste(CURVES, strong=["64"], marks=[5], below="squares"),
    "program_schedule": lambda: plots.program_schedule(PLANS, slots=4, below="two images"),
    "touched_rows": lambda: plots.touched_rows((3, 0, 2), TOUCHED, NEEDED, below="two heads"),
    "error_budget": lambda: plots.error_budget(ERRORS, 1e-3, below="float16"),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_every_figure_is_named_and_readable_without_eyes(draw):
    figure = draw()
    text = plots.alt_text(figure)
    assert figure.data and figure.layout.title.subtitle.text
    assert figure.layout.title.text in text and "x: " in text
    assert len(figure.to_json()) < 40_000


def test_bars_of_a_running_softmax_stand_at_their_keys():
    figure = plots.softmax_steps(STEPS)
    bars = {(bar.xaxis, bar.name): (list(bar.x), list(bar.y)) for bar in figure.data}
    assert bars["x", "keys of this tile"] == ([0, 1], [0.5, 1.0])
    assert bars["x2", "keys seen before, rescaled"] == ([0, 1], [0.25, 0.5])
    assert bars["x2", "keys of this tile"] == ([2], [1.0])
    assert "max 2, sum 1.75" in figure.layout.annotations[1].text


def test_the_waste_is_the_orange_area():
    assert plots_kernel.cover_waste(PANELS[0]) == pytest.approx(1 - 197**2 / 256**2)
    assert plots_kernel.cover_waste(PANELS[1]) == pytest.approx(1 - 197**2 / (256 * 208))
    figure = plots.tile_cover(PANELS)
    areas = {}
    for trace in figure.data:
        if trace.fill == "toself":
            areas[trace.xaxis, trace.name] = max(trace.x) * max(trace.y)
    assert areas["x", "computed for nothing"] == 256 * 256 and areas["x2", "computed for nothing"] == 256 * 208
    assert areas["x", "needed: queries × keys"] == areas["x2", "needed: queries × keys"] == 197**2
    assert "41%" in figure.layout.annotations[0].text and "27%" in figure.layout.annotations[1].text


def test_lines_between_tiles_stand_where_tiles_end():
    (lines,) = plots.tile_cover(PANELS[1:]).layout.shapes
    down, across = (set(re.findall(pattern, lines.path)) for pattern in (r"M(\d+),0V256", r"M0,(\d+)H208"))
    assert down == {"0", "128", "192", "208"} and across == {"0", "64", "128", "192", "256"}


def test_curves_that_are_not_strong_are_grey():
    figure = plots.tile_waste(CURVES, strong=["64"])
    colours = {trace.name: trace.line.color for trace in figure.data}
    assert colours == {"16": "#c8c8c8", "64": plots.LOOKS["triton"].colour}
    assert list(figure.data[-1].y) == [90.0, 0.0]


def test_a_schedule_names_every_image_once_and_its_end():
    figure = plots.program_schedule(PLANS, slots=4, unit="steps")
    assert sorted(bar.name for bar in figure.data if bar.showlegend) == ["image 0", "image 1", "image 2"]
    assert [a.text for a in figure.layout.annotations] == ["one: done after 16 steps", "several: done after 4 steps"]
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range


def test_a_schedule_can_have_rows_of_another_kind():
    plans = {"all": [(0, 0, 3, 0), (1, 3, 4, 0)]}
    figure = plots.program_schedule(plans, slots=2, rows=["copy", "compute"], each="item")
    assert list(figure.layout.yaxis.ticktext) == ["copy", "compute"] and figure.layout.yaxis.title.text is None
    assert {bar.name for bar in figure.data} == {"item 0"}


def test_rows_have_the_colour_of_their_image_and_of_what_happened():
    figure = plots.touched_rows((3, 0, 2), TOUCHED, NEEDED, words=("read", "stolen", "missed"))
    scale = figure.data[0].colorscale
    first = [scale[2 * kind][1] for kind in figure.data[0].z[0]]
    blue, green, brown, _ = plots_kernel.IMAGE_COLOURS
    assert first[:4] == [blue, blue, plots_kernel.MISSED, plots_kernel.WRONG]
    assert first[4] == plots_kernel._paler(brown) and first[5] == "#ededed", "image 2, not touched; past the end"
    names = [trace.name for trace in figure.data if trace.name]
    assert names == ["image 0: 3 tokens", "image 2: 2 tokens", "past the end", "stolen", "missed"]
    assert "strong colour: read" in figure.layout.title.subtitle.text
    right = plots.touched_rows((3, 0, 2), NEEDED, NEEDED)
    assert "its own, not touched" not in [trace.name for trace in right.data]


def test_of_several_panels_one_names_the_axis():
    figure = plots.program_schedule(PLANS, slots=4, unit="steps")
    assert [axis.title.text for axis in figure.select_xaxes()] == [None, "steps"]
    assert "x: steps" in plots.alt_text(figure)


def test_an_error_over_the_budget_looks_different():
    markers = {trace.name: trace.marker.symbol for trace in plots.error_budget(ERRORS, 1e-3).data}
    assert markers == {"good": "circle", "bad": "x"}


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: plots.softmax_steps([]), "at least one tile"),
        (lambda: plots.tile_cover([]), "at least one"),
        (lambda: plots.tile_waste({}), "expected names"),
        (lambda: plots.tile_waste(CURVES, strong=["8"]), "expected names among .*got .*8"),
        (lambda: plots.program_schedule({"empty": []}, slots=2), "at least one program"),
        (lambda: plots.error_budget({"exact": 0.0}, 1e-3), "above zero"),
        (lambda: plots.touched_rows((9,), TOUCHED, NEEDED), "at least 9 rows"),
        (lambda: plots.touched_rows((3,), TOUCHED, NEEDED[0]), "two arrays"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
