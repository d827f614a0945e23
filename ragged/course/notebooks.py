"""Keeping the notebooks in step with the project: `python -m ragged.course.notebooks` (`make badges`).

The repository has one name, the line `repository` under [tool.ragged] in pyproject.toml. From it come the Colab badge
under every title and the set-up cell that lets a notebook run where it came alone. Only these two are written; every
other byte of a notebook stays as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)\s]*\)\]\([^)\s]*\)")
SETUP = re.compile(r"try:\n    import ragged\nexcept ImportError:.*", re.DOTALL)


class NotebookError(ValueError):
    """What is wrong with a notebook or with the folder it should be in, in one sentence."""


def repository(root: Path = ROOT) -> str:
    """`owner/name` on GitHub, as pyproject.toml says it."""
    path = Path(root) / "pyproject.toml"
    if not path.is_file():
        raise NotebookError(f"{path} does not exist: this works in a checkout of the project only")
    text = path.read_text(encoding="utf-8")
    found = re.search(r'^\[tool\.ragged\]\n(?:.*\n)*?repository = "([\w.-]+/[\w.-]+)"', text, re.MULTILINE)
    if found is None:
        raise NotebookError(f'{path} has no line repository = "owner/name" under [tool.ragged]')
    return found[1]


def notebook_paths(root: Path = ROOT) -> list[Path]:
    """Lessons and solutions, each in the order of their numbers."""
    folder = Path(root) / "notebooks"
    found = [*sorted(folder.glob("[0-9]*.ipynb")), *sorted(folder.glob("solutions/[0-9]*.ipynb"))]
    if not found:
        raise NotebookError(f"{folder} holds no numbered notebooks")
    return found


def colab_url(name: str, path: str) -> str:
    """Where Colab opens a file of the repository `name`; path is relative to the repository's root."""
    return f"{COLAB}/github/{name}/blob/main/{path}"


def badge(name: str, path: str) -> str:
    """The badge's line of Markdown."""
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({colab_url(name, path)})"


def setup_cell(name: str) -> str:
    """The first code cell of a notebook."""
    return f"""try:
    import ragged
except ImportError:  # in Colab a notebook comes alone and fetches its package
    %pip install -q "ragged-vit[notebooks] @ git+https://github.com/{name}"
    import ragged"""


def with_repository(notebook: dict, name: str, path: str) -> dict:
    """`notebook` with the badge and the set-up cell of repository `name`, changed in place.

    A missing badge is put under the title, a missing set-up cell below it.
    """
    title = notebook["cells"][0]
    if BADGE.search(title["source"]):
        title["source"] = BADGE.sub(lambda _: badge(name, path), title["source"], count=1)
    else:
        first, _, rest = title["source"].partition("\n")
        title["source"] = f"{first}\n{badge(name, path)}" + (f"\n{rest}" if rest else "")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and SETUP.fullmatch(cell["source"]):
            cell["source"] = setup_cell(name)
            return notebook
    made = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": setup_cell(name)}
    if "id" in title:
        made["id"] = "set-up"
    notebook["cells"].insert(1, type(title)(made))  # a dict, or nbformat's
    return notebook


def write_badges(root: Path = ROOT) -> list[Path]:
    """Bring every notebook under `root` up to date; the files that were not, are returned."""
    import nbformat

    name, changed = repository(root), []
    for path in notebook_paths(root):
        before = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(before, as_version=nbformat.NO_CONVERT)
        after = nbformat.writes(with_repository(notebook, name, path.relative_to(root).as_posix())) + "\n"
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Command line: rewrite what is out of date and name it."""
    parser = argparse.ArgumentParser(prog="python -m ragged.course.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    root = parser.parse_args(arguments).root.resolve()
    try:
        changed = write_badges(root)
    except NotebookError as error:
        print(f"python -m ragged.course.notebooks: {error}", file=sys.stderr)
        return 1
    for path in changed:
        print(f"rewritten: {path.relative_to(root)}")
    print(f"{len(notebook_paths(root))} notebooks name {repository(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
