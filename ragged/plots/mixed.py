"""A figure of images of different sizes: what every way of taking them does as their sizes spread.

It takes a frame of the suite `mixed` with the columns of `ragged.data.RESULT_COLUMNS`; see `ragged.plots`.
"""

from __future__ import annotations

import re

from .model import MODEL_LABELS, _panels
from .style import PRUNER_LABELS, draw_line, in_order, one_of_each, rows_where, subtitle


def spread_of(tokens: str) -> int | None:
    """Pixels between the smallest and the largest side of a distribution such as "U(112,448) px"; None for others."""
    found = re.fullmatch(r"U\((\d+),(\d+)\) px", tokens)
    return int(found[2]) - int(found[1]) if found else None


def mixed_sizes(frame, *, model="deit_small", pruner="none", mode="compile+graph", batch=None, dtype="float16", **only):
    """Images per second against the spread of the sides, one panel for every batch.

    Needs rows of the suite `mixed` with metric images_per_s; those whose tokens name no spread of sizes are left out.
    pruner: "none", or one that was recorded.  batch: one or several; None: those with two spreads at least.
    """
    name = "mixed_sizes"
    rows = rows_where(frame, name, metric="images_per_s", model=model, pruner=pruner, mode=mode, batch=batch,
                      dtype=dtype, **only)  # fmt: skip
    one_of_each(rows, name, "gpu")
    rows = rows.assign(spread=rows["tokens"].map(spread_of)).dropna(subset="spread")
    several = rows.groupby("batch")["spread"].nunique()
    batches = sorted(several.index if batch is not None else several[several >= 2].index)
    if not batches:
        raise ValueError(f"{name}: no rows with sizes such as U(112,448) px, at two spreads at least")
    titles = [f"batch {batch:g}" for batch in batches]
    kept = "" if pruner == "none" else PRUNER_LABELS.get(pruner, pruner)
    below = subtitle(rows, MODEL_LABELS.get(model, model), kept, mode, dtype)
    figure, shown = _panels("Images of different sizes", titles, below), set()
    for column, number in enumerate(batches, 1):
        panel = rows[rows["batch"] == number]
        for backend in in_order(panel["backend"]):
            line = panel[panel["backend"] == backend].sort_values("spread")
            draw_line(figure, line["spread"], line, backend, hover=line["tokens"], legend=backend not in shown,
                      label="packed, ours" if backend == "triton" else None, row=1, col=column)  # fmt: skip
            shown.add(backend)
    figure.update_xaxes(title_text="spread, px", tickvals=sorted(set(rows["spread"])))
    figure.update_yaxes(rangemode="tozero")
    return figure.update_yaxes(title_text="images/s", col=1)
