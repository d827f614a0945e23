"""The static site: complete, without a request to anywhere, plotly.js once, and clear about what is wrong."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pandas
import pytest

pytest.importorskip("plotly")
pytest.importorskip("nbconvert")
pytest.importorskip("latex2mathml")

from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_files import FIGURE, LESSONS, ROOT, SOLUTIONS, outputs, read

from ragged import course
from ragged.course.notebooks import NotebookError, badge
from ragged.course.site import __main__ as site

FETCHES = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src",
           "audio": "src", "object": "data", "embed": "src", "use": "href"}  # fmt: skip


def soup(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


# ---- a small course ----

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TITLE = "# {} · A *title*\n{}\n\n**The question:** a *b* why?\n\n*Time:* 5 minutes. *Hardware:* any CPU."


def figure_output(alt="A line. x: time."):
    spec = {"data": [{"y": [1, 3, 2], "type": "scatter", "name": "</script>"}], "config": {},
            "layout": {"title": {"text": "A line"}, "width": 500, "height": 300}}  # fmt: skip
    return new_output("display_data", {FIGURE: spec, "image/png": PIXEL, "text/plain": alt})


def write(path, title, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = new_notebook(cells=[new_markdown_cell(title), *cells])
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    nbformat.write(notebook, path)


def code(source="1", result=None):
    return new_code_cell(source, execution_count=1, outputs=[result or new_output("stream", text="a < b\n")])


@pytest.fixture
def small(tmp_path):
    """A checkout with two lessons, one of them with solutions, a guide, a picture and a Python file."""
    notebooks = tmp_path / "notebooks"
    (tmp_path / "pyproject.toml").write_text('[tool.ragged]\nrepository = "some/where"\n')
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "a picture.png").write_bytes(b"png")
    text = "See [two](01_two.ipynb#End), [code](../code.py), [data](..), [paper](https://arxiv.org/abs/2604.15408).\n"
    text += "![a square](../a%20picture.png) ![far](https://example.org/x.png) $n^2 < 3$\n\n$$\\frac{a}{b}$$\n\n## End"
    write(notebooks / "00_one.ipynb", TITLE.format("00", badge("some/where", "notebooks/00_one.ipynb")),
          new_markdown_cell(text), code(result=figure_output()))  # fmt: skip
    write(notebooks / "01_two.ipynb", TITLE.format("01", ""), new_markdown_cell("## End"), code())
    write(notebooks / "solutions" / "00_one.ipynb", "# 00 · Solutions\n[lesson](../00_one.ipynb)", code())
    (notebooks / "README.md").write_text("# For instructors\n[first](00_one.ipynb)\n")
    return tmp_path


def test_a_small_course(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert site.main(["--root", str(small), "--out", str(out)]) == 0
    assert "5 pages" in capsys.readouterr().out
    page = soup(out / "00_one.html")
    links = {link.get_text(): link["href"] for link in page.find_all("a")}
    assert links["two"] == "01_two.html#End" and links["paper"] == "https://arxiv.org/abs/2604.15408"
    assert links["code"] == "https://github.com/some/where/blob/main/code.py"
    assert links["data"].startswith("https://github.com/some/where/tree/main/")
    assert links["Open in Colab"].endswith("/github/some/where/blob/main/notebooks/00_one.ipynb")
    assert links["solutions"] == "solutions/00_one.html" and links["01 →"] == "01_two.html"
    assert soup(out / "solutions" / "00_one.html").find("a", string="lesson")["href"] == "../00_one.html"
    (picture,) = page.select("section img")
    assert picture["alt"] == "a square" and (out / unquote(picture["src"])).read_bytes() == b"png"
    assert "far" in page.get_text() and "example.org" not in str(page)
    assert [m["display"] for m in page.find_all("math")] == ["inline", "block"] and "$" not in page.main.get_text()
    index = soup(out / "index.html")
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in index.find_all("tr")]
    needs = "5 minutes · any CPU"
    assert rows[1:] == [["00 · A title", "A b why?", needs, "solutions"],
                        ["01 · A title", "A b why?", needs, ""]]  # fmt: skip
    assert index.find("a", string="For instructors")["href"] == "instructor.html"


def test_a_figure_has_its_data_its_words_and_its_picture(small, tmp_path):
    site.build(tmp_path / "out", small)
    (figure,) = soup(tmp_path / "out" / "00_one.html").find_all("figure")
    saved = figure_output()["data"][FIGURE]
    assert json.loads(figure.script.string) == {"data": saved["data"], "layout": saved["layout"]}
    assert "\\u003c/script>" in figure.script.string  # text of a figure cannot end the script
    assert figure.div["aria-label"] == figure.noscript.img["alt"] == "A line. x: time."
    assert (tmp_path / "out" / figure.noscript.img["src"]).read_bytes().startswith(b"\x89PNG")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_building_again_leaves_nothing_old_and_everything_of_others(small, tmp_path):
    out = tmp_path / "out"
    site.build(out, small)
    assert (out / "01_two.html").is_file() and (out / "solutions" / "00_one.html").is_file()
    (out / "CNAME").write_text("ragged.example.org")
    (small / "notebooks" / "01_two.ipynb").unlink()
    (small / "notebooks" / "solutions" / "00_one.ipynb").unlink()
    write(small / "notebooks" / "00_one.ipynb", TITLE.format("00", ""), code())
    site.build(out, small)
    assert not (out / "01_two.html").exists() and not (out / "solutions").exists()
    assert (out / "CNAME").read_text() == "ragged.example.org" and "index.html" in files_of(out)
    site.build(tmp_path / "new", small)
    assert files_of(out) == files_of(tmp_path / "new") | {"CNAME": b"ragged.example.org"}


@pytest.mark.parametrize("how", ["a notebook", "the writing", "a file in the way", "a link in the way"])
def test_a_build_that_fails_leaves_the_old_site_as_it_was(small, tmp_path, capsys, monkeypatch, how):
    out = tmp_path / "out"
    write(small / "notebooks" / "01_two.ipynb", TITLE.format("01", ""), code())
    site.build(out, small)
    if how == "a notebook":
        spoil_link(small)
    elif how == "the writing":
        write_bytes = Path.write_bytes

        def full(path, content):
            if path.name == "01_two.html":
                raise OSError(28, "No space left on device", str(path))
            return write_bytes(path, content)

        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        write(small / "notebooks" / "solutions" / "01_two.ipynb", "# 01 · Solutions\n", code())
        (tmp_path / "elsewhere").mkdir()
        if how == "a file in the way":
            (out / "solutions" / "01_two.html").write_text("mine")
        else:
            (out / "solutions").rename(tmp_path / "elsewhere" / "solutions")
            (out / "solutions").symlink_to(tmp_path / "elsewhere" / "solutions", target_is_directory=True)
    before = files_of(out)
    assert site.main(["--root", str(small), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("ragged.course.site: "), error
    assert files_of(out) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing half-built either


def test_an_unwritable_place_is_said(small, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert site.main(["--root", str(small), "--out", str(tmp_path / "file" / "site")]) == 1
    assert re.fullmatch(r"ragged\.course\.site: .*file.*\n", capsys.readouterr().err)


def test_a_list_of_files_that_leads_outside_is_not_followed(small, tmp_path, capsys):
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    site.build(out, small)
    mine.write_text("years of work")
    for files in (["../mine.txt"], [str(mine)], ["a/../../mine.txt"], None, [3]):
        (out / ".ragged-site.json").write_text(json.dumps({"files": files}))
        assert site.main(["--root", str(small), "--out", str(out)]) == 1
        assert "is damaged" in capsys.readouterr().err and mine.exists() and (out / "index.html").is_file()


# ---- hostile outputs ----

EVIL = '"><script>alert(1)</script><!--'


def one_page(small, out, *cells):
    write(small / "notebooks" / "00_one.ipynb", TITLE.format("00", ""), *cells)
    site.build(out, small)
    text = (out / "00_one.html").read_text(encoding="utf-8")
    return text, BeautifulSoup(text, "html.parser")


def test_outputs_cannot_become_markup(small, tmp_path):
    shown = figure_output(alt=EVIL)
    shown["data"][FIGURE]["data"][0]["name"] = EVIL
    shown["data"][FIGURE]["layout"]["title"]["text"] = EVIL + "<script>"
    result = new_output("display_data", {"image/png": PIXEL, "text/plain": EVIL, "text/html": EVIL, EVIL: EVIL})
    text, page = one_page(
        small, tmp_path / "out", code(result=shown), code(result=result), code(EVIL, new_output("stream", text=EVIL)),
        code(result=new_output("execute_result", {"text/plain": EVIL}, execution_count=1)),
        code(result=new_output("error", ename=EVIL, evalue=EVIL, traceback=[EVIL])), nbformat.v4.new_raw_cell(EVIL),
    )  # fmt: skip
    assert EVIL in [pre.get_text() for pre in page.select(".output > pre")]
    assert "alert(1)" not in {script.string for script in page.find_all("script")} and "<!--" not in text
    assert {script.get("type") for script in page.find_all("script", src=False)} == {"application/json"}
    assert json.loads(page.figure.script.string)["data"][0]["name"] == EVIL
    assert page.figure.div["aria-label"] == EVIL and [image["alt"] for image in page.select(".output > img")] == [EVIL]
    assert not any(name.startswith("on") for tag in page.find_all(True) for name in tag.attrs)


def test_the_value_of_a_cell_is_shown_like_what_is_displayed(small, tmp_path):
    found = course.table([dict(name="one", value=1.5)])
    values = {"text/plain": str(found), "text/html": found._repr_html_()}, {"text/plain": "'a value'"}
    _, page = one_page(small, tmp_path / "out", *(
        code(result=new_output("execute_result", value, execution_count=1)) for value in values))  # fmt: skip
    assert page.select_one(".output table td").get_text() == "one"
    assert page.select_one(".output pre").string == "'a value'"


def test_a_table_stays_one_and_whatever_is_in_it_goes(small, tmp_path):
    good = course.table([dict(name="<b>", value=1.5)], title="in µs")._repr_html_()
    bad = f"""<style>@import url(https://example.org)</style><table onclick="alert(1)" class="dataframe" style="x">
        <script>alert(1)</script><tr><td><img src=x onerror=alert(1)>7<a href="javascript:alert(1)">8</a></td></tr>
        </table>{EVIL}"""
    frame = pandas.DataFrame(dict(a=[1]))._repr_html_()  # with a style sheet of its own
    text, page = one_page(small, tmp_path / "out", *(
        code(result=new_output("display_data", {"text/html": html, "text/plain": "words"}))
        for html in (good, bad, frame, "<p>no table</p>")))  # fmt: skip
    first, second, third = page.select(".output table")
    assert [cell.get_text() for cell in first.find_all(["th", "td"])] == ["name", "value", "<b>", "1.5"]
    assert first["class"] == ["ragged"] and first.caption.get_text() == "in µs"
    assert str(second).split() == ['<table', 'class="dataframe">', "<tr><td>78</td></tr>", "</table>"]
    assert not page.find_all("style")
    assert [cell["style"] for cell in first.find_all("td")] == ["text-align: left", "text-align: right"]
    assert third.get_text().split() == ["a", "0", "1"] and "words" in page.get_text() and "no table" not in text


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda shown: shown["data"].update({"image/png": f"x{EVIL}"}), "not a PNG in base64"),
        (lambda shown: shown["data"].update({"image/png": "aGVsbG8="}), "not a PNG in base64"),
        (lambda shown: shown["data"][FIGURE]["layout"].update(height=f"1px;{EVIL}"), "expected pixels"),
        (lambda shown: shown["data"][FIGURE]["layout"].update(width=EVIL), "expected pixels"),
        (lambda shown: shown["data"][FIGURE]["layout"].update(height=float("inf")), "cannot be drawn"),
        (lambda shown: shown["data"][FIGURE].pop("layout"), "cannot be drawn"),
    ],
)
def test_what_is_no_figure_is_refused(small, tmp_path, change, said):
    shown = figure_output()
    change(shown)
    with pytest.raises(NotebookError, match=said):
        one_page(small, tmp_path / "out", code(result=shown))


def test_a_cell_s_id_is_no_path(small, tmp_path):
    path = small / "notebooks" / "00_one.ipynb"
    write(path, TITLE.format("00", ""), code(result=figure_output()))
    path.write_text(path.read_text().replace('"cell-01"', '"../../../escaped"'))
    with pytest.raises(NotebookError, match=r"00_one\.ipynb is not a notebook: '\.\./\.\./\.\./escaped'"):
        site.build(tmp_path / "out", small)


def test_a_picture_alone_must_be_one(small, tmp_path):
    bad = new_output("display_data", {"image/png": f"AAAA{EVIL}", "text/plain": "x"})
    with pytest.raises(NotebookError, match="not a PNG in base64"):
        one_page(small, tmp_path / "out", code(result=bad))


# ---- what is wrong ----


def spoil_link(small):
    write(small / "notebooks" / "01_two.ipynb", TITLE.format("01", ""), new_markdown_cell("[x](02_three.ipynb)"))


def spoil_outside(small):
    write(small / "notebooks" / "01_two.ipynb", TITLE.format("01", ""), new_markdown_cell("[x](../../outside.txt)"))
    (small.parent / "outside.txt").write_text("")


def spoil_formula(small):
    write(small / "notebooks" / "01_two.ipynb", TITLE.format("01", ""), new_markdown_cell("$a^{$"))


def spoil_command(small):
    write(small / "notebooks" / "01_two.ipynb", TITLE.format("01", ""), new_markdown_cell("$\\nosuch{1}$"))


def spoil_outputs(small):
    write(small / "notebooks" / "01_two.ipynb", TITLE.format("01", ""), new_code_cell("1"))


def spoil_figure(small):
    bare = new_output("display_data", {FIGURE: {"data": [], "layout": {}}})
    write(small / "notebooks" / "01_two.ipynb", TITLE.format("01", ""), code(result=bare))


def spoil_file(small):
    (small / "notebooks" / "01_two.ipynb").write_text("{}{")


def spoil_title(small):
    nbformat.write(new_notebook(cells=[code()]), small / "notebooks" / "01_two.ipynb")


def spoil_project(small):
    (small / "pyproject.toml").unlink()


def spoil_folder(small):
    (small / "notebooks").rename(small / "lessons")


WRONG = {
    spoil_link: r"notebooks/01_two\.ipynb links to 02_three\.ipynb",
    spoil_outside: r"notebooks/01_two\.ipynb links to \.\./\.\./outside\.txt, which is not in the project",
    spoil_formula: r"01_two\.ipynb: cannot convert \$a\^\{\$ \(",
    spoil_command: r"01_two\.ipynb: cannot convert \$\\nosuch\{1\}\$, use plainer LaTeX",
    spoil_outputs: r"notebooks/01_two\.ipynb has cells without saved outputs: run `make bake`",
    spoil_figure: r"01_two\.ipynb, cell-01: the figure lacks its picture or its description",
    spoil_file: r"notebooks/01_two\.ipynb is not a notebook",
    spoil_title: r"notebooks/01_two\.ipynb does not begin with a title cell",
    spoil_project: r"pyproject\.toml does not exist",
    spoil_folder: r"notebooks holds no numbered notebooks",
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_said_in_one_line(small, tmp_path, capsys, spoil):
    spoil(small)
    assert site.main(["--root", str(small), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(WRONG[spoil], error), error


def test_a_folder_of_something_else_is_left_alone(small, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for out in (mine, mine / "thesis.txt"):
        assert site.main(["--root", str(small), "--out", str(out)]) == 1
        assert "is not a site" in capsys.readouterr().err
    assert (mine / "thesis.txt").read_text() == "years of work"


# ---- the course itself ----


@pytest.fixture(scope="module")
def pages(built_site):
    """{path: page} of the whole course; only read."""
    found = {path: soup(path) for path in sorted(built_site.rglob("*.html"))}
    assert len(found) == len(LESSONS + SOLUTIONS) + 2  # the index and the guide
    return found


def test_every_notebook_has_its_page_and_every_figure_its_place(pages, built_site):
    for path in LESSONS + SOLUTIONS:
        page = pages[built_site / path.relative_to(ROOT / "notebooks").with_suffix(".html")]
        saved = [output["data"][FIGURE] for _, output in outputs(read(path)) if FIGURE in output.get("data", {})]
        drawn = [json.loads(figure.script.string) for figure in page.find_all("figure") if figure.script]
        assert drawn == [{"data": figure["data"], "layout": figure["layout"]} for figure in saved]
        assert all(len(figure.div["aria-label"]) > 10 for figure in page.select("figure:has(.drawing)"))
    index = {link["href"] for link in pages[built_site / "index.html"].find_all("a")}
    assert {path.with_suffix(".html").name for path in LESSONS} <= index


def test_nothing_is_fetched_from_elsewhere_and_every_link_inside_leads_somewhere(pages, built_site):
    ids = {path: {unquote(tag["id"]) for tag in page.find_all(id=True)} for path, page in pages.items()}
    for path, page in pages.items():
        fetched = [tag[FETCHES[tag.name]] for tag in page.find_all(list(FETCHES)) if tag.get(FETCHES[tag.name])]
        linked = [a["href"] for a in page.find_all("a", href=True) if not re.match("https?:|mailto:", a["href"])]
        for address in fetched + linked:
            if address.startswith("data:"):
                continue
            file, _, fragment = unquote(address).partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), f"{path.name}: {address}"
            assert not fragment or fragment in ids[target], f"{path.name}: {address}"
        assert not re.search(r"url\(\s*['\"]?(?!data:)|@import", "".join(map(str, page.find_all("style"))))
        assert all(image.get("alt") for image in page.find_all("img")), path.name
    for sheet in built_site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?!data:)|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_site_is_small(built_site):
    assert sum(path.stat().st_size for path in built_site.rglob("*") if path.is_file()) <= 25_000_000


def test_plotly_is_there_once(pages, built_site):
    large = [p.relative_to(built_site).as_posix() for p in built_site.rglob("*") if p.stat().st_size > 1_000_000]
    assert large == ["assets/plotly.min.js"]
    for page in pages.values():
        scripts = [script["src"].rpartition("/")[2] for script in page.find_all("script", src=True)]
        assert scripts == (["plotly.min.js", "figures.js"] if page.find("figure") else []) + ["course.js"]
        assert {script["type"] for script in page.find_all("script", src=False)} <= {"application/json"}


def test_formulas_became_mathml(pages):
    for path in pages:
        text = re.sub(r"(?s)<(code|pre|script|math)\b.*?</\1>|<[^>]+>", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"(?<!US)\$[^$\n]+\$|\\(frac|sum|text|mathrm)\b", text), path.name


def test_an_unknown_root_is_an_error():
    with pytest.raises(NotebookError):
        site.build(ROOT / "site", ROOT / "nowhere")
