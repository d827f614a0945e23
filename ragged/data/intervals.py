"""How sure a number counted over so many images is: 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..checks import check_int

Z95 = 1.959963984540054  # standard deviations on either side of 95 % of a normal distribution


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval, low and high, for a share in [0, 1] of n independent cases. ValueError for others."""
    check_int("n", n, 1)
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share!r}")
    middle, scale = (share + Z95**2 / (2 * n)), 1 + Z95**2 / n
    reach = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def rank_correlation(x: Sequence[float], y: Sequence[float], resamples: int = 1000,
                     seed: int = 0) -> tuple[float, np.ndarray]:  # fmt: skip
    """Spearman's rank correlation of two equally long lists of numbers, and what it is in `resamples` samples of the
    same pairs, drawn with replacement from `seed`: float64 (resamples,), sorted. Their 2.5 and 97.5 % points are the
    bootstrap's 95 % interval. Samples in which one list is constant have no correlation and are left out; NaN where
    that is so of the lists themselves. Needs SciPy, which scikit-learn brings. ValueError for lists of other lengths.
    """
    from scipy.stats import rankdata

    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x and y: expected two equally long lists of at least two numbers, got {len(x)} and {len(y)}")
    pairs = np.array((x, y), dtype=np.float64)
    check_int("resamples", resamples, 1)

    def correlation(drawn: np.ndarray) -> float:
        ranks = rankdata(drawn, axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        below = math.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
        return float(ranks[0] @ ranks[1]) / below if below else math.nan

    rng = np.random.default_rng(seed)
    found = [correlation(pairs[:, rng.integers(0, pairs.shape[1], pairs.shape[1])]) for _ in range(resamples)]
    return correlation(pairs), np.sort([value for value in found if value == value])
