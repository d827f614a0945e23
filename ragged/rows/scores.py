"""The host's side of the kernels that score rows and choose among them: how much CLS attends to each, DynamicViT's
scorer, ranking, and sampling. Triton where it runs, PyTorch elsewhere; neither waits for the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import launch
from ..kernels import flow
from . import with_prefix

MOST_RANKED = 1024  # patches that one program compares, faster than `topk` and `sort` (times: data/results/notes.md)
# Numbers in the patches of a batch, and their width, up to which `patch_scores` is ahead of the compiled predictor.
MOST_SCORED, WIDEST = 400_000, 384

# ---- scores ----


def cls_attention(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor | int, width: int, scale: float,
                  fill: bool = True) -> Tensor:  # fmt: skip
    """How much CLS attends to every row of its image: softmax(q[start] . k) per image and head.

    q, k: (rows, nheads, headdim), any strides.  starts, lengths: int32 (batch,), image b owns rows starts[b] to
    starts[b] + lengths[b]; one int where all are equally long.  width: no image is longer.  Returns float32 (rows,
    nheads), float64 of such; rows that no image owns are zero, or without `fill` undefined. One row of the attention
    matrix per head: O(n), never O(n²).
    """
    if flow.wanted(q, k):
        return flow.Looked.apply(q, k, _cls_attention, starts, lengths, width, scale)
    return _cls_attention(q, k, starts, lengths, width, scale, fill)


def _cls_attention(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor | int, width: int, scale: float,
                   fill: bool = True) -> Tensor:  # fmt: skip
    if launch.usable(q.device) and q.dtype != torch.float64:
        return _launch_cls(q, k, None, starts, lengths, width, scale, fill)[0]
    lengths = torch.full_like(starts, lengths) if isinstance(lengths, int) else lengths
    return _cls_attention_torch(q, k, starts, lengths, width, scale)


def _launch_cls(q: Tensor, k: Tensor, v: Tensor | None, starts: Tensor, lengths: Tensor | int, width: int, scale: float,
                fill: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ..kernels.scores import cls_kernel

    rows, heads, dim = q.shape
    equal = lengths if isinstance(lengths, int) else 0
    all_owned = equal * starts.shape[0] == rows or not fill
    shape = (rows, heads) if v is None else (heads, rows)
    probs = (torch.empty if all_owned else torch.zeros)(shape, device=q.device, dtype=torch.float32)
    values = k if v is None else v
    squares = probs if v is None else torch.empty_like(probs)
    constants = launch.strides_of(Q=q.stride(), K=k.stride(), V=values.stride()) | launch.head_of(heads, dim)
    once = 64 < width <= 256 and dim <= 64  # then all keys fit into one tile, and nothing is read twice
    constants |= {"N": 256 if once else 64, "ONCE": once, "VALUES": v is not None}
    key, options = (q.dtype, k.dtype, values.dtype, *constants.values()), {"num_warps": 8 if once else 4}
    tensors = (q, k, values, probs, squares, starts, starts if equal else lengths)
    numbers = (scale * launch.LOG2_E, equal, rows)
    launch.start(cls_kernel, key, (heads * starts.shape[0], 1), tensors, numbers, constants, options)
    return probs, squares


def _cls_attention_torch(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor, width: int, scale: float) -> Tensor:
    column = torch.arange(width, device=q.device)
    real = column < lengths[:, None]  # (batch, width)
    rows = torch.where(real, starts[:, None] + column, 0)
    first = torch.where(lengths > 0, starts, 0)
    exact = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # scores are float32 whatever it says
        scores = torch.einsum("bhd,bnhd->bnh", q[first].to(exact), k[rows].to(exact)) * scale
    probs = scores.masked_fill(~real[..., None], -math.inf).softmax(1)  # (batch, width, nheads)
    out = torch.zeros((q.shape[0] + 1, q.shape[1]), device=q.device, dtype=exact)
    # padding columns all land in one extra row, which is cut off
    return out.index_copy_(0, torch.where(real, rows, q.shape[0]).flatten(), probs.flatten(0, 1))[:-1]


class Importance(NamedTuple):
    """How much CLS attends to a row, over all heads, times the norm of the row's values in all heads, not yet added up.

    probs: float32 (nheads, rows), what `cls_attention` returns, undefined where no image has a row.  squares: float32
    (nheads, rows), squared norms of each head's values; or None, and v, (rows, nheads, headdim), is asked.  starts,
    lengths, width: as in `cls_attention`.
    """

    probs: Tensor
    squares: Tensor | None
    v: Tensor
    starts: Tensor
    lengths: Tensor | int
    width: int

    def grid(self) -> Tensor:
        """The importance of every row, float32 (batch, width), zero where an image has no row."""
        if self.squares is None:
            wide = torch.promote_types(self.v.dtype, torch.float32)
            norms = torch.linalg.vector_norm(self.v.flatten(-2), dim=-1, dtype=wide).float()  # (rows,)
        else:
            norms = self.squares.sum(0).sqrt()
        scores, starts, lengths = self.probs.sum(0) * norms, self.starts, self.lengths
        column = torch.arange(self.width, device=scores.device)
        real = column < (lengths if isinstance(lengths, int) else lengths[:, None])
        real = real.expand(starts.shape[0], -1)  # (batch, width)
        return torch.where(real, scores[torch.where(real, starts[:, None] + column, 0)], 0.0)


def importance(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor | int, width: int,
               scale: float) -> Importance:  # fmt: skip
    """The parts of every row's importance, in one launch; v like q and k, the rest as in `cls_attention`."""
    places = (starts, lengths, width)
    if not launch.usable(q.device) or q.dtype == torch.float64 or flow.wanted(q, k, v):
        return Importance(cls_attention(q, k, *places, scale).t(), None, v, *places)
    return Importance(*_launch_cls(q, k, v, *places, scale, fill=False), v, *places)


def patch_scores(x: Tensor, starts: Tensor | None, lengths: Tensor | int, prefix: int, patches: int, norm: nn.LayerNorm,
                 layers: Sequence[nn.Linear]) -> Tensor | None:  # fmt: skip
    """DynamicViT's scores float32 (batch, patches) of tokens x (rows, dim), -inf where an image has no patch, or None:
    the kernels do not run. starts, lengths: as in `cls_attention`; equal lengths need no starts.  prefix: so many rows
    are no patches.  patches: of the largest image.  norm, layers: a `Predictor`'s."""
    dim, weights = x.shape[1], [norm.weight, norm.bias, *(t for layer in layers for t in (layer.weight, layer.bias))]
    equal = lengths if isinstance(lengths, int) else 0
    batch = x.shape[0] // equal if equal else lengths.shape[0]
    plain = all(t is not None and t.dtype == x.dtype and t.device == x.device and t.is_contiguous() for t in weights)
    plain &= dim % 8 == 0 and dim <= WIDEST and x.dtype in (torch.float16, torch.bfloat16)
    if not launch.usable(x.device) or not plain or torch.is_autocast_enabled(x.device.type) or flow.wanted(x, *weights):
        return None
    from ..kernels.scorer import score_patches

    places = (torch.empty(1, dtype=torch.int32, device=x.device),) * 2 if equal else (starts, lengths)
    return score_patches(x.contiguous(), places, equal, batch, prefix, patches, norm.eps, weights)


# ---- which rows ----


def best_rows(scores: Tensor, prefix: int, count: int, *, in_place: bool = False, patches_only: bool = False,
              rest: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Row numbers, int64 (batch, prefix + count), of the first `prefix` rows and the `count` best others of every
    image; and, if `rest` is wanted, float32 (batch, n), the scores of the patches that are not among them, else zero.

    scores: (batch, n), or (batch, n, nheads), and the mean over the last counts; the first `prefix` columns ignored, or
    (patches_only) not there. Best first, or (in_place) in the order in which they stand. Of equal scores the earlier is
    better, and NaN is better than any number.
    """
    skip = 0 if patches_only else prefix
    batch, patches = scores.shape[0], scores.shape[1] - skip
    if not launch.usable(scores.device) or scores.dtype == torch.float64 or not 0 < patches <= MOST_RANKED:
        scores = scores.mean(-1) if scores.dim() == 3 else scores
        best = scores[:, skip:].argsort(dim=1, descending=True, stable=True)[:, :count]
        index = with_prefix(best.sort(1).values if in_place else best, prefix)
        return index, _without(scores, index, prefix, skip) if rest else None
    from ..kernels.scores import rank_kernel

    index = torch.empty(batch, prefix + count, dtype=torch.int64, device=scores.device)
    differentiable = rest and scores.requires_grad and torch.is_grad_enabled()
    rest = rest and not differentiable
    left = torch.empty(batch, prefix + patches, dtype=torch.float32, device=scores.device) if rest else None
    width, options = _lanes(patches, prefix)
    constants = {"PREFIX": prefix, "SKIP": skip, "HEADS": 1, "IN_PLACE": in_place, "REST": rest, "N": width,
                 "CHUNK": 32}  # fmt: skip
    if scores.dim() == 3:
        scores = scores if scores.stride(2) == 1 else scores.contiguous()
        constants["HEADS"] = scores.shape[2]
    key = (scores.dtype, *constants.values())
    numbers = (*scores.stride()[:2], patches, count)
    tensors = (scores, index, left if rest else index)
    launch.start(rank_kernel, key, (batch, 1), tensors, numbers, constants, options)
    return index, _without(scores, index, prefix, skip) if differentiable else left


def _lanes(patches: int, prefix: int) -> tuple[int, dict]:
    """How wide a program is that compares the patches of an image with each other, and its launch options. Every keep
    rate leaves another number of patches: those of an ordinary image share one kernel."""
    from triton import next_power_of_2

    width = max(256, next_power_of_2(max(patches, prefix)))
    return width, {"num_warps": 8 if width == 256 else 16}


def _without(scores: Tensor, index: Tensor, prefix: int, skip: int) -> Tensor:
    scores = scores.mean(-1) if scores.dim() == 3 else scores
    scores = scores[:, skip:].to(torch.promote_types(scores.dtype, torch.float32))
    return torch.nn.functional.pad(scores, (prefix, 0)).scatter(1, index, 0.0)


def sampled_rows(scores: Tensor | Importance, prefix: int, samples: int,
                 lengths: Tensor | int) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`inverse_cdf` of rules.py in one launch: row numbers int64 (batch, n), those drawn first, and how many they
    are, int32 (batch,). scores: float32 (batch, n), or their parts.  lengths: int32 (batch,), or one int, the rows of
    each image. None where the kernel does not run."""
    parts = scores if isinstance(scores, Importance) else None
    probs = scores if parts is None else parts.probs
    batch, n = probs.shape if parts is None else (len(parts.starts), parts.width)
    if not launch.usable(probs.device) or probs.dtype != torch.float32 or not 0 < n - prefix <= MOST_RANKED:
        return None
    if parts is not None and parts.squares is None:
        return sampled_rows(parts.grid(), prefix, samples, lengths)
    from ..kernels.scores import sample_kernel

    probs, equal = probs.contiguous(), lengths if isinstance(lengths, int) else 0  # (batch, n) or (nheads, rows)
    index, order = (torch.empty(batch, n, dtype=torch.int64, device=probs.device) for _ in range(2))
    steps = torch.empty(batch, n, dtype=torch.float32, device=probs.device)
    counts = torch.empty(batch, dtype=torch.int32, device=probs.device)
    width, options = _lanes(n - prefix, prefix)
    constants = {"HEADS": 0 if parts is None else len(probs), "PREFIX": prefix, "N": width, "CHUNK": 32}
    places = (probs, counts) if parts is None else (parts.squares, parts.starts)
    tensors = (probs, *places, counts if equal else lengths.contiguous(), index, counts, steps, order)
    numbers = (n, equal, samples, probs.shape[1])
    launch.start(sample_kernel, tuple(constants.values()), (batch, 1), tensors, numbers, constants, options)
    return index, counts
