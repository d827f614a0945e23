"""What the static site does in a browser beyond drawing: contents, search, sliders without a kernel, dark figures."""

import json
import re

import pytest
from notebook_files import LESSONS, ROOT, code, read, tags
from test_browser import SECONDS, browser, luminance, rgb, visit  # noqa: F401

LESSON = next(path for path in LESSONS if path.name.startswith("02"))  # two sliders
PAGE = LESSON.with_suffix(".html").name
PHONE = {"width": 390, "height": 800}
MOST_BYTES = 25_000_000


@pytest.fixture
def opened(browser, built_site):  # noqa: F811
    """opened(name, **options of the browser): a page as a file."""
    contexts = []

    def open_page(name=PAGE, **options):
        contexts.append(browser.new_context(**options))
        page, complaints = visit(contexts[-1], f"{built_site.as_uri()}/{name}", built_site.as_uri())
        assert complaints == []
        page.set_default_timeout(SECONDS * 1000)
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_the_site_is_small(built_site):
    assert sum(path.stat().st_size for path in built_site.rglob("*") if path.is_file()) <= MOST_BYTES


def test_contents_lead_to_every_section(opened):
    page = opened(viewport={"width": 1300, "height": 900})
    listed = page.locator("aside li a")
    headings = [text.rstrip("# ").strip() for text in page.locator("main h2, main h3").all_inner_texts()]
    assert [text.strip() for text in listed.all_inner_texts()] == headings and len(headings) > 5
    last = listed.nth(len(headings) - 1)
    last.click()
    page.wait_for_function("(id) => document.getElementById(id).getBoundingClientRect().top < innerHeight",
                           arg=last.get_attribute("href")[1:])  # fmt: skip
    page.wait_for_function("document.querySelector('aside a[aria-current]') !== null")
    assert page.locator("header nav").bounding_box()["y"] == 0, "the way back stays in sight"


def test_on_a_telephone_the_contents_are_closed_and_the_bar_is_one_line(opened):
    page = opened(viewport=PHONE)
    assert not page.locator("details.contents").evaluate("(one) => one.open")
    assert page.locator("header nav").bounding_box()["height"] < 60
    page.locator("input[type=search]").fill("softmax")
    page.wait_for_selector("#found li")
    box = page.locator("#found").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_search_finds_sections_of_all_lessons(opened):
    page = opened("index.html")
    field = page.locator("input[type=search]")
    page.keyboard.press("/")
    assert field.evaluate("(one) => one === document.activeElement")
    page.keyboard.type("cuda graph")
    page.wait_for_selector("#found li a")
    found = page.locator("#found li a")
    pages = {href.split("#")[0] for href in found.evaluate_all("(links) => links.map((link) => link.href)")}
    assert len(pages) > 1
    field.fill("qwertyuiop")
    page.wait_for_function("document.getElementById('found').textContent.startsWith('Nothing')")
    field.fill("<img src=x onerror=alert(1)>")
    page.wait_for_function("document.getElementById('found').textContent.includes('<img')")
    assert page.locator("#found img").count() == 0
    field.fill("rescal")
    page.wait_for_selector("#found li a")
    href = page.locator("#found li a").first.get_attribute("href")
    field.press("Enter")
    page.wait_for_url(re.compile(re.escape(href.removeprefix("./"))))
    assert page.evaluate("document.getElementById(decodeURIComponent(location.hash.slice(1))) !== null")


def test_a_slider_shows_every_stop_without_a_kernel(opened):
    page = opened()
    figure = page.locator("figure[data-frames]").first
    slider = figure.locator("input[type=range]")
    stops = json.loads(slider.get_attribute("data-stops"))
    now = "(figure) => JSON.stringify(figure.querySelector('.drawing').layout.annotations)"
    pictures = {figure.evaluate(now)}
    slider.focus()
    slider.press("Home")
    for place, stop in enumerate(stops):
        page.wait_for_function("([figure, place]) => figure.dataset.stop === place",
                               arg=[figure.element_handle(), str(place)])  # fmt: skip
        assert figure.locator("output").inner_text() == stop and slider.get_attribute("aria-valuetext") == stop
        pictures.add(figure.evaluate(now))
        slider.press("ArrowRight")
    assert len(pictures) > len(stops) // 2


def test_every_slider_of_a_lesson_has_its_pictures():
    from ragged.course import frames

    for lesson in LESSONS:
        for cell in code(read(lesson)):
            if "slider" in tags(cell):
                found = frames.read(lesson, cell["id"])
                assert found is not None, f"{lesson.name}, {cell['id']}: run `make bake`"
    kept = {path.name for path in (ROOT / "notebooks" / "frames").iterdir()}
    wanted = {frames.place_of(lesson, cell["id"]).name for lesson in LESSONS for cell in code(read(lesson))
              if "slider" in tags(cell)}  # fmt: skip
    assert kept == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_follow_the_theme(opened, scheme):
    page = opened(color_scheme=scheme)
    looks = page.evaluate("""() => [...document.querySelectorAll('figure .drawing')].flatMap((box) => {
        const paper = getComputedStyle(box.querySelector('.main-svg')).backgroundColor;
        const words = [...box.querySelectorAll('.gtitle, .xtick text, .legendtext, .annotation-text')];
        return words.map((word) => [paper, getComputedStyle(word).fill]);
    })""")
    assert len(looks) > 20
    for paper, ink in looks:
        back, front = luminance(rgb(paper)), luminance(rgb(ink))
        assert (max(back, front) + 0.05) / (min(back, front) + 0.05) >= 3, (paper, ink)
    papers = {luminance(rgb(paper)) > 0.5 for paper, _ in looks}
    assert papers == {scheme == "light"}


def test_a_figure_changes_with_the_theme_while_it_is_looked_at(opened):
    page = opened(color_scheme="light")
    paper = "getComputedStyle(document.querySelector('figure .main-svg')).backgroundColor"
    before = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"(before) => {paper} !== before", arg=before)
