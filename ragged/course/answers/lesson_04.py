"""Exercises of lesson 04."""

import torch

from ... import rules
from ...packing import Padded
from ...pruners import PRUNERS
from ..exercises import Exercise


def _norms(*images):
    return torch.tensor(images, dtype=torch.float32)


def _threshold(norms, tau):
    """By the package's rule, row numbers turned into a mask."""
    limit = tau * norms[:, 1:].mean(1, keepdim=True)
    chosen = rules.at_least(norms, 1, limit, torch.ones_like(norms, dtype=torch.bool))
    stays = torch.arange(norms.shape[1]) < chosen.counts[:, None]
    return torch.zeros_like(stays).scatter(1, chosen.index, stays)


def _smallest_set(scores, p):
    """One image and one patch after the other."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for row, stays in zip(scores.double(), keep):
        mass = 0.0
        for i in row.argsort(descending=True):
            if mass >= p * row.sum():
                break
            stays[i], mass = True, mass + row[i]
    return keep


def _evit(keep, cuts, rows=197):
    """Cut by cut, by the package's own pruner."""
    found = []
    for _ in range(cuts):
        state = Padded(torch.zeros(1, rows, 4), torch.zeros(1, rows, dtype=torch.int64), 197, count=rows)
        choice = PRUNERS["evit"](keep=keep).select(rules.View(state, 1, 0, torch.rand(1, rows, 3)))
        rows = rows if choice is None else choice.counts + 1
        found.append(rows)
    return found


def _qkv(n, heads, dim, size=1.0):
    g = torch.Generator().manual_seed(n)
    return tuple(size * torch.randn(n, heads, dim, generator=g) for _ in range(3))


def _looked_at(q, k, v):
    """From the full matrix of attention, of which one row is used."""
    full = torch.einsum("nhd,mhd->hnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return full.sum(0)[0] * v.flatten(1).norm(dim=1)


def _rest(tokens, attention, keep):
    """Added up token by token."""
    total = torch.zeros_like(tokens[0])
    for token, weight, stays in zip(tokens, attention, keep):
        if not stays:
            total += weight * token
    return total


def _tokens(kept, n=5):
    g = torch.Generator().manual_seed(3)
    keep = torch.zeros(n, dtype=torch.bool)
    keep[kept] = True
    return torch.randint(-4, 5, (n, 2), generator=g).float(), torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]), keep


EXERCISES = {
    "1": Exercise(
        spec=_threshold,
        cases={
            "the norms of five patches differ": (_norms([4, 1, 2, 3.5, 4, 5]), 1.0),
            "a loud CLS, which has no say": (_norms([50, 1, 2, 3.5, 4, 5]), 1.0),
            "a quiet CLS, which stays all the same": (_norms([0, 1, 2, 3.5, 4, 5]), 1.0),
            "every patch exactly at the mean": (_norms([2, 3, 3, 3, 3, 3]), 1.0),
            "two images of different loudness": (_norms([1, 1, 2, 3.5, 4, 5], [1, 20, 40, 60, 80, 99]), 1.0),
            "tau = 1.5": (_norms([1, 1, 2, 3, 4, 5]), 1.5),
        },
        hints=(
            "Which entries does the mean run over? Column 0 is CLS.",
            "The mean is one number for each image. With keepdim=True it can be compared with (batch, n).",
            "A patch exactly at the limit stays. CLS is set at the end, whatever the comparison said.",
        ),
    ),
    "2": Exercise(
        spec=_smallest_set,
        cases={
            "half of 10: the best patch holds it alone": (_norms([1, 6, 1, 2]), 0.5),
            "the patch that crosses the line stays": (_norms([4, 3, 2, 1]), 0.5),
            "a share reached exactly needs no other patch": (_norms([4, 2, 1, 1]), 0.75),
            "two images, best patches in different places": (_norms([1, 2, 3, 4], [8, 1, 1, 1]), 0.6),
            "everything": (_norms([1, 2, 3, 4]), 1.0),
        },
        hints=(
            "Sort each image's scores from the best down. Which running total tells you when you have enough?",
            "A patch stays if the patches before it do not reach the share yet. Before it, not up to it.",
            "The sorted answer has to go back to the patches' own places: scatter undoes sort.",
        ),
    ),
    "3": Exercise(
        spec=_evit,
        cases={
            "one cut to a half": (0.5, 1), "keep = 1.0 drops nothing": (1.0, 3), "three cuts to 70 %": (0.7, 3),
            "24 cuts to 90 %": (0.9, 24), "24 cuts to a half, until nothing more can go": (0.5, 24),
        },
        hints=(
            "Of 197 rows, one is CLS. How many are left to choose from? Round the share up.",
            "A cut leaves CLS, the chosen rows and the fused token. To the next cut, the fused token is a row.",
            "If rounding up keeps every row, nothing is dropped, and nothing is fused.",
        ),
    ),
    "4": Exercise(
        spec=_looked_at,
        cases={
            "three tokens, one head": _qkv(3, 1, 4), "seven tokens, three heads": _qkv(7, 3, 16),
            "scores of some hundreds": _qkv(5, 2, 16, 12.0),
        },
        show=lambda answer, q, k, v: f"Shapes: q, k and v {tuple(q.shape)}, your answer {tuple(answer.shape)}.",
        hints=(
            "You need one query, not all of them. Which row of q is CLS?",
            "Scores are divided by the square root of the head's width; softmax runs over the tokens, head by head.",
            "Sum over the heads, and multiply by the length of each value vector with all its heads side by side.",
        ),
    ),
    "5": Exercise(
        spec=_rest,
        cases={
            "three of five tokens stay": _tokens([0, 1, 3]), "one patch stays": _tokens([0, 2]),
            "nothing is dropped, and the sum is zero": _tokens([0, 1, 2, 3, 4]), "CLS alone stays": _tokens([0]),
        },
        hints=(
            "The fused token is a weighted sum over rows. Over which rows?",
            "The weights are attention as it is. They add up to less than one, and nothing scales them up.",
            "A weight of zero is as good as no row: set the weights of the kept rows to zero.",
        ),
    ),
}  # fmt: skip
