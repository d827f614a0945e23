"""Small races on the machine at hand, for lessons: enough rounds, everybody in turn, and an answer only where the
rounds agree on one.

Contestants are compared round by round, so that what slows a whole round down does not count. `ragged.bench.rounds` is
what records measurements; it has more clocks, and more patience.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from ..data.evidence import MARK, SPREAD
from .timing import stats, wait

FASTER, SLOWER, ALIKE, NOISY = WORDS = ("faster", "slower", "alike", "too noisy to rank")
AGREE = 0.8  # of the rounds must be on one side
CLOSE = 0.05  # around 1, or a prediction: alike
FEW = 5  # with fewer rounds nothing is ranked


class Standing(NamedTuple):
    """How many times as fast a contestant was as its rival: median over the rounds, 20 % and 80 % quantile.

    word: one of WORDS."""

    ratio: float
    q20: float
    q80: float
    word: str

    @property
    def unsure(self) -> bool:
        """Whether the rounds agree too little on the size to name one."""
        return self.q80 > SPREAD * self.q20

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.q20:.2f} to {self.q80:.2f})" + MARK * self.unsure

    def beside(self, predicted: float) -> str:
        """What the rounds say about a predicted ratio: as, less or more than predicted, or that they are too noisy."""
        if self.q80 < predicted * (1 - CLOSE):
            return "less than predicted"
        if self.q20 > predicted * (1 + CLOSE):
            return "more than predicted"
        near = abs(self.ratio / predicted - 1) <= 2 * CLOSE
        return "as predicted" if near and not self.unsure else NOISY


def race(contestants: Mapping[Hashable, Callable[[], object]], rounds: int = 15, calls: int = 1, seed: int = 0) -> dict:
    """Time every contestant once a round, in shuffled order, after a round that warms up: {name: [µs, ...]}.

    contestants: name to a function without arguments; the GPU, if there is one, is waited for.  rounds: at least 1,
    else ValueError.  calls: so many calls, one behind the other, make one time, their mean.  seed: of the order.
    """
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds, calls: expected 1 or more, got {rounds} and {calls}")
    names, order = list(contestants), random.Random(seed)
    times = {name: [] for name in names}
    for turn in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            wait()
            start = time.perf_counter_ns()
            for _ in range(calls):
                contestants[name]()
            wait()
            if turn:
                times[name].append((time.perf_counter_ns() - start) / 1e3 / calls)
    return times


def standing(times: Sequence[float], rival: Sequence[float]) -> Standing:
    """How a contestant stands to its rival, whose times come from the same rounds; ValueError for unequal numbers.

    Faster or slower: in four of five rounds at least. Alike: within 5 % in the middle of the rounds. Otherwise, and
    with fewer than five rounds, too noisy to rank.
    """
    if len(times) != len(rival) or not len(times):
        raise ValueError(f"times, rival: expected the times of the same rounds, got {len(times)} and {len(rival)}")
    ratios = [theirs / own for own, theirs in zip(times, rival)]
    middle, low, high = stats(ratios)
    wins = sum(ratio > 1 for ratio in ratios) / len(ratios)
    if len(ratios) < FEW:
        word = NOISY
    elif 1 - CLOSE <= low and high <= 1 + CLOSE:
        word = ALIKE
    else:
        word = FASTER if wins >= AGREE else SLOWER if wins <= 1 - AGREE else NOISY
    return Standing(middle, low, high, word)


def speeds(times: Mapping[Hashable, Sequence[float]], images: int | Mapping[Hashable, int]) -> dict:
    """Images per second of every contestant as columns of a row: {name: {value, q20, q80}}. images: of one call, the
    same for all or by name."""
    found = {}
    for name, own in times.items():
        batch = images if isinstance(images, int) else images[name]
        middle, low, high = stats([1e6 * batch / us for us in own])
        found[name] = dict(value=middle, q20=low, q80=high)
    return found


def table_rows(times: Mapping[Hashable, Sequence[float]], base: Hashable, predicted: Mapping[Hashable, float]) -> list:
    """A row for every contestant: name, milliseconds (median), the predicted ratio to `base`, the measured one with its
    spread, and what the rounds say about both."""
    rows = []
    for name, own in times.items():
        stand = standing(own, times[base])
        row = {"pipeline": str(name), "ms": stats(own).median / 1e3}
        if name == base:
            row |= {"predicted": "1.00x", "measured (20 to 80 %)": "1.00x", "the rounds say": "-"}
        else:
            row |= {"predicted": f"{predicted[name]:.2f}x", "measured (20 to 80 %)": str(stand),
                    "the rounds say": said(stand, predicted[name])}  # fmt: skip
        rows.append(row)
    return rows


def said(stand: Standing, predicted: float) -> str:
    """Rank and prediction in words; only that it is noisy where the rounds agree on no rank."""
    if stand.word == NOISY:
        return NOISY
    beside = stand.beside(predicted)
    if beside == NOISY:
        beside = "size unsure" if stand.unsure else "prediction undecided"
    return f"{stand.word}, {beside}"
