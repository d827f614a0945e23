"""Exercises of lesson 06."""

import itertools

import numpy as np
import torch

from ...data import lengths
from ..exercises import Exercise


def _counted(ns):
    """A grid filled as padding does, and its cells counted."""
    real = torch.arange(max(ns)) < torch.tensor(ns)[:, None]
    pairs = real[:, :, None] & real[:, None, :]
    return [real.numel() / real.sum().item(), pairs.numel() / pairs.sum().item()]


def _first_batch(host_us, pruned_host_us, fixed_us, image_us, ratio, gain=1.1):
    """All batches at once."""
    work = image_us * np.arange(1, 1025)
    unpruned = np.maximum(host_us, fixed_us + work)
    enough = unpruned >= gain * np.maximum(pruned_host_us, fixed_us + work / ratio)
    return int(enough.argmax()) + 1 if enough.any() else 0


def _all_cuts(ns, groups):
    """Every way to cut the sorted list, the best of them."""
    ordered, n = sorted(ns), len(ns)
    cuts = [(0, *inner, n) for inner in itertools.combinations(range(1, n), min(groups, n) - 1)]
    return min(sum((b - a) * ordered[b - 1] for a, b in itertools.pairwise(edges)) for edges in cuts)


def _all_splits(rates, workers):
    """Every way to hand out the workers, the best of them."""
    splits = itertools.product(range(1, workers + 1), repeat=len(rates))
    return max(min(n * r for n, r in zip(split, rates)) for split in splits if sum(split) == workers)


def _ring(step_us, gradient_mb, gb_per_s, hidden_us, gpus):
    """The exchange acted out: step by step, each GPU sends one part of the gradients to the next."""
    sent = 0.0
    for _ in ("add up", "hand round"):
        for _ in range(gpus - 1):
            sent += gradient_mb / gpus
    return step_us / (step_us + max(0.0, 1e3 * sent / gb_per_s - hidden_us))


EXERCISES = {
    "1": Exercise(
        spec=_counted,
        cases={
            "equal lengths pay nothing": ([7, 7],), "lengths 5, 2 and 1": ([5, 2, 1],), "a single image": ([30],),
            "sixteen lengths of U(30,168)": (lengths("U(30,168)", 16),),
        },
        hints=(
            "How many rows does the padded batch have? How many of them are real?",
            "Attention works on pairs: every image padded to the longest has longest squared of them.",
            "Divide what is computed by what is real; the real pairs are a sum of squares, not the square of a sum.",
        ),
    ),
    "2": Exercise(
        spec=_first_batch,
        cases={
            "the host is slow in both passes": (5300, 5900, 500, 90, 1.5),
            "captured, the host is quick": (120, 130, 500, 90, 1.5),
            "the FLOP ratio is below the gain": (5300, 5900, 500, 90, 1.05),
            "the pruned pass has the quicker host": (9e5, 8e5, 5, 1, 2), "the very first batch": (10, 10, 0, 100, 2),
            "a gain of exactly the ratio": (10, 10, 0, 100, 2, 2),
        },
        hints=(
            "Write down the time of one pass at a batch b. It is the larger of two times.",
            "Only the work is divided by the ratio. The fixed time and the host's are not.",
            "Try b = 1, 2, ... and stop at the first that is good enough. What do you return if none is?",
        ),
    ),
    "3": Exercise(
        spec=_all_cuts,
        cases={
            "one group is padding": ([5, 2, 1], 1), "two groups of three images": ([5, 2, 1], 2),
            "equal images need one group": ([7, 7, 7], 3), "the list is not sorted": ([9, 1, 1, 8], 2),
            "more groups than images": ([3, 1], 20),
            "nine lengths of U(30,168), four groups": (lengths("U(30,168)", 9), 4),
            "equal shares are not the best cut": ([1, 1, 1, 1, 1, 60], 2),
        },
        hints=(
            "Sort first. A group is then a stretch of the list, as long as its last image.",
            "With one group: all images times the longest. With two: where would you cut? Try every place.",
            "For more groups: the last one takes images i to j, and the rest is the same question with one group less.",
        ),
    ),
    "4": Exercise(
        spec=_all_splits,
        cases={
            "one stage takes all": ([300], 4), "two stages, two workers": ([300, 1000], 2),
            "two stages, seven workers": ([300, 1000], 7), "three stages, eight workers": ([170, 2000, 900], 8),
            "equal stages": ([5, 5, 5], 9), "a hundred times slower": ([1, 100], 12),
        },
        hints=(
            "Every stage needs a worker. Which stage holds the chain up then?",
            "A worker anywhere but at the slowest stage changes nothing.",
            "Hand out the rest one by one, each to the stage that is slowest at that moment.",
        ),
    ),
    "5": Exercise(
        spec=_ring,
        cases={
            "one GPU has nobody to ask": (20000, 88, 200, 0, 1), "two GPUs, nothing hidden": (20000, 88, 200, 0, 2),
            "four GPUs, nothing hidden": (20000, 88, 200, 0, 4),
            "two GPUs, half of it hidden": (20000, 88, 200, 220, 2),
            "all of it hidden": (20000, 88, 200, 5000, 4), "a slow wire and eight GPUs": (20000, 350, 5, 1000, 8),
        },
        rtol=1e-6,
        hints=(
            "How many megabytes does one GPU send? In each of the two rounds, all but its own part.",
            "Megabytes over gigabytes per second are milliseconds. The step is in microseconds.",
            "What the backward pass hides is not waited for; a wait is never less than zero.",
            "The efficiency is the time of a step alone over its time with the wait.",
        ),
    ),
}  # fmt: skip
