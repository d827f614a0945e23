"""One page of the static site: a notebook's Markdown, formulas and figures as HTML that needs no network."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bs4 import BeautifulSoup
from jinja2 import pass_context
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from .. import frames
from ..notebooks import COLAB, NotebookError
from . import tables

FILES = Path(__file__).parent / "files"
FIGURE, PICTURE, TABLE = "application/vnd.plotly.v1+json", "image/png", "text/html"


@dataclass(frozen=True)
class Page:
    """A page to be: its source (a notebook or Markdown), its place in the site, and what its header tells."""

    source: Path
    out: str  # "01_name.html"
    title: str
    question: str = ""
    needs: str = ""  # minutes and hardware

    @property
    def folder(self) -> str:
        """The folder the page lies in, "" at the top."""
        return os.path.dirname(self.out)

    def to(self, target: str) -> str:
        """The way from here to a file of the site."""
        return Path(os.path.relpath(target, self.folder or ".")).as_posix()


class PageMarkdown(IPythonRenderer):
    """Markdown to HTML with formulas as MathML, and addresses as they are in the site."""

    def __init__(self, site, page: Page):
        super().__init__(escape=False, anchor_link_text="#")
        self.site, self.page = site, page

    def formula(self, latex: str, display: str) -> str:
        """MathML, which browsers draw without a script; the LaTeX stays as its label."""
        try:
            drawn = mathml(latex.strip(), display=display).replace(r"\_", "_")
        except Exception as error:  # the converter's errors have no common class
            raise NotebookError(f"{self.page.source.name}: cannot convert ${latex}$ ({error!r})") from None
        if "\\" in drawn or "<mi>&</mi>" in drawn:  # what the converter does not know it passes on as it stands
            raise NotebookError(f"{self.page.source.name}: cannot convert ${latex}$, use plainer LaTeX")
        return drawn.replace("<math ", f'<math aria-label="{escape(latex.strip())}" ', 1)

    def inline_math(self, body: str) -> str:
        return self.formula(body, "inline")

    def block_math(self, body: str) -> str:
        return f'<div class="formula">{self.formula(body, "block")}</div>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        html = super().link(text, self.site.address(url, self.page), title)
        return html.replace("<a ", '<a class="colab" ', 1) if url.startswith(COLAB) else html

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if re.match(r"https?:", url):
            return escape(text)  # no page fetches a picture from elsewhere: its text remains
        return super().image(text, self.site.picture(url, self.page), title)


class PageExporter(HTMLExporter):
    """nbconvert's exporter with the site's own template and Markdown."""

    def __init__(self, site, page: Page):
        super().__init__(raw_template=(FILES / "page.html.j2").read_text(encoding="utf-8"))
        self.site, self.page = site, page
        self.config.NbConvertBase.display_data_priority = [FIGURE, TABLE, PICTURE, "text/plain"]
        self.register_filter("markdown2html", self.markdown2html)
        self.register_filter("figure", self.figure)
        self.register_filter("png_text", self.png_text)
        self.register_filter("film", self.film)

    def from_notebook_node(self, notebook, resources=None, **more):
        """As nbconvert's; of an output's HTML only a table is let through."""
        tables.clean_outputs(notebook)
        return super().from_notebook_node(notebook, resources, **more)

    @pass_context
    def markdown2html(self, context, source):
        return MarkdownWithMath(renderer=PageMarkdown(self.site, self.page)).render(source)

    def figure(self, output, cell):
        """What the template needs of a figure: its JSON, its description, its size, and its picture as a file. Nothing
        of it can end the element it is put in. NotebookError for what is no figure."""
        where = f"{self.page.source.name}, {cell.get('id')}"
        if not re.fullmatch("[A-Za-z0-9_-]{1,64}", str(cell.get("id"))):
            raise NotebookError(f"{self.page.source.name}: a cell's id becomes a file's name, and {cell.get('id')!r} "
                                "is none")  # fmt: skip
        if PICTURE not in output.data or "text/plain" not in output.data:
            raise NotebookError(f"{where}: the figure lacks its picture or its description: run `make bake` again")
        name = f"{self.page.source.stem}-{cell.id}-{cell.outputs.index(output)}.png"
        path = Path("pictures") / self.page.folder / name
        self.site.write(path.as_posix(), png(output.data[PICTURE], where))
        try:
            spec = {key: output.data[FIGURE][key] for key in ("data", "layout")}
            text = json.dumps(spec, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            size = {key: length(spec["layout"].get(key, usual)) for key, usual in (("height", 420), ("width", 700))}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotebookError(f"{where}: the figure cannot be drawn ({error!r}): run `make bake` again") from None
        text = text.replace("<", "\\u003c")  # neither </script> nor <!-- is left, and JSON reads the same
        alt, src = str(output.data["text/plain"]).strip(), self.page.to(path.as_posix())
        return {"json": text, "alt": alt, "src": src} | size | self.film(output, cell)

    def film(self, output, cell) -> dict:
        """The slider of an output whose cell has one: the script with the pictures of all stops, loaded when it is
        first moved, and the control, which is hidden where there are no scripts. Empty for other outputs."""
        shown = [one for one in cell.outputs if one.output_type in ("display_data", "execute_result")]
        found = frames.read(self.page.source, str(cell.get("id"))) if output in shown[:1] else None
        if found is None:
            return {"frames": "", "control": ""}
        place = f"frames/{frames.place_of(self.page.source, cell.id).name.removesuffix('.json.gz')}.js"
        pictures = [one if isinstance(one, str) or "html" not in one else {"html": tables.clean(str(one["html"])) or ""}
                    for one in found["frames"]]  # fmt: skip
        text = json.dumps(pictures, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        self.site.write(place, f"(window.FRAMES ??= {{}})[{json.dumps(place)}]={text};\n".encode())
        label, last, stops = escape(found["label"]), len(found["stops"]) - 1, escape(json.dumps(found["stops"]))
        control = (
            f'<label class="slider" hidden><span>{label}</span><input type="range" min="0" max="{last}" '
            f'value="{found["start"]}" aria-label="{label}" data-stops="{stops}"><output></output></label>'
        )
        return {"frames": place, "control": control}

    def png_text(self, output, cell):
        """The base64 of an output's PNG, which is one."""
        where = f"{self.page.source.name}, {cell.get('id')}"
        return base64.b64encode(png(output.data[PICTURE], where)).decode()


def png(text: object, where: str) -> bytes:
    """The PNG in an output's base64. NotebookError if it is something else."""
    try:
        data = base64.b64decode("".join(str(text).split()), validate=True)
    except ValueError:
        data = b""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise NotebookError(f"{where}: the saved picture is not a PNG in base64: run `make bake` again")
    return data


def length(value: object) -> int:
    """A figure's height or width in pixels. ValueError for anything else than a plausible number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 20_000:
        raise ValueError(f"expected pixels, got {value!r}")
    return round(value)


# ---- what a page says of itself ----

PLACEHOLDER = "CONTENTS-OF-THIS-PAGE"  # in the template


def sections(html: str) -> list[dict]:
    """The sections of a page: level, title, anchor, and the text up to the next heading, code and outputs left out."""
    main = BeautifulSoup(html, "html.parser").find("main")
    for part in main.select(".output, .input, script, style, .anchor-link, noscript"):
        part.decompose()
    found: list[dict] = []
    for node in main.descendants:
        if getattr(node, "name", None) in ("h1", "h2", "h3"):
            title = " ".join(node.get_text(" ").split())
            found.append({"level": int(node.name[1]), "title": title, "anchor": node.get("id", ""), "text": []})
        elif node.name is None and found and not node.find_parent(["h1", "h2", "h3"]):
            found[-1]["text"].append(str(node))
    return [section | {"text": " ".join(" ".join(section["text"]).split())} for section in found]


def contents(found: list[dict]) -> str:
    """The list of a page's sections, as HTML; empty for a page with fewer than three."""
    listed = [section for section in found if section["level"] in (2, 3) and section["anchor"]]
    if len(listed) < 3:
        return ""
    lines = [f'<li class="level-{s["level"]}"><a href="#{escape(s["anchor"])}">{escape(s["title"])}</a></li>'
             for s in listed]  # fmt: skip
    head = '<details class="contents" open><summary>On this page</summary>'
    return f'<aside aria-label="On this page">{head}<ol>{"".join(lines)}</ol></details></aside>'
