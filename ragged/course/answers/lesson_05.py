"""Exercises of lesson 05."""

import torch
import torch.nn.functional as F

from ...packing import pack
from ..exercises import Exercise


def _cu(*lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def _owners(cu_seqlens, rows):
    """Image after image."""
    owner = torch.full((rows,), -1)
    for image, (a, b) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
        owner[a:b] = image
    return owner


def _means(tokens, cu_seqlens):
    pairs = zip(cu_seqlens[:-1], cu_seqlens[1:])
    return torch.stack([tokens[a:b].sum(0) / max(1, int(b - a)) for a, b in pairs])


def _buffer(*lengths, extra=0):
    """Whole numbers in rows of two, and rows of NaN behind them, which are nobody's."""
    total = sum(lengths)
    rows = torch.arange(2.0 * (total + extra)).view(-1, 2)
    rows[total:] = float("nan")
    return rows, _cu(*lengths)


def _packed(seed, batch=3, n=4, loses=None):
    """A packed batch, a decision for every row of it, and how many stay; the image `loses` loses every row."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, n, generator=g) < 0.7
    keep[:, 0] = True
    packed = pack(torch.randint(0, 9, (batch, n, 2), generator=g).float(), keep)
    chosen = torch.rand(len(packed.tokens), generator=g) < 0.5
    if loses is not None:
        chosen[packed.cu_seqlens[loses] : packed.cu_seqlens[loses + 1]] = False
    return packed.tokens, packed.ids, packed.cu_seqlens, chosen, int(chosen.sum())


def _repacked(tokens, ids, cu_seqlens, keep, total):
    """The rows picked out, and counted image by image."""
    counts = [int(keep[a:b].sum()) for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])]
    return [tokens[keep], ids[keep], _cu(*counts)]


_GRIDS = {"one image of 2 x 3 patches": [(2, 3)], "two images, one wider": [(2, 2), (1, 4)],
          "a single patch, and an image without any": [(1, 1), (0, 5), (3, 2)],
          "four sizes, 224 x 224 pixels first": [(14, 14), (7, 10), (1, 1), (4, 21)]}  # fmt: skip


def _sizes(grids):
    return _cu(*(1 + down * across for down, across in grids)), torch.tensor([across for _, across in grids])


def _corners(cu_seqlens, wide):
    """Line after line."""
    rows = []
    for image, (n, across) in enumerate(zip(cu_seqlens.diff().tolist(), wide.tolist())):
        rows += [(image, -1, -1)]
        rows += [(image, 16 * y, 16 * x) for y in range((n - 1) // across) for x in range(across)]
    return torch.tensor(rows)


def _may_see(cu_q, cu_k):
    """Image after image, a rectangle for each."""
    sees = torch.zeros(int(cu_q[-1]), int(cu_k[-1]), dtype=torch.bool)
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        sees[q0:q1, k0:k1] = True
    return sees


EXERCISES = {
    "1": Exercise(
        spec=_owners,
        cases={
            "images of 3 and 2 rows": (_cu(3, 2), 5), "a single image": (_cu(4), 4),
            "an empty image in the middle": (_cu(3, 0, 1, 5), 9), "an empty image first": (_cu(0, 2), 2),
            "three rows past the last offset, which are nobody's": (_cu(3, 2), 8),
        },
        hints=(
            "Row 4 and the offsets [0, 3, 3, 5]: how many offsets are not larger than 4?",
            "torch.searchsorted counts them for all rows at once. What does right=True do where images are empty?",
            "Which rows lie at or past cu_seqlens[-1]? torch.where gives them their -1.",
        ),
    ),
    "2": Exercise(
        spec=_means,
        cases={
            "images of 2 and 3 rows": _buffer(2, 3), "a single row": _buffer(1),
            "an empty image gets zeros": _buffer(2, 0, 1), "NaN behind the last offset": _buffer(2, 3, extra=2),
        },
        show=lambda answer, tokens, cu: f"Offsets {cu.tolist()}, {len(tokens)} rows in the buffer.",
        hints=(
            "With the owner of every row (exercise 1), index_add_ sums the rows of each image at once.",
            "Rows of nobody need a place to go: one image more than there are, cut off at the end.",
            "Multiplying a NaN by zero gives a NaN. Such rows have to be added elsewhere, not weighted away.",
            "Divide by the counts. What should an empty image be divided by, so that it gets zeros?",
        ),
    ),
    "3": Exercise(
        spec=_repacked,
        cases={
            "three images lose some rows": _packed(1), "an image loses every row": _packed(2, loses=1),
            "the first image loses every row": _packed(4, loses=0), "ten images": _packed(5, batch=10, n=9),
        },
        show=lambda answer, tokens, ids, cu, keep, total: (
            f"The packed offsets were {cu.tolist()}; of the {len(keep)} rows {total} stay. "
            f"The parts are [0] tokens, [1] ids, [2] cu_seqlens."),
        hints=(
            "It is section 1's recipe, on rows of a buffer instead of rows of a grid. Where does a kept row go?",
            "Dropped rows go to one extra slot at the end, which is cut off.",
            "The new offsets are the prefix sums of keep, read where the old offsets are.",
        ),
    ),
    "4": Exercise(
        spec=_corners, cases={words: _sizes(grids) for words, grids in _GRIDS.items()},
        show=lambda answer, cu, wide: f"Offsets {cu.tolist()}, patches across {wide.tolist()}; columns: image, y, x.",
        hints=(
            "Exercise 1 says whose row it is. Subtract where its image begins: what is left is its place in the image.",
            "Place 0 is CLS, so the first patch has place 1. Count patches from 0.",
            "Patch number 7 of an image 3 patches wide: which line, which column? // and % say so.",
            "A patch is 16 pixels high and wide. CLS rows get -1 at the end.",
        ),
    ),
    "5": Exercise(
        spec=_may_see,
        cases={
            "two images, as many keys as queries": (_cu(2, 3), _cu(2, 3)),
            "fewer queries than keys, as for the rows that ATS keeps": (_cu(1, 2), _cu(3, 4)),
            "an image without queries": (_cu(2, 0, 1), _cu(2, 3, 2)),
            "an image whose keys are all gone": (_cu(1, 2, 1), _cu(2, 0, 1)),
        },
        hints=(
            "A query may see a key if both belong to the same image. How do you know whose a row is?",
            "Queries have offsets of their own, keys have others. Find the owners of both.",
            "Comparing (queries, 1) with (1, keys) gives the whole mask in one line.",
        ),
    ),
}  # fmt: skip
