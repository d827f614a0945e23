"""The small kernels that move token rows. `keep_kernel` reads a mask, `move_kernel` and `take_kernel` move: as many
rows in every image, or as many as each image's count says. Lengths and totals are ordinary arguments that Triton is
told not to specialise on, as in attention.py.
"""

import triton
import triton.language as tl

from .attention import number


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


@triton.jit(do_not_specialize=["images", "total", "width", "eps"])
def take_kernel(X, More, Ids, Starts, Index, Counts, Weight, Bias, Out, Normed, OutIds, Cu, images, total, width, eps,
                SUM: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """Pack what an index names: row Index[b, j] of image b, which begins at row Starts[b] of X, or (SUM) of X + More,
    becomes row Cu[b] + j of Out, for the first Counts[b] entries of Index (images, width). NORM: and of Normed, after a
    layer norm with Weight, Bias (DIM,) and eps; then BLOCK holds a whole row.

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
            if NORM:
                wide = x.to(tl.float32)  # of the rounded sum, as the norm would read it; past DIM it is 0
                off = tl.where(column < DIM, wide - (tl.sum(wide, 1) / DIM)[:, None], 0.0)
                scale = 1.0 / tl.sqrt(tl.sum(off * off, 1) / DIM + eps)
                weight = tl.load(Weight + column, mask=column < DIM, other=0.0).to(tl.float32)
                bias = tl.load(Bias + column, mask=column < DIM, other=0.0).to(tl.float32)
                x = (off * scale[:, None] * weight + bias).to(x.dtype)
                tl.store(Normed + (target + row)[:, None] * DIM + column, x, mask=here[:, None] & (column < DIM))


@triton.jit(do_not_specialize=["total"])
def first_kernel(X, Starts, Out, total, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The first COUNT rows of every image of X (total, DIM), as Out (images, COUNT, DIM); of an image that begins past
    the end, the last row there is. Grid (images * COUNT,)."""
    image, row, column = tl.program_id(0) // COUNT, tl.program_id(0) % COUNT, tl.arange(0, BLOCK)
    place = tl.minimum(tl.load(Starts + image) + row, total - 1).to(tl.int64)
    x = tl.load(X + place * DIM + column, mask=column < DIM)
    tl.store(Out + tl.program_id(0).to(tl.int64) * DIM + column, x, mask=column < DIM)


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
