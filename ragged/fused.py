"""Calling this collection's own kernels: which tiles, which grid, and no detours on the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .tiles import Tiles, choose_tiles, grid_of

LOG2_E = 1.4426950408889634

try:  # the allocator's own entry, without the argument parsing of torch.empty: half the time
    _empty_cuda = torch._C._dynamo.guards._empty_strided_cuda
except AttributeError:
    _empty_cuda = None
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then every call takes the long way
    TensorGuards = None


def new_output(q: Tensor, total: int, heads: int, dim: int) -> Tensor:
    """An uninitialised contiguous tensor like q, whose shape (total, heads, dim) the caller has already read."""
    if _empty_cuda is not None and q.is_cuda:
        return _empty_cuda((total, heads, dim), (heads * dim, dim, 1), q.dtype)
    return q.new_empty((total, heads, dim))


@functools.cache
def _constants(tiles: Tiles, q_stride: tuple, k_stride: tuple, v_stride: tuple, heads: int, dim: int,
               dtype: torch.dtype, has_lse: bool) -> tuple[dict, dict]:  # fmt: skip
    """Compile-time constants, in the kernel's order, and options of an attention kernel for one model and tile
    choice."""
    constants = _strides(Q=q_stride, K=k_stride, V=v_stride) | _head(heads, dim)
    constants |= {"HAS_LSE": has_lse, "PRECISION": _precision(dtype)}
    return constants | dict(tiles.shape), dict(tiles.options)


def _strides(**strides: tuple) -> dict:
    return {f"{x}_{part}": n for x, s in strides.items() for part, n in zip(("TOKEN", "HEAD", "DIM"), s, strict=True)}


def _head(heads: int, dim: int) -> dict:
    """A tile's last dimension is a power of two, and at least the 16 that a tensor core takes."""
    return {"HEADS": heads, "D": dim, "BLOCK_D": max(16, 1 << (dim - 1).bit_length())}


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
           scale: float, want_lse: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """This collection's attention on checked arguments: (total_q, nheads, headdim), and the log-sum-exp or None.

    Token-major tensors are read in place. Where a head's tokens stand together instead, the head stride is the total of
    the batch, and to compile that in would mean a new kernel for every batch: such tensors are copied.
    """
    from . import kernel

    if q.is_cuda and q.get_device() != launch.current_device():
        with torch.cuda.device(q.device):
            return attend(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse)
    q, k, v = (x.contiguous() if x.stride(0) < x.stride(1) else x for x in (q, k, v))
    total, heads, dim = q.shape
    images = cu_q.shape[0] - 1
    equal = total == images * max_q and k.shape[0] == images * max_k
    tiles = choose_tiles(max_q, max_k, dim, images * heads, equal, q.element_size())
    key = (tiles, q.stride(), k.stride(), v.stride(), heads, dim, q.dtype, want_lse)
    constants, options = _constants(*key)
    out = new_output(q, total, heads, dim)
    lse = torch.full((heads, total), -math.inf, device=q.device) if want_lse else None
    run = kernel.resident_kernel if tiles.kernel == "resident" else kernel.stream_kernel
    tensors = (q, k, v, out, out if lse is None else lse, cu_q, cu_k)
    numbers = (scale * LOG2_E, total, max_q, max_k)
    grid = grid_of(tiles, max_q, heads, images) if total else (0, 0)
    launcher = launch.start(run, key, grid, tensors, numbers, constants, options)
    if launcher is not None and not want_lse:
        _remember(q, k, v, cu_q, cu_k, tiles, launcher)
    return out, lse


class Plan(NamedTuple):
    """A kind of call that went through every check: `same(q, k, v, cu_q[, cu_k])` says whether a later call is of that
    kind (dtypes, devices, strides, heads, head dimension, no gradient; not lengths or batch), tiles -> launcher."""

    same: Callable[..., bool]
    launchers: dict[Tiles, Callable]


# A model needs one or two. The guard takes every tensor once, so calls whose cu_k is cu_q have plans of their own.
_plans: dict[bool, list[Plan]] = {True: [], False: []}
MOST_PLANS = 16


def _remember(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, tiles: Tiles, launcher: Callable) -> None:
    """Note for `quick` how a call was launched. The comparison is the one torch.compile guards its graphs with: one
    call into C++ looks at all the tensors, in the time that Python needs to look at one."""
    if TensorGuards is None or q.requires_grad or k.requires_grad or v.requires_grad:
        return
    plans = _plans[cu_k is cu_q]
    tensors = (q, k, v, cu_q) if cu_k is cu_q else (q, k, v, cu_q, cu_k)
    plan = next((plan for plan in plans if plan.same(*tensors)), None)
    if plan is None:
        sizes = [[None, *x.shape[1:]] for x in tensors]
        strides = [list(x.stride()) for x in tensors]
        plan = Plan(TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check, {})
        if not plan.same(*tensors):  # q, k and v are not three tensors, say
            return
        plans.insert(0, plan)
        del plans[MOST_PLANS:]
    plan.launchers[tiles] = launcher


def quick(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
          scale: float | None) -> Tensor | None:  # fmt: skip
    """`attend` for a kind of call that went through all checks before, or None: then take the long way.

    Nothing is left out: what the long way checks is either compared by a plan or looked at here.
    """
    shared = cu_k is cu_q
    for plan in _plans[shared]:
        if plan.same(q, k, v, cu_q) if shared else plan.same(q, k, v, cu_q, cu_k):
            break
    else:
        return None
    if not (max_q.__class__ is int and max_q > 0 and max_k.__class__ is int and max_k > 0):
        return None
    total, heads, dim = q.shape
    total_k, images, device = k.shape[0], cu_q.shape[0] - 1, q.get_device()
    equal = total == images * max_q and total_k == images * max_k
    tiles = choose_tiles(max_q, max_k, dim, images * heads, equal, q.element_size())
    launcher = plan.launchers.get(tiles)
    if launcher is None or device != launch.current_device() or total == 0 or images < 1:
        return None
    if total_k != v.shape[0] or not (shared or cu_k.shape[0] == images + 1):
        return None
    if scale is None:
        scale = dim**-0.5
    elif scale.__class__ is not float or not 0.0 < scale < math.inf:
        return None
    out = new_output(q, total, heads, dim)
    a, b, c, d, e, f = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), cu_q.data_ptr(), cu_k.data_ptr()
    if (a | b | c | d | e | f) & 15:  # compiled kernels assume multiples of 16 bytes
        return None
    stream = launch.current_stream(device)
    grid = grid_of(tiles, max_q, heads, images)
    launcher(*grid, stream, a, b, c, d, d, e, f, scale * LOG2_E, total, max_q, max_k)
    return out


def paper_attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, max_q: int, scale: float) -> Tensor:
    """Algorithm 1 the way the paper runs it: three contiguous copies, then `kernel[grid](...)` through the JIT."""
    if q.is_cuda and q.get_device() != launch.current_device():
        with torch.cuda.device(q.device):
            return paper_attend(q, k, v, cu, max_q, scale)
    from .kernel_simple import paper_kernel

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    _, heads, dim = q.shape
    out = torch.empty_like(q)
    side = 32 if q.dtype == torch.float32 else 64
    paper_kernel[(cu.shape[0] - 1, heads)](
        q, k, v, out, cu, scale * LOG2_E, **_head(heads, dim), M=side, N=side, PRECISION=_precision(q.dtype)
    )
    return out


def cls_attention(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor, width: int, scale: float) -> Tensor:
    """How much CLS attends to every row of its image: softmax(q[start] . k) per image and head.

    q, k: (rows, nheads, headdim), any strides.  starts, lengths: int32 (batch,), image b owns rows starts[b] to
    starts[b] + lengths[b].  width: no image is longer.  Returns float32 (rows, nheads); rows that no image owns are
    zero. One row of the attention matrix per head: O(n), never O(n²).
    """
    rows, heads, dim = q.shape
    if not launch.usable(q.device):
        return _cls_attention_torch(q, k, starts, lengths, width, scale)
    from .kernel_simple import cls_kernel

    probs = torch.zeros((rows, heads), device=q.device, dtype=torch.float32)
    constants = _strides(Q=q.stride(), K=k.stride()) | _head(heads, dim) | {"N": 64}
    key = (q.dtype, *constants.values())
    tensors = (q, k, probs, starts, lengths)
    launch.start(cls_kernel, key, (heads * starts.shape[0], 1), tensors, (scale * LOG2_E,), constants, {})
    return probs


def _cls_attention_torch(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor, width: int, scale: float) -> Tensor:
    column = torch.arange(width, device=q.device)
    real = column < lengths[:, None]
    rows = torch.where(real, starts[:, None] + column, 0)
    first = torch.where(lengths > 0, starts, 0)
    scores = torch.einsum("bhd,bnhd->bnh", q[first].float(), k[rows].float()) * scale
    probs = scores.masked_fill(~real[..., None], -math.inf).softmax(1)
    out = torch.zeros((q.shape[0] + 1, q.shape[1]), device=q.device)
    # padding columns all land in one extra row, which is cut off
    return out.index_copy_(0, torch.where(real, rows, q.shape[0]).flatten(), probs.flatten(0, 1))[:-1]


def forget() -> None:
    """Drop every kept launcher and plan, so that the next call is a first call (for tests and measurements)."""
    launch.forget()
    for plans in _plans.values():
        plans.clear()
