"""Figures of launching: host and GPU side by side, the paper's clock explained, timelines, ways to start a kernel.

Those of recorded rows take a frame with the columns of `ragged.data.RESULT_COLUMNS`; see `ragged.plots`. Everywhere
the host is hollow and the GPU solid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data import Disturbed
from .call import filling
from .model import MODEL_LABELS, _panels
from .style import (
    AXIS_TITLES,
    INK,
    RINGED,
    fitted,
    in_order,
    label_bars,
    log_ticks,
    look,
    marked,
    new_figure,
    one_of_each,
    ring,
    rows_where,
    short,
    subtitle,
    ticks_at,
    whiskers,
)

GREY = "#777777"


def _calls(frame, name: str, metrics: list[str], mode, dtype, **only):
    """Rows of single calls on equal counts, one line per call, one column per metric, and whether that one, or
    any of them, was disturbed ("host_us bad", "disturbed"); calls that lack one of the metrics are left out."""
    rows = rows_where(frame, name, metric=metrics, mode=mode, dtype=dtype, **only)
    rows = rows[rows["tokens"].str.fullmatch(r"\d+")]
    one_of_each(rows, name, "gpu", "mode", "dtype", "model")
    keys = ["backend", "batch", "tokens"]
    table = rows.pivot(index=keys, columns="metric", values="value").reindex(columns=metrics).dropna()
    bad = rows.pivot(index=keys, columns="metric", values="disturbed").reindex(index=table.index, columns=metrics)
    table = table.assign(disturbed=bad.any(axis=1), **{f"{m} bad": bad[m] for m in metrics}).reset_index()
    if table.empty:
        raise ValueError(f"{name}: no call has rows of all of {', '.join(metrics)}")
    return rows, table.assign(batch=table["batch"].astype(int), tokens=table["tokens"].astype(int))


def two_clocks(frame, *, cases, backend=("flash_attn", "paper_triton", "dense", "triton"), mode="eager",
               dtype="float16", **only):  # fmt: skip
    """Host time (hollow) and GPU time (solid) of a call, joined by a bar; one panel for every (batch, tokens) in
    `cases`. Whichever lies further right takes longer. The axis spans all recorded calls, so that panels compare.

    Needs host_us and gpu_us rows of the backends.
    """
    name = "two_clocks"
    rows, calls = _calls(frame, name, ["host_us", "gpu_us"], mode, dtype, backend=list(backend), **only)
    spread = [calls[["host_us", "gpu_us"]].min().min() / 1.5, calls[["host_us", "gpu_us"]].max().max() * 1.5]
    below = subtitle(rows, mode, dtype)
    titles = [f"{batch} ×<br>{tokens} tokens" for batch, tokens in cases]
    figure = _panels("Which takes longer, the host or the GPU?", titles, below)
    for column, (batch, tokens) in enumerate(cases, 1):
        panel = calls[(calls["batch"] == batch) & (calls["tokens"] == tokens)].set_index("backend")
        if panel.empty:
            raise ValueError(f"{name}: no rows with batch {batch} and {tokens} tokens")
        order = in_order(panel.index)[::-1]
        host, gpu = (panel.loc[order, metric].tolist() for metric in ("host_us", "gpu_us"))
        labels, colours = [look(b).label for b in order], [look(b).colour for b in order]
        bars = [x for pair in zip(host, gpu) for x in (*pair, None)]  # None lifts the pen
        figure.add_scatter(x=bars, y=[label for label in labels for _ in range(3)], mode="lines", hoverinfo="skip",
                           line=dict(color="#bbbbbb", width=3), showlegend=False, row=1, col=column)  # fmt: skip
        for times, inside in ((host, "white"), (gpu, colours)):
            marker = dict(size=13, color=inside, line=dict(color=colours, width=2.5))
            figure.add_scatter(x=times, y=labels, mode="markers", marker=marker, hoverinfo="x", showlegend=False,
                               row=1, col=column)  # fmt: skip
        shaky = panel.loc[order, "disturbed"]
        for metric, times in (("host_us", host), ("gpu_us", gpu)):
            ring(figure, times, labels, dict(disturbed=panel.loc[order, f"{metric} bad"]), row=1, col=column)
        for label, h, g, bad in zip(labels, host, gpu, shaky) if len(cases) == 1 else ():
            text = marked(f"{'host' if h > g else 'GPU'} takes longer: host {short(h)}, GPU {short(g)}", bad)
            left = h * g < spread[0] * spread[1]  # of the middle: there is room to the right
            figure.add_annotation(x=math.log10(min(h, g) if left else max(h, g)), y=label, text=text, showarrow=False,
                                  xanchor="left" if left else "right",
                                  yshift=18, font=dict(size=11, color=INK))  # fmt: skip
    for key, colour in (("host: time to enqueue", "white"), ("GPU: time to run", GREY)):
        marker = dict(size=11, color=colour, line=dict(color=GREY, width=2.5))
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=key)
    ticks = log_ticks(spread)
    if len(cases) > 2:  # narrow panels
        ticks |= dict(tickvals=[1, 10, 100, 1000], ticktext=["1", "10", "100", "1,000"])
    figure.update_xaxes(title_text="µs (log)", range=[math.log10(x) for x in spread], **ticks)
    return fitted(figure.update_layout(width=760 if len(cases) < 3 else 140 * len(cases) + 160), plot=230)


def host_or_gpu(frame, *, backend=("flash_attn", "triton"), mode="eager", dtype="float16", **only):
    """Map of batch × tokens, one panel per backend: purple where the host takes longer, orange where the GPU does.

    Needs host_us and gpu_us rows; every cell shows both, host above GPU, in µs.
    """
    import plotly.graph_objects as go

    name, clocks = "host_or_gpu", ["host_us", "gpu_us"]
    rows, calls = _calls(frame, name, clocks, mode, dtype, backend=list(backend), **only)
    order = in_order(calls["backend"])
    figure = _panels("Where the host takes longer, and where the GPU", [look(b).label for b in order],
                    subtitle(rows, "in every cell host over GPU, µs", dtype))  # fmt: skip
    for column, name in enumerate(order, 1):
        panel = calls[calls["backend"] == name].set_index(["batch", "tokens"])
        ratio = (panel["gpu_us"] / panel["host_us"]).map(math.log2).unstack("tokens")
        cells = panel.apply(lambda c: "<br>".join(marked(short(c[m]), c[f"{m} bad"]) for m in clocks), axis=1)
        text = cells.unstack("tokens").fillna("")
        figure.add_trace(go.Heatmap(
            z=ratio, x=[str(t) for t in ratio.columns], y=[str(b) for b in ratio.index], text=text, hoverinfo="skip",
            texttemplate="%{text}", colorscale="PuOr_r", zmin=-4, zmax=4, xgap=2, ygap=2, showscale=column == 1,
            colorbar=dict(title="GPU / host", tickvals=[-4, -2, 0, 2, 4], ticktext=["1/16", "1/4", "equal", "4", "16"]),
        ), row=1, col=column)  # fmt: skip
    figure.update_xaxes(title_text="tokens per image", type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title_text="batch, images", col=1)
    return figure.update_layout(width=360 * len(order) + 40)


HYPOTHESES = {
    "the host alone": lambda host, gpu: host, "the GPU alone": lambda host, gpu: gpu,
    "the larger of both": lambda host, gpu: max(host, gpu), "their sum": lambda host, gpu: host + gpu,
}  # fmt: skip


def clock_hypotheses(frame, *, clock="event_us", backend=("flash_attn", "paper_triton", "dense", "triton"),
                     mode="eager", dtype="float16", **only):  # fmt: skip
    """What does a clock measure? Its readings against four guesses from host and GPU time, one panel each; on the
    dashed line a guess is right. The panel's title gives the median miss.

    Needs host_us, gpu_us and `clock` rows of the same calls.
    """
    name = "clock_hypotheses"
    rows, calls = _calls(frame, name, ["host_us", "gpu_us", clock], mode, dtype, backend=list(backend), **only)
    guesses = {g: [f(*pair) for pair in zip(calls["host_us"], calls["gpu_us"])] for g, f in HYPOTHESES.items()}
    missed = {g: (calls[clock] / x - 1).abs().median() for g, x in guesses.items()}
    titles = [f"{guess}<br>off by {missed[guess]:.0%}" for guess in guesses]
    what = AXIS_TITLES[clock].partition(" per call")[0]
    figure = _panels(f"What does {what} see?", titles, subtitle(rows, "equal counts, all batches", mode))
    reach = [min(min(x) for x in guesses.values()) / 1.4, calls[clock].max() * 1.4]
    for column, guess in enumerate(guesses, 1):
        figure.add_scatter(x=reach, y=reach, mode="lines", line=dict(color=INK, width=1, dash="dash"),
                           showlegend=False, hoverinfo="skip", row=1, col=column)  # fmt: skip
        for backend in in_order(calls["backend"]):
            at, style = (calls["backend"] == backend).to_numpy().nonzero()[0], look(backend)
            x, y = ([round(values[i], 1) for i in at] for values in (guesses[guess], calls[clock]))
            figure.add_scatter(
                x=x, y=y, mode="markers", name=style.label, legendgroup=backend, showlegend=column == 1, row=1,
                col=column, marker=dict(color=style.colour, symbol=style.symbol, size=8),
            )  # fmt: skip
            ring(figure, x, y, calls.iloc[at], size=12, row=1, col=column)
    ticks = dict(type="log", range=[math.log10(x) for x in reach], tickvals=[1, 10, 100, 1000])
    ticks |= dict(ticktext=["1", "10", "100", "1,000"])
    figure.update_xaxes(title_text="guess, µs", **ticks)
    figure.update_yaxes(**ticks)
    return fitted(figure.update_yaxes(title_text=f"{what}, µs (log)", col=1).update_layout(width=780), plot=260)


def forward_clocks(frame, *, model="deit_base", backend=("unpruned", "triton"), tokens="99",
                   mode=("eager", "compile+graph"), dtype="float16", **only):  # fmt: skip
    """Host (dotted, hollow) and GPU time (solid) of a whole forward pass against the batch, one panel per mode. Where
    the GPU's line is on top, the queue hides the host.

    Needs host_us and gpu_us rows of one model; tokens as in `throughput_by_batch`.
    """
    name = "forward_clocks"
    wanted = dict(metric=["host_us", "gpu_us"], model=model, backend=list(backend), dtype=dtype)
    rows = rows_where(frame, name, **wanted, **only)
    rows = rows_where(rows[(rows["backend"] == "unpruned") | (rows["tokens"] == tokens)], name, mode=list(mode))
    one_of_each(rows, name, "gpu")
    modes = [m for m in mode if m in set(rows["mode"])]
    below = subtitle(rows, MODEL_LABELS.get(model, model), f"pruned: {tokens} tokens", dtype)
    figure = _panels("A whole forward pass: who waits for whom?", modes, below)
    for column, wanted in enumerate(modes, 1):
        for backend in in_order(rows["backend"]):
            style = look(backend)
            for metric, part in (("host_us", "host"), ("gpu_us", "GPU")):
                here = (rows["mode"] == wanted) & (rows["backend"] == backend) & (rows["metric"] == metric)
                line = rows[here].sort_values("batch")
                inside = "white" if part == "host" else style.colour
                marker = dict(symbol="circle", size=8, color=inside, line=dict(color=style.colour, width=2))
                figure.add_scatter(
                    x=line["batch"], y=line["value"] / 1000, mode="lines+markers", name=f"{style.label}: {part}",
                    line=dict(color=style.colour, width=2, dash="dot" if part == "host" else "solid"), marker=marker,
                    legendgroup=f"{backend} {part}", showlegend=column == 1, row=1, col=column,
                    error_y=whiskers(line, 1000),
                )  # fmt: skip
                ring(figure, line["batch"], line["value"] / 1000, line, row=1, col=column)
    figure.update_xaxes(title_text="batch (log)", **ticks_at(rows["batch"]))
    figure.update_yaxes(**log_ticks(rows["value"] / 1000))
    return figure.update_yaxes(title_text="per forward pass, ms (log)", col=1).update_layout(width=760)


TIMELINE = (  # who, the lane, its clock's filling, how wide
    ("host", "host", "wall_us", 0.7), ("launch", "host", "host_us", 0.35), ("GPU", "GPU", "gpu_us", 0.7),
)  # fmt: skip


def timeline(lanes: dict[str, Sequence[tuple[str, float, float]]], *, title: str, below: str = ""):
    """Who works when, from intervals and not from rows. lanes: scenario -> [("host" | "launch" | "GPU", start, end), …]
    in µs: simulated, or of `ragged.data.trace_spans`. Every scenario has a host lane above a GPU lane; what the driver
    takes of a call ("launch") stands hatched in the host's."""
    figure = new_figure(title, below)
    for who, lane, metric, wide in TIMELINE:
        spans = [(scenario, *span[1:]) for scenario, all_ in lanes.items() for span in all_ if span[0] == who]
        if not spans:
            continue
        marker = filling(metric, GREY)
        if who != "host":
            marker["line"] = dict(color="white" if who == "GPU" else GREY, width=1)  # what follows at once stays apart
        figure.add_bar(
            y=[[s for s, *_ in spans], [lane] * len(spans)], base=[a for _, a, _ in spans], name=who, width=wide,
            x=[b - a for _, a, b in spans], orientation="h", marker=marker, hoverinfo="x",
        )  # fmt: skip
    figure.update_layout(barmode="overlay", bargap=0.3)
    figure.update_yaxes(autorange="reversed", dividercolor="#bbbbbb", title_text="")
    figure.update_xaxes(title_text="time, µs", rangemode="tozero")
    return fitted(figure, plot=92 * len(lanes))


def floor_and_slope(sizes, times, floor: float, per_item: float, *, title: str, below: str, item: str, spread=None):
    """Measured times (µs) against a size, and the model floor + size * per_item with its two parts. spread: 20 % and
    80 % quantile of every time, for whiskers."""
    figure = new_figure(title, below)
    model = [floor + n * per_item for n in sizes]
    low = min(min(times), floor) / 2
    work = [(n, n * per_item) for n in sizes if n * per_item > low]
    figure.add_scatter(x=sizes, y=[floor] * len(sizes), mode="lines", name="floor: the call itself",
                       line=dict(color=GREY, dash="dot"))  # fmt: skip
    figure.add_scatter(x=[n for n, _ in work], y=[y for _, y in work], mode="lines", name="slope: the work",
                       line=dict(color=GREY, dash="dash"))  # fmt: skip
    figure.add_scatter(x=sizes, y=model, mode="lines", name="their sum", line=dict(color="#0072b2", width=2))
    low_high = [(max(0, t - a), max(0, b - t)) for t, (a, b) in zip(times, spread or [(t, t) for t in times])]
    bars = dict(type="data", symmetric=False, array=[b for _, b in low_high], arrayminus=[a for a, _ in low_high])
    figure.add_scatter(x=sizes, y=times, mode="markers", name="measured", marker=dict(color=INK, size=9),
                       error_y=bars | dict(thickness=1.5) if spread else None)  # fmt: skip
    figure.update_xaxes(title_text=f"{item} (log)", type="log", dtick=1, exponentformat="power")
    return fitted(figure.update_yaxes(title_text="time per call, µs (log)", **log_ticks([low, max(times)])))


def launch_paths(costs: dict[str, float], *, title: str, below: str, floor: float | None = None, backend="triton",
                 spread: dict[str, tuple[float, float]] | None = None):  # fmt: skip
    """Host time of several ways to start the same thing, dearest on top. costs: way -> µs per call, a
    `ragged.data.Disturbed` where its row is: it gets a mark. floor: a dotted line at what no way can go below. spread:
    way -> 20 % and 80 % quantile, for whiskers."""
    import pandas

    ways = sorted(costs, key=costs.get)
    shaky = any(isinstance(cost, Disturbed) for cost in costs.values())
    figure = new_figure(title, " · ".join([below] + [RINGED] * shaky), height=150 + 34 * len(ways))
    ends = [(spread or {}).get(way, (costs[way], costs[way])) for way in ways]
    rows = pandas.DataFrame(dict(value=[float(costs[way]) for way in ways], q20=[low for low, _ in ends],
                                 q80=[high for _, high in ends]))  # fmt: skip
    figure.add_bar(y=ways, x=rows["value"], orientation="h", marker=dict(color=look(backend).colour),
                   error_x=whiskers(rows), showlegend=False)  # fmt: skip
    label_bars(figure, ways, rows, [marked(short(costs[way]), isinstance(costs[way], Disturbed)) for way in ways])
    figure.update_layout(barmode="overlay")
    if floor is not None:
        figure.add_vline(x=floor, line=dict(color=INK, width=1, dash="dot"))
    return figure.update_xaxes(title_text="host time per call, µs", rangemode="tozero")


def capacity_steps(totals, capacities, *, title: str, below: str):
    """What buckets cost: surplus rows in percent of the real ones, against the real ones."""
    figure = new_figure(title, below)
    waste = [100 * (c / t - 1) for t, c in zip(totals, capacities, strict=True)]
    figure.add_scatter(x=list(totals), y=waste, mode="lines", name="this many rows",
                       line=dict(color=look("triton").colour, width=1.5))  # fmt: skip
    mean = sum(waste) / len(waste)
    figure.add_hline(y=mean, line=dict(color=INK, width=1, dash="dot"), annotation_text=f"mean {mean:.2g} %",
                     annotation_bgcolor="white")  # fmt: skip
    figure.update_xaxes(title_text="rows that really stay, in the whole batch")
    return figure.update_yaxes(title_text="surplus rows computed, %", rangemode="tozero")
