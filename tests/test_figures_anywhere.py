"""Figures of an executed notebook outside of it: in nbconvert's pages, and where nobody draws plotly's JSON."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebook_files import FIGURE, PICTURE, ROOT
from small_course import PIXEL
from test_browser import NOTEBOOK, SECONDS, free_port, wait_for_server, write_settings

pytest.importorskip("plotly")
pytest.importorskip("nbconvert")

from ragged import course

BROWSER = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
CELLS = (
    "from ragged import course\nhere = course.setup()",
    "from ragged.plots.style import new_figure\n"
    "def drawn(k):\n    figure = new_figure(f'Number {k}', 'below')\n    figure.add_scatter(y=[1, k, 2])\n"
    "    return figure\ndrawn(1)",
    "drawn(2)",
    "handle = display(course.figure_bundle(drawn(3)), raw=True, display_id=True)",
)


FIRST = {  # what goes before
    "a session": "",
    "saving": "import os; os.environ['PLOTLY_RENDERER'] = 'plotly_mimetype+png'",
    "no browser": "import sys; sys.modules['kaleido'] = None",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small notebook, run by `jupyter nbconvert` after each of `FIRST`."""
    folder = tmp_path_factory.mktemp("executed")
    for name, line in FIRST.items():
        notebook = new_notebook(cells=[new_code_cell(f"{line}\n{CELLS[0]}"), *map(new_code_cell, CELLS[1:])])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    around = {k: v for k, v in os.environ.items() if k != "PLOTLY_RENDERER"}
    around |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    run = [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to", "notebook", "--execute", "--inplace",
           *(f"{name}.ipynb" for name in FIRST), f"--ExecutePreprocessor.startup_timeout={SECONDS}"]  # fmt: skip
    subprocess.run(run, cwd=folder, env=around, check=True, capture_output=True, timeout=3 * SECONDS)
    return folder


def executed(folder, name):
    """The outputs of the notebook, and its page in nbconvert's own HTML."""
    from nbconvert import HTMLExporter

    notebook = nbformat.read(folder / f"{name}.ipynb", 4)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    return [output for cell in notebook.cells for output in cell.outputs], page


def figures(outputs):
    return [output.data for output in outputs if FIGURE in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome to draw PNGs")
@pytest.mark.parametrize("name", ["a session", "saving"])
def test_nbconvert_shows_the_pictures(folder, name):
    """In a session that asked for nothing, and as `make bake` runs notebooks."""
    outputs, page = executed(folder, name)
    found = figures(outputs)
    assert len(found) == 3
    for number, data in enumerate(found, 1):
        assert set(data) == {FIGURE, PICTURE, "text/plain"} and data["text/plain"].startswith(f"Number {number}.")
        assert base64.b64decode(data[PICTURE]).startswith(b"\x89PNG")
        assert f"data:image/png;base64,{data[PICTURE].strip()}" in page.replace("\n", "")


DESCRIBED = re.search(r"^DESCRIBED := (--\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]


def images(page):
    found = BeautifulSoup(page, "html.parser").select(".jp-OutputArea img")
    return {image["alt"]: image.get("width") for image in found}


def test_a_picture_keeps_its_sentence_in_nbconvert_s_html(tmp_path):
    """With the option of `make html` and `make lab`, and none without: nbconvert has no place for it."""
    words, drawn = 'Number 1. x: "time" & <more>.', {"data": [], "layout": {"width": 760}}
    shown = new_output("display_data", {PICTURE: PIXEL, "text/plain": words, FIGURE: drawn})
    other = new_output("display_data", {PICTURE: PIXEL, "text/plain": "<a picture>"})
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=[shown, other])]), tmp_path / "x.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "--to", "html", DESCRIBED, "x.ipynb"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=SECONDS)
    found = images((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert found == {words: "760", "No description has been provided for this image": None}


DRAWN = """() => [...document.querySelectorAll('.plotly-graph-div')].map((plot) =>
    plot.querySelectorAll('.scatter').length)"""


@pytest.mark.slow
def test_without_a_browser_nbconvert_draws_html_that_asks_for_nothing(folder, tmp_path):
    outputs, page = executed(folder, "no browser")
    found = figures(outputs)
    assert [set(data) for data in found] == [{FIGURE, "text/html", "text/plain"}] * 3
    scripts = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {}) and FIGURE not in o.data]
    assert len(scripts) == 1
    assert not re.search(r"<script[^>]*\ssrc=|<link|https?:", "".join(data["text/html"] for data in found))
    assert "Figures are kept as HTML" in "".join(o.text for o in outputs if o.output_type == "stream")
    assert page.count("plotly-graph-div") >= 3
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium or Chrome to look at the page")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        view = browser.new_page()
        view.set_default_timeout(SECONDS * 1000)
        view.route(re.compile("^https?:"), lambda route: route.abort())
        (tmp_path / "small.html").write_text(page, encoding="utf-8")
        view.goto((tmp_path / "small.html").as_uri())
        view.wait_for_function(f"({DRAWN})().every((traces) => traces === 1)")
        assert view.evaluate(DRAWN) == [1, 1, 1]
        browser.close()


def test_a_renderer_that_was_asked_for_is_left_alone(monkeypatch):
    import plotly.graph_objects as go
    import plotly.io as pio

    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")  # plotly takes it from there
    course.use_small_pictures()
    assert set(course.figure_bundle(go.Figure())) == {FIGURE}


def jupyterlab(home, address):
    """JupyterLab on the notebooks in `home`, with all its own files there too."""
    write_settings(home)
    folders = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}  # fmt: skip
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--ServerApp.root_dir={home}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", DESCRIBED]  # fmt: skip
    around = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=around, cwd=home, stdout=log, stderr=log, start_new_session=True)
    wait_for_server(f"{address}/api", server, home / "log")
    return server


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_jupyterlab_that_does_not_draw_plotly_shows_the_picture(folder):
    """The kernel has plotly and the server has not: of the same outputs, the PNG is what is left to show."""
    pytest.importorskip("jupyterlab")
    playwright = pytest.importorskip("playwright.sync_api")
    address = f"http://127.0.0.1:{free_port()}"
    server = jupyterlab(folder, address)
    try:
        with playwright.sync_playwright() as tool:
            browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
            page = browser.new_page(viewport={"width": 1300, "height": 3000})
            page.set_default_timeout(SECONDS * 1000)
            blocked = []
            page.route(re.compile("/jupyterlab-plotly/"), lambda r: (blocked.append(r), r.abort()))
            page.goto(f"{address}/lab/tree/a%20session.ipynb")
            page.wait_for_function(f"() => {NOTEBOOK}?.context?.isReady")
            pictures = "() => document.querySelectorAll('.jp-RenderedImage img').length === 3"
            page.wait_for_function(pictures)
            assert blocked and page.evaluate("() => document.querySelectorAll('.jp-RenderedPlotly').length") == 0
            key = next(one["value"] for one in page.context.cookies() if one["name"] == "_xsrf")
            export = page.request.get(f"{address}/nbconvert/html/a%20session.ipynb?_xsrf={key}", timeout=SECONDS * 1000)
            found = images(export.text())  # "Save and Export Notebook As"
            assert len(found) == 3 and all(words.startswith("Number ") for words in found)
            browser.close()
    finally:
        server.terminate()  # JupyterLab ends its kernels
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:  # it would end with the machine only
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
