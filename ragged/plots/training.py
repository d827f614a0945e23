"""Figures of training: where gradients arrive, the backward pass beside its rivals', what a whole step costs in time
and in memory, and how a network recovers under its cut.

`backward_speed` and `training_step` take frames with the columns of `ragged.data.RESULT_COLUMNS`, the others plain
lists; see `ragged.plots`.
"""

from __future__ import annotations

from ..data.intervals import wilson
from .model import MODEL_LABELS, _panels
from .style import (
    INK,
    fitted,
    in_order,
    log_ticks,
    look,
    marked,
    new_figure,
    one_of_each,
    place,
    rows_where,
    short,
    subtitle,
    whiskers,
)

RIVALS = ("triton", "torch_varlen", "flash_attn", "efficient_varlen", "sdpa_padded")
CASES = (("39", 64), ("99", 64), ("197", 1), ("197", 64), ("U(20,197)", 64), ("577", 32))
STEP = {"images_per_s": ("images/s", 1.0), "peak_mb": ("peak memory, GB", 1024.0)}
CUTS = ("197", "138", "99", "59", "U(30,168)")  # counts behind the cut, in the order of the axis


def backward_speed(frame, *, backend=RIVALS, cases=CASES, mode="backward", clock="gpu_us", dtype="float16", **only):
    """GPU time of attention's backward pass, a group of bars for every case, a bar for every provider.

    Needs rows of the suite `backward`. cases: pairs of tokens and batch; those without rows are left out.  mode:
    backward alone, or eager for both directions.
    """
    name = "backward_speed"
    there = [one for one in backend if one in set(frame["backend"])] or list(backend)
    rows = rows_where(frame, name, metric=clock, mode=mode, dtype=dtype, backend=there, **only)
    one_of_each(rows, name, "gpu", "model")
    rows = rows.assign(case=[f"{t}<br>× {b:g}" for t, b in zip(rows["tokens"], rows["batch"])])
    names = [f"{t}<br>× {b:g}" for t, b in cases]
    rows = rows_where(rows, name, case=[one for one in names if one in set(rows["case"])] or names)
    what = {"backward": "the backward pass alone", "eager": "forward and backward"}.get(mode, mode)
    figure = new_figure("Attention, backwards", subtitle(rows, what, dtype), width=860)
    for one in in_order(rows["backend"]):
        own = rows[rows["backend"] == one].set_index("case").reindex([n for n in names if n in set(rows["case"])])
        _bars(figure, own.index, own["value"], one, whiskers(own.dropna(subset=["value"])), own)
    figure.update_layout(barmode="group")
    figure.update_xaxes(title_text="tokens × images", type="category")
    figure.update_yaxes(title_text="GPU time, µs (log)", **log_ticks(rows["value"]))
    return fitted(figure, axis=76)


def training_step(frame, *, model="deit_base", batch=256, mode="eager", **only):
    """A step of training while tokens are dropped: images per second and peak memory, a panel for each.

    Needs rows of images_per_s and peak_mb of the suite `training`. The groups are the tokens behind the cut.
    """
    name = "training_step"
    rows = rows_where(frame, name, model=model, batch=batch, mode=mode, metric=list(STEP), **only)
    one_of_each(rows, name, "gpu", "dtype")
    groups = sorted(set(rows["tokens"]), key=place(CUTS))
    below = subtitle(rows, MODEL_LABELS.get(model, model), f"batch {batch:g}", mode, rows["dtype"].iloc[0])
    figure = _panels("A step of training", [words for words, _ in STEP.values()], below)
    figure.update_layout(width=860, barmode="group")
    shown: set[str] = set()
    for column, (metric, (_, scale)) in enumerate(STEP.items(), 1):
        panel = rows[rows["metric"] == metric]
        for one in in_order(panel["backend"]):
            own = panel[panel["backend"] == one].set_index("tokens").reindex(groups).dropna(subset=["value"])
            _bars(figure, own.index, own["value"] / scale, one, whiskers(own, scale), own, one not in shown, column)
            shown.add(one)
    figure.update_xaxes(title_text="tokens behind the cut", type="category", categoryorder="array",
                        categoryarray=groups)  # fmt: skip
    figure.update_yaxes(rangemode="tozero", matches=None, showticklabels=True)
    figure.update_xaxes(domain=[0, 0.46], col=1)
    figure.update_xaxes(domain=[0.56, 1], col=2)
    for note, at in zip(figure.layout.annotations, (0.23, 0.78)):
        note.x = at
    return fitted(figure)


# ---- measured live ----


def gradient_map(sizes, kept, *, title="Where gradients arrive", below=""):
    """Size of the gradient of every token at several places, each place in shares of its largest; a zero is white.

    sizes: {place: one number a token}.  kept: one bool a token, whether it stays behind the cut.
    """
    import plotly.graph_objects as go

    places, names = list(sizes), [f"token {i}, {'kept' if one else 'dropped'}" for i, one in enumerate(kept)]
    share = [[float(sizes[name][i]) / max(map(float, sizes[name])) for name in places] for i in range(len(names))]
    figure = new_figure(title, below, width=700, height=190 + 32 * len(names))
    figure.add_trace(go.Heatmap(
        z=share, x=places, y=names, text=[["0" if v == 0 else f"{v:.2f}" for v in row] for row in share],
        texttemplate="%{text}", colorscale=[[0, "white"], [1, "#d55e00"]], zmin=0, zmax=1, xgap=2, ygap=2,
        showscale=False, hoverinfo="skip",
    ))  # fmt: skip
    figure.update_xaxes(title_text="shares of the column's largest", type="category", showgrid=False)
    return figure.update_yaxes(type="category", autorange="reversed", showgrid=False)


def recovery(curve, whole, *, title="Reading again under the cut", below=""):
    """Share of scenes that are read, with 95 % intervals, after so many steps of training.

    curve: dicts with steps, right (a share) and images.  whole: the share of the unpruned network, as a line.
    """
    figure = new_figure(title, below, width=700)
    steps, right = [one["steps"] for one in curve], [one["right"] for one in curve]
    low, high = zip(*(wilson(one["right"], one["images"]) for one in curve))
    bars = dict(type="data", symmetric=False, thickness=1, array=[100 * (h - r) for h, r in zip(high, right)],
                arrayminus=[100 * (r - lo) for lo, r in zip(low, right)])  # fmt: skip
    line = dict(color=look("triton").colour, width=2)
    figure.add_scatter(x=steps, y=[100 * r for r in right], error_y=bars, mode="lines+markers", name="under the cut",
                       line=line, marker=dict(size=9, color=line["color"]))  # fmt: skip
    figure.add_scatter(x=[steps[0], steps[-1]], y=[100 * whole] * 2, mode="lines", name="unpruned, before",
                       line=dict(color=INK, width=1, dash="dash"))  # fmt: skip
    figure.update_xaxes(title_text="steps of training", tickvals=steps)
    return fitted(figure.update_yaxes(title_text="right, %"))


def _bars(figure, x, y, backend, bars, rows, legend=True, column=None) -> None:
    at = {} if column is None else dict(row=1, col=column)
    text = ["" if v != v else marked(short(v), bad) for v, bad in zip(y, rows["disturbed"] == True)]  # noqa: E712
    figure.add_bar(
        x=list(x), y=[None if v != v else round(v, 4) for v in y], name=look(backend).label, legendgroup=backend,
        showlegend=legend, marker=dict(color=look(backend).colour), error_y=bars, hovertext=text,
        hoverinfo="x+text+name", **at,
    )  # fmt: skip
