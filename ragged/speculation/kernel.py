"""The kernel that finishes the attention of a tree's rows: finished parts of a softmax and a handful of single keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

TILE, MOST = 4096, 4  # numbers of the largest tile of a program, and its rows, at most


@triton.jit(do_not_specialize=["rows", "asked"])
def join_kernel(
    Q, K, V, Part, Lse, Seen, Which, Out, scale_log2, rows, asked,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, A: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Out (rows, HEADS, D), contiguous: softmax attention of each row of Q over KEYS single keys, whose rows of K and V
    stand in Seen (rows / GROUP, KEYS), and over PARTS finished parts, whose rows of Part (asked, HEADS, D) and columns
    of Lse (HEADS, asked) stand in Which (rows, PARTS). Below 0 stands for none; the first key must be one.

    A part counts like a key with the log-sum-exp as its score and the output as its value. Grid: (tiles of R rows,
    HEADS). All indices are read at once, then all that they point to, so a program waits for memory twice.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    key, part = tl.arange(0, A), tl.arange(0, P)
    inside = (row < rows)[:, None]
    seen = tl.load(Seen + (row // GROUP)[:, None] * KEYS + key[None, :], mask=inside & (key < KEYS)[None, :], other=-1)
    which = tl.load(Which + row[:, None] * PARTS + part[None, :], mask=inside & (part < PARTS)[None, :], other=-1)
    q = tl.load(Q + row[:, None].to(tl.int64) * Q_TOKEN + head * Q_HEAD + column[None, :] * Q_DIM,
                mask=inside & (column < D)[None, :], other=0.0).to(tl.float32)  # (R, BLOCK_D)
    is_key = (seen >= 0)[:, :, None] & (column < D)[None, None, :]
    is_part = (which >= 0)[:, :, None] & (column < D)[None, None, :]
    seen, which = seen.to(tl.int64), which.to(tl.int64)
    k = tl.load(K + seen[:, :, None] * K_TOKEN + head * K_HEAD + column[None, None, :] * K_DIM, mask=is_key, other=0.0)
    v = tl.load(V + seen[:, :, None] * V_TOKEN + head * V_HEAD + column[None, None, :] * V_DIM, mask=is_key, other=0.0)
    lse = tl.load(Lse + head * asked + which, mask=which >= 0, other=float("-inf")) * 1.4426950408889634  # (R, P)
    part = tl.load(Part + (which[:, :, None] * HEADS + head) * D + column[None, None, :], mask=is_part, other=0.0)
    scores = tl.sum(q[:, None, :] * k.to(tl.float32), 2) * scale_log2  # (R, A)
    scores = tl.where(seen >= 0, scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 1), tl.max(lse, 1))
    top = tl.where(row < rows, top, 0.0)[:, None]
    weights, shares = tl.exp2(scores - top), tl.exp2(lse - top)
    out = tl.sum(weights[:, :, None] * v.to(tl.float32), 1) + tl.sum(shares[:, :, None] * part.to(tl.float32), 1)
    total = tl.where(row < rows, tl.sum(weights, 1) + tl.sum(shares, 1), 1.0)
    pointers = Out + (row[:, None].to(tl.int64) * HEADS + head) * D + column[None, :]
    tl.store(pointers, (out / total[:, None]).to(Out.dtype.element_ty), mask=inside & (column < D)[None, :])


def join(q: Tensor, k: Tensor, v: Tensor, part: Tensor, lse: Tensor, seen: Tensor, which: Tensor,
         group: int, scale: float) -> Tensor:  # fmt: skip
    """What `join_kernel` says, for q (rows, heads, headdim); k, v: (total_k, heads, headdim).  part, lse: as
    `varlen_attention` returns them.  seen, which: int32 (rows / group, keys) and (rows, parts)."""
    rows, heads, dim = q.shape
    wide = [1 << max(0, n - 1).bit_length() for n in (seen.shape[1], which.shape[1])]
    constants = launch.strides_of(Q=q.stride(), K=k.stride(), V=v.stride()) | launch.head_of(heads, dim)
    tile = max(1, min(MOST, TILE // (max(wide) * constants["BLOCK_D"])))
    constants |= {"GROUP": group, "KEYS": seen.shape[1], "PARTS": which.shape[1], "A": wide[0], "P": wide[1], "R": tile}
    out = launch.new_output(q, rows, heads, dim)
    tensors, numbers = (q, k, v, part, lse, seen, which, out), (scale * launch.LOG2_E, rows, part.shape[0])
    key = (q.dtype, part.dtype, *constants.values())
    launch.start(join_kernel, key, (-(-rows // tile), heads), tensors, numbers, constants, {"num_warps": 4})
    return out
