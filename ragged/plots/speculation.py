"""Figures of trees of guesses: one tree and what became of it, who sees whom in a batch of them, how often domains,
depths and ranks are accepted, and how long checking takes.

All but `verification`, which takes rows of `ragged.data.results`, take small frames as their docstrings say.
"""

from __future__ import annotations

from .model import _panels
from .style import (
    FAINT,
    INK,
    draw_line,
    fitted,
    in_order,
    log_ticks,
    need_columns,
    new_figure,
    one_of_each,
    rows_where,
    subtitle,
    ticks_at,
)

# What became of a guess: colour and symbol, in the order of the legend.
FATES = {
    "accepted": ("#009e73", "circle"),
    "refused": ("#cc79a7", "x"),
    "never reached": ("#999999", "circle-open"),
}
# One colour for each way to count: the paper's, and what happened.
MEASURES = {
    "paper": ("the paper's measure, min(1, p/q)", "#e69f00", "triangle-down-open"),
    "accepted": ("accepted, where reached", "#0072b2", "circle"),
    "overlap": ("overlap Σ min(p, q), where reached", "#009e73", "diamond"),
}


def fate(row) -> str:
    """What became of the guess in this row, a key of FATES. row: with reached and accepted."""
    return "accepted" if row.accepted else "refused" if row.reached else "never reached"


def tree_of_guesses(rows, root, *, title, below=""):
    """One tree: guesses as words, depth to the right, coloured by what became of them.

    rows: a frame with node, parent, depth, word, target_prob, reached and accepted, one row a guess.  root: the word of
    node 0, which is certain.
    """
    need_columns(rows, "tree_of_guesses", "node", "parent", "depth", "word", "target_prob", "reached", "accepted")
    children, height = rows.groupby("parent")["node"].apply(list).to_dict(), {}

    def put(node):  # leaves in a column, a parent in the middle of its children
        own = [put(child) for child in children.get(node, ())]
        leaf = sum(n not in children for n in height)
        height[node] = sum(own) / len(own) if own else float(leaf)
        return height[node]

    put(0)
    place = {0: 0, **dict(zip(rows["node"], rows["depth"]))}
    figure = new_figure(title, below, width=820, height=180 + 30 * sum(n not in children for n in height))
    for row in rows.itertuples():
        figure.add_scatter(x=[place[row.parent], row.depth], y=[height[row.parent], height[row.node]], mode="lines",
                           line=dict(color=FATES["accepted"][0] if row.accepted else FAINT, width=2),
                           hoverinfo="skip", showlegend=False)  # fmt: skip
    figure.add_scatter(x=[0], y=[height[0]], mode="markers+text", text=[root], textposition="top center",
                       marker=dict(color=INK, size=10, symbol="square"), name="certain")  # fmt: skip
    for name, (colour, symbol) in FATES.items():
        found = rows[[fate(row) == name for row in rows.itertuples()]]
        if not found.empty:
            text = [f"{row.word}  {row.target_prob:.2f}" for row in found.itertuples()]
            figure.add_scatter(x=found["depth"], y=[height[n] for n in found["node"]], mode="markers+text", name=name,
                               text=text, textposition="top center", textfont=dict(size=11),
                               marker=dict(color=colour, symbol=symbol, size=11, line_width=1.5))  # fmt: skip
    deepest = int(max(rows["depth"]))
    figure.update_xaxes(title_text="depth", tickvals=list(range(deepest + 1)), range=[-0.4, deepest + 0.6])
    figure.update_layout(legend=dict(orientation="h", y=1.0, yanchor="bottom", x=0), margin_t=110)
    return figure.update_yaxes(visible=False, autorange="reversed")


def who_sees_whom(seen, rows, keys, *, title, below=""):
    """A matrix of new rows against keys: which key a row sees, blue in its prompt's past, orange among the guesses.

    seen: ints (rows, keys), 0 not seen, 1 in the past, 2 on trial.  rows, keys: where each prompt's begin and the last
    ends.
    """
    figure = new_figure(title, below, width=820, height=460)
    figure.add_heatmap(z=seen, zmin=0, zmax=2, showscale=False, hoverinfo="skip", xgap=0.4, ygap=0.4,
                       colorscale=[[0, "white"], [0.5, "#56b4e9"], [1, "#d55e00"]])  # fmt: skip
    for at in rows[1:-1]:
        figure.add_hline(y=at - 0.5, line=dict(color=INK, width=1))
    for at in keys[1:-1]:
        figure.add_vline(x=at - 0.5, line=dict(color=INK, width=1))
    figure.update_xaxes(title_text="keys in the cache, prompt by prompt", showgrid=False)
    return figure.update_yaxes(title_text="new rows, packed", autorange="reversed", showgrid=False)


def acceptance_by_domain(frame, *, measures=("paper", "accepted"), title="Whose acceptance?", below=""):
    """Means with 95 % intervals for each domain, a panel for each draft, the ways to count beside each other.

    frame: with draft, domain, measure (keys of MEASURES), value, low and high.
    """
    need_columns(frame, "acceptance_by_domain", "draft", "domain", "measure", "value", "low", "high")
    drafts = list(dict.fromkeys(frame["draft"]))
    figure = _panels(title, drafts, below)
    for column, draft in enumerate(drafts, 1):
        panel = frame[frame["draft"] == draft]
        for measure in measures:
            _dots(figure, panel[panel["measure"] == measure], "domain", measure, column == 1, row=1, col=column)
    figure.update_layout(scattermode="group", scattergap=0.5, width=880)
    figure.update_yaxes(rangemode="tozero")
    return fitted(figure.update_yaxes(title_text="share", col=1), axis=40)


def by_depth_and_rank(frame, *, title="Depth and rank", below=""):
    """Two panels, means with 95 % intervals against the depth of a guess and against its rank among siblings.

    frame: with by ("depth" or "rank"), at, measure (keys of MEASURES), value, low and high.
    """
    need_columns(frame, "by_depth_and_rank", "by", "at", "measure", "value", "low", "high")
    figure = _panels(title, ["by depth", "by rank"], below)
    for column, by in enumerate(("depth", "rank"), 1):
        panel = frame[frame["by"] == by]
        for measure in dict.fromkeys(panel["measure"]):
            rows = panel[panel["measure"] == measure]
            _dots(figure, rows.assign(at=rows["at"].astype(str)), "at", measure, column == 1, row=1, col=column)
        figure.update_xaxes(title_text=by, type="category", row=1, col=column)
    figure.update_layout(scattermode="group", scattergap=0.5, width=760)
    figure.update_yaxes(rangemode="tozero")
    return fitted(figure.update_yaxes(title_text="share", col=1))


def _dots(figure, rows, x, measure, legend, **place) -> None:
    label, colour, symbol = MEASURES[measure]
    bars = dict(type="data", symmetric=False, array=rows["high"] - rows["value"],
                arrayminus=rows["value"] - rows["low"], thickness=1.5)  # fmt: skip
    figure.add_scatter(x=rows[x], y=rows["value"], error_y=bars, mode="markers", name=label, legendgroup=measure,
                       showlegend=legend, marker=dict(color=colour, symbol=symbol, size=9, line_width=1.5),
                       **place)  # fmt: skip


def acceptance_by_entropy(frame, *, title="Where the two part", below=""):
    """Means against the target's entropy, a line for every measure and rank.

    frame: with entropy, rank, measure (keys of MEASURES) and value.
    """
    need_columns(frame, "acceptance_by_entropy", "entropy", "rank", "measure", "value")
    figure = new_figure(title, below)
    for (measure, rank), line in frame.groupby(["measure", "rank"], sort=False):
        label, colour, symbol = MEASURES[measure]
        figure.add_scatter(x=line["entropy"], y=line["value"], mode="lines+markers", name=f"rank {rank}: {label}",
                           line=dict(color=colour, width=2, dash="solid" if rank == 1 else "dot"),
                           marker=dict(symbol=symbol, size=8))  # fmt: skip
    figure.update_xaxes(title_text="entropy of the target, nats")
    return fitted(figure.update_yaxes(title_text="share", range=[0, 1.02]))


def verification(frame, *, backends=None, clock="gpu_us", title="Checking trees: one layer's attention", below=(),
                 **only):  # fmt: skip
    """Times against the number of prompts, a line for every backend and a panel for every model.

    Needs rows of the suite `speculation` and of metric `clock`.  backends: only these.
    """
    name = "verification"
    rows = rows_where(frame, name, suite="speculation", metric=clock, mode="eager", backend=backends, **only)
    one_of_each(rows, name, "gpu", "dtype")
    models = sorted(set(rows["model"]), reverse=True)
    figure = _panels(title, [MODEL_NAMES.get(m, m) for m in models], subtitle(rows, *below))
    shown = set()
    for column, model in enumerate(models, 1):
        panel = rows[rows["model"] == model]
        for backend in in_order(panel["backend"]):
            line = panel[panel["backend"] == backend].sort_values("batch")
            draw_line(figure, line["batch"], line, backend, label=LABELS.get(backend), legend=backend not in shown,
                      row=1, col=column)  # fmt: skip
            shown.add(backend)
    figure.update_xaxes(title_text="prompts", **ticks_at(rows["batch"]))
    figure.update_yaxes(**log_ticks(rows["value"]))
    figure.update_layout(width=880)
    figure.update_yaxes(title_text=f"{clock.removesuffix('_us').upper()} time per call, µs (log)", col=1)
    return fitted(figure)


MODEL_NAMES = {"smollm2_135m": "SmolLM2-135M", "llama_2_7b": "Llama-2-7B"}
LABELS = {"sdpa_padded": "padded, SDPA with a mask", "flex": "padded, flex_attention"}
