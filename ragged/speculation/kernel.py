"""The kernel that finishes the attention of a tree's rows: finished parts of a softmax, and a few single keys."""

import triton
import triton.language as tl
from torch import Tensor

from .. import launch

# Rows of a program, at most, its warps, and the numbers that its largest tile holds, at most: 64 a thread. With fewer
# rows, programs wait more than they work (times: data/results/notes.md).
ROWS, WARPS, TILE = 16, 4, 8192


@triton.jit(do_not_specialize=["rows", "asked"])
def join_kernel(
    Q, K, V, Part, Lse, Branch, Parts, Out, scale_log2, rows, asked,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, A: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Softmax attention of every row over a few single keys and over finished parts, R rows of one key head a program.

    Q, Out: (rows / GROUP, HEADS * GROUP, D), Out contiguous; GROUP query heads share a key head and are GROUP rows one
    behind the other here.  Branch (rows / GROUP, KEYS): which rows of K and V are a row's keys, below 0 none; the first
    is one.  Parts (rows, PARTS): which rows of Part (asked, HEADS, D) and columns of Lse (HEADS, asked) are its parts.

    A part counts like one more key: its log-sum-exp is the score, its output the value. Grid: (tiles of rows, HEADS).
    All indices are read at once, then all that they point to, so a program waits for memory twice.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1).to(tl.int64)
    key, slot, column = tl.arange(0, A), tl.arange(0, P), tl.arange(0, BLOCK_D)
    inside, wide = row < rows, column < D
    branch = tl.load(Branch + (row // GROUP)[:, None] * KEYS + key[None, :],
                     mask=inside[:, None] & (key < KEYS)[None, :], other=-1).to(tl.int64)  # (R, A)
    part = tl.load(Parts + row[:, None] * PARTS + slot[None, :],
                   mask=inside[:, None] & (slot < PARTS)[None, :], other=-1).to(tl.int64)  # (R, P)
    token, query = (row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    q = tl.load(Q + (token * Q_TOKEN + query * Q_HEAD)[:, None] + column[None, :] * Q_DIM,
                mask=inside[:, None] & wide[None, :], other=0.0)  # (R, BLOCK_D)
    is_key, is_part = (branch >= 0)[:, :, None] & wide[None, None, :], (part >= 0)[:, :, None] & wide[None, None, :]
    k = tl.load(K + (branch * K_TOKEN + head * K_HEAD)[:, :, None] + column[None, None, :] * K_DIM,
                mask=is_key, other=0.0)  # (R, A, BLOCK_D)
    v = tl.load(V + (branch * V_TOKEN + head * V_HEAD)[:, :, None] + column[None, None, :] * V_DIM,
                mask=is_key, other=0.0)  # (R, A, BLOCK_D)
    lse = tl.load(Lse + head * asked + part, mask=part >= 0, other=float("-inf"))  # (R, P)
    value = tl.load(Part + ((part * HEADS + head) * D)[:, :, None] + column[None, None, :],
                    mask=is_part, other=0.0)  # (R, P, BLOCK_D)
    scores = tl.sum(q[:, None, :].to(tl.float32) * k.to(tl.float32), 2) * scale_log2
    scores, lse = tl.where(branch >= 0, scores, float("-inf")), lse * 1.4426950408889634  # to powers of two
    top = tl.where(inside, tl.maximum(tl.max(scores, 1), tl.max(lse, 1)), 0.0)[:, None]
    weights, shares = tl.exp2(scores - top), tl.exp2(lse - top)
    out = tl.sum(weights[:, :, None] * v.to(tl.float32), 1) + tl.sum(shares[:, :, None] * value.to(tl.float32), 1)
    total = tl.where(inside, tl.sum(weights, 1) + tl.sum(shares, 1), 1.0)
    pointers = Out + ((token * GROUP * HEADS + query) * D)[:, None] + column[None, :]
    tl.store(pointers, (out / total[:, None]).to(Out.dtype.element_ty), mask=inside[:, None] & wide[None, :])


def join(q: Tensor, k: Tensor, v: Tensor, part: Tensor, lse: Tensor, branch: Tensor, parts: Tensor,
         scale: float) -> Tensor:  # fmt: skip
    """What `join_kernel` says, for q (rows, heads, headdim); k, v: (total_k, kv_heads, headdim).  part, lse: as
    `varlen_attention` returns them.  branch, parts: int32, as of `trees.Plan`.  scale: of the scores. Returns rows like
    q."""
    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    constants = launch.strides_of(Q=q.stride(), K=k.stride(), V=v.stride()) | launch.head_of(kv_heads, dim)
    a, p = (1 << (n - 1).bit_length() for n in (branch.shape[1], parts.shape[1]))
    tile = max(1, min(ROWS, TILE // (max(a, p) * constants["BLOCK_D"])))
    constants |= {"GROUP": group, "KEYS": branch.shape[1], "PARTS": parts.shape[1], "A": a, "P": p, "R": tile}
    out = launch.new_output(q, rows, heads, dim)
    tensors, numbers = (q, k, v, part, lse, branch, parts, out), (scale * launch.LOG2_E, rows * group, part.shape[0])
    key = (q.dtype, part.dtype, *constants.values())
    grid = (-(-rows * group // tile), kv_heads)
    launch.start(join_kernel, key, grid, tensors, numbers, constants, {"num_warps": WARPS})
    return out
