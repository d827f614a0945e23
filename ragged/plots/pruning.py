"""Figures of pruning and packing: scores over an image, how concentrated they are, the sampling staircase, schedules,
the way of a kept row into the flat buffer, what padding adds, what packing costs.

Images are arrays (3, H, W) in [0, 1]; scores are one number per patch in reading order, CLS left out.
"""

from __future__ import annotations

import base64
import io

import numpy as np

from .pictures import PADDING, SEQUENCE_COLOURS, _bare, _box, _pixels, _place, _say
from .quality import PRUNER_LOOKS
from .style import (
    AXIS_TITLES,
    INK,
    Look,
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

GAP = 1.0  # between two panels, in patches
WAYS = {
    "triton": "prefix sums + scatter, from a mask", "triton:counts_known": "the same, counts known to the host",
    "triton:index": "row numbers, equal counts", "mask_indexing": "x[mask]",
    "python_loop": "one image after the other", "gather": "dense gather, equal counts",
}  # fmt: skip


def pruner_look(name: str) -> Look:
    """The look of "evit", or of a longer label that begins with it, such as "evit, keep=0.5"; grey for others."""
    known = max((key for key in PRUNER_LOOKS if name.startswith(key)), key=len, default=None)
    if known is None:
        return Look(name, "#666666", "dot", "cross")
    return PRUNER_LOOKS[known]._replace(label=PRUNER_LOOKS[known].label + name[len(known) :])


def score_maps(images, scores, labels, *, patch=16, side=104, title="Which patches rank high?", below=""):
    """One row per image: the image, then one heat map per score laid over it. Colour is the rank within the image.

    scores: for each image a dict of score name -> one number per patch.  labels: one per image.
    """
    if not len(images) == len(scores) == len(labels) or not len(images):
        raise ValueError(f"images, scores, labels: expected as many of each, got {len(images)}, {len(scores)}, "
                         f"{len(labels)}")  # fmt: skip
    names = list(scores[0])
    columns, rows = images[0].shape[-1] // patch, images[0].shape[-2] // patch
    step_x, step_y = columns + GAP, rows + 3 * GAP  # higher than wide: a line of text between the rows
    width, height = round(side * (len(names) + 1) * step_x / columns + 140), round(side * len(images) * step_y / rows)
    figure = new_figure(title, below, width, height + 96)
    figure.update_layout(margin=dict(l=16, r=110, t=80, b=16))
    for r, (image, given, label) in enumerate(zip(images, scores, labels)):
        y, pixels = (len(images) - 1 - r) * step_y, _pixels(image, patch)
        _place(figure, pixels, 0, y, columns, rows, drawn=side)
        _say(figure, 0, y + rows + 1.3, label, INK, "left")
        for c, name in enumerate(names, 1):
            _place_faint(figure, pixels, c * step_x, y, columns, rows)
            figure.add_heatmap(**_ranked(given[name], rows, columns), x0=c * step_x + 0.5, dx=1, y0=y + rows - 0.5,
                               dy=-1, coloraxis="coloraxis", opacity=0.75, name=name,
                               hovertemplate="above %{z} % of the patches")  # fmt: skip
            if r == 0:
                head = f"<b>{pruner_look(name).label}</b>"
                _say(figure, c * step_x + columns / 2, len(images) * step_y - 0.9, head, INK, "center")
    bar = dict(title="rank in<br>the image,<br>%", thickness=14, tickvals=[0, 50, 100], len=0.6)
    figure.update_layout(coloraxis=dict(colorscale="Cividis", cmin=0, cmax=100, colorbar=bar))
    return _bare(figure, (len(names) + 1) * step_x - GAP, len(images) * step_y)


def _place_faint(figure, pixels, x, y, columns: int, rows: int) -> None:
    """The image in grey and a quarter as large, since colours will cover it; JPEG without colour is half the bytes."""
    from PIL import Image

    height, width, _ = pixels.shape
    file = io.BytesIO()
    grey = pixels.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3, 4)).astype(np.uint8)
    Image.fromarray(grey).save(file, "JPEG", quality=55, optimize=True)
    source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    figure.add_layout_image(source=source, x=x, y=y, sizex=columns, sizey=rows, xref="x", yref="y", xanchor="left",
                            yanchor="bottom", sizing="stretch", layer="below")  # fmt: skip


def _ranked(scores, rows: int, columns: int) -> dict:
    """Ranks in per cent as a grid for a heat map; one byte each, since a saved figure shall stay small."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (rows * columns,):
        raise ValueError(f"scores: expected one number for each of {rows * columns} patches, got {scores.shape}")
    rank = scores.argsort().argsort() * 100.0 / max(1, scores.size - 1)
    return dict(z=rank.round().astype(np.uint8).reshape(rows, columns))


def score_profiles(scores, *, title="How concentrated is each score?", below=""):
    """What share of the total score the best patches hold. scores: name -> positive numbers, one per patch."""
    figure = new_figure(title, below, width=780, height=350)
    for name, values in scores.items():
        values, style = np.sort(np.asarray(values, dtype=np.float64))[::-1], pruner_look(name)
        if values.min() < 0 or values.sum() <= 0:
            raise ValueError(f"scores: a share needs numbers >= 0 that are not all zero, {name!r} has others")
        share = 100 * np.r_[0, values.cumsum()] / values.sum()
        best = 100 * np.arange(len(share)) / values.size
        tenth = np.interp(10, best, share)
        some = np.unique(np.r_[np.arange(0, len(share), 4), len(share) - 1])  # enough for a smooth line
        figure.add_scatter(x=best[some].astype(np.float32), y=share[some].astype(np.float32), mode="lines",
                           name=f"{style.label}: the best 10 % hold {tenth:.0f} %",
                           line=dict(color=style.colour, dash=style.dash, width=2.5))  # fmt: skip
    figure.add_scatter(x=[0, 100], y=[0, 100], mode="lines", name="all patches equal",
                       line=dict(color="#999999", width=1))  # fmt: skip
    figure.update_xaxes(title_text="best patches, % of all", range=[0, 100])
    return figure.update_yaxes(title_text="share of the total score, %", range=[0, 101])


def sampling_staircase(cases, *, title="Sampling by the inverse CDF", below=""):
    """Staircases of sorted, summed-up scores side by side, with the sampling heights and the steps they hit.

    cases: name -> (cdf, heights, picks): the steps in rising order, evenly spaced heights, the step that each picked.
    """
    figure = new_figure(title, below, width=80 + 290 * len(cases), height=380)
    start = 0.0
    for name, (cdf, heights, picks) in cases.items():
        cdf, heights, picks = (np.asarray(v) for v in (cdf, heights, picks))
        hit, first = np.unique(picks), start == 0.0
        xs = [x for p in picks for x in (start, start + p + 0.5, None)]
        ys = [y for h in heights for y in (float(h), float(h), None)]
        figure.add_scatter(x=xs, y=ys, mode="lines", line=dict(color="#bbbbbb", width=1), name="sampling heights",
                           showlegend=first, hoverinfo="skip")  # fmt: skip
        for group, colour, label in ((np.setdiff1d(np.arange(cdf.size), hit), PADDING, "dropped"),
                                     (hit, PRUNER_LOOKS["ats"].colour, "kept: hit at least once")):  # fmt: skip
            figure.add_bar(x=start + group + 0.5, y=cdf[group], width=0.9, marker=dict(color=colour), name=label,
                           showlegend=first, opacity=0.85)  # fmt: skip
        text = f"<b>{name}</b><br>{len(heights)} samples hit {hit.size} of {cdf.size} patches"
        figure.add_annotation(x=start + cdf.size / 2, y=1.04, yanchor="bottom", text=text, showarrow=False)
        start += 1.15 * cdf.size
    figure.update_layout(barmode="overlay", legend=dict(orientation="h", y=-0.14, yanchor="top", x=0))
    figure.update_xaxes(title_text="patches, lowest score first", showticklabels=False, showgrid=False, ticks="")
    return figure.update_yaxes(title_text="cumulative score, 0 to 1", range=[0, 1.22], tickvals=[0, 0.25, 0.5, 0.75, 1])


def token_schedules(schedules, *, saved=None, title="Tokens through the network", below=""):
    """Tokens that leave every block, one step line per schedule. schedules: name -> counts, one per block, the first
    for the embedding.  saved: name -> share of the FLOPs that is left, for the legend."""
    figure = new_figure(title, below, width=760, height=420)
    for name, counts in schedules.items():
        style = pruner_look(name)
        label = style.label + (f": {saved[name]:.0%} of the FLOPs" if saved else "")
        figure.add_scatter(x=list(range(-1, len(counts) - 1)), y=list(counts), mode="lines+markers", name=label,
                           line=dict(color=style.colour, dash=style.dash, width=2.5, shape="hv"),
                           marker=dict(symbol=style.symbol, size=7))  # fmt: skip
    figure.update_layout(legend=dict(orientation="h", y=-0.26, yanchor="top", x=0))
    figure.update_xaxes(title_text="after block (-1: after the embedding)", dtick=1)
    return figure.update_yaxes(title_text="tokens per image", rangemode="tozero")


def pack_picture(keep, *, title="Where does a kept row go?"):
    """Dense rows above, the flat buffer below, a line from every kept row to its place. keep: booleans (batch, n)."""
    keep = np.asarray(keep, dtype=bool)
    if keep.ndim != 2 or not 1 <= keep.shape[0] <= len(SEQUENCE_COLOURS) or keep.size > 40:
        raise ValueError(f"keep: expected booleans (batch, n) for a small picture, got shape {keep.shape}")
    batch, n = keep.shape
    cell, gap = 44, 24
    figure = new_figure(title, "a number in a box is the row within its image, its id; grey rows are dropped",
                        width=batch * (n * cell + gap) + 150, height=300)  # fmt: skip
    figure.update_layout(margin=dict(l=16, r=30, t=74, b=10))
    place, start = 0, [0]
    for b in range(batch):
        colour = SEQUENCE_COLOURS[b]
        for i in range(n):
            x = b * (n * cell + gap) + i * cell
            _box(figure, x, x + cell, 160, colour if keep[b, i] else PADDING)
            _say(figure, x + cell / 2, 175, str(i), "white" if keep[b, i] else INK, "center")
            if keep[b, i]:
                to = place * cell
                _box(figure, to, to + cell, 60, colour)
                _say(figure, to + cell / 2, 75, str(i), "white", "center")
                figure.add_shape(type="line", x0=x + cell / 2, y0=158, x1=to + cell / 2, y1=92,
                                 line=dict(color=colour, width=2))  # fmt: skip
                place += 1
        start.append(place)
    for offset in sorted(set(start)):
        _say(figure, offset * cell, 46, str(offset), INK, "center")
    for text, y in (("dense", 175), ("packed", 75), ("cu_seqlens", 46)):
        _say(figure, -14, y, text, INK, "right")
    figure = _bare(figure, batch * (n * cell + gap) - gap, 200)
    return figure.update_xaxes(range=[-100, batch * (n * cell + gap) - gap])  # room for the names at the left


def length_strips(batches, names, *, seqlen=197, title="What padding adds as lengths spread", below=""):
    """Several batches side by side: kept tokens of every image and the padding up to the longest, shares written above.

    batches: one list of lengths each.  names: one label each.
    """
    if len(batches) != len(names) or not batches:
        raise ValueError(f"batches and names: expected as many of each, got {len(batches)} and {len(names)}")
    figure = new_figure(title, below, width=820, height=360)
    start = 0
    for i, (batch, name) in enumerate(zip(batches, names)):
        x, longest = [start + k for k in range(len(batch))], max(batch)
        padding = [longest - n for n in batch]
        figure.add_bar(x=x, y=list(batch), name="kept tokens", marker=dict(color="#d55e00"), showlegend=i == 0)
        figure.add_bar(x=x, y=padding, name="padding to the longest", marker=dict(color=PADDING), showlegend=i == 0)
        waste = sum(padding) / (longest * len(batch))
        figure.add_annotation(x=start + (len(batch) - 1) / 2, y=seqlen * 1.03, yanchor="bottom", showarrow=False,
                              text=f"<b>{name}</b><br>{waste:.0%} padding")  # fmt: skip
        start += len(batch) + max(2, len(batch) // 6)
    figure.add_hline(y=seqlen, line=dict(color=INK, width=1, dash="dash"))
    figure.update_layout(barmode="stack", bargap=0.1, legend=dict(orientation="h", y=-0.08, yanchor="top", x=0))
    figure.update_xaxes(showticklabels=False, showgrid=False, ticks="")
    return figure.update_yaxes(title_text="tokens per image", range=[0, seqlen * 1.25])


def packing_ways(frame, *, batch=64, tokens="U(30,168)", clock="host_us", dtype="float16", **only):
    """One dot per way to bring kept rows together, eager and replayed as a graph, with their waits for the GPU.

    Needs rows of the suite `pack` of one clock, and of `syncs`.
    """
    name = "packing_ways"
    rows = rows_where(frame, name, metric=[clock, "syncs"], batch=batch, tokens=tokens, dtype=dtype, **only)
    one_of_each(rows, name, "gpu", "model")
    waits = rows_where(rows, name, metric="syncs").drop_duplicates("backend").set_index("backend")["value"]
    rows = rows_where(rows, name, metric=clock)
    ways = [way for way in WAYS if way in set(rows["backend"])][::-1]
    below = subtitle(rows, f"batch {batch}", f"{tokens} of 197 tokens", dtype)
    figure = new_figure("Bringing the kept rows together", below, height=190 + 48 * len(ways))
    captured = set(rows[rows["mode"] == "graph"]["backend"])
    ends = {way: "" if way in captured else ", so no graph" for way in ways}
    labels = {way: f"{WAYS[way]}<br><i>waits per call: {waits.get(way, float('nan')):g}{ends[way]}</i>" for way in ways}
    styles = {"eager": ("eager", "#666666", "circle-open", "top"),
              "graph": ("replayed as a graph", look("triton").colour, "circle", "bottom")}  # fmt: skip
    for mode, (label, colour, symbol, side) in styles.items():
        there = rows[rows["mode"] == mode].set_index("backend").loc[lambda r: [way for way in ways if way in r.index]]
        text = [marked(short(t), bad) for t, bad in zip(there["value"], there["disturbed"])]
        figure.add_scatter(y=[labels[way] for way in there.index], x=there["value"], name=label, mode="markers+text",
                           text=text, textposition=f"{side} center", error_x=whiskers(there),
                           textfont=dict(size=11), cliponaxis=False,
                           marker=dict(color=colour, symbol=symbol, size=12, line=dict(width=2)))  # fmt: skip
    figure.update_layout(legend=dict(orientation="h", y=1.0, yanchor="bottom", x=0), margin_t=110)
    return figure.update_xaxes(title_text=f"{AXIS_TITLES[clock]} (log)", **log_ticks(rows["value"]))
