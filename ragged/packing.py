"""pack, repack, unpack: into the flat buffer, from flat to flatter, and back."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from . import launch
from .copying import scatter_rows
from .layout import Packed, Padded, Selection, read_sizes, take_packed


def pack(x: Tensor, keep: Tensor, *, counts: list[int] | None = None) -> Packed:
    """Copy the kept rows of a dense batch into one flat buffer.

    x: (batch, n, dim), any floating dtype.  keep: bool (batch, n), or int64 (batch, k) with the row numbers to keep in
    the order wanted (then every image keeps k rows).  counts: the number of kept rows of every image, if the host
    knows it. Without it a mask costs exactly one device-to-host wait, which reads total and maximum together; an
    index, or a mask with counts, costs none. Raises ValueError or TypeError for other shapes and dtypes.
    """
    _check(x, "x", 3, (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    _check(keep, "keep", 2, (torch.bool, torch.int64))
    batch, n, _ = x.shape
    if batch == 0:
        raise ValueError(f"x: expected at least one image, got shape {tuple(x.shape)}")
    if keep.device != x.device:
        raise ValueError(f"keep: expected on {x.device} like x, got {keep.device}")
    ids = torch.arange(n, device=x.device).expand(batch, n)
    dense = Padded(x, ids, n, count=n)
    if keep.dtype == torch.int64:
        if counts is not None:
            raise ValueError("counts: an index already says how many rows every image keeps")
        if keep.shape[0] != batch:
            raise ValueError(f"keep: expected {batch} rows of row numbers like x, got {tuple(keep.shape)}")
        if keep.device.type == "cpu" and keep.numel() and not (0 <= keep.min() and keep.max() < n):
            raise ValueError(f"keep: row numbers must lie in [0, {n}), got {keep.min()} to {keep.max()}")
        return take_packed(dense, Selection(keep, keep.shape[1]))
    if keep.shape != (batch, n):
        raise ValueError(f"keep: expected shape {(batch, n)} like x, got {tuple(keep.shape)}")
    return repack(dense.flat(), keep.flatten(), counts=counts)


def repack(packed: Packed, keep: Tensor, *, counts: list[int] | None = None) -> Packed:
    """Drop rows of a `Packed` batch: ragged in, ragged out.

    packed: what `pack` or `repack` returned.  keep: bool (total,).  counts: as in `pack`; without it, exactly one
    device-to-host wait. Rows keep their order and their ids. The position of a row in the output is the number of kept
    rows before it: a prefix sum, no `nonzero`.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"packed: expected a Packed batch, got {type(packed).__name__}")
    _check(keep, "keep", 1, (torch.bool,))
    if keep.device != packed.tokens.device:
        raise ValueError(f"keep: expected on {packed.tokens.device} like the tokens, got {keep.device}")
    if keep.shape[0] != packed.tokens.shape[0]:
        raise ValueError(f"keep: expected one entry per row, {packed.tokens.shape[0]}, got {keep.shape[0]}")
    place = keep.cumsum(0, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(place, (1, 0))[packed.cu_seqlens]
    if counts is None:
        total, longest = read_sizes(cu_seqlens[1:] - cu_seqlens[:-1])
    else:
        total, longest = _host_sizes(counts, packed.batch)
        if launch.may_look(keep) and cu_seqlens.diff().tolist() != list(counts):
            raise ValueError("counts: they do not agree with keep")
    tokens, ids = scatter_rows(packed.tokens, packed.ids, keep, place, total)
    equal = longest if total == longest * packed.batch else None
    return Packed(tokens, ids, cu_seqlens, max(longest, 1), packed.batch, packed.seqlen, equal)


def unpack(packed: Packed, fill: float = 0.0) -> Tensor:
    """Put every row of `packed` back where it stood before pruning: (batch, seqlen, dim), `fill` where one was dropped.
    Fused tokens (id -1) have no place in the original sequence and are left out. No wait."""
    if not isinstance(packed, Packed):
        raise TypeError(f"packed: expected a Packed batch, got {type(packed).__name__}")
    dim, slots = packed.tokens.shape[1], packed.batch * packed.seqlen
    row = torch.arange(packed.tokens.shape[0], device=packed.ids.device)
    image = torch.searchsorted(packed.cu_seqlens[1:], row, right=True)
    # one slot more than there are: everything that has no place goes there and is cut off
    gone = (packed.ids < 0) | (image >= packed.batch)
    slot = torch.where(gone, slots, image * packed.seqlen + packed.ids)
    out = packed.tokens.new_full((slots + 1, dim), fill)
    return out.index_copy_(0, slot, packed.tokens)[:slots].unflatten(0, (packed.batch, packed.seqlen))


def _host_sizes(counts: list[int], batch: int) -> tuple[int, int]:
    if not isinstance(counts, (list, tuple)) or not all(isinstance(n, Integral) and n >= 0 for n in counts):
        raise TypeError(f"counts: expected a list of {batch} ints >= 0, got {counts!r}")
    if len(counts) != batch:
        raise ValueError(f"counts: expected {batch} numbers, one per image, got {len(counts)}")
    return int(sum(counts)), int(max(counts))


def _check(x: Tensor, name: str, rank: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {x.dtype}")
