"""Exercises of lesson 09."""

import numpy as np
import torch

from ..exercises import Exercise


def _scored_twice(score, tokens, patches):
    """Two calls, and whether the reader's random numbers came through the first."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        first = score(tokens, patches)
        untouched = torch.equal(before, torch.get_rng_state())
        return None if first is None else {"first": first, "again": score(tokens, patches), "untouched": untouched}


def _unfair(found, tokens, patches):
    """What makes a score no fair rival, or None."""
    scores, wanted = found["first"], tuple(patches.shape)
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != wanted:
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        return f"Expected a tensor of the shape (batch, n) = {wanted}, got {got}."
    if not torch.equal(scores, found["again"]):
        return "A second call gave other scores: nobody could repeat the measurement."
    if len({tuple(row) for row in scores.tolist()}) < len(scores):
        return "Two images got the same scores: the pruner would keep the same places in both."
    if scores.unique().numel() < scores.numel():
        return f"There are ties: {scores.numel() - scores.unique().numel()} scores stand more than once."
    if not found["untouched"]:
        return "It drew from the global random numbers, which belong to the reader. Give your generator a seed."
    return None


def _quantiles(slow_us, fast_us):
    rounds = [slow / fast for slow, fast in zip(slow_us, fast_us)]
    return [float(np.quantile(rounds, at)) for at in (0.5, 0.2, 0.8)]


def _grid(seed, counts, n):
    """A grid of images with so many patches, CLS first and zeros behind; and which rows are patches."""
    tokens = 1 + torch.randn(len(counts), n, 4, generator=torch.Generator().manual_seed(seed))
    place, counts = torch.arange(n), torch.tensor(counts)[:, None]
    return tokens * (place <= counts)[..., None], (place >= 1) & (place <= counts)


def _standard(tokens, patches):
    """Image after image."""
    scores = np.zeros(patches.shape, dtype=np.float32)
    for image, (rows, real) in enumerate(zip(tokens.numpy(), patches.numpy())):
        norms = np.linalg.norm(rows[real], axis=1)
        if len(norms) > 1:
            scores[image, real] = (norms - norms.mean()) / norms.std()
    return torch.from_numpy(scores)


def _sound(stages, n):
    earlier = set(range(n))
    for ids in stages:
        kept = [i for i in ids if i != -1]
        if ids[:1] != [0] or len(kept) != len(set(kept)) or set(kept) - earlier:
            return False
        earlier = set(kept)
    return True


EXERCISES = {
    "1": Exercise(
        spec=None, run=_scored_twice, judge=_unfair,
        cases={
            "three images of 50 rows": (torch.zeros(3, 50, 4), torch.ones(3, 50, dtype=torch.bool)),
            "16 images of 197 rows, the first of which is CLS": (
                torch.ones(16, 197, 4), (torch.arange(197) > 0).expand(16, -1).clone()),
        },
        hints=(
            "Which line of PyTorch gives random numbers of the shape (batch, n)?",
            "torch.rand takes generator=. A new generator with a fixed seed gives the same numbers in every call, and "
            "leaves the global ones alone.",
            "float32 has only 2**24 numbers below 1: among a few thousand draws two may be the same. Which dtype has "
            "more?",
        ),
    ),
    "2": Exercise(
        spec=_quantiles,
        cases={
            "a single round": ([100.0], [50.0]),
            "five quiet rounds": ([100.0, 102, 98, 101, 99], [50.0, 51, 50, 49, 50]),
            "seven rounds, two of them disturbed": (
                [100.0, 110.0, 300.0, 105.0, 98.0, 102.0, 310.0], [50.0, 54.0, 160.0, 70.0, 49.0, 40.0, 290.0]),
        },
        show=lambda answer, slow, fast: f"Given: slow {slow}, fast {fast}. The places are median, q20, q80.",
        hints=(
            "Divide first, summarise afterwards: entry i of both lists comes from the same round.",
            "torch.quantile takes several quantiles at once. In which order are they asked for?",
        ),
    ),
    "3": Exercise(
        spec=_standard,
        cases={
            "one image of five patches": _grid(1, [5], 6), "two images, one of them half padding": _grid(2, [7, 3], 8),
            "an image without patches, and one with a single one": _grid(3, [4, 0, 1], 5),
            "eight images": _grid(4, [9, 1, 5, 2, 9, 3, 7, 4], 12),
        },
        show=lambda answer, tokens, patches: (
            f"Patches per image: {patches.sum(1).tolist()}, of {patches.shape[1]} rows."),
        hints=(
            "masked_mean of this lesson leaves out what is no patch: CLS and padding. It takes (batch, n, dim).",
            "The variance is a mean, too: of the squared distances from the mean.",
            "An image with one patch has no spread. What should its norm be divided by, so that the score is 0?",
            "Rows that are no patches get 0: torch.where(patches, ..., 0).",
        ),
    ),
    "4": Exercise(
        spec=_sound,
        cases={
            "two cuts, all in order": ([[0, 3, 5, 7], [0, 5]], 9), "CLS is gone": ([[3, 5]], 9),
            "CLS does not stand first": ([[3, 0, 5]], 9), "a patch stands twice": ([[0, 3, 3, 5]], 9),
            "fused tokens are no patches": ([[0, 3, 5, -1], [0, 3, -1, -1]], 9),
            "a patch comes back after a cut": ([[0, 3, 5], [0, 3], [0, 5]], 9),
            "a patch that the image never had": ([[0, 3, 9]], 9), "nothing but CLS": ([[0], [0]], 9),
        },
        hints=(
            "Leave the fused tokens, -1, out before you count anything.",
            "A list with a repeated number is longer than the set of its numbers.",
            "Keep the set of rows that the cut before left; at the beginning it is {0, ..., n - 1}. set <= set "
            "compares.",
        ),
    ),
}  # fmt: skip
