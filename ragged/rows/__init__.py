"""The host's side of the kernels that move rows: which of them a mask marks, and how they move, each with its ids in
the same launch. Triton where it runs, PyTorch elsewhere; neither waits for the GPU. Where gradients are wanted,
kernels/flow.py knows the way back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import launch
from ..kernels import flow
from ..kernels.padding import image_of_rows

ROWS, BLOCK = 8, 128  # of a program that moves rows
FUSE = {"NARROW": 32, "CHUNK": 256}  # of one that sums up rows: all rows of an image at once, few columns
NORMED = {"num_warps": 2}  # of a program that norms the one row it takes
# Numbers up to which taking and norming in one launch is ahead of two, and the widest rows: with more, memory decides,
# and a program that has to see a whole row keeps it less busy.
MOST_NORMED, WIDEST_NORM = 2_500_000, 2048
CHUNK, MASK_CHUNK = 128, 256  # counts, or entries of a mask, that a program adds up at once


def offsets(counts: Tensor) -> Tensor:
    """Exclusive prefix sums of counts (batch,) as int32 (batch + 1,): the `cu_seqlens` of flash-attention."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def equal_offsets(batch: int, count: int, device: torch.device) -> Tensor:
    """`offsets` of batch images with count rows each, on `device`: nothing has to be summed."""
    if count == 0:
        return torch.zeros(batch + 1, device=device, dtype=torch.int32)
    return torch.arange(0, batch * count + 1, count, device=device, dtype=torch.int32)


def added(x: Tensor, more: Tensor | None) -> Tensor:
    """x, and `more` of its shape added, if there is any."""
    return x if more is None else x + more


def host_offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Offsets of images of `lengths` rows, int32 (batch + 1,), on `device`."""
    on_host = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")
    return on_host.to(device, non_blocking=True)


# ---- which rows ----


def grid_rows(x: Tensor, cu_seqlens: Tensor, width: int, fill: float) -> Tensor:
    """Packed numbers x (total, ...) as a grid (batch, width, ...), image b from row cu_seqlens[b], int32 (batch + 1,),
    with `fill` where an image has no row. width: no image is longer. No wait."""
    if flow.wanted(x):
        return flow.Spread.apply(x, _grid_rows, cu_seqlens, width, fill)
    return _grid_rows(x, cu_seqlens, width, fill)


def _grid_rows(x: Tensor, cu_seqlens: Tensor, width: int, fill: float) -> Tensor:
    batch, shape = cu_seqlens.shape[0] - 1, x.shape[1:]
    kernel = launch.usable(x.device) and x.is_floating_point() and x.dtype != torch.float64
    if not kernel or 0 in x.shape or width == 0:
        column = torch.arange(width, device=x.device)
        real = column < cu_seqlens.diff()[:, None]
        rows = torch.where(real, cu_seqlens[:-1, None] + column, 0)
        real = real.view(*real.shape, *[1] * len(shape))
        return torch.where(real, x[rows], torch.full((), fill, dtype=x.dtype, device=x.device))
    from ..kernels.rows import grid_kernel

    out = x.new_empty(batch, width, *shape)
    constants = {"C": shape.numel(), "BLOCK": 1024}
    grid = (batch * -(-width * shape.numel() // 1024), 1)
    key = (x.dtype, *constants.values())
    launch.start(grid_kernel, key, grid, (x.contiguous(), cu_seqlens, out), (width, float(fill)), constants, {})
    return out


def kept_rows(keep: Tensor, cu_seqlens: Tensor, width: int, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """A mask as an index: row numbers int64 (batch, width) of every image, those to keep before the others, each in
    the order in which they stand; and how many are kept, int32 (batch,).

    keep: bool, any shape, one entry a row.  cu_seqlens: int32 (batch + 1,), image b owns entries cu_seqlens[b] to
    cu_seqlens[b + 1] of it, flattened.  width: no image is longer.  prefix: so many first rows stay anyway.
    """
    batch, keep = cu_seqlens.shape[0] - 1, keep.reshape(-1).contiguous()
    if not launch.usable(keep.device) or width == 0:
        column = torch.arange(width, device=keep.device)
        real = column < cu_seqlens.diff()[:, None]  # (batch, width)
        marked = keep[torch.where(real, cu_seqlens[:-1, None] + column, 0)] if keep.numel() else real
        marked = (marked | (column < prefix)) & real
        return marked.byte().argsort(dim=1, descending=True, stable=True), marked.sum(1, dtype=torch.int32)
    from ..kernels.rows import keep_kernel

    index = torch.empty(batch, width, dtype=torch.int64, device=keep.device)
    counts = torch.empty(batch, dtype=torch.int32, device=keep.device)
    constants = {"PREFIX": prefix, "CHUNK": MASK_CHUNK}
    tensors = (keep, cu_seqlens, index, counts)
    launch.start(keep_kernel, tuple(constants.values()), (batch, 1), tensors, (width,), constants, {})
    return index, counts


def with_prefix(patches: Tensor, prefix: int) -> Tensor:
    """patches: patch numbers (batch, k). Returned as row numbers, with the `prefix` rows put before them."""
    first = torch.arange(prefix, device=patches.device).expand(patches.shape[0], prefix)
    return torch.cat((first, patches + prefix), 1)


# ---- moving them ----


def _constants(dim: int) -> dict:
    """Constants of the kernels that move rows of `dim` numbers."""
    return {"DIM": dim, "ROWS": ROWS, "BLOCK": BLOCK}


def move_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, blend: Tensor | None,
              more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A cut that leaves equally many rows in every image: of image b, which begins at row starts[b] of x (n, dim), the
    rows that index[b] names, and behind them, if there is a blend, the sum of its first rows weighted by blend[b].

    ids: int64 (n,), moved along; a fused row's is -1.  starts: int32 (batch,).  index: int64 (batch, count).  blend:
    (batch, width) or None.  more: what is to be added to x, (n, dim) of its dtype, or None. Returns tokens (batch *
    rows, dim), ids and offsets, int32 (batch + 1,). Gradients flow to x, more and blend, and take for granted that no
    row is named twice.
    """
    if flow.wanted(x, blend, more):
        return flow.Moved.apply(added(x, more), blend, _move_rows, ids, starts, index)
    return _move_rows(x, ids, starts, index, blend, more)


def _move_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, blend: Tensor | None,
               more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, count), dim, fused = index.shape, x.shape[1], blend is not None
    rows = count + fused
    if not launch.usable(x.device) or rows == 0:
        moved = _move_rows_torch(added(x, more), ids, starts, index, blend)
        return *moved, equal_offsets(batch, rows, x.device)
    from ..kernels.rows import move_kernel

    x, ids, index = x.contiguous(), ids.contiguous(), index if index.stride(1) == 1 else index.contiguous()
    blend = blend if not fused or blend.stride(1) == 1 else blend.contiguous()
    out, out_ids, cu = x.new_empty(batch * rows, dim), ids.new_empty(batch * rows), starts.new_empty(batch + 1)
    constants = _constants(dim) | {"BLOCKS": -(-dim // BLOCK), "FUSED": int(fused), "SUM": more is not None} | FUSE
    more = x if more is None else more.contiguous()
    key = (x.dtype, blend.dtype if fused else None, dim, fused, constants["SUM"])
    tensors = (x, more, ids, starts, index, blend if fused else x, out, out_ids, cu)
    width = blend.shape[1] if fused else 0
    numbers = (count, index.stride(0), width, blend.stride(0) if fused else 0, batch)
    programs = -(-count // ROWS) * constants["BLOCKS"] + fused * -(-dim // FUSE["NARROW"])
    grid = (batch * programs, 1)
    launch.start(move_kernel, key, grid, tensors, numbers, constants, {})
    return out, out_ids, cu


def _move_rows_torch(x, ids, starts, index, blend) -> tuple[Tensor, Tensor]:
    place = starts[:, None] + index
    tokens, out_ids = x[place], ids[place]  # (batch, count, dim), (batch, count)
    if blend is not None:
        row = starts[:, None] + torch.arange(blend.shape[1], device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # in the tokens' own precision whatever it says
            weights = blend.to(x.dtype)
            first = torch.where((weights != 0)[..., None], x[row.clamp(max=x.shape[0] - 1)], 0.0)  # 0 times NaN is NaN
            tokens = torch.cat((tokens, weights[:, None] @ first), 1)
        out_ids = torch.nn.functional.pad(out_ids, (0, 1), value=-1)
    return tokens.flatten(0, 1), out_ids.flatten()


def take_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, counts: Tensor, total: int, longest: int,
              more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Pack rows of x (n, dim) and ids int64 (n,): of image b, which begins at row starts[b], those that the first
    counts[b] entries of index (batch, k) name; starts, counts int32 (batch,), index int64; more: as in `move_rows`.

    total: rows of the result. Surplus rows hold zeros and the id -1; of images that do not fit, only a part is there.
    longest: no count is larger. Returns tokens (total, dim), ids (total,) and cu_seqlens, int32 (batch + 1,), which
    ends at total at the latest. Gradients flow to x and more, and take for granted that no row is named twice.
    """
    how = (ids, starts, index, counts, total, longest)
    if flow.wanted(x, more):
        sources = lambda: _sources(starts, index, counts, total)[:2]  # noqa: E731
        return flow.Taken.apply(added(x, more), lambda x: _take_rows(x, *how), sources)
    return _take_rows(x, *how, more)


def norms_rows(x: Tensor, more: Tensor | None, total: int, norm: nn.LayerNorm) -> bool:
    """Whether `take_normed_rows` runs, and pays, for `total` rows of tokens x (n, dim), more, and a plain layer norm:
    in a kernel, without gradients, all in one dtype and on one device."""
    weights = (norm.weight, norm.bias)
    if not launch.usable(x.device) or None in weights or x.dtype == torch.float64:
        return False
    alike = all(w.dtype == x.dtype and w.device == x.device and w.is_contiguous() for w in weights)
    fits = x.shape[1] == norm.weight.numel() <= WIDEST_NORM and total * x.shape[1] <= MOST_NORMED
    autocast = torch.is_autocast_enabled(x.device.type)  # which would have the norm return float32
    return fits and alike and not autocast and not flow.wanted(x, more, *weights)


def take_normed_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, counts: Tensor, total: int, longest: int,
                     more: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`take_rows`, and the tokens after norm, (total, dim), in the same launch. Only where `norms_rows`."""
    return _take_rows(x, ids, starts, index, counts, total, longest, more, norm)


def picked_rows(x: Tensor, rows: Tensor, real: Tensor | None = None) -> Tensor:
    """Rows of x (n, dim): (..., dim) of rows, int64 (...), zeros where real, bool (...), is False. Gradients flow to x,
    and take for granted that no real row is named twice."""

    def run(x: Tensor) -> tuple[Tensor]:
        found = x[rows]
        return (found if real is None else torch.where(real[..., None], found, 0.0),)

    if not flow.wanted(x):
        return run(x)[0]
    return flow.Taken.apply(x, run, lambda: (rows.flatten(), None if real is None else real.flatten()))[0]


def first_rows(x: Tensor, starts: Tensor, count: int) -> Tensor:
    """The first `count` rows of every image, (batch, count, dim), of x (n, dim): image b begins at row starts[b], int32
    (batch,). Of an image that begins past the end, the last row there is: recordings have some. Gradients flow to x."""
    total, dim = x.shape
    if flow.wanted(x) or not launch.usable(x.device) or 0 in x.shape or count == 0:
        return picked_rows(x, (starts[:, None] + torch.arange(count, device=x.device)).clamp(max=total - 1))
    from ..kernels.rows import first_kernel

    out = x.new_empty(starts.shape[0], count, dim)
    constants = {"COUNT": count, "DIM": dim, "BLOCK": 1 << (dim - 1).bit_length()}
    grid, tensors = (starts.shape[0] * count, 1), (x.contiguous(), starts.contiguous(), out)
    launch.start(first_kernel, (x.dtype, *constants.values()), grid, tensors, (total,), constants, {})
    return out


def _take_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, counts: Tensor, total: int, longest: int,
               more: Tensor | None = None, norm: nn.LayerNorm | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    if not launch.usable(x.device):
        return _take_rows_torch(added(x, more), ids, starts, index, counts, total)
    from ..kernels.rows import take_kernel

    x, ids, starts, index, counts = (t.contiguous() for t in (x, ids, starts, index, counts))
    batch, dim = counts.shape[0], x.shape[1]
    out, out_ids = x.new_empty(total, dim), ids.new_empty(total)
    cu_seqlens = counts.new_empty(batch + 1)
    constants = _constants(dim) | {"CHUNK": CHUNK, "SUM": more is not None, "NORM": norm is not None}
    normed, weight, bias, eps, options = out, x, x, 0.0, {}
    if norm is not None:
        normed, weight, bias, eps, options = torch.empty_like(out), norm.weight, norm.bias, float(norm.eps), NORMED
        constants |= {"ROWS": 1, "BLOCK": 1 << (dim - 1).bit_length()}
    more = x if more is None else more.contiguous()
    grid = (batch + 1, min(max(1, -(-longest // constants["ROWS"])), 65535))  # the kernel's loop covers what is left
    tensors = (x, more, ids, starts, index, counts, weight, bias, out, normed, out_ids, cu_seqlens)
    numbers, key = (batch, total, index.shape[1], eps), (x.dtype, dim, constants["SUM"], constants["NORM"])
    launch.start(take_kernel, key, grid, tensors, numbers, constants, options)
    return (out, out_ids, cu_seqlens) if norm is None else (out, out_ids, cu_seqlens, normed)


def _take_rows_torch(x, ids, starts, index, counts, total) -> tuple[Tensor, Tensor, Tensor]:
    if index.shape[1] == 0:  # no image has a row
        return x.new_zeros(total, x.shape[1]), ids.new_full((total,), -1), offsets(counts).clamp_(max=total)
    rows, owned, cu_seqlens = _sources(starts, index, counts, total)
    rows = rows.clamp(max=x.shape[0] - 1)  # an image without rows may begin past the end
    return torch.where(owned[:, None], x[rows], 0.0), torch.where(owned, ids[rows], -1), cu_seqlens


def _sources(starts: Tensor, index: Tensor, counts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows of `take_rows` come from, int64 (total,), which of them come from anywhere, bool (total,), and its
    offsets."""
    cu_seqlens = offsets(counts).clamp_(max=total)
    row, image = torch.arange(total, device=index.device), image_of_rows(cu_seqlens, total).clamp_(max=len(counts) - 1)
    column = (row - cu_seqlens[image]).clamp_(max=index.shape[1] - 1)
    return starts[image] + index[image, column], row < cu_seqlens[-1], cu_seqlens
