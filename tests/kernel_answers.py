"""Answers to lesson 02's exercises in Triton, right ones and what is typically wrong, for tests/test_answers_02.py."""

import triton
import triton.language as tl

from ragged.kernels.attention import number


@triton.jit
def tile_at(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + first + tl.arange(0, TILE)
    return (row[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]


@triton.jit
def without_head(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + first + tl.arange(0, TILE)
    return row[:, None] * HEADS * D + tl.arange(0, D)[None, :]


@triton.jit
def without_start(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = first + tl.arange(0, TILE)
    return (row[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]


@triton.jit
def without_first(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + tl.arange(0, TILE)
    return (row[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]


@triton.jit
def heads_first(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + first + tl.arange(0, TILE)
    return row[:, None] * HEADS * D + tl.arange(0, D)[None, :] * HEADS + head


@triton.jit
def in_bytes(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + first + tl.arange(0, TILE)
    return ((row[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]) * 4


@triton.jit
def far_away(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + first + tl.arange(0, TILE)
    return ((row[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]) * 100_000_000


@triton.jit
def turned(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + first + tl.arange(0, TILE)
    return (row[None, :] * HEADS + head) * D + tl.arange(0, D)[:, None]


@triton.jit
def beginnings(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    return (start + first + tl.arange(0, TILE)) * HEADS * D


@triton.jit
def as_floats(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    row = start + first + tl.arange(0, TILE)
    return ((row[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]) * 1.0


@triton.jit
def nothing(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    pass


@triton.jit
def stops(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    return tl.arange(0, TILE + 1)


@triton.jit
def stub(start, first, head, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    raise NotImplementedError


@triton.jit
def row_mask(first, length, TILE: tl.constexpr):
    return (first + tl.arange(0, TILE))[:, None] < length


@triton.jit
def every_row(first, length, TILE: tl.constexpr):
    return tl.arange(0, TILE)[:, None] >= 0


@triton.jit
def of_the_tile(first, length, TILE: tl.constexpr):
    return tl.arange(0, TILE)[:, None] < length


@triton.jit
def one_more(first, length, TILE: tl.constexpr):
    return (first + tl.arange(0, TILE))[:, None] <= length


@triton.jit
def one_less(first, length, TILE: tl.constexpr):
    return (first + tl.arange(0, TILE))[:, None] < length - 1


@triton.jit
def a_row(first, length, TILE: tl.constexpr):
    return (first + tl.arange(0, TILE))[None, :] < length


@triton.jit
def flat(first, length, TILE: tl.constexpr):
    return first + tl.arange(0, TILE) < length


@triton.jit
def whole_numbers(first, length, TILE: tl.constexpr):
    return (first + tl.arange(0, TILE))[:, None]


@triton.jit
def mask_scores(scores, first, length, TILE: tl.constexpr):
    return tl.where((first + tl.arange(0, TILE))[None, :] < length, scores, float("-inf"))


@triton.jit
def to_zero(scores, first, length, TILE: tl.constexpr):
    return tl.where((first + tl.arange(0, TILE))[None, :] < length, scores, 0.0)


@triton.jit
def to_a_large_number(scores, first, length, TILE: tl.constexpr):
    return tl.where((first + tl.arange(0, TILE))[None, :] < length, scores, -10000.0)


@triton.jit
def along_queries(scores, first, length, TILE: tl.constexpr):
    return tl.where((first + tl.arange(0, TILE))[:, None] < length, scores, float("-inf"))


@triton.jit
def the_other_way_round(scores, first, length, TILE: tl.constexpr):
    return tl.where((first + tl.arange(0, TILE))[None, :] < length, float("-inf"), scores)


@triton.jit
def from_the_tile_s_beginning(scores, first, length, TILE: tl.constexpr):
    return tl.where(tl.arange(0, TILE)[None, :] < length, scores, float("-inf"))


@triton.jit
def untouched(scores, first, length, TILE: tl.constexpr):
    return scores


@triton.jit
def scaled(scores, first, length, TILE: tl.constexpr):
    return tl.where((first + tl.arange(0, TILE))[None, :] < length, 2 * scores, float("-inf"))


@triton.jit
def fold(acc, top, total, scores, v):
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def unscaled(acc, top, total, scores, v):
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    return tl.dot(weights, v, acc, input_precision="ieee"), new_top, total + tl.sum(weights, 1)


@triton.jit
def upside_down(acc, top, total, scores, v):
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(new_top - top)
    return tl.dot(weights, v, acc * shrink[:, None]), new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def to_base_e(acc, top, total, scores, v):
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp(top - new_top)
    return tl.dot(weights, v, acc * shrink[:, None]), new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def without_maxima(acc, top, total, scores, v):
    weights = tl.exp2(scores)
    return tl.dot(weights, v, acc), tl.zeros_like(top), total + tl.sum(weights, 1)


@triton.jit
def sums_only(acc, top, total, scores, v):
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    return tl.dot(weights, v, acc), new_top, total * tl.exp2(top - new_top) + tl.sum(weights, 1)


@triton.jit
def two_of_three(acc, top, total, scores, v):
    return acc, total


@triton.jit
def attended(Q, K, V, start, length, first, head, scale_log2, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    at, real = tile_at(start, first, head, HEADS, D, TILE), row_mask(first, length, TILE)
    q = tl.load(Q + at, mask=real, other=0.0)
    acc, total = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    for j in range(0, number(length), TILE):
        kv_at, mine = tile_at(start, j, head, HEADS, D, TILE), row_mask(j, length, TILE)
        k, v = tl.load(K + kv_at, mask=mine, other=0.0), tl.load(V + kv_at, mask=mine, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        acc, top, total = fold(acc, top, total, mask_scores(scores, j, length, TILE), v)
    return acc / total[:, None], top, total


def kernel_lse(store, first="tl.program_id(2) * TILE"):
    """A kernel that computes what is right, and stores as a line says."""
    source = f"""
def kernel_lse(Q, K, V, Out, Lse, Cu, scale_log2, ROWS, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    image, head, first = tl.program_id(0), tl.program_id(1), {first}
    start = tl.load(Cu + image)
    length = tl.load(Cu + image + 1) - start
    out, top, total = attended(Q, K, V, start, length, first, head, scale_log2, HEADS, D, TILE)
    at, real = tile_at(start, first, head, HEADS, D, TILE), row_mask(first, length, TILE)
    row = first + tl.arange(0, TILE)
    lse = (top + tl.log2(total)) * 0.6931471805599453
    {store}
"""
    known = dict(globals())
    exec(source, known)
    return known["kernel_lse"]


OUT, LSE = "tl.store(Out + at, out, mask=real)", "tl.store(Lse + head * ROWS + start + row, {}, mask=row < length)"


@triton.jit
def calls_a_stub(Q, K, V, Out, Lse, Cu, scale_log2, ROWS, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    stub(0, 0, 0, HEADS, D, TILE)


@triton.jit
def every_tile_again(Q, K, V, Out, Lse, Cu, scale_log2, ROWS, HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    image, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(Cu + image)
    length = tl.load(Cu + image + 1) - start
    for first in range(0, number(length), TILE):  # the loop that the third axis is for
        out, top, total = attended(Q, K, V, start, length, first, head, scale_log2, HEADS, D, TILE)
        at, row = tile_at(start, first, head, HEADS, D, TILE), first + tl.arange(0, TILE)
        tl.store(Out + at, out, mask=row_mask(first, length, TILE))
        lse = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(Lse + head * ROWS + start + row, lse, mask=row < length)
