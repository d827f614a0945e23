"""The pruned network as a diagram: what its stages are, and what flows from one to the next. No rows, no images."""

from __future__ import annotations

from typing import NamedTuple

from .pictures import _bare
from .style import INK, new_figure

WIDTH, HEIGHT = 640, 500  # px, and the coordinates of the diagram
LIT, TINT, UNLIT = "#d55e00", "#fdf1e8", "#9a9a9a"


class Part(NamedTuple):
    """A part of the diagram: its edges in px, from the left and from below, and what it does, in lines."""

    left: float
    right: float
    bottom: float
    top: float
    does: str


class Flow(NamedTuple):
    """An arrow: where it starts and ends, its words, and where these stand, with their anchors."""

    start: tuple[float, float]
    end: tuple[float, float]
    words: str
    at: tuple[float, float]
    xanchor: str = "left"
    yanchor: str = "middle"


PARTS = {  # the frame first: it lies below what stands in it
    "blocks": Part(8, 632, 92, 400, "the loop: once for every block"),
    "images": Part(70, 230, 442, 494, "a batch of pixels"),
    "attend": Part(70, 230, 112, 336, "every token to the<br>tokens of its image;<br>then the MLP"),
    "pruner": Part(420, 610, 276, 346, "scores every token,<br>keeps the best"),
    "pack": Part(420, 610, 112, 182, "brings the kept rows<br>together"),
    "classify": Part(70, 230, 6, 58, "reads the CLS rows"),
}
FLOWS = (
    Flow((150, 442), (150, 337), "one row for every patch, one for CLS", (162, 421)),
    Flow((231, 311), (419, 311), "at a cut: all rows and<br>what the score needs", (325, 306), "center", "top"),
    Flow((515, 275), (515, 183), "yes or no<br>for every row", (505, 229), "right"),
    Flow((419, 147), (231, 147), "kept rows end to end;<br>cu_seqlens says where<br>each image begins", (325, 152),
         "center", "bottom"),
    Flow((150, 111), (150, 59), "after the last block: the CLS row of every image", (162, 75)),
)  # fmt: skip


def stages(lit=(), title=None):
    """The pruned network: images, the loop over its blocks, in it attention, pruner and packing; then the classes.

    lit: the parts in colour, of "images", "blocks", "pruner", "pack", "attend", "classify"; all of them if none is
    named.  title: instead of "From images to classes". ValueError for a part that there is not.
    """
    lit = _named(lit, PARTS)
    below = f"in colour: {', '.join(lit)}" if lit else "beside each arrow: what flows"
    figure = new_figure(title or "From images to classes", below, WIDTH, HEIGHT + 76)
    figure.update_layout(margin=dict(l=0, r=0, t=76, b=0), meta=dict(alt=_sentence()))
    for name in PARTS:
        _part(figure, name, not lit or name in lit)
    for flow in FLOWS:
        _arrow(figure, flow.start, flow.end)
        _words(figure, *flow.at, flow.words, INK, flow.xanchor, flow.yanchor)
    _next_block(figure)
    return _bare(figure, WIDTH, HEIGHT)


def _named(lit, parts) -> tuple[str, ...]:
    """The parts of a diagram that `lit` names, a name or several; ValueError for one that is not in parts."""
    lit = (lit,) if isinstance(lit, str) else tuple(lit)
    unknown = [name for name in lit if name not in parts]
    if unknown:
        raise ValueError(f"lit: expected names of {', '.join(parts)}; got {', '.join(map(repr, unknown))}")
    return lit


def _box(figure, part: Part, fill: str, edge: str, dash: str = "solid") -> None:
    line = dict(color=edge, width=2, dash=dash)
    figure.add_shape(type="rect", x0=part.left, x1=part.right, y0=part.bottom, y1=part.top, fillcolor=fill, line=line,
                     layer="below")  # fmt: skip


def _part(figure, name: str, lit: bool) -> None:
    """A box with its name and what it does; the frame of the blocks has its words in its upper corner."""
    part, frame = PARTS[name], name == "blocks"
    fill = (TINT if frame else LIT) if lit else "white"
    _box(figure, part, fill, LIT if lit else UNLIT, "dash" if frame else "solid")
    if frame:
        _words(figure, part.right - 12, part.top - 20, f"<b>{name}</b>, {part.does}", LIT if lit else INK, "right")
        return
    x, y = (part.left + part.right) / 2, (part.bottom + part.top) / 2
    _words(figure, x, y, f"<b>{name}</b><br>{part.does}", "white" if lit else INK, "center")


def _arrow(figure, start, end) -> None:
    figure.add_annotation(x=end[0], y=end[1], ax=start[0], ay=start[1], xref="x", yref="y", axref="x", ayref="y",
                          text="", arrowhead=2, arrowwidth=2, arrowcolor=INK)  # fmt: skip


def _words(figure, x, y, text: str, colour: str, xanchor: str, yanchor: str = "middle", turned: int = 0) -> None:
    figure.add_annotation(x=x, y=y, text=text, showarrow=False, xanchor=xanchor, yanchor=yanchor, align=xanchor,
                          textangle=turned, font=dict(size=12, color=colour))  # fmt: skip


def _next_block(figure) -> None:
    """The way of a block without a cut: out of attend and into it again."""
    path = "M70,140H40V308H66"
    figure.add_shape(type="path", path=path, line=dict(color=INK, width=2))
    _arrow(figure, (50, 308), (69, 308))
    _words(figure, 27, 224, "no cut: the next block", INK, "center", turned=-90)


def _sentence() -> str:
    """The diagram for readers who cannot see it."""
    steps = [f"{name}: {part.does}" for name, part in PARTS.items()]
    flows = ("images to attend", "attend to pruner", "pruner to pack", "pack to attend in the next block",
             "attend to classify")  # fmt: skip
    arrows = [f"from {way} flows: {flow.words}" for way, flow in zip(flows, FLOWS)]
    return "; ".join([*steps, *arrows, "without a cut, attend goes straight to the next block"]).replace("<br>", " ")
