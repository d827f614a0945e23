"""Figures that weigh pipelines and claims against each other, on invented complete rows."""

import math

import pytest

pytest.importorskip("plotly")
import figure_frames as frames
import pandas

from ragged import plots
from ragged.plots import paper as plots_paper

MODES = (("eager", 5e-3), ("graph", 6e-4), ("compile+graph", 5e-4))
SPEEDS = {"unpruned": 10e3, "dense": 15e3, "triton": 15.3e3, "sdpa_padded": 14.8e3, "paper_padded": 4.8e3}


def complete(suite, sizes, models=("deit_base", "deit_small", "deit_tiny"), modes=MODES):
    """Every model, batch, mode and backend; sizes: (full, equal, spread) token counts."""
    records = []
    for model in models:
        for batch in (1.0, 4.0, 16.0, 64.0, 256.0):
            for mode, host_s in modes:
                for full, equal, spread in sizes:
                    for backend, peak in SPEEDS.items():
                        if backend == "paper_padded" and mode != "eager":
                            continue
                        for tokens in [full] if backend == "unpruned" else [equal, spread]:
                            if tokens == spread and backend == "dense":
                                continue
                            slow = 0.7 if tokens == spread and backend == "sdpa_padded" else 1.0
                            value = batch / max(host_s, batch / (peak * slow))
                            shared = dict(suite=suite, model=model, batch=batch, mode=mode, backend=backend,
                                          tokens=tokens, keep=1.0 if tokens == full else 0.5)  # fmt: skip
                            records.append(shared | dict(metric="images_per_s", value=value, q20=value, q80=value))
                            ratio = 1.0 if tokens == full else 1.5
                            records.append(shared | dict(metric="flops_ratio", value=ratio))
    return frames.rows(records)


MODEL = complete("model", [("197", "99", "U(30,168)")])
RESOLUTION = complete(
    "resolution", [("197", "99", "U(30,168)"), ("577", "289", "U(88,493)")], ("deit_base",), MODES[::2]
)
CLAIMS = pandas.DataFrame([
    dict(claim="a", claimed=1.5, paper_setup=1.4, fair=1.3, verdict=plots_paper.STANDS),
    dict(claim="e", claimed=2.9, paper_setup=2.2, fair=2.3, verdict=plots_paper.IN_KIND),
    dict(claim="b", claimed=85.0, paper_setup=67.0, fair=1.2, verdict=plots_paper.BASELINE),
    dict(claim="f", claimed=1.1, paper_setup=1.1, fair=0.9, verdict=plots_paper.SETUP),
    dict(claim="c", claimed=0.6, paper_setup=1.1, fair=1.3, verdict=plots_paper.NOT_HERE),
    dict(claim="d", claimed=1.2, paper_setup=math.nan, fair=math.nan, verdict=plots_paper.UNTESTED),
])  # fmt: skip


def trace(figure, name):
    return next(t for t in figure.data if t.name and t.name.startswith(name))


@pytest.mark.parametrize("tokens", ["99", "U(30,168)"])
def test_speedup_by_batch_is_divided_within_a_mode(tokens):
    figure = plots.speedup_by_batch(MODEL, model="deit_tiny", tokens=tokens)
    assert [note.text for note in figure.layout.annotations[:3]] == ["eager", "graph", "compile+graph"]
    ours = trace(figure, "ours")
    assert ours.y[0] == pytest.approx(1.0) and ours.y[-1] == pytest.approx(1.53)  # host-bound, then not
    assert set(trace(figure, "ceiling").y) == {1.5}
    assert "DeiT-Ti" in figure.layout.title.subtitle.text and tokens in figure.layout.title.subtitle.text


def test_a_mode_without_pruned_rows_has_no_panel():
    few = MODEL[(MODEL["mode"] == "eager") | (MODEL["backend"] == "unpruned")]
    figure = plots.speedup_by_batch(few)
    assert [n.text for n in figure.layout.annotations] == ["eager"]


def test_an_image_size_is_told_from_its_unpruned_rows():
    for ragged, kept in ((False, ("99", "289")), (True, ("U(30,168)", "U(88,493)"))):
        figure = plots.resolution_speedup(RESOLUTION, ragged=ragged)
        names = [n.text for n in figure.layout.annotations]
        assert names == [f"224 pixels, 197 tokens, pruned: {kept[0]}", f"384 pixels, 577 tokens, pruned: {kept[1]}"]


def test_the_best_alternative_is_named():
    figure = plots.best_choice(MODEL)
    cells = figure.data[0]
    assert cells.y[0] == "DeiT-Ti, eager" and cells.y[-1] == "DeiT-B, compile+graph"
    assert list(cells.x) == ["1", "4", "16", "64", "256"]
    row = list(cells.y).index("DeiT-B, eager")
    assert cells.text[row][-1] == "<b>1.02×</b><br>dense, equal counts"
    ragged = plots.best_choice(MODEL, tokens="U(30,168)", rivals=("unpruned", "sdpa_padded")).data[0]
    assert "padded to the longest" in ragged.text[row][-1] and ragged.z[row][-1] > 0


def test_a_partial_recording_leaves_cells_blank():
    few = MODEL[(MODEL["batch"] != 4) | (MODEL["model"] == "deit_base")]
    cells = plots.best_choice(few).data[0]
    assert cells.text[list(cells.y).index("DeiT-S, eager")][1] == ""
    assert cells.text[list(cells.y).index("DeiT-B, eager")][1] != ""


def test_a_ladder_keeps_its_order_and_says_what_is_missing():
    steps = pandas.DataFrame({"label": ["a", "b"], "backend": ["paper_padded", "triton"], "value": [4e3, math.nan]})
    figure = plots.ladder(steps, title="Steps", unit="images/s")
    assert list(figure.data[0].y) == ["a", "b"] and figure.data[1].text == ("4,000", "not recorded")
    assert figure.data[0].error_x.array is None
    wide = steps.assign(q20=[3.5e3, math.nan], q80=[4.2e3, math.nan], disturbed=[True, False])
    figure = plots.ladder(wide.fillna(0), title="Steps", unit="images/s")
    assert list(figure.data[0].error_x.array) == [200, 0] and list(figure.data[0].error_x.arrayminus) == [500, 0]
    assert figure.data[1].text[0] == "4,000*" and figure.data[1].x[0] == 4200  # behind its whisker


def test_an_expectation_has_lines_and_recorded_markers():
    curves = pandas.DataFrame({"panel": "eager", "keep": [0.1, 1.0], "backend": "triton", "note": "equal counts",
                               "value": [2.4, 1.0]})  # fmt: skip
    points = curves.assign(note="recorded")
    figure = plots.expectation(curves, points, title="Expected")
    assert [t.mode for t in figure.data] == ["lines", "markers"]
    assert len(plots.expectation(curves, points[:0], title="Expected").data) == 1
    both = pandas.concat([curves, curves.assign(panel="graph")])
    figure = plots.expectation(both, points, title="Expected")
    assert [n.text for n in figure.layout.annotations] == ["eager", "graph"]
    assert sum(t.showlegend for t in figure.data) == 2  # once in the legend, however many panels


def test_the_paper_s_markers_are_hollow():
    pairs = pandas.DataFrame([
        dict(case="batch 4", backend="triton", source=s, value=v) for s, v in (("paper", 40.0), ("NVIDIA H200", 30.0))
    ])  # fmt: skip
    figure = plots.paper_beside(pairs, title="A call", unit="µs")
    assert [t.marker.symbol for t in figure.data] == ["circle-open", "circle"]
    assert figure.layout.xaxis.type == "log" and "µs (log)" in plots.alt_text(figure)
    zero = plots.paper_beside(pairs.assign(value=0.0), title="A call", unit="µs")
    assert zero.layout.xaxis.type is None
    nobody = plots.paper_beside(pairs.assign(backend=""), title="A call", unit="µs")
    assert {t.name for t in nobody.data} == {"paper", "NVIDIA H200"}


def test_claims_are_drawn_by_verdict():
    figure = plots.claims(CLAIMS)
    named = [t.name for t in figure.data if t.name and t.name.startswith("fair")]
    assert named == [f"fair: {v} (1)" for v in plots_paper.VERDICTS]
    assert trace(figure, "fair: not tested").x[0] == 1.2  # on the claim: nothing was measured
    assert len(set(plots_paper.VERDICT_LOOKS.values())) == len(plots_paper.VERDICTS)


def test_claims_say_where_the_arithmetic_ends_and_what_is_disturbed():
    figure = plots.claims(CLAIMS.assign(ceiling=[2.5] * 6, disturbed=[c == "e" for c in CLAIMS["claim"]]), below="x")
    assert list(trace(figure, "what arithmetic allows").y) == ["e*", "b"]  # the two above 2.5
    assert "a" in figure.layout.yaxis.categoryarray and "disturbed" in figure.layout.title.subtitle.text


def test_lines_of_a_small_live_measurement():
    figure = plots.measured_lines(MODEL[(MODEL["mode"] == "eager") & (MODEL["metric"] == "images_per_s")
                                        & (MODEL["model"] == "deit_tiny") & (MODEL["tokens"] == "99")],
                                  x="batch", title="Live", x_title="batch", y_title="images/s")  # fmt: skip
    assert list(trace(figure, "ours").x) == [1, 4, 16, 64, 256]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: plots.speedup_by_batch(MODEL, tokens="98"), "no rows of pruned pipelines"),
        (lambda: plots.speedup_by_batch(MODEL[MODEL["backend"] != "unpruned"]), "backend = unpruned"),
        (lambda: plots.speedup_by_batch(MODEL[:0]), "no rows at all"),
        (lambda: plots.resolution_speedup(RESOLUTION, mode=None), "mix mode"),
        (lambda: plots.resolution_speedup(RESOLUTION[:0]), "no rows at all"),
        (lambda: plots.best_choice(MODEL, ours="flash_attn"), "backend = flash_attn"),
        (lambda: plots.best_choice(MODEL[MODEL["backend"] == "triton"]), "in common"),
        (lambda: plots.ladder(pandas.DataFrame({"label": ["a"]}), title="", unit=""), "lacks the columns"),
        (lambda: plots.expectation(CLAIMS, CLAIMS, title=""), "lacks the columns"),
        (lambda: plots.claims(CLAIMS[:0]), "no claim"),
        (lambda: plots.claims(CLAIMS.assign(verdict="maybe")), "maybe"),
        (lambda: plots.paper_beside(CLAIMS, title="", unit=""), "lacks the columns"),
    ],
)
def test_what_is_missing_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_figures_are_small():
    for figure in (plots.speedup_by_batch(MODEL), plots.best_choice(MODEL), plots.claims(CLAIMS)):
        assert len(figure.to_json()) < 40_000 and figure.layout.title.text in plots.alt_text(figure)


# ---- the notebooks grow with the recording ----


def complete_recording():
    """What is recorded, and invented rows for every cell that is not recorded yet."""
    from ragged import data

    real = data.results()
    half = MODEL.assign(value=MODEL["value"] * 0.9)
    clocks = [MODEL[MODEL["metric"] == "images_per_s"].assign(metric=metric, unit="us") for metric in CLOCKS]
    clocks = [c.assign(value=1e6 * c["batch"] / c["value"] * CLOCKS[m]) for m, c in zip(CLOCKS, clocks)]
    kernel = half[half["backend"] == "triton"].assign(backend="paper_triton")
    flash = half[half["backend"] == "triton"].assign(backend="flash_attn")
    sparse = real[(real["suite"] == "sparsity") & (real["batch"] == 64)].assign(batch=256.0)
    sharp = RESOLUTION[RESOLUTION["backend"] == "triton"].assign(backend="paper_triton")
    trained = real[(real["suite"] == "equivalence") & (real["model"] == "deit_small")].assign(model="deit_tiny_digits")
    parts = [real, MODEL, *clocks, kernel, flash, sparse, RESOLUTION, sharp, trained]
    keys = ["suite", "model", "pruner", "backend", "mode", "batch", "tokens", "keep", "dtype", "metric", "gpu"]
    return pandas.concat(parts, ignore_index=True).drop_duplicates([k for k in keys if k != "pruner"] + ["pruner"])


CLOCKS = {"host_us": 0.4, "gpu_us": 0.9, "wall_us": 1.1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["06_whole_model.ipynb", "08_paper_table_by_table.ipynb"])
def test_a_notebook_takes_a_complete_recording(name, monkeypatch, capsys):
    """Cells that are not recorded today appear in the tables and verdicts tomorrow, without a change."""
    notebook_files = pytest.importorskip("notebook_files")
    from ragged import data

    everything, path = complete_recording(), notebook_files.ROOT / "notebooks" / name
    if not path.exists():
        pytest.skip(f"there is no {name}")

    def results(suite=None, gpu=None):
        found = everything[everything["gpu"].str.startswith(gpu)] if gpu else everything
        return found[found["suite"] == suite] if suite else found

    monkeypatch.setattr(data, "results", results)
    names = {"__name__": "__main__"}
    with notebook_files.as_in_a_notebook(path.parent):
        for cell in notebook_files.code(notebook_files.read(path)):
            notebook_files.run(cell["source"], names, f"{name} {cell['id']}")
    said = capsys.readouterr().out
    assert "deit_tiny" in said and "not recorded" not in said and "Nothing recorded" not in said
    if name.startswith("08"):
        assert (names["judged"]["verdict"] == plots_paper.UNTESTED).sum() == 2  # ImageNet alone is left
    else:
        assert names["by_pipeline"]["cells"].sum() > 60 and (names["peaks"].groupby("model").size() == 3).all()


def test_legends_of_rows_with_long_names_have_a_line_for_every_entry():
    """plotly makes a legend no wider than the plot, and cuts off what does not fit below it."""
    backends, sources = ("paper_padded", "flash_attn", "paper_triton"), ("paper", "NVIDIA H200")
    pairs = pandas.DataFrame([dict(case="a row with a long name", backend=b, source=s, value=1.0 + len(b))
                              for b in backends for s in sources])  # fmt: skip
    figure = plots.paper_beside(pairs, title="t", unit="ms")
    assert figure.layout.margin.b >= 62 + 20 * len(figure.data) and figure.layout.legend.entrywidth == 1
