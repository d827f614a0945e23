"""Figures of pruning and packing say what they were given, count what they draw, and refuse what does not fit."""

import numpy as np
import pytest

pytest.importorskip("plotly")

import figure_frames as frames

from ragged import data, plots
from ragged.plots.pruning import WAYS, pruner_look

IMAGE = np.linspace(0, 1, 3 * 64 * 96, dtype=np.float32).reshape(3, 64, 96)  # 4 x 6 patches
SCORES = np.arange(24.0)[::-1] ** 2
KEEP = np.array([[1, 0, 1, 1], [1, 0, 0, 1]], dtype=bool)


def texts(figure):
    return [note.text for note in figure.layout.annotations]


def pack_frame():
    """Invented rows of the suite `pack`."""
    records = []
    for backend, waits in (("triton", 1), ("triton:counts_known", 0), ("mask_indexing", 1), ("python_loop", 64)):
        shared = dict(suite="pack", model="deit_base", pruner="none", backend=backend, batch=64.0, tokens="U(30,168)")
        records.append(shared | dict(metric="syncs", value=float(waits)))
        records.append(shared | dict(metric="host_us", value=20.0 + 30 * waits))
        if not waits:
            records.append(shared | dict(metric="host_us", value=6.0, mode="graph"))
    frame = frames.rows(records)
    frame["mode"] = frame["mode"].fillna("eager")
    return frame


FIGURES = {
    "score_maps": lambda: plots.score_maps([IMAGE, IMAGE], [{"evit": SCORES}] * 2, ["one", "two"]),
    "score_profiles": lambda: plots.score_profiles({"evit": SCORES, "mine": SCORES + 1}),
    "sampling_staircase": lambda: plots.sampling_staircase({"a": ([0.0, 0.5, 1.0], [0.5, 0.75, 1.0], [1, 1, 2])}),
    "token_schedules": lambda: plots.token_schedules({"evit, published": [197, 197, 99]}),
    "pack_picture": lambda: plots.pack_picture(KEEP),
    "length_strips": lambda: plots.length_strips([[100, 100], [50, 150]], ["equal", "spread"]),
    "packing_ways": lambda: plots.packing_ways(pack_frame()),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_every_figure_has_a_title_and_can_be_said_in_words(draw):
    figure = draw()
    assert figure.layout.title.text and figure.layout.title.text in plots.alt_text(figure)
    assert len(figure.to_json()) < 40_000


def test_a_score_map_ranks_the_patches_in_reading_order():
    figure = FIGURES["score_maps"]()
    grid = np.array(figure.data[0].z)
    assert grid.shape == (4, 6) and grid[0, 0] == 100 and grid[-1, -1] == 0
    assert grid[0, 1] == round(100 * 22 / 23)
    assert len(figure.data) == 2 and len(figure.layout.images) == 4
    assert texts(figure) == ["one", "<b>EViT</b>", "two"]


def test_the_first_row_of_a_score_map_lies_on_the_first_row_of_its_image():
    trace, (picture, *_) = FIGURES["score_maps"]().data[0], FIGURES["score_maps"]().layout.images
    assert trace.y0 + 0.5 == picture.y + picture.sizey and trace.dy == -1


def test_a_profile_says_what_the_best_tenth_holds():
    even = plots.score_profiles({"evit": np.ones(50)})
    assert even.data[0].name == "EViT: the best 10 % hold 10 %"
    one = plots.score_profiles({"evit": np.r_[np.zeros(9), 1.0]})
    assert one.data[0].name == "EViT: the best 10 % hold 100 %"


def test_a_staircase_counts_the_steps_that_were_hit():
    figure = FIGURES["sampling_staircase"]()
    assert texts(figure) == ["<b>a</b><br>3 samples hit 2 of 3 patches"]
    kept = next(trace for trace in figure.data if trace.name.startswith("kept"))
    assert list(kept.y) == [0.5, 1.0]


def test_schedules_start_at_the_embedding_and_say_what_is_saved():
    figure = plots.token_schedules({"ats": [197, 99, 98]}, saved={"ats": 0.5})
    assert list(figure.data[0].x) == [-1, 0, 1] and figure.data[0].name == "ATS: 50% of the FLOPs"


def test_the_kept_rows_land_behind_each_other():
    figure = plots.pack_picture(KEEP)
    said = texts(figure)
    assert said[-6:] == ["0", "3", "5", "dense", "packed", "cu_seqlens"]
    lines = [shape for shape in figure.layout.shapes if shape.type == "line"]
    assert len(lines) == KEEP.sum()
    gaps = np.diff([line.x1 for line in lines])
    assert (gaps == gaps[0]).all()


def test_padding_is_counted_per_batch():
    figure = FIGURES["length_strips"]()
    assert texts(figure) == ["<b>equal</b><br>0% padding", "<b>spread</b><br>33% padding"]
    assert list(figure.data[3].y) == [100, 0]


def test_ways_to_pack_show_their_waits_and_who_cannot_be_recorded():
    figure = FIGURES["packing_ways"]()
    eager, graph = figure.data
    assert [label.partition("<br>")[0] for label in eager.y][::-1] == [WAYS[w] for w in WAYS if w in set(
        pack_frame()["backend"])]  # fmt: skip
    known = next(label for label in eager.y if label.startswith("the same"))
    assert "waits per call: 0</i>" in known
    loop = next(label for label in eager.y if label.startswith("one image"))
    assert "waits per call: 64, so no graph" in loop
    assert [t for t in graph.text if t] == ["6"]


def test_recorded_packing_rows_can_be_drawn():
    rows = data.results("pack", "NVIDIA H200")
    if rows.empty:
        pytest.skip("nothing recorded")
    for tokens in ("99", "U(30,168)"):
        figure = plots.packing_ways(rows, tokens=tokens)
        assert len(figure.data) == 2 and "NVIDIA H200" in figure.layout.title.subtitle.text


def test_a_longer_label_keeps_the_look_of_its_pruner():
    assert pruner_look("ats, one cut").label == "ATS, one cut"
    assert pruner_look("ats, one cut").colour == plots.PRUNER_LOOKS["ats"].colour
    assert pruner_look("mine").label == "mine"


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: plots.score_maps([IMAGE], [], ["one"]), "as many of each, got 1, 0, 1"),
        (lambda: plots.score_maps([IMAGE], [{"evit": SCORES[1:]}], ["one"]), "each of 24 patches"),
        (lambda: plots.score_profiles({"evit": [-1.0, 2.0]}), "numbers >= 0"),
        (lambda: plots.score_profiles({"evit": [0.0, 0.0]}), "not all zero"),
        (lambda: plots.pack_picture(np.ones((9, 2))), "small picture"),
        (lambda: plots.pack_picture(np.ones(4)), "small picture"),
        (lambda: plots.length_strips([[3]], []), "as many of each"),
        (lambda: plots.packing_ways(pack_frame(), batch=3), "batch = 3"),
        (lambda: plots.packing_ways(pack_frame().query("metric != 'syncs'")), "metric = syncs"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
