"""Two groups of warps that share a few stages of memory, watched tick by tick: what lesson 02 draws, and asks for."""

from __future__ import annotations

from collections.abc import Sequence

COPY, COMPUTE = 0, 1


def handover(copies: Sequence[int], computes: Sequence[int], stages: int) -> list[tuple[int, int, int, int]]:
    """When each item is copied and computed: bars of (COPY or COMPUTE, first tick, ticks, item), as
    `plots.program_schedule` draws them.

    copies, computes: ticks of each item, at least 1.  stages: items that can lie in shared memory at a time, at least
    1. ValueError where these do not fit.
    """
    if len(copies) != len(computes) or min([*copies, *computes, stages]) < 1:
        raise ValueError(f"copies, computes and stages: expected as many copies as products, and numbers from 1 on, "
                         f"got {list(copies)}, {list(computes)} and {stages}")  # fmt: skip
    bars: list[tuple[int, int, int, int]] = []
    free, full, tick = stages, 0, 0  # stages that are empty, items that lie ready
    begun, left = [0, 0], [0, 0]  # of copies and of products: how many were begun, and the ticks left of the last one
    while begun[COMPUTE] < len(computes) or left[COMPUTE]:
        if not left[COPY] and free and begun[COPY] < len(copies):
            free, left[COPY] = free - 1, copies[begun[COPY]]
            bars.append((COPY, tick, left[COPY], begun[COPY]))
            begun[COPY] += 1
        if not left[COMPUTE] and full:
            full, left[COMPUTE] = full - 1, computes[begun[COMPUTE]]
            bars.append((COMPUTE, tick, left[COMPUTE], begun[COMPUTE]))
            begun[COMPUTE] += 1
        tick += 1
        for worker in (COPY, COMPUTE):
            if left[worker]:
                left[worker] -= 1
                done = not left[worker]
                full, free = full + (done and worker == COPY), free + (done and worker == COMPUTE)
    return bars


def equal_items(copy: int, compute: int, stages: int, items: int = 8) -> list[tuple[int, int, int, int]]:
    """`handover` of so many items that take the same ticks, at least 1, to copy and to compute."""
    return handover([copy] * items, [compute] * items, stages)
