"""A small course, made in a second, for tests of the site: figures, tables, sliders of all three kinds, solutions."""

import json

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_files import FIGURE

from ragged import course
from ragged.course import frames
from ragged.course.notebooks import badge
from ragged.plots.style import alt_text, draw_line, fitted, new_figure

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WORDS = "The maximum of a row is not known before its last tile, so the running softmax rescales what it has. " * 12
KEEPS = [0.25, 0.5, 0.75, 1.0]


def curve(keep):
    """A figure of our own kind: axes, legend, subtitle, an annotation."""
    import pandas

    figure = new_figure(f"What {keep} of the tokens cost", "no GPU · invented rows")
    for scale, backend in ((1.0, "triton"), (1.4, "flash_attn"), (2.0, "sdpa_padded")):
        draw_line(figure, [1, 2, 4], pandas.DataFrame(dict(value=[scale * keep * n for n in (1, 2, 4)])), backend)
    figure.add_annotation(x=2, y=2 * keep, text=f"keep {keep}", showarrow=True)
    return fitted(figure)


def listing(keep):
    return course.table([dict(backend="triton", keep=keep, value=1000 * keep)], 2, title=f"keep = {keep}")


def sentence(keep):
    return f"{keep} of the tokens\nstay"


def shown(result):
    """An output as a notebook that was saved holds it."""
    if isinstance(result, str):
        data = {"text/plain": str(result)}
        html = getattr(result, "_repr_html_", lambda: None)()
        return new_output("display_data", data | ({"text/html": html} if html else {}))
    spec = json.loads(result.to_json())
    return new_output("display_data", {FIGURE: spec, "image/png": PIXEL, "text/plain": alt_text(result)})


def slider(render):
    output = shown(render(KEEPS[1]))
    output.data[frames.FRAMES] = frames.computed(render, KEEPS, KEEPS[1], "keep")
    said = new_output("stream", text="keep = 0.5   (run this cell to get a slider over 0.25 … 1.0)\n")
    return new_code_cell(f"course.slider({render.__name__}, KEEPS)", execution_count=1, outputs=[said, output])


def code(source, *results):
    return new_code_cell(source, execution_count=1, outputs=[shown(result) for result in results])


def lesson(number, title, *cells):
    question = "**The question:** what costs?\n\n*Time:* 5 minutes. *Hardware:* any CPU."
    link = badge("some/where", "notebooks/x.ipynb")
    return [new_markdown_cell(f"# {number} · {title}\n{link}\n\n{question}"), *cells]


def section(title, text=WORDS, level=2):
    return new_markdown_cell(f"{'#' * level} {title}\n{text}")


def write(root):
    """Fill the folder `root`, as a checkout."""
    wide = course.table([{f"a column {i}": 1000.0 * i for i in range(12)}], note="in µs")
    lessons = {
        "00_one": lesson("00", "One", section("Softmax in tiles"), code("curve(1.0)", curve(1.0)),
                         section("A CUDA graph", "Capture once, replay a CUDA graph."), code("listing(1.0)", wide)),
        "01_two": lesson("01", "Two", section("How the rescaling works"), slider(curve), section("In words", level=3),
                         slider(sentence), section("In numbers"), slider(listing),
                         section("A CUDA graph replays", "What a CUDA graph saves."), code("curve(0.5)", curve(0.5)),
                         section("A long line"), code("print('x' * 300)", "x" * 300), section("Recap")),
        "02_three": lesson("02", "Three", section("Nothing new"), code("1", "1")),
        "solutions/01_two": lesson("01", "Two: solutions", section("Softmax again"), code("1", "1")),
    }  # fmt: skip
    (root / "notebooks" / "solutions").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.ragged]\nrepository = "some/where"\n')
    for name, cells in lessons.items():
        notebook = new_notebook(cells=cells)
        for at, cell in enumerate(notebook.cells):
            cell.id = f"cell-{at}"
        path = root / "notebooks" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        frames.move_out(path)
