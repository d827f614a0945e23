"""What a pruner sees of a batch, and the rules that turn a score for every token into a selection.

Four published methods are four pairs of a score and a rule. Scores are a grid (batch, n); prefix rows come first and
always stay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .packing import Counts, Packed, Padded, Selection
from .rows import equal_offsets, kept_rows, with_prefix
from .rows.scores import Importance, best_rows, cls_attention, importance, sampled_rows


def run_module(module: nn.Module, *inputs: Tensor) -> Tensor:
    """What module makes of inputs, tensors."""
    return module(*inputs)


@dataclass(frozen=True)
class View:
    """What a pruner may look at. state: the tokens at the place of the cut.  prefix: rows that always stay (CLS, ...).
    stage: 0, 1, ... within the schedule.  cls_attention: float32 (batch, n, nheads), softmax attention of CLS to every
    row.  value_norm: float32 (batch, n), norm of every row's value vector, heads concatenated; both are zero in
    padding, and float64 in a float64 model.  apply: `run_module`, compiled where the model is.  weighed: the parts of
    `importance`, which the sampling kernel adds up itself, undefined in padding. The scores are there only where the
    pruner `needs` them."""

    state: Packed | Padded
    prefix: int
    stage: int
    cls_attention: Tensor | None = None
    value_norm: Tensor | None = None
    apply: Callable[..., Tensor] = run_module
    weighed: Importance | None = None

    @functools.cached_property
    def importance(self) -> Tensor | None:
        """The attention of CLS summed over heads, times `value_norm`: float32 (batch, n), zero in padding. None where
        the pruner does not need it."""
        return None if self.weighed is None else self.weighed.grid()

    @functools.cached_property
    def lengths(self) -> Tensor | int:
        """Rows of every image: one int where all have as many, else int32 (batch,)."""
        state = self.state
        lengths = None if state.count == state.width else state.lengths  # of packed images, it may be a launch
        return state.width if lengths is None else lengths

    def scored(self, needs: frozenset[str], q: Tensor, k: Tensor, v: Tensor, scale: float) -> View:
        """This view with the parts that `needs` names, made of a block's q, k, v (..., nheads, headdim); scale: what
        its scores are multiplied by."""
        state, lead, parts = self.state, q.shape[:-2], dict(vars(self), lengths=self.lengths)
        heads = (q, k, v) if q.dim() == 3 else [x.flatten(0, -3) for x in (q, k, v)]
        places = (state.starts, self.lengths, state.width)
        if "importance" in needs:
            parts["weighed"] = importance(*heads, *places, scale)
        if "attention" in needs:
            seen = parts.get("weighed")
            probs = seen.probs.t() if seen else cls_attention(*heads[:2], *places, scale, fill=False)  # (rows, nheads)
            parts["cls_attention"] = state.grid(probs.unflatten(0, lead))  # (batch, n, nheads)
        if "values" in needs:
            parts["value_norm"] = state.grid(row_norms(v.flatten(-2)))  # (batch, n)
        view = object.__new__(View)  # `dataclasses.replace` asks all fields one by one, and `lengths` may be a launch
        vars(view).update(parts)
        return view

    def real(self) -> Tensor:
        """bool (batch, n): which entries of the grid are rows, and which are padding."""
        column, lengths = torch.arange(self.state.width, device=self.state.tokens.device), self.lengths
        every = isinstance(lengths, int)
        return (column < (lengths if every else lengths[:, None])).expand(self.state.batch, -1)

    def equal_rows(self, method: str) -> int:
        """Real rows per image where all images have the same number, which a fixed ratio needs. Raises ValueError,
        naming `method`, where they have not."""
        if self.state.count is None:
            raise ValueError(f"{method}: a fixed keep ratio needs the same number of tokens in every image")
        return self.state.count

    @property
    def columns(self) -> int:
        """How many columns of the grid hold rows of any image."""
        return self.state.width if self.state.count is None else self.state.count

    def share(self, method: str, share: float, *, of_all: bool = False, up: bool = False) -> int | Counts | None:
        """How many patches of every image a fixed share leaves, of those that are there or (of_all) of all the image
        had, rounded down or `up`: one number, one for each image, or None where no image loses any. Raises ValueError,
        naming `method`, where the host does not know how many patches there are."""
        state, prefix, rounded = self.state, self.prefix, math.ceil if up else math.floor
        if state.rows is None:
            now = self.equal_rows(method) - prefix
            count = min(now, rounded(share * ((state.seqlen if of_all else state.count) - prefix)))
            return None if count == now else count
        now, base = state.rows.plus(-prefix), (state.unpruned if of_all else state.rows).plus(-prefix)
        host = tuple(min(n, rounded(share * of)) for n, of in zip(now.host, base.host, strict=True))
        if host == now.host:
            return None
        shares = base.device.double() * share  # the very numbers that Python has on the host
        return Counts((shares.ceil() if up else shares.floor()).int().minimum(now.device), host)


def row_norms(x: Tensor) -> Tensor:
    """L2 norms of x (..., dim), float32 (...), summed up in at least that precision and without a copy of x in it."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()


# Rules: scores (batch, n) -> Selection. Prefix rows come first and always stay.


def top_k(scores: Tensor, prefix: int, count: int | Counts, *, in_place: bool = False, patches_only: bool = False,
          fuse: bool = False, real: Tensor | None = None) -> Selection:  # fmt: skip
    """The `count` best patches of every image by scores (batch, n), or by the mean of (batch, n, nheads), best first,
    or (in_place) in the order in which they stood. The first `prefix` rows are no patches, and stay; patches_only:
    scores (batch, patches) leave them out. fuse: the others, weighted by their scores, become one token. real, bool
    (batch, n), is False in padding; needed where every image has a count of its own; then scores are (batch, n), the
    first rows have some, and nothing is fused here."""
    if isinstance(count, int):
        index, rest = best_rows(scores, prefix, count, in_place=in_place, patches_only=patches_only, rest=fuse)
        return Selection(index, prefix + count, rest)
    index, _ = best_rows(scores.masked_fill(~real, -math.inf), prefix, max(count.host))
    counts = count.plus(prefix)
    if in_place:
        index = kept(chosen_rows(Selection(index, counts), scores.shape[1]), prefix, real).index
    return Selection(index, counts)


def chosen_rows(selection: Selection, width: int) -> Tensor:
    """bool (batch, width): the rows that `selection`, whose counts differ between images, names."""
    index, counts = selection.index, selection.counts
    taken = torch.arange(index.shape[1], device=index.device) < counts.device[:, None]
    return torch.zeros(len(index), width, dtype=torch.bool, device=index.device).scatter(1, index, taken)


def at_least(scores: Tensor, prefix: int, limit: Tensor, real: Tensor) -> Selection:
    """The patches of scores (batch, n) that reach limit (batch, 1), in the order in which they stood; their number
    varies. The first `prefix` rows stay anyway; real, bool (batch, n), is False in padding."""
    return kept(scores >= limit, prefix, real)


def kept(keep: Tensor, prefix: int, real: Tensor) -> Selection:
    """The rows that keep, bool (batch, n), marks, in the order in which they stand. The first `prefix` rows stay
    anyway; real, bool (batch, n), is False in padding."""
    batch, n = keep.shape
    index, counts = kept_rows(keep & real, equal_offsets(batch, n, keep.device), n, prefix)
    alike = real.stride(0) == 0  # one line for all images: none of them is without rows
    return Selection(index, counts if alike else counts.minimum(real.sum(1, dtype=torch.int32)))


def inverse_cdf(scores: Tensor | Importance, prefix: int, samples: int, lengths: Tensor | int) -> Selection:
    """Adaptive sampling: where the scores are concentrated, many sample points hit the same patch, and few stay.

    The scores of an image behind its `prefix`, sorted and summed up, make a staircase from 0 to 1. `samples` evenly
    spaced heights, from the first positive step to 1, each pick the nearest step; patches picked more than once stay
    once, lowest score first. scores: (batch, n), or their parts.  lengths: rows of each image, int32 (batch,), or one
    int for all.
    """
    if (sampled := sampled_rows(scores, prefix, samples, lengths)) is not None:
        return Selection(*sampled)
    scores = scores.grid() if isinstance(scores, Importance) else scores
    scores, column = scores[:, prefix:].float(), torch.arange(prefix, scores.shape[1], device=scores.device)
    real = (column < (lengths if isinstance(lengths, int) else lengths[:, None])).expand(scores.shape)
    if scores.shape[1] == 0:  # no patch is left in any image: nothing to choose from
        none = real.sum(1, dtype=torch.int32)
        return Selection(with_prefix(real.long(), prefix), _of_those_there(none + prefix, lengths))
    ranked, order = torch.where(real, scores, math.inf).sort(dim=1, stable=True)
    real = real.gather(1, order)
    cdf = torch.where(real, ranked, 0.0).cumsum(1)
    cdf = cdf / cdf[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)
    low, high = cdf[:, :1], cdf[:, -1:]
    cdf = (cdf - low) / torch.where(high > low, high - low, 1.0)
    cdf = torch.where(real, cdf, 2.0)  # past every height, so that padding is never the nearest step
    start = torch.where(cdf > 0, cdf, 2.0).amin(1, keepdim=True).clamp_max(1.0)
    height = start + (1.0 - start) * torch.linspace(0.0, 1.0, samples, device=cdf.device, dtype=torch.float32)
    last = cdf.shape[1] - 1  # among NaNs a search ends past it
    above = torch.searchsorted(cdf, height).clamp_max(last)
    below = torch.searchsorted(cdf, cdf.gather(1, (above - 1).clamp_min(0))).clamp_max(last)  # the first of equal steps
    nearer = (cdf.gather(1, above) - height).abs() < (height - cdf.gather(1, below)).abs()
    picked = torch.zeros_like(real).scatter_(1, torch.where(nearer, above, below), True)
    steps = kept(picked, 0, real)
    return Selection(with_prefix(order.gather(1, steps.index), prefix), _of_those_there(steps.counts + prefix, lengths))


def _of_those_there(counts: Tensor, lengths: Tensor | int) -> Tensor:
    return counts.clamp_max(lengths) if isinstance(lengths, int) else counts.minimum(lengths)


def chance(batch: int, columns: int, numbers: Sequence[int], device: torch.device) -> Tensor:
    """Pseudo-random float32 (batch, columns) in [0, 1) on `device`, each a hash of `numbers`, its row and its column:
    no state moves on, so that a captured pass, another layout and another backend see the same."""

    def mixed(x: Any, more: Any) -> Any:  # the integer hash "lowbias32", of ints or of int64 tensors
        x = (x + more) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 16)

    rows = mixed(functools.reduce(mixed, numbers, 0), torch.arange(batch, device=device))
    return (mixed(rows[:, None], torch.arange(columns, device=device)) >> 8).float() * 2.0**-24
