"""What a pruner sees, and the three rules that turn scores into a selection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Packed, Padded, Selection
from .ranking import best_rows, with_prefix


@dataclass(frozen=True)
class View:
    """What a pruner may look at. state: the tokens at the place of the cut.  prefix: rows that always stay (CLS, ...).
    stage: 0, 1, ... within the schedule.  cls_attention: float32 (batch, n, nheads), softmax attention of CLS to every
    row.  value_norm: float32 (batch, n), norm of every row's value vector, heads concatenated. The last two only where
    the pruner `needs` them; both are zero in padding."""

    state: Packed | Padded
    prefix: int
    stage: int
    cls_attention: Tensor | None = None
    value_norm: Tensor | None = None

    def real(self) -> Tensor:
        """bool (batch, n): which entries of the grid are rows, and which are padding."""
        column = torch.arange(self.state.width, device=self.state.tokens.device)
        lengths = self.state.lengths
        return (column < lengths[:, None]) if lengths is not None else (column >= 0).expand(self.state.batch, -1)

    def equal_rows(self, method: str) -> int:
        """Real rows per image where all images have the same number, which a fixed ratio needs. Raises ValueError,
        naming `method`, where they have not."""
        if self.state.count is None:
            raise ValueError(f"{method}: a fixed keep ratio needs the same number of tokens in every image")
        return self.state.count


def row_norms(x: Tensor) -> Tensor:
    """L2 norms of x (..., dim), float32 (...), summed up in at least that precision and without a copy of x in it."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()


# Rules: scores (batch, n) -> Selection. Prefix rows come first and always stay.


def top_k(scores: Tensor, prefix: int, count: int, *, in_place: bool = False) -> Selection:
    """The `count` best patches of every image by scores (batch, n), best first, or (in_place) in the order in which
    they stood. The first `prefix` rows are no patches, and stay."""
    return Selection(best_rows(scores, prefix, count, in_place=in_place), prefix + count)


def at_least(scores: Tensor, prefix: int, limit: Tensor, real: Tensor) -> Selection:
    """The patches of scores (batch, n) that reach limit (batch, 1), in the order in which they stood; their number
    varies. The first `prefix` rows stay anyway; real, bool (batch, n), is False in padding."""
    keep = (scores >= limit) & real
    return Selection(kept_first(keep, prefix), keep[:, prefix:].sum(1, dtype=torch.int32) + prefix)


def kept_first(keep: Tensor, prefix: int) -> Tensor:
    """All row numbers of every image, int64 like keep, bool (batch, n): the first `prefix` rows, then those to keep,
    then the others, each in the order in which they stood."""
    return best_rows(keep.to(torch.float32), prefix, keep.shape[1] - prefix)


def inverse_cdf(scores: Tensor, prefix: int, samples: int, real: Tensor) -> Selection:
    """Adaptive sampling: where the scores are concentrated, many sample points hit the same patch, and few stay.

    The scores (batch, n) of an image behind its `prefix`, where `real` (batch, n), sorted and summed up, make a
    staircase from 0 to 1. `samples` evenly spaced heights, from the first positive step to 1, each pick the nearest
    step; patches picked more than once stay once, lowest score first.
    """
    scores, real = scores[:, prefix:].float(), real[:, prefix:]
    if scores.shape[1] == 0:  # no patch is left in any image: nothing to choose from
        return Selection(with_prefix(real.long(), prefix), real.sum(1, dtype=torch.int32) + prefix)
    ranked, order = torch.where(real, scores, math.inf).sort(1)
    real = real.gather(1, order)
    cdf = torch.where(real, ranked, 0.0).cumsum(1)
    cdf = cdf / cdf[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)
    low, high = cdf[:, :1], cdf[:, -1:]
    cdf = (cdf - low) / torch.where(high > low, high - low, 1.0)
    cdf = torch.where(real, cdf, 2.0)  # past every height, so that padding is never the nearest step
    start = torch.where(cdf > 0, cdf, 2.0).amin(1, keepdim=True).clamp_max(1.0)
    height = start + (1.0 - start) * torch.linspace(0.0, 1.0, samples, device=cdf.device)
    last = cdf.shape[1] - 1  # among NaNs a search ends past it
    above = torch.searchsorted(cdf, height).clamp_max(last)
    below = torch.searchsorted(cdf, cdf.gather(1, (above - 1).clamp_min(0))).clamp_max(last)  # the first of equal steps
    nearer = (cdf.gather(1, above) - height).abs() < (height - cdf.gather(1, below)).abs()
    picked = torch.zeros_like(real).scatter_(1, torch.where(nearer, above, below), True) & real
    rows = order.gather(1, kept_first(picked, 0))
    return Selection(with_prefix(rows, prefix), picked.sum(1, dtype=torch.int32) + prefix)
