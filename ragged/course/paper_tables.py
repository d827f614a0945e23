"""Lesson 08's views of the paper's tables: as a table, and as the points of a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import data
from ..bench.paper import Rows, beside
from .tables import Table, table

if TYPE_CHECKING:
    import pandas as pd


def beside_table(name: str, sources: Mapping[str, Rows]) -> Table:
    """A table of the paper with everybody's values in columns: a missing one is a dash, one that rests on a disturbed
    row has an asterisk, and columns without any value are left out.

    name: of a table, as in `data.paper_tables()`.  sources: name of a column -> its rows.
    """
    frame = beside(name, dict(sources)).drop(columns="backend").dropna(axis=1, how="all")
    for column in [c for c in ("paper", *sources) if c in frame.columns]:
        values, marks = frame[column].tolist(), [data.MARK * (column in found) for found in frame["disturbed"]]
        frame[column] = ["-" if v != v else (f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}") + mark
                         for v, mark in zip(values, marks)]  # fmt: skip
    same = [c for c in ("metric", "unit") if frame[c].nunique() == 1 and len(frame) > 1]  # said once, in the title
    title = " ".join([name, *(f"[{frame[c].iloc[0]}]" for c in same)])
    note = data.NOTE if any(frame["disturbed"]) else ""
    return table(frame.drop(columns=[*same, "disturbed"]).to_dict("records"), title=title, note=note)


def points(name: str, sources: Mapping[str, Rows]) -> tuple[pd.DataFrame, str]:
    """What `plots.paper_beside` draws of a table, and the unit: the metric that most rows have; without the line of the
    library itself. In speedups per pruner, ours stands where the paper's kernel is not recorded. name, sources: as in
    `beside_table`."""
    frame = beside(name, dict(sources))
    main = frame["metric"].value_counts().index[0]
    frame = frame[(frame["metric"] == main) & ~frame["what"].str.contains("library")]
    pairs = frame.melt(id_vars=["case", "backend", "disturbed"], value_vars=["paper", *sources], var_name="source")
    shaky = [source in found for source, found in zip(pairs["source"], pairs["disturbed"])]
    pairs = pairs.assign(value=pairs["value"].round(4), disturbed=shaky)
    if name.endswith("speedup_over_unpruned"):
        ours = ~pairs["case"].str.contains("threshold_l2.* 50% pruned") & (pairs["source"] != "paper")
        pairs.loc[ours & (pairs["backend"] == "paper_triton"), "backend"] = "triton"
    return pairs, f"{main.replace('_', ' ')}, {frame['unit'].iloc[0]}".removesuffix(", 1")
