"""Exercises of lesson 00."""

import torch

from ...bench.flops import block_flops
from ..exercises import Exercise


def _packed(*lengths):
    rows = torch.arange(2.0 * sum(lengths)).view(-1, 2)
    return rows, torch.tensor([0, *lengths]).cumsum(0).int()


def _ceiling(n, cut, dim=192, depth=12):
    rows = [197] * cut + [n] * (depth - cut)
    return depth * block_flops(197, dim, 4 * dim) / sum(block_flops(r, dim, 4 * dim) for r in rows)


def _wasted(keep):
    """Row by row of the padded batch."""
    longest = max(sum(image) for image in keep.int().tolist())
    rows = [row < sum(image) for image in keep.int().tolist() for row in range(longest)]
    return rows.count(False) / len(rows)


def _masks(*images):
    return (torch.tensor(images, dtype=torch.bool),)


EXERCISES = {
    "1": Exercise(
        spec=lambda tokens, cu: torch.stack([part[0] for part in tokens.split(cu.diff().tolist())]),
        cases={
            "four images of 3, 1, 5 and 2 tokens": _packed(3, 1, 5, 2), "a single image": _packed(4),
            "images that keep nothing but CLS": _packed(1, 1, 1),
        },
        hints=(
            "In which row does image 1 begin, if image 0 has three tokens? Look for that number in cu_seqlens.",
            "cu_seqlens has one entry more than there are images. Which of them is no beginning?",
            "A tensor may be indexed with a tensor of row numbers: one row for each entry.",
        ),
    ),
    "2": Exercise(
        spec=_ceiling,
        cases={
            "nothing is pruned, 197 of 197": (197, 4), "a cut after the last block changes nothing": (99, 12),
            "half the tokens from the first block on": (99, 0), "half the tokens after four blocks": (99, 4),
            "20 tokens after eleven blocks": (20, 11),
        },
        rtol=1e-3,
        hints=(
            "Count the work of one block as a function of its tokens. Which part grows with n, which with n squared?",
            "A cut after block `cut` leaves two kinds of blocks. How many of each?",
            "The ceiling is the work without pruning over the work with it.",
        ),
    ),
    "3": Exercise(
        spec=_wasted,
        cases={
            "images that keep 3 and 2 of 5 tokens": _masks([1, 0, 1, 1, 0], [1, 0, 0, 1, 0]),
            "equal counts, so no padding": _masks([1, 1, 0, 0], [1, 0, 0, 1]),
            "one image keeps everything, three only CLS": _masks([1, 1, 1, 1], *[[1, 0, 0, 0]] * 3),
            "a single image": _masks([1, 0, 1]),
        },
        hints=(
            "How many rows does the padded batch have? Every image gets as many as the longest keeps, not 197.",
            "How many of these rows hold a token? That is the sum of the mask.",
            "A share: the rows without a token over all padded rows.",
        ),
    ),
}  # fmt: skip
