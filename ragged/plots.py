"""The measured figures, one function each: a data frame of recorded rows goes in, a plotly figure comes out.

The frame has the columns of `ragged.data.RESULT_COLUMNS` (`ragged.data.results()`, or `style.paper_rows` of a table
of the paper). Every function says which rows it needs, refuses rows that would be drawn over each other, and puts the
device and the date into the subtitle. Times are medians in µs; the bars of uncertainty span the 20 % and 80 % quantiles.
"""

from __future__ import annotations

import math
import re

from .data import lengths
from .style import (
    CLOCKS,
    PRUNER_LABELS,
    in_order,
    look,
    need_columns,
    new_figure,
    one_of_each,
    pick,
    subtitle,
)

# Data-sheet peaks of the dense half-precision tensor cores (FLOP/s) and of the memory (bytes/s).
PEAKS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "Tesla T4": (65e12, 0.32e12),
}


def dispatch_floor(frame, *, batch=32, clock="wall_us", mode="eager", dtype="float16", **only):
    """Time of one attention call against tokens per image: where a line stays flat, the GPU is not what takes time.

    Needs rows of metric `clock` for one batch and at least two token counts; the legend gives every backend's floor,
    its smallest time.
    """
    name = "dispatch_floor"
    rows = pick(frame, name, metric=clock, batch=batch, mode=mode, dtype=dtype, **only)
    rows = rows[rows["tokens"].str.fullmatch(r"\d+")].assign(tokens=lambda r: r["tokens"].astype(int))
    if rows["tokens"].nunique() < 2:
        raise ValueError(f"{name}: a line over tokens needs two token counts, there are {sorted(set(rows['tokens']))}")
    one_of_each(rows, name, "gpu", "model")
    figure = new_figure("The dispatch floor: one attention call", subtitle(rows, f"batch {batch}", mode, dtype))
    for backend in in_order(rows["backend"]):
        line = rows[rows["backend"] == backend].sort_values("tokens")
        floor = line["value"].min()
        _line(figure, line["tokens"], line, backend, label=f"{look(backend).label}, floor {floor:.3g} µs")
        figure.add_hline(y=floor, line=dict(color=look(backend).colour, width=1, dash="dot"), opacity=0.5)
    figure.update_xaxes(title_text="tokens per image", rangemode="tozero")
    return figure.update_yaxes(title_text=f"{CLOCKS[clock]} (log)", **_log_ticks(rows["value"]))


def host_against_gpu(frame, *, batch=32, tokens="39", mode="eager", dtype="float16", **only):
    """The clocks of one call side by side: time to enqueue it, time on the GPU, and time until the result is there.

    Needs rows of host_us and gpu_us; wall_us is drawn as a diamond where it is recorded.
    """
    import plotly.graph_objects as go

    name = "host_against_gpu"
    rows = pick(frame, name, batch=batch, tokens=tokens, dtype=dtype, metric=["host_us", "gpu_us", "wall_us"], **only)
    # graph replay has a GPU time and no host time of its own: the GPU time of a call counts in any mode
    rows = rows[(rows["mode"] == mode) | (rows["metric"] == "gpu_us")]
    rows = rows.assign(_first=rows["mode"] != mode).sort_values("_first").drop_duplicates(["backend", "metric", "gpu"])
    for metric in ("host_us", "gpu_us"):
        pick(rows, name, metric=metric)
    one_of_each(rows, name, "gpu")
    backends = in_order(rows["backend"])[::-1]  # the first of the order on top
    times = rows.pivot(index="backend", columns="metric", values="value").reindex(backends)
    labels, colours = [look(b).label for b in backends], [look(b).colour for b in backends]
    below = subtitle(rows, f"batch {batch}", f"{tokens} tokens", mode, dtype)
    figure = new_figure("Who takes the time, the host or the GPU?", below, height=150 + 58 * len(backends))
    text = dict(texttemplate="%{x:.3g}", textposition="outside", cliponaxis=False)
    figure.add_bar(y=labels, x=times["gpu_us"], orientation="h", marker=dict(color=colours), showlegend=False, **text)
    hatch = dict(color=colours, pattern=dict(shape="/", fgcolor=colours, bgcolor="white", size=6),
                 line=dict(color=colours, width=1))  # fmt: skip
    figure.add_bar(y=labels, x=times["host_us"], orientation="h", marker=hatch, showlegend=False, **text)
    grey = dict(color="#777777", pattern=dict(shape="/", fgcolor="#777777", bgcolor="white", size=6))
    # grey keys, since the colour belongs to the backend and the filling to the clock
    figure.add_bar(y=[None], x=[None], orientation="h", name="host: enqueue the call", marker=grey)
    figure.add_bar(y=[None], x=[None], orientation="h", name="GPU: run it", marker=dict(color="#777777"))
    if "wall_us" in times:
        figure.add_trace(go.Scatter(y=labels, x=times["wall_us"], mode="markers", name="wall clock: call and wait",
                                    marker=dict(symbol="diamond", size=10, color="#222222")))  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.3, legend=dict(orientation="h", y=1.0, yanchor="bottom", x=0))
    figure.update_layout(margin_t=110)
    return figure.update_xaxes(title_text="time per call, µs", rangemode="tozero")


def kernel_grid(frame, *, backend="triton", baseline="flash_attn", metric="gpu_us", mode=None, dtype="float16", **only):
    """Heat map, batch × tokens: how many times faster `backend` is than `baseline`. Orange is faster, purple slower.

    Needs rows of both backends for at least one common batch and token count; cells that one of them lacks are blank.
    """
    import plotly.graph_objects as go

    name = "kernel_grid"
    rows = pick(frame, name, metric=metric, dtype=dtype, mode=mode, **only)
    one_of_each(rows, name, "gpu", "mode")
    keys = ["batch", "tokens"]
    ours, theirs = (pick(rows, name, backend=b).set_index(keys)["value"] for b in (backend, baseline))
    ratio = (theirs / ours).dropna()
    if ratio.empty:
        raise ValueError(f"{name}: {backend} and {baseline} have no batch and token count in common")
    grid = ratio.unstack("tokens")
    grid = grid[sorted(grid.columns, key=_mean_tokens)]
    text = [[_cell(grid.loc[b, t], ours.get((b, t)), theirs.get((b, t))) for t in grid.columns] for b in grid.index]
    reach = max(0.3, grid.map(lambda r: abs(math.log2(r)) if r == r else 0.0).max().max())  # both sides alike
    ticks = [r for r in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 16, 32, 64) if abs(math.log2(r)) <= reach]
    title = f"{look(backend).label} against {look(baseline).label}"
    below = subtitle(rows, CLOCKS.get(metric, metric), f"under the ratio: {backend} / {baseline}", dtype)
    figure = new_figure(title, below, height=170 + 56 * len(grid.index))
    figure.add_trace(go.Heatmap(
        z=grid.map(math.log2, na_action="ignore"), x=list(grid.columns), y=[f"{b:g}" for b in grid.index], text=text,
        texttemplate="%{text}", colorscale="PuOr_r", zmin=-reach, zmax=reach, xgap=2, ygap=2, hoverinfo="skip",
        colorbar=dict(title="times faster", tickvals=[math.log2(r) for r in ticks], ticktext=[f"{r:g}×" for r in ticks]),
    ))  # fmt: skip
    figure.update_xaxes(title_text="tokens per image", type="category", showgrid=False)
    return figure.update_yaxes(title_text="batch, images", type="category", showgrid=False)


def roofline(frame, *, batch=256, heads=12, head_dim=64, dtype="float16", mode=None, peak=None, **only):
    """Achieved FLOP/s of attention calls against their arithmetic intensity, under the roofs of the GPU.

    Needs gpu_us rows. peak: (FLOP/s, bytes/s) of the GPU; the data sheet's for the names in PEAKS. The bytes are the
    least there are: q, k and v read once, the output written once, 2 bytes a number.
    """
    import plotly.graph_objects as go

    name = "roofline"
    rows = pick(frame, name, metric="gpu_us", batch=batch, dtype=dtype, mode=mode, **only)
    one_of_each(rows, name, "gpu", "mode")
    gpu = rows["gpu"].iloc[0]
    if peak is None and gpu not in PEAKS:
        raise ValueError(f"{name}: no peak for {gpu!r}; give peak=(FLOP/s, bytes/s); known: {', '.join(PEAKS)}")
    flops, bandwidth = peak or PEAKS[gpu]
    mean, square = zip(*(_moments(t) for t in rows["tokens"]))
    rows = rows.assign(intensity=[s / (2 * m) for m, s in zip(mean, square)], order=mean)
    work = [4 * batch * heads * head_dim * s for s in square]
    rows = rows.assign(tflops=[w / (us * 1e-6) / 1e12 for w, us in zip(work, rows["value"])])
    figure = new_figure("Attention under the roofline", subtitle(rows, f"batch {batch}", dtype), height=460)
    ridge = flops / bandwidth
    left, right = rows["intensity"].min() / 1.6, max(rows["intensity"].max(), ridge) * 1.6
    roof = go.Scatter(x=[left, ridge, right], y=[left * bandwidth / 1e12, flops / 1e12, flops / 1e12], mode="lines",
                      line=dict(color="#888888", width=2), showlegend=False, hoverinfo="skip")  # fmt: skip
    figure.add_trace(roof)
    for backend in in_order(rows["backend"]):
        line = rows[rows["backend"] == backend].sort_values("intensity")
        _line(figure, line["intensity"], line, backend, y=line["tflops"], hover=[f"{t} tokens" for t in line["tokens"]])
    for tokens, group in rows.groupby("tokens"):  # name the column of points once, above its highest
        figure.add_annotation(x=math.log10(group["intensity"].iloc[0]), y=math.log10(group["tflops"].max()), yshift=14,
                              text=f"{tokens} tokens", showarrow=False, font=dict(size=11))  # fmt: skip
    roofs = f"roofs: {bandwidth / 1e12:.3g} TB/s, then {flops / 1e12:.0f} TFLOP/s"
    figure.add_annotation(x=0.99, y=0.03, xref="paper", yref="paper", text=roofs, showarrow=False, xanchor="right")
    figure.update_xaxes(title_text="arithmetic intensity, FLOP per byte (log)", type="log", dtick="D2")
    return figure.update_yaxes(title_text="achieved, TFLOP/s (log)", type="log", dtick="D2")


def padded_waste(frame, *, padded="sdpa_padded", ragged="triton", metric="gpu_us", mode=None, **only):
    """What padding to the longest costs: predicted from the lengths alone, then measured as a ratio of times.

    Needs rows of both backends with the same batch and tokens. For the metric images_per_s the ratio is ragged over
    padded, for times padded over ragged: either way, above 1 padding loses.
    """
    name = "padded_waste"
    rows = pick(frame, name, metric=metric, mode=mode, **only)
    one_of_each(rows, name, "gpu", "mode", "dtype", "model")
    keys = ["batch", "tokens"]
    slow, fast = (pick(rows, name, backend=b).set_index(keys)["value"] for b in (padded, ragged))
    measured = (fast / slow if metric == "images_per_s" else slow / fast).dropna()
    if measured.empty:
        raise ValueError(f"{name}: {padded} and {ragged} have no batch and token count in common")
    order = sorted(measured.index, key=lambda key: (_mean_tokens(key[1]), key[0]))
    shapes = [lengths(tokens, int(batch)) for batch, tokens in order]
    row_cost = [len(n) * max(n) / sum(n) for n in shapes]
    square_cost = [len(n) * max(n) ** 2 / sum(x * x for x in n) for n in shapes]
    x = [f"{batch:g} × {tokens}" for batch, tokens in order]
    below = subtitle(rows, CLOCKS.get(metric, metric), f"{padded} against {ragged}", rows["mode"].iloc[0])
    figure = new_figure("What the padding costs", below)
    text = dict(texttemplate="%{y:.2f}", textposition="outside", cliponaxis=False)
    figure.add_bar(x=x, y=row_cost, name="predicted: rows (MLP, projections)", marker=dict(color="#cccccc"), **text)
    figure.add_bar(x=x, y=square_cost, name="predicted: rows² (attention)", marker=dict(color="#888888"), **text)
    figure.add_bar(x=x, y=[measured[k] for k in order], name="measured", marker=dict(color=look(padded).colour), **text)
    figure.add_hline(y=1, line=dict(color="#222222", width=1))
    figure.update_layout(barmode="group", legend=dict(orientation="h", y=1.0, yanchor="bottom", x=0), margin_t=110)
    figure.update_xaxes(title_text="batch × tokens per image", type="category")
    return figure.update_yaxes(title_text="padded / ragged cost", rangemode="tozero")


# ---- helpers ----


def _line(figure, x, rows, backend, *, y=None, label=None, hover=None, legend=True, **place):
    """One backend's line; bars of uncertainty where the rows have quantiles and y is the value itself."""
    style, bars = look(backend), None
    if y is None:
        y = rows["value"]
        if {"q20", "q80"} <= set(rows.columns) and rows[["q20", "q80"]].notna().all(axis=None):
            bars = dict(type="data", symmetric=False, array=rows["q80"] - y, arrayminus=y - rows["q20"], thickness=1)
    figure.add_scatter(
        x=x, y=y, error_y=bars, text=hover, mode="lines+markers", name=label or style.label, legendgroup=backend,
        showlegend=legend, line=dict(color=style.colour, dash=style.dash, width=2),
        marker=dict(symbol=style.symbol, size=9, color=style.colour), **place,
    )  # fmt: skip


def _log_ticks(values):
    """A log axis labelled at 1, 2, 5 in every decade: readers stumble over bare exponents."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [m * 10**e for e in range(low - 1, high + 1) for m in (1, 2, 5)]
    return dict(type="log", tickvals=ticks, ticktext=[f"{t:,g}" for t in ticks])


def _moments(tokens: str) -> tuple[float, float]:
    """Mean of n and of n² for "197" or "U(20,197)"."""
    found = re.fullmatch(r"(\d+)|U\((\d+),(\d+)\)", tokens)
    if not found:
        raise ValueError(f'tokens: expected a number or "U(low,high)", got {tokens!r}')
    low, high = (int(found[1]),) * 2 if found[1] else (int(found[2]), int(found[3]))
    count, mean = high - low + 1, (low + high) / 2
    return mean, mean**2 + (count**2 - 1) / 12


def _mean_tokens(tokens: str) -> tuple[float, bool]:
    return _moments(tokens)[0], tokens.startswith("U")


def _cell(ratio, ours, theirs):
    return f"<b>{ratio:.2f}×</b><br>{ours:.3g} / {theirs:.3g}" if ratio == ratio else ""
