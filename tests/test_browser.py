"""What a reader sees in a browser: live sliders in JupyterLab, and the built site.

Playwright drives an installed Chromium (BROWSER_PATH, or the one on the PATH). Without one these tests are skipped, but
not where CI=true: there it is an error.
"""

import contextlib
import functools
import http.server
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from notebook_files import LESSONS, ROOT, SOLUTIONS, read, tags

CI = os.environ.get("CI", "").lower() in ("1", "true")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 600  # for whatever is waited for; far beyond what it takes, for a machine with tests is a busy one
WITH_SLIDERS = [path for path in LESSONS if path.name[:2] == "02"]  # two sliders, and quickly run


def missing(reason):
    """Skip, or fail in CI."""
    pytest.fail(reason) if CI else pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        missing("no Chromium: install one, or name it in BROWSER_PATH")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        # Containers have neither the sandbox's privileges nor a large /dev/shm.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=path, args=flags, timeout=SECONDS * 1000)
        yield chromium
        chromium.close()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ---- JupyterLab ----

# Neither the news nor a look for updates, which would ask the network.
SETTINGS = {"notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the notebooks, with settings, state and kernels' files in a folder of its own.

    Yields a function: file name -> address with the token.
    """
    pytest.importorskip("jupyterlab")
    home = tmp_path_factory.mktemp("lab")
    for path in WITH_SLIDERS:
        (home / "work").mkdir(exist_ok=True)
        shutil.copy(path, home / "work")
    write_settings(home)
    port, token = free_port(), secrets.token_hex(16)
    folders = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
               "IPYTHONDIR": "ipython"}  # fmt: skip
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    environment.pop("PLOTLY_RENDERER", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--ServerApp.root_dir={home / 'work'}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]  # fmt: skip
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_server(f"http://127.0.0.1:{port}/api?token={token}", server, home / "log")
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token={token}"
    finally:
        server.terminate()  # JupyterLab ends its kernels
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def write_settings(home, theme="JupyterLab Light"):
    folder = home / "settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (SETTINGS | {"themes": {"theme": theme}}).items():
        (folder / f"{name}.jupyterlab-settings").write_text(json.dumps(values))


def wait_for_server(address, server, log):
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-2000:]
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(address, timeout=60)
            return
        time.sleep(0.5)
    pytest.fail(f"JupyterLab did not answer: {log.read_text()[-2000:]}")


NOTEBOOK = "window.jupyterapp?.shell?.currentWidget"
READY = f"() => {NOTEBOOK}?.context?.isReady && {NOTEBOOK}.sessionContext?.session?.kernel?.status === 'idle'"
RUN_ALL = """() => {
    window.ran = false;
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = true; });
}"""
# What the cells say that failed, or "done", or else how far the run has come.
STATE = f"""() => {{
    const cells = [...{NOTEBOOK}.content.model.cells].filter((cell) => cell.type === 'code');
    const errors = cells.flatMap((cell) => cell.outputs.toJSON()).filter((output) => output.output_type === 'error');
    const left = cells.filter((cell) => !cell.executionCount || cell.executionState === 'running').length;
    const kernel = {NOTEBOOK}.sessionContext.session.kernel.status;
    return {{ said: errors.map((error) => error.ename + ': ' + error.evalue).join('; ') || (window.ran ? 'done' : ''),
        kernel, now: `${{left}} of ${{cells.length}} cells are left, the kernel is ${{kernel}}` }};
}}"""
# What a slider shows: the numbers, pictures and labels of its figure without the title, or its text or table. Beside a
# PNG the plot is only drawn under the pointer, and the PNG stands in its place.
SHOWN = """(cell) => {
    const images = [...cell.querySelectorAll('.jp-RenderedPlotly img.plot-img')];
    if (images.length) return images.map((image) => image.src).join();
    const plots = [...cell.querySelectorAll('.js-plotly-plot')];
    const inside = (plot) => [plot.data, plot.layout.images, plot.layout.annotations, plot.layout.shapes];
    if (plots.length) return plots.map((plot) => JSON.stringify(inside(plot))).join();
    const texts = '.jp-OutputArea-output pre, .jp-OutputArea-output table';
    return [...cell.querySelectorAll(texts)].map((text) => text.innerText).join();
}"""


def run_all(page, address, patience):
    """Open a notebook and run its cells. A run that JupyterLab lost, with an idle kernel, is a page to open anew."""
    page.goto(address)
    page.wait_for_function(READY)
    page.wait_for_timeout(1000 * patience)  # the widgets' manager gets ready after the kernel, and nothing says when
    page.evaluate(RUN_ALL)
    until, idle = time.monotonic() + SECONDS, 0
    while not (state := page.evaluate(STATE))["said"]:
        idle = idle + 1 if state["kernel"] == "idle" else 0
        if idle > 60:
            raise OutOfView(state["now"])
        assert time.monotonic() < until, state["now"]
        page.wait_for_timeout(500)
    assert state["said"] == "done", state["said"]


IN_VIEW = "(cell) => { const top = cell.getBoundingClientRect().top; return 0 < top && top < 400; }"


def slider_of(page, index):
    """The element of a cell, scrolled into view, and the handle of its slider.

    JupyterLab draws only what is near the window and guesses the rest's height, so that what was scrolled to moves away
    again when its neighbours are drawn: scroll until it has stayed for ten looks. A look is answered by the page
    itself, so that on a busy machine there is more time between two of them.
    """
    page.evaluate(f"(index) => {NOTEBOOK}.content.scrollToItem(index, 'start')", index)
    cell = page.evaluate_handle(f"(index) => {NOTEBOOK}.content.widgets[index].node", index).as_element()
    stayed = 0
    for _ in range(300):
        handle = cell.query_selector("[role=slider]")
        if not cell.evaluate(IN_VIEW):
            cell.evaluate("(cell) => cell.scrollIntoView({ block: 'start' })")
            stayed = 0
        elif handle is None or not handle.is_visible():
            stayed = 0
        elif stayed == 10:
            return cell, handle
        stayed += 1
        page.wait_for_timeout(200)
    raise OutOfView(f"the slider of cell {index} does not come into view and stay")


class OutOfView(AssertionError):
    """JupyterLab kept moving the page, or has not drawn the widget: both happen while it is still starting."""


def changed(page, cell, before):
    """What the cell shows as soon as it is something else than `before`."""
    until = time.monotonic() + SECONDS
    while (now := page.evaluate(SHOWN, cell)) in ("", before) and time.monotonic() < until:
        page.wait_for_timeout(200)
    return now


def move_by_keyboard(page, cell, handle):
    """Focus the slider's handle, press an arrow, and return what was shown before and after."""
    before = changed(page, cell, "")  # the figure may still be drawn
    assert before, "nothing is shown under the slider"
    at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    handle.focus()
    page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
    return before, changed(page, cell, before)


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_SLIDERS, ids=lambda path: path.stem)
def test_sliders_work_in_jupyterlab(browser, lab, path):
    """Run all cells, move every slider with the keyboard, and see its figure change. A page that does not come to rest
    is opened anew, with more patience; a figure that does not follow its slider is not."""
    for patience in (4, 20, 60):
        try:
            return move_all_sliders(browser, lab, path, patience)
        except OutOfView:
            if patience == 60:
                raise


def move_all_sliders(browser, lab, path, patience):
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(SECONDS * 1000)
    try:
        run_all(page, lab(path.name), patience)
        sliders = [index for index, cell in enumerate(read(path)["cells"]) if "slider" in tags(cell)]
        assert sliders, "no cell is tagged slider"
        for index in sliders:
            before, after = move_by_keyboard(page, *slider_of(page, index))
            assert after and after != before, f"cell {index}: the figure did not follow the slider"
    finally:
        page.close()


# ---- the site ----


@pytest.fixture(scope="module")
def served(built_site):
    """The site behind a server on this machine."""
    handler = functools.partial(QuietHandler, directory=built_site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


ALL_DRAWN = "() => [...document.querySelectorAll('figure:has(.drawing)')].every((figure) => figure.dataset.drawn)"
# A figure counts as drawn when plotly says so and it has a visible size and something inside.
NOT_DRAWN = """() => [...document.querySelectorAll('figure:has(.drawing)')].flatMap((figure, index) => {
    const box = figure.querySelector('.js-plotly-plot'), size = box?.getBoundingClientRect();
    const inside = box?.querySelectorAll('.trace, .bars, .xy image, .shapelayer path, canvas, .table, .slice').length;
    return figure.dataset.drawn === 'yes' && size.width > 50 && size.height > 50 && inside ? [] : [index];
})"""
PAGES = ["index.html", *(path.relative_to(ROOT / "notebooks").with_suffix(".html").as_posix()
                         for path in LESSONS + SOLUTIONS)]  # fmt: skip


def visit(context, address, home):
    """Open a page; returns (page, complaints): console errors, exceptions, and requests for anything outside `home`."""
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    page.on("response", lambda r: complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((home, "data:", "blob:")) else None)
    page.goto(address)
    page.wait_for_function(ALL_DRAWN)
    return page, complaints


@pytest.fixture(scope="module")
def reader(browser):
    """One reader for all pages, whose browser keeps plotly.js."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_of_the_site_is_drawn(reader, served, name):
    page, complaints = visit(reader, f"{served}/{name}", served)
    assert page.evaluate(NOT_DRAWN) == [] and complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_opened_as_a_file_follows_the_theme(browser, built_site, scheme):
    """No server is needed; on a telephone nothing is wider than the window; text stands out in both themes."""
    home, phone = built_site.as_uri(), {"width": 390, "height": 800}
    name = LESSONS[0].with_suffix(".html").name
    page, complaints = visit(browser.new_context(color_scheme=scheme, viewport=phone), f"{home}/{name}", home)
    assert page.evaluate(NOT_DRAWN) == [] and complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for selector in ("main p", "main a", ".input pre", ".output pre", "th", ".anchor-link"):
        assert contrast(page, selector) >= 4.5, selector
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(rgb(background)) > 0.5) == (scheme == "light")
    page.context.close()


COLOURS = """(element) => {
    let behind = element;
    while (/(, 0\\)|transparent)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
}"""


def contrast(page, selector):
    """The contrast ratio of the first element's text, as WCAG defines it."""
    light, dark = sorted((luminance(rgb(text)) for text in page.eval_on_selector(selector, COLOURS)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def rgb(text):
    return [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]


def luminance(colour):
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_without_scripts_a_picture_and_its_words_remain(browser, built_site):
    home = built_site.as_uri()
    page = browser.new_context(java_script_enabled=False).new_page()
    page.set_default_timeout(SECONDS * 1000)
    page.goto(f"{home}/{LESSONS[0].with_suffix('.html').name}")
    pictures = page.locator("figure img")
    assert pictures.count() == page.locator("figure .drawing").count() > 0
    assert all(picture.is_visible() and picture.bounding_box()["height"] > 50 for picture in pictures.all())
    page.context.close()
