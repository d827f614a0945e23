"""Moving token rows: a gather, a scatter and a whole packing, each with the ids in the same launch. Triton on CUDA,
PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch

ROWS, BLOCK = 8, 128
CHUNK = 128  # counts that a program of `take_rows` adds up at a time


def _in_pytorch(x: Tensor) -> bool:
    """Whether rows of x are moved by PyTorch: where the kernels do not run, or a gradient has to find its way back."""
    return not launch.usable(x.device) or (x.requires_grad and torch.is_grad_enabled())


def _cut(dim: int) -> dict:
    """Constants of the copy kernels for rows of `dim` numbers."""
    return {"DIM": dim, "ROWS": ROWS, "BLOCK": BLOCK}


def offsets(counts: Tensor) -> Tensor:
    """Exclusive prefix sums of counts (batch,) as int32 (batch + 1,): the `cu_seqlens` of flash-attention."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def copy_rows(x: Tensor, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x[rows], ids[rows] for x (n, dim), ids int64 (n,), rows int64 (total,). No wait."""
    if _in_pytorch(x):
        return x.index_select(0, rows), ids.index_select(0, rows)
    from .kernel_simple import copy_kernel

    x, ids, rows = x.contiguous(), ids.contiguous(), rows.contiguous()
    total, dim = rows.shape[0], x.shape[1]
    out, out_ids = x.new_empty(total, dim), ids.new_empty(total)
    grid = (-(-total // ROWS), -(-dim // BLOCK))
    launch.start(copy_kernel, (x.dtype, dim), grid, (x, ids, rows, out, out_ids), (total,), _cut(dim), {})
    return out, out_ids


def scatter_rows(x: Tensor, ids: Tensor, keep: Tensor, place: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The rows of x (n, dim) and ids (n,) where keep (n,) is True, row i at place[i] - 1; place int32 (n,) is the
    inclusive prefix sum of keep and total its last entry. No wait."""
    if _in_pytorch(x):
        target = torch.where(keep, place - 1, total).long()
        rows = target.new_empty(total + 1)
        rows[target] = torch.arange(x.shape[0], device=x.device)
        return x.index_select(0, rows[:total]), ids.index_select(0, rows[:total])
    from .kernel_simple import pack_kernel

    x, ids, keep, place = x.contiguous(), ids.contiguous(), keep.contiguous(), place.contiguous()
    n, dim = x.shape
    out, out_ids = x.new_empty(total, dim), ids.new_empty(total)
    grid = (-(-n // ROWS), -(-dim // BLOCK))
    tensors = (x, ids, keep, place, out, out_ids)
    launch.start(pack_kernel, (x.dtype, dim), grid, tensors, (n, total), _cut(dim), {})
    return out, out_ids


def take_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, counts: Tensor, total: int,
              longest: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Pack rows of x (n, dim) and ids int64 (n,): of image b, which begins at row starts[b], those that the first
    counts[b] entries of index (batch, k) name; starts, counts int32 (batch,), index int64.

    total: rows of the result. Surplus rows hold zeros and the id -1; of images that do not fit, only a part is there.
    longest: no count is larger. Returns tokens (total, dim), ids (total,) and cu_seqlens, int32 (batch + 1,), which
    ends at total at the latest. No wait.
    """
    if _in_pytorch(x):
        return _take_rows_torch(x, ids, starts, index, counts, total)
    from .kernel_simple import take_kernel

    x, ids, starts, index, counts = (t.contiguous() for t in (x, ids, starts, index, counts))
    batch, dim = counts.shape[0], x.shape[1]
    out, out_ids = x.new_empty(total, dim), ids.new_empty(total)
    cu_seqlens = counts.new_empty(batch + 1)
    constants = _cut(dim) | {"CHUNK": CHUNK}
    grid = (batch + 1, min(max(1, -(-longest // ROWS)), 65535))  # the kernel's loop covers what is left
    tensors = (x, ids, starts, index, counts, out, out_ids, cu_seqlens)
    launch.start(take_kernel, (x.dtype, dim), grid, tensors, (batch, total, index.shape[1]), constants, {})
    return out, out_ids, cu_seqlens


def _take_rows_torch(x, ids, starts, index, counts, total) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = offsets(counts).clamp_(max=total)
    row = torch.arange(total, device=x.device)
    image = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp_(max=counts.shape[0] - 1)
    column = (row - cu_seqlens[image]).clamp_(max=index.shape[1] - 1)
    rows, owned = starts[image] + index[image, column], row < cu_seqlens[-1]
    return torch.where(owned[:, None], x[rows], 0.0), torch.where(owned, ids[rows], -1), cu_seqlens
