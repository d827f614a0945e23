"""The two layouts of a ragged batch hold the same thing, and everything after this file works on either:

* `Padded`  (batch, n, dim): every image owns n rows; rows past its length are padding. A dense batch is the case
  where no length is given. This is what an ordinary ViT computes on.
* `Packed`  (total, dim): the images stand one behind the other, with no padding, and `cu_seqlens` says where each
  begins. This is what a variable-length attention kernel reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rows import added, equal_offsets, first_rows, grid_rows


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


class _Batch:
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
        return added(*(None if x is None else self._first(x, count) for x in (self.tokens, self.more)))

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
    normed: None = None  # only packed rows are

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
