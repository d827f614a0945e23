"""Exercises of lesson 10."""

import math

import numpy as np
import torch

from ...attention import varlen_attention
from ..exercises import Exercise


def _attended(seed, queries, keys, size=1.0):
    """(do, out) of an attention, and the sum over its keys, key by key."""
    g = torch.Generator().manual_seed(seed)
    do, p, v = (torch.randn(n, m, generator=g, dtype=torch.float64)
                for n, m in ((queries, 8), (queries, keys), (keys, 8)))  # fmt: skip
    do, p = do * size, p.softmax(1)
    return (do, p @ v), sum(p[:, j] * (do @ v[j]) for j in range(keys))


_SUMS = {
    "five queries, seven keys": _attended(2, 5, 7), "a single query": _attended(3, 1, 4),
    "as many queries as numbers in a row": _attended(4, 8, 3), "large gradients": _attended(5, 6, 6, 1e3),
}  # fmt: skip
_TRUE = {tuple(out.flatten().tolist()): total for (_, out), total in _SUMS.values()}


def _asked_of_autograd(keep, cut):
    x = torch.randn(len(keep), 3, 1, 8, generator=torch.Generator().manual_seed(4))
    with torch.enable_grad():
        x = x.requires_grad_()
        q, k, v = (x[keep] if cut == "in front" else x).unbind(1)
        size = torch.tensor([0, len(q)], dtype=torch.int32)
        out = varlen_attention(q, k, v, size, size, len(q), len(q))
        (out if cut == "in front" else out[keep]).square().sum().backward()
    return (x.grad != 0).flatten(2).any(2).T


def _along(schedule, steps, keep):
    return [schedule(step, steps, keep) for step in range(steps)]


def _annealed(_, steps, keep):
    """Between the two corners of the schedule, the angle in equal steps."""
    angle = np.interp(np.arange(steps), [steps / 30, steps / 3], [0, math.pi])
    return (keep + (1 - keep) * (0.5 + 0.5 * np.cos(angle))).tolist()


def _weights(n):
    """Of a loss in which every token counts in its own way."""
    return torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.0])[:n]


def _with_gradient(mask_of, scores, keep):
    leaf = scores.clone().requires_grad_()
    with torch.enable_grad():
        mask = mask_of(leaf, keep)
        if not isinstance(mask, torch.Tensor):
            return mask
        total = (mask * _weights(len(scores))).sum()
        slope = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(scores)
    return {"mask": mask.detach(), "gradient": slope}


def _hard(scores, keep):
    """The mask by ranks, and the slope of the sigmoid."""
    ranks = [sum(other > own for other in scores.tolist()) for own in scores.tolist()]
    s = scores.sigmoid()
    return {"mask": torch.tensor([float(rank < keep) for rank in ranks]),
            "gradient": _weights(len(scores)) * s * (1 - s)}  # fmt: skip


EXERCISES = {
    "1": Exercise(
        spec=lambda do, out: _TRUE[tuple(out.flatten().tolist())],
        cases={words: both for words, (both, _) in _SUMS.items()},
        hints=(
            "Write the sum out: over j of p_ij times the sum over c of do_ic v_jc. Which factors do not depend on j?",
            "Sum over j first. What is the sum over j of p_ij v_jc called?",
            "A product, number by number, and a sum along each row.",
        ),
    ),
    "2": Exercise(
        spec=_asked_of_autograd,
        cases={
            f"a cut {cut} {'of an' if cut == 'in front' else 'an'} attention, {words}": (torch.tensor(keep), cut)
            for cut in ("in front", "behind")
            for words, keep in (("three of five stay", [True, False, True, False, True]), ("all stay", [True] * 3))
        },
        show=lambda answer, keep, cut: f"Kept: {keep.tolist()}. Rows: query, key, value.",
        hints=(
            "In front: a dropped token never enters the attention. Whose query, key and value are there at all?",
            "Behind: all tokens took part, but only the outputs of the kept ones are used.",
            "An output uses its own query, and the keys and values of everybody.",
        ),
    ),
    "3": Exercise(
        spec=lambda steps, keep: _annealed(None, steps, keep), run=_along, atol=1 / 196,
        cases={
            "90 steps to a share of 0.3": (90, 0.3), "90 steps to a share of 0.7": (90, 0.7),
            "40 steps, whose corners are no whole steps": (40, 0.5), "nothing is to be dropped": (30, 1.0),
        },
        show=lambda answer, steps, keep: f"The places are steps, of {steps}; the target is {keep}.",
        hints=(
            "Three pieces: up to steps / 30, from steps / 3 on, and between them.",
            "How far along the middle piece is a step? A number from 0 to 1; min and max take care of the rest.",
            "Half a cosine: cos(pi * along) falls from 1 to -1. Move and scale it so that it falls from 1 to 0, then "
            "from 1 to keep.",
        ),
    ),
    "4": Exercise(
        spec=_hard, run=_with_gradient,
        needs={"exactly 0 or 1 in the mask, without rounding": lambda answer, scores, keep: (
            set(answer["mask"].tolist()) <= {0.0, 1.0})},
        cases={
            "two of five": (torch.tensor([0.3, -2.0, 1.5, 0.1, -0.4]), 2),
            "all stay": (torch.tensor([0.2, -0.7, 3.0]), 3),
            "none stays": (torch.tensor([0.2, -0.7, 3.0]), 0),
            "one of six, all below zero": (-torch.tensor([3.0, 0.5, 0.25, 2.0, 0.125, 4.0]), 1),
        },
        hints=(
            "topk finds the places of the best scores; index_fill puts ones there. Where does its gradient go?",
            "x - x.detach() is zero forward. What is its derivative?",
            "Add such a zero, made of the sigmoid, to the hard mask. In (hard + soft) - soft rounding is left over; "
            "brackets around the zero avoid it.",
        ),
    ),
}  # fmt: skip
