"""The simple Triton kernels: Algorithm 1 of the paper, one row of the attention matrix, a ranking, and three ways to
move rows.

Shapes in the comments: M query rows of a tile, N key rows of a tile, D head dimension (padded to a power of two).
Strides are compile-time constants, because they depend on the model and never on the batch. Lengths and totals are
ordinary arguments that Triton is told not to specialise on: by itself it would compile a second kernel for multiples
of 16, and nothing shall be recompiled when a batch is longer, shorter or larger.
"""

import triton
import triton.language as tl

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
        q = load_tile(Q + base, first, M, length, token, 1, D, BLOCK_D, True)
        acc = tl.zeros([M, BLOCK_D], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        for j in range(0, number(length), N):
            k = load_tile(K + base, j, N, length, token, 1, D, BLOCK_D, True)
            v = load_tile(V + base, j, N, length, token, 1, D, BLOCK_D, True)
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


@triton.jit
def cls_kernel(
    Q, K, Probs, Starts, Lengths, scale_log2,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, K_DIM: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Softmax attention of every image's first row (CLS) over its own keys: Probs float32 (rows, HEADS).

    One row of the attention matrix instead of all of them. Grid (HEADS * batch,). Two passes over the keys: the first
    finds the maximum and the sum, the second writes; the keys of one head are still in the cache by then.
    """
    head, image = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    start = tl.load(Starts + image).to(tl.int64)
    length = tl.load(Lengths + image)
    if length == 0:
        return
    column = tl.arange(0, BLOCK_D)
    q = tl.load(Q + start * Q_TOKEN + head * Q_HEAD + column * Q_DIM, mask=column < D, other=0.0)
    q = q.to(tl.float32) * scale_log2
    k_head = K + start * K_TOKEN + head * K_HEAD
    lane = tl.arange(0, N)
    top = tl.full([N], float("-inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    for j in range(0, number(length), N):
        k = load_tile(k_head, j, N, length, K_TOKEN, K_DIM, D, BLOCK_D, True)
        score = tl.where(j + lane < length, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, score)  # one running softmax per lane, merged after the loop
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.exp2(score - safe)
        top = new_top
    best = tl.max(top, 0)
    norm = tl.sum(total * tl.exp2(top - best), 0)
    for j in range(0, number(length), N):
        k = load_tile(k_head, j, N, length, K_TOKEN, K_DIM, D, BLOCK_D, True)
        score = tl.sum(k.to(tl.float32) * q[None, :], 1)
        tl.store(Probs + (start + j + lane) * HEADS + head, tl.exp2(score - best) / norm, mask=j + lane < length)


@triton.jit(do_not_specialize=["total"])
def copy_kernel(X, Ids, Rows, Out, OutIds, total, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gather: row i of Out is row Rows[i] of X, and the ids go along. Grid (rows / ROWS, DIM / BLOCK)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = row < total
    source = tl.load(Rows + row, mask=real, other=0)
    mask = real[:, None] & (column[None, :] < DIM)
    x = tl.load(X + source[:, None] * DIM + column[None, :], mask=mask)
    tl.store(Out + row.to(tl.int64)[:, None] * DIM + column[None, :], x, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(OutIds + row, tl.load(Ids + source, mask=real), mask=real)


@triton.jit(do_not_specialize=["rows", "total"])
def pack_kernel(X, Ids, Keep, Place, Out, OutIds, rows, total,
                DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Scatter: a kept row of X goes to row Place - 1 of Out, where Place counts the kept rows up to and with it.

    Every program knows from the prefix sum alone where its rows go, so all of them run at once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = (row < rows) & (tl.load(Keep + row, mask=row < rows, other=0) != 0)
    target = tl.load(Place + row, mask=keep, other=1).to(tl.int64) - 1
    keep = keep & (target < total)  # whatever count the host was told
    mask = keep[:, None] & (column[None, :] < DIM)
    x = tl.load(X + row.to(tl.int64)[:, None] * DIM + column[None, :], mask=mask)
    tl.store(Out + target[:, None] * DIM + column[None, :], x, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(OutIds + target, tl.load(Ids + row, mask=keep), mask=keep)


@triton.jit(do_not_specialize=["images", "total", "width"])
def take_kernel(X, Ids, Starts, Index, Counts, Out, OutIds, Cu, images, total, width,
                DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Pack what an index names: row Index[b, j] of image b, which begins at row Starts[b] of X, becomes row Cu[b] + j
    of Out, for the first Counts[b] entries of Index (images, width).

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
            x = tl.load(X + place[:, None] * DIM + column, mask=mine[:, None] & (column < DIM), other=0.0)
            tl.store(Out + (target + row)[:, None] * DIM + column, x, mask=here[:, None] & (column < DIM))


@triton.jit
def _sortable(scores):
    """float32 -> int32 in the same order, NaN above everything, as PyTorch sorts."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0 and 0 equal
    return tl.where(scores != scores, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit(do_not_specialize=["stride", "patches", "count"])
def rank_kernel(Scores, Index, stride, patches, count, PREFIX: tl.constexpr, IN_PLACE: tl.constexpr,
                N: tl.constexpr, CHUNK: tl.constexpr):
    """The `count` patches of highest score of every image, best first, or (IN_PLACE) in the order in which they stood.

    A patch's rank is the number of patches ahead of it: higher scores, and equal ones that come earlier. Comparing all
    with all is more arithmetic than sorting, but no step has to wait for another, and a few hundred patches fit into
    one program. Scores (images, stride), its first PREFIX columns no patches; Index (images, PREFIX + count). Grid
    (images,).
    """
    image = tl.program_id(0).to(tl.int64)
    scores = Scores + image * stride + PREFIX
    out = Index + image * (PREFIX + count)
    i = tl.arange(0, N)
    mine = _sortable(tl.load(scores + i, mask=i < patches, other=0.0).to(tl.float32))
    rank = tl.zeros([N], tl.int32)
    for j in range(0, number(patches), CHUNK):
        other = j + tl.arange(0, CHUNK)
        theirs = _sortable(tl.load(scores + other, mask=other < patches, other=0.0).to(tl.float32))
        earlier = other[None, :] < i[:, None]
        ahead = (theirs[None, :] > mine[:, None]) | ((theirs[None, :] == mine[:, None]) & earlier)
        rank += tl.sum((ahead & (other < patches)[None, :]).to(tl.int32), 1)
    keep = (i < patches) & (rank < count)
    place = rank
    if IN_PLACE:
        place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(out + PREFIX + place, i.to(tl.int64) + PREFIX, mask=keep)
    tl.store(out + i, i.to(tl.int64), mask=i < PREFIX)
