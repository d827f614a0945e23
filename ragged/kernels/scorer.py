"""DynamicViT's scorer as three kernels: a product each, with all that stands between it and the next one.

A scorer is four small products with a layer norm, three activations and a mean between them: a dozen launches for work
that takes the GPU no longer than one. Here a program makes a few patches by a few columns. Each loads what it needs at
once and waits for memory once: with so little work, waiting is all that takes time, and three short launches are ahead
of two of which one has a loop. Numbers are rounded where PyTorch's modules round them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .scores import length_of


@triton.jit
def _gelu(x, dtype: tl.constexpr):
    """GELU of x, as a module of this dtype gets it and returns it."""
    x = x.to(dtype).to(tl.float32)
    return (0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))).to(dtype)


@triton.jit
def _place(Starts, Lengths, image, count, PREFIX: tl.constexpr):
    """First patch of an image, and how many it has."""
    start = image.to(tl.int64) * count
    if count == 0:
        start = tl.load(Starts + image).to(tl.int64)
    return start + PREFIX, tl.maximum(length_of(Lengths, image, count) - PREFIX, 0)


@triton.jit(do_not_specialize=["count", "patches", "eps"])
def scorer_in_kernel(
    X, Starts, Lengths, Gamma, Beta, Weight, Bias, Hidden, Sums, count, patches, eps,
    DIM: tl.constexpr, PREFIX: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Layer norm, product and GELU: Hidden (images * patches, DIM) of the tokens X (rows, DIM), and of the columns in
    its second half the sums Sums (images, tiles, DIM // 2) over the patches of a tile.

    count: rows of every image, or 0, then Starts and Lengths say which are whose. patches: the most that an image has.
    Grid (images * tiles, column tiles): a program makes M patches by N columns. WHOLE: a power of two that holds DIM.
    """
    dtype: tl.constexpr = X.dtype.element_ty
    tiles = tl.cdiv(patches, M)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start, length = _place(Starts, Lengths, image, count, PREFIX)
    row = tile * M + tl.arange(0, M)
    real = row < length
    x_rows = X + (start + row)[:, None] * DIM
    every = tl.arange(0, WHOLE)
    whole = tl.load(x_rows + every[None, :], mask=real[:, None] & (every < DIM)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(whole, 1) / DIM
    off = tl.where((every < DIM)[None, :], whole - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(off * off, 1) / DIM + eps)
    column = tl.program_id(1) * N + tl.arange(0, N)
    gamma = tl.load(Gamma + every, mask=every < DIM, other=0.0).to(tl.float32)
    beta = tl.load(Beta + every, mask=every < DIM, other=0.0).to(tl.float32)
    weight = tl.load(Weight + column[:, None] * DIM + every[None, :],
                     mask=(column < DIM)[:, None] & (every < DIM)[None, :], other=0.0)  # fmt: skip
    normed = (off * scale[:, None] * gamma[None, :] + beta[None, :]).to(dtype)
    acc = tl.dot(normed, tl.trans(weight))
    acc += tl.load(Bias + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    hidden = _gelu(acc, dtype)
    target = image.to(tl.int64) * patches + row
    tl.store(Hidden + target[:, None] * DIM + column[None, :], hidden,
             mask=(row < patches)[:, None] & (column < DIM)[None, :])  # fmt: skip
    half: tl.constexpr = DIM // 2
    sums = tl.sum(tl.where(real[:, None], hidden.to(tl.float32), 0.0), 0)
    tl.store(Sums + tl.program_id(0).to(tl.int64) * half + column - half, sums,
             mask=(column >= half) & (column < DIM))  # fmt: skip


@triton.jit(do_not_specialize=["count", "patches"])
def scorer_mid_kernel(
    Hidden, Sums, Starts, Lengths, Weight, Bias, Mid, count, patches,
    DIM: tl.constexpr, PREFIX: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The second half of Hidden gives way to its mean over the image; then a product and GELU: Mid (images * patches,
    DIM // 2).

    The mean is the same for all patches of an image; so that a tensor core can take it, it stands in every row of a
    tile. HALF, TILES: powers of two that hold DIM // 2 and the tiles of an image. Grid (images * tiles, column tiles).
    The other arguments are those of `scorer_in_kernel`.
    """
    dtype: tl.constexpr = Hidden.dtype.element_ty
    half: tl.constexpr = DIM // 2
    tiles = tl.cdiv(patches, M)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    _, length = _place(Starts, Lengths, image, count, PREFIX)
    row, k, part = tile * M + tl.arange(0, M), tl.arange(0, HALF), tl.arange(0, TILES)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mine = image.to(tl.int64) * patches + row
    there = (row < patches)[:, None]
    x = tl.load(Hidden + mine[:, None] * DIM + k[None, :], mask=there & (k < half)[None, :], other=0.0)
    sums = tl.load(Sums + (image * tiles + part).to(tl.int64)[:, None] * half + k[None, :],
                   mask=(part < tiles)[:, None] & (k < half)[None, :], other=0.0)  # fmt: skip
    inside = (column < half)[:, None] & (k < half)[None, :]
    weights = Weight + column[:, None] * DIM + k[None, :]
    own, shared = tl.load(weights, mask=inside, other=0.0), tl.load(weights + half, mask=inside, other=0.0)
    bias = tl.load(Bias + column, mask=column < half, other=0.0).to(tl.float32)
    mean = (tl.sum(sums, 0) / tl.maximum(length, 1)).to(dtype)
    acc = tl.dot(x, tl.trans(own))
    acc = tl.dot(tl.broadcast_to(mean[None, :], [M, HALF]), tl.trans(shared), acc)
    tl.store(Mid + mine[:, None] * half + column[None, :], _gelu(acc + bias[None, :], dtype),
             mask=there & (column < half)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["count", "patches"])
def scorer_out_kernel(
    Mid, Starts, Lengths, W2, B2, W3, B3, Out, count, patches,
    DIM: tl.constexpr, PREFIX: tl.constexpr, M: tl.constexpr, HALF: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The rest: a product with GELU, another one of two columns, and a log-softmax over those. Out float32 (images,
    patches): its first column, "keep". LAST: a power of two that holds DIM // 4. Grid (images * tiles,). The other
    arguments are those of `scorer_mid_kernel`."""
    dtype: tl.constexpr = Mid.dtype.element_ty
    half: tl.constexpr = DIM // 2
    quarter: tl.constexpr = DIM // 4
    tiles = tl.cdiv(patches, M)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    _, length = _place(Starts, Lengths, image, count, PREFIX)
    row, k, last = tile * M + tl.arange(0, M), tl.arange(0, HALF), tl.arange(0, LAST)
    mine = image.to(tl.int64) * patches + row
    x = tl.load(Mid + mine[:, None] * half + k[None, :], mask=(row < patches)[:, None] & (k < half)[None, :], other=0.0)
    weight = tl.load(W2 + last[:, None] * half + k[None, :], mask=(last < quarter)[:, None] & (k < half)[None, :],
                     other=0.0)  # fmt: skip
    bias = tl.load(B2 + last, mask=last < quarter, other=0.0).to(tl.float32)
    keep = tl.load(W3 + last, mask=last < quarter, other=0.0).to(tl.float32)
    drop = tl.load(W3 + quarter + last, mask=last < quarter, other=0.0).to(tl.float32)
    hidden = _gelu(tl.dot(x, tl.trans(weight)) + bias[None, :], dtype).to(tl.float32)
    ahead = tl.sum(hidden * keep[None, :], 1) + tl.load(B3).to(tl.float32)
    ahead -= tl.sum(hidden * drop[None, :], 1) + tl.load(B3 + 1).to(tl.float32)
    score = tl.minimum(ahead, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(ahead)))
    score = tl.where(ahead != ahead, ahead, score)
    tl.store(Out + mine, tl.where(row < length, score, float("-inf")), mask=row < patches)


# ---- the host's side ----


def score_patches(x: Tensor, places: tuple[Tensor, Tensor], count: int, batch: int, prefix: int, patches: int,
                  eps: float, weights: Sequence[Tensor]) -> Tensor:  # fmt: skip
    """Scores float32 (batch, patches) of checked tokens x (rows, dim). places: first row and length of every image,
    which a count of rows in each stands for if it is not 0.  prefix: so many rows are no patches.  patches: of the
    largest image.  eps: of the norm.  weights: weight and bias of the norm and of the four products, in order."""
    dim, tiles, half = x.shape[1], -(-patches // 16), x.shape[1] // 2
    hidden, mid = (x.new_empty(batch * patches, n) for n in (dim, half))
    sums, out = (x.new_empty(shape, dtype=torch.float32) for shape in ((batch * tiles, half), (batch, patches)))
    shared, middle = {"DIM": dim, "PREFIX": prefix, "M": 16}, {"N": 32, "HALF": _power(half), "TILES": _power(tiles)}
    numbers, key, options = (count, patches), (x.dtype, bool(count), dim, prefix, middle["TILES"]), {"num_warps": 4}

    def run(kernel, columns: int, tensors: tuple, numbers: tuple, constants: dict) -> None:
        launch.start(kernel, key, (batch * tiles, columns), tensors, numbers, shared | constants, options)

    first = {"N": 32, "WHOLE": _power(dim)}
    run(scorer_in_kernel, -(-dim // 32), (x, *places, *weights[:4], hidden, sums), (*numbers, eps), first)
    run(scorer_mid_kernel, -(-half // 32), (hidden, sums, *places, *weights[4:6], mid), numbers, middle)
    last = {"HALF": middle["HALF"], "LAST": _power(dim // 4)}
    run(scorer_out_kernel, 1, (mid, *places, *weights[6:], out), numbers, last)
    return out


def _power(n: int) -> int:
    """The power of two that holds n, and at least what a tensor core takes."""
    return max(16, 1 << (n - 1).bit_length())
