"""Figures of an executed notebook outside of it: in nbconvert's pages, and where nobody draws plotly's JSON."""

import base64
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from notebook_files import FIGURE, PICTURE, ROOT

pytest.importorskip("plotly")
pytest.importorskip("nbconvert")

BROWSER = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
CELLS = (
    "from ragged import course\nhere = course.setup()",
    "from ragged.plots.style import new_figure\n"
    "def drawn(k):\n    figure = new_figure(f'Number {k}', 'below')\n    figure.add_scatter(y=[1, k, 2])\n"
    "    return figure\ndrawn(1)",
    "drawn(2)",
    "handle = display(course.figure_bundle(drawn(3)), raw=True, display_id=True)",
)


def executed(folder, hide="", **environment):
    """The outputs of a small notebook run by `jupyter nbconvert`, and its page in nbconvert's own HTML. hide: a line
    that goes before."""
    notebook = new_notebook(cells=[new_code_cell(hide + "\n" + CELLS[0]), *map(new_code_cell, CELLS[1:])])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "small.ipynb")
    around = {k: v for k, v in os.environ.items() if k != "PLOTLY_RENDERER"}
    around |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")} | environment
    run = [sys.executable, "-m", "nbconvert", "--log-level=ERROR", "small.ipynb", "--to"]
    for what in (["notebook", "--execute", "--inplace"], ["html"]):
        subprocess.run([*run, *what], cwd=folder, env=around, check=True, capture_output=True, timeout=300)
    outputs = [output for cell in nbformat.read(folder / "small.ipynb", 4).cells for output in cell.outputs]
    return outputs, (folder / "small.html").read_text(encoding="utf-8")


def figures(outputs):
    return [output.data for output in outputs if FIGURE in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome to draw PNGs")
@pytest.mark.parametrize("renderer", [None, "plotly_mimetype+png"], ids=["a session", "saving"])
def test_nbconvert_shows_the_pictures(tmp_path, renderer):
    """In a session that asked for nothing, and as `make bake` runs notebooks."""
    outputs, page = executed(tmp_path, **({"PLOTLY_RENDERER": renderer} if renderer else {}))
    found = figures(outputs)
    assert len(found) == 3
    for number, data in enumerate(found, 1):
        assert set(data) == {FIGURE, PICTURE, "text/plain"} and data["text/plain"].startswith(f"Number {number}.")
        assert base64.b64decode(data[PICTURE]).startswith(b"\x89PNG")
        assert f"data:image/png;base64,{data[PICTURE].strip()}" in page.replace("\n", "")


NO_BROWSER = "import sys; sys.modules['kaleido'] = None"
DRAWN = """() => [...document.querySelectorAll('.plotly-graph-div')].map((plot) =>
    plot.querySelectorAll('.scatter').length)"""


@pytest.mark.slow
def test_without_a_browser_nbconvert_draws_html_that_asks_for_nothing(tmp_path):
    outputs, page = executed(tmp_path, hide=NO_BROWSER)
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
        view.route(re.compile("^https?:"), lambda route: route.abort())
        view.goto((tmp_path / "small.html").as_uri())
        view.wait_for_function(f"({DRAWN})().every((traces) => traces === 1)")
        assert view.evaluate(DRAWN) == [1, 1, 1]
        browser.close()


@pytest.mark.slow
def test_a_renderer_that_was_asked_for_is_left_alone(tmp_path):
    outputs, _ = executed(tmp_path, PLOTLY_RENDERER="plotly_mimetype")
    assert [set(data) for data in figures(outputs)] == [{FIGURE}] * 3


def jupyterlab(home, address):
    """JupyterLab on the notebooks in `home`, with all its own files there too."""
    from test_browser import wait_for_server, write_settings

    write_settings(home)
    folders = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}  # fmt: skip
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--ServerApp.root_dir={home}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token="]  # fmt: skip
    around = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=around, cwd=home, stdout=log, stderr=log, start_new_session=True)
    wait_for_server(f"{address}/api", server, home / "log")
    return server


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_jupyterlab_that_does_not_draw_plotly_shows_the_picture(tmp_path):
    """The kernel has plotly and the server has not: of the same outputs, the PNG is what is left to show."""
    pytest.importorskip("jupyterlab")
    playwright = pytest.importorskip("playwright.sync_api")
    from test_browser import NOTEBOOK, free_port

    executed(tmp_path)
    address = f"http://127.0.0.1:{free_port()}"
    server = jupyterlab(tmp_path, address)
    try:
        with playwright.sync_playwright() as tool:
            browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
            page = browser.new_page(viewport={"width": 1300, "height": 3000})
            blocked = []
            page.route(re.compile("/jupyterlab-plotly/"), lambda r: (blocked.append(r), r.abort()))
            page.goto(f"{address}/lab/tree/small.ipynb")
            page.wait_for_function(f"() => {NOTEBOOK}?.context?.isReady", timeout=120_000)
            pictures = "() => document.querySelectorAll('.jp-RenderedImage img').length === 3"
            page.wait_for_function(pictures, timeout=120_000)
            assert blocked and page.evaluate("() => document.querySelectorAll('.jp-RenderedPlotly').length") == 0
            browser.close()
    finally:
        server.terminate()
        server.wait()
