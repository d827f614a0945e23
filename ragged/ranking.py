"""The best patches of every image: a ranking that is one launch on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch

# Patches that one program compares with each other. 256 x 196 of them, half kept: 8 us, against 29 us for `topk` and
# `sort` (H200); 64 x 576: 43 against 58 us.
MOST = 1024


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
    # every keep rate leaves another number of patches: those of an ordinary image share one kernel
    width = max(256, next_power_of_2(max(patches, prefix)))
    constants = {"PREFIX": prefix, "IN_PLACE": in_place, "N": width, "CHUNK": 32}
    key = (scores.dtype, *constants.values())
    numbers, options = (scores.stride(0), patches, count), {"num_warps": 8 if width == 256 else 16}
    launch.start(rank_kernel, key, (scores.shape[0], 1), (scores, index), numbers, constants, options)
    return index


def with_prefix(patches: Tensor, prefix: int) -> Tensor:
    """patches: patch numbers (batch, k). Returned as row numbers, with the `prefix` rows put before them."""
    first = torch.arange(prefix, device=patches.device).expand(patches.shape[0], prefix)
    return torch.cat((first, patches + prefix), 1)
