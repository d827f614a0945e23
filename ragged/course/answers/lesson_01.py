"""Exercises of lesson 01."""

import itertools

from ...plots.call import PEAKS
from ..exercises import Exercise


def _simulated(n, host, gpu, every=0):
    """Call by call; every so many calls the host waits until the GPU is done."""
    now = free = 0.0
    for i in range(1, n + 1):
        now += host
        free = max(now, free) + gpu
        if every and i % every == 0:
            now = free
    return max(now, free)


def _least_us(tokens, batch, gpu):
    peak, bandwidth = PEAKS[gpu]
    return 1e6 * max(batch * (4 * tokens**2 * 768) / peak, batch * (4 * tokens * 768 * 2) / bandwidth)


def _by_search(host, tokens, gpu):
    return next(batch for batch in itertools.count(1) if _least_us(tokens, batch, gpu) >= host)


def _gains(host, gpu, ratio):
    """A lone call, and a thousand in the middle of a stream."""
    alone = _simulated(1, host, gpu) / _simulated(1, host, gpu / ratio)
    stream, pruned = (_simulated(2000, host, g) - _simulated(1000, host, g) for g in (gpu, gpu / ratio))
    return alone, stream / pruned


EXERCISES = {
    "1": Exercise(
        spec=_simulated,
        cases={
            "a lone call": (1, 40.0, 13.0), "two calls, a slow host": (2, 40.0, 13.0),
            "twelve calls, both alike": (12, 40.0, 40.0), "twelve calls, a slow GPU": (12, 5.0, 90.0),
            "a hundred calls": (100, 7.0, 6.5),
        },
        hints=(
            "Look at the timeline. Which worker never pauses once it has started?",
            "The slower worker's time counts n times. How often does the faster one's?",
            "The GPU's last kernel follows the last launch; or the first launch comes before the first kernel.",
        ),
    ),
    "2": Exercise(
        spec=_by_search,
        cases={
            "39 tokens on an H200, a host of 75 µs": (75.0, 39, "NVIDIA H200"),
            "197 tokens on an A100, a host of 12 µs": (12.0, 197, "NVIDIA A100-SXM4-40GB"),
            "577 tokens on a T4": (75.0, 577, "Tesla T4"),
            "a host so quick that one image is enough": (0.01, 197, "NVIDIA H200"),
            "exactly as long as the host, to the last digit": (7 * _least_us(39, 1, "NVIDIA H200"), 39, "NVIDIA H200"),
        },
        hints=(
            "predicted_us grows in proportion to the batch. What is it for one image?",
            "Divide the host's time by that, and round. Up or down?",
            "A division may end beside a whole number by a hair. Ask predicted_us whether the batch before would do.",
        ),
    ),
    "3": Exercise(
        spec=lambda n, every, host, gpu: _simulated(n, host, gpu, every),
        cases={
            "a wait after every call": (4, 1, 40.0, 13.0), "two groups of three": (6, 3, 40.0, 13.0),
            "a slow GPU": (6, 3, 5.0, 90.0), "the last group is not full": (7, 3, 40.0, 13.0),
            "fewer calls than a group has": (2, 5, 40.0, 13.0),
        },
        hints=(
            "After a wait the GPU is idle, and the host begins anew. What does one group of calls cost?",
            "Exercise 1 gives the time of a group. How many groups are full, and how many calls are left?",
            "stream_us is for n >= 1: an empty group at the end costs nothing.",
        ),
    ),
    "4": Exercise(
        spec=_gains,
        cases={
            "the host is slow: the stream gains nothing": (40.0, 13.0, 4.0),
            "the GPU is slow enough before and after": (10.0, 200.0, 4.0),
            "the GPU was slower, and no longer is": (40.0, 100.0, 5.0), "nothing is pruned": (40.0, 13.0, 1.0),
        },
        show=lambda answer, *_: "The order is: a lone call, then a stream.",
        hints=(
            "What does a lone call cost, in host and GPU time? What does one of a long stream?",
            "Pruning divides the GPU's time by the ratio. The host's stays as it is.",
            "Each gain is a time before over a time after: of sums for a lone call, of maxima for a stream.",
        ),
    ),
}  # fmt: skip
