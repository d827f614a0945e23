"""One page of the static site: a notebook's Markdown, formulas and figures as HTML that needs no network."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jinja2 import pass_context
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from ..notebooks import COLAB, NotebookError

FILES = Path(__file__).parent / "files"
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"


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
        self.config.NbConvertBase.display_data_priority = [FIGURE, PICTURE, "text/plain"]
        self.register_filter("markdown2html", self.markdown2html)
        self.register_filter("figure", self.figure)

    @pass_context
    def markdown2html(self, context, source):
        return MarkdownWithMath(renderer=PageMarkdown(self.site, self.page)).render(source)

    def figure(self, output, cell):
        """What the template needs of a figure: its JSON, its description, its size, and its picture as a file."""
        where = f"{self.page.source.name}, {cell.id}"
        if PICTURE not in output.data or "text/plain" not in output.data:
            raise NotebookError(f"{where}: the figure lacks its picture or its description: run `make bake` again")
        name = f"{self.page.source.stem}-{cell.id}-{cell.outputs.index(output)}.png"
        path = Path("pictures") / self.page.folder / name
        self.site.write(path.as_posix(), base64.b64decode(output.data[PICTURE]))
        spec = {key: output.data[FIGURE][key] for key in ("data", "layout")}
        text = json.dumps(spec, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
        return {"json": text, "alt": output.data["text/plain"].strip(), "src": self.page.to(path.as_posix()),
                "height": spec["layout"].get("height", 420), "width": spec["layout"].get("width", 700)}  # fmt: skip
