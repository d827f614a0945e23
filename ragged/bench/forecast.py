"""What to expect of a pruned model, from few recorded constants: a forecast for a setting, and how far it may be off.

A forward pass takes the larger of two times: the host's, which launches it, and the GPU's, a fixed time and a time for
each GFLOP. The GPU's two constants are those of the *unpruned* model at its smallest and largest recorded batch; of a
pruned pipeline nothing but its least host time is used, never its speed. Everything is for 224 x 224 pixels, twelve
blocks and one cut after the fourth.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

from .. import data
from ..checks import check_int
from .flops import block_flops

if TYPE_CHECKING:
    import pandas as pd

WIDTHS = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
PRUNERS = ("threshold_l2", "dynamicvit", "evit", "ats")
EQUAL = ("dynamicvit", "evit")  # whatever the images: the same count for all of them
RAGGED = "given_lengths"  # recorded in place of a threshold: lengths as they were drawn
PIPELINES = ("dense", "sdpa_padded", "triton")
MODES = ("eager", "compile+graph")
FULL, CUT, DEPTH = 197, 4, 12  # rows before the cut, blocks before it, blocks in all


class Constants(NamedTuple):
    """Of one network in one mode: fixed GPU time in µs, and GPU time in µs for each GFLOP."""

    fixed: float
    per_gflop: float


def model_flops(counts, dim: int) -> float:
    """FLOPs of a forward pass. counts: rows of each image after the cut.  dim: width of the network."""
    early = CUT * len(counts) * block_flops(FULL, dim, 4 * dim)
    late = (DEPTH - CUT) * sum(block_flops(n, dim, 4 * dim) for n in counts)
    return early + late + len(counts) * (2 * (FULL - 1) * 768 * dim + 2 * dim * 1000)  # patches in, classes out


def counts_after(keep: float, spread: float, batch: int, pruner: str = "threshold_l2") -> list[int]:
    """Rows of each of `batch` images after the cut, CLS included.

    keep: share of the patches, above 0 and up to 1.  spread: 0 for equal counts; else lengths are drawn evenly from the
    mean plus or minus this share of the room that there is, up to 1.  pruner: one of PRUNERS; those in EQUAL leave
    equal counts whatever the spread. ValueError for values outside.
    """
    check_int("batch", batch, 1)
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share above 0 and up to 1, got {keep!r}")
    if not 0 <= spread <= 1:
        raise ValueError(f"spread: expected a share from 0 to 1, got {spread!r}")
    if pruner not in PRUNERS:
        raise ValueError(f"pruner: expected one of {', '.join(PRUNERS)}, got {pruner!r}")
    patches = FULL - 1
    if pruner == "evit":  # it rounds up, and adds the fused token
        return [1 + math.ceil(patches * keep) + (keep < 1)] * batch
    if pruner in EQUAL or spread == 0:
        return [1 + int(patches * keep)] * batch
    middle = 1 + round(patches * keep)
    half = round(spread * min(middle - 1, FULL - middle))
    return data.lengths(f"U({middle - half},{middle + half})", batch)


def forecast(rows: pd.DataFrame, model: str, batch: int, keep: float, spread: float = 0.0,
             pruner: str = "threshold_l2") -> pd.DataFrame:  # fmt: skip
    """What each pipeline makes of one setting: times the unpruned model's images/s, in the same mode.

    rows: what one GPU recorded for the suites `model` and `sparsity`.  model: one of WIDTHS.  batch: images.  keep,
    spread, pruner: as in `counts_after`. Returns a row for every mode and pipeline: `expected`; `images_per_s`, so many
    are expected; `low` and `high`, between which the speed lay wherever this pruner, pipeline and mode was recorded,
    and in how many `cells` that was (NaN and 0 where none); `recorded`, this very setting, or NaN; `ceiling`, the
    ratio of FLOPs; and the setting, with the spread that there is (0 for equal counts). ValueError for a setting
    outside, and where the rows hold nothing to calculate with.
    """
    counts = counts_after(keep, spread, batch, pruner)
    ragged = len(set(counts)) > 1
    kind = RAGGED if ragged and pruner == "threshold_l2" else pruner
    cells, lines = misses(rows), []
    for mode in MODES:
        whole = _us(rows, model, mode, "unpruned", "none", [FULL] * batch)
        for backend in PIPELINES:
            if backend == "dense" and ragged:  # it takes equal counts alone
                continue
            us = _us(rows, model, mode, backend, kind, counts)
            known = cells[(cells["pruner"] == kind) & (cells["backend"] == backend) & (cells["mode"] == mode)]
            off = known["recorded"] / known["expected"]
            here = known[(known["model"] == model) & (known["batch"] == batch) & (abs(known["keep"] - keep) < 1e-9)]
            if kind == RAGGED and (keep, spread) != (0.5, 0.7):
                here = here[:0]  # one distribution is recorded
            found = here.iloc[0] if len(here) else {"recorded": math.nan, "disturbed": False}
            lines.append({
                "mode": mode, "backend": backend, "expected": whole / us, "images_per_s": 1e6 * batch / us,
                "low": whole / us * off.min(), "high": whole / us * off.max(), "cells": len(off),
                "recorded": found["recorded"], "disturbed": bool(found["disturbed"]),
                "ceiling": model_flops([FULL] * batch, WIDTHS[model]) / model_flops(counts, WIDTHS[model]),
            })  # fmt: skip
    import pandas

    named = rows[["gpu", "date"]].drop_duplicates().sort_values("date").iloc[-1]
    return pandas.DataFrame(lines).assign(
        model=model, batch=batch, keep=keep, spread=spread if ragged else 0.0, pruner=pruner, gpu=named["gpu"],
        date=named["date"])  # fmt: skip


def misses(rows: pd.DataFrame) -> pd.DataFrame:
    """Every recorded cell beside what would have been forecast for it: model, pruner, backend, mode, batch, tokens,
    keep, `recorded` and `expected` (both times the unpruned images/s), and `disturbed`.

    rows: as in `forecast`. Left out are cells that no forecast speaks of, and those for which the rows hold nothing to
    calculate with.
    """
    return _misses(_Frame(rows))


class _Frame:
    """A frame that goes by its identity, so that what was computed from it can be kept."""

    def __init__(self, rows):
        self.rows = rows

    def __hash__(self):
        return id(self.rows)

    def __eq__(self, other):
        return self.rows is other.rows


@functools.lru_cache(8)
def _misses(frame: _Frame) -> pd.DataFrame:
    rows = frame.rows
    cells = speedups(rows.assign(disturbed=data.disturbed(rows)))
    kinds = cells["pruner"].isin([*PRUNERS, RAGGED]) & cells["backend"].isin(PIPELINES) & cells["mode"].isin(MODES)
    asked = (cells["tokens"] != "published") & cells["keep"].notna()  # how many ATS keeps is for its scores to say
    cells = cells[kinds & cells["model"].isin(list(WIDTHS)) & asked]
    expected = []
    for c in cells.itertuples():
        spread = 0.7 if c.pruner == RAGGED else 0.0  # U(30,168) is what is recorded
        counts = counts_after(c.keep, spread, int(c.batch), "threshold_l2" if c.pruner == RAGGED else c.pruner)
        try:
            whole = _us(rows, c.model, c.mode, "unpruned", "none", [FULL] * int(c.batch))
            expected.append(whole / _us(rows, c.model, c.mode, c.backend, c.pruner, counts))
        except ValueError:  # a recording may be partial
            expected.append(math.nan)
    keys = ["suite", "model", "pruner", "backend", "mode", "batch", "tokens", "keep", "disturbed"]
    cells = cells[keys].assign(recorded=cells["speedup"], expected=expected)
    return cells.dropna(subset="expected").reset_index(drop=True)


def speedups(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of images_per_s, each with its `speedup` over the unpruned model of the same suite, model, batch and mode.

    rows: recorded rows with a column disturbed; a speedup is disturbed where one of its two rows is.
    """
    rows = rows[(rows["metric"] == "images_per_s") & (rows["status"] == "ok")]
    keys = ["suite", "model", "batch", "mode"]
    base = rows[rows["backend"] == "unpruned"][[*keys, "value", "disturbed"]]
    joined = rows[rows["backend"] != "unpruned"].merge(base, on=keys, suffixes=("", "_whole"))
    bad = joined["disturbed"] | joined["disturbed_whole"]
    return joined.assign(speedup=joined["value"] / joined["value_whole"], disturbed=bad)


def constants(rows: pd.DataFrame, model: str, mode: str) -> Constants:
    """The GPU's constants of one network in one mode. ValueError where fewer than two batches are recorded."""
    return _constants(_Frame(rows), model, mode)


@functools.lru_cache(64)
def _constants(frame: _Frame, model: str, mode: str) -> Constants:
    if model not in WIDTHS:
        raise ValueError(f"model: expected one of {', '.join(WIDTHS)}, got {model!r}")
    at = dict(suite="model", model=model, mode=mode, backend="unpruned", metric="gpu_us", status="ok")
    found = _where(frame.rows, **at).sort_values("batch")
    if found["batch"].nunique() < 2:
        raise ValueError(f"rows: expected gpu_us of {model}, unpruned, {mode}, at two batches at least; there are "
                         f"{found['batch'].nunique()}")  # fmt: skip
    batches, took = found["batch"].iloc[[0, -1]], found["value"].iloc[[0, -1]].tolist()
    work = [model_flops([FULL] * int(batch), WIDTHS[model]) / 1e9 for batch in batches]
    slope = (took[1] - took[0]) / (work[1] - work[0])
    return Constants(took[0] - slope * work[0], slope)


def host_floor(rows: pd.DataFrame, model: str, batch: int, mode: str, backend: str, pruner: str = "none") -> float:
    """The least host time of a pass in µs; launches do not depend on the batch.

    pruner: "none", one of PRUNERS, or RAGGED. Where a pruner is not recorded with this network, its distance to
    Threshold-L2 with another network of as many blocks is added to Threshold-L2's. A pass that waits for the GPU has
    the wait in its host time: it counts for its own network, and from the smallest batch on that was recorded.
    ValueError where nothing is recorded that counts.
    """
    return _floor(_Frame(rows), model, batch, mode, backend, pruner)


@functools.lru_cache(2048)
def _floor(frame: _Frame, model: str, batch: int, mode: str, backend: str, pruner: str) -> float:
    rows = _where(frame.rows, mode=mode, status="ok")
    rows = rows[rows["tokens"] != "published"]
    host, waits = (_where(rows, metric=metric) for metric in ("host_us", "syncs"))
    own = _where(host, model=model, backend=backend, pruner=pruner)
    if (_where(waits, backend=backend, pruner=pruner)["value"] > 0).any():
        if not (own["batch"] <= batch).any():
            raise ValueError(f"rows: {backend} with {pruner}, {mode}, waits for the GPU in mid-pass, and no host_us of "
                             f"{model} at a batch of {batch} or less says how long its launches take")  # fmt: skip
    if len(own):
        return own["value"].min()
    both = [_where(host, suite="sparsity", backend="triton", pruner=name)["value"] for name in (pruner, "threshold_l2")]
    if pruner in ("none", RAGGED, "threshold_l2") or not all(map(len, both)):
        raise ValueError(f"rows: no host_us of {backend} with the pruner {pruner!r}, {mode}, were recorded on this GPU")
    return _floor(frame, model, batch, mode, backend, "threshold_l2") + both[0].min() - both[1].min()


def _where(rows, **wanted):
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows


def _us(rows, model: str, mode: str, backend: str, pruner: str, counts: list[int]) -> float:
    """Time of a pass in µs. A pipeline that pads is charged for its padding."""
    if backend == "sdpa_padded":
        counts = [max(counts)] * len(counts)
    fixed, slope = constants(rows, model, mode)
    floor = host_floor(rows, model, len(counts), mode, backend, pruner)
    return max(floor, fixed + slope * model_flops(counts, WIDTHS[model]) / 1e9)
