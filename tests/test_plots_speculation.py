"""Figures of trees of guesses: drawn from invented rows, and measured."""

import pytest

pytest.importorskip("plotly")

import figure_frames as frames
import numpy as np

from ragged import plots
from ragged.plots import speculation as subject

TREE, CHECKED = frames.tree_frame(), frames.verification_frame()
SEEN = np.array([[1, 1, 0, 2, 0], [1, 1, 0, 2, 2]])
DRAWN = {
    "tree_of_guesses": lambda: plots.tree_of_guesses(TREE, "the", title="A tree"),
    "who_sees_whom": lambda: plots.who_sees_whom(SEEN, [0, 1, 2], [0, 2, 5], title="Who sees whom"),
    "acceptance_by_domain": lambda: plots.acceptance_by_domain(frames.domain_frame()),
    "by_depth_and_rank": lambda: plots.by_depth_and_rank(frames.profile_frame()),
    "acceptance_by_entropy": lambda: plots.acceptance_by_entropy(frames.entropy_frame()),
    "verification": lambda: plots.verification(CHECKED),
}


def test_every_figure_is_among_them():
    assert {name for name in plots.__all__ if getattr(subject, name, None) is getattr(plots, name)} >= set(DRAWN)
    own = {n for n, f in vars(subject).items() if getattr(f, "__module__", "") == subject.__name__ and n[0] != "_"}
    assert own - {"fate"} == set(DRAWN)


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_figure_is_named_small_and_readable_without_eyes(draw):
    figure = draw()
    assert figure.data and figure.layout.title.text in plots.alt_text(figure)
    assert len(figure.to_json()) < 40_000 and 300 <= figure.layout.height <= 700 and figure.layout.width <= 900


def test_a_tree_is_drawn_with_parents_between_their_children_and_fates_told_apart():
    figure = plots.tree_of_guesses(TREE, "the", title="A tree")
    points = {t.name: t for t in figure.data if t.mode == "markers+text"}
    assert list(points) == ["certain", *subject.FATES]
    assert [len(t.x) for t in points.values()] == [1, 3, 3, 8]
    assert len({(t.marker.color, t.marker.symbol) for t in points.values()}) == 4
    lines = [t for t in figure.data if t.mode == "lines"]
    place = {(t.x[1], t.y[1]) for t in lines}
    assert len(lines) == 14 and len(place) == 14, "no two guesses stand in one place"
    for line in lines:
        below = [other.y[1] for other in lines if (other.x[0], other.y[0]) == (line.x[1], line.y[1])]
        assert not below or np.isclose(line.y[1], np.mean(below)), "a parent in the middle of its children"


def test_intervals_reach_from_low_to_high():
    frame = frames.domain_frame()
    figure = plots.acceptance_by_domain(frame, measures=("accepted",))
    assert len(figure.data) == 3
    for trace, draft in zip(figure.data, ("distilled", "skip", "lookup")):
        own = frame[(frame["draft"] == draft) & (frame["measure"] == "accepted")]
        assert np.allclose(np.array(trace.y) + trace.error_y.array, own["high"])
        assert np.allclose(np.array(trace.y) - trace.error_y.arrayminus, own["low"])
    assert sum(bool(t.showlegend) for t in figure.data) == 1, "each measure once in the legend"


def test_depth_and_rank_have_a_panel_each():
    figure = plots.by_depth_and_rank(frames.profile_frame())
    assert {(t.xaxis, len(t.x)) for t in figure.data} == {("x", 3), ("x2", 2)}
    assert (figure.layout.xaxis.title.text, figure.layout.xaxis2.title.text) == ("depth", "rank")


def test_entropy_has_a_line_for_each_measure_and_rank():
    figure = plots.acceptance_by_entropy(frames.entropy_frame())
    assert len({t.name for t in figure.data}) == len({(t.line.color, t.line.dash) for t in figure.data}) == 4


def test_verification_has_a_panel_for_each_model_and_a_look_for_each_way():
    figure = plots.verification(CHECKED)
    assert "NVIDIA H200 · 2026-11-03" in figure.layout.title.subtitle.text
    lines = [t for t in figure.data if t.legendgroup]
    assert {t.xaxis for t in lines} == {"x", "x2"} and len({t.legendgroup for t in lines}) == 4
    assert len({t.name for t in lines if t.showlegend}) == 4 == sum(bool(t.showlegend) for t in lines)
    (flex,) = [t for t in lines if t.legendgroup == "flex" and t.xaxis == "x"]
    assert list(flex.x) == [16, 64, 256], "what was not measured is not drawn"
    only = plots.verification(CHECKED, backends=["triton"], clock="host_us")
    assert {t.legendgroup for t in only.data if t.legendgroup} == {"triton"} and "HOST" in only.layout.yaxis.title.text


@pytest.mark.parametrize("call, said", [
    (lambda: plots.tree_of_guesses(TREE.drop(columns="word"), "the", title=""), "word"),
    (lambda: plots.acceptance_by_domain(frames.domain_frame().drop(columns="low")), "low"),
    (lambda: plots.verification(CHECKED, backends=["nobody"]), "nobody"),
    (lambda: plots.verification(frames.attention_frame()), "speculation"),
])  # fmt: skip
def test_what_is_missing_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
