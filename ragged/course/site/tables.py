"""Tables among a notebook's outputs, as a page may show them: rows and cells, and which columns hold words."""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup

PARTS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "br"}
KEPT = {"class", "id", "colspan", "rowspan"}  # attributes
# The rules of `course.table`: which way the cells of a table lean, and nothing else.
RULES = re.compile(r"(\s*(#T_\w+ +[\w., #]+) \{\s*text-align: (left|right);\s*\})*\s*")


def clean(html: str) -> str | None:
    """The first table of some HTML, without anything that a table does not need; None if it holds none."""
    page = BeautifulSoup(html, "html.parser")
    table, rules = page.find("table"), page.find("style")
    if table is None:
        return None
    for part in table.find_all(["script", "style"]):
        part.decompose()
    for part in [table, *table.find_all(True)]:
        part.attrs = {name: value for name, value in part.attrs.items() if name in KEPT}
        if part.name not in PARTS:
            part.unwrap()
    style = rules.get_text() if rules is not None else ""
    return (f"<style>{style.strip()}</style>\n" if style and RULES.fullmatch(style) else "") + str(table)


def clean_outputs(notebook: Any) -> None:
    """Replace the HTML of a notebook's outputs by its table, in place; other HTML is dropped: the output's picture or
    text is shown."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            table = clean("".join(data.pop("text/html", "")))
            if table is not None:
                data["text/html"] = table
