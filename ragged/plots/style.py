"""How every figure looks and how it finds its rows: one colour per backend, one template, one way to say what is
missing. plotly is imported when a figure is made."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..data import MARK, disturbed


class Look(NamedTuple):
    """How one backend is drawn. dash and symbol tell apart what colour alone would not."""

    label: str
    colour: str
    dash: str = "solid"
    symbol: str = "circle"


# Okabe and Ito's palette, which stays distinct for colour-blind readers; a relative of a backend shares its hue and
# differs in dash and symbol. The order is the order of every legend.
LOOKS = {
    "unpruned": Look("unpruned", "#4d4d4d", "dash", "square"),
    "dense": Look("dense, equal counts", "#000000", "solid", "square"),
    "dense_flash": Look("dense: flash", "#000000", "dot", "triangle-up"),
    "dense_cudnn": Look("dense: cuDNN", "#000000", "dashdot", "triangle-down"),
    "dense_efficient": Look("dense: memory-efficient", "#000000", "longdash", "hexagon"),
    "sdpa_padded": Look("padded to the longest", "#009e73", "solid", "diamond"),
    "paper_padded": Look("paper's padded", "#009e73", "dot", "diamond-open"),
    "flash_attn": Look("FlashAttention-2", "#0072b2", "solid", "triangle-up"),
    "torch_varlen": Look("torch varlen_attn", "#56b4e9", "solid", "triangle-down"),
    "flash_attn_3": Look("FlashAttention-3", "#0072b2", "dash", "triangle-up-open"),
    "efficient_varlen": Look("memory-efficient, ragged", "#7f3c8d", "solid", "star"),
    "nested": Look("NestedTensor", "#cc79a7", "solid", "pentagon"),
    "paper_nested": Look("paper's NestedTensor", "#cc79a7", "dot", "pentagon-open"),
    "flex": Look("flex_attention", "#8c6d1f", "solid", "hexagram"),
    "paper_triton": Look("paper's kernel", "#e69f00", "dash", "circle-open"),
    "triton": Look("ours (Triton)", "#d55e00", "solid", "circle"),
    "gluon": Look("ours (Gluon, Hopper)", "#d55e00", "dash", "circle-open"),
    "grouped": Look("one batch for each size", "#0072b2", "dash", "cross"),
    "resized": Look("resized to the largest", "#e69f00", "dot", "star"),
    "one_by_one": Look("one by one", "#999999", "dashdot", "x-thin-open"),
    "reference": Look("reference loop", "#999999", "dot", "x"),
}
PRUNER_LABELS = {"threshold_l2": "Threshold-L2", "dynamicvit": "DynamicViT", "evit": "EViT", "ats": "ATS",
                 "random": "random"}  # fmt: skip
AXIS_TITLES = {
    "host_us": "host time per call, µs",
    "gpu_us": "GPU time per call, µs",
    "wall_us": "wall-clock time per call, µs",
    "event_us": "CUDA-event time per call, µs",
    "images_per_s": "images/s",
}
INK, FAINT = "#222222", "#e5e5e5"
LEAST = 700  # px: the narrowest that a page draws a figure, see ragged/course/site/files/figures.js
AXIS_LETTER = 8.5  # px: a letter of an axis title
LEGEND_ROW, LEGEND_MARK, LEGEND_LETTER = 29, 50, 7  # px: a row of the legend, a line with its marker, a letter of 12 px
RINGED = "ring or *: disturbed"  # how figures mark the rows that `ragged.data.disturbed` finds


def look(backend: str) -> Look:
    """The look of a backend, or of one in a mode ("triton, graph"; eager is dotted and hollow); a name that is not in
    LOOKS is grey and goes by its own name."""
    name, _, mode = backend.partition(", ")
    found = LOOKS.get(name, Look(name, "#999999", "dash", "cross"))
    if not mode:
        return found
    found = found._replace(label=f"{found.label}, {mode}")
    if mode != "eager":
        return found
    dotted = "dot" if found.dash == "solid" else "dashdot"
    return found._replace(dash=dotted, symbol=found.symbol.removesuffix("-open") + "-open")


def place(order):
    """A sort key: the place of a name in `order`; unknown names last."""
    known = list(order)
    return lambda name: (known.index(name) if name in known else len(known), name)


def in_order(backends) -> list[str]:
    """Names without repeats, in the order of LOOKS, modes of one backend together; unknown ones last."""
    at = place(LOOKS)
    return sorted(set(backends), key=lambda backend: (at(backend.partition(", ")[0]), backend))


# ---- rows ----


def need_columns(frame, figure: str, *columns: str) -> None:
    """ValueError naming the columns that `frame` lacks."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise ValueError(f"{figure}: the frame lacks the columns {missing}; it has {list(frame.columns)}")


def rows_where(frame, figure: str, **wanted):
    """The rows whose columns have the wanted values: a value, a list of allowed ones, or None for any.

    Rows whose status is not "ok" are left out. ValueError names the first column for which nothing is left and the
    values there are. Rows of whole recordings get a column `disturbed`, before any are left out: a row is judged beside
    its neighbours.
    """
    need_columns(frame, figure, "gpu", "date", "status", "metric", "value", *wanted)
    frame = frame[frame["status"].isin(["ok", ""])]
    if "disturbed" not in frame.columns:
        whole = {"batch", "tokens", "q20", "q80"} <= set(frame.columns) and len(frame)
        frame = frame.assign(disturbed=disturbed(frame) if whole else False)
    for column, value in wanted.items():
        if value is None:
            continue
        allowed = list(value) if isinstance(value, list | tuple | set) else [value]
        column_values = frame[column]
        found = frame[_among(column_values, allowed)]
        if found.empty:
            there = sorted({str(v) for v in column_values}) or "no rows at all"
            raise ValueError(f"{figure}: no rows with {column} = {' or '.join(map(str, allowed))}; there are: {there}")
        frame = found
    return frame


def _among(values, allowed):
    if values.dtype.kind in "fiu":  # 0.7 as computed and 0.7 as read may differ in the last bit
        return values.apply(lambda x: any(abs(x - float(a)) < 1e-9 for a in allowed))
    return values.isin([str(a) for a in allowed])


def one_of_each(frame, figure: str, *columns: str) -> None:
    """ValueError if a column holds several values: such rows would be drawn over each other."""
    for column in columns:
        there = sorted({str(v) for v in frame[column]})
        if len(there) > 1:
            raise ValueError(f"{figure}: the rows mix {column} = {', '.join(there)}; choose one with {column}=...")


# ---- looks ----


def subtitle(frame, *more: str) -> str:
    """Device, date and conditions: "NVIDIA H200 · 2026-11-03 · batch 32"; says how disturbed rows are marked, if there
    are any."""
    if "disturbed" in frame.columns and frame["disturbed"].any():
        more = (*more, RINGED)
    devices, dates = (sorted({str(v) for v in frame[c] if str(v)}) for c in ("gpu", "date"))
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "undated"
    return " · ".join([", ".join(devices) or "unnamed device", span, *(m for m in more if m)])


def template():
    """The plotly template of every figure: white, thin grid, no decoration. Small, since it is saved with each."""
    import plotly.graph_objects as go

    axis = dict(showline=True, linecolor="#888888", gridcolor=FAINT, zeroline=False, ticks="outside", ticklen=4,
                tickcolor="#888888", automargin=True, title=dict(standoff=8))  # fmt: skip
    return go.layout.Template(
        layout=dict(
            font=dict(family="Open Sans, Helvetica, Arial, sans-serif", size=13, color=INK),
            title=dict(x=0, xref="container", xanchor="left", pad=dict(l=16), y=0.96, yanchor="top", yref="container",
                       font=dict(size=17), subtitle=dict(font=dict(size=12, color="#666666"))),
            paper_bgcolor="white", plot_bgcolor="white", xaxis=axis, yaxis=axis, hovermode="closest",
            margin=dict(l=64, r=24, t=84, b=56), legend=dict(font=dict(size=12), itemsizing="constant"),
        )
    )  # fmt: skip


def new_figure(title: str, below: str, width: int = 760, height: int = 420):
    """An empty figure with the template, a title and a subtitle (device, date, conditions)."""
    import plotly.graph_objects as go

    text = dict(text=title, subtitle=dict(text=below))
    return go.Figure(layout=dict(template=template(), title=text, width=width, height=height))


def fitted(figure, plot: int = 290, axis: int = 62):
    """Room for all that stands around the plot: the title and a wrapped subtitle above, names of panels, the legend in
    columns below, none over another, from LEAST pixels of width on. Returns the figure, which grows with them.

    plot: height of the plot itself in pixels.  axis: what ticks and title of the x axis need below it.
    """
    width = min(figure.layout.width or 700, LEAST)
    title = figure.layout.title.text or ""
    below = _wrapped(figure.layout.title.subtitle.text or "", (width - 40) // 6)
    heads = max((str(a.text).count("<br>") + 1 for a in figure.layout.annotations if a.yref == "paper"), default=0)
    top = 22 + 22 * (title.count("<br>") + 1) + (16 * (below.count("<br>") + 1) if below else 0) + 18 * heads + 12
    names, rows = legend_names(figure), 0
    if names:
        entry = LEGEND_LETTER * max(map(len, names))
        rows = math.ceil(len(names) / max(1, (width - 88) // (entry + LEGEND_MARK)))
        figure.update_layout(legend=dict(orientation="h", x=0, xanchor="left", yanchor="top", yref="container",
                                         entrywidth=entry, entrywidthmode="pixels"))  # fmt: skip
    axis += 16 * _wrap_axis_titles(figure, width - 88)
    foot = axis + rows * LEGEND_ROW + (14 if rows else 0)
    if names:
        figure.layout.legend.y = (foot - axis) / (top + plot + foot)
    figure.update_layout(title=dict(y=1, pad=dict(t=16, l=16), subtitle=dict(text=below)), height=top + plot + foot,
                         margin=dict(t=top, b=foot))  # fmt: skip
    return figure


def _wrap_axis_titles(figure, room: int) -> int:
    """Break titles of x axes that are wider than their panels; how many lines that adds. room: px of all panels."""
    added = 0
    for axis in figure.select_xaxes():
        share = (axis.domain[1] - axis.domain[0]) if axis.domain else 1.0
        text = _wrapped(axis.title.text or "", max(8, int(share * room / AXIS_LETTER)))
        added = max(added, text.count("<br>"))
        if axis.title.text:
            axis.title.text = text
    return added


def legend_names(figure) -> list[str]:
    """What stands in the legend, from the first line to the last; nothing where plotly draws none."""
    traces = [t for t in figure.data if t.name and t.showlegend is not False]
    if figure.layout.showlegend is False or (len(figure.data) == 1 and not figure.data[0].showlegend):
        return []
    return [t.name for t in traces]


def _wrapped(text: str, letters: int) -> str:
    """Broken into lines of at most so many letters where that goes, between the parts of a subtitle first."""
    lines = [""]
    for part in text.split(" · "):
        for i, word in enumerate(part.split(" ") if len(part) > letters else [part]):
            joined = f"{lines[-1]}{' · ' if i == 0 else ' '}{word}" if lines[-1] else word
            lines[-1:] = [joined] if len(joined) <= letters else [lines[-1], word]
    return "<br>".join(lines)


def alt_text(figure) -> str:
    """One sentence for readers who cannot see the figure: title, conditions, axes and the names of the series. A
    diagram, which has none of these, carries its own as `layout.meta["alt"]`."""
    title, layout = figure.layout.title, figure.layout
    titles = [("x", axis.title.text) for axis in figure.select_xaxes()]
    titles += [("y", axis.title.text) for axis in figure.select_yaxes()]
    first = {name: text for name, text in reversed(titles) if text}  # several panels: that of the first with one
    axes = [f"{name}: {first[name]}" for name in ("x", "y") if name in first]
    names = list(dict.fromkeys(t.name for t in figure.data if t.name and t.showlegend is not False))
    own = layout.meta.get("alt") if isinstance(layout.meta, dict) else None
    parts = [title.text, title.subtitle.text, *axes, f"series: {', '.join(names)}" if names else None, own]
    return ". ".join(part.replace("<br>", " ") for part in parts if part) + "."


def draw_line(figure, x, rows, backend, *, y=None, label=None, hover=None, legend=True, **place):
    """One backend's line; bars of uncertainty where the rows have quantiles and y is the value itself."""
    style, bars = look(backend), None
    if y is None:
        y, bars = rows["value"], whiskers(rows)
    figure.add_scatter(
        x=x, y=y, error_y=bars, text=hover, mode="lines+markers", name=label or style.label, legendgroup=backend,
        showlegend=legend, line=dict(color=style.colour, dash=style.dash, width=2),
        marker=dict(symbol=style.symbol, size=9, color=style.colour), **place,
    )  # fmt: skip
    ring(figure, x, y, rows, **place)


def whiskers(rows, scale: float = 1.0) -> dict | None:
    """Bars of uncertainty from the 20 % to the 80 % quantile, for error_x or error_y; None where rows have none. scale:
    what the values are divided by."""
    if not {"q20", "q80"} <= set(rows.columns) or not rows[["q20", "q80"]].notna().all(axis=None):
        return None
    up, down = ((rows["q80"] - rows["value"]) / scale).round(4), ((rows["value"] - rows["q20"]) / scale).round(4)
    return dict(type="data", symmetric=False, array=up.clip(lower=0), arrayminus=down.clip(lower=0), thickness=1,
                color=INK)  # fmt: skip


def label_bars(figure, y, rows, text, group: str | None = None) -> None:
    """Labels of horizontal bars behind their whiskers: on bars that cannot be seen and end at q80. group: the offset
    group of the bars that can."""
    ends = rows[["value", "q80"]].max(axis=1) if "q80" in rows.columns else rows["value"]
    figure.add_bar(
        y=y, x=ends.fillna(0), text=text, textposition="outside", cliponaxis=False, orientation="h", hoverinfo="skip",
        textfont=dict(size=11), constraintext="none", marker=dict(color="rgba(0,0,0,0)"), showlegend=False,
        offsetgroup=group,
    )  # fmt: skip


def ring(figure, x, y, rows, size: int = 18, **place) -> None:
    """A ring, so many points wide, round every point of a disturbed row; nothing where there is none."""
    points = [(a, b) for a, b, bad in zip(x, y, rows.get("disturbed", [])) if bad]
    if points:
        figure.add_scatter(
            x=[a for a, _ in points], y=[b for _, b in points], mode="markers", name="disturbed", showlegend=False,
            hoverinfo="skip", marker=dict(symbol="circle-open", size=size, color=INK, line=dict(width=1.5)), **place,
        )  # fmt: skip


def marked(text: str, bad) -> str:
    """The label of a recorded value, with the mark of a disturbed row."""
    return f"{text}{MARK}" if bad else text


def log_ticks(values):
    """A log axis labelled at 1, 2, 5 in every decade: readers stumble over bare exponents."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [m * 10**e for e in range(low - 1, high + 1) for m in (1, 2, 5)]
    return dict(type="log", tickvals=ticks, ticktext=[f"{t:,g}" for t in ticks])


def ticks_at(values) -> dict:
    """A log axis labelled at these values and nowhere else."""
    ticks = sorted(set(values))
    return dict(type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])


def short(value: float) -> str:
    """A number as a label: three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
