"""Figures of one attention call: the clocks, its layers, the grid of shapes, the roofline, the cost of padding.

Each takes a frame with the columns of `ragged.data.RESULT_COLUMNS` and returns a plotly figure; see `ragged.plots`.
"""

from __future__ import annotations

import math
import re

from ..data import lengths
from .style import (
    AXIS_TITLES,
    INK,
    draw_line,
    fitted,
    in_order,
    label_bars,
    log_ticks,
    look,
    marked,
    new_figure,
    one_of_each,
    rows_where,
    short,
    subtitle,
    whiskers,
)

# Data-sheet peaks of the dense half-precision tensor cores (FLOP/s) and of the memory (bytes/s).
PEAKS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "Tesla T4": (65e12, 0.32e12),
}


def host_against_gpu(frame, *, batch=32, tokens="39", mode="eager", dtype="float16", **only):
    """The clocks of one call side by side: time to enqueue it, time on the GPU, and time until the result is there.

    Needs rows of host_us and gpu_us; wall_us is drawn too where it is recorded. One slow backend sets the scale for
    all: leave it out with backend=[...].
    """
    name, clocks = "host_against_gpu", ["gpu_us", "host_us", "wall_us"]
    rows = rows_where(frame, name, batch=batch, tokens=tokens, dtype=dtype, metric=clocks, **only)
    # graph replay has a GPU time and no host time of its own: the GPU time of a call counts in any mode
    rows = rows[(rows["mode"] == mode) | (rows["metric"] == "gpu_us")]
    rows = rows.assign(_first=rows["mode"] != mode).sort_values("_first").drop_duplicates(["backend", "metric", "gpu"])
    for metric in clocks[:2]:
        rows_where(rows, name, metric=metric)
    one_of_each(rows, name, "gpu")
    backends = in_order(rows["backend"])[::-1]  # bars are drawn from the bottom up: the first of the order on top
    labels, colours = [look(b).label for b in backends], [look(b).colour for b in backends]
    below = subtitle(rows, f"batch {batch}", f"{tokens} tokens", mode, dtype)
    figure = new_figure("Who takes the time, the host or the GPU?", below, height=150 + 64 * len(backends))
    # the colour belongs to the backend and the filling to the clock, so the keys are grey
    for metric, key in (("wall_us", "wall clock: call and wait"), ("gpu_us", "GPU: run"), ("host_us", "host: enqueue")):
        times = rows[rows["metric"] == metric].set_index("backend")
        if times.empty:
            continue
        text = [marked(short(times["value"][b]), times["disturbed"][b]) if b in times.index else "" for b in backends]
        times = times.reindex(backends)
        figure.add_bar(y=labels, x=times["value"], error_x=whiskers(times.fillna(0)), orientation="h",
                       marker=filling(metric, colours), showlegend=False, offsetgroup=metric)  # fmt: skip
        label_bars(figure, labels, times, text, metric)
        figure.add_bar(y=[None], x=[None], orientation="h", name=key, marker=filling(metric, "#777777"),
                       offsetgroup=metric)  # fmt: skip
    keys = dict(orientation="h", y=1.0, yanchor="bottom", x=0, traceorder="reversed")
    figure.update_layout(barmode="group", bargap=0.25, legend=keys, margin_t=110)
    return figure.update_xaxes(title_text="time per call, µs", rangemode="tozero")


def filling(metric: str, colour) -> dict:
    """GPU time is solid, host time hatched, wall-clock time hollow."""
    if metric == "gpu_us":
        return dict(color=colour, line=dict(color=colour, width=1))
    hatch = dict(shape="/" if metric == "host_us" else "", fgcolor=colour, bgcolor="white", size=6)
    return dict(color=colour if metric == "host_us" else "white", pattern=hatch, line=dict(color=colour, width=1))


# What lies in what, of the layers that the suite `dispatch` times; ways that a call does not take are left out.
NESTED = {
    "flash_attn": {"custom_op": {"binding": {}}}, "torch_varlen": {"custom_op": {"aten": {}}},
    "paper_triton": {"contiguous_copies": {}, "output_allocation": {}, "jit_launch": {}},
    "triton": {"quick": {"guard": {}, "output_allocation": {}, "direct_launch": {}}},
}  # fmt: skip
LAYER_NAMES = {
    "custom_op": "custom operator", "binding": "C++ function", "aten": "operator inside PyTorch",
    "contiguous_copies": "three copies", "output_allocation": "memory for the output", "quick": "short way",
    "jit_launch": "launch by Triton's JIT", "direct_launch": "direct launch",
}  # fmt: skip


def call_anatomy(frame, *, providers=("flash_attn", "paper_triton", "triton"), **only):
    """Host time of a call as nested bars: below each layer the layers in it, end to end, and what is left between them
    and the whole. Where the dispatch floor comes from.

    Needs host_us rows of the suite `dispatch`: backend is "<provider>" for the public function and
    "<provider>:<layer>" for what lies below it. Every layer was timed alone. ValueError if the parts of one took longer
    than the whole: then they cannot be its parts.
    """
    import pandas

    name = "call_anatomy"
    rows = rows_where(frame, name, metric="host_us", **only)
    rows = rows.assign(provider=rows["backend"].str.split(":").str[0])
    rows = rows_where(rows, name, provider=list(providers))
    one_of_each(rows, name, "gpu", "batch", "tokens", "mode")
    bars = pandas.DataFrame([bar for p in in_order(rows["provider"]) for bar in nested_layers(rows, p)])
    below = subtitle(rows, f"batch {short(rows['batch'].iloc[0])}", f"{rows['tokens'].iloc[0]} tokens",
                     "hatched: whatever is left of the bar above")  # fmt: skip
    figure, places = new_figure("The anatomy of one call", below), list(range(len(bars)))
    rest = bars["layer"] == "rest"
    colours = [_paler(look(p).colour, depth) for p, depth in zip(bars["provider"], bars["depth"])]
    hatch = dict(shape=["/" if r else "" for r in rest], fgcolor=colours, bgcolor="white", size=6)
    marker = dict(color=colours, line=dict(color=colours, width=1), pattern=hatch)
    figure.add_bar(y=places, x=bars["value"], base=bars["start"], orientation="h", marker=marker, showlegend=False,
                   error_x=_nested_whiskers(bars), hoverinfo="skip")  # fmt: skip
    ends = bars[["value", "q80"]].max(axis=1) if "q80" in bars else bars["value"]
    text = [marked(short(v), bad) for v, bad in zip(bars["value"], bars["disturbed"])]
    label_bars(figure, places, bars.assign(value=bars["start"] + ends)[["value"]], text)
    figure.update_layout(barmode="overlay", bargap=0.25)
    figure.update_yaxes(autorange="reversed", tickvals=places, ticktext=list(bars["label"]), ticks="", showgrid=False)
    figure.update_xaxes(title_text="host time per call, µs", rangemode="tozero")
    return fitted(figure, plot=24 * len(bars))


def nested_layers(rows, provider: str) -> list[dict]:
    """The bars of one provider, from the public function down: layer, depth, start, value and whether disturbed. The
    parts of every bar end where it ends. rows: of `call_anatomy`, with "disturbed"."""
    found = {row["backend"]: row for row in rows.to_dict("records")}
    if provider not in found:
        return []

    def bar(row: dict, layer: str, depth: int, start: float) -> dict:
        label = LAYER_NAMES.get(layer, layer.replace("_", " ")) if depth else f"<b>{look(provider).label}</b>"
        return {k: row.get(k) for k in ("value", "q20", "q80", "disturbed")} | dict(
            provider=provider, layer=layer, depth=depth, start=start, label=label)  # fmt: skip

    def below(whole: dict, inside: dict) -> list[dict]:
        """The bars under one: its parts, each followed by its own, and the rest."""
        bars, at = [], whole["start"]
        for layer, deeper in _recorded(inside, provider, found):
            part = bar(found[f"{provider}:{layer}"], layer, whole["depth"] + 1, at)
            bars += [part, *below(part, deeper)]
            at += part["value"]
        left = whole["start"] + whole["value"] - at
        if bars and left < 0:
            where = f"call_anatomy: {provider}, {whole['layer']}"
            raise ValueError(f"{where}: its parts took longer than it, by {-left:.3g} µs")
        shaky = any(b["disturbed"] for b in (whole, *bars) if b["depth"] <= whole["depth"] + 1)
        rest = bar(dict(value=left, disturbed=shaky), "rest", whole["depth"] + 1, at)
        return [*bars, rest | dict(label=f"rest of {whole['label'] if whole['depth'] else 'the call'}")] if bars else []

    top = bar(found[provider], "public", 0, 0.0)
    return [top, *below(top, NESTED.get(provider, {}))]


def _recorded(inside: dict, provider: str, found: dict) -> list[tuple[str, dict]]:
    """The layers of `inside` that were recorded, each with what lies in it; of one that was not, those in it."""
    parts = []
    for layer, deeper in inside.items():
        known = f"{provider}:{layer}" in found
        parts += [(layer, deeper)] if known else _recorded(deeper, provider, found)
    return parts


def _nested_whiskers(bars) -> dict | None:
    """Whiskers where there are quantiles: what is left over was computed, and has none."""
    if bars["q20"].isna().all():
        return None
    up, down = (bars["q80"] - bars["value"]).clip(lower=0), (bars["value"] - bars["q20"]).clip(lower=0)
    ends = ([None if x != x else round(x, 4) for x in side] for side in (up, down))
    return dict(type="data", symmetric=False, thickness=1, color=INK) | dict(zip(("array", "arrayminus"), ends))


def _paler(colour: str, depth: int) -> str:
    """A colour of the form #rrggbb, mixed with white: each level of depth is paler than the one above."""
    share = (1.0, 0.75, 0.5)[min(depth, 2)]
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)


def kernel_grid(
    frame, *, backend="triton", baseline="flash_attn", metric="gpu_us", mode="eager", dtype="float16", **only
):
    """Heat map, batch × tokens: how many times faster `backend` is than `baseline`. Orange is faster, purple slower.

    Needs rows of both backends for at least one common batch and token count; cells that one of them lacks are blank.
    """
    import plotly.graph_objects as go

    name = "kernel_grid"
    rows = rows_where(frame, name, metric=metric, dtype=dtype, mode=mode, **only)
    one_of_each(rows, name, "gpu", "mode")
    keys = ["batch", "tokens"]
    ours, theirs = (rows_where(rows, name, backend=b).set_index(keys)["value"] for b in (backend, baseline))
    shaky = {(r.batch, r.tokens) for r in rows[rows["backend"].isin([backend, baseline])].itertuples() if r.disturbed}
    ratio = (theirs / ours).dropna()
    if ratio.empty:
        raise ValueError(f"{name}: {backend} and {baseline} have no batch and token count in common")
    grid = ratio.unstack("tokens")
    grid = grid[sorted(grid.columns, key=_mean_tokens)]
    text = [[marked(_cell(grid.loc[b, t], ours.get((b, t)), theirs.get((b, t))), (b, t) in shaky)
             for t in grid.columns] for b in grid.index]  # fmt: skip
    reach = max(0.3, grid.map(lambda r: abs(math.log2(r)) if r == r else 0.0).max().max())  # both sides alike
    ticks = [r for r in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 16, 32, 64) if abs(math.log2(r)) <= reach]
    title = f"{look(backend).label} against {look(baseline).label}"
    below = subtitle(rows, AXIS_TITLES.get(metric, metric), f"below the ratio: {backend} / {baseline}")
    figure = new_figure(title, below, height=170 + 56 * len(grid.index))
    figure.add_trace(go.Heatmap(
        z=grid.map(math.log2, na_action="ignore"), x=list(grid.columns), y=[f"{b:g}" for b in grid.index], text=text,
        texttemplate="%{text}", colorscale="PuOr_r", zmin=-reach, zmax=reach, xgap=2, ygap=2, hoverinfo="skip",
        colorbar=dict(title="times<br>faster", tickvals=[math.log2(r) for r in ticks],
                      ticktext=[f"{r:g}×" for r in ticks]),
    ))  # fmt: skip
    figure.update_xaxes(title_text="tokens per image", type="category", showgrid=False)
    return figure.update_yaxes(title_text="batch, images", type="category", showgrid=False)


def roofline(frame, *, batch=256, heads=12, head_dim=64, dtype="float16", mode="eager", peak=None, **only):
    """Achieved FLOP/s of attention calls against their arithmetic intensity, under the roofs of the GPU.

    Needs gpu_us rows. peak: (FLOP/s, bytes/s) of the GPU; the data sheet's for the names in PEAKS. The bytes are the
    least there are: q, k and v read once, the output written once, 2 bytes a number.
    """
    import plotly.graph_objects as go

    name = "roofline"
    rows = rows_where(frame, name, metric="gpu_us", batch=batch, dtype=dtype, mode=mode, **only)
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
        hover = [f"{t} tokens" for t in line["tokens"]]
        draw_line(figure, line["intensity"], line, backend, y=line["tflops"], hover=hover)
    # every column of points is named once, above its highest; in two heights, since neighbours may be close
    for i, (_, group) in enumerate(rows.groupby("order")):
        x, y = math.log10(group["intensity"].iloc[0]), math.log10(group["tflops"].max())
        figure.add_annotation(x=x, y=y, yshift=14 + 14 * (i % 2), text=f"{group['tokens'].iloc[0]} tokens",
                              showarrow=False, font=dict(size=11))  # fmt: skip
    roofs = f"roofs: {bandwidth / 1e12:.3g} TB/s, then {flops / 1e12:.0f} TFLOP/s"
    figure.add_annotation(x=0.01, y=0.99, xref="paper", yref="paper", text=roofs, showarrow=False, xanchor="left")
    figure.update_xaxes(title_text="arithmetic intensity, FLOP per byte (log)", **log_ticks([left, right]))
    low = rows["tflops"].min()
    return figure.update_yaxes(title_text="achieved, TFLOP/s (log)", **log_ticks([low, flops / 1e12]))


def padded_waste(frame, *, padded="sdpa_padded", ragged="triton", metric="gpu_us", mode="eager", **only):
    """What padding to the longest costs: predicted from the lengths alone, then measured as a ratio of times, with
    padding and unpadding inside the timed call; and, where "<padded>:attention" is recorded, with both outside.

    Needs rows of both backends with the same batch and a distribution of lengths such as "U(20,197)" (equal lengths
    have no padding). For the metric images_per_s the ratio is ragged over
    padded, for times padded over ragged: either way, above 1 padding loses.
    """
    name = "padded_waste"
    rows = rows_where(frame, name, metric=metric, mode=mode, backend=[padded, f"{padded}:attention", ragged], **only)
    ragged_only = rows[rows["tokens"].str.startswith("U")]
    if ragged_only.empty:
        raise ValueError(f"{name}: no rows with lengths such as U(20,197), only {sorted(set(rows['tokens']))}")
    rows = ragged_only
    one_of_each(rows, name, "gpu", "mode", "dtype", "model")
    keys = ["batch", "tokens"]
    slow, fast = (rows_where(rows, name, backend=b).set_index(keys) for b in (padded, ragged))
    measured = _times(slow, fast, metric)
    if measured.empty:
        raise ValueError(f"{name}: {padded} and {ragged} have no batch and token count in common")
    outside = rows[rows["backend"] == f"{padded}:attention"].set_index(keys)
    shaky = set(rows[rows["disturbed"]].set_index(keys).index)
    order = sorted(measured.index, key=lambda key: (_mean_tokens(key[1]), key[0]))
    shapes = [lengths(tokens, int(batch)) for batch, tokens in order]
    row_cost = [len(n) * max(n) / sum(n) for n in shapes]
    square_cost = [len(n) * max(n) ** 2 / sum(x * x for x in n) for n in shapes]
    x = [f"{batch:g} × {tokens}" for batch, tokens in order]
    mode = rows["mode"].iloc[0]
    below = subtitle(rows, AXIS_TITLES.get(metric, metric), f"{look(padded).label} against {look(ragged).label}", mode)
    figure = new_figure("What the padding costs", below)
    text = dict(texttemplate="%{y:.2f}", textposition="outside", cliponaxis=False)
    figure.add_bar(x=x, y=row_cost, name="predicted: rows (MLP, projections)", marker=dict(color="#cccccc"), **text)
    figure.add_bar(x=x, y=square_cost, name="predicted: rows² (attention)", marker=dict(color="#888888"), **text)
    bars = {"measured, padding inside the call": measured, "measured, padded before it": _times(outside, fast, metric)}
    for label, found in bars.items():
        if len(found):
            found, inside = found.reindex(order), label.endswith("call")
            said = [marked(f"{v:.2f}", key in shaky) if v == v else "" for key, v in found["value"].items()]
            figure.add_bar(x=x, y=list(found["value"].round(3)), name=label, error_y=whiskers(found.fillna(0)),
                           marker=filling("gpu_us" if inside else "host_us", look(padded).colour),
                           **text | dict(texttemplate=None, text=said))  # fmt: skip
    figure.add_hline(y=1, line=dict(color="#222222", width=1))
    figure.update_layout(barmode="group").update_xaxes(title_text="batch × tokens per image", type="category")
    return fitted(figure.update_yaxes(title_text="padded / ragged cost", rangemode="tozero"))


def _times(slow, fast, metric: str):
    """How many times as long `slow` takes as `fast`: a frame of ratios by key, with the widest quantiles there are."""
    over, under = (fast, slow) if metric == "images_per_s" else (slow, fast)
    ratio = (over["value"] / under["value"]).dropna().to_frame("value")
    ends = dict(q20=over["q20"] / under["q80"], q80=over["q80"] / under["q20"])
    return ratio.assign(**{name: end.reindex(ratio.index) for name, end in ends.items()})


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


def _cell(ratio: float, ours: float, theirs: float) -> str:
    return f"<b>{ratio:.2f}×</b><br>{short(ours)} / {short(theirs)}" if ratio == ratio else ""
