"""Notebook 02's kernel in the interpreter, with any of its parts replaced. Reading this spoils the exercises.

`attend` runs it on a packed batch and keeps what every part was given and returned, and what the kernel touched. It
needs Triton, which is imported here: `touched.NoTriton` says so before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..attention import varlen_attention_ref
from ..launch import LOG2_E
from . import touched

PARTS = ("tile_at", "row_mask", "mask_scores", "fold")


class Unfit(ValueError):
    """A part returned what the kernel cannot use; the message says what, in a sentence."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a part. part: its name.  image, head: of the program.  first: the tile's first row in its image.
    given, got: arrays, by name."""

    part: str
    image: int
    head: int
    first: int
    given: dict[str, np.ndarray]
    got: dict[str, np.ndarray]


@dataclass(eq=False)
class Run:
    """One run over a batch. lengths, heads, dim, tile, nan: as `attend` got them.  cu: int32 offsets, images + 1.
    q, k, v, out: (total, heads, dim) float32.  want: the same in float64, right.  lse: (heads, total) float32, and
    want_lse in float64, where there is one.  touches, calls: in order.  said: why it ended early, or "".
    program: (image, head) of what somebody complains about."""

    lengths: tuple[int, ...]
    heads: int
    dim: int
    tile: int
    nan: int | None
    cu: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    want: Tensor
    lse: Tensor
    want_lse: Tensor
    touches: list[touched.Touch] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    said: str = ""
    program: tuple[int, int] | None = None

    def rows(self, image: int) -> slice:
        """The packed rows of an image."""
        return slice(int(self.cu[image]), int(self.cu[image + 1]))

    @property
    def scale_log2(self) -> float:
        """What scores are multiplied with."""
        return self.dim**-0.5 * LOG2_E


def batch(lengths: Sequence[int], heads: int = 2, dim: int = 16, tile: int = 16, nan: int | None = None,
          size: float = 1.0, shift: float = 0.0) -> Run:  # fmt: skip
    """A packed batch, nothing run yet. lengths: tokens of the images.  heads, dim: of each token.  tile: rows of a
    tile.  nan: an image whose q, k and v are all NaN.  size: what q is multiplied with.  shift: about what every score
    is, before it counts in powers of two.
    """
    total = sum(lengths)
    q, k, v = torch.randn(3, total, heads, dim, generator=torch.Generator().manual_seed(7)).unbind()
    q, cu = size * q, torch.tensor([0, *lengths]).cumsum(0).int()
    if shift:  # one number of every row is kept for it
        k[..., 0] = math.sqrt(abs(shift)) * dim**0.25
        q[..., 0] = math.copysign(1.0, shift) * k[..., 0]
    if nan is not None:
        for x in (q, k, v):
            x[cu[nan] : cu[nan + 1]] = math.nan
    longest = max(lengths)
    want, want_lse = varlen_attention_ref(q, k, v, cu, cu, longest, longest, return_lse=True)
    return Run(tuple(lengths), heads, dim, tile, nan, cu, q, k, v, torch.full_like(q, math.nan), want.double(),
               torch.full((heads, total), math.nan), want_lse.double())  # fmt: skip


def attend(run: Run, parts: Mapping[str, Callable] | None = None) -> Run:
    """Run the kernel on a batch, which is filled and returned. parts: name among PARTS -> a function in place of the
    kernel's own. `touched.NoTriton` without Triton; what a part raises is raised."""
    mine = _Parts(dict(parts or {}), run.calls)
    try:
        run.touches += touched.trace(
            _kernel, (len(run.lengths), run.heads), run.q, run.k, run.v, run.out, run.cu, run.scale_log2, mine,
            run.heads, run.dim, run.tile,
        )  # fmt: skip
    except Unfit as error:
        run.said = str(error)
    return run


def without_masks(lengths: Sequence[int], broken: int, load_mask: bool, score_mask: bool, tile: int = 16) -> Run:
    """The kernel on a batch with one image full of NaN, and masks that may be switched off.

    lengths: tokens of the images.  broken: the image that is NaN.  load_mask: whether rows past an image's end are kept
    from being loaded.  score_mask: whether they are kept out of the softmax.  tile: rows of a tile.
    """
    off = {"row_mask": _every_row} if not load_mask else {}
    off |= {"mask_scores": _every_score} if not score_mask else {}
    return attend(batch(lengths, tile=tile, nan=broken), off)


# ---- the kernel ----


def _kernel(Q, K, V, Out, Cu, scale_log2, P: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    image, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(Cu + image)
    length = tl.load(Cu + image + 1) - start
    for first in range(0, P.whole(length), TILE):
        P.at(image, head, first)
        q_at, q_real = P.tile_at(start, first, head, HEADS, D, TILE), P.row_mask(first, length, TILE)
        q = tl.load(Q + q_at, mask=q_real, other=0.0)
        acc, top = tl.zeros([TILE, D], tl.float32), tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        for j in range(0, P.whole(length), TILE):
            P.at(image, head, j)
            at, real = P.tile_at(start, j, head, HEADS, D, TILE), P.row_mask(j, length, TILE)
            k, v = tl.load(K + at, mask=real, other=0.0), tl.load(V + at, mask=real, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            scores = P.mask_scores(scores, j, length, TILE)
            acc, top, total = P.fold(acc, top, total, scores, v)
        tl.store(Out + q_at, acc / total[:, None], mask=q_real)


def _tile_at(start, first, head, HEADS, D, TILE):
    row_begins = (start + first) * HEADS * D + head * D + tl.arange(0, TILE) * (HEADS * D)
    return row_begins[:, None] + tl.arange(0, D)[None, :]


def _row_mask(first, length, TILE):
    return tl.arange(0, TILE)[:, None] < length - first


def _mask_scores(scores, first, length, TILE):
    return tl.where(tl.arange(0, TILE)[None, :] >= length - first, float("-inf"), scores)


def _fold(acc, top, total, scores, v):
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights, old = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
    return tl.dot(weights, v, acc * old[:, None], input_precision="ieee"), new_top, total * old + tl.sum(weights, 1)


def _every_row(first, length, TILE):
    return tl.arange(0, TILE)[:, None] >= 0


def _every_score(scores, first, length, TILE):
    return scores


OWN = {"tile_at": _tile_at, "row_mask": _row_mask, "mask_scores": _mask_scores, "fold": _fold}


class _Parts:
    """What the kernel calls: its own parts or others, with a look at what goes in and what comes out."""

    def __init__(self, replaced: dict[str, Callable], calls: list[Call]):
        self.functions = {name: touched.device(replaced.get(name, OWN[name])) for name in PARTS}
        self.calls, self.place = calls, (0, 0, 0)

    def whole(self, x) -> int:
        return int(_array(x).item())

    def at(self, image, head, first) -> None:
        self.place = self.whole(image), self.whole(head), int(first)

    def tile_at(self, start, first, head, heads, dim, tile):
        return self._called("tile_at", (start, first, head, heads, dim, tile), {"addresses": (tile, dim)})

    def row_mask(self, first, length, tile):
        return self._called("row_mask", (first, length, tile), {"mask": (tile, 1)})

    def mask_scores(self, scores, first, length, tile):
        return self._called("mask_scores", (scores, first, length, tile), {"scores": (tile, tile)}, scores=scores)

    def fold(self, acc, top, total, scores, v):
        shapes = {"acc": _array(acc).shape, "top": _array(top).shape, "total": _array(total).shape}
        return self._called("fold", (acc, top, total, scores, v), shapes, scores=scores, v=v)

    def _called(self, part: str, arguments: tuple, shapes: dict[str, tuple], **given):
        answer = self.functions[part](*arguments)
        several = answer if isinstance(answer, tuple | tl.tuple) else (answer,)
        if len(several) != len(shapes):
            raise Unfit(f"{part} returned {_named(answer)}; expected {' and '.join(shapes)}, in this order.")
        got = {}
        for (name, shape), value in zip(shapes.items(), several):
            if not isinstance(value, tl.tensor):
                raise Unfit(f"{part} returned {_named(value)}; expected a tile of Triton, {shape}.")
            got[name] = _array(value)
            kind = {"addresses": "iu", "mask": "b"}.get(name, "f")
            if got[name].shape != shape:
                raise Unfit(f"{part} returned {name} of the shape {got[name].shape}; expected {shape}.")
            if got[name].dtype.kind not in kind:
                words = {"iu": "whole numbers", "b": "bools, as a comparison gives them", "f": "floats"}[kind]
                raise Unfit(f"{part} returned {name} of the kind {got[name].dtype}; expected {words}.")
        image, head, first = self.place
        self.calls.append(Call(part, image, head, first, {n: _array(x).copy() for n, x in given.items()}, got))
        return answer


def _array(x: Any) -> np.ndarray:
    """The numbers of a tile."""
    return x.handle.data


def _named(x: Any) -> str:
    if x is None:
        return "None (does every path end in a return?)"
    return f"{len(x)} values" if isinstance(x, tuple | tl.tuple) else f"{type(x).__name__} {str(x)[:40]}"
