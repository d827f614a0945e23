"""The embedding of images of many sizes in two kernels, for a pass that is recorded once and called with any sizes.

A CUDA graph replays fixed launches on fixed memory, and images of many sizes lie anywhere. So the launches read a
table: one line for each image, with the addresses of its pixels and of its positions, its sides, and where its rows
begin. The table is all that the host sends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

COLUMNS = 7  # of the table, int64: pixels, height, width, patches in a row, patches in all, positions, first row
PATCHES, ROWS = 4, 8  # of a program


@triton.jit
def patch_kernel(Table, Out, PREFIX: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
                 FEATURES: tl.constexpr, BLOCK: tl.constexpr, PATCHES: tl.constexpr):  # fmt: skip
    """The pixels of every patch as one row of Out (rows, FEATURES), channel after channel, at the place that its token
    will have; pixels past an image's edge are zero. Grid (patches of the largest image / PATCHES, images)."""
    line = Table + tl.program_id(1) * COLUMNS
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)[:, None]
    patches = tl.load(line + 4)
    if tl.program_id(0) * PATCHES >= patches:
        return
    pixels = tl.load(line).to(tl.pointer_type(Out.dtype.element_ty))
    height, width, wide = tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    feature = tl.arange(0, BLOCK)[None, :]
    channel, y, x = feature // (DOWN * ACROSS), feature // ACROSS % DOWN, feature % ACROSS
    y, x = patch // wide * DOWN + y, patch % wide * ACROSS + x
    real = (patch < patches) & (feature < FEATURES)
    values = tl.load(pixels + (channel * height + y) * width + x, mask=real & (y < height) & (x < width), other=0.0)
    row = tl.load(line + 6) + PREFIX + patch
    tl.store(Out + row * FEATURES + feature, values, mask=real)


@triton.jit
def place_kernel(Table, X, First, Out, Ids, PREFIX: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
                 POSITIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Tokens Out (rows, DIM) and their Ids: the embedded patches X (rows, DIM), First (PREFIX, DIM) before those of
    every image, and its positions added. Rows that no image owns are left as they are. Grid (rows of the longest image
    / ROWS, images)."""
    line = Table + tl.program_id(1) * COLUMNS
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    patches, start = tl.load(line + 4), tl.load(line + 6)
    rows = tl.where(patches > 0, PREFIX + patches, 0)
    if tl.program_id(0) * ROWS >= rows:
        return
    owned, ours = row < rows, row[:, None]
    real = owned[:, None] & (column < DIM)
    first = tl.load(First + ours * DIM + column, mask=real & (ours < PREFIX), other=0.0)
    patch = tl.load(X + (start + ours) * DIM + column, mask=real & (ours >= PREFIX), other=0.0)
    value = tl.where(ours < PREFIX, first, patch)
    if POSITIONS:
        positions = tl.load(line + 5).to(tl.pointer_type(Out.dtype.element_ty))
        place = tl.load(positions + ours * DIM + column, mask=real, other=0.0)
        value = (value.to(tl.float32) + place.to(tl.float32)).to(Out.dtype.element_ty)
    tl.store(Out + (start + ours) * DIM + column, value, mask=real)
    tl.store(Ids + start + row, row.to(tl.int64), mask=owned)


def pixel_rows(table: Tensor, out: Tensor, longest: int, prefix: int, patch: tuple[int, int]) -> None:
    """Fill out (rows, channels * pixels of a patch) from the images that table, int64 (images, COLUMNS), names. patch:
    its sides.  longest: no image has more rows, its `prefix` included."""
    (down, across), features = patch, out.shape[1]
    constants = {"PREFIX": prefix, "COLUMNS": COLUMNS, "DOWN": down, "ACROSS": across, "FEATURES": features,
                 "BLOCK": triton.next_power_of_2(features), "PATCHES": PATCHES}  # fmt: skip
    grid = (-(-longest // PATCHES), table.shape[0])
    launch.start(patch_kernel, (out.dtype, *constants.values()), grid, (table, out), (), constants, {"num_warps": 8})


def place_rows(table: Tensor, x: Tensor, first: Tensor, longest: int, positions: bool) -> tuple[Tensor, Tensor]:
    """Tokens (rows, dim) and ids int64 (rows,) of embedded patches x (rows, dim); first (prefix, dim): the tokens
    before those of every image.  positions: whether table names some.  longest: as in `pixel_rows`."""
    rows, dim = x.shape
    out, ids = torch.empty_like(x), torch.zeros(rows, dtype=torch.int64, device=x.device)
    constants = {"PREFIX": first.shape[0], "COLUMNS": COLUMNS, "DIM": dim, "POSITIONS": positions, "ROWS": ROWS,
                 "BLOCK": triton.next_power_of_2(dim)}  # fmt: skip
    grid, key = (-(-longest // ROWS), table.shape[0]), (x.dtype, *constants.values())
    launch.start(place_kernel, key, grid, (table, x, first, out, ids), (), constants, {"num_warps": 4})
    return out, ids
