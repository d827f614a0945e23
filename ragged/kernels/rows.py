"""The small kernels: one row of the attention matrix, and four ways to choose and move token rows.

`cls_kernel` scores, `rank_kernel` ranks, `keep_kernel` reads a mask, `move_kernel` and `take_kernel` move: as many rows
in every image, or as many as each image's count says. Lengths and totals are ordinary arguments that Triton is told not
to specialise on, as in attention.py.
"""

import triton
import triton.language as tl

from .attention import load_tile, number


@triton.jit(do_not_specialize=["count"])
def cls_kernel(
    Q, K, Probs, Starts, Lengths, scale_log2, count,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Softmax attention of every image's first row (CLS) over its own keys: Probs float32 (rows, HEADS). count: rows
    of every image, or 0, and Lengths says it.

    One row of the attention matrix instead of all of them. Grid (HEADS * batch,). Two passes over the keys: the first
    finds the maximum and the sum, the second writes; the keys of one head are still in the cache by then. ONCE: no
    image has more than N rows, and one pass is enough.
    """
    head, image = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    start = tl.load(Starts + image).to(tl.int64)
    length = count
    if count == 0:
        length = tl.load(Lengths + image)
    if length == 0:
        return
    column = tl.arange(0, BLOCK_D)
    q = tl.load(Q + start * Q_TOKEN + head * Q_HEAD + column * Q_DIM, mask=column < D, other=0.0)
    q = q.to(tl.float32) * scale_log2
    k_head = K + start * K_TOKEN + head * K_HEAD
    lane = tl.arange(0, N)
    if ONCE:
        k = load_tile(k_head, 0, N, length, K_TOKEN, K_DIM, D, BLOCK_D, CHECK=True)
        score = tl.where(lane < length, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        weight = tl.exp2(score - tl.max(score, 0))
        tl.store(Probs + (start + lane) * HEADS + head, weight / tl.sum(weight, 0), mask=lane < length)
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
        tl.store(Probs + (start + j + lane) * HEADS + head, tl.exp2(score - best) / norm, mask=j + lane < length)


@triton.jit(do_not_specialize=["count", "width"])
def importance_kernel(
    Probs, V, Starts, Lengths, Out, count, width,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Probs float32 (rows, HEADS), summed over the heads, times the norm of the row's values in all heads: Out float32
    (images, width), zero where an image has no row. count: rows of every image, or 0, and Lengths says it.
    Grid (images * programs,): a program looks at N rows."""
    part = tl.cdiv(width, N)
    image, first = tl.program_id(0) // part, tl.program_id(0) % part * N
    start = tl.load(Starts + image).to(tl.int64)
    length = count
    if count == 0:
        length = tl.load(Lengths + image)
    row = first + tl.arange(0, N)
    squares, total = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for head in tl.static_range(0, HEADS):
        v = load_tile(V + start * V_TOKEN + head * V_HEAD, first, N, length, V_TOKEN, V_DIM, D, BLOCK_D, CHECK=True)
        v = v.to(tl.float32)
        squares += tl.sum(v * v, 1)
        total += tl.load(Probs + (start + row) * HEADS + head, mask=row < length, other=0.0)
    tl.store(Out + image.to(tl.int64) * width + row, total * tl.sqrt(squares), mask=row < width)


@triton.jit
def _summed(X, More, at, mask, SUM: tl.constexpr):
    """Numbers `at` of X, or (SUM) of X and More together, in the precision of X; 0 where mask is not set."""
    x = tl.load(X + at, mask=mask, other=0.0)
    if SUM:
        more = tl.load(More + at, mask=mask, other=0.0)
        if X.dtype.element_ty == tl.float64:
            x += more
        else:
            x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["count", "index_stride", "width", "blend_stride", "images"])
def move_kernel(X, More, Ids, Starts, Index, Blend, Out, OutIds, Cu, count, index_stride, width, blend_stride, images,
                SUM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
                FUSED: tl.constexpr, NARROW: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """A cut that leaves `count` rows in every image, in one launch: the rows of X that Index (images, count) names,
    behind them (FUSED) the sum of the image's first `width` rows weighted by Blend (images, width), the ids of all, and
    the offsets Cu (images + 1,). SUM: rows of X + More; the sum is stored only for rows that stay.

    Grid (images * programs,): a program moves ROWS rows by BLOCK columns, or makes NARROW columns of the fused row: of
    CHUNK rows at a time, for nobody else is there to hide the waiting.
    """
    part = tl.num_programs(0) // images  # programs an image has
    image, mine = (tl.program_id(0) // part).to(tl.int64), tl.program_id(0) % part
    tile, block = mine // BLOCKS, mine % BLOCKS
    rows = count + FUSED  # of every image, after the cut
    start, target = tl.load(Starts + image).to(tl.int64), image * rows
    if tile * ROWS < count:
        lane, column = tl.arange(0, ROWS), block * BLOCK + tl.arange(0, BLOCK)
        row = tile * ROWS + lane
        real = row < count
        place = start + tl.load(Index + image * index_stride + row, mask=real, other=0)
        mask = real[:, None] & (column[None, :] < DIM)
        x = _summed(X, More, place[:, None] * DIM + column[None, :], mask, SUM)
        tl.store(Out + (target + row)[:, None] * DIM + column[None, :], x, mask=mask)
        if block == 0:
            tl.store(OutIds + target + row, tl.load(Ids + place, mask=real), mask=real)
    elif FUSED:
        slice = mine - tl.cdiv(count, ROWS) * BLOCKS
        narrow = slice * NARROW + tl.arange(0, NARROW)
        total = tl.zeros([NARROW], tl.float32)
        for j in range(0, number(width), CHUNK):
            old = j + tl.arange(0, CHUNK)
            weight = tl.load(Blend + image * blend_stride + old, mask=old < width, other=0.0)
            weight = weight.to(X.dtype.element_ty).to(tl.float32)
            weighs = (weight != 0.0)[:, None] & (narrow[None, :] < DIM)  # 0 times NaN is NaN
            these = _summed(X, More, (start + old)[:, None] * DIM + narrow[None, :], weighs, SUM)
            total += tl.sum(weight[:, None] * these.to(tl.float32), 0)
        tl.store(Out + (target + count) * DIM + narrow, total.to(X.dtype.element_ty), mask=narrow < DIM)
        if slice == 0:
            tl.store(OutIds + target + count, tl.full((), -1, tl.int64))
    if mine == 0:
        tl.store(Cu + image, target.to(tl.int32))
        if image == images - 1:
            tl.store(Cu + image + 1, (target + rows).to(tl.int32))


@triton.jit(do_not_specialize=["images", "total", "width"])
def take_kernel(X, More, Ids, Starts, Index, Counts, Out, OutIds, Cu, images, total, width, SUM: tl.constexpr,
                DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Pack what an index names: row Index[b, j] of image b, which begins at row Starts[b] of X, or (SUM) of X + More,
    becomes row Cu[b] + j of Out, for the first Counts[b] entries of Index (images, width).

    Every program adds up the counts before its image by itself, so the offsets Cu need no kernel of their own, and
    nobody waits for anybody. Grid (images + 1, programs per image): image number `images` is the surplus, the rows of
    Out that nobody owns, and gets zeros.
    """
    image = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    before = tl.zeros([CHUNK], tl.int32)
    for i in range(0, number(image), CHUNK):
        before += tl.load(Counts + i + lane, mask=i + lane < image, other=0)
    start = tl.minimum(tl.sum(before, 0), total)  # whatever capacity the host chose, nothing is written past it
    real = image < images
    count = tl.minimum(tl.load(Counts + image, mask=real, other=total), total - start)
    taken = tl.minimum(tl.where(real, count, 0), width)  # of the surplus no row comes from X
    if tl.program_id(1) == 0:
        tl.store(Cu + image, start)
    source = tl.load(Starts + image, mask=real, other=0).to(tl.int64)
    target = start.to(tl.int64)
    for j in range(number(tl.program_id(1) * ROWS), number(count), number(tl.num_programs(1) * ROWS)):
        row = j + tl.arange(0, ROWS)
        here, mine = row < count, row < taken
        place = source + tl.load(Index + image.to(tl.int64) * width + row, mask=mine, other=0)
        tl.store(OutIds + target + row, tl.load(Ids + place, mask=mine, other=-1), mask=here)
        for d in tl.static_range(0, DIM, BLOCK):
            column = d + tl.arange(0, BLOCK)[None, :]
            x = _summed(X, More, place[:, None] * DIM + column, mine[:, None] & (column < DIM), SUM)
            tl.store(Out + (target + row)[:, None] * DIM + column, x, mask=here[:, None] & (column < DIM))


@triton.jit(do_not_specialize=["total"])
def first_kernel(X, Starts, Out, total, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The first COUNT rows of every image of X (total, DIM), as Out (images, COUNT, DIM); of an image that begins past
    the end, the last row there is. Grid (images * COUNT,)."""
    image, row, column = tl.program_id(0) // COUNT, tl.program_id(0) % COUNT, tl.arange(0, BLOCK)
    place = tl.minimum(tl.load(Starts + image) + row, total - 1).to(tl.int64)
    x = tl.load(X + place * DIM + column, mask=column < DIM)
    tl.store(Out + tl.program_id(0).to(tl.int64) * DIM + column, x, mask=column < DIM)


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


@triton.jit(do_not_specialize=["width", "count", "samples"])
def sample_kernel(Scores, Lengths, Index, Counts, Steps, Order, width, count, samples, PREFIX: tl.constexpr,
                  N: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Adaptive sampling (see `inverse_cdf` in rules.py) of every image's scores (images, width).

    An image has `count` rows, or, if that is 0, as many as Lengths says. Index int64 (images, width) gets its prefix,
    the rows that were drawn, lowest score first, and then the others; Counts (images,), how many the former are. Steps
    float32 and Order int64 (images, width) are scratch: a sorted array has to be written before it can be looked up.
    Sorting is counting how many are smaller, as in `rank_kernel`. Grid (images,).
    """
    image = tl.program_id(0).to(tl.int64)
    length = count
    if count == 0:
        length = tl.load(Lengths + image)
    patches = tl.maximum(length - PREFIX, 0)
    scores, steps, order = Scores + image * width + PREFIX, Steps + image * width, Order + image * width
    i = tl.arange(0, N)
    score = tl.load(scores + i, mask=i < patches, other=0.0)
    mine = _sortable(score)
    rank = tl.zeros([N], tl.int32)
    for j in range(0, number(patches), CHUNK):
        other = j + tl.arange(0, CHUNK)
        rank += _ahead(mine, _sortable(tl.load(scores + other, mask=other < patches, other=0.0)), i, other, patches)
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


@triton.jit(do_not_specialize=["width", "fill"])
def grid_kernel(X, Cu, Out, width, fill, C: tl.constexpr, BLOCK: tl.constexpr):
    """Packed numbers X (total, C) as a grid Out (images, width, C), `fill` where an image has no row. Grid (images *
    programs,)."""
    image, part = tl.program_id(0) // tl.cdiv(width * C, BLOCK), tl.program_id(0) % tl.cdiv(width * C, BLOCK)
    first = tl.load(Cu + image)
    start, length = first.to(tl.int64), tl.load(Cu + image + 1) - first
    i = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + start * C + i, mask=i < tl.minimum(length, width) * C, other=0.0)
    x = tl.where(i < length * C, x, fill)
    tl.store(Out + image.to(tl.int64) * width * C + i, x, mask=i < width * C)


@triton.jit
def _kept(Keep, start, row, length, PREFIX: tl.constexpr):
    """Which of the rows `row` of an image stay; 0 or 1."""
    marked = tl.load(Keep + start + row, mask=row < length, other=0) != 0
    return ((marked | (row < PREFIX)) & (row < length)).to(tl.int32)


@triton.jit(do_not_specialize=["width"])
def keep_kernel(Keep, Cu, Index, Counts, width, PREFIX: tl.constexpr, CHUNK: tl.constexpr):
    """A mask as an index: the row numbers of each image that Keep marks, then those of its other rows, each in order.

    Keep holds one byte a row; image b owns rows Cu[b] to Cu[b + 1] of it. Its first PREFIX rows stay whatever Keep
    says. Index (images, width), Counts (images,): how many stay. Grid (images,): a program reads its part of the mask
    twice, first to count and then to place.
    """
    image = tl.program_id(0)
    first = tl.load(Cu + image)
    start, length = first.to(tl.int64), tl.load(Cu + image + 1) - first
    lane = tl.arange(0, CHUNK)
    kept = tl.zeros([CHUNK], tl.int32)
    for j in range(0, number(width), CHUNK):
        kept += _kept(Keep, start, j + lane, length, PREFIX)
    count = tl.sum(kept, 0)
    tl.store(Counts + image, count)
    before = count - count  # kept rows of earlier chunks
    for j in range(0, number(width), CHUNK):
        row = j + lane
        keep = _kept(Keep, start, row, length, PREFIX)
        place = before + tl.cumsum(keep, 0)  # kept rows up to and with this one
        target = tl.where(keep != 0, place - 1, count + row - place)
        tl.store(Index + image.to(tl.int64) * width + target, row.to(tl.int64), mask=row < width)
        before += tl.sum(keep, 0)
