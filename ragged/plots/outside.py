"""Figures of what lies around one GPU: decoding ahead of it, and others beside it.

They take frames of the suites `ceiling` and `scaling` with the columns of `ragged.data.RESULT_COLUMNS`; see
`ragged.plots`.
"""

from __future__ import annotations

import re

from .model import MODEL_LABELS, _panels
from .style import (
    LOOKS,
    PRUNER_LABELS,
    fitted,
    log_ticks,
    new_figure,
    one_of_each,
    ring,
    rows_where,
    subtitle,
    whiskers,
)

PARTS = {"decode_images_per_s": "decoding alone", "gpu_images_per_s": "GPU alone",
         "end_to_end_images_per_s": "end to end"}  # fmt: skip
SYMBOLS = {"deit_tiny": "circle", "deit_small": "square", "deit_base": "diamond"}


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

    def line(part, at, look, label, dash):
        x, y, bars = at["processes"], at["value"], whiskers(at)
        figure.add_scatter(x=x, y=y, error_y=bars, mode="lines+markers", name=f"{PARTS[part]}{label}", marker=dict(
            symbol=look.symbol, size=9), line=dict(color=look.colour, dash=dash, width=2))  # fmt: skip
        ring(figure, x, y, at)

    decode = rows[rows["metric"] == "decode_images_per_s"].drop_duplicates("processes")
    line("decode_images_per_s", decode, LOOKS["sdpa_padded"], "", "dot")
    for one in pruner:
        look = LOOKS["unpruned" if one == "none" else "triton"]
        label = f", {'unpruned' if one == 'none' else PRUNER_LABELS.get(one, one)}"
        for part, dash in (("gpu_images_per_s", "dash"), ("end_to_end_images_per_s", "solid")):
            at = rows[(rows["metric"] == part) & (rows["pruner"] == one)]
            line(part, at, look, label, dash)
    figure.update_xaxes(title_text="processes that decode (log)", type="log", tickvals=sorted(set(rows["processes"])))
    figure.update_yaxes(title_text="images/s (log)", **log_ticks(rows["value"]))
    return fitted(figure, plot=330)


def gpus_of(name: str) -> int:
    """How many GPUs a row's column `gpu` names: "NVIDIA H200 x2" and "2x NVIDIA H200" are two."""
    found = re.search(r" x(\d+)$", name) or re.match(r"(\d+) ?x ", name)
    return int(found[1]) if found else 1


def kind_of(name: str) -> str:
    """What a row's column `gpu` names, without the number: "NVIDIA H200" of "NVIDIA H200 x2"."""
    return re.sub(r"^\d+ ?x | x\d+$", "", name)


def scaling(frame, *, kind=None, mode=None, batch=None, **only):
    """Images per second against the number of GPUs, a panel for evaluation and one for training; dotted, in the colour
    of each line: as many times its first point as there are GPUs.

    Needs rows of the suite `scaling`, of two numbers of GPUs at least.  kind: the GPU, such as "NVIDIA H200"; None
    where there is only one kind.  mode, batch: one, or None for all.
    """
    name = "scaling"
    rows = rows_where(frame, name, metric="images_per_s", mode=mode, batch=batch, **only)
    rows = rows.assign(
        n=rows["gpu"].map(gpus_of), kind=rows["gpu"].map(kind_of), part=rows["mode"].str.split(",").str[0]
    )
    rows = rows_where(rows, name, kind=kind)
    one_of_each(rows, name, "kind")
    keys = ["part", "model", "pruner", "mode"]
    for _, line in rows.groupby(keys):
        one_of_each(line, name, "batch", "dtype")
    several = rows.groupby(keys)["n"].transform("nunique") >= 2
    if not several.any():
        raise ValueError(
            f"{name}: no rows of one GPU and of several of its kind; there are: {sorted(set(rows['gpu']))}"
        )
    rows = rows[several].sort_values("n")
    parts = sorted(set(rows["part"]))
    batches = sorted(set(rows["batch"]))
    below = subtitle(rows, f"batch {', '.join(f'{b:g}' for b in batches)} a GPU")
    figure, shown = _panels("Several GPUs, from decoded tensors", parts, below), set()
    for column, part in enumerate(parts, 1):
        for (_, model, pruner, how), line in rows[rows["part"] == part].groupby(keys):
            _against_gpus(figure, line, (model, pruner, how), shown, row=1, col=column)
    counts = sorted(set(rows["n"]))
    figure.update_xaxes(title_text="GPUs (log)", type="log", tickvals=counts, ticktext=[str(n) for n in counts])
    ideal = (
        rows["n"] / rows.groupby(keys)["n"].transform("min") * rows.groupby(keys)["value"].transform("first")
    ).max()
    figure.update_yaxes(**log_ticks([rows["value"].min(), max(ideal, rows["value"].max())]))
    figure.update_yaxes(title_text="images/s (log)", col=1)
    return fitted(figure, plot=330)


def _against_gpus(figure, line, of: tuple[str, str, str], shown: set, **place) -> None:
    """One network in one mode, and its ideal."""
    model, pruner, how = of
    colour = LOOKS["unpruned" if pruner == "none" else "triton"].colour
    label = f"{MODEL_LABELS.get(model, model)}, {'unpruned' if pruner == 'none' else PRUNER_LABELS.get(pruner, pruner)}"
    dash = "dash" if "eager" in how else "solid"
    label += ", eager" * (dash == "dash")
    n, value = line["n"], line["value"]
    figure.add_scatter(x=n, y=value.iloc[0] * n / n.iloc[0], mode="lines", name="as many times as GPUs",
                       legendrank=2000, legendgroup="ideal", showlegend="ideal" not in shown, hoverinfo="skip",
                       line=dict(color=colour, dash="dot", width=1), **place)  # fmt: skip
    times = [f"{x:.2f} times {n.iloc[0]}" for x in value / value.iloc[0]]
    figure.add_scatter(x=n, y=value.round(0), error_y=whiskers(line), mode="lines+markers", text=times, name=label,
                       legendgroup=label, showlegend=label not in shown, line=dict(color=colour, width=2, dash=dash),
                       marker=dict(symbol=SYMBOLS.get(model, "cross"), size=10), **place)  # fmt: skip
    ring(figure, n, value, line, **place)
    shown |= {"ideal", label}
