"""Pictures of sliders: computed while saving, moved out of the notebook, read again or refused."""

import gzip
import json

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebook_files import LESSONS, ROOT, code, read, tags

from ragged.course import frames
from ragged.course.notebooks import NotebookError

FILM = {"label": "k", "stops": ["1", "2"], "start": 1, "frames": ["one", "two"]}


@pytest.fixture
def notebook(tmp_path):
    import nbformat

    path = tmp_path / "notebooks" / "01_x.ipynb"
    path.parent.mkdir()
    shown = new_output("display_data", {"text/plain": "two", frames.FRAMES: FILM})
    cells = [new_code_cell("1", id="plain"), new_code_cell("course.slider(f, [1, 2])", id="one", outputs=[shown])]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_frames_move_out_and_are_read_again(notebook):
    (path,) = frames.move_out(notebook)
    assert path.name == "01_x-one.json.gz" and frames.read(notebook, "one") == FILM
    left = json.loads(notebook.read_text())["cells"][1]["outputs"][0]["data"]
    assert [*left] == ["text/plain"]
    before = notebook.read_bytes(), path.read_bytes()
    assert frames.move_out(notebook) == [] and (notebook.read_bytes(), path.read_bytes()) == before
    assert frames.read(notebook, "plain") is None


def test_frames_of_a_cell_that_is_gone_are_deleted(notebook):
    (path,) = frames.move_out(notebook)
    other = path.with_name("01_x-gone.json.gz")
    other.write_bytes(path.read_bytes())
    frames.move_out(notebook)
    assert path.exists() and not other.exists()


@pytest.mark.parametrize("content", [
    b"x", gzip.compress(b"[]"), gzip.compress(json.dumps(FILM | {"start": 7}).encode()),
    gzip.compress(json.dumps(FILM | {"frames": []}).encode()),
])  # fmt: skip
def test_damaged_frames_are_refused(notebook, content):
    (path,) = frames.move_out(notebook)
    path.write_bytes(content)
    with pytest.raises(NotebookError, match="is damaged"):
        frames.read(notebook, "one")


def test_a_figure_leaves_its_template_behind():
    go = pytest.importorskip("plotly.graph_objects")
    film = frames.computed(lambda k: go.Figure(go.Scatter(y=[k, 2]), layout={"title": f"k = {k}"}), [1, 3], 3, "k")
    assert film["stops"] == ["1", "3"] and film["start"] == 1
    assert all("template" not in frame["layout"] for frame in film["frames"])
    assert [frame["layout"]["title"]["text"] for frame in film["frames"]] == ["k = 1", "k = 3"]


def test_the_command_names_what_it_moved(notebook, capsys):
    assert frames.main(["--root", str(notebook.parent.parent)]) == 0
    assert "01_x-one.json.gz" in capsys.readouterr().out
    assert frames.main(["--root", str(notebook)]) == 1
    assert "holds no numbered notebooks" in capsys.readouterr().err


def test_every_slider_of_a_lesson_has_its_pictures():
    wanted = {frames.place_of(lesson, cell["id"]): (lesson, cell["id"]) for lesson in LESSONS
              for cell in code(read(lesson)) if "slider" in tags(cell)}  # fmt: skip
    for place in wanted.values():
        assert frames.read(*place) is not None, f"{place[0].name}, {place[1]}: run `make bake`"
    assert set((ROOT / "notebooks" / "frames").iterdir()) == set(wanted)
