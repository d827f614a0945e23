"""All pictures of the sliders, for readers without a kernel: `python -m ragged.course.frames`, which `make bake` calls.

A notebook that runs to be saved computes a slider's picture for every stop. They would make the notebook heavy, so they
are moved out of it, into `notebooks/frames/`, one compressed file for each slider; the site reads them from there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .notebooks import ROOT, NotebookError, notebook_paths
from .tables import Table

FRAMES = "application/vnd.ragged.frames+json"  # of a slider's output while its notebook is saved
FOLDER = "frames"


def computed(render: Callable, values: Sequence, start: Any, label: str) -> dict:
    """What a reader's slider needs. render, values, start, label: as in `course.slider`.

    Returns label, stops (texts), start (the place of the first), and frames: for each stop a text, a table's HTML, or
    the data and the layout of a plotly figure, without the template, which is everybody's.
    """
    return {"label": label, "stops": [str(value) for value in values], "start": list(values).index(start),
            "frames": [_frame(render(value)) for value in values]}  # fmt: skip


def _frame(result: Any) -> Any:
    if isinstance(result, Table) and result.style is not None:
        return {"html": result._repr_html_()}
    if isinstance(result, str):
        return str(result)
    spec = json.loads(result.to_json())
    spec["layout"].pop("template", None)
    return {"data": spec["data"], "layout": spec["layout"]}


def place_of(notebook: Path, cell_id: str) -> Path:
    """Where the frames of a cell's slider lie. notebook: its path.  cell_id: the cell's."""
    folder = notebook.parent.parent if notebook.parent.name == "solutions" else notebook.parent
    kind = "solutions-" if notebook.parent.name == "solutions" else ""
    return folder / FOLDER / f"{kind}{notebook.stem}-{cell_id}.json.gz"


def read(notebook: Path, cell_id: str) -> dict | None:
    """The frames of a cell's slider, or None if it has none. NotebookError for a damaged file."""
    path = place_of(notebook, cell_id)
    if not path.is_file():
        return None
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        stops, frames, start = found["stops"], found["frames"], found["start"]
        if len(stops) != len(frames) or not 0 <= start < len(stops) or not isinstance(found["label"], str):
            raise ValueError("stops and frames do not belong together")
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise NotebookError(f"{path.name} is damaged ({error!r}): run `make bake` again") from None
    return found


def move_out(notebook: Path) -> list[Path]:
    """Take the frames out of a saved notebook and write them to their places; those places are returned. A notebook
    without frames stays as it is, byte for byte; frames of cells that have none any more are deleted."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    written, sliders = [], set()
    for cell in content["cells"]:
        if "course.slider(" in "".join(cell["source"]):
            sliders.add(place_of(notebook, str(cell.get("id"))))
        for output in cell.get("outputs", ()):
            frames = output.get("data", {}).pop(FRAMES, None)
            if frames is not None:
                path = place_of(notebook, cell["id"])
                path.parent.mkdir(exist_ok=True)
                text = json.dumps(frames, separators=(",", ":"), ensure_ascii=False)
                path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))  # the same frames, the same bytes
                written.append(path)
    first = place_of(notebook, "")
    prefix = first.name.removesuffix(".json.gz")
    for old in first.parent.glob(f"{prefix}*.json.gz"):
        if old not in sliders:
            old.unlink()
    if written:
        notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return written


def main(arguments: list[str] | None = None) -> int:
    """Command line: move the frames of all notebooks, and name the files."""
    parser = argparse.ArgumentParser(prog="python -m ragged.course.frames", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    root = parser.parse_args(arguments).root.resolve()
    try:
        for notebook in notebook_paths(root):
            for path in move_out(notebook):
                print(f"{path.relative_to(root)}: {path.stat().st_size / 1000:.0f} kB")
    except (NotebookError, OSError) as error:
        print(f"python -m ragged.course.frames: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
