"""Tables: HTML where a front end draws it, lines of text in a terminal and for `print`. pandas makes both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from numbers import Integral, Real
from typing import TYPE_CHECKING

from .. import data

if TYPE_CHECKING:  # imported where a table is made
    import pandas as pd
    from pandas.io.formats.style import Styler

LEAN = {True: ' style="text-align: left"', False: ' style="text-align: right"'}
CLASS = "ragged"  # of every table's HTML; the site's style sheet knows it


class Table(str):
    """A table as text, which notebooks show as HTML: `style`, a pandas Styler of its texts (None for a table without
    rows), and `words`, whether a column holds words."""

    style: Styler | None = None
    words: tuple[bool, ...] = ()

    def _repr_html_(self) -> str | None:
        """The Styler's HTML. Which way a cell leans stands in the cell: a notebook that is not trusted loses its style
        sheets, and the site has its own. The same table gives the same HTML."""
        if self.style is None:
            return None
        html = re.sub(r"<style.*?</style>\n?", "", self.style.to_html(), flags=re.DOTALL)
        html = re.sub(r'<table id="[^"]*"', "<table", html).replace("<caption>", f"<caption{LEAN[True]}>")
        return re.sub(r' class="[a-z_]+ \w+ col(\d+)" ', lambda found: LEAN[self.words[int(found[1])]], html)

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        printer.text(str(self))


def table(rows: Sequence[dict] | pd.DataFrame, digits: int = 1, title: str = "", note: str = "") -> Table:
    """rows as a table: words to the left, numbers (with commas, floats to so many digits) to the right.

    rows: dicts, whose keys are the columns, or a frame; an index with a name becomes columns.  title, note: lines above
    and below. Where a number is a `data.Disturbed` it is marked, and the note says what the mark means.
    """
    import pandas

    if isinstance(rows, pandas.DataFrame):
        named = rows.reset_index() if any(rows.index.names) else rows
        names, values = list(named.columns), named.astype(object).to_numpy().tolist()
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        values = [[row.get(name, "") for name in names] for row in rows]
    if any(isinstance(value, data.Disturbed) for row in values for value in row):
        note = f"{note}\n{data.NOTE}".strip()
    if not values:
        return Table("\n".join(filter(None, [title, "(no rows)", note])))
    texts = pandas.DataFrame([[_text(value, digits) for value in row] for row in values])
    texts.columns = [str(name) for name in names]
    words = [all(isinstance(value, str) or value is None for value in column) for column in zip(*values)]
    made = Table("\n".join(filter(None, [title, _lines(texts, words), note])))
    made.style, made.words = _styled(texts, title, note), tuple(words)
    return made


def _text(value: object, digits: int) -> str:
    if value is None or isinstance(value, str | bool):
        return "" if value is None else str(value)
    if getattr(value, "shape", None) == ():  # a tensor or an array of one number
        value = value.item() if not isinstance(value, Real) else value
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return f"{value:,.{digits}f}" + data.MARK * isinstance(value, data.Disturbed)
    return str(value)


def _lines(texts: pd.DataFrame, words: list[bool]) -> str:
    """As text. pandas puts everything to the right, one blank apart: words come padded, and every column but the first
    with a blank before it."""
    import pandas

    padded = {}
    for at, (name, left) in enumerate(zip(texts.columns, words)):
        width = max(map(len, [name, *texts.iloc[:, at]]))
        column = [name, "-" * width, *texts.iloc[:, at]]
        padded[at] = [" " * (at > 0) + (cell.ljust(width) if left else cell.rjust(width)) for cell in column]
    text = pandas.DataFrame(padded).to_string(index=False, header=False)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _styled(texts: pd.DataFrame, title: str, note: str) -> Styler:
    style = texts.style.hide(axis="index").format(escape="html").format_index(escape="html", axis="columns")
    style.cell_ids = False
    style.set_table_attributes(f'class="{CLASS}"')
    caption = "<br>".join(escape(line) for line in f"{title}\n{note}".strip().splitlines())
    return style.set_caption(caption) if caption else style
