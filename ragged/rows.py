"""The host's side of the small kernels: which rows CLS attends to, which are best, which a mask marks, and how rows
move, each with its ids in the same launch. Triton where it runs, PyTorch elsewhere; neither waits for the GPU. Where
gradients are wanted, kernels/flow.py knows the way back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import launch
from .kernels import flow
from .kernels.padding import image_of_rows

ROWS, BLOCK = 8, 128  # of a program that moves rows
FUSE = {"NARROW": 32, "CHUNK": 256}  # of one that sums up rows: all rows of an image at once, few columns
CHUNK, MASK_CHUNK = 128, 256  # counts, or entries of a mask, that a program adds up at once
MOST_RANKED = 1024  # patches that one program compares, faster than `topk` and `sort` (times: data/results/notes.md)
# Numbers in the patches of a batch, and their width, up to which `patch_scores` is ahead of the compiled predictor.
MOST_SCORED, WIDEST = 400_000, 384


def offsets(counts: Tensor) -> Tensor:
    """Exclusive prefix sums of counts (batch,) as int32 (batch + 1,): the `cu_seqlens` of flash-attention."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def equal_offsets(batch: int, count: int, device: torch.device) -> Tensor:
    """`offsets` of batch images with count rows each, on `device`: nothing has to be summed."""
    if count == 0:
        return torch.zeros(batch + 1, device=device, dtype=torch.int32)
    return torch.arange(0, batch * count + 1, count, device=device, dtype=torch.int32)


def host_offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Offsets of images of `lengths` rows, int32 (batch + 1,), on `device`."""
    on_host = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")
    return on_host.to(device, non_blocking=True)


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
    rows, heads, dim = q.shape
    equal = lengths if isinstance(lengths, int) else 0
    if not launch.usable(q.device) or q.dtype == torch.float64:
        lengths = torch.full_like(starts, equal) if equal else lengths
        return _cls_attention_torch(q, k, starts, lengths, width, scale)
    from .kernels.rows import cls_kernel

    all_owned = equal * starts.shape[0] == rows or not fill
    probs = (torch.empty if all_owned else torch.zeros)((rows, heads), device=q.device, dtype=torch.float32)
    constants = launch.strides_of(Q=q.stride(), K=k.stride()) | launch.head_of(heads, dim)
    once = 64 < width <= 256 and dim <= 64  # then all keys fit into one tile, and nothing is read twice
    constants |= {"N": 256 if once else 64, "ONCE": once}
    key, options = (q.dtype, *constants.values()), {"num_warps": 8 if once else 4}
    tensors, numbers = (q, k, probs, starts, starts if equal else lengths), (scale * launch.LOG2_E, equal)
    launch.start(cls_kernel, key, (heads * starts.shape[0], 1), tensors, numbers, constants, options)
    return probs


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


def importance(probs: Tensor, v: Tensor, starts: Tensor, lengths: Tensor | int, width: int) -> Tensor:
    """How much CLS attends to a row, over all heads, times the norm of the row's values: float32 (batch, width), zero
    where an image has no row. probs: float32 (rows, nheads), what `cls_attention` returns.  v: (rows, nheads, headdim),
    any strides.  starts, lengths, width: as there."""
    rows, heads, dim = v.shape
    batch, equal = starts.shape[0], lengths if isinstance(lengths, int) else 0
    if not launch.usable(v.device) or v.dtype == torch.float64 or flow.wanted(v, probs):
        wide = torch.promote_types(v.dtype, torch.float32)
        scores = probs.sum(-1) * torch.linalg.vector_norm(v.flatten(-2), dim=-1, dtype=wide).float()
        column = torch.arange(width, device=v.device)
        real = (column < (equal or lengths[:, None])).expand(batch, -1)
        return torch.where(real, scores[torch.where(real, starts[:, None] + column, 0)], 0.0)
    from .kernels.rows import importance_kernel

    out = probs.new_empty(batch, width)
    constants = launch.strides_of(V=v.stride()) | launch.head_of(heads, dim) | {"N": 16}
    grid, key = (batch * -(-width // 16), 1), (v.dtype, *constants.values())
    tensors = (probs, v, starts, starts if equal else lengths, out)
    launch.start(importance_kernel, key, grid, tensors, (equal, width), constants, {})
    return out


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
    from .kernels.scorer import score_patches

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
    from .kernels.rows import rank_kernel

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


def sampled_rows(scores: Tensor, prefix: int, samples: int, lengths: Tensor | int) -> tuple[Tensor, Tensor] | None:
    """`inverse_cdf` of rules.py in one launch: row numbers int64 (batch, n), those drawn first, and how many they
    are, int32 (batch,). scores: float32 (batch, n).  lengths: int32 (batch,), or one int, the rows of each image. None
    where the kernel does not run."""
    batch, n = scores.shape
    if not launch.usable(scores.device) or scores.dtype != torch.float32 or not 0 < n - prefix <= MOST_RANKED:
        return None
    from .kernels.rows import sample_kernel

    scores, equal = scores.contiguous(), lengths if isinstance(lengths, int) else 0
    index, order = (torch.empty(batch, n, dtype=torch.int64, device=scores.device) for _ in range(2))
    steps, counts = torch.empty_like(scores), torch.empty(batch, dtype=torch.int32, device=scores.device)
    width, options = _lanes(n - prefix, prefix)
    constants = {"PREFIX": prefix, "N": width, "CHUNK": 32}
    tensors = (scores, counts if equal else lengths.contiguous(), index, counts, steps, order)
    launch.start(sample_kernel, tuple(constants.values()), (batch, 1), tensors, (n, equal, samples), constants, options)
    return index, counts


def grid_rows(x: Tensor, cu_seqlens: Tensor, width: int, fill: float) -> Tensor:
    """Packed numbers x (total, ...) as a grid (batch, width, ...), image b from row cu_seqlens[b], int32 (batch + 1,),
    with `fill` where an image has no row. width: no image is longer. No wait."""
    if flow.wanted(x):
        return flow.Spread.apply(x, _grid_rows, cu_seqlens, width, fill)
    return _grid_rows(x, cu_seqlens, width, fill)


def _grid_rows(x: Tensor, cu_seqlens: Tensor, width: int, fill: float) -> Tensor:
    batch, shape = cu_seqlens.shape[0] - 1, x.shape[1:]
    kernel = launch.usable(x.device) and x.is_floating_point() and x.dtype != torch.float64
    if not kernel or 0 in x.shape or width == 0:
        column = torch.arange(width, device=x.device)
        real = column < cu_seqlens.diff()[:, None]
        rows = torch.where(real, cu_seqlens[:-1, None] + column, 0)
        real = real.view(*real.shape, *[1] * len(shape))
        return torch.where(real, x[rows], torch.full((), fill, dtype=x.dtype, device=x.device))
    from .kernels.rows import grid_kernel

    out = x.new_empty(batch, width, *shape)
    constants = {"C": shape.numel(), "BLOCK": 1024}
    grid = (batch * -(-width * shape.numel() // 1024), 1)
    key = (x.dtype, *constants.values())
    launch.start(grid_kernel, key, grid, (x.contiguous(), cu_seqlens, out), (width, float(fill)), constants, {})
    return out


def kept_rows(keep: Tensor, cu_seqlens: Tensor, width: int, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """A mask as an index: row numbers int64 (batch, width) of every image, those to keep before the others, each in
    the order in which they stand; and how many are kept, int32 (batch,).

    keep: bool, any shape, one entry a row.  cu_seqlens: int32 (batch + 1,), image b owns entries cu_seqlens[b] to
    cu_seqlens[b + 1] of it, flattened.  width: no image is longer.  prefix: so many first rows stay anyway.
    """
    batch, keep = cu_seqlens.shape[0] - 1, keep.reshape(-1).contiguous()
    if not launch.usable(keep.device) or width == 0:
        column = torch.arange(width, device=keep.device)
        real = column < cu_seqlens.diff()[:, None]  # (batch, width)
        marked = keep[torch.where(real, cu_seqlens[:-1, None] + column, 0)] if keep.numel() else real
        marked = (marked | (column < prefix)) & real
        return marked.byte().argsort(dim=1, descending=True, stable=True), marked.sum(1, dtype=torch.int32)
    from .kernels.rows import keep_kernel

    index = torch.empty(batch, width, dtype=torch.int64, device=keep.device)
    counts = torch.empty(batch, dtype=torch.int32, device=keep.device)
    constants = {"PREFIX": prefix, "CHUNK": MASK_CHUNK}
    tensors = (keep, cu_seqlens, index, counts)
    launch.start(keep_kernel, tuple(constants.values()), (batch, 1), tensors, (width,), constants, {})
    return index, counts


def with_prefix(patches: Tensor, prefix: int) -> Tensor:
    """patches: patch numbers (batch, k). Returned as row numbers, with the `prefix` rows put before them."""
    first = torch.arange(prefix, device=patches.device).expand(patches.shape[0], prefix)
    return torch.cat((first, patches + prefix), 1)


# ---- moving them ----


def _constants(dim: int) -> dict:
    """Constants of the kernels that move rows of `dim` numbers."""
    return {"DIM": dim, "ROWS": ROWS, "BLOCK": BLOCK}


def move_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, blend: Tensor | None,
              more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A cut that leaves equally many rows in every image: of image b, which begins at row starts[b] of x (n, dim), the
    rows that index[b] names, and behind them, if there is a blend, the sum of its first rows weighted by blend[b].

    ids: int64 (n,), moved along; a fused row's is -1.  starts: int32 (batch,).  index: int64 (batch, count).  blend:
    (batch, width) or None.  more: what is to be added to x, (n, dim) of its dtype, or None. Returns tokens (batch *
    rows, dim), ids and offsets, int32 (batch + 1,). Gradients flow to x, more and blend, and take for granted that no
    row is named twice.
    """
    if flow.wanted(x, blend, more):
        return flow.Moved.apply(x if more is None else x + more, blend, _move_rows, ids, starts, index)
    return _move_rows(x, ids, starts, index, blend, more)


def _move_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, blend: Tensor | None,
               more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, count), dim, fused = index.shape, x.shape[1], blend is not None
    rows = count + fused
    if not launch.usable(x.device) or rows == 0:
        moved = _move_rows_torch(x if more is None else x + more, ids, starts, index, blend)
        return *moved, equal_offsets(batch, rows, x.device)
    from .kernels.rows import move_kernel

    x, ids, index = x.contiguous(), ids.contiguous(), index if index.stride(1) == 1 else index.contiguous()
    blend = blend if not fused or blend.stride(1) == 1 else blend.contiguous()
    out, out_ids, cu = x.new_empty(batch * rows, dim), ids.new_empty(batch * rows), starts.new_empty(batch + 1)
    constants = _constants(dim) | {"BLOCKS": -(-dim // BLOCK), "FUSED": int(fused), "SUM": more is not None} | FUSE
    more = x if more is None else more.contiguous()
    key = (x.dtype, blend.dtype if fused else None, dim, fused, constants["SUM"])
    tensors = (x, more, ids, starts, index, blend if fused else x, out, out_ids, cu)
    width = blend.shape[1] if fused else 0
    numbers = (count, index.stride(0), width, blend.stride(0) if fused else 0, batch)
    programs = -(-count // ROWS) * constants["BLOCKS"] + fused * -(-dim // FUSE["NARROW"])
    grid = (batch * programs, 1)
    launch.start(move_kernel, key, grid, tensors, numbers, constants, {})
    return out, out_ids, cu


def _move_rows_torch(x, ids, starts, index, blend) -> tuple[Tensor, Tensor]:
    place = starts[:, None] + index
    tokens, out_ids = x[place], ids[place]  # (batch, count, dim), (batch, count)
    if blend is not None:
        row = starts[:, None] + torch.arange(blend.shape[1], device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # in the tokens' own precision whatever it says
            weights = blend.to(x.dtype)
            first = torch.where((weights != 0)[..., None], x[row.clamp(max=x.shape[0] - 1)], 0.0)  # 0 times NaN is NaN
            tokens = torch.cat((tokens, weights[:, None] @ first), 1)
        out_ids = torch.nn.functional.pad(out_ids, (0, 1), value=-1)
    return tokens.flatten(0, 1), out_ids.flatten()


def take_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, counts: Tensor, total: int, longest: int,
              more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Pack rows of x (n, dim) and ids int64 (n,): of image b, which begins at row starts[b], those that the first
    counts[b] entries of index (batch, k) name; starts, counts int32 (batch,), index int64; more: as in `move_rows`.

    total: rows of the result. Surplus rows hold zeros and the id -1; of images that do not fit, only a part is there.
    longest: no count is larger. Returns tokens (total, dim), ids (total,) and cu_seqlens, int32 (batch + 1,), which
    ends at total at the latest. Gradients flow to x and more, and take for granted that no row is named twice.
    """
    how = (ids, starts, index, counts, total, longest)
    if flow.wanted(x, more):
        sources = lambda: _sources(starts, index, counts, total)[:2]  # noqa: E731
        return flow.Taken.apply(x if more is None else x + more, lambda x: _take_rows(x, *how), sources)
    return _take_rows(x, *how, more)


def picked_rows(x: Tensor, rows: Tensor, real: Tensor | None = None) -> Tensor:
    """Rows of x (n, dim): (..., dim) of rows, int64 (...), zeros where real, bool (...), is False. Gradients flow to x,
    and take for granted that no real row is named twice."""

    def run(x: Tensor) -> tuple[Tensor]:
        found = x[rows]
        return (found if real is None else torch.where(real[..., None], found, 0.0),)

    if not flow.wanted(x):
        return run(x)[0]
    return flow.Taken.apply(x, run, lambda: (rows.flatten(), None if real is None else real.flatten()))[0]


def first_rows(x: Tensor, starts: Tensor, count: int) -> Tensor:
    """The first `count` rows of every image, (batch, count, dim), of x (n, dim): image b begins at row starts[b], int32
    (batch,). Of an image that begins past the end, the last row there is: recordings have some. Gradients flow to x."""
    total, dim = x.shape
    if flow.wanted(x) or not launch.usable(x.device) or 0 in x.shape or count == 0:
        return picked_rows(x, (starts[:, None] + torch.arange(count, device=x.device)).clamp(max=total - 1))
    from .kernels.rows import first_kernel

    out = x.new_empty(starts.shape[0], count, dim)
    constants = {"COUNT": count, "DIM": dim, "BLOCK": 1 << (dim - 1).bit_length()}
    grid, tensors = (starts.shape[0] * count, 1), (x.contiguous(), starts.contiguous(), out)
    launch.start(first_kernel, (x.dtype, *constants.values()), grid, tensors, (total,), constants, {})
    return out


def _take_rows(x: Tensor, ids: Tensor, starts: Tensor, index: Tensor, counts: Tensor, total: int, longest: int,
               more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not launch.usable(x.device):
        return _take_rows_torch(x if more is None else x + more, ids, starts, index, counts, total)
    from .kernels.rows import take_kernel

    x, ids, starts, index, counts = (t.contiguous() for t in (x, ids, starts, index, counts))
    batch, dim = counts.shape[0], x.shape[1]
    out, out_ids = x.new_empty(total, dim), ids.new_empty(total)
    cu_seqlens = counts.new_empty(batch + 1)
    constants = _constants(dim) | {"CHUNK": CHUNK, "SUM": more is not None}
    more = x if more is None else more.contiguous()
    grid = (batch + 1, min(max(1, -(-longest // ROWS)), 65535))  # the kernel's loop covers what is left
    tensors, key = (x, more, ids, starts, index, counts, out, out_ids, cu_seqlens), (x.dtype, dim, constants["SUM"])
    launch.start(take_kernel, key, grid, tensors, (batch, total, index.shape[1]), constants, {})
    return out, out_ids, cu_seqlens


def _take_rows_torch(x, ids, starts, index, counts, total) -> tuple[Tensor, Tensor, Tensor]:
    if index.shape[1] == 0:  # no image has a row
        return x.new_zeros(total, x.shape[1]), ids.new_full((total,), -1), offsets(counts).clamp_(max=total)
    rows, owned, cu_seqlens = _sources(starts, index, counts, total)
    rows = rows.clamp(max=x.shape[0] - 1)  # an image without rows may begin past the end
    return torch.where(owned[:, None], x[rows], 0.0), torch.where(owned, ids[rows], -1), cu_seqlens


def _sources(starts: Tensor, index: Tensor, counts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows of `take_rows` come from, int64 (total,), which of them come from anywhere, bool (total,), and its
    offsets."""
    cu_seqlens = offsets(counts).clamp_(max=total)
    row, image = torch.arange(total, device=index.device), image_of_rows(cu_seqlens, total).clamp_(max=len(counts) - 1)
    column = (row - cu_seqlens[image]).clamp_(max=index.shape[1] - 1)
    return starts[image] + index[image, column], row < cu_seqlens[-1], cu_seqlens
