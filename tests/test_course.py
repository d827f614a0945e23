"""What the notebooks lean on: set-up, tables, sliders at both ends, and the feedback on exercises."""

import re

import numpy as np
import pandas
import pytest
import torch

import ragged
from ragged import course, data
from ragged.course import output as notebook_output
from ragged.course.frames import FRAMES, computed


@pytest.fixture(autouse=True)
def _gradients_back():
    """`setup` switches gradients off for good; the other tests shall not notice."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)


# ---- set-up ----


def test_setup_seeds_and_says_where_it_runs(capsys):
    here = course.setup(seed=3)
    first = torch.rand(2), np.random.rand()
    course.setup(seed=3, quiet=True)
    assert torch.equal(first[0], torch.rand(2)) and first[1] == np.random.rand()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and f"torch {torch.__version__}" in lines[0] and here.device_name in lines[1]
    assert here.gpu == torch.cuda.is_available() and here.device == ("cuda" if here.gpu else "cpu")
    assert here.versions["ragged-vit"] == ragged.__version__


def test_setup_says_whether_gradients_are_on(capsys):
    for gradients in (False, True, False):
        course.setup(gradients=gradients)
        assert torch.is_grad_enabled() == gradients
        assert capsys.readouterr().out.rstrip().endswith("gradients on" if gradients else "gradients off")
    assert "turn gradients off" in course.setup.__doc__


def test_every_backend_has_its_line(monkeypatch):
    monkeypatch.setattr("ragged.launch.installed", lambda name: False)  # as where neither triton nor flash-attn is
    here = course.Here("cpu", "CPU", torch.float32, "deit_tiny", 8)
    text = course.backends_table(here)
    for name in ragged.BACKENDS:
        assert f"  {name} " in text
    assert "->  sdpa_padded" in text
    assert "Triton is not installed" in text and "flash-attn package is not installed" in text


# ---- tables ----


def test_a_table_lines_up():
    text = course.table([dict(name="a", value=1.25), dict(name="long", value=1234.0)], digits=2)
    assert text.splitlines() == ["name     value", "----  --------", "a         1.25", "long  1,234.00"]
    assert course.table([]) == "(no rows)" and course.table([])._repr_html_() is None


def test_a_table_is_text_to_python_and_html_to_a_notebook():
    from bs4 import BeautifulSoup
    from IPython.core.interactiveshell import InteractiveShell

    table = course.table([dict(backend="a<b", tokens=1970, value=float("nan"))], title="in µs", note="32 images")
    assert f"{table}\n" + table == "\n".join([str(table)] * 2)
    shown, _ = InteractiveShell.instance().display_formatter.format(table)
    InteractiveShell.clear_instance()
    assert set(shown) == {"text/plain", "text/html"} and shown["text/plain"] == str(table)
    assert shown["text/plain"].splitlines()[0] == "in µs" and shown["text/plain"].splitlines()[-1] == "32 images"
    rows = BeautifulSoup(shown["text/html"], "html.parser").find_all("tr")
    cells = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in rows]
    assert cells == [["backend", "tokens", "value"], ["a<b", "1,970", "nan"]]
    assert ">in µs<br>32 images</caption>" in shown["text/html"]
    leans = [cell["style"] for cell in rows[1].find_all("td")]
    assert leans == ["text-align: left", "text-align: right", "text-align: right"]


def test_the_html_of_a_table_is_lean_and_the_same_every_time():
    rows = [{f"column {i}": 1.5 * i for i in range(6)} for _ in range(50)]
    html = course.table(rows)._repr_html_()
    assert html == course.table(rows)._repr_html_()
    assert len(html) < 50 * 6 * 60 and "<style" not in html and "id=" not in html


def test_a_frame_is_a_table_too():
    frame = pandas.DataFrame(dict(backend=["a", "b", "a"], value=[1.0, 2.0, 4.0])).groupby("backend").mean()
    assert course.table(frame) == course.table([dict(backend="a", value=2.5), dict(backend="b", value=2.0)])
    assert course.table(frame["value"].reset_index().query("value > 2")).splitlines()[-1].split() == ["a", "2.5"]


def test_a_table_marks_what_was_disturbed_and_leaves_gaps_open():
    table = course.table([dict(a=data.noted(1.0, True)), dict(b=None), dict(a=np.float32(2), b=torch.tensor(3))])
    assert [line.split() for line in table.splitlines()[2:5]] == [["1.0*"], [], ["2.0", "3"]]
    assert data.NOTE in table and data.NOTE in table._repr_html_()
    assert data.NOTE not in course.table([dict(a=1.0)])


# ---- recordings ----


def test_without_a_recording_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(data, "results", lambda suite, gpu: pandas.DataFrame(columns=list(data.RESULT_COLUMNS)))
    assert course.recorded("model", lambda rows: 1 / 0) is None
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "ragged.bench model" in out and "NVIDIA H200" in out


def test_a_partial_recording_does_not_stop_a_lesson(monkeypatch, capsys):
    monkeypatch.setattr(data, "results", lambda suite, gpu: pandas.DataFrame({"gpu": ["NVIDIA H200"]}))

    def draw(rows, batch):
        if batch == 2:
            raise ValueError("no rows with batch = 2")
        return len(rows)

    assert course.recorded("model", draw, batch=1) == 1
    assert course.recorded("model", draw, batch=2) is None
    assert "batch = 2" in capsys.readouterr().out


# ---- sliders ----


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, bundle, raw):
        assert raw
        self.shown.append(bundle)


@pytest.fixture
def shown(monkeypatch):
    """What a slider displays: the widget, then the picture with a handle that records its updates."""
    pytest.importorskip("ipywidgets")
    import IPython.display

    handle, things = Handle(), []

    def display(thing, raw=False, display_id=None):
        (handle.shown if raw else things).append(thing)
        return handle if display_id else None

    monkeypatch.setattr(IPython.display, "display", display)
    return handle, things


def test_a_slider_draws_at_both_ends(shown, monkeypatch):
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    handle, things = shown
    widget = course.slider(lambda k: f"keep {k}", [0.1, 0.5, 1.0], start=0.5, label="keep")
    assert things == [widget] and widget.description == "keep" and widget.continuous_update is False
    widget.value = 0.1
    widget.value = 1.0
    texts = [bundle["text/plain"] for bundle in handle.shown]
    assert [text for text in texts if text.strip()] == ["keep 0.5", "keep 0.1", "keep 1.0"]


def test_a_slider_of_tables_hands_over_html(shown, monkeypatch):
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    widget = course.slider(lambda k: course.table([dict(k=k)]), [1, 2])
    widget.value = 2
    first, _, last = shown[0].shown
    assert set(first) == set(last) == {"text/plain", "text/html"} and ">2<" in last["text/html"]


def test_the_frames_of_a_slider_of_tables_are_html():
    found = computed(lambda k: course.table([dict(k=k)]), [1, 2], 1, "k")["frames"]
    assert [list(frame) for frame in found] == [["html"]] * 2 and ">2<" in found[1]["html"]


def test_a_slider_of_figures_hands_over_plotly_json(shown, monkeypatch):
    go, pio = pytest.importorskip("plotly.graph_objects"), pytest.importorskip("plotly.io")
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    before = pio.renderers.default
    pio.renderers.default = "plotly_mimetype"
    try:
        widget = course.slider(lambda k: go.Figure(layout=dict(title=f"k = {k}")), range(3))
        widget.value = 2
    finally:
        pio.renderers.default = before
    first, between, last = shown[0].shown
    titles = [b["application/vnd.plotly.v1+json"]["layout"]["title"]["text"] for b in (first, last)]
    assert titles == ["k = 0", "k = 2"]
    assert between == {"text/plain": " "}  # JupyterLab would ignore a figure in place of a figure
    assert not any("text/html" in bundle for bundle in shown[0].shown)


def test_a_saved_notebook_gets_the_picture_without_the_widget(shown, monkeypatch, capsys):
    monkeypatch.setenv("PLOTLY_RENDERER", notebook_output.SAVING)
    assert course.slider(str, [1, 2, 3], start=2, label="k") is None
    frames = {"label": "k", "stops": ["1", "2", "3"], "start": 1, "frames": ["1", "2", "3"]}
    assert shown[1] == [] and shown[0].shown == [{"text/plain": "2", FRAMES: frames}]
    assert "k = 2" in capsys.readouterr().out


def test_a_slider_starts_at_one_of_its_stops():
    with pytest.raises(ValueError, match="start: expected one of"):
        course.slider(str, [1, 2], start=3)


def test_a_picture_of_photographs_is_shown_in_its_size():
    """It has more pixels than the figure; what has not, stays as it is."""

    def sent(**layout):
        figure = {"application/vnd.plotly.v1+json": {"data": [], "layout": layout}, "image/png": "iVBORw0KGgo="}
        return notebook_output.with_size({"content": {"data": figure, "metadata": {"a": 1}}})["content"]["metadata"]

    photo = [{"source": "x"}]
    assert sent(images=photo, width=330, height=195) == {"a": 1, "image/png": {"width": 330, "height": 195}}
    assert sent(images=photo) == {"a": 1} == sent(width=330, height=195)
    other = {"content": {"data": {"text/plain": "x"}}}
    assert notebook_output.with_size(other) is other and notebook_output.with_size({}) == {}


def test_the_saving_renderer_shrinks_its_png(monkeypatch):
    pio = pytest.importorskip("plotly.io")
    monkeypatch.setenv("PLOTLY_RENDERER", notebook_output.SAVING)
    renderer, default = pio.renderers["png"], pio.renderers.default
    try:
        notebook_output.use_small_pictures()
        assert type(pio.renderers["png"]).__name__ == "SmallPng" and pio.renderers.default == notebook_output.SAVING
    finally:
        pio.renderers["png"], pio.renderers.default = renderer, default


def test_the_sections_that_the_guide_names_are_there():
    """In a row or line that names a lesson, titles in italics that look like headings of it."""
    from notebook_files import LESSONS, ROOT, prose, read

    guide = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    titles = {path.name[:2]: re.findall(r"^## (?:\d+ · )?(.+)$", prose(read(path)), re.MULTILINE) for path in LESSONS}
    rows = re.findall(r"^\| [\d–]+ \| (\d\d), (.*?)(?:: .*)?\|$", guide, re.MULTILINE)
    named = [(lesson, title) for lesson, text in rows for title in re.findall(r"\*([A-Z][^*]+)\*", text)]
    named += [("03", title) for title in ("The bill", "Capturing instead of calling", "When a graph cannot be used")]
    named += re.findall(r"(\d\d), \*([A-Z][^*]+)\*", guide)
    assert len(named) >= 12
    for lesson, title in named:
        assert title in titles[lesson], f"the guide names {title!r}, which lesson {lesson} does not have"
