"""Exercises of lesson 11."""

import torch

from ..exercises import Exercise


def _by_distance(p, q):
    """One minus half of the distance between the two."""
    return 1 - (p - q).abs().sum().item() / 2


def _upwards(parent):
    """From every node up to the root."""
    sees = torch.zeros(len(parent), len(parent), dtype=torch.bool)
    for node in range(len(parent)):
        above = node
        while above >= 0:
            sees[node, above] = True
            above = parent[above]
    return sees


def _by_trying(step, tree, guess):
    """Halve the interval in which it must lie."""
    low, high = -1.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if guess + tree <= step * (middle + 1) else (middle, high)
    return high


EXERCISES = {
    "1": Exercise(
        spec=_by_distance,
        cases={
            "the same distribution": (torch.tensor([0.9, 0.1]), torch.tensor([0.9, 0.1])),
            "nothing in common": (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])),
            "a fair coin guesses an unfair one": (torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])),
            "five tokens": (torch.tensor([0.45, 0.25, 0.15, 0.10, 0.05]), torch.tensor([0.15, 0.15, 0.40, 0.20, 0.10])),
            "a token that the draft never guesses": (torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.6, 0.4])),
        },
        hints=(
            "A guess x comes with probability q(x), and is then kept with probability min(1, p(x)/q(x)).",
            "Multiply the two for each x, and add over all x. What is q times min(1, p/q), without a fraction?",
            "torch.minimum compares two tensors number by number.",
        ),
    ),
    "2": Exercise(
        spec=_upwards,
        cases={
            "a root alone": ([-1],), "a chain": ([-1, 0, 1, 2],), "three siblings": ([-1, 0, 0, 0],),
            "two branches of two": ([-1, 0, 0, 1, 2],), "branches of unequal length": ([-1, 0, 0, 1, 1, 4, 2],),
        },
        show=lambda answer, parent: f"Given: parent {parent}. Rows: who looks; columns: who is seen.",
        hints=(
            "Every node sees itself: begin with torch.eye(n, dtype=torch.bool).",
            "A parent has a smaller number than its children, so its row is finished before theirs.",
            "A node sees itself and all that its parent sees: one | for each node but the root.",
        ),
    ),
    "3": Exercise(
        spec=_by_trying, rtol=1e-4,
        cases={
            "a tree costs what a token costs": (100.0, 100.0, 60.0), "a tree costs more": (100.0, 250.0, 60.0),
            "guesses are expensive": (80.0, 90.0, 400.0), "guesses are free, trees cheap: always": (100.0, 60.0, 0.0),
        },
        hints=(
            "A step of speculation takes guess + tree, and yields L + 1 tokens. How long does a token take?",
            "Plain decoding takes `step` for a token. Set the two equal, and solve for L.",
        ),
    ),
}  # fmt: skip
