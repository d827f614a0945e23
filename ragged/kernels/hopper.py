"""Attention for equally long images on Hopper GPUs, in Gluon: what Triton decides by itself is written down here.

Triton's language has tiles and no threads. Gluon, which comes with it, is the same language one floor lower: layouts,
shared memory, barriers and the roles of warps are the program's own affair. One program stays on each multiprocessor
and walks over items, an item being one head of one image, or half its queries. Its twelve warps share the work:

    4 warps copy        queries, keys and values of the items to come, into one of a few stages of shared memory
    4 + 4 warps         compute: two warpgroups, each takes every second tile of 64 queries

So memory and tensor cores are busy at the same time. For each stage and kind of tile two barriers say who may go on:
`full` (the copies have arrived) and `empty` (both groups have read them).

Up to 208 keys of a head are in shared memory at once. All scores of a query are there before the first exponential, so
there is one softmax for each row, and nothing is rescaled.

That the images are equally long is a guess: the rows would just suffice. Where an image begins is then known without
looking it up, and the first copies start at once. The computing warps look it up while those travel; where the guess is
wrong they store nothing, and four warps do everything again afterwards, slowly and right.
"""

import functools
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .. import launch
from ..launch import LOG2_E
from ..tiles import Tiles, grid_of, pipe_tiles

LN_2 = gl.constexpr(0.6931471805599453)
fence = hopper.fence_async_shared  # what ordinary instructions wrote, tensor cores may read
# cp.async: its name changed in Triton 3.9
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# ---- layouts: which thread holds which numbers of a tile ----


@gluon.constexpr_function
def accumulator(n):
    """(64, n) float32 as the tensor cores of a warpgroup leave it: 16 rows a warp, 4 lanes a row."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.constexpr_function
def of_rows(n):
    """One number for each of its rows."""
    return gl.SliceLayout(1, accumulator(n))


@gluon.constexpr_function
def for_storing(d):
    """(64, d) with 16 bytes of a row in a lane. Rows stay in the warp that computed them, so no warp waits."""
    wide = [[0, 32]] if d == 64 else []
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *wide, [8, 0]], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, d],
    )  # fmt: skip


@gluon.constexpr_function
def for_copying(d):
    """16 bytes a lane, the lanes of a row side by side."""
    return gl.BlockedLayout([1, 8], [256 // d, d // 8], [4, 1], [1, 0])


@gluon.jit
def tiles_of(dtype: gl.constexpr, NUMBER: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Room in shared memory for so many tiles (ROWS, D), swizzled as the tensor cores read them."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * D, element_bitwidth=16, rank=2)
    return gl.allocate_shared_memory(dtype, [NUMBER, ROWS, D], layout)


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each stage. Use all of them: Triton 3.6 gives the memory of an unused one to something else, and
    16 bytes of some tiles then came out wrong."""
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage; a barrier's phase flips with every round through them."""
    stage += 1
    if stage == STAGES:
        stage = gl.to_tensor(0)
        phase ^= 1
    return stage, phase


# ---- the copying warps ----


@gluon.jit
def copy_rows(room, head, first, rows, TOKEN: gl.constexpr, MASK: gl.constexpr):
    """Start copying rows first .. of one head into `room`. Those at or past `rows` become zeros and are never read:
    they are the next image's, and a NaN there times a weight of zero would still be NaN."""
    R: gl.constexpr = room.shape[0]
    D: gl.constexpr = room.shape[1]
    layout: gl.constexpr = for_copying(D)
    row = first + gl.arange(0, R, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    pointers = head + row[:, None] * TOKEN + column[None, :]
    if MASK:
        copy_async(room, pointers, mask=(row < rows)[:, None] & (column < D)[None, :])
    else:
        copy_async(room, pointers)


@gluon.jit
def copy_pieces(a, b, tail, head, n, TOKEN: gl.constexpr, A: gl.constexpr, B: gl.constexpr):
    """All keys, or values, of one head, in pieces A, B and TAIL wide; only the last has an end to mind."""
    copy_rows(a, head, 0, n, TOKEN, MASK=False)
    if B:
        copy_rows(b, head, A, n, TOKEN, MASK=False)
    copy_rows(tail, head, A + B, n, TOKEN, MASK=True)


@gluon.jit
def copy(Q, K, V, room, bars, n, items, Q_TOKEN: gl.constexpr, Q_HEAD: gl.constexpr, K_TOKEN: gl.constexpr,
         K_HEAD: gl.constexpr, V_TOKEN: gl.constexpr, V_HEAD: gl.constexpr, HEADS: gl.constexpr, A: gl.constexpr,
         B: gl.constexpr, TILES: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    """For each item: wait until a stage is empty, start its copies, and have them ring `full` when they arrive."""
    queries, k_a, k_b, k_tail, v_a, v_b, v_tail = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # nothing has been read yet, but all stages are empty
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        start = (item // (HEADS * PARTS) * n).to(gl.int64)
        head = item // PARTS % HEADS
        mbarrier.wait(q_empty.index(stage), phase)
        for t in gl.static_range(TILES):
            copy_rows(queries.index(stage * TILES + t), Q + start * Q_TOKEN + head * Q_HEAD,
                      (item % PARTS * TILES + t) * 64, n, Q_TOKEN, MASK=t == TILES - 1)  # fmt: skip
        async_copy.mbarrier_arrive(q_full.index(stage), increment_count=False)
        mbarrier.wait(k_empty.index(stage), phase)
        copy_pieces(k_a.index(stage), k_b.index(stage), k_tail.index(stage), K + start * K_TOKEN + head * K_HEAD, n,
                    K_TOKEN, A, B)  # fmt: skip
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        mbarrier.wait(v_empty.index(stage), phase)
        copy_pieces(v_a.index(stage), v_b.index(stage), v_tail.index(stage), V + start * V_TOKEN + head * V_HEAD, n,
                    V_TOKEN, A, B)  # fmt: skip
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
        stage, phase = advance(stage, phase, STAGES)


# ---- the computing warps ----


@gluon.jit
def all_equal(CuQ, CuK, images, n):
    """Whether image i begins at row i * n, for all of them and the end."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    wrong = gl.zeros([128], gl.int32, layout)
    for i in range(0, images + 1, 128):
        image = i + gl.arange(0, 128, layout)
        there = image <= images
        start = gl.where(there, image * n, 0)
        q_start = gl.load(CuQ + image, mask=there, other=0)
        k_start = gl.load(CuK + image, mask=there, other=0)
        wrong += gl.where((q_start == start) & (k_start == start), 0, 1)
    return gl.sum(wrong, 0) == 0


@gluon.jit
def scores_of(q, k):
    """q k^T, (64, keys), not yet scaled: started, not awaited."""
    N: gl.constexpr = k.shape[0]
    return warpgroup_mma(q, k.permute((1, 0)), gl.zeros([64, N], gl.float32, accumulator(N)), use_acc=False,
                         is_async=True)  # fmt: skip


@gluon.jit
def row_max(scores):
    return gl.convert_layout(gl.max(scores, 1), of_rows(64))


@gluon.jit
def weigh(scores, shift, scale_log2, dtype: gl.constexpr):
    """Scores -> weights, as the left operand of the next product, and their row sums."""
    N: gl.constexpr = scores.shape[1]
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator(64), k_width=2)
    weights = gl.exp2(scores * scale_log2 - gl.convert_layout(shift, of_rows(N))[:, None])
    return gl.convert_layout(weights.to(dtype), left), gl.convert_layout(gl.sum(weights, 1), of_rows(64))


@gluon.jit
def compute(GROUP: gl.constexpr, room, bars, Out, Lse, CuQ, CuK, total_q, n, items, scale_log2, HEADS: gl.constexpr,
            HAS_LSE: gl.constexpr, A: gl.constexpr, B: gl.constexpr, TILES: gl.constexpr, PARTS: gl.constexpr,
            STAGES: gl.constexpr):
    """One group: every second query tile of each item. Returns the rows of an image, or 0 where the guess is wrong."""
    queries, k_a, k_b, k_tail, v_a, v_b, v_tail = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    dtype: gl.constexpr = queries.dtype
    D: gl.constexpr = queries.shape[2]
    TAIL: gl.constexpr = k_tail.shape[1]
    stored: gl.constexpr = for_storing(D)
    row = gl.arange(0, 64, gl.SliceLayout(1, stored))
    column = gl.arange(0, D, gl.SliceLayout(0, stored))
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    mine = gl.to_tensor(GROUP)  # the first of this item's tiles that is ours
    rows = gl.where(all_equal(CuQ, CuK, items // (HEADS * PARTS), n), n, 0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        start = (item // (HEADS * PARTS) * n).to(gl.int64)
        head = item // PARTS % HEADS
        mbarrier.wait(q_full.index(stage), phase)
        mbarrier.wait(k_full.index(stage), phase)
        fence()
        for t in range(mine, TILES, 2):
            last = t + 2 >= TILES
            q = queries.index(stage * TILES + t)
            s_a = scores_of(q, k_a.index(stage))
            if B:
                s_b = scores_of(q, k_b.index(stage))
            s_tail = scores_of(q, k_tail.index(stage))
            if B:
                s_a, s_b, s_tail = warpgroup_mma_wait(0, deps=[s_a, s_b, s_tail])
            else:
                s_a, s_tail = warpgroup_mma_wait(0, deps=[s_a, s_tail])
            mbarrier.arrive(k_empty.index(stage), count=1, pred=last)
            mbarrier.arrive(q_empty.index(stage), count=1, pred=last)
            key = A + B + gl.arange(0, TAIL, gl.SliceLayout(0, accumulator(TAIL)))
            s_tail = gl.where((key < n)[None, :], s_tail, float("-inf"))
            top = gl.maximum(row_max(s_a), row_max(s_tail))
            if B:
                top = gl.maximum(top, row_max(s_b))
            shift = top * scale_log2
            p_a, total = weigh(s_a, shift, scale_log2, dtype)
            mbarrier.wait(v_full.index(stage), phase)
            fence()
            zero = gl.zeros([64, D], gl.float32, accumulator(D))
            acc = warpgroup_mma(p_a, v_a.index(stage), zero, use_acc=False, is_async=True)
            if B:  # exponentials of the next piece while the product of this one runs
                p_b, part = weigh(s_b, shift, scale_log2, dtype)
                total += part
                acc = warpgroup_mma(p_b, v_b.index(stage), acc, is_async=True)
            p_tail, part = weigh(s_tail, shift, scale_log2, dtype)
            total += part
            acc = warpgroup_mma(p_tail, v_tail.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1, pred=last)
            inverse = gl.convert_layout(1.0 / total, of_rows(D))
            out = gl.convert_layout((acc * inverse[:, None]).to(dtype), stored)
            first = (item % PARTS * TILES + t) * 64
            pointers = Out + (start * HEADS + head) * D + (first + row)[:, None] * (HEADS * D) + column[None, :]
            gl.store(pointers, out, mask=(first + row < rows)[:, None])
            if HAS_LSE:
                at = first + gl.arange(0, 64, of_rows(64))
                lse = (shift + gl.log2(total)) * LN_2
                gl.store(Lse + head.to(gl.int64) * total_q + start + at, lse, mask=at < rows)
        stage, phase = advance(stage, phase, STAGES)
        if TILES % 2:
            mine = 1 - mine
    return rows, stage


# ---- where the guess was wrong ----


@gluon.jit
def load_rows(head, first, rows, R: gl.constexpr, TOKEN: gl.constexpr, D: gl.constexpr):
    layout: gl.constexpr = for_copying(D)
    row = first + gl.arange(0, R, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    pointers = head + row[:, None] * TOKEN + column[None, :]
    return gl.load(pointers, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0)


@gluon.jit
def any_lengths(Q, K, V, Out, Lse, CuQ, CuK, scale_log2, total_q, pairs, Q_TOKEN: gl.constexpr, Q_HEAD: gl.constexpr,
                K_TOKEN: gl.constexpr, K_HEAD: gl.constexpr, V_TOKEN: gl.constexpr, V_HEAD: gl.constexpr,
                HEADS: gl.constexpr, D: gl.constexpr, HAS_LSE: gl.constexpr):
    """The online softmax as in any Triton kernel: 4 warps, 64 queries and 32 keys at a time, nothing overlaps."""
    m: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=m, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=m, k_width=2)
    dtype: gl.constexpr = Out.dtype.element_ty
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        head = pair % HEADS
        q_start = gl.load(CuQ + pair // HEADS).to(gl.int64)
        q_len = gl.load(CuQ + pair // HEADS + 1) - q_start.to(gl.int32)
        k_start = gl.load(CuK + pair // HEADS).to(gl.int64)
        k_len = gl.load(CuK + pair // HEADS + 1) - k_start.to(gl.int32)
        for first in range(0, q_len, 64):
            q_tile = load_rows(Q + q_start * Q_TOKEN + head * Q_HEAD, first, q_len, 64, Q_TOKEN, D)
            q = gl.convert_layout(q_tile, left)
            acc = gl.zeros([64, D], gl.float32, m)
            top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, m))
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, m))
            for j in range(0, k_len, 32):
                k = load_rows(K + k_start * K_TOKEN + head * K_HEAD, j, k_len, 32, K_TOKEN, D)
                v = load_rows(V + k_start * V_TOKEN + head * V_HEAD, j, k_len, 32, V_TOKEN, D)
                k = gl.convert_layout(gl.permute(k, (1, 0)), right)
                s = mma_v2(q, k, gl.zeros([64, 32], gl.float32, m)) * scale_log2
                s = gl.where((j + gl.arange(0, 32, gl.SliceLayout(0, m)) < k_len)[None, :], s, float("-inf"))
                new_top = gl.maximum(top, gl.max(s, 1))
                weights = gl.exp2(s - new_top[:, None])
                shrink = gl.exp2(top - new_top)
                total = total * shrink + gl.sum(weights, 1)
                weights = gl.convert_layout(weights.to(dtype), left)
                acc = mma_v2(weights, gl.convert_layout(v, right), acc * shrink[:, None])
                top = new_top
            inverse = gl.where(total > 0.0, 1.0 / total, 0.0)  # no keys at all: zeros, not NaN
            row = first + gl.arange(0, 64, gl.SliceLayout(1, m))
            column = gl.arange(0, D, gl.SliceLayout(0, m))
            pointers = Out + (q_start * HEADS + head) * D + row[:, None] * (HEADS * D) + column[None, :]
            out = (acc * inverse[:, None]).to(dtype)
            gl.store(pointers, out, mask=(row < q_len)[:, None] & (column < D)[None, :])
            if HAS_LSE:
                lse = (top + gl.log2(total)) * LN_2
                gl.store(Lse + head.to(gl.int64) * total_q + q_start + row, lse, mask=row < q_len)


@gluon.jit(do_not_specialize=["total_q", "max_q", "max_k"])
def hopper_kernel(
    Q, K, V, Out, Lse, CuQ, CuK, scale_log2, total_q, max_q, max_k,
    Q_TOKEN: gl.constexpr, Q_HEAD: gl.constexpr, K_TOKEN: gl.constexpr, K_HEAD: gl.constexpr, V_TOKEN: gl.constexpr,
    V_HEAD: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, HAS_LSE: gl.constexpr,
    A: gl.constexpr, B: gl.constexpr, TAIL: gl.constexpr, TILES: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Bidirectional attention for total_q / max_q images of max_q = max_k tokens each, A + B <= max_q <= A + B + TAIL.

    Grid: a program for each multiprocessor. An item is TILES query tiles of one head: all of them, or one of PARTS
    shares. Q, K, V (total, HEADS, D), Out contiguous, Lse (HEADS, total_q).
    """
    dtype: gl.constexpr = Out.dtype.element_ty
    queries = tiles_of(dtype, STAGES * TILES, 64, D)
    k_a = tiles_of(dtype, STAGES, A, D)
    v_a = tiles_of(dtype, STAGES, A, D)
    k_tail = tiles_of(dtype, STAGES, TAIL, D)
    v_tail = tiles_of(dtype, STAGES, TAIL, D)
    if B:
        k_b = tiles_of(dtype, STAGES, B, D)
        v_b = tiles_of(dtype, STAGES, B, D)
    else:
        k_b = k_tail
        v_b = v_tail
    room = (queries, k_a, k_b, k_tail, v_a, v_b, v_tail)
    # full: each of 128 copying threads arrives.  empty: each of two computing groups does.
    bars = (barriers(STAGES, 128), barriers(STAGES, 2), barriers(STAGES, 128), barriers(STAGES, 2),
            barriers(STAGES, 128), barriers(STAGES, 2))  # fmt: skip
    n = max_q
    pairs = total_q // n * HEADS
    items = pairs * PARTS
    rows, unused = gl.warp_specialize([
        (compute, (0, room, bars, Out, Lse, CuQ, CuK, total_q, n, items, scale_log2, HEADS, HAS_LSE, A, B, TILES, PARTS,
                   STAGES)),
        (compute, (1, room, bars, Out, Lse, CuQ, CuK, total_q, n, items, scale_log2, HEADS, HAS_LSE, A, B, TILES, PARTS,
                   STAGES)),
        (copy, (Q, K, V, room, bars, n, items, Q_TOKEN, Q_HEAD, K_TOKEN, K_HEAD, V_TOKEN, V_HEAD, HEADS, A, B, TILES,
                PARTS, STAGES)),
    ], [4, 4], [224, 56])  # fmt: skip
    if rows == 0:  # the guess was wrong, and nothing has been stored
        any_lengths(Q, K, V, Out, Lse, CuQ, CuK, scale_log2, total_q, pairs, Q_TOKEN, Q_HEAD, K_TOKEN, K_HEAD, V_TOKEN,
                    V_HEAD, HEADS, D, HAS_LSE)  # fmt: skip


# ---- the host's side ----


@functools.cache
def _constants(tiles: Tiles, strides: tuple, heads: int, dim: int, has_lse: bool) -> tuple[dict, dict]:
    """Compile-time constants, in the kernel's order, and options, for one model and choice of tiles."""
    named = {f"{x}_{part}": n for x, s in zip("QKV", strides) for part, n in zip(("TOKEN", "HEAD"), s)}
    return named | {"HEADS": heads, "D": dim, "HAS_LSE": has_lse} | dict(tiles.shape), dict(tiles.options)


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, n: int, scale: float,
           want_lse: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of images of n tokens each, as far as the number of rows says: (total, nheads, headdim), and the
    log-sum-exp (nheads, total) or None.

    q, k, v: (batch * n, nheads, headdim) on 16-byte boundaries.  cu_q, cu_k, scale, want_lse: as elsewhere.
    """
    if q.get_device() != launch.current_device():
        with torch.cuda.device(q.device):
            return attend(q, k, v, cu_q, cu_k, n, scale, want_lse)
    total, heads, dim = q.shape
    images, processors = cu_q.shape[0] - 1, launch.processors(q.get_device())
    tiles = pipe_tiles(n, dim, images * heads, processors)
    key = (tiles, (q.stride(), k.stride(), v.stride()), heads, dim, want_lse)
    out = launch.new_output(q, total, heads, dim)
    lse = torch.full((heads, total), -math.inf, device=q.device, dtype=torch.float32) if want_lse else out
    grid, tensors = grid_of(tiles, n, heads, images, processors), (q, k, v, out, lse, cu_q, cu_k)
    launcher = launch.start(hopper_kernel, (*key, q.dtype), grid, tensors, (scale * LOG2_E, total, n, n),
                            *_constants(*key))  # fmt: skip
    if launcher is not None and not want_lse:
        launch.remember(q, k, v, cu_q, cu_k, tiles, launcher)
    return out, lse if want_lse else None
