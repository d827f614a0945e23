"""Figures that weigh one thing against another: which pipeline wins where, what a fair baseline takes away, a
prediction beside its recorded cells, the paper's figures beside ours, a verdict for every claim.

Each takes a frame and returns a plotly figure; see `ragged.plots`.
"""

from __future__ import annotations

import math

from ..data.evidence import BASELINE, IN_KIND, NOT_HERE, SETUP, STANDS, UNTESTED, VERDICTS
from .model import MODEL_LABELS, MODES, _panels
from .style import (
    INK,
    RINGED,
    draw_line,
    fitted,
    in_order,
    label_bars,
    legend_names,
    log_ticks,
    look,
    marked,
    need_columns,
    new_figure,
    one_of_each,
    place,
    ring,
    rows_where,
    short,
    subtitle,
    ticks_at,
    whiskers,
)

VERDICT_LOOKS = {  # colour and symbol both tell them apart
    STANDS: ("#009e73", "circle"), IN_KIND: ("#56b4e9", "square"), BASELINE: ("#e69f00", "diamond"),
    SETUP: ("#8c6d1f", "triangle-up"), NOT_HERE: ("#cc79a7", "x"), UNTESTED: ("#999999", "circle-open"),
}  # fmt: skip


# ---- which pipeline wins ----


def best_choice(frame, *, tokens="99", ours="triton", rivals=("unpruned", "dense", "sdpa_padded"), dtype="float16",
                **only):  # fmt: skip
    """Heat map, batch × (model, mode): images per second of `ours` over the best of `rivals`, which the cell names.

    Needs images_per_s rows. tokens: the distribution of the pruned pipelines. Orange: ours is faster. Purple: the
    named rival is.
    """
    import pandas
    import plotly.graph_objects as go

    name = "best_choice"
    rows = rows_where(frame, name, metric="images_per_s", dtype=dtype, backend=[ours, *rivals], **only)
    rows = rows[(rows["tokens"] == tokens) | (rows["backend"] == "unpruned")]
    one_of_each(rows, name, "gpu")
    table = rows.pivot_table(index=["model", "mode", "batch"], columns="backend", values="value")
    rows_where(rows, name, backend=ours)
    table = table[table[ours].notna()]
    others = table[[r for r in rivals if r in table]].dropna(how="all")
    if others.empty:
        raise ValueError(f"{name}: {ours} and {', '.join(rivals)} have no model, mode and batch in common")
    ratio, best = table.loc[others.index, ours] / others.max(axis=1), others.idxmax(axis=1)
    shaky = rows.groupby(["model", "mode", "batch"])["disturbed"].any()
    text = ratio.map("<b>{:.2f}×</b><br>".format) + best.map(lambda b: look(b).label)
    text = pandas.Series([marked(words, shaky[cell]) for cell, words in text.items()], index=text.index)
    grid, words = (column.unstack("batch") for column in (ratio, text))
    in_turn = sorted(grid.index, key=lambda row: (place(MODEL_LABELS)(row[0]), place(MODES)(row[1])))
    grid, words = grid.loc[in_turn], words.loc[in_turn]
    reach = max(0.3, max(abs(math.log2(r)) for r in ratio))
    ticks = [r for r in (0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4) if abs(math.log2(r)) <= reach]
    below = subtitle(rows, f"pruned: {tokens} tokens", "the cell names the best alternative")
    figure = new_figure(f"{look(ours).label} against the best alternative", below, height=190 + 52 * len(grid))
    figure.add_trace(go.Heatmap(
        z=grid.map(math.log2, na_action="ignore"), x=[f"{b:g}" for b in grid.columns], text=words.fillna(""),
        y=[f"{MODEL_LABELS.get(m, m)}, {mode}" for m, mode in grid.index], texttemplate="%{text}", colorscale="PuOr_r",
        zmin=-reach, zmax=reach, xgap=2, ygap=2, hoverinfo="skip", showscale=len(grid) > 1,
        colorbar=dict(title="times<br>faster", tickvals=[math.log2(r) for r in ticks],
                      ticktext=[f"{r:g}×" for r in ticks]),
    ))  # fmt: skip
    figure.update_xaxes(title_text="batch, images", type="category", showgrid=False)
    return figure.update_yaxes(type="category", showgrid=False, autorange="reversed")


def ladder(steps, *, title, unit, below=""):
    """Horizontal bars, one for every step, in the order given: each step changes one thing.

    steps: a frame with label, backend and value, one row per bar; a value may be NaN where nothing is recorded. With
    q20 and q80 the bars get whiskers, with disturbed (bool) their labels a mark.
    """
    need_columns(steps, "ladder", "label", "backend", "value")
    if not steps["value"].notna().any():
        raise ValueError("ladder: none of the steps has a value")
    figure = new_figure(title, below, height=150 + 38 * len(steps))
    bad = steps.get("disturbed", [False] * len(steps))
    text = [marked(short(v), b) if v == v else "not recorded" for v, b in zip(steps["value"], bad)]
    figure.add_bar(
        y=steps["label"], x=steps["value"].fillna(0), orientation="h", showlegend=False,
        marker=dict(color=[look(b).colour for b in steps["backend"]]), error_x=whiskers(steps.fillna(0)),
    )  # fmt: skip
    label_bars(figure, steps["label"], steps, text)
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title_text=unit, rangemode="tozero")
    return figure.update_yaxes(autorange="reversed", type="category")


# ---- a prediction beside what was recorded ----


def expectation(curves, points, *, title, below="", y_title="times the unpruned images/s"):
    """Expected speedup against the share kept, a line for every pipeline, and recorded cells as markers.

    curves, points: frames with panel, keep, backend, note and value; the note says what a line or a marker stands for.
    One panel for every panel that has a curve, in their order. With a column disturbed, those points get a ring.
    """
    for frame in (curves, points):
        need_columns(frame, "expectation", "panel", "keep", "backend", "note", "value")
    if curves.empty:
        raise ValueError("expectation: no curve to draw")
    names = list(dict.fromkeys(curves["panel"]))
    figure, shown = _panels(title, names, below), set()
    for kind, frame in (("lines", curves), ("markers", points[points["panel"].isin(names)])):
        for (panel, backend, note), line in frame.groupby(["panel", "backend", "note"], sort=False):
            style, label = look(backend), f"{look(backend).label}, {note}"
            dash = "dot" if note.startswith("equal") else "solid"
            figure.add_scatter(
                x=line["keep"], y=line["value"], mode=kind, name=label, legendgroup=label, row=1,
                col=names.index(panel) + 1, showlegend=label not in shown,
                line=dict(color=style.colour, dash=dash, width=2),
                marker=dict(color=style.colour, size=11, symbol=style.symbol + ("-open" if dash == "dot" else ""),
                            line=dict(color=style.colour if dash == "dot" else INK, width=1.5)),
            )  # fmt: skip
            shown.add(label)
            ring(figure, line["keep"], line["value"], line, row=1, col=names.index(panel) + 1)
    figure.add_hline(y=1, line=dict(color=INK, width=1))
    figure.update_layout(width=max(760, figure.layout.width))
    figure.update_xaxes(title_text="share of tokens kept", range=[0, 1.05], dtick=0.5)
    figure.update_yaxes(rangemode="tozero")
    return fitted(figure.update_yaxes(title_text=y_title, col=1))


# ---- the paper beside what was recorded ----


def paper_beside(pairs, *, title, unit, log=True, below=""):
    """The paper's figure and each machine's, line by line: hollow markers are the paper's, filled ones measured.

    pairs: a frame with case, backend, source ("paper" or a GPU's name) and value. The backend has its colour; every
    measured source its own symbol. With a column disturbed (bool), those points get a ring.
    """
    need_columns(pairs, "paper_beside", "case", "backend", "source", "value")
    pairs = pairs[pairs["value"].notna()]
    if pairs.empty:
        raise ValueError("paper_beside: no value to draw")
    sources = list(dict.fromkeys(pairs["source"]))
    symbols = dict(zip([s for s in sources if s != "paper"], ("circle", "diamond", "square", "triangle-up")))
    cases = list(dict.fromkeys(pairs["case"]))
    below = " · ".join([below or " · ".join(sources)] + [RINGED] * any(pairs.get("disturbed", [])))
    figure = new_figure(title, below)
    for backend in in_order(pairs["backend"]):
        for source in sources:
            found = pairs[(pairs["backend"] == backend) & (pairs["source"] == source)]
            if found.empty:
                continue
            hollow, colour = source == "paper", look(backend).colour
            marker = dict(symbol="circle-open" if hollow else symbols.get(source, "cross"), size=12, color=colour,
                          line=dict(width=2, color=colour))  # fmt: skip
            name = ": ".join(filter(None, (look(backend).label, source)))  # some of the paper's rows have no backend
            figure.add_scatter(x=found["value"], y=found["case"], mode="markers", marker=marker, name=name,
                               showlegend=True)  # fmt: skip
            ring(figure, found["value"], found["case"], found)
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=cases[::-1])
    axis = log_ticks(pairs["value"]) if log and pairs["value"].min() > 0 else dict(rangemode="tozero")
    figure.update_xaxes(title_text=f"{unit} (log)" if axis.get("type") == "log" else unit, **axis)
    return _listed(figure, 30 * len(cases) + 20)


def claims(table, *, title="Which claims stand?", below=""):
    """One row per claim: what the paper claims, what its own comparison gives here, and what a fair one gives.

    table: a frame with claim, claimed, paper_setup, fair (three ratios) and verdict (one of
    `ragged.data.evidence.VERDICTS`). A bar spans claimed and fair, and the coloured marker on `fair` (or on `claimed`,
    where nothing was measured) is the verdict. With a column ceiling, a pink stroke says where the arithmetic ends, if
    the claim lies above it; with a column disturbed, claims that rest on a disturbed row are marked.
    """
    need_columns(table, "claims", "claim", "claimed", "paper_setup", "fair", "verdict")
    if table.empty:
        raise ValueError("claims: no claim to draw")
    unknown = sorted(set(table["verdict"]) - {*VERDICTS})
    if unknown:
        raise ValueError(f"claims: expected verdicts of {list(VERDICTS)}, got {unknown}")
    table = table.round({"claimed": 4, "paper_setup": 4, "fair": 4})
    if "disturbed" in table.columns and table["disturbed"].any():
        table = table.assign(claim=[marked(c, bad) for c, bad in zip(table["claim"], table["disturbed"])])
        below = " · ".join(part for part in (below, RINGED) if part)
    figure = new_figure(title, below, width=860)
    spans = [(row.claim, x) for row in table.itertuples() if row.fair == row.fair
             for x in (row.claimed, row.fair, None)]  # None ends a stroke
    figure.add_scatter(x=[x for _, x in spans], y=[claim for claim, _ in spans], mode="lines", showlegend=False,
                       line=dict(color="#cccccc", width=3), hoverinfo="skip")  # fmt: skip
    grey = dict(color=INK, size=11)
    figure.add_scatter(x=table["claimed"], y=table["claim"], mode="markers", name="the paper's figure",
                       marker=dict(symbol="line-ns-open", line=dict(width=2.5, color=INK), **grey))  # fmt: skip
    figure.add_scatter(x=table["paper_setup"], y=table["claim"], mode="markers", name="the paper's comparison, here",
                       marker=dict(symbol="triangle-down-open", **grey))  # fmt: skip
    over = table[table["claimed"] > table["ceiling"]] if "ceiling" in table.columns else table[:0]
    if len(over):
        figure.add_scatter(x=over["ceiling"].round(4), y=over["claim"], mode="markers", name="what arithmetic allows",
                           marker=dict(symbol="line-ns-open", size=15, line=dict(width=2.5, color="#cc79a7"),
                                       color="#cc79a7"))  # fmt: skip
    for verdict in VERDICTS:
        found = table[table["verdict"] == verdict]
        colour, symbol = VERDICT_LOOKS[verdict]
        if not found.empty:
            figure.add_scatter(x=found["fair"].fillna(found["claimed"]), y=found["claim"], mode="markers",
                               name=f"fair: {verdict} ({len(found)})",
                               marker=dict(color=colour, symbol=symbol, size=12))  # fmt: skip
    figure.add_vline(x=1, line=dict(color=INK, width=1, dash="dot"))
    numbers = table[["claimed", "paper_setup", "fair"]].stack()
    numbers = numbers[numbers > 0]
    narrow = len(numbers) and numbers.max() < 3 * numbers.min()  # 1, 2 and 5 would be one label
    ticks = ticks_at([t / 10 for t in (5, 6, 7, 8, 9, 10, 11, 12, 15, 20)]) if narrow else log_ticks(numbers)
    figure.update_xaxes(title_text="ratio (log); 1: no difference", **ticks)
    order, ends = list(table["claim"])[::-1], [-0.7, len(table) - 0.3]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order, range=ends, tickfont_size=11)
    return _listed(figure, 22 * len(table) + 70)


def _listed(figure, plot: int, axis: int = 62, line: int = 20):
    """`fitted`, with the legend as a list below. Long names of rows leave the plot, and with it plotly's legend, too
    little width for columns. plot, axis, line: heights in px, of the plot, its x axis, and a line of the list."""
    foot = axis + line * len(legend_names(figure)) + 14
    height = fitted(figure, plot, axis).layout.margin.t + plot + foot
    figure.update_layout(height=height, margin_b=foot)
    return figure.update_layout(legend=dict(entrywidthmode="fraction", entrywidth=1, y=(foot - axis) / height))


def measured_lines(rows, *, x, title, x_title, y_title, below=""):
    """Lines of one value against another column, a backend each: for small things measured live."""
    need_columns(rows, "measured_lines", "backend", "value", x)
    figure = new_figure(title, below)
    for backend in in_order(rows["backend"]):
        line = rows[rows["backend"] == backend].sort_values(x)
        draw_line(figure, line[x], line, backend)
    figure.update_xaxes(title_text=x_title, **ticks_at(rows[x]))
    return figure.update_yaxes(title_text=f"{y_title} (log)", **log_ticks(rows["value"]))
