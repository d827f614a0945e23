"""Cuts: where a pass stands when tokens are dropped, how they are, and what every cut leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import packing
from ..backends import Backend
from ..packing import Packed, Padded, Selection, put_back
from ..support.bare import Bare

State = Packed | Padded


class Stage(NamedTuple):
    """What one cut left. block: index.  where: place in it.  counts: rows of each image.  ids: for each image the kept
    row numbers of the unpruned sequence in order, 0 for CLS, -1 for a fused token."""

    block: int
    where: str
    counts: list[int]
    ids: list[Tensor]


class _Traced(NamedTuple):
    logits: Tensor
    stages: list[Stage]


class Trace(_Traced):
    """logits (batch, classes), and one `Stage` per cut: both by unpacking, too. kept: bool (batch, n), the rows of the
    unpruned sequence that stayed to the end; for a list of images a list of bool (n,), as long as each of them."""

    kept: Tensor | list[Tensor]


class Pass(NamedTuple):
    """What stays the same during a pass. backend: who attends.  stages: where cuts are noted, or None.
    after_block: called after every block without a cut (a recording begins its second graph there).
    canvas: where every token is put back, if features are wanted.  wanted: blocks after which `taken` gets a copy.
    blocks: how many of them run, None for all.  drops: whether dropout and stochastic depth are on."""

    backend: Backend
    stages: list[Stage] | None = None
    after_block: Callable[[], None] | None = None
    canvas: Canvas | None = None
    wanted: frozenset[int] = frozenset()
    taken: list[Canvas] | None = None
    blocks: int | None = None
    drops: bool = False


FILLS = ("zero", "last", "nearest")


class Canvas:
    """The tokens of a pass in their original places: tokens (batch, n, dim), the latest value that every row had, and
    kept, bool (batch, n), the rows that are still there."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens
        self.kept = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def update(self, state: State) -> None:
        """The rows of `state` have the values that they have there, and the others are gone."""
        tokens = state.summed.tokens
        self.tokens = put_back(self.tokens, state, tokens)
        ones = torch.ones_like(state.ids, dtype=tokens.dtype).unsqueeze(-1)
        self.kept = put_back(torch.zeros_like(self.tokens[..., :1]), state, ones)[..., 0] > 0

    def fill(self, x: Tensor, how: str, prefix: int, grid: tuple[int, int]) -> Tensor:
        """x (batch, n, dim), the canvas's tokens or something made of each of them, with the rows that are gone filled.
        how: "zero"; "last", left as they were when they were dropped; "nearest", as the nearest patch that is still
        there on the grid (rows, columns), the earlier of two, and zero where no patch is left. prefix: so many first
        rows always stay."""
        if how == "last":
            return x
        if how == "zero":
            return torch.where(self.kept[..., None], x, 0.0)
        row = torch.arange(grid[0] * grid[1], device=x.device)
        place = torch.stack((row // grid[1], row % grid[1]), 1)  # (patches, 2)
        far = (place[:, None] - place[None]).square().sum(-1)  # (patches, patches)
        there = self.kept[:, prefix:]  # (batch, patches)
        nearest = torch.where(there[:, None], far, far.max() + 1).argmin(-1)  # (batch, patches)
        patches = x[:, prefix:].gather(1, nearest[..., None].expand(-1, -1, x.shape[-1]))
        patches = torch.where(there.any(1)[:, None, None], patches, 0.0)
        return torch.cat((x[:, :prefix], patches), 1)


@dataclass(frozen=True)
class Cut:
    """A block that has run as far as its cut. state: its tokens there.  selection: which rows stay, None for all.
    block: index, -1 for the embedding.  within: its MLP is still to do."""

    state: State
    selection: Selection | None
    block: int
    within: bool = False

    @property
    def waits(self) -> bool:
        """Whether only the GPU knows how many rows stay."""
        return self.selection is not None and isinstance(self.selection.counts, Tensor)


@dataclass(frozen=True)
class Pending:
    """A pass that cannot go on before somebody says how many rows stay: call `resume(total, longest)`. It may be
    resumed more than once, which is how one front serves several CUDA graphs. left: what the cut left, if that was
    already taken, with room for all rows."""

    model: nn.Module = field(repr=False)
    cut: Cut
    run: Pass
    left: Packed | None = None

    @property
    def counts(self) -> Tensor:
        """Rows of each image after the cut, int32 (batch,), on the device."""
        return self.cut.selection.counts

    @property
    def width(self) -> int:
        """Rows per image before the cut: no count is larger."""
        return self.cut.state.width

    def resume(self, total: int, longest: int, after_block: Callable[[], None] | None = None) -> Tensor | Pending:
        """Go on with room for `total` rows, at most `longest` in one image; after_block: as in `Pass`."""
        run = self.run._replace(after_block=after_block)
        left = self.left.within(total, longest) if self.left else self.model._leave(self.cut, run, (total, longest))
        return self.model._blocks(left, self.cut.block + 1, run)

    def ahead(self) -> Pending:
        """The same, but the rows are taken and what remains of the cut's block runs now, with room for all rows: work
        for the GPU while the host reads how many stay. Under packed backends only."""
        everything = self.cut.state.batch * self.width
        return replace(self, left=self.model._leave(self.cut, self.run, (everything, self.width)))


# ---- steps of the loop ----


def as_dense(state: State, reason: str) -> Tensor:
    """The tokens as (batch, n, dim), where all images have the same count."""
    if state.count is None:
        raise ValueError(
            f"vit: {reason}, and the images here keep different counts; take it off, or use a pruner with fixed counts"
        )
    x = state.summed.tokens
    return x if isinstance(state, Padded) else x.unflatten(0, (state.batch, state.count))


def rows_kept(lengths: Sequence[int], stages: Sequence[Stage], device: torch.device) -> list[Tensor]:
    """bool (n,) for each image of `lengths` rows: which are there after all `stages`, on `device`."""
    kept = [torch.full((n,), not stages, device=device) for n in lengths]
    for mine, ids in zip(kept, stages[-1].ids if stages else (), strict=False):
        mine[ids[ids >= 0]] = True
    return kept


def laid_out(state: Packed, backend: Backend, packed: bool) -> State:
    """The packed tokens of `state` as the first block takes them under the backend. packed: equal lengths, too."""
    if state.count is not None and not packed:
        return padded_state(state)  # a dense batch
    if state.count is None and backend.equal_only:
        least, most = min(state.rows.host), max(state.rows.host)
        raise ValueError(f"backend {backend.name!r}: needs equal counts, and the images here have {least} to {most} "
                         "tokens; use 'auto'")  # fmt: skip
    return padded_state(state) if backend.pads else state


def padded_state(packed: Packed) -> Padded:
    """The rows of `packed` with room for the longest image in every one; where all are equally long, the same
    memory."""
    tokens, ids = packed.grid(packed.tokens), packed.grid(packed.ids, -1)
    lengths = None if packed.count is not None else packed.lengths
    return Padded(tokens, ids, packed.seqlen, lengths, packed.count, packed.rows, packed.unpruned)


def take_copy(state: State, i: int, run: Pass) -> None:
    """What block i left, where somebody wants it."""
    if i in run.wanted:
        copied = Canvas(run.canvas.tokens)
        copied.update(state)
        run.taken.append(copied)


def take(cut: Cut, backend: Backend, sizes: tuple[int, int] | None, norm: nn.LayerNorm | None) -> State:
    """The rows that stay, in the layout of the backend. norm: what they go through next, if it is plain."""
    if cut.selection is None:
        return cut.state
    if backend.paper_padding:  # the paper pads to the original length, always
        return take_by_loop(cut.state.summed, cut.selection)
    if backend.pads:
        return packing.take_padded(cut.state.summed, cut.selection, sizes and sizes[1])
    return packing.take_packed(cut.state, cut.selection, lambda counts: sizes, norm)


def take_by_loop(state: Padded, selection: Selection) -> Padded:
    """`take_padded` of state and selection to the present width as the paper's padded baseline does it, kept faithfully
    slow: the counts are read from the GPU, and one Python loop copies image after image into zeros."""
    if isinstance(selection.counts, packing.Counts):
        taken = packing.take_padded(state, selection, state.width)
        tokens = torch.zeros_like(state.tokens)
        for b, n in enumerate(taken.lengths.tolist()):
            tokens[b, :n] = taken.tokens[b, :n]
        return replace(taken, tokens=tokens)
    narrow = replace(state, tokens=state.tokens[..., :1])
    sizes = packing.take_padded(narrow, replace(selection, blend=None), state.width)
    counts = selection.counts
    counts = [counts] * state.batch if isinstance(counts, int) else counts.tolist()
    tokens, ids, lengths = torch.zeros_like(state.tokens), sizes.ids, sizes.lengths
    for b, n in enumerate(counts):
        tokens[b, :n] = state.tokens[b, selection.index[b, :n]]
    if selection.blend is not None:
        tokens[:, counts[0]], ids[:, counts[0]] = packing.fuse(state, selection.blend)[:, 0], -1
        lengths = torch.full_like(selection.index[:, 0], counts[0] + 1, dtype=torch.int32)
    count = int(lengths[0]) if isinstance(selection.counts, int) and lengths is not None else sizes.count
    return Padded(tokens, ids, state.seqlen, lengths, count, unpruned=state.unpruned)


def runs_unfused(state: Padded, backend: Backend, block: nn.Module | Bare) -> bool:
    """Whether attention is plain products and a softmax: where timm's own is, and in the paper's padded baseline, which
    leaves the fused kernels once there is padding; before the first cut it is dense."""
    return not block.attn.fused_attn or (backend.paper_padding and state.lengths is not None)


def stage_of(state: State, block: int, where: str) -> Stage:
    """What a cut at `where` in `block` left, read from the device."""
    if isinstance(state, Packed):
        counts = state.lengths.tolist()
        return Stage(block, where, counts, list(state.ids[: sum(counts)].split(counts)))
    counts = [state.width] * state.batch if state.lengths is None else state.lengths.tolist()
    return Stage(block, where, counts, [ids[:n] for ids, n in zip(state.ids, counts, strict=True)])
