"""The backward pass of attention, in reading order: for queries that fit into one program, then for any lengths, then
the host functions.

With s = scale q k^T, p = exp(s - lse) and o = p v, a gradient do of o gives

    dv = p^T do        dp = do v^T        ds = p (dp - delta)        dq = scale ds k        dk = scale ds^T q

where delta, a number a row, is the sum of do o: the softmax's own derivative in one term. A gradient of lse itself
adds p dlse to ds, so it is subtracted from delta. p is computed again from lse, which the forward pass left behind;
nothing quadratic is ever stored. dq sums over keys, dk and dv over queries, and no two programs add to one number:
every result is written once, by one program, in one order, so the same inputs give the same bits.

Shapes in the comments as in `attention.py`: M query rows, N key rows, D head dimension, padded to a power of two.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import LOG2_E
from ..tiles import OWNER_BYTES, BackwardTiles, choose_backward
from .attention import PRECISION, load_tile, number


@triton.jit
def _row_facts(Out, Dout, Lse, Dlse, do, q_row, first, head, q_len, total_q, HEADS: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr, M: tl.constexpr, HAS_DLSE: tl.constexpr):
    """(lse in base 2, delta), each (M,). A row that does not exist has the log-sum-exp infinity: all its p are zero."""
    row = first + tl.arange(0, M)
    o = load_tile(Out + (q_row * HEADS + head) * D, first, M, q_len, HEADS * D, 1, D, BLOCK_D, CHECK=True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    place = head.to(tl.int64) * total_q + q_row + row
    lse = tl.load(Lse + place, mask=row < q_len, other=float("inf")) * 1.4426950408889634
    if HAS_DLSE:
        delta -= tl.load(Dlse + place, mask=row < q_len, other=0.0)
    return lse, delta


@triton.jit
def _write(base, first, values, rows, stride: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a tile (rows of one head, BLOCK_D) of a gradient."""
    row = first + tl.arange(0, values.shape[0])
    column = tl.arange(0, BLOCK_D)
    pointers = base + row[:, None] * stride + column[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < D))


@triton.jit
def _write_surplus(Grad, Cu, images, total, head, stride: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros for the rows behind the last image's: they belong to no sequence, but a gradient must not be undefined."""
    end = tl.load(Cu + images)
    base = Grad + end.to(tl.int64) * stride + head * D
    for r in tl.range(0, number(total - end), 16, num_stages=1):
        _write(base, r, tl.zeros([16, BLOCK_D], tl.float32), total - end, stride, D, BLOCK_D)


@triton.jit
def _scores(q, k, lse, scale_log2, keys_left, PRECISION: tl.constexpr):
    """p (M, N), from queries, keys and the rows' log-sum-exp; the tile's columns from keys_left on are no keys."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    return tl.where(tl.arange(0, k.shape[0])[None, :] < keys_left, p, 0.0)


@triton.jit(do_not_specialize=["total_q", "total_k", "images", "max_q", "max_k"])
def owner_backward_kernel(
    Q, K, V, Out, Dout, Lse, Dlse, Dq, Dk, Dv, Delta, CuQ, CuK,
    scale_log2, scale, total_q, total_k, images, max_q, max_k,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DQ_TOKEN: tl.constexpr, DK_TOKEN: tl.constexpr,
    HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """All three gradients of one head of one image by one program, for up to M queries.

    The queries stay, with do, lse and delta, and the sum dq; keys and values pass by in tiles. A tile of keys meets
    every query at once, so its dk and dv are complete after one step and never leave the chip unfinished. Each of the
    five products is computed once; with two kernels, one for dq and one for dk and dv, p and dp are needed twice.
    """
    image, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    q_start = tl.load(CuQ + image)
    q_len = tl.load(CuQ + image + 1) - q_start
    k_start = tl.load(CuK + image)
    k_len = tl.load(CuK + image + 1) - k_start
    q_row, k_row = q_start.to(tl.int64), k_start.to(tl.int64)
    q = load_tile(Q + q_row * Q_TOKEN + head * Q_HEAD, 0, M, q_len, Q_TOKEN, Q_DIM, D, BLOCK_D, CHECK=True)
    do = load_tile(Dout + (q_row * HEADS + head) * D, 0, M, q_len, HEADS * D, 1, D, BLOCK_D, CHECK=True)
    lse, delta = _row_facts(Out, Dout, Lse, Dlse, do, q_row, 0, head, q_len, total_q, HEADS, D, BLOCK_D, M, HAS_DLSE)
    k_head = K + k_row * K_TOKEN + head * K_HEAD
    v_head = V + k_row * V_TOKEN + head * V_HEAD
    dk_head, dv_head = Dk + k_row * DK_TOKEN + head * D, Dv + k_row * DK_TOKEN + head * D
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    for j in tl.range(0, number(k_len), N):
        k = load_tile(k_head, j, N, k_len, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)  # (N, D)
        v = load_tile(v_head, j, N, k_len, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True)
        p = _scores(q, k, lse, scale_log2, k_len - j, PRECISION)  # (M, N)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)  # (N, D)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        _write(dv_head, j, dv, k_len, DK_TOKEN, D, BLOCK_D)
        _write(dk_head, j, dk * scale, k_len, DK_TOKEN, D, BLOCK_D)
    _write(Dq + q_row * DQ_TOKEN + head * D, 0, dq * scale, q_len, DQ_TOKEN, D, BLOCK_D)
    if image == images - 1:
        _write_surplus(Dq, CuQ, images, total_q, head, DQ_TOKEN, D, BLOCK_D)
        _write_surplus(Dk, CuK, images, total_k, head, DK_TOKEN, D, BLOCK_D)
        _write_surplus(Dv, CuK, images, total_k, head, DK_TOKEN, D, BLOCK_D)


# ---- any lengths: a kernel that walks over keys, and one that walks over queries ----


@triton.jit(do_not_specialize=["total_q", "total_k", "images", "max_q", "max_k"])
def query_backward_kernel(
    Q, K, V, Out, Dout, Lse, Dlse, Dq, Dk, Dv, Delta, CuQ, CuK,
    scale_log2, scale, total_q, total_k, images, max_q, max_k,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DQ_TOKEN: tl.constexpr, DK_TOKEN: tl.constexpr,
    HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head of one image, and delta of these rows for the next kernel, (HEADS, total_q)."""
    tiles = tl.cdiv(max_q, M)
    image = tl.program_id(0) // (tiles * HEADS)
    head = tl.program_id(0) // tiles % HEADS
    first = tl.program_id(0) % tiles * M
    if (image == images - 1) & (first == 0):
        _write_surplus(Dq, CuQ, images, total_q, head, DQ_TOKEN, D, BLOCK_D)
    q_start = tl.load(CuQ + image)
    q_len = tl.load(CuQ + image + 1) - q_start
    if first >= q_len:
        return
    k_start = tl.load(CuK + image)
    k_len = tl.load(CuK + image + 1) - k_start
    q_row, k_row = q_start.to(tl.int64), k_start.to(tl.int64)
    q = load_tile(Q + q_row * Q_TOKEN + head * Q_HEAD, first, M, q_len, Q_TOKEN, Q_DIM, D, BLOCK_D, CHECK=True)
    do = load_tile(Dout + (q_row * HEADS + head) * D, first, M, q_len, HEADS * D, 1, D, BLOCK_D, CHECK=True)
    lse, delta = _row_facts(Out, Dout, Lse, Dlse, do, q_row, first, head, q_len, total_q, HEADS, D, BLOCK_D, M,
                            HAS_DLSE)  # fmt: skip
    row = first + tl.arange(0, M)
    tl.store(Delta + head.to(tl.int64) * total_q + q_row + row, delta, mask=row < q_len)
    k_head = K + k_row * K_TOKEN + head * K_HEAD
    v_head = V + k_row * V_TOKEN + head * V_HEAD
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    for j in tl.range(0, number(k_len), N, num_stages=STAGES):
        k = load_tile(k_head, j, N, k_len, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)  # (N, D)
        v = load_tile(v_head, j, N, k_len, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True)
        p = _scores(q, k, lse, scale_log2, k_len - j, PRECISION)  # (M, N)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    _write(Dq + q_row * DQ_TOKEN + head * D, first, dq * scale, q_len, DQ_TOKEN, D, BLOCK_D)


@triton.jit(do_not_specialize=["total_q", "total_k", "images", "max_q", "max_k"])
def key_backward_kernel(
    Q, K, V, Out, Dout, Lse, Dlse, Dq, Dk, Dv, Delta, CuQ, CuK,
    scale_log2, scale, total_q, total_k, images, max_q, max_k,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DQ_TOKEN: tl.constexpr, DK_TOKEN: tl.constexpr,
    HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one head of one image. Scores are computed turned, s^T = k q^T: then p^T and ds^T are
    where the next products want their first factor, in registers."""
    tiles = tl.cdiv(max_k, N)
    image = tl.program_id(0) // (tiles * HEADS)
    head = tl.program_id(0) // tiles % HEADS
    first = tl.program_id(0) % tiles * N
    if (image == images - 1) & (first == 0):
        _write_surplus(Dk, CuK, images, total_k, head, DK_TOKEN, D, BLOCK_D)
        _write_surplus(Dv, CuK, images, total_k, head, DK_TOKEN, D, BLOCK_D)
    k_start = tl.load(CuK + image)
    k_len = tl.load(CuK + image + 1) - k_start
    if first >= k_len:
        return
    q_start = tl.load(CuQ + image)
    q_len = tl.load(CuQ + image + 1) - q_start
    q_row, k_row = q_start.to(tl.int64), k_start.to(tl.int64)
    k = load_tile(K + k_row * K_TOKEN + head * K_HEAD, first, N, k_len, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)
    v = load_tile(V + k_row * V_TOKEN + head * V_HEAD, first, N, k_len, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True)
    q_head = Q + q_row * Q_TOKEN + head * Q_HEAD
    do_head = Dout + (q_row * HEADS + head) * D
    facts = head.to(tl.int64) * total_q + q_row
    dk = tl.zeros([N, BLOCK_D], tl.float32)
    dv = tl.zeros([N, BLOCK_D], tl.float32)
    for i in tl.range(0, number(q_len), M, num_stages=STAGES):
        row = i + tl.arange(0, M)
        q = load_tile(q_head, i, M, q_len, Q_TOKEN, Q_DIM, D, BLOCK_D, CHECK=True)  # (M, D)
        do = load_tile(do_head, i, M, q_len, HEADS * D, 1, D, BLOCK_D, CHECK=True)
        lse = tl.load(Lse + facts + row, mask=row < q_len, other=float("inf")) * 1.4426950408889634
        delta = tl.load(Delta + facts + row, mask=row < q_len, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])  # (N, M)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _write(Dv + k_row * DK_TOKEN + head * D, first, dv, k_len, DK_TOKEN, D, BLOCK_D)
    _write(Dk + k_row * DK_TOKEN + head * D, first, dk * scale, k_len, DK_TOKEN, D, BLOCK_D)


# ---- the host's side ----

@functools.cache
def _constants(tiles: BackwardTiles, q_stride: tuple, k_stride: tuple, v_stride: tuple, dq_token: int, dk_token: int,
               heads: int, dim: int, dtype: torch.dtype, has_dlse: bool) -> dict:  # fmt: skip
    constants = launch.strides_of(Q=q_stride, K=k_stride, V=v_stride) | launch.head_of(heads, dim)
    constants |= {"DQ_TOKEN": dq_token, "DK_TOKEN": dk_token, "HAS_DLSE": has_dlse}
    return constants | {"PRECISION": PRECISION.get(dtype, "tf32")} | dict(tiles.shape)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on this device may have."""
    if device.type != "cuda":
        return OWNER_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _one_projection(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are the three parts of one (total, 3, nheads, headdim)."""
    heads, dim = q.shape[1:]
    step = heads * dim * q.element_size()
    return (q.shape == k.shape and q.stride() == k.stride() == v.stride() == (3 * heads * dim, dim, 1)
            and k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == step)  # fmt: skip


def _new_gradients(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    if packed and _one_projection(q, k, v):
        return q.new_empty((q.shape[0], 3, *q.shape[1:])).unbind(1)
    return tuple(launch.new_output(x, *x.shape) for x in (q, k, v))


def attend_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
                    packed: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of this collection's attention, as `gradients.py` describes them."""
    if q.is_cuda and q.get_device() != launch.current_device():
        with torch.cuda.device(q.device):
            return attend_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, packed)
    dq, dk, dv = _new_gradients(q, k, v, packed)
    q, k, v = (x.contiguous() if x.stride(0) < x.stride(1) else x for x in (q, k, v))
    dout = dout.contiguous()
    total_q, heads, dim = q.shape
    images, total_k = cu_q.shape[0] - 1, k.shape[0]
    grad = dlse.contiguous() if dlse is not None else lse
    delta = lse  # a place holder, where nobody reads it
    numbers = (scale * LOG2_E, scale, total_q, total_k, images, max_q, max_k)
    kernels = {"owner": (owner_backward_kernel, 1), "query": (query_backward_kernel, max_q),
               "key": (key_backward_kernel, max_k)}  # fmt: skip
    large = _shared_memory(q.device) >= OWNER_BYTES
    for tiles in choose_backward(max_q, max_k, dim, images * heads, q.element_size(), large):
        if tiles.kernel == "query":
            delta = torch.empty_like(lse)
        key = (tiles, q.stride(), k.stride(), v.stride(), dq.stride(0), dk.stride(0), heads, dim, q.dtype,
               dlse is not None)  # fmt: skip
        tensors = (q, k, v, out, dout, lse, grad, dq, dk, dv, delta, cu_q, cu_k)
        kernel, longest = kernels[tiles.kernel]
        grid = (-(-longest // tiles.rows) * heads * images, 1)
        launch.start(kernel, key, grid, tensors, numbers, _constants(*key), dict(tiles.options))
    return dq, dk, dv
