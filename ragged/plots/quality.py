"""Figures of what pruning costs: differences of logits, the accuracy that is left, counts that follow the content.

`logit_differences` and `accuracy` take a frame with the columns of `ragged.data.RESULT_COLUMNS`, the others plain
lists; see `ragged.plots`. In this file a colour is a pruner, except where backends are compared.
"""

from __future__ import annotations

import math

import numpy as np

from ..data.intervals import wilson
from .model import MODEL_LABELS, _panels
from .style import INK, PRUNER_LABELS, Look, fitted, in_order, look, new_figure, one_of_each, rows_where, subtitle

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
NETWORKS = {"deit_tiny_digits": "taught with boxes, to be prunable", "deit_tiny_digits_labels": "taught labels alone"}
AGAINST = {"kept_tokens": "tokens left, mean per image", "images_per_s": "images/s"}


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
    figure.update_layout(scattermode="group", scattergap=0.35, width=800)  # backends side by side
    figure.update_xaxes(tickangle=-45)
    figure.update_yaxes(**_powers(_positive([*rows["value"], *(claim or {}).values()])))
    figure.update_yaxes(title_text=DIFFERENCES[metric], col=1)
    return fitted(figure, axis=88)


def rounding(errors, *, title="Whose rounding is it?", below=""):
    """Errors of two executions against float64, and their distance from each other, as bars on a logarithmic axis.

    errors: dicts with `name` (such as a dtype), and the errors `padded`, `ragged` and `apart`, in logits. That the
    third is at most the sum of the others is true of any three answers; what is to be seen is whether the second is as
    small as the first.
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
    figure.update_layout(barmode="group", width=880 if len(errors) > 6 else 760)
    figure.update_yaxes(title_text="difference of logits,<br>root mean square (log)", **exponents)
    return fitted(figure, axis=90 if len(errors) > 6 else 62)  # names of many groups are turned on a narrow page


# ---- accuracy ----


def accuracy(frame, *, against="kept_tokens", model="deit_tiny_digits", mode="compile+graph", least=0, title=None,
             **only):  # fmt: skip
    """Top-1 accuracy against kept tokens, or against images per second, one line for every pruner and schedule.

    Needs rows of metric top1 and of metric `against`; they belong together where pruner, tokens (the schedule) and keep
    agree. Rows of metric images say of how many, for 95 % intervals. model: one network, or a list of them for a panel
    each. mode: which images_per_s are meant; what was not recorded in that mode is left out. Against images_per_s the
    points that no other beats in both are joined by a grey staircase, the Pareto front. Hollow: single cut, where there
    is another schedule too. least: the smallest accuracy shown, in per cent; the subtitle says how many points lie
    lower.
    """
    name, models = "accuracy", [model] if isinstance(model, str) else list(model)
    metrics = ["top1", against, "images"]
    found = {m: rows_where(frame, name, model=m, metric=metrics, **only) for m in models}
    parts = {m: joined(rows, against, mode, name) for m, rows in found.items()}
    points = stacked(parts)
    rows = stacked(found)
    how = mode if against == "images_per_s" else ""
    low = (100 * points["value_share"] < least).sum()
    known = len(models) == 1 and (MODEL_LABELS.get(model, NETWORKS.get(model, model)))
    below = subtitle(rows, known or "", how, f"batch {points['batch'].iloc[0]:g}" if how else "", _bars_of(points),
                     f"{low} points below {least} %" if low else "")  # fmt: skip
    figure = _panels(title or "What is left of the accuracy", [NETWORKS.get(m, m) for m in models], below)
    if len(models) == 1:
        figure.layout.annotations = ()
    figure.update_layout(width=840 if len(models) > 1 else 780)
    shown: set[str] = set()
    for column, part in enumerate(parts.values(), 1):
        draw_pruners(figure, part, against, points["schedule"].nunique() > 2, shown, column)
    if low:
        figure.update_yaxes(range=[least, 100 * points["value_share"].max() + 0.05 * (100 - least)])
    figure.update_xaxes(title_text=AGAINST[against])
    return fitted(figure.update_yaxes(title_text="top-1 accuracy, %", col=1))


def draw_pruners(figure, points, against: str, several: bool, shown: set[str], column: int, scale: float = 100) -> None:
    """The lines of one network. several: schedules that the legend has to tell apart.  shown: what stands in it.
    scale: what the shares are multiplied with."""
    if against == "images_per_s":
        _front(figure, points, column)
    looks = pruner_looks(points["pruner"])
    groups = dict(list(points.groupby(["pruner", "schedule"])))
    for pruner, schedule in sorted(groups, key=lambda key: (list(looks).index(key[0]), key[1])):
        line, style = groups[pruner, schedule].sort_values(f"value_{against}"), looks[pruner]
        hollow = several and schedule == "single cut"
        label = f"{style.label}{', ' + schedule if several and schedule else ''}"
        figure.add_scatter(
            x=line[f"value_{against}"].round(6), y=(scale * line["value_share"]).round(6), name=label,
            error_y=_bars(line, scale),
            legendgroup=label, showlegend=label not in shown, text=[f"keep {k:g}" for k in line["keep"]],
            mode="markers" if len(line) == 1 else "lines+markers", row=1, col=column,
            line=dict(color=style.colour, dash="dot" if hollow else style.dash, width=2),
            marker=dict(symbol=f"{style.symbol}-open" if hollow else style.symbol, size=10, color=style.colour),
        )  # fmt: skip
        shown.add(label)
    whole = points[points["pruner"] == "none"]
    if len(whole):
        line = dict(color=INK, width=1, dash="dash")
        figure.add_hline(y=scale * whole["value_share"].iloc[0], line=line, row=1, col=column)


def joined(rows, against: str, mode: str, name: str, metric: str = "top1"):
    """One line per pruner, schedule and keep, with the columns value_share (of `metric`), value_<against> and images.
    Of several backends the last in the alphabet counts: triton before sdpa_padded. Threshold-L2 has one cut in every
    schedule: drawn once."""
    key = ["pruner", "tokens", "keep"]
    share, other = (rows_where(rows, name, metric=one) for one in (metric, against))
    if against == "images_per_s":
        other = rows_where(other, name, mode=mode)
    latest = lambda part: part.sort_values("backend").drop_duplicates(key, keep="last")  # noqa: E731
    points = latest(share).merge(latest(other)[[*key, "value"]], on=key, suffixes=("_share", f"_{against}"))
    counted = latest(rows[rows["metric"] == "images"])[[*key, "value"]].rename(columns={"value": "images"})
    points = points.merge(counted, on=key, how="left")
    if points.empty:
        raise ValueError(f"{name}: no rows of {metric} and {against} agree in {', '.join(key)}")
    schedule = points["tokens"].where(points["tokens"].isin(["published", "single cut"]), "")
    schedule = schedule.mask(points["pruner"].str.startswith("threshold_l2") & (schedule != ""), "single cut")
    return points.assign(schedule=schedule).drop_duplicates(["pruner", "schedule", "keep"])


def stacked(parts):
    import pandas

    return pandas.concat(parts.values())


def _bars_of(points) -> str:
    """What the bars are, for a subtitle."""
    if points["images"].notna().all():
        return f"95 % intervals of {points['images'].min():,.0f} scenes"
    return "bars: 20 to 80 %" if points[["q20", "q80"]].notna().all(axis=None) else ""


def _bars(line, scale: float = 100):
    """The 95 % interval of a share, times scale, where it is known of how many images; otherwise the 20 % and 80 %
    quantiles; nothing where those are not known either."""
    share = line["value_share"]
    if line["images"].notna().all():
        low, high = map(np.array, zip(*(wilson(min(1.0, one), int(n)) for one, n in zip(share, line["images"]))))
    elif line[["q20", "q80"]].isna().any(axis=None):
        return None
    else:
        low, high = line["q20"], line["q80"]
    up, down = (scale * (high - share)).round(6), (scale * (share - low)).round(6)
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


def _front(figure, points, column: int) -> None:
    speed, share = points["value_images_per_s"].tolist(), (100 * points["value_share"]).tolist()
    front = pareto_front(speed, share)
    figure.add_scatter(x=[round(speed[i], 4) for i in front], y=[round(share[i], 4) for i in front], mode="lines",
                       name="Pareto front", showlegend=column == 1, legendgroup="front", hoverinfo="skip",
                       line=dict(color="#bbbbbb", width=7, shape="vh"), row=1, col=column)  # fmt: skip


# ---- counts that follow the content ----


def counts_against_size(sizes, counts, *, title="Do kept tokens follow the content?", below=""):
    """Tokens that each image keeps against the size of its object, one panel for every setting of a pruner.

    sizes: side of the object in pixels.  counts: {name of a panel: (pruner, tokens per image, rank correlation)}; with
    the ends of its interval as a fourth entry, these too are written above the panel.
    """
    looks = pruner_looks({pruner for pruner, *_ in counts.values()})
    ends = {name: f"<br>{more[0][0]:+.2f} to {more[0][1]:+.2f}" if more else ""
            for name, (_, _, _, *more) in counts.items()}  # fmt: skip
    names = [f"{name}<br>correlation {rank:+.2f}{ends[name]}" for name, (_, _, rank, *_) in counts.items()]
    said = f"rank correlations{' and their 95 % intervals' if any(ends.values()) else ''}"
    figure = _panels(title, names, " · ".join(filter(None, [below, said]))).update_annotations(font_size=11)
    figure.update_layout(width=max(700, 220 * len(names)), showlegend=False)
    for column, (name, (pruner, tokens, *_)) in enumerate(counts.items(), 1):
        marker = dict(color=looks[pruner].colour, symbol=looks[pruner].symbol, size=7, opacity=0.75)
        figure.add_scatter(x=list(sizes), y=list(tokens), mode="markers", marker=marker, name=name, row=1, col=column)
    figure.update_xaxes(title=dict(text="side of the digit, px", font_size=12))
    return fitted(figure.update_yaxes(title_text="tokens kept, CLS included", col=1), plot=240)


def count_distribution(counts, *, seqlen=197, title="The counts of one batch", below=""):
    """Every image of a batch as a dot at the tokens it keeps; a thick bar marks the mean, a thin one the longest.

    counts: {pruner: tokens per image}. The text above says which share of the rows would be padding.
    """
    looks = pruner_looks(counts)
    figure = new_figure(title, below, height=160 + 82 * len(counts))
    for pruner, tokens in list(counts.items())[::-1]:
        style, longest, mean = looks[pruner], max(tokens), sum(tokens) / len(tokens)
        figure.add_box(x=list(tokens), name=style.label, boxpoints="all", jitter=0.8, pointpos=0, hoverinfo="x",
                       fillcolor="rgba(0,0,0,0)", line=dict(color="rgba(0,0,0,0)"), showlegend=False,
                       marker=dict(color=style.colour, symbol=style.symbol, size=6, opacity=0.6))  # fmt: skip
        for at, size in ((mean, 30), (longest, 16)):
            mark = dict(symbol="line-ns-open", size=size, color=INK, line_width=3 if at == mean else 1.5)
            figure.add_scatter(x=[at], y=[style.label], mode="markers", marker=mark, showlegend=False, hoverinfo="x")
        text = f"mean {mean:.0f}, longest {longest}: {1 - mean / longest:.0%} padding"
        figure.add_annotation(x=0, y=style.label, text=text, showarrow=False, xanchor="left", yshift=30,
                              font=dict(size=11))  # fmt: skip
    ticks = [*range(0, seqlen, 50), seqlen]
    figure.update_xaxes(title_text="tokens kept, CLS included", range=[-2, seqlen * 1.02], tickvals=ticks)
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
