"""Rules of evidence that tables and figures share: which recorded times were disturbed, and the names of verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SPREAD = 1.25  # of q80 over q20, and of a time over what a larger problem takes
MARK = "*"  # behind a number in a table; the word for it stands in NOTE
NOTE = "* disturbed: q80/q20 above 1.25, or out of line with the neighbours"
STANDS, IN_KIND, BASELINE, SETUP, NOT_HERE, UNTESTED = VERDICTS = (
    "stands", "stands in kind, not in size", "stands only against the paper's baseline",
    "stands only in the paper's setup", "does not transfer", "not tested here",
)  # fmt: skip
_SERIES = ("suite", "model", "pruner", "backend", "mode", "keep", "dtype", "metric", "gpu")
_NEEDED = ("batch", "tokens", "metric", "value", "q20", "q80")


class Disturbed(float):
    """A recorded number that something disturbed: it computes like any other, and tables show it with MARK."""


def noted(value: float, bad: bool) -> float:
    """value, as a Disturbed where `bad`: what a table shall mark."""
    return Disturbed(value) if bad else float(value)


def disturbed(rows: pd.DataFrame) -> pd.Series:
    """Which rows hold a time, or images/s, that something disturbed: a bool for every row.

    rows: a frame as `results` returns it, with batch, tokens, metric, value, q20 and q80 (ValueError without); those of
    whole recordings, since a row is compared with its neighbours. Disturbed is a row whose 80 % quantile lies more than
    SPREAD times above its 20 % quantile, and one that took more than SPREAD times as long as the same thing with more
    images, or more tokens in each: less work that takes longer.
    """
    import pandas

    missing = [c for c in _NEEDED if c not in rows.columns]
    if missing:
        raise ValueError(f"rows: expected a frame of recorded rows, the columns {missing} are missing")
    timed = rows["metric"].str.endswith("_us") | (rows["metric"] == "images_per_s")
    wide = timed & (rows["q20"] > 0) & (rows["q80"] > SPREAD * rows["q20"])
    judged = (timed & rows["value"].gt(0)).to_numpy()
    found = wide.to_numpy().copy()  # by place: in a frame joined of several, two rows may have the same label
    found[judged] |= _out_of_line(rows[judged]).to_numpy()
    return pandas.Series(found, rows.index)


def _out_of_line(rows):
    """Whether a row took SPREAD times as long as one of its series with at least as many images and tokens."""
    import pandas

    images = pandas.to_numeric(rows["batch"], errors="coerce")
    slow = np.where(rows["metric"] == "images_per_s", images / rows["value"], rows["value"])
    size = pandas.to_numeric(rows["tokens"], errors="coerce")
    kind = rows["tokens"].where(size.isna(), "")  # "U(20,197)" has neighbours at other batches only
    frame = pandas.DataFrame(dict(slow=slow, batch=images, size=size.fillna(0), kind=kind))
    batch, tokens, times = (frame[c].to_numpy() for c in ("batch", "size", "slow"))
    found = np.zeros(len(rows), dtype=bool)
    series = [rows[c].astype(str) for c in _SERIES if c in rows.columns]
    for at in frame.groupby([*series, "kind"], sort=False, dropna=False).indices.values():
        more = (batch[at][None] >= batch[at][:, None]) & (tokens[at][None] >= tokens[at][:, None])  # row, larger ones
        found[at] = times[at] > SPREAD * np.where(more, times[at][None], np.inf).min(1)
    return pandas.Series(found, index=rows.index)
