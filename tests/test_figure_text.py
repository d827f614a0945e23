"""Every figure in a browser, as wide as on a screen and as on a telephone, in DejaVu, the widest of the usual fonts: no
title, legend or label stands over another, and none is cut off."""

import json
import re
from pathlib import Path

import pytest
from notebook_files import FIGURE, LESSONS, ROOT, SOLUTIONS, outputs, read
from test_browser import SECONDS, browser  # noqa: F401

pytest.importorskip("plotly")

import pandas
import plotly.graph_objects as go
import test_plots
import test_plots_accuracy as quality
import test_plots_kernel
import test_plots_launch
import test_plots_mixed
import test_plots_paper as paper
import test_plots_pruning
import test_plots_speculation

from ragged import plots
from ragged.course import frames
from ragged.plots.style import LEAST, template

MEASURE = (Path(__file__).parent / "figure_text.js").read_text(encoding="utf-8")
DRAW = """async ([box, spec, width]) => {
    const layout = { ...spec.layout, width: Math.min(spec.layout.width || 700, width) };
    layout.font = { ...layout.font, family: "DejaVu Sans" };
    layout.template = structuredClone(layout.template);
    layout.template.layout.font.family = "DejaVu Sans";
    await Plotly.newPlot(box, spec.data, layout, { displayModeBar: false });
}"""
TEMPLATE = json.loads(go.Figure(layout={"template": template()}).to_json())["layout"]["template"]
WIDTHS = {"1050 px": 754, "390 px": LEAST}  # what a page of the site has beside its contents; narrower, and it scrolls
MODULES = {test_plots: "RECORDED", test_plots_kernel: "FIGURES", test_plots_launch: "FIGURES",
           test_plots_pruning: "FIGURES", test_plots_speculation: "DRAWN"}  # fmt: skip
SAMPLES = {f"{module.__name__.removeprefix('test_')}: {name}": draw for module, drawn in MODULES.items()
           for name, draw in getattr(module, drawn).items()}  # fmt: skip


def expected():
    keeps, panels = [0.1, 0.5, 1.0], [f"batch {batch}" for batch in (1, 16, 64, 256)]
    curves = pandas.DataFrame([
        dict(panel=panel, keep=keep, backend=backend, note=note, value=2.5 - 1.5 * keep) for panel in panels
        for backend in ("triton", "sdpa_padded") for note in ("equal counts", "spread 0.7") for keep in keeps
    ])  # fmt: skip
    return plots.expectation(curves, curves.assign(note="spread 0.7, recorded"), title="Expected and recorded")


def beside():
    pairs = pandas.DataFrame([
        dict(case=f"batch {batch}", backend=backend, source=source, value=1.0 + batch) for batch in (1, 16)
        for backend in ("triton", "flash_attn", "paper_padded") for source in ("paper", "NVIDIA H200")
    ])  # fmt: skip
    return plots.paper_beside(pairs, title="A call", unit="dispatch floor us, us")


SAMPLES |= {
    "paper: expectation": expected,
    "paper: paper_beside": beside,
    "paper: claims": lambda: plots.claims(paper.CLAIMS, below="stands: at least 50% of what the paper claims · " * 3),
    "paper: best_choice": lambda: plots.best_choice(paper.MODEL),
    "paper: speedup_by_batch": lambda: plots.speedup_by_batch(paper.MODEL, model="deit_tiny"),
    "paper: resolution_speedup": lambda: plots.resolution_speedup(paper.RESOLUTION, ragged=True),
    "pictures: batch_lengths": lambda: plots.batch_lengths(
        [50, 100, 30], names=["astronaut", "rocket", "digit 4 (1)"], below="DeiT-Ti · tau = 1.0"),
    "quality: accuracy": lambda: plots.accuracy(quality.two_networks(), model=list(quality.NETWORKS)),
    "quality: fidelity": lambda: plots.fidelity(quality.fidelity_frame()),
    "quality: seeds": lambda: plots.seeds(quality.seeds_frame(), model="net", keep=(0.7, 0.5)),
    "quality: logit_differences": lambda: plots.logit_differences(quality.equivalence_frame(), claim={"evit": 0.005}),
    "quality: counts_against_size": lambda: plots.counts_against_size([1, 2, 3], {
        f"boxes<br>samples={n}": ("ats", [1, 2, 3], 1.0, (0.9, 1.0)) for n in (784, 196, 98, 49)}),
    "mixed: mixed_sizes": lambda: plots.mixed_sizes(test_plots_mixed.FRAME),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong_in(browser):  # noqa: F811
    """wrong_in(figure as a dict) -> what cannot be read, at every width."""
    from plotly.offline import get_plotlyjs

    context = browser.new_context(viewport={"width": 1050, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    page.set_content("<body><div id=box></div></body>")
    page.add_script_tag(content=get_plotlyjs())
    box = page.query_selector("#box")

    def measure(spec):
        spec["layout"].setdefault("template", TEMPLATE)
        found = []
        for name, width in WIDTHS.items():
            page.evaluate(DRAW, [box, spec, width])
            found += [f"{name}: {said}" for said in page.evaluate(MEASURE, box)]
        return found

    yield measure
    context.close()


def saved(path):
    """{name: figure} of what a notebook shows: its saved figures, and the frames of its sliders."""
    found = {}
    for cell, output in outputs(read(path)):
        if FIGURE in output.get("data", {}):
            figure = output["data"][FIGURE]
            found[f"{cell['id']}, {len(found)}"] = {"data": figure["data"], "layout": figure["layout"]}
    for cell in read(path)["cells"]:
        film = frames.read(path, cell["id"]) or {"stops": [], "frames": []}
        found |= {f"{cell['id']}, {film['label']} = {stop}": frame for stop, frame in zip(film["stops"], film["frames"])
                  if isinstance(frame, dict) and "data" in frame}  # fmt: skip
    return found


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda p: p.relative_to(ROOT / "notebooks").as_posix())
def test_every_text_of_a_notebook_s_figures_can_be_read(wrong_in, path):
    wrong = {name: found for name, figure in saved(path).items() if (found := wrong_in(figure))}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


@pytest.mark.parametrize("name", SAMPLES)
def test_every_text_of_a_figure_can_be_read(wrong_in, name):
    assert wrong_in(json.loads(SAMPLES[name]().to_json())) == []


def test_every_kind_of_figure_is_rendered():
    lessons = "".join(path.read_text(encoding="utf-8") for path in LESSONS + SOLUTIONS)
    kinds = {name for name in plots.__all__ if name.islower() and name != "alt_text"}
    drawn = {re.split("[ ,]", name.partition(": ")[2])[0] for name in SAMPLES}
    missing = {name for name in kinds - drawn if not re.search(rf"\b{name}\b", lessons)}
    assert not missing, missing


def test_what_cannot_be_read_is_found(wrong_in):
    layout = dict(template=template(), width=500, height=300, title=dict(text="A title " * 20))
    figure = go.Figure(go.Scatter(y=[1, 2]), layout)
    for x in (0.5, 0.51):
        figure.add_annotation(x=x, y=1.5, text=f"a label at {x}", showarrow=False)
    found = " ".join(wrong_in(json.loads(figure.to_json())))
    assert '"a label at 0.51" stands over "a label at 0.5"' in found and "is cut off" in found
    good = go.Figure(go.Scatter(y=[1, 2]), layout | dict(title=dict(text="A title")))
    assert wrong_in(json.loads(good.to_json())) == []
