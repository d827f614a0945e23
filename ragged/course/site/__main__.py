"""The course as static pages, from the saved outputs of its notebooks: `python -m ragged.course.site` (`make site`).

nbconvert turns notebooks into HTML; what stands here makes the pages self-sufficient. Figures are drawn from their
saved JSON by one copy of plotly.js, formulas become MathML, links between notebooks become links between pages, and
links to other files of the project lead to its repository. No page asks the network for anything.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

from ..notebooks import ROOT, NotebookError, notebook_paths, repository

try:
    import nbformat
    from plotly.offline import get_plotlyjs
    from pygments.formatters import HtmlFormatter

    from .page import FIGURE, FILES, PLACEHOLDER, Page, PageExporter, contents, sections
    from .place import draft
except ModuleNotFoundError as missing:
    sys.exit(f"ragged.course.site: {missing.name} is not installed; try pip install 'ragged-vit[notebooks,bake,site]'")

# ---- which pages there are ----


def find_pages(root: Path) -> list[Page]:
    """Lessons, solutions, and the instructor's guide if there is one."""
    folder = root / "notebooks"
    pages = []
    for source in notebook_paths(root):
        header = load(source, root).cells[0].source
        question, time, hardware = (
            (re.search(rf"\*{name}:\*+ +(.+?)(?= \*\w+:\*|$)", header, re.MULTILINE) or ["", ""])[1]
            for name in (r"\*The question", "Time", "Hardware")
        )
        question = question.strip()
        needs = " · ".join(part.strip().rstrip(".") for part in (time, hardware) if part)
        out = source.relative_to(folder).with_suffix(".html").as_posix()
        pages.append(Page(source, out, plain_title(header), question[:1].upper() + question[1:], needs))
    guide = folder / "README.md"
    if guide.is_file():
        pages.append(Page(guide, "instructor.html", plain_title(guide.read_text(encoding="utf-8"))))
    return pages


def plain_title(text: str) -> str:
    """The first heading, without Markdown's signs."""
    return re.sub(r"[*_`]|^#+ *", "", text.partition("\n")[0]).strip()


def load(path: Path, root: Path):
    """A notebook with its saved outputs, or the instructor's guide as a notebook of one cell."""
    if path.suffix == ".md":
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))])
    name = path.relative_to(root)
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)  # reading only logs what is wrong
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise NotebookError(f"{name} is not a notebook: {str(error).splitlines()[0]}") from None
    if not notebook.cells or notebook.cells[0].cell_type != "markdown":
        raise NotebookError(f"{name} does not begin with a title cell")
    if any(cell.cell_type == "code" and cell.execution_count is None for cell in notebook.cells):
        raise NotebookError(f"{name} has cells without saved outputs: run `make bake` first")
    return notebook


# ---- the site ----


class Site:
    """Builds all pages into a folder. Addresses are checked on the way: a dead link is an error, not a page."""

    def __init__(self, root: Path, out: Path):
        self.root, self.out, self.name = root, out, repository(root)
        self.pages = find_pages(root)
        self.index: list[dict] = []  # every section of every page, for the search
        self.by_source = {page.source: page for page in self.pages}

    def build(self) -> list[Page]:
        """Write everything; returns the pages."""
        for file in ("style.css", "figures.js", "course.js"):
            self.write(f"assets/{file}", (FILES / file).read_bytes())
        self.write("assets/plotly.min.js", get_plotlyjs().encode())
        light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
        self.write("assets/code.css", f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n".encode())
        for page in self.pages:
            self.write_page(page, load(page.source, self.root))
        text = (FILES / "index.md").read_text(encoding="utf-8").replace("{map}", self.course_map())
        # as if it lay among the notebooks, so that its links are like theirs
        front = Page(self.root / "notebooks" / "index.md", "index.html", plain_title(text))
        self.write_page(front, nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]))
        words = json.dumps(self.index, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        self.write("assets/search.js", f"window.SECTIONS={words};\n".encode())
        return self.pages

    def write_page(self, page: Page, notebook) -> None:
        """One page by nbconvert, with the way back and onward."""
        lessons = [other for other in self.pages if other.source.suffix == ".ipynb" and other.folder == page.folder]
        place = lessons.index(page) if page in lessons else -1
        resources = {
            "page": page, "figures": any(FIGURE in out.get("data", {}) for c in notebook.cells
                                         for out in c.get("outputs", ())),
            "before": lessons[place - 1] if place > 0 else None,
            "after": lessons[place + 1] if 0 <= place < len(lessons) - 1 else None,
            "partner": self.partner(page), "repository": self.name,
        }  # fmt: skip
        html, _ = PageExporter(self, page).from_notebook_node(notebook, resources)
        found = sections(html)
        self.index += [{"page": page.out, "lesson": page.title, **section} for section in found]
        self.write(page.out, html.replace(PLACEHOLDER, contents(found), 1).encode())

    def partner(self, page: Page) -> Page | None:
        """The solutions of a lesson, the lesson of solutions."""
        folder = page.source.parent
        other = folder.parent if folder.name == "solutions" else folder / "solutions"
        return self.by_source.get(other / page.source.name)

    def course_map(self) -> str:
        """The table of lessons, in Markdown."""
        lines = ["| lesson | question | you need | |", "|---|---|---|---|"]
        for page in (page for page in self.pages if page.source.suffix == ".ipynb" and not page.folder):
            solutions = f"[solutions](solutions/{page.source.name})" if self.partner(page) else ""
            lines.append(f"| [{page.title}]({page.source.name}) | {page.question} | {page.needs} | {solutions} |")
        if self.root / "notebooks" / "README.md" in self.by_source:
            lines += ["", "[For instructors](README.md): goals, schedules, misconceptions, marking."]
        return "\n".join(lines)

    def target(self, url: str, page: Page) -> Path | None:
        """The file a relative address means; None for addresses elsewhere."""
        if re.match(r"[a-z]+:|//|#", url):
            return None
        path = (page.source.parent / unquote(url.partition("#")[0])).resolve()
        if not path.exists() or not path.is_relative_to(self.root):
            raise NotebookError(f"{page.source.relative_to(self.root)} links to {url}, which is not in the project")
        return path

    def address(self, url: str, page: Page) -> str:
        """A link as it is in the site: to a page of the site, or to the repository."""
        path = self.target(url, page)
        if path is None:
            return url
        fragment = "".join(url.partition("#")[1:])
        if path in self.by_source:
            return page.to(self.by_source[path].out) + fragment
        kind = "tree" if path.is_dir() else "blob"
        return f"https://github.com/{self.name}/{kind}/main/{path.relative_to(self.root).as_posix()}{fragment}"

    def picture(self, url: str, page: Page) -> str:
        """The way to a copy of a picture of the project."""
        path = self.target(url, page)
        if path is None:
            return url
        copy = f"pictures/{path.relative_to(self.root).as_posix()}"
        self.write(copy, path.read_bytes())
        return page.to(copy)

    def write(self, place: str, content: bytes) -> None:
        """A file of the site."""
        path = self.out / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build(out: Path, root: Path = ROOT) -> list[Page]:
    """Build the site of the checkout `root` into the folder `out`. An earlier site there is replaced when the new one
    is complete; files that are not its own stay. NotebookError or OSError, and `out` is as it was."""
    root, out = Path(root).resolve(), Path(out).resolve()
    repository(root)  # a wrong root is said before any folder is made
    with draft(out) as folder:
        return Site(root, folder).build()


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m ragged.course.site", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("site"), help="folder to write (default: site)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    options = parser.parse_args(arguments)
    try:
        pages = build(options.out, options.root)
    except NotebookError as error:
        print(f"ragged.course.site: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ragged.course.site: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{len(pages) + 1} pages, begin with {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
