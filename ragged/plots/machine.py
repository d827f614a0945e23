"""The machine as a diagram: who prepares a kernel, where it waits and runs, where its numbers lie. No rows."""

from __future__ import annotations

from .pictures import _bare
from .stages import HEIGHT, INK, LIT, TINT, UNLIT, WIDTH, Flow, Part, _arrow, _box, _named, _words
from .style import new_figure

PARTS = {  # the frame first: it lies below what stands in it
    "multiprocessor": Part(30, 420, 148, 346, "runs a few programs at a time"),
    "host": Part(8, 212, 412, 494, "Python, PyTorch and the<br>driver prepare a launch"),
    "queue": Part(330, 632, 412, 494, "launched kernels, in order;<br>each waits for the one before it"),
    "registers": Part(44, 216, 164, 298, "belong to one program:<br>its tile of scores,<br>its running sums"),
    "shared": Part(234, 406, 164, 298, "on the chip: tiles of keys<br>and values, for all<br>warps of a program"),
    "l2": Part(30, 610, 82, 126, "on the chip, one for all multiprocessors: what was used last"),
    "memory": Part(30, 610, 14, 58, "large, off the chip: every tensor starts and ends here"),
}  # fmt: skip
NAMES = {"shared": "shared memory", "l2": "L2 cache"}
FRAMED = "multiprocessor"
GPU = Part(8, 632, 4, 382, "")
OTHERS = (Part(436, 452, 148, 346, ""), Part(460, 476, 148, 346, ""))
FLOWS = (
    Flow((213, 453), (329, 453), "a launch", (271, 459), "center", "bottom"),
    Flow((376, 411), (376, 347), "programs, dealt out as there is room", (386, 396)),
    Flow((320, 163), (320, 127), "", (0, 0)),
    Flow((320, 127), (320, 163), "", (0, 0)),
    Flow((320, 81), (320, 59), "", (0, 0)),
    Flow((320, 59), (320, 81), "", (0, 0)),
)


def machine(lit=(), title=None):
    """The machine that a kernel runs on: host, queue, multiprocessor, and where numbers lie on their way.

    lit: the parts in colour, of "host", "queue", "multiprocessor", "registers", "shared", "l2", "memory"; all of them
    if none is named.  title: instead of "From a call to the chip". ValueError for a part that there is not.
    """
    lit = _named(lit, PARTS)
    below = f"in colour: {', '.join(NAMES.get(name, name) for name in lit)}" if lit else "arrows: what goes where"
    figure = new_figure(title or "From a call to the chip", below, WIDTH, HEIGHT + 76)
    figure.update_layout(margin=dict(l=0, r=0, t=76, b=0), meta=dict(alt=_sentence()))
    _box(figure, GPU, "white", UNLIT, "dash")
    _words(figure, GPU.right - 12, GPU.bottom + 366, "<b>the GPU</b>", INK, "right")
    for other in OTHERS:
        _box(figure, other, "white", LIT if not lit or FRAMED in lit else UNLIT)
    others = "many more like it,<br>each with its own<br>programs, registers,<br>shared memory"
    _words(figure, 486, 247, others, INK, "left")
    for name in PARTS:
        _part(figure, name, not lit or name in lit)
    for flow in FLOWS:
        _arrow(figure, flow.start, flow.end)
        if flow.words:
            _words(figure, *flow.at, flow.words, INK, flow.xanchor, flow.yanchor)
    return _bare(figure, WIDTH, HEIGHT)


def _part(figure, name: str, lit: bool) -> None:
    """A box with its name and what it does; the frame of the multiprocessor has its words in its upper corner."""
    part, called = PARTS[name], NAMES.get(name, name)
    fill = (TINT if name == FRAMED else LIT) if lit else "white"
    _box(figure, part, fill, LIT if lit else UNLIT)
    if name == FRAMED:
        _words(figure, part.left + 14, part.top - 22, f"<b>{called}</b>: {part.does}", LIT if lit else INK, "left")
        return
    x, y = (part.left + part.right) / 2, (part.bottom + part.top) / 2
    _words(figure, x, y, f"<b>{called}</b><br>{part.does}", "white" if lit else INK, "center")


def _sentence() -> str:
    """The diagram for readers who cannot see it."""
    parts = [f"{NAMES.get(name, name)}: {part.does}" for name, part in PARTS.items()]
    ways = ("from the host a launch goes to the queue", "from the queue programs are dealt out to multiprocessors",
            "numbers go from memory through the L2 cache to a multiprocessor and back")  # fmt: skip
    return "; ".join([*parts, *ways]).replace("<br>", " ")
