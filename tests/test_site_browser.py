"""What the static site does in a browser beyond drawing: contents, search, sliders without a kernel, dark figures."""

import json
import re

import pytest
import small_course
from test_browser import SECONDS, browser, contrast, luminance, rgb, visit  # noqa: F401

PAGE = "01_two.html"  # three sliders: figures, words, tables
PHONE = {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def small_site(tmp_path_factory):
    site = pytest.importorskip("ragged.course.site.__main__")
    root = tmp_path_factory.mktemp("checkout")
    small_course.write(root)
    site.build(root / "site", root)
    return root / "site"


@pytest.fixture
def opened(browser, small_site):  # noqa: F811
    """opened(name, **options of the browser): a page as a file."""
    contexts = []

    def open_page(name=PAGE, **options):
        contexts.append(browser.new_context(**options))
        page, complaints = visit(contexts[-1], f"{small_site.as_uri()}/{name}", small_site.as_uri())
        assert complaints == []
        page.set_default_timeout(SECONDS * 1000)
        return page

    yield open_page
    for context in contexts:
        context.close()


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


# What the first slider of a page shows, the second, the third: a figure without its title, words, a table.
SHOWN = """(figure) => {
    const drawing = figure.querySelector('.drawing');
    if (!drawing) return figure.querySelector('.shown').innerHTML;
    return JSON.stringify([drawing.data, drawing.layout.annotations]);
}"""


@pytest.mark.parametrize("which", range(3), ids=["figures", "words", "tables"])
def test_a_slider_shows_every_stop_without_a_kernel(opened, which):
    page = opened()
    figure = page.locator("figure[data-frames]").nth(which)
    slider = figure.locator("input[type=range]")
    stops = json.loads(slider.get_attribute("data-stops"))
    pictures = set()
    slider.focus()
    slider.press("End")
    slider.press("Home")
    for place, stop in enumerate(stops):
        page.wait_for_function("([figure, place]) => figure.dataset.stop === place",
                               arg=[figure.element_handle(), str(place)])  # fmt: skip
        assert figure.locator("output").inner_text() == stop and slider.get_attribute("aria-valuetext") == stop
        pictures.add(figure.evaluate(SHOWN))
        slider.press("ArrowRight")
    assert len(pictures) == len(stops) == len(small_course.KEEPS)
    assert figure.locator("table").count() == (which == 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_is_read_in_both_themes_and_scrolls_inside_a_telephone(opened, scheme):
    page = opened("00_one.html", color_scheme=scheme, viewport=PHONE)
    table = page.locator("table.ragged")
    assert contrast(page, "table.ragged td") >= 4.5 and contrast(page, "table.ragged caption") >= 4.5
    assert table.evaluate("(one) => one.scrollWidth > one.clientWidth && one.clientWidth <= innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    cell = table.locator("td").nth(1)
    assert cell.inner_text() == "1,000.0" and cell.evaluate("(one) => getComputedStyle(one).textAlign") == "right"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_follow_the_theme(opened, scheme):
    page = opened(color_scheme=scheme)
    looks = page.evaluate("""() => [...document.querySelectorAll('figure .drawing')].flatMap((box) => {
        const paper = getComputedStyle(box.querySelector('.main-svg')).backgroundColor;
        const words = [...box.querySelectorAll('.gtitle, .xtick text, .legendtext, .annotation-text')];
        return words.map((word) => [paper, getComputedStyle(word).fill]);
    })""")
    assert len(looks) > 10
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
