"""Tables among a notebook's outputs, as a page may show them: rows and cells, and which columns hold words."""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup

PARTS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "br"}
KEPT = {"class", "colspan", "rowspan"}  # attributes
LEAN = re.compile(r"text-align: (left|right);?")  # the one style that stays


def clean(html: str) -> str | None:
    """The first table of some HTML, without anything that a table does not need; None if it holds none."""
    table = BeautifulSoup(html, "html.parser").find("table")
    if table is None:
        return None
    for part in table.find_all(["script", "style"]):
        part.decompose()
    for part in [table, *table.find_all(True)]:
        part.attrs = {name: value for name, value in part.attrs.items()
                      if name in KEPT or (name == "style" and LEAN.fullmatch(value))}  # fmt: skip
        if part.name not in PARTS:
            part.unwrap()
    return f'<div class="rows" tabindex="0">{table}</div>'  # wider than the page, it is scrolled there


def clean_outputs(notebook: Any) -> None:
    """Replace the HTML of a notebook's outputs by its table, in place; other HTML is dropped: the output's picture or
    text is shown."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            table = clean("".join(data.pop("text/html", "")))
            if table is not None:
                data["text/html"] = table
