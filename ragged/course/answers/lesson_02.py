"""Exercises of lesson 02."""

import math

import torch
import torch.nn.functional as F

from ..exercises import Exercise
from ..stages import handover
from . import blanks_02 as blanks


def _part(q, k, v):
    """What a program holds after the keys that it was given: (sum, maximum, total)."""
    scores = q @ k.T * (16**-0.5 * math.log2(math.e))
    top = F.pad(scores, (0, 1), value=-math.inf).amax(1)
    weights = torch.exp2(scores - top[:, None])
    return torch.nan_to_num(weights) @ v, top, weights.sum(1)


def _parts(cut, size=1.0):
    """Attention of 6 queries to 10 keys, the keys divided at `cut`; size: of the numbers."""
    g = torch.Generator().manual_seed(1)
    x, y, z = (4 * torch.randn(n, 16, generator=g) for n in (6, 10, 10))
    x = x * size
    return (x, y, z), (_part(x, y[:cut], z[:cut]), _part(x, y[cut:], z[cut:]))


MERGES = {
    "3 keys and 7": _parts(3), "7 keys and 3": _parts(7), "all keys in the second part": _parts(0),
    "all keys in the first part": _parts(10), "scores of some hundreds, whose exponentials overflow": _parts(5, 40.0),
}  # fmt: skip
_WHOLE = {tuple(b[1].tolist()): whole for whole, (_, b) in MERGES.values()}


def _merged(a, b):
    x, y, z = _WHOLE[tuple(b[1].tolist())]
    return (x @ y.T * 16**-0.5).softmax(1) @ z


def _waste(lengths, tile):
    """Counted, not calculated: tiles that hold at least one token."""
    slots = -(-max(lengths) // tile) * tile
    real = torch.arange(slots) < torch.tensor(lengths)[:, None]
    edges = real.unflatten(1, (-1, tile)).any(2).sum(1) * tile
    padded = torch.tensor(len(lengths) * max(lengths) ** 2)
    return (1 - real.sum(1).square().sum() / torch.stack([padded, edges.square().sum()])).tolist()


def _finished(copies, computes, stages):
    return max(first + ticks for _, first, ticks, _ in handover(copies, computes, stages))


UNEVEN = [3, 3, 9, 1, 3], [4, 1, 4, 4, 2]
ONE_TILE = {"a whole tile and one head": ({"lengths": (16,), "heads": 1},), "two heads": ({"lengths": (16,)},)}
NEIGHBOUR = {"65 tokens beside 70 that are NaN": ({"lengths": (65, 70), "tile": 64, "nan": 1},)}
MIXED = {"images of 5 and 17 and 0 and 9 tokens": ({"lengths": (5, 17, 0, 9)},)}

EXERCISES = {
    "1": Exercise(
        spec=_merged, cases={words: parts for words, (_, parts) in MERGES.items()},
        show=lambda answer, a, b: f"The maxima of the first query: {a[1][0]:.4g} and {b[1][0]:.4g}.",
        hints=(
            "The two parts were scaled by different maxima. Which maximum serves both?",
            "To move a sum from one maximum to another is to multiply it by a power of two. Which one?",
            "A part without keys has the maximum -inf and the total 0. What is exp2(-inf - top)?",
            "Add the rescaled sums, add the rescaled totals, and divide once, at the end.",
        ),
    ),
    "2": Exercise(
        None, run=blanks.filled("tile_at"), judge=blanks.addresses, draw=blanks.memory,
        cases=ONE_TILE | {"20 tokens in two tiles": ({"lengths": (20,)},)} | MIXED | NEIGHBOUR,
        hints=(
            "Which packed row is row 0 of the tile, and which is row 1? Add what you are given.",
            "How many numbers lie between the beginning of a row and that of the next? HEADS heads stand in it.",
            "tl.arange(0, TILE) counts the tile's rows. A column plus a row, x[:, None] + y[None, :], is a tile.",
            "A row begins at row * HEADS * D, its head at head * D further, and D numbers belong to it.",
        ),
    ),
    "3": Exercise(
        None, run=blanks.filled("row_mask"), judge=blanks.loads, draw=blanks.memory,
        cases=ONE_TILE | NEIGHBOUR | {"5 tokens in a tile of 16": ({"lengths": (5,)},)} | MIXED,
        hints=(
            "Which row of the image is row 0 of a tile that begins at row `first`? Which is row 1?",
            "An image of `length` rows has the rows 0 to length - 1. Which comparison holds for exactly these?",
            "Make the numbers of the rows as in tile_at, compare them, and turn (TILE,) into a column with [:, None].",
        ),
    ),
    "4": Exercise(
        None, run=blanks.filled("mask_scores"), judge=blanks.scores, draw=blanks.softmax_keys,
        cases=ONE_TILE | {"5 tokens in a tile of 16": ({"lengths": (5,)},),
                          "scores about -20,000": ({"lengths": (20, 9), "shift": -20000.0},)} | MIXED | NEIGHBOUR,
        hints=(
            "Keys lie along one axis of the scores, queries along the other. Which is which in q @ k.T?",
            "What must a score be, so that exp2(score - max) is 0 whatever the maximum?",
            "tl.where(condition, a, b) is a where the condition holds; one of the shape (1, TILE) chooses columns.",
        ),
    ),
    "5": Exercise(
        None, run=blanks.filled("fold"), judge=blanks.folds, draw=blanks.output,
        cases={"one tile of keys": ({"lengths": (16,)},), "three tiles of keys": ({"lengths": (40,)},),
               "scores of some thousands whose exponentials overflow": ({"lengths": (40, 9), "size": 600.0},)} | MIXED,
        hints=(
            "total and acc were summed relative to the maximum `top`. From now on the maximum is new_top.",
            "In the formula of section 4 the old sum is multiplied by one factor. Ours counts in powers of two.",
            "For the first tile top is -inf. Which power of two is then the factor, and is that right?",
        ),
    ),
    "6": Exercise(
        spec=_waste,
        cases={
            "one image, a whole number of tiles": ([64], 64), "one image, half a tile": ([32], 64),
            "two equal images": ([39, 39], 64),
            "images of 197, 39, 64, 65 and 1 tokens, one of none": ([197, 39, 0, 64, 65, 1], 64),
        },
        hints=(
            "Padding makes a square of the longest image for everybody. Which squares are really needed?",
            "A tile that is touched is computed whole: round every length up to a multiple of the tile.",
        ),
    ),
    "7": Exercise(
        None, run=blanks.third_axis, judge=blanks.written, draw=blanks.logarithms,
        cases={"one query tile": ({"lengths": (5,)},), "two query tiles": ({"lengths": (20,)},)}
        | MIXED | NEIGHBOUR,
        hints=(
            "The loop over `first` is no longer needed: tl.program_id(2) tells a program which query tile is its own.",
            "A program whose tile begins past the end of its image has nothing to do. What does row_mask say of it?",
            "The row r of head h stands at h * total + r in Lse, and r counts from the beginning of the packed batch.",
            "The sum of 2 ** score is total * 2 ** top. Take its logarithm to base 2, then make it a natural one.",
        ),
    ),
    "8": Exercise(
        spec=_finished,
        cases={
            "one stage: nothing overlaps": ([3] * 8, [4] * 8, 1), "two stages": ([3] * 8, [4] * 8, 2),
            "two stages, copies take longer": ([5, 5, 5], [2, 2, 2], 2), "uneven ticks, one stage": (*UNEVEN, 1),
            "uneven ticks, two stages": (*UNEVEN, 2), "uneven ticks, three stages": (*UNEVEN, 3),
        },
        hints=(
            "Which two things does a copy wait for, and which two does a product wait for?",
            "Item i goes into stage i modulo `stages`. Which item was there before, and when was it read?",
            "Keep a list of the ticks at which products were done. A copy starts at the larger of two numbers.",
        ),
    ),
}  # fmt: skip
