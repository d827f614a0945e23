"""Figures of the whole model: throughput and speedup by batch, speedup against sparsity or image size.

Each takes a frame with the columns of `ragged.data.RESULT_COLUMNS` and returns a plotly figure; see `ragged.plots`.
"""

from __future__ import annotations

import math

from .style import (
    INK,
    PRUNER_LABELS,
    draw_line,
    fitted,
    in_order,
    log_ticks,
    look,
    need_columns,
    new_figure,
    one_of_each,
    place,
    ring,
    rows_where,
    subtitle,
    ticks_at,
)

MODEL_LABELS = {"deit_tiny": "DeiT-Ti", "deit_small": "DeiT-S", "deit_base": "DeiT-B"}
MODES = ("eager", "graph", "compile", "compile+graph")


def throughput_by_batch(frame, *, model="deit_base", tokens=None, mode=None, dtype="float16", **only):
    """Images per second against the batch, one panel for every mode (eager, graph, compile+graph).

    Needs rows of metric images_per_s for one model. tokens: the length distribution of the pruned pipelines, such as
    "U(30,168)"; the unpruned model is drawn beside them whatever its own token count is called.
    """
    name = "throughput_by_batch"
    rows = rows_where(frame, name, metric="images_per_s", model=model, dtype=dtype, mode=mode, **only)
    whole = rows["backend"] == "unpruned"
    if tokens is not None:
        rows_where(rows[~whole], name, tokens=tokens)  # says which token counts there are
        rows = rows[whole | (rows["tokens"] == tokens)]
    one_of_each(rows, name, "gpu")
    one_of_each(rows[rows["backend"] != "unpruned"], name, "tokens")
    modes = sorted(set(rows["mode"]), key=place(MODES))
    figure = _panels("Throughput", modes, subtitle(rows, MODEL_LABELS.get(model, model), _kept(rows), dtype))
    shown = set()
    for column, mode in enumerate(modes, 1):
        panel = rows[rows["mode"] == mode]
        for backend in in_order(panel["backend"]):
            line = panel[panel["backend"] == backend].sort_values("batch")
            draw_line(figure, line["batch"], line, backend, legend=backend not in shown, row=1, col=column)
            shown.add(backend)
    figure.update_xaxes(title_text="batch (log)", **ticks_at(rows["batch"]))
    figure.update_yaxes(**log_ticks(rows["value"]))
    return fitted(figure.update_yaxes(title_text="images/s (log)", col=1))


def sparsity_speedup(frame, *, model="deit_base", batch=64, mode=None, dtype="float16", **only):
    """Speedup over the unpruned model against the share of pruned tokens, one panel for every pruner.

    Needs images_per_s rows with the unpruned model among them. Rows of flops_ratio draw the ceiling: no pipeline can
    save more time than it saves arithmetic, as long as the arithmetic itself does not run better.
    """
    name = "sparsity_speedup"
    rows = rows_where(frame, name, model=model, dtype=dtype, **only)
    ceilings = rows[rows["metric"] == "flops_ratio"]
    rows = rows_where(rows, name, metric="images_per_s", batch=batch, mode=mode)
    one_of_each(rows, name, "gpu", "mode")
    whole = rows_where(rows, name, backend="unpruned")
    rows = rows[rows["backend"] != "unpruned"]
    divided = {c: (rows[c] / whole["value"].median()).round(4) for c in ("value", "q20", "q80")}
    rows = rows.assign(**divided, disturbed=rows["disturbed"] | whole["disturbed"].any())
    pruners = sorted(set(rows["pruner"]), key=place(PRUNER_LABELS))
    below = subtitle(rows, MODEL_LABELS.get(model, model), f"batch {batch}", rows["mode"].iloc[0], dtype)
    figure = _panels("Speedup over the unpruned model", [PRUNER_LABELS.get(p, p) for p in pruners], below)
    shown = set()
    for column, pruner in enumerate(pruners, 1):
        _ceiling(figure, ceilings[ceilings["pruner"].isin([pruner, "", "none"])], column)
        figure.add_hline(y=1, line=dict(color="#222222", width=1), row=1, col=column)
        panel = rows[rows["pruner"] == pruner]
        for backend in in_order(panel["backend"]):
            line = panel[panel["backend"] == backend].sort_values("keep", ascending=False)
            pruned = 100 * (1 - line["keep"])
            draw_line(figure, pruned, line, backend, legend=backend not in shown, row=1, col=column)
            shown.add(backend)
    figure.update_xaxes(title_text="pruned tokens, %", dtick=25, range=[-5, 100])
    figure.update_yaxes(rangemode="tozero")
    return fitted(figure.update_yaxes(title_text="times the unpruned images/s", col=1))


def speedup_by_batch(frame, *, model="deit_base", tokens="99", mode=None, dtype="float16", **only):
    """Times the unpruned model's images per second, against the batch; one panel for every mode.

    Needs images_per_s rows of one model with the unpruned one among them; each mode is divided by its own unpruned
    model. Rows of flops_ratio draw the ceiling. tokens: the distribution of the pruned pipelines.
    """
    name = "speedup_by_batch"
    rows = rows_where(frame, name, model=model, dtype=dtype, mode=mode, **only)
    modes = sorted(set(rows["mode"]), key=place(MODES))
    found = {m: _over_unpruned(rows[rows["mode"] == m], name, tokens) for m in modes}
    below = subtitle(_drawn(found, rows), MODEL_LABELS.get(model, model), f"pruned: {tokens} tokens", dtype)
    return _speedup_panels(found, name, below)


def resolution_speedup(frame, *, model="deit_base", ragged=False, mode="compile+graph", dtype="float16", **only):
    """Times the unpruned model's images per second, against the batch; one panel for every image size.

    Needs rows of the suite `resolution`, whose unpruned rows say how many tokens a size has. ragged: the truly ragged
    lengths instead of equal counts.
    """
    name = "resolution_speedup"
    rows = rows_where(frame, name, model=model, dtype=dtype, mode=mode, **only)
    one_of_each(rows, name, "mode")
    found = {}
    for full in sorted(map(int, set(rows_where(rows, name, backend="unpruned")["tokens"]))):
        patches = full - 1
        kept = f"U({patches * 30 // 196},{patches * 168 // 196})" if ragged else str(1 + patches // 2)
        label = f"{16 * math.isqrt(patches)} pixels, {full} tokens, pruned: {kept}"
        found[label] = _over_unpruned(rows[rows["tokens"].isin([str(full), kept])], name, kept)
    below = subtitle(_drawn(found, rows), MODEL_LABELS.get(model, model), rows["mode"].iloc[0], dtype)
    return _speedup_panels(found, name, below)


def forecast(answer, *, title=None):
    """What is expected of each pipeline, as bars whose whiskers are what such forecasts were off by; this very setting
    as a diamond where it was recorded.

    answer: a frame as `ragged.bench.forecast.forecast` returns it.  title: instead of the setting.
    """
    name = "forecast"
    need_columns(answer, name, "mode", "backend", "expected", "low", "high", "cells", "recorded", "disturbed",
                 "ceiling", "model", "batch", "keep", "spread", "pruner", "gpu", "date")  # fmt: skip
    one_of_each(answer, name, "model", "batch", "keep", "pruner", "gpu")
    first, bars = answer.iloc[0], answer.iloc[::-1]  # plotly draws the first bar lowest
    lengths = f"spread {first['spread']:g}" if first["spread"] else "equal counts"
    model = MODEL_LABELS.get(first["model"], first["model"])
    title = title or f"Expected of {model}, batch {first['batch']:g}, keep {first['keep']:g}"
    pruner = PRUNER_LABELS.get(first["pruner"], first["pruner"])
    figure = new_figure(title, subtitle(answer, pruner, lengths), width=760)
    labels = [f"{look(b).label}<br>{mode}" for b, mode in zip(bars["backend"], bars["mode"])]
    known = bars["cells"] > 0
    up, down = ((bars[end] - bars["expected"]).where(known) for end in ("high", "low"))
    span = [f"{e:.2f}x ({low:.2f} to {high:.2f})" if n else f"{e:.2f}x (error not measured)"
            for e, low, high, n in zip(bars["expected"], bars["low"], bars["high"], bars["cells"])]  # fmt: skip
    figure.add_bar(x=bars["expected"].round(3), y=labels, orientation="h", name="expected, with its error",
                   hovertext=span, opacity=0.75, marker=dict(color=[look(b).colour for b in bars["backend"]]),
                   error_x=dict(type="data", symmetric=False, array=up.clip(lower=0).round(3), thickness=1.5,
                                arrayminus=(-down).clip(lower=0).round(3), color=INK))  # fmt: skip
    seen = bars["recorded"].notna()
    if seen.any():
        at = [label for label, yes in zip(labels, seen) if yes]
        figure.add_scatter(x=bars["recorded"][seen].round(3), y=at, mode="markers", name="recorded, this very setting",
                           marker=dict(symbol="diamond-open", size=13, color=INK, line=dict(width=2)))  # fmt: skip
        ring(figure, bars["recorded"][seen], at, bars[seen], size=22)
    reach = bars[["expected", "high", "ceiling", "recorded"]].max(axis=None)
    for label, text in zip(labels, span):  # beyond the bars, so that whiskers and diamonds stay clear
        figure.add_annotation(x=1.04 * reach, y=label, text=text, showarrow=False, xanchor="left", font_size=11)
    figure.add_vline(x=1, line=dict(color=INK, width=1))
    figure.add_vline(x=first["ceiling"], line=dict(color="#cc79a7", dash="dot", width=2.5))
    figure.add_scatter(x=[None], y=labels[:1], mode="lines", name="ceiling: FLOPs saved", line=dict(
        color="#cc79a7", dash="dot", width=2.5))  # fmt: skip
    figure.update_xaxes(title_text="times the unpruned images/s", range=[0, 1.6 * reach], showgrid=False)
    figure.update_layout(showlegend=True)
    return fitted(figure, plot=52 * len(bars))


def _over_unpruned(rows, name: str, tokens: str):
    """The rows with these tokens; their images_per_s are divided by the unpruned model's at the same batch."""
    if not (rows["tokens"] == tokens).any():
        return rows[:0]
    one_of_each(rows, name, "gpu", "mode")
    speeds = rows[rows["metric"] == "images_per_s"]
    unpruned = rows_where(speeds, name, backend="unpruned").set_index("batch")
    if twice := sorted(unpruned.index[unpruned.index.duplicated()]):
        raise ValueError(f"{name}: the unpruned model stands there more than once for batch {twice[0]:g}; give one "
                         "recording's rows")  # fmt: skip
    base = unpruned["value"]
    speeds = speeds[(speeds["tokens"] == tokens) & (speeds["backend"] != "unpruned") & speeds["batch"].isin(base.index)]
    whole = base.loc[speeds["batch"]].to_numpy()
    divided = {column: (speeds[column] / whole).round(4) for column in ("value", "q20", "q80")}
    divided["disturbed"] = speeds["disturbed"] | unpruned.loc[speeds["batch"], "disturbed"].to_numpy()
    ceiling = rows[(rows["metric"] == "flops_ratio") & (rows["tokens"] == tokens)]
    import pandas

    return pandas.concat([speeds.assign(**divided), ceiling])


def _speedup_panels(found: dict, name: str, below: str):
    """Lines over the batch with their ceiling, one panel for every name that has rows."""
    found = {label: rows for label, rows in found.items() if not rows.empty}
    if not found:
        raise ValueError(f"{name}: no rows of pruned pipelines with these tokens and this mode")
    figure, shown = _panels("Speedup over the unpruned model", list(found), below), set()
    for column, rows in enumerate(found.values(), 1):
        speeds, ceiling = rows[rows["metric"] != "flops_ratio"], rows[rows["metric"] == "flops_ratio"]
        points = ceiling.groupby("batch")["value"].median()
        if len(points):
            figure.add_scatter(x=points.index, y=points, mode="lines", name="ceiling: FLOPs saved", row=1, col=column,
                               legendgroup="ceiling", showlegend="ceiling" not in shown,
                               line=dict(color="#cc79a7", dash="dot", width=2.5))  # fmt: skip
            shown.add("ceiling")
        figure.add_hline(y=1, line=dict(color="#222222", width=1), row=1, col=column)
        for backend in in_order(speeds["backend"]):
            line = speeds[speeds["backend"] == backend].sort_values("batch")
            draw_line(figure, line["batch"], line, backend, legend=backend not in shown, row=1, col=column)
            shown.add(backend)
    batches = [batch for rows in found.values() for batch in rows["batch"]]
    figure.update_xaxes(title_text="batch (log)", **ticks_at(batches))
    figure.update_yaxes(rangemode="tozero")
    return fitted(figure.update_yaxes(title_text="times the unpruned images/s", col=1))


def _drawn(found: dict, rows):
    """What a figure shows of `rows`, for its subtitle: whether any of it was disturbed."""
    return rows.assign(disturbed=any(part["disturbed"].any() for part in found.values() if len(part)))


def _ceiling(figure, rows, column: int) -> None:
    """The dotted ceiling of one panel, or a dash where only one point of it is known; nothing without rows."""
    points = rows.groupby("keep")["value"].median().sort_index(ascending=False)
    if points.empty:
        return
    single = len(points) == 1
    figure.add_scatter(
        x=100 * (1 - points.index), y=points, mode="markers" if single else "lines", name="ceiling: FLOPs saved",
        legendgroup="ceiling", showlegend=column == 1, line=dict(color="#cc79a7", dash="dot", width=2.5),
        marker=dict(symbol="line-ew-open", size=18, color="#cc79a7", line=dict(width=3)), row=1, col=column,
    )  # fmt: skip


def _panels(title: str, names: list[str], below: str):
    """A figure with one panel per name, side by side, sharing the y axis."""
    from plotly.subplots import make_subplots

    if not names:
        raise ValueError(f"{title}: no panel to draw")
    width = min(460 + 210 * (len(names) - 1), 900) if len(names) > 1 else 760  # JupyterLab on a laptop shows about 900
    blank = new_figure(title, below, width=width)
    figure = make_subplots(1, len(names), shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.03)
    figure.layout.template = blank.layout.template  # update_layout would merge it into plotly's own, which is large
    figure.update_layout(title=blank.layout.title, width=blank.layout.width)
    figure.update_layout(margin_t=110, legend=dict(orientation="h", y=-0.22, yanchor="top", x=0, xanchor="left"))
    figure.update_layout(height=480)
    return figure.update_annotations(font_size=13)


def _kept(rows) -> str:
    """How the pruned pipelines' tokens are distributed, for a subtitle."""
    need_columns(rows, "figure", "backend", "tokens")
    tokens = sorted(set(rows[rows["backend"] != "unpruned"]["tokens"]) - {""})
    return f"pruned: {tokens[0]} tokens" if tokens else ""
