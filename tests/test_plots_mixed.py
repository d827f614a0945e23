"""The figure of images of different sizes: one line for each way, one panel for each batch, from recorded rows."""

import pytest

pytest.importorskip("plotly")

import figure_frames as frames

from ragged import data, plots
from ragged.bench.suites.mixed import RIVALS, SPREAD, SPREADS
from ragged.plots.mixed import spread_of

FRAME = frames.mixed_frame()


def test_a_line_for_each_way_and_a_panel_for_each_batch():
    figure = plots.mixed_sizes(FRAME)
    assert "NVIDIA H200 · 2026-11-03" in figure.layout.title.subtitle.text
    assert [a.text for a in figure.layout.annotations] == ["batch 16", "batch 64"]
    assert {t.legendgroup for t in figure.data} == set(RIVALS) and len(figure.data) == 2 * len(RIVALS)
    assert sum(t.showlegend for t in figure.data) == len(RIVALS)
    for line in figure.data:
        assert list(line.x) == [0, 64, 160, 336]
    ours = next(t for t in figure.data if t.legendgroup == "triton")
    wanted = FRAME.query("backend == 'triton' and batch == 16 and metric == 'images_per_s'")
    assert sorted(ours.y) == sorted(wanted["value"])


def test_batches_with_one_spread_only_are_drawn_when_asked_for():
    assert [a.text for a in plots.mixed_sizes(FRAME, batch=1).layout.annotations] == ["batch 1"]
    with pytest.raises(ValueError, match="two spreads"):
        plots.mixed_sizes(FRAME[FRAME["batch"] == 1])
    with pytest.raises(ValueError, match="pruner = ats"):
        plots.mixed_sizes(FRAME, pruner="ats")


def test_what_names_no_spread_of_sizes_is_left_out():
    assert spread_of("U(112,448) px") == 336 and spread_of("U(224,224) px") == 0
    assert spread_of("U(30,168)") is None and spread_of("quadtree 16/32 px") is None
    assert not {"quadtree 16/32 px", "197"} & {text for t in plots.mixed_sizes(FRAME).data for text in t.text}


def test_the_recorded_rows_keep_what_is_said_of_them():
    """From batch 16 on, sizes mixed and all captured: 1.5 times padding with a mask, and never behind grouping; nine
    cuts of ATS 1.5 times their eager speed, and not behind padding captured alike."""
    rows = data.results("mixed", "NVIDIA H100")
    speed = rows[(rows["metric"] == "images_per_s") & (rows["status"] == "ok")]
    lists = speed[speed["tokens"].isin([SPREAD, *SPREADS[1:]]) & (speed["batch"] >= 16) & (speed["mode"] != "eager")]
    cells = lists.pivot_table(index=["batch", "tokens", "pruner", "mode"], columns="backend", values="value")
    cells = cells.dropna(subset="triton")
    assert len(cells) >= 8
    assert (cells["triton"] >= 1.5 * cells["sdpa_padded"]).all()
    assert not (cells["triton"] < cells["grouped"]).any()
    ats = speed[speed["pruner"] == "ats"].set_index(["backend", "mode"])["value"]
    for mode in ("graph", "compile+graph"):
        assert ats["triton", mode] >= 1.5 * ats["triton", "eager"]
        assert ats["triton", mode] >= ats["sdpa_padded", mode]
