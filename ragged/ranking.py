"""The best patches of every image: a ranking that is one launch on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch

MOST = 1024  # patches that one program compares with each other


def best_rows(scores: Tensor, prefix: int, count: int, *, in_place: bool = False) -> Tensor:
    """Row numbers, int64 (batch, prefix + count), of the first `prefix` rows and the `count` best others of every
    image.

    scores: (batch, n), the first `prefix` columns ignored. Best first, or (in_place) in the order in which they stand.
    Of equal scores the earlier is better, and NaN is better than any number. No wait.
    """
    patches = scores.shape[1] - prefix
    if not launch.usable(scores.device) or scores.dtype == torch.float64 or not 0 < patches <= MOST:
        best = scores[:, prefix:].argsort(dim=1, descending=True, stable=True)[:, :count]
        return with_prefix(best.sort(1).values if in_place else best, prefix)
    from triton import next_power_of_2

    from .kernel_simple import rank_kernel

    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    index = torch.empty(scores.shape[0], prefix + count, dtype=torch.int64, device=scores.device)
    width = next_power_of_2(max(patches, prefix, 16))
    constants = {"PREFIX": prefix, "IN_PLACE": in_place, "N": width, "CHUNK": max(1, 16384 // width)}
    key = (scores.dtype, *constants.values())
    numbers = (scores.stride(0), patches, count)
    launch.start(rank_kernel, key, (scores.shape[0], 1), (scores, index), numbers, constants, {})
    return index


def with_prefix(patches: Tensor, prefix: int) -> Tensor:
    """patches: patch numbers (batch, k). Returned as row numbers, with the `prefix` rows put before them."""
    first = torch.arange(prefix, device=patches.device).expand(patches.shape[0], prefix)
    return torch.cat((first, patches + prefix), 1)
