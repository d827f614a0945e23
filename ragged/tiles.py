"""Which attention kernel runs with which tiles: one small table, measured once."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple


class Tiles(NamedTuple):
    """Which attention kernel, its grid and its tile shapes. split: programs per head and image, or 0 for one per query
    tile; of the kernel in Gluon, items.  shape: the kernel's own compile-time constants.  options: Triton's."""

    kernel: str
    rows: int
    split: int
    shape: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int], ...]


HIGHEST_GRID = 65535  # CUDA's limit for the second dimension of a grid
FEW = 264  # programs, two per multiprocessor of an H200: with fewer, the queries of a head are shared out
# Widths into which the resident kernel cuts the keys, narrowest first. With equal lengths only the last piece is
# masked, so all others must be full: no list is chosen for fewer keys than it has without its last piece.
PIECE_WIDTHS = (
    (16, 0, 0), (32, 0, 0), (32, 0, 16), (64, 0, 0), (64, 0, 16), (64, 0, 32), (64, 32, 16), (64, 0, 64),
    (128, 0, 16), (128, 0, 32), (128, 0, 64), (128, 64, 16),
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def choose_tiles(max_q: int, max_k: int, headdim: int, programs: int, equal: bool, itemsize: int) -> Tiles:
    """A small table, measured once on an H200 with head dimension 64; nothing is tuned in a user's first call.

    programs: heads times images.  equal: whether the token counts allow all images to be equally long. The resident
    kernel pays for the longest image everywhere, the stream kernel follows each length. Lengths choose only among a
    few dozen shapes, and each of them is compiled once.
    """
    tiles, flat = -(-max_q // 64), int(programs > HIGHEST_GRID)
    if itemsize == 4:  # every product is three: small tiles where heads are wide, or the registers spill
        return _stream(*((32, 32) if headdim > 64 else (64, 32 if max_k <= 64 else 64)), 16, 1, flat)
    if headdim > 64:
        return _stream(64, 32, 16, 2, flat)
    few = programs <= FEW
    crowded = not (few and max_k > 128 and programs * tiles <= FEW)
    if tiles <= 4 and (max_k <= 64 or (equal and max_k <= 208)) and crowded:
        return _resident(max_q, max_k, few, programs, equal)
    if max_k <= 320 and not (equal and few):  # 96 registers: five programs on a multiprocessor instead of four
        return _stream(64, 32, 32, 3, flat, maxnreg=96)
    return _stream(64, 64, 16 if max_k % 64 <= 16 else 32, 3, flat)


def _stream(m: int, n: int, tail: int, stages: int, flat: int, **options: int) -> Tiles:
    shape = {"M": m, "N": n, "TAIL": tail, "STAGES": stages, "FLAT": flat}
    return Tiles("stream", m, 0, tuple(shape.items()), (("num_warps", 4), ("num_stages", stages), *options.items()))


def _resident(max_q: int, max_k: int, few: bool, programs: int, equal: bool) -> Tiles:
    tiles = -(-max_q // 64)
    a, b, tail = next(pieces for pieces in PIECE_WIDTHS if sum(pieces) >= max_k)
    split, limit = tiles, {}
    if 64 < max_k <= 112:  # 128 registers let a fourth program onto a multiprocessor, 96 a fifth
        split = min(tiles, 2 if programs <= 4 * FEW else 1)
        limit = {"maxnreg": 96 if programs > 6 * FEW else 128}
    elif max_k > 112:
        split = min(tiles, 2 if few else 1)
    shape = {"M": 64, "A": a, "B": b, "TAIL": tail, "SPLIT": split, "ONE_TILE": split == tiles, "EQUAL": equal}
    options = {"num_warps": 4, "num_stages": 1, **limit}
    return Tiles("resident", 64, split, tuple(shape.items()), tuple(options.items()))


# ---- the kernel in Gluon ----

GLUON_LENGTHS = range(65, 209)  # tokens of an image: more than one query tile, and all keys in shared memory
GLUON_HEADDIMS = (32, 64)  # with 128 neither two stages of tiles nor the accumulators fit
# As PIECE_WIDTHS, but with equal lengths only: the last piece may be empty, all others are full.
GLUON_WIDTHS = (
    (64, 0, 16), (64, 16, 16), (64, 32, 16), (64, 32, 32), (64, 64, 16), (128, 16, 16), (128, 32, 16), (128, 32, 32),
    (128, 64, 16),
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def pipe_tiles(n: int, headdim: int, programs: int, processors: int) -> Tiles:
    """Tiles of the kernel in Gluon for images of n tokens; programs: heads times images, processors: of the GPU.

    With few heads, two items share the queries of each. Two stages: one is filled while the other is read. More would
    fit for short images, and were slower.
    """
    a, b, tail = next(pieces for pieces in GLUON_WIDTHS if sum(pieces[:2]) <= n <= sum(pieces))
    parts = 2 if n > 192 and programs <= 3 * processors else 1
    shape = {"A": a, "B": b, "TAIL": tail, "TILES": -(-n // 64) // parts, "PARTS": parts, "STAGES": 2}
    # 2 computing groups with 224 registers a thread and the copying one with 56 make three with 168
    return Tiles("hopper", 64, parts, tuple(shape.items()), (("num_warps", 4), ("maxnreg", 168)))


def takes_gluon(max_q: int, max_k: int, headdim: int, programs: int, equal: bool, itemsize: int) -> bool:
    """Whether the kernel in Gluon computes such calls; the arguments are those of `choose_tiles`."""
    return equal and max_q == max_k and max_q in GLUON_LENGTHS and headdim in GLUON_HEADDIMS and itemsize == 2


# Where "auto" has the kernel in Gluon compute: (lengths up to, heads times images from, to). With fewer the kernels in
# Triton fill the GPU better; with more, memory is what limits both, and the gain is under 5 %.
GLUON_GAINS = ((80, 700, 2000), (112, 700, math.inf), (160, 700, 2000), (208, 190, math.inf))
# On which GPUs: those on which the stress test of 10,000 calls or more, the sanitizer, the soak and all other tests of
# it have run without a finding. What has and what has not is in data/results/notes.md.
GLUON_PROVEN: frozenset[str] = frozenset()


def prefers_gluon(max_q: int, max_k: int, headdim: int, programs: int, equal: bool, itemsize: int) -> bool:
    """Whether "auto" has the kernel in Gluon compute such calls, on a GPU where it is proven; the arguments are those
    of `choose_tiles`. Everything that decides it is known on the host, and stands here."""
    if headdim != 64 or not takes_gluon(max_q, max_k, headdim, programs, equal, itemsize):
        return False
    least, most = next((least, most) for longest, least, most in GLUON_GAINS if max_q <= longest)
    return least <= programs <= most


def grid_of(tiles: Tiles, max_q: int, heads: int, images: int, processors: int = 1) -> tuple[int, int]:
    """The grid that covers `images` images of up to max_q queries and `heads` heads. processors: of the GPU, where the
    programs of the kernel in Gluon stay."""
    if tiles.kernel == "hopper":
        return min(processors, tiles.split * heads * images), 1
    if tiles.split:
        return tiles.split * heads * images, 1
    parts, pairs = -(-max_q // tiles.rows), heads * images
    return (parts * pairs, 1) if pairs > HIGHEST_GRID else (parts, pairs)


class BackwardTiles(NamedTuple):
    """A kernel of the backward pass, "owner", "query" or "key", with its tile. rows: those of one program, of queries
    or keys, as the kernel says.  shape, options: as in `Tiles`."""

    kernel: str
    rows: int
    shape: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int], ...]


OWNER_BYTES = 140 * 1024  # of shared memory, for a program that owns 256 queries: data centre GPUs have them


@functools.lru_cache(maxsize=4096)
def choose_backward(max_q: int, max_k: int, headdim: int, programs: int, itemsize: int,
                    large: bool) -> tuple[BackwardTiles, ...]:  # fmt: skip
    """Kernels and tiles of the backward pass, in the order in which they run: one where all queries of a head fit into
    a program, else two. Measured on an H100.

    max_q, max_k, headdim, programs, itemsize: as in `choose_tiles`.  large: whether a program may have OWNER_BYTES.
    """
    if itemsize == 4:  # ordinary multiply-adds, as in the forward pass: small tiles
        return _two(32, 32, 1)
    if headdim > 64:
        return _two(64, 32, 1)
    if max_q <= 128 or (large and max_q <= 256 and programs > FEW):
        rows, keys = (max(16, 1 << (n - 1).bit_length()) for n in (max_q, min(max_k, 64)))
        shape = (("M", rows), ("N", keys))
        return (BackwardTiles("owner", rows, shape, (("num_warps", 8 if rows > 128 else 4), ("num_stages", 1))),)
    return _two(64, 64, 1) if programs <= FEW else _two(64, 32, 2)


def _two(rows: int, step: int, stages: int) -> tuple[BackwardTiles, ...]:
    """Two kernels whose programs own so many `rows`, of queries and then of keys, and walk in steps of the others."""
    options = (("num_warps", 4), ("num_stages", stages))
    shapes = (("query", {"M": rows, "N": step}), ("key", {"M": step, "N": rows}))
    return tuple(BackwardTiles(kernel, rows, tuple((shape | {"STAGES": stages}).items()), options)
                 for kernel, shape in shapes)  # fmt: skip
