"""Figures of the whole model: throughput by batch, speedup against sparsity with its ceiling, memory.

Each takes a frame with the columns of `ragged.data.RESULT_COLUMNS` and returns a plotly figure; see `ragged.plots`.
"""

from __future__ import annotations

from .style import (
    PRUNER_LABELS,
    draw_line,
    in_order,
    log_ticks,
    look,
    need_columns,
    new_figure,
    one_of_each,
    pick,
    subtitle,
)

MODELS = {"deit_tiny": "DeiT-Ti", "deit_small": "DeiT-S", "deit_base": "DeiT-B"}


def throughput_by_batch(frame, *, model="deit_base", tokens=None, mode=None, dtype="float16", **only):
    """Images per second against the batch, one panel for every mode (eager, graph, compile+graph).

    Needs rows of metric images_per_s for one model. tokens: the length distribution of the pruned pipelines, such as
    "U(30,168)"; the unpruned model is drawn beside them whatever its own token count is called.
    """
    name = "throughput_by_batch"
    rows = pick(frame, name, metric="images_per_s", model=model, dtype=dtype, mode=mode, **only)
    whole = rows["backend"] == "unpruned"
    if tokens is not None:
        pick(rows[~whole], name, tokens=tokens)  # says which token counts there are
        rows = rows[whole | (rows["tokens"] == tokens)]
    one_of_each(rows, name, "gpu")
    one_of_each(rows[rows["backend"] != "unpruned"], name, "tokens")
    order = ("eager", "graph", "compile", "compile+graph")
    modes = sorted(set(rows["mode"]), key=lambda m: order.index(m) if m in order else len(order))
    figure = _panels("Throughput", modes, subtitle(rows, MODELS.get(model, model), _kept(rows), dtype))
    shown = set()
    for column, mode in enumerate(modes, 1):
        panel = rows[rows["mode"] == mode]
        for backend in in_order(panel["backend"]):
            line = panel[panel["backend"] == backend].sort_values("batch")
            draw_line(figure, line["batch"], line, backend, legend=backend not in shown, row=1, col=column)
            shown.add(backend)
    batches = sorted(set(rows["batch"]))
    figure.update_xaxes(title_text="batch (log)", type="log", tickvals=batches, ticktext=[f"{b:g}" for b in batches])
    figure.update_yaxes(**log_ticks(rows["value"]))
    return figure.update_yaxes(title_text="images/s (log)", col=1)


def sparsity_speedup(frame, *, model="deit_base", batch=64, mode=None, dtype="float16", **only):
    """Speedup over the unpruned model against the share of pruned tokens, one panel for every pruner.

    Needs either images_per_s rows with the unpruned model among them, or ready rows of metric speedup. Rows of
    flops_ratio (or speedup_ceiling) draw the ceiling: no pipeline can save more time than it saves arithmetic, as long
    as the arithmetic itself does not run better.
    """
    name = "sparsity_speedup"
    rows = pick(frame, name, model=model, dtype=dtype, **only)
    ceilings = rows[rows["metric"].isin(["flops_ratio", "speedup_ceiling"])]
    rows = pick(rows, name, metric=["images_per_s", "speedup"], batch=batch, mode=mode)
    one_of_each(rows, name, "gpu", "mode")
    if "speedup" not in set(rows["metric"]):
        base = pick(rows, name, backend="unpruned")["value"].median()
        rows = rows[rows["backend"] != "unpruned"]
        rows = rows.assign(value=rows["value"] / base, q20=rows["q20"] / base, q80=rows["q80"] / base)
    pruners = [p for p in PRUNER_LABELS if p in set(rows["pruner"])] or sorted(set(rows["pruner"]))
    below = subtitle(rows, MODELS.get(model, model), f"batch {batch}", rows["mode"].iloc[0], dtype)
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
    return figure.update_yaxes(title_text="times the unpruned images/s", col=1)


def memory(frame, *, model="deit_base", batch=None, tokens=None, mode=None, dtype="float16", **only):
    """Peak memory of the pipelines, one group of bars for every batch.

    Needs rows of metric peak_mb. tokens as in `throughput_by_batch`.
    """
    name = "memory"
    rows = pick(frame, name, metric="peak_mb", model=model, batch=batch, mode=mode, dtype=dtype, **only)
    if tokens is not None:
        pick(rows[rows["backend"] != "unpruned"], name, tokens=tokens)
        rows = rows[(rows["backend"] == "unpruned") | (rows["tokens"] == tokens)]
    one_of_each(rows, name, "gpu", "mode")
    one_of_each(rows[rows["backend"] != "unpruned"], name, "tokens")
    below = subtitle(rows, MODELS.get(model, model), _kept(rows), rows["mode"].iloc[0], dtype)
    figure = new_figure("Peak memory of a forward pass", below)
    for backend in in_order(rows["backend"]):
        bars, style = rows[rows["backend"] == backend].sort_values("batch"), look(backend)
        hollow = style.dash != "solid"  # relatives share a colour; a filling tells them apart
        pattern = dict(shape="/", fgcolor=style.colour, bgcolor="white", size=6) if hollow else None
        figure.add_bar(
            x=[f"{b:g}" for b in bars["batch"]], y=bars["value"], name=style.label,
            marker=dict(color=style.colour, pattern=pattern, line=dict(color=style.colour, width=1)),
        )  # fmt: skip
    figure.update_layout(barmode="group", showlegend=True)
    figure.update_xaxes(title_text="batch, images", type="category")
    return figure.update_yaxes(title_text="peak allocated, MB", rangemode="tozero")


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
    blank = new_figure(title, below, width=460 + 210 * (len(names) - 1) if len(names) > 1 else 760)
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
