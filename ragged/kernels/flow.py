"""Gradients through the small kernels: where a row came from, its gradient goes back to.

Ids, counts and offsets carry none, and neither do scores: which rows stay is a decision, not a number. Tokens do, and
so do the weights of a fused token. A row is taken once at most, so the way back is a copy like the way there: for every
row that there was, whether it was taken and to where. Nothing is added up by atomics, and two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import launch
from .padding import image_of_rows

ROWS, BLOCK = 8, 128  # of a program that moves gradients


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient has to find its way back to any of `tensors`."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Moved(torch.autograd.Function):
    """`move_rows` with a way back. run: computes it from (x, ids, starts, index, blend).  x, blend: what gradients are
    for; ids, starts, index: as there."""

    @staticmethod
    def forward(ctx, x: Tensor, blend: Tensor | None, run: Callable, ids: Tensor, starts: Tensor, index: Tensor):
        tokens, out_ids, cu = run(x, ids, starts, index, blend)
        ctx.save_for_backward(starts, index, blend, x if blend is not None else None)
        ctx.rows = x.shape[0]
        ctx.mark_non_differentiable(out_ids, cu)
        return tokens, out_ids, cu

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: object):
        starts, index, blend, x = ctx.saved_tensors
        batch, count = index.shape
        rows = count + (blend is not None)
        target = torch.arange(batch, device=grad.device)[:, None] * rows + torch.arange(count, device=grad.device)
        inverse = _inverse((starts[:, None] + index).flatten(), target.flatten(), ctx.rows)
        if blend is None:
            return (_returned(grad, inverse), *[None] * 5)
        fused = grad.unflatten(0, (batch, rows))[:, count]  # (batch, dim)
        weights = blend.to(grad.dtype).float() if grad.dtype != torch.float64 else blend.double()
        row = starts[:, None] + torch.arange(blend.shape[1], device=grad.device)  # (batch, width)
        here = weights != 0
        of_blend = None
        if ctx.needs_input_grad[1]:
            dense = row.numel() == ctx.rows  # every image has as many rows as there are weights: nothing is gathered
            old = x.unflatten(0, row.shape) if dense else x[torch.where(here, row, 0)]
            with torch.autocast(grad.device.type, enabled=False):
                of_blend = torch.where(here, (old @ fused[:, :, None])[..., 0], 0.0).to(blend.dtype)
        slot, last = torch.where(here, row, ctx.rows).flatten(), target.new_tensor(count)
        into = (torch.arange(batch, device=grad.device)[:, None] * rows + last).expand_as(row).flatten()
        weight = weights.new_zeros(ctx.rows + 1).index_copy_(0, slot, weights.flatten())[:-1]
        return (_returned(grad, inverse, weight, _inverse(slot, into, ctx.rows)), of_blend, *[None] * 4)


class Taken(torch.autograd.Function):
    """Rows of x (n, dim) with a way back. run: computes tensors from x, the rows first, the others without gradients.
    sources: tells, when the gradient comes, which row of x every row of the result is, int64 (total,), and which of
    them come from x at all, bool (total,) or None for all. No row of x is there twice."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable, sources: Callable):
        out = run(x)
        ctx.rows, ctx.sources = x.shape[0], sources
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: object):
        source, owned = ctx.sources()
        if owned is not None:
            source = torch.where(owned, source, ctx.rows)
        target, grad = torch.arange(source.shape[0], device=grad.device), grad.reshape(source.shape[0], grad.shape[-1])
        return _returned(grad, _inverse(source, target, ctx.rows)), None, None


class Spread(torch.autograd.Function):
    """`grid_rows` with a way back. run: computes it from (x, cu, width, fill)."""

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable, cu: Tensor, width: int, fill: float):
        ctx.save_for_backward(cu)
        ctx.total = x.shape[0]
        return run(x, cu, width, fill)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (cu,) = ctx.saved_tensors
        row, image = torch.arange(ctx.total, device=grad.device), image_of_rows(cu, ctx.total)
        owned, image = image < grad.shape[0], image.clamp_(max=grad.shape[0] - 1)
        found = grad[image, (row - cu[image]).clamp_(0, grad.shape[1] - 1)]
        return (torch.where(owned.view(-1, *[1] * (found.dim() - 1)), found, 0.0), *[None] * 4)


class Looked(torch.autograd.Function):
    """`cls_attention` with a way back. run: computes it from (q, k, starts, lengths, width, scale)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, run: Callable, starts: Tensor, lengths: Tensor | int, width: int,
                scale: float):  # fmt: skip
        probs = run(q, k, starts, lengths, width, scale)
        ctx.equal = lengths if isinstance(lengths, int) else 0
        ctx.save_for_backward(q, k, probs, starts, None if ctx.equal else lengths)
        ctx.sizes = width, scale
        return probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, probs, starts, lengths = ctx.saved_tensors
        width, scale = ctx.sizes
        with torch.autocast(q.device.type, enabled=False):
            if launch.usable(q.device) and q.dtype != torch.float64:
                of_q, of_k = _looked_kernel(q, k, probs, grad, starts, lengths, ctx.equal, scale)
            else:
                lengths = torch.full_like(starts, ctx.equal) if ctx.equal else lengths
                of_q, of_k = _looked_torch(q, k, probs, grad, starts, lengths, width, scale)
        return (of_q, of_k, *[None] * 5)


def _inverse(source: Tensor, target: Tensor, rows: int) -> Tensor:
    """Of `rows` rows, which entry of `target` each became, int64 (rows,), -1 for none; entry i came from row source[i],
    and what came from row number `rows` came from nowhere."""
    return target.new_full((rows + 1,), -1).index_copy_(0, source, target)[:-1]


def _returned(grad: Tensor, inverse: Tensor, weight: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """Gradients (rows, dim) of rows: of each what came back from row inverse[i] of grad (total, dim), and weight[i]
    times row into[i] of it; -1 and a weight of 0 for nothing."""
    rows, dim = inverse.shape[0], grad.shape[1]
    if not launch.usable(grad.device) or grad.dtype == torch.float64 or 0 in (rows, dim) or grad.shape[0] == 0:
        return _returned_torch(grad, inverse, weight, into)
    from .gradients import return_kernel

    grad, out = grad.contiguous(), grad.new_empty(rows, dim)
    fused = weight is not None
    constants = {"DIM": dim, "ROWS": ROWS, "BLOCK": BLOCK, "FUSED": int(fused)}
    tensors = (grad, inverse, weight if fused else grad, into if fused else inverse, out)
    key = (grad.dtype, *constants.values())
    launch.start(return_kernel, key, (-(-rows // ROWS), -(-dim // BLOCK)), tensors, (rows,), constants, {})
    return out


def _returned_torch(grad: Tensor, inverse: Tensor, weight: Tensor | None, into: Tensor | None) -> Tensor:
    if grad.shape[0] == 0:
        return grad.new_zeros(inverse.shape[0], grad.shape[1])
    out = torch.where((inverse >= 0)[:, None], grad[inverse.clamp_min(0)], 0.0)
    if weight is None:
        return out
    more = torch.where((weight != 0)[:, None], grad[into.clamp_min(0)], 0.0)
    return (out.to(weight.dtype) + weight[:, None] * more.to(weight.dtype)).to(grad.dtype)


def _looked_kernel(q, k, probs, grad, starts, lengths, equal, scale) -> tuple[Tensor, Tensor]:
    from .gradients import cls_backward_kernel

    rows, heads, dim = q.shape
    of_q, of_k = (torch.zeros(rows, heads, dim, device=q.device, dtype=q.dtype) for _ in range(2))
    constants = launch.strides_of(Q=q.stride(), K=k.stride()) | launch.head_of(heads, dim) | {"N": 64}
    key = (q.dtype, *constants.values())
    tensors = (q, k, probs, grad.contiguous(), starts, starts if equal else lengths, of_q, of_k)
    grid = (heads * starts.shape[0], 1)
    launch.start(cls_backward_kernel, key, grid, tensors, (float(scale), equal), constants, {})
    return of_q, of_k


def _looked_torch(q, k, probs, grad, starts, lengths, width, scale) -> tuple[Tensor, Tensor]:
    exact, rows = torch.promote_types(q.dtype, torch.float32), q.shape[0]
    column = torch.arange(width, device=q.device)
    real = column < lengths[:, None]  # (batch, width)
    row = torch.where(real, starts[:, None] + column, 0)
    first = torch.where(lengths > 0, starts, 0)
    p, g = (torch.where(real[..., None], x[row].to(exact), 0.0) for x in (probs, grad))  # (batch, width, nheads)
    of_scores = p * (g - (p * g).sum(1, keepdim=True)) * scale
    old = torch.where(real[..., None, None], k[row].to(exact), 0.0)
    of_first = torch.einsum("bnh,bnhd->bhd", of_scores, old).to(q.dtype)
    of_keys = (of_scores[..., None] * q[first].to(exact)[:, None]).to(k.dtype)  # (batch, width, nheads, headdim)
    empty = q.new_zeros(rows + 1, *q.shape[1:])  # one row more, for what belongs to nobody
    of_q = empty.index_copy(0, torch.where(lengths > 0, starts, rows).long(), of_first)
    of_k = empty.index_copy(0, torch.where(real, row, rows).flatten(), of_keys.flatten(0, 1))
    return of_q[:-1], of_k[:-1]
