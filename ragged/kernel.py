"""The attention kernels. Read `paper_kernel` in kernel_simple.py first; `stream_kernel` here is the same idea for any
lengths, made lean, and `resident_kernel` is what short sequences allow.

Shapes in the comments: M query rows of a tile, N key rows of a tile, D head dimension (padded to a power of two).
"""

import triton
import triton.language as tl

from .kernel_simple import load_tile, number


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
    sums = _narrow(weights, WIDTH, False)
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
    top = tl.max(tl.maximum(_narrow(scores, WIDTH, True), _narrow(tail, WIDTH, True)), 1)
    shift = _exponent(top, scale_log2, SOME_EMPTY)[:, None]
    weights = tl.exp2(scores * scale_log2 - shift)
    tail = tl.exp2(tail * scale_log2 - shift)
    acc = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    acc = tl.dot(tail.to(v.dtype), v_tail, acc, input_precision=PRECISION)
    return acc, top, _narrow(weights, WIDTH, False) + _narrow(tail, WIDTH, False)


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
def _stream(Q, K, V, Out, Lse, q_start, q_len, k_start, k_len, first, head, scale_log2, total_q,
            Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, Q_DIM: tl.constexpr, K_TOKEN: tl.constexpr,
            K_HEAD: tl.constexpr, K_DIM: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, V_DIM: tl.constexpr,
            HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
            TAIL: tl.constexpr, STAGES: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr):
    """Attention of M queries from row `first` of one head of one image; keys and values stream through in tiles."""
    q = load_tile(Q + q_start * Q_TOKEN + head * Q_HEAD, first, M, q_len, Q_TOKEN, Q_DIM, D, BLOCK_D, True)
    k_head = K + k_start * K_TOKEN + head * K_HEAD
    v_head = V + k_start * V_TOKEN + head * V_HEAD
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M, 16], tl.float32)
    whole = k_len // N * N
    for j in tl.range(0, number(whole), N, num_stages=STAGES):  # whole tiles need no mask
        k = load_tile(k_head, j, N, k_len, K_TOKEN, K_DIM, D, BLOCK_D, False)
        v = load_tile(v_head, j, N, k_len, V_TOKEN, V_DIM, D, BLOCK_D, False)
        acc, top, total = _attend(q, k, v, acc, top, total, scale_log2, k_len - j, False, False, False, 16, PRECISION)
    for j in tl.range(number(whole), number(k_len), TAIL, num_stages=1):  # 577 = 9 * 64 + 1: 16 more columns, not 64
        k = load_tile(k_head, j, TAIL, k_len, K_TOKEN, K_DIM, D, BLOCK_D, True)
        v = load_tile(v_head, j, TAIL, k_len, V_TOKEN, V_DIM, D, BLOCK_D, True)
        acc, top, total = _attend(q, k, v, acc, top, total, scale_log2, k_len - j, True, False, False, 16, PRECISION)
    _store(Out, Lse, acc, top, total, scale_log2, q_start, first, head, q_len, total_q,
           HEADS, D, BLOCK_D, True, HAS_LSE)  # fmt: skip


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
    # 64-bit: token * stride passes 2**31 elements in large batches
    _stream(Q, K, V, Out, Lse, q_start.to(tl.int64), q_len, k_start.to(tl.int64), k_len, first, head, scale_log2,
            total_q, Q_TOKEN, Q_HEAD, Q_DIM, K_TOKEN, K_HEAD, K_DIM, V_TOKEN, V_HEAD, V_DIM, HEADS, D, BLOCK_D,
            M, N, TAIL, STAGES, HAS_LSE, PRECISION)  # fmt: skip


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
    q = load_tile(q_head, first, M, rows, Q_TOKEN, Q_DIM, D, BLOCK_D, True)
    k_a = load_tile(k_head, 0, A, keys, K_TOKEN, K_DIM, D, BLOCK_D, MASK_A)
    if B:
        k_b = load_tile(k_head, A, B, keys, K_TOKEN, K_DIM, D, BLOCK_D, not EQUAL)
    if TAIL:
        k_tail = load_tile(k_head, A + B, TAIL, keys, K_TOKEN, K_DIM, D, BLOCK_D, True)
    v_a = load_tile(v_head, 0, A, keys, V_TOKEN, V_DIM, D, BLOCK_D, MASK_A)
    if B:
        v_b = load_tile(v_head, A, B, keys, V_TOKEN, V_DIM, D, BLOCK_D, not EQUAL)
    if TAIL:
        v_tail = load_tile(v_head, A + B, TAIL, keys, V_TOKEN, V_DIM, D, BLOCK_D, True)
    if EQUAL:
        if (q_start != q_row) | (q_len != rows) | (k_start != k_row) | (k_len != keys):
            # in the smallest tiles: it must be right, and must not take registers from the path below
            for r in tl.range(number(first // M * 16), number(q_len), 16 * SPLIT, num_stages=1):
                _stream(Q, K, V, Out, Lse, q_start, q_len, k_start, k_len, r, head, scale_log2, total_q,
                        Q_TOKEN, Q_HEAD, Q_DIM, K_TOKEN, K_HEAD, K_DIM, V_TOKEN, V_HEAD, V_DIM, HEADS, D, BLOCK_D,
                        16, 16, 16, 1, HAS_LSE, PRECISION)  # fmt: skip
            return
    last = first + 1 if ONE_TILE else rows
    for r in tl.range(number(first), number(last), M * SPLIT, num_stages=1):
        if not ONE_TILE:  # the next query tile travels while this one is computed
            q_next = load_tile(q_head, r + M * SPLIT, M, rows, Q_TOKEN, Q_DIM, D, BLOCK_D, True)
        if TAIL:
            acc, top, total = _attend_two(q, k_a, v_a, k_tail, v_tail, scale_log2, keys, keys - (A + B),
                                          not EQUAL, not EQUAL, WIDTH, PRECISION)  # fmt: skip
        else:
            acc, top, total = _attend(q, k_a, v_a, 0.0, 0.0, 0.0, scale_log2, keys,
                                      True, True, not EQUAL, WIDTH, PRECISION)  # fmt: skip
        if B:
            acc, top, total = _attend(q, k_b, v_b, acc, top, total, scale_log2, keys - A,
                                      not EQUAL, False, not EQUAL, WIDTH, PRECISION)  # fmt: skip
        _store(Out, Lse, acc, top, total, scale_log2, q_row, r, head, rows, total_q,
               HEADS, D, BLOCK_D, not EQUAL, HAS_LSE)  # fmt: skip
        if not ONE_TILE:
            q = q_next
