"""Figures that ask whether an answer holds: on pictures without labels, and with other seeds of training.

Both take frames with the columns of `ragged.data.RESULT_COLUMNS`; see `ragged.plots`. A colour is a pruner, or a seed.
"""

from __future__ import annotations

from ..data.intervals import wilson
from .model import _panels
from .quality import AGAINST, NETWORKS, draw_pruners, joined, pruner_looks, stacked
from .style import fitted, rows_where, subtitle

FIDELITY = {
    "feature_cosine": ("cosine of the pooled features", "How far do the features move?", 1),
    "top1_agreement": ("same first class, % of the pictures", "Does the first class stay the same?", 100),
}
# Paul Tol's bright palette: no colour of a pruner among them.
SEEDS = (("#4477aa", "circle"), ("#ee6677", "square"), ("#228833", "diamond"), ("#ccbb44", "cross"), ("#66ccee", "x"))


def fidelity(frame, *, metric="feature_cosine", model=tuple(NETWORKS), title=None, **only):
    """How near a pruned network stays to itself, against the tokens that are left: one line for every pruner and
    schedule, one panel for every network.

    Needs rows of `metric`, kept_tokens and images. metric: feature_cosine, with bars from the 20 % to the 80 % quantile
    of the pictures, or top1_agreement, with 95 % intervals. model: a network or a list of them. Hollow: single cut,
    where there is another schedule too.
    """
    name, models = "fidelity", [model] if isinstance(model, str) else list(model)
    if metric not in FIDELITY:
        raise ValueError(f"metric: expected {' or '.join(FIDELITY)}, got {metric!r}")
    label, usual, scale = FIDELITY[metric]
    metrics = [metric, "kept_tokens", "images"]
    found = {m: rows_where(frame, name, model=m, metric=metrics, **only) for m in models}
    parts = {m: joined(rows, "kept_tokens", "", name, metric) for m, rows in found.items()}
    points = stacked(parts)
    bars = f"95 % intervals of {points['images'].min():g} pictures"
    if metric == "feature_cosine":
        bars = f"bars: 20 to 80 % of {points['images'].min():g} pictures"
        parts = {m: part.assign(images=float("nan")) for m, part in parts.items()}
    names = [NETWORKS.get(m, m) for m in models]
    figure, shown = _panels(title or usual, names, subtitle(stacked(found), bars)), set()
    figure.update_layout(width=840 if len(models) > 1 else 780)
    for column, part in enumerate(parts.values(), 1):
        draw_pruners(figure, part, "kept_tokens", points["schedule"].nunique() > 1, shown, column, scale)
    figure.update_xaxes(title_text=AGAINST["kept_tokens"])
    return fitted(figure.update_yaxes(title_text=label, col=1))


def seeds(frame, *, model="deit_tiny_digits_labels", keep=(0.7, 0.5, 0.3), tokens="single cut",
          title="Does another seed say the same?"):  # fmt: skip
    """Top-1 accuracy of every pruner with a fixed ratio that all seeds were counted with, a mark for every seed of
    training, a panel for every ratio.

    Needs rows of top1 and images of the suite `seeds`, whose models are called "NAME seed N"; rows of the suite
    `accuracy` with the name alone are seed 0, which is the network that the package carries.
    """
    name = "seeds"
    named = frame["model"].where(frame["suite"] != "accuracy", frame["model"] + " seed 0")
    rows = frame.assign(model=named)[named.str.startswith(f"{model} seed ")]
    rows = rows_where(rows, name, metric=["top1", "images"], tokens=[tokens, "unpruned"])
    rows = rows[(rows["backend"] != "sdpa_padded") & (rows["mode"] == "eager")]
    common = set.intersection(*(set(part["pruner"]) for _, part in rows.groupby("model")))
    pruners = [p for p in pruner_looks(common) if p not in ("ats", "threshold_l2_tau", "random_adaptive")]
    number = rows[rows["metric"] == "images"]["value"].min()
    panels = [f"keep {one:g}" for one in keep]
    figure = _panels(title, panels, subtitle(rows, NETWORKS.get(model, model), f"95 % intervals of {number:g} scenes"))
    figure.update_layout(width=860, scattermode="group", scattergap=0.3)
    models = sorted(set(rows["model"]), key=lambda one: int(one.rpartition(" ")[2]))
    for i, one in enumerate(models):
        colour, symbol = SEEDS[i % len(SEEDS)]
        for column, ratio in enumerate(keep, 1):
            there = rows[(rows["model"] == one) & (rows["metric"] == "top1")]
            there = there[(there["keep"] - ratio).abs().lt(1e-9) | (there["pruner"] == "none")]
            share = there.set_index("pruner")["value"].reindex(pruners).dropna()
            ends = [wilson(value, int(number)) for value in share]
            up, down = ([round(100 * abs(end[i] - v), 4) for end, v in zip(ends, share)] for i in (1, 0))
            bars = dict(type="data", symmetric=False, thickness=1, array=up, arrayminus=down)
            figure.add_scatter(
                x=[pruner_looks([p])[p].label for p in share.index], y=(100 * share).round(4), error_y=bars,
                mode="markers", name=one.removeprefix(f"{model} "), legendgroup=one, showlegend=column == 1,
                marker=dict(color=colour, symbol=symbol, size=9), offsetgroup=one, row=1, col=column,
            )  # fmt: skip
    labels = [look.label for look in pruner_looks(pruners).values()]
    figure.update_xaxes(tickangle=-45, categoryorder="array", categoryarray=labels)
    return fitted(figure.update_yaxes(title_text="top-1 accuracy, %", col=1), axis=88)
