"""Exercises of lesson 07."""

import math

import numpy as np
import torch

from ..exercises import Exercise


def _by_counting(lost, gained):
    """All outcomes of the coins, weighted by how often they come."""
    n = lost + gained
    return sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(lost - gained)) / 2**n


def _pairwise(speed, share):
    def beats(i, j):
        return speed[i] >= speed[j] and share[i] >= share[j] and (speed[i], share[i]) != (speed[j], share[j])

    every = range(len(speed))
    return [not any(beats(i, j) for i in every) for j in every]


def _right(both, lost, gained, neither):
    """Which scenes two networks get right: so many both, only the first, only the second, and neither."""
    first = [True] * (both + lost) + [False] * (gained + neither)
    second = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return first, second


def _paired(first, second):
    """A list of -1, 0 and 1, one entry a scene, and what numpy says of it."""
    change = np.array([int(b) - int(a) for a, b in zip(first, second)])
    half = 1.96 * change.std() / np.sqrt(len(change))
    return [change.mean(), change.mean() - half, change.mean() + half]


def _factors(counts, batch):
    def computed(order):
        return sum(len(part) * int(part.max()) for part in torch.tensor(order).split(batch))

    return [computed(order) / sum(counts) for order in (counts, sorted(counts))]


EXERCISES = {
    "1": Exercise(
        spec=_by_counting,
        cases={
            "nothing changed": (0, 0), "two lost, none gained": (2, 0), "one lost, one gained": (1, 1),
            "five lost, one gained": (5, 1), "three lost, twelve gained": (3, 12), "thirty lost, four gained": (30, 4),
        },
        atol=1e-9,
        hints=(
            "How many ways are there for k of n coins to fall heads? math.comb says so; there are 2**n ways in all.",
            "'At least as uneven' means: the smaller side has min(lost, gained) coins or fewer.",
            "Two-sided: the smaller side may be the lost ones or the gained ones. What happens where both are the same "
            "outcome, as with one and one? A probability is never above 1.",
        ),
    ),
    "2": Exercise(
        spec=_pairwise,
        cases={
            "each faster one is less accurate: all stay": ([1.0, 2.0, 3.0], [0.9, 0.8, 0.7]),
            "one is beaten in both": ([1.0, 2.0, 3.0], [0.9, 0.6, 0.7]),
            "equally fast, one more accurate": ([2.0, 2.0], [0.7, 0.8]),
            "equally accurate, one faster": ([2.0, 3.0], [0.8, 0.8]), "equal twins": ([4.0, 4.0, 1.0], [0.6, 0.6, 0.9]),
            "twins that a third one beats": ([2.0, 2.0, 3.0], [0.7, 0.7, 0.9]), "a single setting": ([1.0], [0.5]),
        },
        hints=(
            "For a setting j, look for another, i, that beats it. If there is none, j stays.",
            "i beats j if it is at least as good in both, and better in one. Which pairs are at least as good in both "
            "but better in none?",
            "any(...) over all i inside a list over all j is enough.",
        ),
    ),
    "3": Exercise(
        spec=_paired,
        cases={
            "nothing changed": _right(60, 0, 0, 40), "ten of a hundred lost": _right(80, 10, 0, 10),
            "ten of a hundred gained": _right(80, 0, 10, 10), "five lost and five gained": _right(85, 5, 5, 5),
            "four hundred scenes, many of them changed": _right(200, 90, 60, 50),
        },
        show=lambda answer, first, second: (
            f"{len(first)} scenes; right in the first: {sum(first)}, in the second: {sum(second)}. "
            "The places are difference, low, high."),
        hints=(
            "Scene by scene the change is -1, 0 or 1: second less first.",
            "The difference of the shares is the mean of these changes.",
            "The standard error of a mean is the standard deviation over the square root of n. Here the deviation "
            "divides by n (unbiased=False in PyTorch).",
        ),
    ),
    "4": Exercise(
        spec=_factors,
        cases={
            "equal counts: nothing to gain": ([50, 50, 50, 50], 2), "long and short ones in turn": ([10, 190] * 4, 2),
            "one batch for all": ([10, 190, 40], 3), "a last batch of one": ([30, 60, 120], 2),
            "one by one": ([7, 9], 1),
        },
        hints=(
            "Cut the list into batches with range(0, len(counts), batch). The last one may be short.",
            "A padded batch computes as many rows as it has images, times its longest image.",
            "Add up the rows of all batches first, and divide by the kept rows once.",
            "sorted(counts) gives a new list; counts.sort() would change the caller's.",
        ),
    ),
}  # fmt: skip
