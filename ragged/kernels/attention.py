"""The attention kernels, in reading order: Algorithm 1 of the paper, then this collection's own two, then the host
functions that call them.

`paper_kernel` is the idea. `stream_kernel` is the same for any lengths, made lean; `resident_kernel` is what short
sequences allow.

Shapes in the comments: M query rows of a tile, N key rows of a tile, D head dimension (padded to a power of two). In
formulas of the online softmax `top` is m, the running maximum of a row; `total` is l, its running sum; `acc` is the
unnormalised output. Strides are compile-time constants, because they depend on the model and never on the batch.
Lengths and totals are ordinary arguments that Triton is told not to specialise on: by itself it would compile a second
kernel for multiples of 16, and nothing shall be recompiled when a batch is longer, shorter or larger.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import LOG2_E
from ..tiles import Tiles, choose_tiles, grid_of

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def number(x):
    """A computed number, fit to be the bound of a loop. Compiled code needs nothing for that; Triton 3.6's interpreter
    holds it as an array of one element, which NumPy 2.4 no longer turns into an int by itself."""
    if INTERPRETED:
        return x.handle.data.item()
    else:
        return x


@triton.jit
def load_tile(base, first, rows: tl.constexpr, limit, stride: tl.constexpr, stride_d: tl.constexpr,
          D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Load rows first .. first + rows of one head as (rows, BLOCK_D); rows at or past `limit` read as zero.

    The mask matters for more than bounds: the next image's tokens stand right behind, and a NaN there times a
    probability of zero is still NaN.
    """
    row = first + tl.arange(0, rows)
    column = tl.arange(0, BLOCK_D)
    pointers = base + row[:, None] * stride + column[None, :] * stride_d
    if CHECK and D != BLOCK_D:
        return tl.load(pointers, mask=(row[:, None] < limit) & (column[None, :] < D), other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=row[:, None] < limit, other=0.0)
    elif D != BLOCK_D:
        return tl.load(pointers, mask=column[None, :] < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def paper_kernel(
    Q, K, V, Out, Cu, scale_log2,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 of arXiv 2604.15408: one program per (image, head) walks over its query tiles, and for each over
    all key tiles, every tile 64 wide and masked. q, k, v and out are contiguous (total, HEADS, D)."""
    image, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(Cu + image)
    length = tl.load(Cu + image + 1) - start
    token: tl.constexpr = HEADS * D
    base = start.to(tl.int64) * token + head * D
    for first in range(0, number(length), M):
        q = load_tile(Q + base, first, M, length, token, 1, D, BLOCK_D, CHECK=True)
        acc = tl.zeros([M, BLOCK_D], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        for j in range(0, number(length), N):
            k = load_tile(K + base, j, N, length, token, 1, D, BLOCK_D, CHECK=True)
            v = load_tile(V + base, j, N, length, token, 1, D, BLOCK_D, CHECK=True)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = tl.where((j + tl.arange(0, N))[None, :] < length, scores * scale_log2, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        row = first + tl.arange(0, M)
        column = tl.arange(0, BLOCK_D)
        pointers = Out + base + row[:, None] * token + column[None, :]
        mask = (row[:, None] < length) & (column[None, :] < D)
        tl.store(pointers, (acc / total[:, None]).to(Out.dtype.element_ty), mask=mask)


# ---- this collection's kernels ----


@triton.jit
def _narrow(x, WIDTH: tl.constexpr, MAXIMUM: tl.constexpr):
    """(M, N) -> (M, WIDTH): maximum or sum over the columns WIDTH apart. They belong to one thread, so unlike a full
    row reduction this costs no exchange between threads."""
    if x.shape[1] == WIDTH:
        return x
    y = tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH])
    return tl.max(y, 1) if MAXIMUM else tl.sum(y, 1)


@triton.jit
def _exponent(top, scale_log2, SOME_EMPTY: tl.constexpr):
    """What is subtracted from scaled scores before exp2. A row that saw no key has the maximum -inf, and -inf minus
    -inf would be NaN."""
    if SOME_EMPTY:
        top = tl.where(top == float("-inf"), 0.0, top)
    return top * scale_log2


@triton.jit
def _attend(q, k, v, acc, top, total, scale_log2, keys_left, MASK: tl.constexpr, FIRST: tl.constexpr,
            SOME_EMPTY: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: fold a tile of keys and values into the running result.

    acc (M, D) unnormalised output, top (M,) largest score so far, total (M, WIDTH) partial sums of exponentials,
    added up once at the end. FIRST: there is nothing yet to fold into. keys_left: the tile's columns from there on
    are no keys.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (M, N), not yet scaled
    if MASK:
        scores = tl.where(tl.arange(0, k.shape[0])[None, :] < keys_left, scores, float("-inf"))
    new_top = tl.max(scores, 1)
    if not FIRST:
        new_top = tl.maximum(top, new_top)
    shift = _exponent(new_top, scale_log2, SOME_EMPTY)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])  # (M, N), at most 1
    sums = _narrow(weights, WIDTH, MAXIMUM=False)
    if FIRST:
        return tl.dot(weights.to(v.dtype), v, input_precision=PRECISION), new_top, sums
    else:
        shrink = tl.exp2(top * scale_log2 - shift)[:, None]  # what was summed relative to the old maximum
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink, input_precision=PRECISION)
        return acc, new_top, total * shrink + sums


@triton.jit
def _attend_two(q, k, v, k_tail, v_tail, scale_log2, keys, tail_keys, MASK: tl.constexpr, SOME_EMPTY: tl.constexpr,
                WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Two pieces of keys in one softmax: one maximum for both, so nothing is rescaled in between."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    tail = tl.dot(q, tl.trans(k_tail), input_precision=PRECISION)
    if MASK:
        scores = tl.where(tl.arange(0, k.shape[0])[None, :] < keys, scores, float("-inf"))
    tail = tl.where(tl.arange(0, k_tail.shape[0])[None, :] < tail_keys, tail, float("-inf"))
    top = tl.max(tl.maximum(_narrow(scores, WIDTH, MAXIMUM=True), _narrow(tail, WIDTH, MAXIMUM=True)), 1)
    shift = _exponent(top, scale_log2, SOME_EMPTY)[:, None]
    weights = tl.exp2(scores * scale_log2 - shift)
    tail = tl.exp2(tail * scale_log2 - shift)
    acc = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    acc = tl.dot(tail.to(v.dtype), v_tail, acc, input_precision=PRECISION)
    return acc, top, _narrow(weights, WIDTH, MAXIMUM=False) + _narrow(tail, WIDTH, MAXIMUM=False)


@triton.jit
def _store(Out, Lse, acc, top, total, scale_log2, start, first, head, rows, total_q, HEADS: tl.constexpr,
           D: tl.constexpr, BLOCK_D: tl.constexpr, SOME_EMPTY: tl.constexpr, HAS_LSE: tl.constexpr):
    """Normalise a query tile and write it; out (total, HEADS, D) contiguous, lse (HEADS, total_q)."""
    row = first + tl.arange(0, acc.shape[0])
    column = tl.arange(0, BLOCK_D)
    total = tl.sum(total, 1)
    inverse = 1.0 / total  # one division a row; dividing every element would cost three times the instructions
    if SOME_EMPTY:
        inverse = tl.where(total > 0.0, inverse, 0.0)  # no keys at all: zeros, not NaN
    pointers = Out + (start * HEADS + head) * D + row[:, None] * (HEADS * D) + column[None, :]
    out = (acc * inverse[:, None]).to(Out.dtype.element_ty)
    tl.store(pointers, out, mask=(row[:, None] < rows) & (column[None, :] < D))
    if HAS_LSE:  # log of the sum of exponentials, natural base
        lse = (_exponent(top, scale_log2, SOME_EMPTY) + tl.log2(total)) * 0.6931471805599453
        tl.store(Lse + head.to(tl.int64) * total_q + start + row, lse, mask=row < rows)


@triton.jit
def _stream(q_head, k_head, v_head, q_len, k_len, first, scale_log2,
            Q_TOKEN: tl.constexpr, Q_DIM: tl.constexpr, K_TOKEN: tl.constexpr, K_DIM: tl.constexpr,
            V_TOKEN: tl.constexpr, V_DIM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
            M: tl.constexpr, N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """Attention of M queries from row `first` of one head of one image; keys and values stream through in tiles.
    Returns acc (M, BLOCK_D), top (M,) and total (M, 16), as `_attend` does."""
    q = load_tile(q_head, first, M, q_len, Q_TOKEN, Q_DIM, D, BLOCK_D, CHECK=True)  # (M, BLOCK_D)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M, 16], tl.float32)
    whole = k_len // N * N
    for j in tl.range(0, number(whole), N, num_stages=STAGES):  # whole tiles need no mask
        k = load_tile(k_head, j, N, k_len, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=False)  # (N, BLOCK_D)
        v = load_tile(v_head, j, N, k_len, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=False)  # (N, BLOCK_D)
        acc, top, total = _attend(q, k, v, acc, top, total, scale_log2, k_len - j, MASK=False, FIRST=False,
                                  SOME_EMPTY=False, WIDTH=16, PRECISION=PRECISION)  # fmt: skip
    for j in tl.range(number(whole), number(k_len), TAIL, num_stages=1):  # 577 = 9 * 64 + 1: 16 more columns, not 64
        k = load_tile(k_head, j, TAIL, k_len, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)  # (TAIL, BLOCK_D)
        v = load_tile(v_head, j, TAIL, k_len, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True)
        acc, top, total = _attend(q, k, v, acc, top, total, scale_log2, k_len - j, MASK=True, FIRST=False,
                                  SOME_EMPTY=False, WIDTH=16, PRECISION=PRECISION)  # fmt: skip
    return acc, top, total


@triton.jit(do_not_specialize=["total_q", "max_q", "max_k"])
def stream_kernel(
    Q, K, V, Out, Lse, CuQ, CuK, scale_log2, total_q, max_q, max_k,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Bidirectional attention for any lengths: one program for each query tile of each head of each image.

    Grid: (query tiles of the longest image, HEADS * batch). Programs of neighbouring tiles run at the same time and
    find each other's keys in the L2 cache. An image with fewer tiles than the longest leaves its last programs idle.
    FLAT: both in one dimension, since the second ends at 65 535; dividing by a number that is only known at run time
    costs every program dozens of instructions.
    """
    if FLAT:
        tiles = tl.cdiv(max_q, M)
        image = tl.program_id(0) // (tiles * HEADS)
        head = tl.program_id(0) // tiles % HEADS
        first = tl.program_id(0) % tiles * M
    else:
        image, head, first = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS, tl.program_id(0) * M
    q_start = tl.load(CuQ + image)
    q_len = tl.load(CuQ + image + 1) - q_start
    if first >= q_len:
        return
    k_start = tl.load(CuK + image)
    k_len = tl.load(CuK + image + 1) - k_start
    q_row, k_row = q_start.to(tl.int64), k_start.to(tl.int64)  # token * stride passes 2**31 elements in large batches
    acc, top, total = _stream(
        Q + q_row * Q_TOKEN + head * Q_HEAD, K + k_row * K_TOKEN + head * K_HEAD, V + k_row * V_TOKEN + head * V_HEAD,
        q_len, k_len, first, scale_log2, Q_TOKEN=Q_TOKEN, Q_DIM=Q_DIM, K_TOKEN=K_TOKEN, K_DIM=K_DIM, V_TOKEN=V_TOKEN,
        V_DIM=V_DIM, D=D, BLOCK_D=BLOCK_D, M=M, N=N, TAIL=TAIL, STAGES=STAGES, PRECISION=PRECISION,
    )  # fmt: skip
    _store(Out, Lse, acc, top, total, scale_log2, q_row, first, head, q_len, total_q,
           HEADS=HEADS, D=D, BLOCK_D=BLOCK_D, SOME_EMPTY=True, HAS_LSE=HAS_LSE)  # fmt: skip


@triton.jit(do_not_specialize=["total_q", "max_q", "max_k"])
def resident_kernel(
    Q, K, V, Out, Lse, CuQ, CuK, scale_log2, total_q, max_q, max_k,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, A: tl.constexpr, B: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """Bidirectional attention for up to 208 keys: a program holds all keys and values of one head of one image, in
    pieces A, B and TAIL wide (197 = 128 + 64 + 5 of 16), and walks over its query tiles. A program reads its keys and
    values once.

    Grid: SPLIT * HEADS * batch; SPLIT programs share the query tiles of a head, ONE_TILE says that each has only one.
    EQUAL is a guess: the tokens would just suffice for equal lengths. Then every program knows where its tokens begin
    without looking it up, and its first loads start a memory latency earlier. The look-up comes in meanwhile; where it
    does not confirm the guess, the program takes the long way.
    """
    image = tl.program_id(0) // (SPLIT * HEADS)
    head = tl.program_id(0) // SPLIT % HEADS
    first = tl.program_id(0) % SPLIT * M
    q_start = tl.load(CuQ + image).to(tl.int64)
    q_len = tl.load(CuQ + image + 1) - q_start.to(tl.int32)
    k_start = tl.load(CuK + image).to(tl.int64)
    k_len = tl.load(CuK + image + 1) - k_start.to(tl.int32)
    if EQUAL:
        q_row, rows, k_row, keys = image.to(tl.int64) * max_q, max_q, image.to(tl.int64) * max_k, max_k
    else:
        q_row, rows, k_row, keys = q_start, q_len, k_start, k_len
        if first >= q_len:
            return
    MASK_A: tl.constexpr = not EQUAL or TAIL == 0
    WIDTH: tl.constexpr = TAIL if TAIL else 16
    q_head = Q + q_row * Q_TOKEN + head * Q_HEAD
    k_head = K + k_row * K_TOKEN + head * K_HEAD
    v_head = V + k_row * V_TOKEN + head * V_HEAD
    q = load_tile(q_head, first, M, rows, Q_TOKEN, Q_DIM, D, BLOCK_D, CHECK=True)
    k_a = load_tile(k_head, 0, A, keys, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=MASK_A)
    if B:
        k_b = load_tile(k_head, A, B, keys, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=not EQUAL)
    if TAIL:
        k_tail = load_tile(k_head, A + B, TAIL, keys, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)
    v_a = load_tile(v_head, 0, A, keys, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=MASK_A)
    if B:
        v_b = load_tile(v_head, A, B, keys, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=not EQUAL)
    if TAIL:
        v_tail = load_tile(v_head, A + B, TAIL, keys, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True)
    if EQUAL:
        if (q_start != q_row) | (q_len != rows) | (k_start != k_row) | (k_len != keys):
            # in the smallest tiles: it must be right, and must not take registers from the path below
            for r in tl.range(number(first // M * 16), number(q_len), 16 * SPLIT, num_stages=1):
                acc, top, total = _stream(
                    Q + q_start * Q_TOKEN + head * Q_HEAD, K + k_start * K_TOKEN + head * K_HEAD,
                    V + k_start * V_TOKEN + head * V_HEAD, q_len, k_len, r, scale_log2, Q_TOKEN=Q_TOKEN, Q_DIM=Q_DIM,
                    K_TOKEN=K_TOKEN, K_DIM=K_DIM, V_TOKEN=V_TOKEN, V_DIM=V_DIM, D=D, BLOCK_D=BLOCK_D,
                    M=16, N=16, TAIL=16, STAGES=1, PRECISION=PRECISION,
                )  # fmt: skip
                _store(Out, Lse, acc, top, total, scale_log2, q_start, r, head, q_len, total_q,
                       HEADS=HEADS, D=D, BLOCK_D=BLOCK_D, SOME_EMPTY=True, HAS_LSE=HAS_LSE)  # fmt: skip
            return
    last = first + 1 if ONE_TILE else rows
    for r in tl.range(number(first), number(last), M * SPLIT, num_stages=1):
        if not ONE_TILE:  # the next query tile travels while this one is computed
            q_next = load_tile(q_head, r + M * SPLIT, M, rows, Q_TOKEN, Q_DIM, D, BLOCK_D, CHECK=True)
        if TAIL:
            acc, top, total = _attend_two(q, k_a, v_a, k_tail, v_tail, scale_log2, keys, keys - (A + B),
                                          MASK=not EQUAL, SOME_EMPTY=not EQUAL, WIDTH=WIDTH,
                                          PRECISION=PRECISION)  # fmt: skip
        else:
            acc, top, total = _attend(q, k_a, v_a, 0.0, 0.0, 0.0, scale_log2, keys, MASK=True, FIRST=True,
                                      SOME_EMPTY=not EQUAL, WIDTH=WIDTH, PRECISION=PRECISION)  # fmt: skip
        if B:
            acc, top, total = _attend(q, k_b, v_b, acc, top, total, scale_log2, keys - A, MASK=not EQUAL,
                                      FIRST=False, SOME_EMPTY=not EQUAL, WIDTH=WIDTH,
                                      PRECISION=PRECISION)  # fmt: skip
        _store(Out, Lse, acc, top, total, scale_log2, q_row, r, head, rows, total_q,
               HEADS=HEADS, D=D, BLOCK_D=BLOCK_D, SOME_EMPTY=not EQUAL, HAS_LSE=HAS_LSE)  # fmt: skip
        if not ONE_TILE:
            q = q_next


# ---- the host's side ----

# Of a product in float32: three on tensor cores, as precise as one of ordinary multiply-adds and in two fifths of its
# time. Products of 16-bit numbers are exact anyway.
PRECISION = {torch.float32: "tf32x3"}


@functools.cache
def _constants(tiles: Tiles, q_stride: tuple, k_stride: tuple, v_stride: tuple, heads: int, dim: int,
               dtype: torch.dtype, has_lse: bool) -> tuple[dict, dict]:  # fmt: skip
    """Compile-time constants, in the kernel's order, and options of an attention kernel for one model and tile choice.
    """
    constants = launch.strides_of(Q=q_stride, K=k_stride, V=v_stride) | launch.head_of(heads, dim)
    constants |= {"HAS_LSE": has_lse, "PRECISION": PRECISION.get(dtype, "tf32")}
    return constants | dict(tiles.shape), dict(tiles.options)


class Launch(NamedTuple):
    """A call of one of our attention kernels, as `launch.start` takes it."""

    kernel: triton.runtime.JITFunction
    key: tuple
    grid: tuple[int, int]
    tensors: tuple
    numbers: tuple
    constants: dict
    options: dict


def prepare(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
            scale: float, want_lse: bool) -> Launch:  # fmt: skip
    """Everything about a call but its start: tiles, grid, and memory for the results, the fourth and fifth tensor.

    Token-major tensors are read in place. Where a head's tokens stand together instead, the head stride is the total of
    the batch, and to compile that in would mean a new kernel for every batch: such tensors are copied.
    """
    q, k, v = (x.contiguous() if x.stride(0) < x.stride(1) else x for x in (q, k, v))
    total, heads, dim = q.shape
    images = cu_q.shape[0] - 1
    equal = total == images * max_q and k.shape[0] == images * max_k
    tiles = choose_tiles(max_q, max_k, dim, images * heads, equal, q.element_size())
    key = (tiles, q.stride(), k.stride(), v.stride(), heads, dim, q.dtype, want_lse)
    out = launch.new_output(q, total, heads, dim)
    lse = q.new_empty((heads, total), dtype=torch.float32) if want_lse else out
    run = resident_kernel if tiles.kernel == "resident" else stream_kernel
    grid = grid_of(tiles, max_q, heads, images) if total else (0, 0)
    numbers = (scale * LOG2_E, total, max_q, max_k)
    return Launch(run, key, grid, (q, k, v, out, lse, cu_q, cu_k), numbers, *_constants(*key))


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
           scale: float, want_lse: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """This collection's attention on checked arguments: (total_q, nheads, headdim), and the log-sum-exp or None."""
    if q.is_cuda and q.get_device() != launch.current_device():
        with torch.cuda.device(q.device):
            return attend(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse)
    call = prepare(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse)
    launcher = launch.start(*call)
    if launcher is not None and not want_lse:
        launch.remember(*call.tensors[:3], cu_q, cu_k, call.key[0], launcher)
    return call.tensors[3], call.tensors[4] if want_lse else None


def paper_attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, max_q: int, scale: float) -> Tensor:
    """Algorithm 1 the way the paper runs it: three contiguous copies, then `kernel[grid](...)` through the JIT."""
    if q.is_cuda and q.get_device() != launch.current_device():
        with torch.cuda.device(q.device):
            return paper_attend(q, k, v, cu, max_q, scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    _, heads, dim = q.shape
    out, side = torch.empty_like(q), 32 if q.dtype == torch.float32 else 64
    constants = launch.head_of(heads, dim) | {"M": side, "N": side, "PRECISION": PRECISION.get(q.dtype, "tf32")}
    paper_kernel[(cu.shape[0] - 1, heads)](q, k, v, out, cu, scale * LOG2_E, **constants)
    return out
