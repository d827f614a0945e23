"""Exercises of lesson 02."""

import math

import torch
import torch.nn.functional as F

from ..exercises import Exercise


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
}  # fmt: skip
