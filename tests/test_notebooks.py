"""The form of the notebooks: what a reader finds in each, and what must not be saved in one."""

import ast
import json
import re
import statistics
from urllib.parse import unquote

import nbformat
import pytest
from notebook_files import FIGURE, LESSONS, PICTURE, ROOT, SOLUTIONS, code, outputs, prose, read, tags

from ragged.course import notebooks as notebook_tools

REPOSITORY = notebook_tools.repository(ROOT)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")  # image?, text (may hold an image), address


def name(path):
    return path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()


@pytest.fixture(params=LESSONS, ids=name)
def lesson(request):
    return read(request.param)


@pytest.fixture(params=LESSONS + SOLUTIONS, ids=name)
def notebook(request):
    return read(request.param)


# ---- the form of a lesson ----


def test_the_header(lesson):
    header = lesson["cells"][0]["source"]
    assert len(header.splitlines()) <= 12
    assert re.match(rf"# {lesson['path'].name[:2]} · .+\n", header), "the title: # NN · …"
    parts = ("**The question:**", "you will be able to", "*Prerequisites:*", "*Time:*", "*Hardware:*")
    places = [header.find(part) for part in parts]
    assert min(places) > 0 and places == sorted(places), dict(zip(parts, places))


def test_the_ending(lesson):
    text = prose(lesson)
    places = [text.find(part) for part in ("## Answer", "**Recap.**", "**Recall**", "## What next", "## References")]
    assert min(places) > 0 and places == sorted(places), places
    questions, answers = text[places[2] : places[3]].split("<details>")
    assert 3 <= len(re.findall(r"^\d\. ", questions, re.MULTILINE)) <= 5 and "</details>" in answers


def test_the_measure_of_cells_and_prose(lesson):
    """Cells that only take a guess or check an answer do not count: there may be many of them."""
    asks = re.compile(r"(\w+ = )?course\.(guess|check|hint|progress)\([^\n]*\);?")
    lines = [len(cell["source"].splitlines()) for cell in code(lesson) if not asks.fullmatch(cell["source"].strip())]
    assert 18 <= len(lines) <= 36 and 6 <= statistics.median(lines) <= 11 and max(lines) <= 40
    assert 5 <= len(prose(lesson).split()) / sum(lines) <= 11


def test_numbers_follow_one_another():  # behind 09 stand appendices, which keep their numbers
    notebooks = {path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert notebooks == {*LESSONS, *SOLUTIONS}, "a notebook without a number, or elsewhere: no test would see it"
    numbers = [path.name[:2] for path in LESSONS]
    assert numbers[:10] == [f"{number:02d}" for number in range(10)] and numbers == sorted(set(numbers))


def test_the_first_notebook_is_the_map():
    linked = {address for _, _, address in LINK.findall(prose(read(LESSONS[0])))}
    assert {path.name for path in LESSONS[1:]} <= linked


# ---- sliders ----


def test_a_slider_stands_alone_after_what_it_draws(lesson):
    """A cell tagged slider is the call of course.slider; what it renders is defined in one tagged slider-render."""
    drawn = False
    for cell in code(lesson):
        drawn = drawn or "slider-render" in tags(cell)
        calls = [node for node in ast.walk(parse(cell)) if isinstance(node, ast.Call) and is_slider(node.func)]
        assert ("slider" in tags(cell)) == bool(calls), f"{cell['id']}: tag and content differ"
        if calls:
            assert len(parse(cell).body) == 1 and drawn, cell["id"]


def parse(cell):
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", cell["source"]))


def is_slider(called):
    return ast.unparse(called) in ("course.slider", "slider")


# ---- links ----


def test_links_lead_somewhere(notebook):
    """Relative links meet a file; pictures are local and described; the badge is the one picture from elsewhere."""
    text = notebook_tools.BADGE.sub("", prose(notebook))
    for picture, words, address in LINK.findall(text):
        local = not re.match(r"https?://|mailto:|#|attachment:", address)
        target = (notebook["path"].parent / unquote(address.split("#")[0])).resolve()
        assert not local or target.exists(), f"{address} does not exist"
        assert not picture or (words.strip() and not address.startswith("http")), f"{address}: local, with a text"


def test_badge_and_set_up_cell_name_the_repository(notebook):
    path = notebook["path"].relative_to(ROOT).as_posix()
    assert notebook_tools.badge(REPOSITORY, path) == notebook["cells"][0]["source"].splitlines()[1]
    assert code(notebook)[0]["source"] == notebook_tools.setup_cell(REPOSITORY)


def test_make_badges_has_nothing_to_do(notebook):
    """Solutions too: badge and set-up cell are those of the one constant, and the file is as nbformat writes it."""
    path = notebook["path"]
    text = path.read_text(encoding="utf-8")
    parsed = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    parsed = notebook_tools.with_repository(parsed, REPOSITORY, path.relative_to(ROOT).as_posix())
    assert nbformat.writes(parsed) + "\n" == text, "run `make badges`"


# ---- what is saved ----


def test_saved_outputs(notebook):
    """All cells ran in order; figures have JSON, a picture and a sentence; no widget state and no HTML but tables."""
    assert notebook["path"].stat().st_size < 600 * 1024
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and "widgets" not in notebook["metadata"]
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell, output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", f"{cell['id']}: {''.join(output['text'])[:200]}"
        kinds = set(output.get("data", {}))
        assert "application/vnd.jupyter.widget-view+json" not in kinds
        assert "text/html" not in kinds or "<table" in "".join(output["data"]["text/html"]), cell["id"]
        assert (FIGURE in kinds) == (PICTURE in kinds)


def test_every_figure_is_described(notebook):
    """The title and more, as text beside the picture: `ragged.plots.style.alt_text` makes it when outputs are saved."""
    for cell, output in outputs(notebook):
        if FIGURE in output.get("data", {}):
            words = "".join(output["data"].get("text/plain", ""))
            assert len(words) > 10 and "Figure(" not in words, f"{cell['id']}: bake it again"
            assert output["data"][FIGURE]["layout"]["title"]["text"].replace("<br>", " ") in words, cell["id"]


def test_nothing_of_the_machine_is_saved(notebook):
    """Paths and host names of whoever ran it last have no place in a saved notebook."""
    found = re.findall(r"/(?:home|root|tmp|work|Users)/\S*", notebook["path"].read_text(encoding="utf-8"))
    assert not found


# ---- one name of the repository ----


def test_renaming_the_repository_changes_badges_and_set_up_cells_only(tmp_path):
    for path in LESSONS + SOLUTIONS:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_text('[tool.ragged]\nrepository = "some-one/else.where"\n')
    assert notebook_tools.main(["--root", str(tmp_path)]) == 0
    for path in LESSONS + SOLUTIONS:
        wanted = path.read_text(encoding="utf-8")
        for place in ("colab.research.google.com/github/", "git+https://github.com/"):
            wanted = wanted.replace(place + REPOSITORY, place + "some-one/else.where")
        assert (tmp_path / path.relative_to(ROOT)).read_text(encoding="utf-8") == wanted
    assert notebook_tools.write_badges(tmp_path) == []  # once is enough


@pytest.mark.parametrize("content", ["", "[tool.ragged]\n", '[tool.ragged]\nrepository = "no slash"\n'])
def test_a_checkout_without_a_repository_says_so(tmp_path, capsys, content):
    if content:
        (tmp_path / "pyproject.toml").write_text(content)
    assert notebook_tools.main(["--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pyproject.toml" in error


def test_a_missing_badge_is_put_under_the_title_and_a_missing_set_up_cell_below():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\nText")])
    title, set_up = notebook_tools.with_repository(notebook, "a/b", "notebooks/x.ipynb")["cells"]
    assert set_up["cell_type"] == "code" and set_up["source"] == notebook_tools.setup_cell("a/b")
    nbformat.validate(notebook)
    assert len(notebook_tools.with_repository(notebook, "a/b", "notebooks/x.ipynb")["cells"]) == 2
    source = title["source"]
    assert source.splitlines()[0] == "# Title" and source.splitlines()[2] == "Text"
    assert source.splitlines()[1].endswith("/github/a/b/blob/main/notebooks/x.ipynb)")


def test_the_saved_json_is_plain(notebook):
    """No figure hides a NaN, which browsers cannot read."""
    json.loads(notebook["path"].read_text(encoding="utf-8"), parse_constant=pytest.fail)
