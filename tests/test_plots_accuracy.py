"""Figures of accuracy and equivalence: what they need, what they draw, and what they refuse."""

import figure_frames as frames
import pandas
import pytest

pytest.importorskip("plotly")

from ragged import data, plots
from ragged.data.intervals import wilson
from ragged.plots.quality import pareto_front, pruner_looks
from ragged.plots.style import LEAST, legend_names

PRUNERS = ("threshold_l2", "threshold_l2_tau", "dynamicvit", "evit", "ats")


def equivalence_frame():
    scale = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
    return frames.rows([
        dict(suite="equivalence", model="deit_small", pruner=pruner, backend=backend, batch=127.0, keep=0.5,
             dtype=dtype, metric=metric, value=size * (1 + i) / (1 if metric[:3] == "max" else 8))
        for i, pruner in enumerate(("threshold_l2", "dynamicvit", "evit", "ats"))
        for backend in ("triton", "flash_attn") for dtype, size in scale.items()
        for metric in ("max_abs_logit_diff", "mean_abs_logit_diff")
    ])  # fmt: skip


def accuracy_frame(schedules=("published", "single cut")):
    """Invented: every pruner loses accuracy with the square of what it drops, and gains speed in proportion."""
    shared = dict(suite="accuracy", model="deit_tiny_digits", batch=64.0, unit="1")
    records = []

    def add(share, speed, kept, **columns):
        metrics = (("top1", share, "eager"), ("images_per_s", speed, "compile+graph"), ("kept_tokens", kept, "eager"))
        for metric, value, mode in metrics:
            bars = dict(q20=value - 0.01, q80=value + 0.01) if metric == "top1" else {}
            records.append(shared | columns | dict(metric=metric, value=value, mode=mode) | bars)

    add(0.95, 1e4, 197, pruner="none", backend="unpruned", keep=1.0, tokens="197")
    for p, pruner in enumerate(PRUNERS):
        for schedule in schedules:
            for keep in (0.9, 0.5, 0.1):
                late = 0.0 if schedule == "published" else 0.02
                add(0.95 - (0.3 + 0.05 * p + late) * (1 - keep) ** 2, 1e4 * (2 - keep), 197 * keep, pruner=pruner,
                    backend="triton", keep=keep, tokens=schedule)  # fmt: skip
    return frames.rows(records)


def test_differences_have_a_panel_for_each_dtype_and_the_paper_beside_float16():
    claim = dict(data.paper("v1_equivalence").query("metric == 'max_abs_logit_diff'")[["pruner", "value"]].values)
    figure = plots.logit_differences(equivalence_frame(), claim=claim)
    assert [a.text for a in figure.layout.annotations[:3]] == ["float32", "float16", "bfloat16"]
    assert [t.name for t in figure.data].count("the paper's figure (float16)") == 1
    assert sum(t.showlegend is not False for t in figure.data) == 3  # two backends and the paper
    assert "log" in plots.alt_text(figure) and "NVIDIA H200" in figure.layout.title.subtitle.text


def test_errors_against_float64_are_dashes_of_the_backend_s_colour():
    frame = equivalence_frame()
    exact = frame[frame.backend == "triton"].assign(backend="triton:fp64")
    marks = {t.name: t.marker for t in plots.logit_differences(pandas.concat([frame, exact])).data}
    own, error = marks["ours (Triton)"], marks["ours (Triton), error against float64"]
    assert own.color == error.color and error.symbol == "line-ew-open" != own.symbol


def test_differences_name_what_is_missing():
    with pytest.raises(ValueError, match="no rows with model = deit_huge"):
        plots.logit_differences(equivalence_frame(), model="deit_huge")


def test_rounding_draws_an_exact_zero_as_no_bar_and_says_so():
    errors = [dict(name="float32", padded=1e-6, ragged=2e-6, apart=0.0), dict(name="b", padded=1, ragged=1, apart=1)]
    figure = plots.rounding(errors)
    apart = figure.data[2]
    assert apart.y[0] is None and apart.text[0] == "0" and figure.data[0].y[0] == 1e-6
    low, high = figure.layout.yaxis.range
    assert low < -6 and high > 0


@pytest.mark.parametrize("against", ["kept_tokens", "images_per_s"])
def test_accuracy_has_one_line_for_each_pruner_and_schedule(against):
    frame = accuracy_frame()
    figure = plots.accuracy(frame, against=against)
    lines = [t for t in figure.data if t.name != "Pareto front"]
    assert len(lines) == 1 + 2 * len(PRUNERS) - 2  # Threshold-L2, twice, has a single cut in either schedule
    looks = {(t.line.color, t.line.dash, t.marker.symbol) for t in lines}
    assert len(looks) == len(lines)
    whole = next(t for t in lines if t.name == "unpruned")
    assert list(whole.y) == [95.0] and whole.error_y.array[0] == pytest.approx(1.0)
    assert ("Pareto front" in [t.name for t in figure.data]) == (against == "images_per_s")
    assert figure.layout.xaxis.title.text and "%" in figure.layout.yaxis.title.text


def test_accuracy_joins_only_rows_that_belong_together():
    frame = accuracy_frame()
    frame.loc[(frame.metric == "top1") & (frame.pruner == "ats"), "keep"] = 0.77
    names = {t.name.split(",")[0] for t in plots.accuracy(frame, against="kept_tokens").data}
    assert "EViT" in names and "ATS" not in names
    with pytest.raises(ValueError, match="no rows with metric"):
        plots.accuracy(frame[frame.metric == "images_per_s"])


def test_speed_is_of_one_mode():
    """A pruner that was recorded eagerly only must not be compared with captured ones."""
    frame = accuracy_frame()
    slow = (frame.metric == "images_per_s") & (frame.pruner == "ats")
    frame.loc[slow, "mode"] = "eager"
    names = {t.name.split(",")[0] for t in plots.accuracy(frame, against="images_per_s").data}
    assert "EViT" in names and "ATS" not in names
    assert "compile+graph" in plots.accuracy(frame, against="images_per_s").layout.title.subtitle.text


def test_a_zoomed_figure_says_what_it_leaves_out():
    figure = plots.accuracy(accuracy_frame(), against="images_per_s", least=80)
    low = 2 + 3 * 2  # the point at keep 0.1 of every line: two of Threshold-L2, two each of the three others
    assert f"{low} points below 80 %" in figure.layout.title.subtitle.text and figure.layout.yaxis.range[0] == 80


def test_the_front_holds_what_no_other_point_beats():
    speed, share = [1, 2, 3, 3, 4, 2], [9, 8, 8, 7, 1, 9]
    front = pareto_front(speed, share)
    beaten = {
        i for i in range(6)
        if any(s >= speed[i] and a >= share[i] and (s, a) != (speed[i], share[i]) for s, a in zip(speed, share))
    }  # fmt: skip
    assert set(front) == set(range(6)) - beaten == {2, 4, 5}
    assert [speed[i] for i in front] == sorted(speed[i] for i in front)


def test_counts_are_drawn_for_each_pruner_with_their_correlation():
    counts = {"ATS": ("ats", [50, 60, 70], 1.0, (0.5, 1.0)), "ATS again": ("ats", [70, 60, 50], -1.0)}
    figure = plots.counts_against_size([20, 60, 120], counts)
    texts = [a.text for a in figure.layout.annotations]
    assert texts == ["ATS<br>correlation +1.00<br>+0.50 to +1.00", "ATS again<br>correlation -1.00"]
    assert list(figure.data[1].y) == [70, 60, 50] and figure.layout.xaxis2.title.text


def test_the_distribution_says_what_padding_would_cost():
    figure = plots.count_distribution({"ats": [50, 100, 150], "threshold_l2": [99, 99, 99]})
    texts = [a.text for a in figure.layout.annotations]
    assert "mean 100, longest 150: 33% padding" in texts and "mean 99, longest 99: 0% padding" in texts


def test_pruners_look_different_from_each_other_and_from_backends():
    looks = pruner_looks([*PRUNERS, "none", "own_one", "another"])
    assert len({(x.colour, x.dash, x.symbol) for x in looks.values()}) == len(looks)
    backends = {x.colour for name, x in plots.LOOKS.items() if name != "unpruned"}
    assert not backends & {x.colour for x in looks.values()}
    assert list(looks)[0] == "none" and list(looks)[-1] == "own_one"


def test_a_pruner_of_one_s_own_gets_a_panel_beside_the_published_ones():
    frame = frames.sparsity_frame()
    own = frame[(frame.pruner == "evit")].assign(pruner="mine")
    figure = plots.sparsity_speedup(pandas.concat([own, frame[frame.pruner.isin(["none", "threshold_l2", "ats"])]]))
    assert [a.text for a in figure.layout.annotations] == ["Threshold-L2", "ATS", "mine"]


NETWORKS = ("deit_tiny_digits", "deit_tiny_digits_labels")


def two_networks():
    frame = accuracy_frame()
    counted = frame[frame.metric == "top1"].assign(metric="images", value=2000.0)
    both = pandas.concat([frame, counted])
    return pandas.concat([both, both.assign(model=NETWORKS[1])], ignore_index=True)


def test_networks_stand_side_by_side_with_one_legend_and_95_percent_intervals():
    figure = plots.accuracy(two_networks(), model=list(NETWORKS), tokens=["197", "single cut"])
    assert len([a for a in figure.layout.annotations if "taught" in a.text]) == 2
    names = legend_names(figure)
    assert len(names) == len(set(names)) == 1 + len(PRUNERS) and len(figure.data) == 2 * len(names)
    assert "95 % intervals of 2,000 scenes" in figure.layout.title.subtitle.text
    whole = figure.data[0]
    low, high = wilson(0.95, 2000)
    assert whole.error_y.array[0] == pytest.approx(100 * high - 95)
    assert whole.error_y.arrayminus[0] == pytest.approx(95 - 100 * low)


def fidelity_frame():
    shared = dict(suite="fidelity", backend="auto", batch=64.0)
    return frames.rows([
        shared | dict(model=model, pruner=pruner, keep=keep, tokens=schedule, metric=metric, value=value,
                      q20=value - 0.1, q80=value + 0.1)
        for model in NETWORKS for pruner in (*PRUNERS, "random", "random_adaptive", "dynamicvit:untrained")
        for schedule in ("published", "single cut") for keep in (0.9, 0.5)
        for metric, value in (("feature_cosine", keep), ("top1_agreement", keep), ("kept_tokens", 196 * keep),
                              ("images", 19.0))
    ])  # fmt: skip


def test_fidelity_has_quantiles_for_cosines_and_intervals_for_agreement():
    cosine = plots.fidelity(fidelity_frame(), tokens="single cut")
    assert list(cosine.data[0].y) == [0.5, 0.9] and cosine.data[0].error_y.array[0] == pytest.approx(0.1)
    agree = plots.fidelity(fidelity_frame(), metric="top1_agreement", model=NETWORKS[0])
    assert agree.data[0].error_y.array[0] == pytest.approx(100 * wilson(0.5, 19)[1] - 50)
    with pytest.raises(ValueError, match="metric: expected feature_cosine or top1_agreement, got 'top1'"):
        plots.fidelity(fidelity_frame(), metric="top1")


def seeds_frame():
    shared = dict(backend="auto", mode="eager", tokens="single cut")
    rows = [
        shared | dict(suite=suite, model=model, pruner=pruner, keep=keep, metric=metric, value=value)
        for suite, model, more in (("accuracy", "net", ["dynamicvit"]), ("seeds", "net seed 1", []),
                                   ("seeds", "network seed 7", []))
        for pruner in ("evit", "random", *more) for keep in (0.5, 0.7)
        for metric, value in (("top1", keep), ("images", 100.0))
    ]  # fmt: skip
    return frames.rows(rows)


def test_seeds_compare_what_all_of_them_were_counted_with():
    figure = plots.seeds(seeds_frame(), model="net", keep=(0.7, 0.5))
    assert [t.name for t in figure.data if t.showlegend] == ["seed 0", "seed 1"]
    assert {x for t in figure.data for x in t.x} == {"EViT", "random"} and list(figure.data[0].y) == [70, 70]


def lines(text):
    return [part for part in (text or "").split("<br>") if part]


@pytest.mark.parametrize("width", [None, LEAST])
def test_nothing_around_a_plot_stands_over_anything_else(width):
    """Room for the legend and the titles at the figure's own width, and at the narrowest that a page draws. Measured:
    a row of the legend takes 29 pixels, a letter of 12 pixels at most 7, of which 6 in the subtitle."""
    errors = [dict(name=f"Threshold-L2<br>{i}", padded=1e-6, ragged=1e-6, apart=1e-6) for i in range(8)]
    drawn = (
        plots.accuracy(two_networks(), model=list(NETWORKS)), plots.accuracy(accuracy_frame(), against="images_per_s"),
        plots.fidelity(fidelity_frame()), plots.seeds(seeds_frame(), model="net", keep=(0.7, 0.5)),
        plots.logit_differences(equivalence_frame(), claim={"evit": 0.005}), plots.rounding(errors, below="x · " * 60),
        plots.counts_against_size([1, 2, 3], {"a": ("ats", [1, 2, 3], 1.0, (0.9, 1.0))}),
    )  # fmt: skip
    for figure in drawn:
        layout, names = figure.layout, legend_names(figure)
        shown = width or layout.width
        below = lines(layout.title.subtitle.text)
        assert max(map(len, below), default=0) * 6 <= shown - 32, below
        heads = max((len(lines(a.text)) for a in layout.annotations if a.yref == "paper"), default=0)
        assert layout.margin.t >= 40 + 15 * len(below) + 16 * heads
        if names:
            assert layout.legend.entrywidth >= 6.5 * max(map(len, names)) and layout.legend.yref == "container"
            rows = -(-len(names) // max(1, int((shown - 88) // (layout.legend.entrywidth + 50))))
            room = layout.legend.y * layout.height  # from the top of the legend to the lower edge
            assert room >= 29 * rows and layout.margin.b - room >= 55, layout.title.text


def test_a_strip_is_wide_enough_for_its_words():
    import numpy as np

    names, ids = ["threshold_l2 says 6", "evit"], [[0, 1, 2], [0, 1, -1]]
    figure = plots.kept_patches(np.zeros((3, 64, 64), dtype=np.float32), ids, names, side=60)
    assert figure.layout.width >= 2 * 8 * len(names[0])
