"""Figures of what a kernel does inside: the running softmax, tiles over the score matrix, programs on a GPU, rounding.

They draw numbers that the caller has computed; nothing here measures. See `ragged.plots`.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from .style import INK, fitted, log_ticks, look, new_figure

REAL, WASTED, EDGE = "#56b4e9", "#e69f00", "#ffffff"
WRONG, MISSED = "#d7191c", "#222222"
IMAGE_COLOURS = ("#0072b2", "#009e73", "#8c6d1f", "#7f3c8d")  # far from WRONG, with room for paler ones
PROGRAM_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d1f")


def softmax_steps(steps, *, title="A softmax that sees its keys tile by tile", below=""):
    """What a running softmax holds after every tile: one panel each, bars of exp(score - maximum so far).

    steps: for each tile a dict with `weights` (of all keys so far, relative to the present maximum), `new` (how many of
    them came with this tile), `top` and `total` (maximum and sum so far).
    """
    if not steps:
        raise ValueError("steps: expected at least one tile")
    names = [f"tile {i + 1}: max {s['top']:.3g}, sum {s['total']:.3g}" for i, s in enumerate(steps)]
    figure = _panels(new_figure(title, below, height=330), 1, len(steps), names, shared_yaxes=True)
    for i, step in enumerate(steps):
        weights = list(step["weights"])
        old = len(weights) - step["new"]
        for name, first, last, colour in (("keys seen before, rescaled", 0, old, "#bbbbbb"),
                                          ("keys of this tile", old, len(weights), look("triton").colour)):  # fmt: skip
            figure.add_bar(x=list(range(first, last)), y=weights[first:last], name=name, marker=dict(color=colour),
                           legendgroup=name, showlegend=i == len(steps) - 1, row=1, col=i + 1)  # fmt: skip
    longest = len(steps[-1]["weights"])
    figure.update_xaxes(title_text="key", range=[-0.6, longest - 0.4], dtick=max(1, longest // 6))
    figure.update_yaxes(range=[0, 1.05])
    figure.update_yaxes(title_text="exp(score − max so far)", col=1)
    return figure.update_layout(barmode="overlay", bargap=0.15, legend=_legend_below(-0.28), margin=dict(t=112, b=84))


def tile_cover(panels, *, columns=None, title="Tiles over the score matrix", below="", side=172):
    """The score matrix of one image as a square, and the tiles that a kernel lays over it.

    panels: dicts with `name`, `tokens`, and `rows` and `keys`, the widths of the tiles along queries and keys. Blue is
    needed, orange is computed for nothing; every panel says which share that is.
    """
    if not panels:
        raise ValueError("panels: expected at least one")
    columns = min(len(panels), columns or len(panels))
    down = -(-len(panels) // columns)
    names = [f"{p['name']}: {cover_waste(p):.0%} wasted" for p in panels]
    figure = new_figure(title, below, max(380, columns * (side + 48) + 60), down * (side + 84) + 110)
    figure = _panels(figure, down, columns, names, horizontal_spacing=0.28 / columns, vertical_spacing=0.44 / down)
    for i, panel in enumerate(panels):
        place = dict(row=i // columns + 1, col=i % columns + 1)
        size, n = (sum(panel["keys"]), sum(panel["rows"])), panel["tokens"]
        _rectangle(figure, *size, WASTED, "computed for nothing", i == 0, place)
        _rectangle(figure, n, n, REAL, "needed: queries × keys", i == 0, place)
        keys, rows = (itertools.accumulate(panel[widths], initial=0) for widths in ("keys", "rows"))
        lines = [f"M{x},0V{size[1]}" for x in keys] + [f"M0,{y}H{size[0]}" for y in rows]
        figure.add_shape(type="path", path="".join(lines), line=dict(color=EDGE, width=1.5), **place)
        reach = max(size) * 1.02
        figure.update_xaxes(range=[0, reach], showgrid=False, nticks=5, **place)
        figure.update_yaxes(range=[reach, 0], showgrid=False, nticks=5, **place)
    figure.update_xaxes(title_text="keys")
    figure.update_yaxes(title_text="queries", col=1)
    return figure.update_layout(legend=_legend_below(-0.2 / down - 0.06), margin=dict(t=106, b=80))


def cover_waste(panel) -> float:
    """Share of the tiles' area that lies outside the tokens × tokens square."""
    return 1 - panel["tokens"] ** 2 / (sum(panel["rows"]) * sum(panel["keys"]))


def tile_waste(curves, *, strong=(), title="Arithmetic wasted at the edge of the tiles", below="", marks=()):
    """Share of wasted arithmetic against tokens per image. curves: name -> list of (tokens, share between 0 and 1).

    strong: names drawn in colour, the first as ours; the others are grey. marks: token counts with a dotted line.
    """
    if not curves or any(name not in curves for name in strong):
        raise ValueError(f"curves and strong: expected names among {list(curves)}, got {list(strong)}")
    strong = list(strong) or list(curves)
    colours = [look("triton").colour, "#0072b2", "#009e73", "#cc79a7", "#e69f00"]
    dashes = ["solid", "dash", "dot", "dashdot", "longdash"]
    figure = new_figure(title, below, width=700, height=360)
    for name in sorted(curves, key=lambda name: name in strong):  # grey ones first, so that they lie below
        x, y = zip(*curves[name])
        place = strong.index(name) % len(colours) if name in strong else None
        line = dict(color="#c8c8c8", width=1) if place is None else dict(
            color=colours[place], width=2, dash=dashes[place])  # fmt: skip
        figure.add_scatter(x=x, y=[round(100 * share, 1) for share in y], mode="lines", name=name, line=line)
    for tokens in marks:
        figure.add_vline(x=tokens, line=dict(color="#888888", width=1, dash="dot"))
        figure.add_annotation(x=tokens, y=1, yref="paper", text=f"{tokens} tokens", showarrow=False, xanchor="right",
                              xshift=-4, font=dict(size=11))  # fmt: skip
    figure.update_xaxes(title_text="tokens per image")
    return figure.update_yaxes(title_text="wasted share of the arithmetic, %", range=[0, 100])


def program_schedule(plans, *, slots, title="Programs on the processors of a GPU", below="", unit="tile steps",
                     rows=None, each="image"):  # fmt: skip
    """Which program runs where and when: a row per processor, a bar per program, a colour per image.

    plans: name -> list of (slot, start, length, image). The last moment of every plan is written above its panel.
    rows: names of the slots, if they are no processors.  each: what has a colour, if it is no image.
    """
    if not plans or any(not bars for bars in plans.values()):
        raise ValueError("plans: expected at least one plan with at least one program")
    ends = {name: max(start + length for _, start, length, _ in bars) for name, bars in plans.items()}
    names = [f"{name}: done after {ends[name]:g} {unit}" for name in plans]
    figure = _panels(new_figure(title, below, height=150 + len(plans) * (16 * slots + 80)), len(plans), 1, names,
                     vertical_spacing=0.2)  # fmt: skip
    named = set()
    for i, bars in enumerate(plans.values()):
        for image in sorted({bar[3] for bar in bars}):
            mine = [bar for bar in bars if bar[3] == image]
            figure.add_bar(
                y=[slot for slot, *_ in mine], base=[start for _, start, *_ in mine], x=[bar[2] for bar in mine],
                orientation="h", width=0.9, name=f"{each} {image}", legendgroup=str(image),
                showlegend=image not in named, row=i + 1, col=1,
                marker=dict(color=PROGRAM_COLOURS[image % len(PROGRAM_COLOURS)], line=dict(color="white", width=1)),
            )  # fmt: skip
            named.add(image)
    figure.update_yaxes(range=[slots - 0.5, -0.5], dtick=max(1, slots // 4), title_text="processor", showgrid=False)
    if rows:
        figure.update_yaxes(tickvals=list(range(slots)), ticktext=rows, title_text=None)
    figure.update_xaxes(range=[0, 1.02 * max(ends.values())], title_text=unit)
    return figure.update_layout(barmode="overlay", margin_t=104)


def touched_rows(lengths, touched, needed, *, title="Which rows were touched", below="", across="number in the row",
                 words=("touched", "touched, but not its own", "its own, not touched")):  # fmt: skip
    """The rows of a packed batch, coloured by image: pale where nothing happened, strong where it should have, red
    where it should not.

    lengths: tokens per image.  touched, needed: bools, (numbers, rows); rows past the last image are nobody's.  across:
    what stands along the second axis.  words: what the three kinds of places are called.
    """
    touched, needed = np.asarray(touched, dtype=bool), np.asarray(needed, dtype=bool)
    if touched.ndim != 2 or touched.shape != needed.shape or touched.shape[1] < sum(lengths):
        raise ValueError(f"touched and needed: expected two arrays (numbers, at least {sum(lengths)} rows), "
                         f"got {touched.shape} and {needed.shape}")  # fmt: skip
    images = len(IMAGE_COLOURS)
    owner = np.repeat([i % images for i in range(len(lengths))], lengths)
    owner = np.append(owner, np.full(touched.shape[1] - len(owner), images))  # nobody's
    kind = np.where(touched & needed, owner + images + 1, np.broadcast_to(owner, touched.shape))
    kind = np.where(touched & ~needed, 2 * images + 2, np.where(needed & ~touched, 2 * images + 3, kind))
    colours = [_paler(c) for c in IMAGE_COLOURS] + ["#ededed", *IMAGE_COLOURS, "#777777", WRONG, MISSED]
    steps = [(i + side) / len(colours) for i in range(len(colours)) for side in (0, 1)]
    figure = new_figure(title, " · ".join(filter(None, (below, f"strong colour: {words[0]}"))), width=760)
    figure.add_heatmap(z=kind.astype(int).tolist(), zmin=-0.5, zmax=len(colours) - 0.5, showscale=False,
                       colorscale=[[at, colours[i // 2]] for i, at in enumerate(steps)],
                       hovertemplate="packed row %{x}, " + across + " %{y}<extra></extra>")  # fmt: skip
    names = {f"image {i}: {n} token{'s' * (n != 1)}": IMAGE_COLOURS[i % images] for i, n in enumerate(lengths) if n}
    names |= {"past the end": "#ededed"} if touched.shape[1] > sum(lengths) else {}
    names |= {words[1]: WRONG}
    names |= {words[2]: MISSED} if (needed & ~touched).any() else {}
    for name, colour in names.items():
        marker = dict(symbol="square", size=11, color=colour, line=dict(width=1, color="#888888"))
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
    figure.update_xaxes(title_text="packed row", range=[-0.5, touched.shape[1] - 0.5], showgrid=False)
    figure.update_yaxes(title_text=across, range=[len(touched) - 0.5, -0.5], showgrid=False, tickformat="d")
    return fitted(figure, plot=170)


def error_budget(errors, allowed, *, title="Largest error against float64", below=""):
    """Largest errors as dots on a logarithmic axis, and the budget as a line. errors: name -> error above zero."""
    if not errors or min(errors.values()) <= 0:
        raise ValueError(f"errors: expected numbers above zero, got {errors}")
    names = list(errors)[::-1]
    figure = new_figure(title, below, height=160 + 40 * len(names))
    values = [errors[name] for name in names]
    for name, value in zip(names, values):
        inside = value <= allowed
        side = "left" if inside and value > allowed / 2 else "right"  # where the budget's line does not cross it
        figure.add_scatter(
            x=[value], y=[name], mode="markers+text", text=[f"{value:.1e}"], textposition=f"middle {side}",
            marker=dict(size=11, symbol="circle" if inside else "x", color="#0072b2" if inside else "#d55e00"),
            name=name, showlegend=False, cliponaxis=False,
        )  # fmt: skip
    figure.add_vline(x=allowed, line=dict(color=INK, width=1, dash="dash"))
    figure.add_annotation(x=math.log10(allowed), y=1, yref="paper", yanchor="bottom", text=f"budget {allowed:.1e}",
                          showarrow=False, font=dict(size=11))  # fmt: skip
    reach = [min([*values, allowed]) / 2, max([*values, allowed]) * 4]
    powers = log_ticks(reach)["tickvals"][::3]  # of 1, 2 and 5 in every decade the first
    figure.update_xaxes(title_text="largest absolute error (log)", type="log", range=[math.log10(v) for v in reach],
                        tickvals=powers, ticktext=[f"{v:.0e}" for v in powers])  # fmt: skip
    return figure.update_yaxes(type="category", showgrid=False)


# ---- parts ----


def _paler(colour: str) -> str:
    """A colour with three parts of white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{255 - (255 - part) // 4:02x}" for part in parts)


def _panels(figure, rows: int, columns: int, names, **options):
    figure.set_subplots(rows, columns, subplot_titles=names, **options)
    return figure.update_annotations(font_size=12)


def _legend_below(y: float) -> dict:
    return dict(orientation="h", x=0, y=y, yanchor="top")


def _rectangle(figure, width, height, colour, name, legend, place) -> None:
    figure.add_scatter(x=[0, width, width, 0, 0], y=[0, 0, height, height, 0], fill="toself", fillcolor=colour,
                       mode="lines", line=dict(width=0, color=colour), name=name, legendgroup=name, showlegend=legend,
                       hoverinfo="skip", **place)  # fmt: skip
