"""Figures of what pruning costs: differences of logits, the accuracy that is left, counts that follow the content.

`logit_differences` and `accuracy` take a frame with the columns of `ragged.data.RESULT_COLUMNS`, the others plain
lists; see `ragged.plots`. In this file a colour is a pruner, except where backends are compared.
"""

from __future__ import annotations

import math

from .model import MODEL_LABELS, _panels
from .style import INK, PRUNER_LABELS, Look, in_order, look, new_figure, one_of_each, rows_where, subtitle

# Paul Tol's muted palette: safe for colour-blind readers, and no colour of a backend among them.
PRUNER_LOOKS = {
    "none": Look("unpruned", INK, "dash", "square"),
    "threshold_l2": Look("Threshold-L2", "#332288", "solid", "circle"),
    "threshold_l2_tau": Look("Threshold-L2, true threshold", "#88ccee", "dash", "hexagon"),
    "dynamicvit": Look("DynamicViT", "#999933", "solid", "diamond"),
    "dynamicvit:untrained": Look("DynamicViT, untrained", "#999933", "dashdot", "x"),
    "evit": Look("EViT", "#117733", "solid", "triangle-up"),
    "ats": Look("ATS", "#cc6677", "dash", "star"),
    "random": Look("random", "#888888", "solid", "cross"),
    "random_adaptive": Look("random, counts of its own", "#888888", "dot", "cross"),
}
SPARE = ("#aa4499", "#882255", "#44aa99", "#ddcc77")  # for pruners that a reader brings
DTYPES = ("float32", "float16", "bfloat16")
DIFFERENCES = {"max_abs_logit_diff": "largest |Δ logit| (log)", "mean_abs_logit_diff": "mean |Δ logit| (log)"}
AGAINST = {"kept_tokens": "tokens after the last cut, mean per image", "images_per_s": "images/s"}


def pruner_looks(names) -> dict[str, Look]:
    """The look of every pruner in the order of legends; names that the collection does not know get spare colours."""
    known = [name for name in PRUNER_LOOKS if name in set(names)]
    own = sorted(set(names) - set(known))
    spare = {name: Look(name, SPARE[i % len(SPARE)], "dot", "x") for i, name in enumerate(own)}
    return {name: PRUNER_LOOKS[name] for name in known} | spare


# ---- two executions of the same masks ----


def logit_differences(frame, *, metric="max_abs_logit_diff", model="deit_small", claim=None, **only):
    """How far ragged and padded execution of the same masks are apart, one panel for every dtype.

    Needs rows of `metric`, one for every pruner, backend and dtype. Backends ending in :fp64 are compared with float64
    instead, and drawn as dashes. claim: the paper's figure, {pruner: value}.
    """
    name = "logit_differences"
    rows = rows_where(frame, name, metric=metric, model=model, **only)
    one_of_each(rows, name, "gpu", "model", "mode")
    dtypes = [d for d in DTYPES if d in set(rows["dtype"])]
    figure = _panels("Ragged against padded, same masks", dtypes, subtitle(rows, MODEL_LABELS.get(model, model)))
    pruners = [p for p in PRUNER_LABELS if p in set(rows["pruner"])]
    labels = [PRUNER_LABELS[p] for p in pruners]
    seen = set()
    for column, dtype in enumerate(dtypes, 1):
        panel = rows[rows["dtype"] == dtype].set_index("pruner")
        for backend in in_order(panel["backend"]):
            exact = backend.endswith(":fp64")
            style, values = look(backend.removesuffix(":fp64")), panel[panel["backend"] == backend]["value"]
            mark = dict(symbol="line-ew-open" if exact else style.symbol, size=13 if exact else 9, color=style.colour)
            figure.add_scatter(
                x=labels, y=values.reindex(pruners).tolist(), mode="markers", legendgroup=backend,
                name=f"{style.label}, error against float64" if exact else style.label,
                showlegend=backend not in seen, marker=mark | dict(line_width=3 if exact else 1.5), row=1, col=column,
            )  # fmt: skip
            seen.add(backend)
        if claim and dtype == "float16":
            figure.add_scatter(
                x=labels, y=[claim.get(p) for p in pruners], mode="markers", name="the paper's figure (float16)",
                marker=dict(symbol="line-ew-open", size=13, color=INK, line_width=2), row=1, col=column,
            )  # fmt: skip
    figure.update_layout(scattermode="group", scattergap=0.35, width=800, legend_y=-0.34)  # backends side by side
    figure.update_xaxes(tickangle=-45)
    figure.update_yaxes(**_powers(_positive([*rows["value"], *(claim or {}).values()])))
    return figure.update_yaxes(title_text=DIFFERENCES[metric], col=1)


def rounding(errors, *, title="Whose rounding is it?", below=""):
    """Errors of two executions against float64, and their distance from each other, as bars on a logarithmic axis.

    errors: dicts with `name` (such as a dtype), and the errors `padded`, `ragged` and `apart`, in logits. Two
    executions cannot be farther apart than their errors add up to; with both errors small, the distance is rounding.
    """
    figure = new_figure(title, below)
    names = [one["name"] for one in errors]
    bars = (
        ("padded", "padded against float64", dict(color=look("sdpa_padded").colour)),
        ("ragged", "ragged against float64", dict(color=look("triton").colour)),
        ("apart", "ragged against padded", dict(color="white", line=dict(color=INK, width=1.5))),
    )
    for key, label, marker in bars:
        values = [float(one[key]) or None for one in errors]  # an exact zero has no place on a log axis
        text = ["0" if v is None else f"{v:.1e}" for v in values] if len(errors) <= 4 else None  # more would overlap
        figure.add_bar(x=names, y=values, name=label, text=text, textposition="outside", cliponaxis=False,
                       marker=marker)  # fmt: skip
    exponents = _powers(_positive([one[key] for one in errors for key, *_ in bars]))
    figure.update_layout(barmode="group", legend=dict(orientation="h", y=1.0, yanchor="bottom", x=0), margin_t=110)
    return figure.update_yaxes(title_text="difference of logits, root mean square (log)", **exponents)


# ---- accuracy ----


def accuracy(frame, *, against="kept_tokens", model="deit_tiny_digits", mode="compile+graph", least=0, title=None,
             **only):  # fmt: skip
    """Top-1 accuracy against kept tokens, or against images per second, one line for every pruner and schedule.

    Needs rows of metric top1 and of metric `against`; they belong together where pruner, tokens (the schedule) and keep
    agree. mode: which images_per_s are meant; what was not recorded in that mode is left out. Against images_per_s the
    points that no other beats in both are joined by a grey staircase, the Pareto front. Hollow: single cut. least: the
    smallest accuracy shown, in per cent; the subtitle says how many points lie lower.
    """
    name = "accuracy"
    rows = rows_where(frame, name, model=model, metric=["top1", against], **only)
    points = _joined(rows, against, mode, name)
    how = mode if against == "images_per_s" else ""
    batch = f"batch {points['batch'].iloc[0]:g}" if how else ""
    low = (100 * points["value_top1"] < least).sum()
    below = subtitle(rows, MODEL_LABELS.get(model, model), how, batch, f"{low} points below {least} %" if low else "")
    figure = new_figure(title or "What is left of the accuracy", below, width=780, height=400)
    if against == "images_per_s":
        _front(figure, points)
    looks = pruner_looks(points["pruner"])
    groups = dict(list(points.groupby(["pruner", "schedule"])))
    for pruner, schedule in sorted(groups, key=lambda key: (list(looks).index(key[0]), key[1])):
        line, style = groups[pruner, schedule].sort_values(f"value_{against}"), looks[pruner]
        hollow = schedule == "single cut"
        figure.add_scatter(
            x=line[f"value_{against}"], y=100 * line["value_top1"], error_y=_bars(line),
            name=f"{style.label}{', ' + schedule if schedule else ''}", text=[f"keep {k:g}" for k in line["keep"]],
            mode="markers" if len(line) == 1 else "lines+markers",
            line=dict(color=style.colour, dash="dot" if hollow else style.dash, width=2),
            marker=dict(symbol=f"{style.symbol}-open" if hollow else style.symbol, size=10, color=style.colour),
        )  # fmt: skip
    whole = points[points["pruner"] == "none"]
    if len(whole):
        figure.add_hline(y=100 * whole["value_top1"].iloc[0], line=dict(color=INK, width=1, dash="dash"))
    if low:
        figure.update_yaxes(range=[least, 100 * points["value_top1"].max() + 0.05 * (100 - least)])
    figure.update_xaxes(title_text=AGAINST[against])
    return figure.update_yaxes(title_text="top-1 accuracy, %")


def _joined(rows, against: str, mode: str, name: str):
    """One line per pruner, schedule and keep, with the columns value_top1 and value_<against>. Of several backends the
    last in the alphabet counts: triton before sdpa_padded. Threshold-L2 has one cut in every schedule: drawn once."""
    key = ["pruner", "tokens", "keep"]
    share, other = (rows_where(rows, name, metric=metric) for metric in ("top1", against))
    if against == "images_per_s":
        other = rows_where(other, name, mode=mode)
    share, other = (part.sort_values("backend").drop_duplicates(key, keep="last") for part in (share, other))
    points = share.merge(other[[*key, "value"]], on=key, suffixes=("_top1", f"_{against}"))
    if points.empty:
        raise ValueError(f"{name}: no rows of top1 and {against} agree in {', '.join(key)}")
    schedule = points["tokens"].where(points["tokens"].isin(["published", "single cut"]), "")
    schedule = schedule.mask(points["pruner"].str.startswith("threshold_l2") & (schedule != ""), "single cut")
    return points.assign(schedule=schedule).drop_duplicates(["pruner", "schedule", "keep"])


def _bars(line):
    """The 20 % and 80 % quantiles of a share as bars, in per cent; nothing where they are not known."""
    if line[["q20", "q80"]].isna().any(axis=None):
        return None
    up, down = 100 * (line["q80"] - line["value_top1"]), 100 * (line["value_top1"] - line["q20"])
    return dict(type="data", symmetric=False, array=up, arrayminus=down, thickness=1)


def pareto_front(speed, share) -> list[int]:
    """Numbers of the points that no other point beats: none is at least as fast and as accurate, and better in one."""
    order = sorted(range(len(speed)), key=lambda i: (-speed[i], -share[i]))
    front, best = [], -1.0
    for i in order:  # from the fastest down: a slower point must be more accurate than all that are faster
        if share[i] > best:
            front.append(i)
            best = share[i]
    return front[::-1]


def _front(figure, points) -> None:
    speed, share = points["value_images_per_s"].tolist(), (100 * points["value_top1"]).tolist()
    front = pareto_front(speed, share)
    figure.add_scatter(x=[speed[i] for i in front], y=[share[i] for i in front], mode="lines", name="Pareto front",
                       line=dict(color="#bbbbbb", width=7, shape="vh"), hoverinfo="skip")  # fmt: skip


# ---- counts that follow the content ----


def counts_against_size(sizes, counts, *, title="Kept tokens follow the content", below=""):
    """Tokens that each image keeps against the size of its object, one panel for every setting of a pruner.

    sizes: side of the object in pixels.  counts: {name of a panel: (pruner, tokens per image, rank correlation)}.
    """
    looks = pruner_looks({pruner for pruner, *_ in counts.values()})
    names = [f"{name}<br>rank correlation {rank:+.2f}" for name, (*_, rank) in counts.items()]
    figure = _panels(title, names, below)
    figure.update_layout(width=max(700, 280 * len(names)), height=380, margin_t=124, showlegend=False)
    for column, (name, (pruner, tokens, _)) in enumerate(counts.items(), 1):
        marker = dict(color=looks[pruner].colour, symbol=looks[pruner].symbol, size=7, opacity=0.75)
        figure.add_scatter(x=list(sizes), y=list(tokens), mode="markers", marker=marker, name=name, row=1, col=column)
    figure.update_xaxes(title_text="longer side of the digit, pixels")
    return figure.update_yaxes(title_text="tokens kept, CLS included", col=1)


def count_distribution(counts, *, seqlen=197, title="The counts of one batch", below=""):
    """Every image of a batch as a dot at the tokens it keeps; a thick bar marks the mean, a thin one the longest.

    counts: {pruner: tokens per image}. The text at the right says which share of the rows would be padding.
    """
    looks = pruner_looks(counts)
    figure = new_figure(title, below, height=150 + 70 * len(counts))
    for pruner, tokens in list(counts.items())[::-1]:
        style, longest, mean = looks[pruner], max(tokens), sum(tokens) / len(tokens)
        figure.add_box(x=list(tokens), name=style.label, boxpoints="all", jitter=0.8, pointpos=0, hoverinfo="x",
                       fillcolor="rgba(0,0,0,0)", line=dict(color="rgba(0,0,0,0)"), showlegend=False,
                       marker=dict(color=style.colour, symbol=style.symbol, size=6, opacity=0.6))  # fmt: skip
        for at, size in ((mean, 30), (longest, 16)):
            mark = dict(symbol="line-ns-open", size=size, color=INK, line_width=3 if at == mean else 1.5)
            figure.add_scatter(x=[at], y=[style.label], mode="markers", marker=mark, showlegend=False, hoverinfo="x")
        text = f"mean {mean:.0f}, longest {longest}: {1 - mean / longest:.0%} padding"
        figure.add_annotation(x=seqlen * 1.02, y=style.label, text=text, showarrow=False, xanchor="left",
                              font=dict(size=11))  # fmt: skip
    ticks = [*range(0, seqlen, 50), seqlen]
    figure.update_xaxes(title_text="tokens kept, CLS included", range=[0, seqlen * 1.45], tickvals=ticks)
    return figure.update_yaxes(showgrid=False)


def _positive(values) -> list[float]:
    found = [float(v) for v in values if v == v and v > 0]
    return found or [1.0]


def _powers(values):
    """A log axis labelled at powers of ten, for errors."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    step = 1 if high - low <= 6 else 2
    ticks = [10.0**e for e in range(low, high + 2, step)]
    return dict(type="log", tickvals=ticks, ticktext=[f"{t:.0e}" for t in ticks], range=[low - 0.3, high + 0.6])
