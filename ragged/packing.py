"""The two layouts of a ragged batch, how a selection of rows is taken from either, and pack, repack, unpack.

Two layouts hold the same thing, and everything after this file works on either:

* `Padded`  (batch, n, dim): every image owns n rows; rows past its length are padding. A dense batch is the case
  where no length is given. This is what an ordinary ViT computes on.
* `Packed`  (total, dim): the images stand one behind the other, with no padding, and `cu_seqlens` says where each
  begins. This is what a variable-length attention kernel reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from .checks import FLOATS, check_tensor, may_look
from .kernels.padding import image_of_rows
from .rows import (
    added,
    equal_offsets,
    first_rows,
    grid_rows,
    kept_rows,
    move_rows,
    norms_rows,
    picked_rows,
    take_normed_rows,
    take_rows,
)


@dataclass(frozen=True)
class Counts:
    """A number for each image that both sides know, so that nobody waits. device: int32 (batch,).  host: the same as
    ints; only its sum and its largest matter."""

    device: Tensor
    host: tuple[int, ...]

    def plus(self, other: int | Counts) -> Counts:
        """These numbers with `other` added, one for all images or `Counts`."""
        if isinstance(other, int):
            return Counts(self.device + other, tuple(n + other for n in self.host))
        return Counts(self.device + other.device, tuple(a + b for a, b in zip(self.host, other.host, strict=True)))


@dataclass(frozen=True)
class Selection:
    """Which rows of every image stay, in the order in which they shall stand.

    index: int64 (batch, k), row numbers within each image.  counts: how many leading entries of each row of `index`
    are real; an int when that is the same for every image, `Counts` when the host knows them (in neither case does
    anybody ask the GPU), else int32 (batch,).
    blend: optional weights (batch, n); every image gets one more row, the weighted sum of its rows (EViT's fused
    token).  fused: with `Counts`, how many such rows each image gets, 0 or 1 (None: one each).
    """

    index: Tensor
    counts: int | Tensor | Counts
    blend: Tensor | None = None
    fused: Counts | None = None


def read_sizes(counts: Tensor) -> tuple[int, int]:
    """Total and longest of counts (batch,), in ONE device-to-host wait: adding up a few numbers is quicker on the host
    than two more launches."""
    numbers = counts.tolist()
    return sum(numbers), max(numbers)


class _Batch:
    normed = None  # packed rows alone are normed in advance

    @property
    def starts(self) -> Tensor:
        """First row of every image, int32 (batch,): in the packed tokens, or in those of a padded batch, flattened.
        Made anew each time, since every recording has to contain what makes it."""
        return self.cu_seqlens[:-1]

    def having(self, tokens: Tensor, more: Tensor | None = None) -> Packed | Padded:
        """The same batch with other tokens, and what is to be added to them, of the same leading shape
        (`dataclasses.replace` asks field by field)."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, tokens=tokens, more=more, normed=None)
        return new

    @property
    def summed(self) -> Packed | Padded:
        """The same batch, and `more` added."""
        return self if self.more is None else self.having(self.tokens + self.more)


@dataclass(frozen=True)
class Packed(_Batch):
    """A ragged batch without padding.

    tokens (total, dim).  ids int64 (total,): the row each token had in the unpruned sequence (0 is CLS), -1 for a fused
    token.  cu_seqlens int32 (batch + 1,): image b owns rows cu_seqlens[b] to cu_seqlens[b + 1].  max_seqlen: no image
    is longer.  seqlen: the length before any pruning, of the longest image.  count: rows per image where the host knows
    that all are equal.  rows: else the rows of each image, where the host knows them.  unpruned: each image's length
    before any pruning, where they differ.  own: rows of each image, int32 (batch,), where the device has them already.
    more: what the last block has yet to add to tokens, as large as they are, or None; who reads next adds it.  normed:
    the tokens after the norm that comes next, where the cut made them, or None.
    """

    tokens: Tensor
    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    batch: int
    seqlen: int
    count: int | None = None
    rows: Counts | None = None
    unpruned: Counts | None = None
    own: Tensor | None = None
    more: Tensor | None = None
    normed: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Rows of every image, int32 (batch,), on the tokens' device."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1] if self.own is None else self.own

    @property
    def width(self) -> int:
        """Columns of the grid form: no image has more rows."""
        return self.max_seqlen

    @property
    def bound(self) -> int:
        """`max_seqlen` as attention is told: one more where the rows, a recording's spare ones included, would suffice
        for equal lengths. Kernels count on these then, and pay where that is wrong: 62 µs instead of 11 (notes.md)."""
        return self.max_seqlen + (self.count is None and self.tokens.shape[0] == self.batch * self.max_seqlen)

    def grid(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Per-row values (total, ...) as (batch, max_seqlen, ...); `fill` where an image has no row. No wait."""
        if self.count is not None:
            return values.unflatten(0, (self.batch, self.count))
        return grid_rows(values, self.cu_seqlens, self.max_seqlen, fill)

    def first_rows(self, count: int) -> Tensor:
        """The first `count` rows of every image, (batch, count, dim): the CLS and other prefix tokens."""
        return added(self._first(self.tokens, count), None if self.more is None else self._first(self.more, count))

    def _first(self, x: Tensor, count: int) -> Tensor:
        if self.count is not None and self.count >= count:
            return x.unflatten(0, (self.batch, self.count))[:, :count]
        return first_rows(x, self.starts, count)

    def within(self, total: int, longest: int) -> Packed:
        """The same images in the first `total` rows, where they all end; none is longer than `longest`."""
        more = None if self.more is None else self.more[:total]
        return replace(self, tokens=self.tokens[:total], ids=self.ids[:total], max_seqlen=longest, more=more)


@dataclass(frozen=True)
class Padded(_Batch):
    """A batch in which every image owns n rows. tokens (batch, n, dim), ids int64 (batch, n), lengths int32 (batch,)
    or None when every row is real; seqlen, count, rows, unpruned and more as in `Packed`. Padding rows are zero and
    have the id -1."""

    tokens: Tensor
    ids: Tensor
    seqlen: int
    lengths: Tensor | None = None
    count: int | None = None
    rows: Counts | None = None
    unpruned: Counts | None = None
    more: Tensor | None = None

    @property
    def batch(self) -> int:
        """Images."""
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Columns of the grid form: rows every image owns, padding included."""
        return self.tokens.shape[1]

    @property
    def cu_seqlens(self) -> Tensor:
        """Offsets of the images in the flattened batch, padding included, int32 (batch + 1,)."""
        return equal_offsets(self.batch, self.width, self.tokens.device)

    def grid(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Per-row values (batch, n, ...) with `fill` in the padding."""
        if self.lengths is None:
            return values
        real = torch.arange(self.width, device=values.device) < self.lengths[:, None]
        real = real.view(*real.shape, *[1] * (values.dim() - 2))
        return torch.where(real, values, torch.full((), fill, dtype=values.dtype, device=values.device))

    def first_rows(self, count: int) -> Tensor:
        """The first `count` rows of every image, (batch, count, dim)."""
        return added(self.tokens[:, :count], None if self.more is None else self.more[:, :count])

    def flat(self) -> Packed:
        """A dense batch seen as a packed one: the same memory, all images equally long."""
        if self.lengths is not None:
            raise ValueError("flat: expected a dense batch, this one is padded")
        tokens, ids, n = self.tokens.flatten(0, 1), self.ids.flatten(), self.width
        return Packed(tokens, ids, self.cu_seqlens, n, self.batch, self.seqlen, n)


Sizes = Callable[[Tensor], tuple[int, int]]


def take_packed(state: Packed | Padded, selection: Selection, sizes: Sizes = read_sizes,
                norm: nn.LayerNorm | None = None) -> Packed:  # fmt: skip
    """The rows of `state` that `selection` names, image after image, as a `Packed` batch. Equal counts need no wait.
    Otherwise `sizes` says how many rows there are in all and at most in one image: by default it asks the GPU (one
    wait); under graph capture it returns an upper bound, and the rows past the real total are zeros that no attention
    call looks at. norm: what they go through next, which is then done at once where that saves a launch."""
    batch, index, counts, ids = state.batch, selection.index, selection.counts, state.ids.flatten()
    if selection.blend is not None and isinstance(counts, Counts):
        state = state.summed  # a fused row is made of whole tokens
    tokens, more = (None if x is None else x.flatten(0, -2) for x in (state.tokens, state.more))
    if isinstance(counts, int):
        taken = move_rows(tokens, ids, state.starts, index[:, :counts], _own_blend(state, selection.blend), more)
        rows = counts + (selection.blend is not None)
        return Packed(*taken, max(rows, 1), batch, state.seqlen, rows, unpruned=state.unpruned)
    if isinstance(counts, Counts):
        tokens, ids, index, counts = _with_fused(state, selection)
        total, longest = sum(counts.host), max(counts.host)
        taken = take_rows(tokens, ids, state.starts, index, counts.device, total, longest, more)
        return Packed(*taken, max(longest, 1), batch, state.seqlen, None, counts, state.unpruned)
    if selection.blend is not None:
        raise ValueError("selection: a fused token needs the same count in every image, got a tensor of counts")
    total, longest = sizes(counts)
    where, known = (ids, state.starts, index, counts, total, longest, more), (state.seqlen, None, None, state.unpruned)
    own, normed = counts.contiguous(), None
    if norm is not None and norms_rows(tokens, more, total, norm):
        *taken, normed = take_normed_rows(tokens, *where, norm)
    else:
        taken = take_rows(tokens, *where)
    return Packed(*taken, max(longest, 1), batch, *known, own, normed=normed)


def take_padded(state: Padded, selection: Selection, width: int | None = None) -> Padded:
    """The rows of `state` that `selection` names as a `Padded` batch, `width` rows an image (default: the longest,
    which for unequal counts costs one wait)."""
    counts, index, blend = selection.counts, selection.index, selection.blend
    if isinstance(counts, Counts):
        tokens, ids, index, counts = _with_fused(state, selection)
        width = max(counts.host) if width is None else width
        index = torch.nn.functional.pad(index, (0, max(0, width - index.shape[1])))[:, :width]
        real = torch.arange(width, device=index.device) < counts.device[:, None]
        rows = torch.where(real, state.starts[:, None] + index, 0)
        tokens, ids = picked_rows(tokens, rows, real), torch.where(real, ids[rows], -1)
        return Padded(tokens, ids, state.seqlen, counts.device, None, counts, state.unpruned)
    known = isinstance(counts, int)
    if blend is not None and not known:
        raise ValueError("selection: a fused token needs the same count in every image, got a tensor of counts")
    rows = counts + (blend is not None) if known else None
    if width is None:
        width = rows if known else read_sizes(counts)[1]
    if rows == width:  # no padding
        flat = state.tokens.flatten(0, 1), state.ids.flatten()
        tokens, ids, _ = move_rows(*flat, state.starts, index[:, :counts], _own_blend(state, blend))
        shaped = (x.unflatten(0, (state.batch, rows)) for x in (tokens, ids))
        return Padded(*shaped, state.seqlen, None, rows, unpruned=state.unpruned)
    index = torch.nn.functional.pad(index, (0, max(0, width - index.shape[1])))[:, :width]
    real = torch.arange(width, device=index.device) < (counts if known else counts[:, None])
    tokens = picked_rows(state.tokens.flatten(0, 1), state.starts[:, None] + index, real.expand(index.shape))
    ids = torch.where(real, state.ids.gather(1, index), -1)
    if blend is not None:
        tokens[:, counts], ids[:, counts] = fuse(state, blend)[:, 0], -1
    lengths = counts
    if known:
        lengths = torch.full((state.batch,), rows, dtype=torch.int32, device=index.device)
    return Padded(tokens, ids, state.seqlen, lengths, rows, unpruned=state.unpruned)


def _own_blend(state: Packed | Padded, blend: Tensor | None) -> Tensor | None:
    """blend (batch, rows), zero where an image has no row: what stands there is another's, or padding."""
    if blend is None or state.count is not None:
        return blend
    column = torch.arange(blend.shape[1], device=blend.device)
    return torch.where(column < state.lengths[:, None], blend, 0.0)


def fuse(state: Packed | Padded, blend: Tensor) -> Tensor:
    """Weighted sum of the first rows of every image of `state`, blend (batch, rows), as (batch, 1, dim), in the tokens'
    own precision whatever autocast says."""
    with torch.autocast(state.tokens.device.type, enabled=False):
        return blend.to(state.tokens.dtype)[:, None] @ state.grid(state.tokens)[:, : blend.shape[1]]


def _with_fused(state: Packed | Padded, selection: Selection) -> tuple[Tensor, Tensor, Tensor, Counts]:
    """Flat tokens and ids of state, index and counts of selection; where there is a blend, with the fused rows: behind
    all others, and in every image's index behind the rows that stay."""
    tokens, ids = state.tokens.flatten(0, -2), state.ids.flatten()
    index, counts = selection.index, selection.counts
    if selection.blend is None:
        return tokens, ids, index, counts
    fused = tokens.shape[0] + torch.arange(state.batch, device=index.device) - state.starts  # as rows of their images
    index = torch.nn.functional.pad(index, (0, 1)).scatter(1, counts.device.long()[:, None], fused[:, None])
    tokens = torch.cat((tokens, fuse(state, selection.blend)[:, 0]))
    ids = torch.cat((ids, ids.new_full((state.batch,), -1)))
    return tokens, ids, index, counts.plus(1 if selection.fused is None else selection.fused)


def put_back(canvas: Tensor, state: Packed | Padded, tokens: Tensor) -> Tensor:
    """canvas (batch, seqlen, dim) with the rows of `state` in their original places: tokens, the state's or others of
    the same leading shape. Fused tokens have no place and are left out. No wait."""
    slots, tokens = state.batch * state.seqlen, tokens.flatten(0, -2)
    image = image_of_rows(state.cu_seqlens, tokens.shape[0])
    ids = state.ids.flatten()
    # one slot more than there are: everything that has no place goes there and is cut off
    slot = torch.where((ids < 0) | (image >= state.batch), slots, image * state.seqlen + ids)
    grown = torch.nn.functional.pad(canvas.flatten(0, 1), (0, 0, 0, 1))
    return grown.index_copy(0, slot, tokens.to(canvas.dtype))[:slots].unflatten(0, (state.batch, state.seqlen))


# ---- pack, repack, unpack ----


def pack(x: Tensor, keep: Tensor, *, counts: list[int] | None = None) -> Packed:
    """Copy the kept rows of a dense batch into one flat buffer.

    x: (batch, n, dim), any floating dtype.  keep: bool (batch, n), or int64 (batch, k) with the row numbers to keep in
    the order wanted (then every image keeps k rows).  counts: the number of kept rows of every image, if the host
    knows it. Without it a mask costs exactly one device-to-host wait, which reads the counts; an index, or a mask with
    counts, costs none. Raises ValueError or TypeError for other shapes and dtypes.
    """
    check_tensor("x", x, 3, FLOATS)
    check_tensor("keep", keep, 2, (torch.bool, torch.int64))
    batch, n, _ = x.shape
    if batch == 0:
        raise ValueError(f"x: expected at least one image, got shape {tuple(x.shape)}")
    if keep.device != x.device:
        raise ValueError(f"keep: expected on {x.device} like x, got {keep.device}")
    dense = Padded(x, torch.arange(n, device=x.device).expand(batch, n), n, count=n)
    if keep.dtype == torch.int64:
        if counts is not None:
            raise ValueError("counts: an index already says how many rows every image keeps")
        if keep.shape[0] != batch:
            raise ValueError(f"keep: expected {batch} rows of row numbers like x, got {tuple(keep.shape)}")
        if may_look(keep) and keep.numel() and not (0 <= keep.min() and keep.max() < n):
            raise ValueError(f"keep: row numbers must lie in [0, {n}), got {keep.min()} to {keep.max()}")
        if x.requires_grad and torch.is_grad_enabled():  # the same row may be wanted twice: its gradients add up
            taken = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2])).flatten(0, 1)
            cu_seqlens = equal_offsets(batch, keep.shape[1], x.device)
            return Packed(taken, keep.flatten(), cu_seqlens, max(keep.shape[1], 1), batch, n, keep.shape[1])
        return take_packed(dense, Selection(keep, keep.shape[1]))
    if keep.shape != (batch, n):
        raise ValueError(f"keep: expected shape {(batch, n)} like x, got {tuple(keep.shape)}")
    return repack(dense.flat(), keep.flatten(), counts=counts)


def repack(packed: Packed, keep: Tensor, *, counts: list[int] | None = None) -> Packed:
    """Drop rows of a `Packed` batch: ragged in, ragged out.

    packed: what `pack` or `repack` returned.  keep: bool (total,).  counts: as in `pack`; without it, exactly one
    device-to-host wait. Rows keep their order and their ids.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"packed: expected a Packed batch, got {type(packed).__name__}")
    check_tensor("keep", keep, 1, (torch.bool,))
    if keep.device != packed.tokens.device:
        raise ValueError(f"keep: expected on {packed.tokens.device} like the tokens, got {keep.device}")
    if keep.shape[0] != packed.tokens.shape[0]:
        raise ValueError(f"keep: expected one entry per row, {packed.tokens.shape[0]}, got {keep.shape[0]}")
    index, kept = kept_rows(keep, packed.cu_seqlens, packed.width)
    if counts is None:
        total, longest = read_sizes(kept)
    else:
        total, longest = _host_sizes(counts, packed.batch)
        if may_look(keep) and kept.tolist() != list(counts):
            raise ValueError("counts: they do not agree with keep")
    new = take_packed(packed, Selection(index, kept), lambda _: (total, longest))
    return replace(new, count=longest) if total == longest * packed.batch else new


def unpack(packed: Packed, fill: float = 0.0) -> Tensor:
    """Put every row of `packed` back where it stood before pruning: (batch, seqlen, dim), `fill` where one was dropped.
    Fused tokens (id -1) have no place in the original sequence and are left out. No wait."""
    if not isinstance(packed, Packed):
        raise TypeError(f"packed: expected a Packed batch, got {type(packed).__name__}")
    canvas = packed.tokens.new_full((packed.batch, packed.seqlen, packed.tokens.shape[1]), fill)
    return put_back(canvas, packed, packed.summed.tokens)


def _host_sizes(counts: list[int], batch: int) -> tuple[int, int]:
    if not isinstance(counts, (list, tuple)) or not all(isinstance(n, Integral) and n >= 0 for n in counts):
        raise TypeError(f"counts: expected a list of {batch} ints >= 0, got {counts!r}")
    if len(counts) != batch:
        raise ValueError(f"counts: expected {batch} numbers, one per image, got {len(counts)}")
    return int(sum(counts)), int(max(counts))
