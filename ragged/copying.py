"""Moving token rows: a gather and a scatter, each with the ids in the same launch. Triton on CUDA, PyTorch
elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch

ROWS, BLOCK = 8, 128


def _cut(dim: int) -> tuple[dict, tuple]:
    """Constants of the copy kernels for rows of `dim` numbers, and the launch key they depend on."""
    return {"DIM": dim, "ROWS": ROWS, "BLOCK": BLOCK}, (dim,)


def copy_rows(x: Tensor, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x[rows], ids[rows] for x (n, dim), ids int64 (n,), rows int64 (total,). No wait."""
    if not launch.usable(x.device) or (x.requires_grad and torch.is_grad_enabled()):
        return x.index_select(0, rows), ids.index_select(0, rows)
    from .kernel_simple import copy_kernel

    x, ids, rows = x.contiguous(), ids.contiguous(), rows.contiguous()
    total, dim = rows.shape[0], x.shape[1]
    out, out_ids = x.new_empty(total, dim), ids.new_empty(total)
    constants, key = _cut(dim)
    grid = (-(-total // ROWS), -(-dim // BLOCK))
    launch.start(copy_kernel, (x.dtype, *key), grid, (x, ids, rows, out, out_ids), (total,), constants, {})
    return out, out_ids


def scatter_rows(x: Tensor, ids: Tensor, keep: Tensor, place: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The rows of x (n, dim) and ids (n,) where keep (n,) is True, row i at place[i] - 1; place int32 (n,) is the
    inclusive prefix sum of keep and total its last entry. No wait."""
    if not launch.usable(x.device) or (x.requires_grad and torch.is_grad_enabled()):
        target = torch.where(keep, place - 1, total).long()
        rows = target.new_empty(total + 1)
        rows[target] = torch.arange(x.shape[0], device=x.device)
        return x.index_select(0, rows[:total]), ids.index_select(0, rows[:total])
    from .kernel_simple import pack_kernel

    x, ids, keep, place = x.contiguous(), ids.contiguous(), keep.contiguous(), place.contiguous()
    n, dim = x.shape
    out, out_ids = x.new_empty(total, dim), ids.new_empty(total)
    constants, key = _cut(dim)
    grid = (-(-n // ROWS), -(-dim // BLOCK))
    tensors = (x, ids, keep, place, out, out_ids)
    launch.start(pack_kernel, (x.dtype, *key), grid, tensors, (n, total), constants, {})
    return out, out_ids
