"""Exercises of lesson 08."""

import math

import torch

from ...data.evidence import UNTESTED
from ..exercises import Exercise

NAN = math.nan


def _standing(claims, share):
    """Claim by claim: the part of the gain that arrived."""
    parts = [(m - 1) / (c - 1) if c > 1 else (1 / m - 1) / (1 / c - 1) for c, m in claims]
    return sum(part >= share for part in parts)


def _shares(wall, gpu):
    wall, gpu = torch.tensor(wall, dtype=torch.float64), torch.tensor(gpu, dtype=torch.float64)
    return torch.stack((wall.min() / wall, (wall - gpu) / wall), 1).tolist()


def _typical(slow, fast):
    slow, fast = torch.tensor(slow, dtype=torch.float64), torch.tensor(fast, dtype=torch.float64)
    return (slow / fast).log().mean().exp().item()


def _settled(ratios, limit, alike):
    sides = [ratio < limit for ratio in ratios.values() if not math.isnan(ratio)]
    wanted = sides.count(bool(alike))
    if not sides:
        return UNTESTED
    return "upheld" if wanted == len(sides) else "upheld at some batches only" if wanted else "not upheld"


EXERCISES = {
    "1": Exercise(
        spec=_standing,
        cases={
            "two gains, half is asked": ([(2.0, 1.6), (2.0, 1.4)], 0.5), "exactly half arrived": ([(2.0, 1.5)], 0.5),
            "claims below 1": ([(0.5, 0.6), (0.25, 0.3)], 0.5), "a gain that turned into a loss": ([(1.5, 0.9)], 0.25),
            "a claim below 1 that turned into a loss": ([(0.5, 1.2)], 0.25),
            "small and large gains, nearly all is asked": ([(1.05, 1.06), (85.0, 30.0), (2.0, 1.6)], 0.9),
            "no claims": ([], 0.5),
        },
        hints=(
            "A ratio of 2 is a gain of 1: what is above 1 is the gain.",
            "A claim of 0.5 says 'half the time'. Turned round it says 'twice as fast'. What happens to the measured "
            "ratio when you turn the claim round?",
            "Compare measured - 1 with share * (claimed - 1), and count.",
        ),
    ),
    "2": Exercise(
        spec=_shares,
        cases={
            "three lengths": ([63.0, 62.0, 113.0], [13.0, 14.0, 62.0]), "a single length": ([50.0], [20.0]),
            "a GPU that is always busy": ([100.0, 200.0, 400.0], [100.0, 200.0, 400.0]),
            "a GPU that does nothing": ([60.0, 60.0], [0.0, 0.0]),
        },
        show=lambda answer, wall, gpu: f"Given: wall {wall}, gpu {gpu}. Columns: the paper's share, the fair one.",
        hints=(
            "The floor is one number for all lengths: the least wall time.",
            "While the GPU runs the call nothing is overhead. Which part of the wall time is left?",
            "One pair for each length: zip walks through both lists at once.",
        ),
    ),
    "3": Exercise(
        spec=_typical,
        cases={
            "a single case": ([3.0], [2.0]), "the same everywhere": ([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]),
            "twice as fast here, half as fast there": ([2.0, 1.0], [1.0, 2.0]),
            "one case takes a thousand times longer": ([2.0, 2.0, 1000.0], [1.0, 1.0, 2000.0]),
            "ratios from 0.5 to 8": ([1.0, 4.0, 8.0], [2.0, 2.0, 1.0]),
        },
        hints=(
            "Twice as fast and half as fast should cancel. What is the mean of 2 and 1/2, and what is their product?",
            "The geometric mean of n numbers is the n-th root of their product.",
            "Or: the mean of the logarithms, then the exponential of it. That does not overflow.",
        ),
    ),
    "4": Exercise(
        spec=_settled,
        cases={
            "every batch above the limit": ({4: 1.4, 16: 1.5}, 1.1, False),
            "one batch below it": ({4: 1.4, 16: 1.05}, 1.1, False),
            "no batch above it": ({4: 1.0, 16: 0.9}, 1.1, False),
            "the two sides should be alike": ({4: 1.02, 64: 0.95}, 1.1, True),
            "they should be alike and are not": ({4: 1.4, 64: 2.0}, 1.1, True),
            "a batch that nobody recorded": ({4: 1.4, 32: NAN, 64: 1.3}, 1.1, False),
            "nothing recorded": ({4: NAN, 16: NAN}, 1.1, False),
        },
        show=lambda answer, ratios, limit, alike: f"Given: {ratios}, limit {limit}, alike={alike}.",
        hints=(
            "First leave out what is not recorded: NaN is the one number that differs from itself.",
            "For each ratio left: does it lie on the side of the limit that the objection needs? (ratio < limit) == "
            "alike says so in one comparison.",
            "all(...) and any(...) tell the three outcomes apart. What does all() say of an empty list?",
        ),
    ),
}  # fmt: skip
