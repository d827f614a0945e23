"""The way back through the small kernels: one that returns rows to where they stood, one for the attention of CLS.

Both write every number of their result once, from what they read: no atomics, and no order in which anything is added
up that could change.
"""

import triton
import triton.language as tl

from .attention import load_tile, number
from .scores import length_of


@triton.jit(do_not_specialize=["rows"])
def return_kernel(Grad, Inverse, Weight, Into, Out, rows, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                  FUSED: tl.constexpr):  # fmt: skip
    """The gradient of every row before a cut: that of the row it became, row Inverse[i] of Grad, or zero for -1; and
    (FUSED) Weight[i] times row Into[i] of Grad, that of the fused token it went into.

    `move_kernel` and `take_kernel` turned round: there a program asked where its rows come from, here where they went.
    Grid (rows / ROWS, DIM / BLOCK).
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, mine = row < rows, column[None, :] < DIM
    place = tl.load(Inverse + row, mask=here, other=-1)
    taken = (place >= 0)[:, None] & mine
    total = tl.load(Grad + place[:, None] * DIM + column[None, :], mask=taken, other=0.0).to(tl.float32)
    if FUSED:
        weight = tl.load(Weight + row, mask=here, other=0.0)
        into = tl.load(Into + row, mask=here, other=0)
        weighs = (weight != 0.0)[:, None] & mine
        fused = tl.load(Grad + into[:, None] * DIM + column[None, :], mask=weighs, other=0.0)
        total += weight[:, None] * fused.to(tl.float32)
    tl.store(Out + row[:, None] * DIM + column[None, :], total.to(Out.dtype.element_ty), mask=here[:, None] & mine)


@triton.jit(do_not_specialize=["count"])
def cls_backward_kernel(
    Q, K, Probs, Grad, Starts, Lengths, OfQ, OfK, scale, count,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`cls_kernel` turned round: from Grad, the gradient of Probs, both float32 (rows, HEADS), the gradients OfQ of
    every image's first query and OfK of its keys, (rows, HEADS, D). Rows of nobody, and other queries, are left alone.

    The softmax's own gradient: p (g - sum(p g)). A first pass over the row finds the sum; the second makes a row of
    OfK of every key, and adds up the query's. Grid (HEADS * batch,).
    """
    head, image = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    start = tl.load(Starts + image).to(tl.int64)
    length = length_of(Lengths, image, count)
    if length == 0:
        return
    column, lane = tl.arange(0, BLOCK_D), tl.arange(0, N)
    q = tl.load(Q + start * Q_TOKEN + head * Q_HEAD + column * Q_DIM, mask=column < D, other=0.0).to(tl.float32)
    k_head = K + start * K_TOKEN + head * K_HEAD
    both = tl.zeros([N], tl.float32)
    for j in range(0, number(length), N):
        place = (start + j + lane) * HEADS + head
        p = tl.load(Probs + place, mask=j + lane < length, other=0.0)
        both += p * tl.load(Grad + place, mask=j + lane < length, other=0.0)
    mean = tl.sum(both, 0)
    of_q = tl.zeros([BLOCK_D], tl.float32)
    for j in range(0, number(length), N):
        real = j + lane < length
        place = (start + j + lane) * HEADS + head
        p, g = tl.load(Probs + place, mask=real, other=0.0), tl.load(Grad + place, mask=real, other=0.0)
        of_score = tl.where(real, p * (g - mean) * scale, 0.0)
        k = load_tile(k_head, j, N, length, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True).to(tl.float32)
        of_q += tl.sum(of_score[:, None] * k, 0)
        of_k = (of_score[:, None] * q[None, :]).to(OfK.dtype.element_ty)
        tl.store(OfK + place[:, None] * D + column[None, :], of_k, mask=real[:, None] & (column < D)[None, :])
    tl.store(OfQ + (start * HEADS + head) * D + column, of_q.to(OfQ.dtype.element_ty), mask=column < D)
