"""The small kernels that score rows and choose among them: one row of the attention matrix, ranks, and samples.

Lengths and totals are ordinary arguments that Triton is told not to specialise on, as in attention.py.
"""

import triton
import triton.language as tl

from .attention import load_tile, number


@triton.jit
def length_of(Lengths, image, count):
    """Rows of an image: `count`, which is that of every image, or, if that is 0, what Lengths says."""
    length = count
    if count == 0:
        length = tl.load(Lengths + image)
    return length


@triton.jit(do_not_specialize=["count", "rows"])
def cls_kernel(
    Q, K, V, Probs, Squares, Starts, Lengths, scale_log2, count, rows,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr, VALUES: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Softmax attention of every image's first row (CLS) over its own keys: Probs float32 (rows, HEADS). VALUES: Probs
    is (HEADS, rows), for those who add up, and so is Squares, the squared norms of the rows of V. count: rows of every
    image, or 0, and Lengths says it.

    One row of the attention matrix instead of all of them. Grid (HEADS * batch,). Two passes over the keys: the first
    finds the maximum and the sum, the second writes; the keys of one head are still in the cache by then. ONCE: no
    image has more than N rows, and one pass is enough.
    """
    head, image = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    start = tl.load(Starts + image).to(tl.int64)
    length = length_of(Lengths, image, count)
    if length == 0:
        return
    column = tl.arange(0, BLOCK_D)
    q = tl.load(Q + start * Q_TOKEN + head * Q_HEAD + column * Q_DIM, mask=column < D, other=0.0)
    q = q.to(tl.float32) * scale_log2
    k_head, v_head = K + start * K_TOKEN + head * K_HEAD, V + start * V_TOKEN + head * V_HEAD
    lane = tl.arange(0, N)
    step, first = HEADS, start * HEADS + head
    if VALUES:
        step, first = 1, head.to(tl.int64) * rows + start
    if ONCE:
        k = load_tile(k_head, 0, N, length, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)
        if VALUES:
            v = load_tile(v_head, 0, N, length, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True).to(tl.float32)
            tl.store(Squares + first + lane, tl.sum(v * v, 1), mask=lane < length)
        score = tl.where(lane < length, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        weight = tl.exp2(score - tl.max(score, 0))
        tl.store(Probs + first + lane * step, weight / tl.sum(weight, 0), mask=lane < length)
        return
    top = tl.full([N], float("-inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    for j in range(0, number(length), N):
        k = load_tile(k_head, j, N, length, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)
        score = tl.where(j + lane < length, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, score)  # one running softmax per lane, merged after the loop
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.exp2(score - safe)
        top = new_top
    best = tl.max(top, 0)
    norm = tl.sum(total * tl.exp2(top - best), 0)
    for j in range(0, number(length), N):
        k = load_tile(k_head, j, N, length, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)
        score = tl.sum(k.to(tl.float32) * q[None, :], 1)
        tl.store(Probs + first + (j + lane) * step, tl.exp2(score - best) / norm, mask=j + lane < length)
        if VALUES:
            v = load_tile(v_head, j, N, length, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True).to(tl.float32)
            tl.store(Squares + first + j + lane, tl.sum(v * v, 1), mask=j + lane < length)


@triton.jit
def _sortable(scores):
    """float32 -> int32 in the same order, NaN above everything, as PyTorch sorts."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0 and 0 equal
    return tl.where(scores != scores, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _mean(scores, mask, HEADS: tl.constexpr):
    """The mean of HEADS numbers that stand side by side, float32; 0 where mask is not set."""
    total = tl.load(scores, mask=mask, other=0.0).to(tl.float32)
    for head in tl.static_range(1, HEADS):
        total += tl.load(scores + head, mask=mask, other=0.0).to(tl.float32)
    return total / HEADS if HEADS > 1 else total


@triton.jit(do_not_specialize=["stride", "step", "patches", "count"])
def rank_kernel(Scores, Index, Rest, stride, step, patches, count, PREFIX: tl.constexpr, SKIP: tl.constexpr,
                HEADS: tl.constexpr, IN_PLACE: tl.constexpr, REST: tl.constexpr, N: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """The `count` patches of highest score of every image, best first, or (IN_PLACE) in the order in which they stood.

    A patch's rank is the number of patches ahead of it: higher scores, and equal ones that come earlier. Comparing all
    with all is more arithmetic than sorting, but no step has to wait for another, and a few hundred patches fit into
    one program. Scores (images, stride), a score every `step` numbers, the mean of the HEADS that stand there, the
    first SKIP no patches; Index (images, PREFIX + count). Rest (images, PREFIX + patches), if REST: the scores of those
    that are not among them, and zeros.
    Grid (images,).
    """
    image = tl.program_id(0).to(tl.int64)
    scores = Scores + image * stride + SKIP * step
    out = Index + image * (PREFIX + count)
    i = tl.arange(0, N)
    score = _mean(scores + i * step, i < patches, HEADS)
    mine = _sortable(score)
    rank = tl.zeros([N], tl.int32)
    for j in range(0, number(patches), CHUNK):
        other = j + tl.arange(0, CHUNK)
        theirs = _sortable(_mean(scores + other * step, other < patches, HEADS))
        earlier = other[None, :] < i[:, None]
        ahead = (theirs[None, :] > mine[:, None]) | ((theirs[None, :] == mine[:, None]) & earlier)
        rank += tl.sum((ahead & (other < patches)[None, :]).to(tl.int32), 1)
    keep = (i < patches) & (rank < count)
    place = rank
    if IN_PLACE:
        place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(out + PREFIX + place, i.to(tl.int64) + PREFIX, mask=keep)
    tl.store(out + i, i.to(tl.int64), mask=i < PREFIX)
    if REST:
        rest = Rest + image * (PREFIX + patches)
        tl.store(rest + PREFIX + i, tl.where(keep, 0.0, score), mask=i < patches)
        tl.store(rest + i, tl.zeros([N], tl.float32), mask=i < PREFIX)


@triton.jit
def _ahead(mine, theirs, i, other, patches):
    """How many of `theirs`, numbers `other` of the patches, are smaller than `mine`, number i, or equal and earlier."""
    earlier = other[None, :] < i[:, None]
    ahead = (theirs[None, :] < mine[:, None]) | ((theirs[None, :] == mine[:, None]) & earlier)
    return tl.sum((ahead & (other < patches)[None, :]).to(tl.int32), 1)


@triton.jit(do_not_specialize=["width", "count", "samples", "rows"])
def sample_kernel(Scores, Squares, Starts, Lengths, Index, Counts, Steps, Order, width, count, samples, rows,
                  HEADS: tl.constexpr, PREFIX: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Adaptive sampling (see `inverse_cdf` in rules.py) of every image's Scores (images, width).

    HEADS: if not 0, Scores and Squares are (HEADS, rows), as `cls_kernel` leaves them, and image b begins at row
    Starts[b]. The score of a row is the sum of the former times the root of the sum of the latter.

    An image has `count` rows, or, if that is 0, as many as Lengths says. Index int64 (images, width) gets its prefix,
    the rows that were drawn, lowest score first, and then the others; Counts (images,), how many the former are. Steps
    float32 and Order int64 (images, width) are scratch: a sorted array has to be written before it can be looked up.
    Sorting is counting how many are smaller, as in `rank_kernel`. Grid (images,).
    """
    image = tl.program_id(0).to(tl.int64)
    length = length_of(Lengths, image, count)
    patches = tl.maximum(length - PREFIX, 0)
    scores, steps, order = Scores + image * width + PREFIX, Steps + image * width, Order + image * width
    i = tl.arange(0, N)
    if HEADS:
        at = tl.load(Starts + image).to(tl.int64) + PREFIX + i
        score, squares = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
        for head in tl.static_range(0, HEADS):
            score += tl.load(Scores + head * rows.to(tl.int64) + at, mask=i < patches, other=0.0)
            squares += tl.load(Squares + head * rows.to(tl.int64) + at, mask=i < patches, other=0.0)
        score *= tl.sqrt(squares)
        scores = steps  # from here on everybody reads them there
        tl.store(scores + i, score, mask=i < patches)
        tl.debug_barrier()
    else:
        score = tl.load(scores + i, mask=i < patches, other=0.0)
    mine = _sortable(score)
    rank = tl.zeros([N], tl.int32)
    for j in range(0, number(patches), CHUNK):
        other = j + tl.arange(0, CHUNK)
        rank += _ahead(mine, _sortable(tl.load(scores + other, mask=other < patches, other=0.0)), i, other, patches)
    if HEADS:
        tl.debug_barrier()  # all have read them
    tl.store(steps + rank, score, mask=i < patches)
    tl.store(order + rank, i.to(tl.int64), mask=i < patches)
    tl.debug_barrier()
    # the staircase, from 0 to 1
    cdf = tl.cumsum(tl.load(steps + i, mask=i < patches, other=0.0), 0)
    ordered = tl.load(order + i, mask=i < patches, other=0)
    last = patches - 1
    cdf = cdf / tl.maximum(tl.sum(tl.where(i == last, cdf, 0.0), 0), 1.1754943508222875e-38)
    low, high = tl.sum(tl.where(i == 0, cdf, 0.0), 0), tl.sum(tl.where(i == last, cdf, 0.0), 0)
    cdf = (cdf - low) / tl.where(high > low, high - low, 1.0)
    cdf = tl.where(i < patches, cdf, 2.0)  # past every height
    start = tl.minimum(tl.min(tl.where(cdf > 0, cdf, 2.0), 0), 1.0)
    # of equal steps the first counts: as many values as there are different ones, in order. Through memory here, too:
    # shifting values by `tl.gather` and a scan is slower
    tl.debug_barrier()  # all have read the scores that stood here
    tl.store(steps + i, cdf, mask=i < patches)
    tl.debug_barrier()
    before = tl.load(steps + i - 1, mask=(i > 0) & (i < patches), other=0.0)
    first = ((i == 0) | (cdf > before)) & (i < patches)
    run, runs = tl.cumsum(first.to(tl.int32), 0) - 1, tl.sum(first.to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(steps + run, cdf, mask=first)
    tl.debug_barrier()
    lower = tl.load(steps + run - 1, mask=first & (run > 0), other=-1.0)
    upper = tl.load(steps + run + 1, mask=first & (run + 1 < runs), other=3.0)
    # a step is the nearest for the heights from half-way below it to half-way above it: the first such height is one of
    # four, and if that one does not count for it, none does
    # a gap is 0, or at least a half: each of n sorted scores is at most an n-th of what is left
    gap, most = 1.0 - start, tl.maximum(samples - 1, 1).to(tl.float32)
    middle = tl.where(run > 0, 0.5 * (lower + cdf), cdf)
    near = tl.floor((middle - start) / tl.maximum(gap, 1e-6) * most)
    near = tl.minimum(tl.maximum(near, -1.0), most + 1.0).to(tl.int32)
    hit = (i == 0) & (runs == 1)  # all scores are zero, or none is a number
    for more in tl.static_range(0, 4):
        sample = tl.minimum(tl.maximum(near - 1 + more, 0), samples - 1)
        height = start + gap * (sample.to(tl.float32) / most)
        above = (run > 0) & (height > lower) & ((height <= cdf) | (run + 1 == runs))
        below = (run + 1 < runs) & (height > cdf) & ((height <= upper) | (run + 2 == runs))
        hit |= above & (tl.abs(cdf - height) < tl.abs(height - lower))
        hit |= below & ((tl.abs(upper - height) < tl.abs(height - cdf)) == 0)
    picked = (hit & first).to(tl.int32)
    drawn, place = tl.sum(picked, 0), tl.cumsum(picked, 0)  # place: drawn ones up to and with this one
    target = tl.where(picked != 0, place - 1, drawn + i - place)
    out = Index + image * width
    tl.store(out + PREFIX + target, ordered + PREFIX, mask=i < patches)
    tl.store(out + PREFIX + i, i.to(tl.int64), mask=(i >= patches) & (i < width - PREFIX))  # rows of nobody
    tl.store(out + i, i.to(tl.int64), mask=i < PREFIX)
    tl.store(Counts + image, tl.minimum(drawn + PREFIX, length))  # an image without rows keeps none
