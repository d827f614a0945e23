"""Figures of what lies around one GPU: decoding ahead of it, and a second one beside it.

They take frames of the suites `ceiling` and `scaling` with the columns of `ragged.data.RESULT_COLUMNS`; see
`ragged.plots`.
"""

from __future__ import annotations

import itertools
import re

from .model import MODEL_LABELS
from .style import LOOKS, PRUNER_LABELS, log_ticks, new_figure, one_of_each, rows_where, subtitle

PARTS = {"decode_images_per_s": "decoding alone", "gpu_images_per_s": "GPU alone",
         "end_to_end_images_per_s": "end to end"}  # fmt: skip


def decoding_ceiling(frame, *, model="deit_tiny", pruner=("none", "evit"), way="torchvision", batch=None, **only):
    """Images per second against the processes that decode: the GPU alone, decoding alone, and both together.

    Needs rows of the suite `ceiling` in all three metrics.  pruner: one or several.  way: who decodes, as the mode
    names it.  batch: one of those recorded; None where there is only one.
    """
    name = "decoding_ceiling"
    rows = rows_where(frame, name, metric=list(PARTS), model=model, pruner=list(pruner), batch=batch, **only)
    one_of_each(rows, name, "gpu", "batch", "dtype")
    found = rows["mode"].str.extract(rf", {re.escape(way)} x(\d+)$")[0]
    rows = rows.assign(processes=found.astype(float)).dropna(subset="processes").sort_values("processes")
    if rows["processes"].nunique() < 2:
        raise ValueError(f"{name}: no rows decoded by {way} on two numbers of processes at least")
    below = subtitle(rows, MODEL_LABELS.get(model, model), f"batch {rows['batch'].iloc[0]:g}", way)
    figure = new_figure("From a JPEG file to a label", below)

    def line(part, x, y, look, label, dash):
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=f"{PARTS[part]}{label}", marker=dict(
            symbol=look.symbol, size=9), line=dict(color=look.colour, dash=dash, width=2))  # fmt: skip

    decode = rows[rows["metric"] == "decode_images_per_s"].drop_duplicates("processes")
    line("decode_images_per_s", decode["processes"], decode["value"], LOOKS["sdpa_padded"], "", "dot")
    for one in pruner:
        look = LOOKS["unpruned" if one == "none" else "triton"]
        label = f", {'unpruned' if one == 'none' else PRUNER_LABELS.get(one, one)}"
        for part, dash in (("gpu_images_per_s", "dash"), ("end_to_end_images_per_s", "solid")):
            at = rows[(rows["metric"] == part) & (rows["pruner"] == one)]
            line(part, at["processes"], at["value"], look, label, dash)
    figure.update_xaxes(title_text="processes that decode", type="log", tickvals=sorted(set(rows["processes"])))
    return figure.update_yaxes(title_text="images/s", **log_ticks(rows["value"]))


def gpus_of(name: str) -> int:
    """How many GPUs a row's column `gpu` names: "NVIDIA H200 x2" are two."""
    found = re.search(r" x(\d+)$", name)
    return int(found[1]) if found else 1


def scaling(frame, *, mode=None, batch=256, **only):
    """Images per second of every network against the number of GPUs, each divided by its own on one; dotted: as many
    times as there are GPUs.

    Needs rows of the suite `scaling`, of one GPU and of several of the same kind.  mode: one, or None for all.
    """
    name = "scaling"
    rows = rows_where(frame, name, metric="images_per_s", mode=mode, batch=batch, **only)
    rows = rows.assign(n=rows["gpu"].map(gpus_of), kind=rows["gpu"].str.replace(r" x\d+$", "", regex=True))
    one_of_each(rows, name, "kind")
    keys = ["model", "pruner", "mode"]
    one = rows[rows["n"] == 1][[*keys, "value"]].rename(columns={"value": "one"})
    rows = rows.merge(one, on=keys).sort_values("n")
    if rows["n"].nunique() < 2:
        raise ValueError(f"{name}: no rows of one GPU and of several of its kind")
    many = sorted(set(rows["n"]))
    figure = new_figure("Several GPUs, from decoded tensors", subtitle(rows, f"batch {batch} a GPU"))
    figure.add_scatter(x=many, y=many, mode="lines", name="as many times as GPUs", line=dict(color="#888888",
                                                                                             dash="dot"))  # fmt: skip
    symbols = itertools.cycle(("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "x"))
    for (model, pruner, how), at in rows.groupby(keys):
        look = "sdpa_padded" if how.startswith("training") else "unpruned" if pruner == "none" else "triton"
        kept = "" if pruner == "none" else f", {PRUNER_LABELS.get(pruner, pruner)}"
        figure.add_scatter(x=at["n"], y=at["value"] / at["one"], mode="lines+markers", text=at["value"].round(0),
                           name=f"{MODEL_LABELS.get(model, model)}{kept}, {how.partition(',')[0]}",
                           line=dict(color=LOOKS[look].colour, width=1),
                           marker=dict(symbol=next(symbols), size=10))  # fmt: skip
    figure.update_xaxes(title_text="GPUs", tickvals=many)
    return figure.update_yaxes(title_text="times the images/s of one", rangemode="tozero")
