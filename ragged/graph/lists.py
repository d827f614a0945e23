"""Lists of images of any sizes as graphs, and packed tokens that another front made.

Recorded are capacities of tokens. Everything that differs from call to call stands in one small table on the GPU, a
line for each image (see kernels/patches.py): the launches read from there where the pixels are, how many rows an image
has and where they begin. A list of fewer images leaves lines empty, and an image without rows takes no part.

With fixed shares the host knows from the sizes how many rows every cut leaves, and chooses a capacity that has room for
all of them: each is recorded for stand-ins, made-up lengths that just fill it.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import launch
from ..backends import BACKENDS
from ..blocks import cuts
from ..blocks.cuts import Pass, Pending
from ..checks import check_image_list, check_packed, weight_of
from ..kernels.padding import image_of_rows
from ..packing import Counts, Packed
from ..rows.scores import Importance
from ..rules import View
from .parts import FEW_ROWS, WIDTH_STEP, Recorded, Recorder, Rest, bucket_sizes, needed, rest_sizes, to_the_end

START = 6  # the table's column with the first row of an image


def stand_ins(size: int, batch: int, longest: int, least: int) -> tuple[int, ...]:
    """Lengths of `batch` images that fill `size` rows, the first of them `longest` if there is room, the others of
    about the same length but not quite, so that what is rounded up in one is rounded down in another. None is below
    `least`."""
    first = max(min(longest, size), least)
    if batch == 1:
        return (first,)
    mean, more = divmod(max(size - first, least * (batch - 1)), batch - 1)
    others = [min(mean + (i < more), longest) for i in range(batch - 1)]
    for i in range((batch - 1) // 2):
        shift = min(i % 8, others[-1 - i] - least, longest - others[i])
        others[i], others[-1 - i] = others[i] + shift, others[-1 - i] - shift
    return (first, *others)


def rows_after(model: nn.Module, length: int) -> tuple[int, ...]:
    """Rows of an image of `length` rows, then after every cut of the model's pruner up to the first adaptive one: the
    pruner is asked about one image of zeros, since fixed counts do not depend on what is in it."""
    pruner, weight, found = model.pruner, weight_of(model.vit), [length]
    heads, zeros = model.vit.blocks[0].attn.num_heads, functools.partial(torch.zeros, device=weight.device)
    for stage in range(0 if pruner is None else len(pruner.at)):
        rows = found[-1]
        one = functools.partial(torch.full, (1,), dtype=torch.int32, device=weight.device)
        now, before = Counts(one(rows), (rows,)), Counts(one(length), (length,))
        cu = torch.tensor([0, rows], dtype=torch.int32, device=weight.device)
        tokens, ids = zeros(rows, model.vit.embed_dim, dtype=weight.dtype), torch.arange(rows, device=weight.device)
        state = Packed(tokens, ids, cu, rows, 1, length, None, now, before)
        weighed = Importance(zeros(heads, rows), zeros(heads, rows), zeros(rows, heads, 1), cu[:-1], rows, rows)
        view = View(state, model.prefix, stage, zeros(1, rows, heads), zeros(1, rows), weighed=weighed)
        chosen = pruner.select(view)
        if chosen is None:
            found.append(rows)
        elif isinstance(chosen.counts, Counts):
            fused = 0 if chosen.blend is None else 1 if chosen.fused is None else chosen.fused.host[0]
            found.append(chosen.counts.host[0] + fused)
        elif isinstance(chosen.counts, Tensor):
            break
        else:
            raise NotImplementedError(f"capture: {pruner.name} answers with one int where images have lengths of their "
                                      "own; answer with `view.share`, or call the model itself")  # fmt: skip
    return tuple(found)


class CapturedList(Recorded):
    """A model's forward pass for lists of images of any sizes, as CUDA graphs. Call it with a list; it returns logits.

    Made by `capture`. batch: the most images.  sizes: capacities of tokens, or (padded) of rows per image.
    most: the most tokens.  longest: rows of the largest image.  largest: what it was called when asked for.
    The pixels are read where they are; the logits returned are a copy, safe to keep.
    """

    what = "images"

    def __init__(self, model: nn.Module, batch: int, sizes: list[int], most: int, longest: int, largest: object):
        super().__init__(model)
        self.batch, self.fronts, self.most, self.longest, self.largest = batch, {}, most, longest, largest
        self.capacities, self.size = sizes, sizes[-1]  # the second of the last call
        self._facts: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # of a size in pixels
        self._after = functools.cache(functools.partial(rows_after, model))
        self._room: dict[int, list[int]] = {}  # rows before and after every cut with fixed shares
        self._cuts_of: dict[int, list[Tensor]] = {}
        self._handed: Pending | None = None  # where fronts leave what the rest begins with
        self._total, self._alive = 0, ()
        weight = weight_of(model.vit)
        from ..kernels.patches import COLUMNS  # imported here: Triton is optional

        self.table = torch.zeros(batch + 1, COLUMNS, dtype=torch.int64, device=weight.device)
        self.buffer = torch.zeros(self._capacity(sizes[-1]), self._features(), dtype=weight.dtype, device=weight.device)

    def _features(self) -> int:
        return self.model.vit.patch_embed.proj.weight[0].numel()

    def _capacity(self, size: int) -> int:
        return size * self.batch if self.padded else size

    @property
    def token_waste(self) -> float:
        """Surplus rows per real row before any cut in the last call, padding included; 0.0 before the first."""
        return self._capacity(self.size) / self._total - 1.0 if self._total else 0.0

    # ---- what is recorded

    def work(self, size: int, wait: bool, after_block: Callable[[], None] | None = None) -> Tensor | None:
        """The pass with capacity `size`: logits, or with `wait` None, where it hands over to the rest. after_block: see
        `Pass`."""
        model, rows = self.model, self._capacity(size)
        run = Pass(BACKENDS[model.picked], after_block=after_block)
        result = model._blocks(cuts.laid_out(self._state(size, rows), run.backend, run.backend.packs_first), -1, run)
        if wait and not isinstance(result, Tensor):
            self._hand_over(result)
            return None
        self._cuts_of[size] = []
        return to_the_end(result, rows, self._cuts_of[size], after_block)

    def _state(self, size: int, rows: int) -> Packed:
        longest = size if self.padded else self.longest
        tokens, ids = self._tokens(rows, longest)
        cu = self.table[:, START].int()
        lengths = Counts(cu.diff(), self._lengths(size))
        return Packed(tokens, ids, cu, longest, self.batch, longest, None, lengths, lengths)

    def _tokens(self, rows: int, longest: int) -> tuple[Tensor, Tensor]:
        from ..kernels.patches import pixel_rows, place_rows

        vit, prefix, table = self.model.vit, self.model.prefix, self.table[:-1]
        patch, pixels = vit.patch_embed, self.buffer[:rows]
        pixel_rows(table, pixels, longest, prefix, patch.proj.kernel_size)
        x = patch.norm(nn.functional.linear(pixels, patch.proj.weight.flatten(1), patch.proj.bias))
        own = (getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token"))
        first = torch.cat([token[0] for token in own if token is not None])  # (prefix, dim)
        x, ids = place_rows(table, x.contiguous(), first, longest, vit.pos_embed is not None)
        return vit.norm_pre(vit.pos_drop(x)), ids

    def _lengths(self, size: int) -> tuple[int, ...]:
        if self.padded:
            return (size,) * self.batch
        least, slack = self.model.prefix + 1, 0
        if size == self.capacities[-1] and self.model.pruner is not None and not self.model.pruner.adaptive:
            shares = [after / self.longest for after in self._after(self.longest)]
            slack = int(2 * len(shares) / max(min(shares), 0.05))  # nothing is above: room for whatever rounds up
        given = stand_ins(size, self.batch, min(self.longest, size), least)
        return tuple(min(n + slack, max(self.longest, n)) for n in given)

    def _hand_over(self, pending: Pending) -> None:
        if self._handed is None:  # the first time is outside any recording, with the largest capacity
            self._handed = _copy_of(pending)
        for mine, theirs in zip(_tensors(self._handed), _tensors(pending), strict=True):
            mine[: theirs.shape[0]].copy_(theirs)

    def record(self, warmup: int, between: tuple[int, int] | None, wait: bool) -> None:
        """Record every capacity; all lines of the table are empty by then. warmup, between, wait: as in `capture`."""
        recorder = Recorder(self.model)
        for size in reversed(self.capacities):
            work = functools.partial(self.work, size, wait)
            for _ in range(warmup if size == self.capacities[-1] else 1):
                recorder.try_out(work)
            self.fronts[size] = recorder.record(work)
            if not self.padded:
                self.plan(size)
        if self._handed is not None:
            sizes = rest_sizes(self._handed, False, between, self.capacities[-1])
            self.rest = Rest(recorder, self._handed, sizes, False)

    def plan(self, size: int) -> None:
        """Note how many rows capacity `size` has room for, before and after every cut."""
        needs = [self._after(n) for n in self._lengths(size)]
        self._room[size] = [size, *map(sum, zip(*(after[1:] for after in needs), strict=True))]

    # ---- a call

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        if not isinstance(images, list | tuple):
            raise TypeError(f"images: captured for lists of images, got {type(images).__name__}; list(images) makes "
                            "one of a batch")  # fmt: skip
        check_image_list(images, self.model.vit, True)
        return self._in_turn(lambda: self._replay(self.fill(images), len(images)))

    def fill(self, images: Sequence[Tensor]) -> int:
        """Send the table for these images, and answer the capacity that they need."""
        facts = [self._facts_of(image.shape[1], image.shape[2]) for image in images]
        lengths = [self.model.prefix + patches for *_, patches in facts]
        size = self._choose(lengths)
        images, places, vit = [image.contiguous() for image in images], {}, self.model.vit
        if vit.pos_embed is not None:
            places = {grid: self.model._positions(vit, grid).contiguous() for grid in {f[:2] for f in facts}}
        self._alive = images, places  # until the next call, which comes after this one on the GPU
        lines, start = [], 0
        for image, (high, wide, patches), rows in zip(images, facts, lengths, strict=True):
            place = places[high, wide].data_ptr() if places else 0
            lines.append((image.data_ptr(), image.shape[1], image.shape[2], wide, patches, place, start))
            start += rows
        return self._send(size, lines, start)

    def _facts_of(self, height: int, width: int) -> tuple[int, int, int]:
        if (height, width) not in self._facts:
            high, wide = self.model.vit.patch_embed.dynamic_feat_size((height, width))
            self._facts[height, width] = int(high), int(wide), int(high * wide)
        return self._facts[height, width]

    def _send(self, size: int, lines: list[tuple[int, ...]], total: int) -> int:
        empty = (*[0] * START, total)
        table = torch.tensor(lines + [empty] * (self.batch + 1 - len(lines)), dtype=torch.int64)
        self.table.copy_(table, non_blocking=True)
        self.size, self._total = size, total
        return size

    def _replay(self, size: int, images: int) -> Tensor:
        self.fronts[size].replay()
        self._cuts, self._rows = self._cuts_of.get(size, []), self._capacity(size)
        result = self.fronts[size].result if self.rest is None else self.rest()
        return result[:images].clone()

    def _choose(self, lengths: Sequence[int]) -> int:
        """The smallest capacity with room for images of these lengths, before and after every cut. ValueError where
        there is none, saying what to record."""
        images, longest, total, what = len(lengths), max(lengths), sum(lengths), self.what
        if images > self.batch:
            raise ValueError(f"{what}: captured for up to {self.batch} images, got {images}; capture({images}, ...) "
                             "takes them, or two calls")  # fmt: skip
        if longest > self.longest:
            raise ValueError(f"{what}: captured for up to {self.longest} tokens an image ({self.largest}), got one of "
                             f"{longest}; capture with a larger longest=, or make it smaller")  # fmt: skip
        if total > self.most:
            raise ValueError(f"{what}: captured for up to {self.most} tokens in all, got {total}; capture with "
                             f"tokens={total}, or call twice")  # fmt: skip
        if self.padded:
            return self.capacities[bisect_left(self.capacities, longest)]
        needs = [sum(rows) for rows in zip(*map(self._after, lengths), strict=True)]
        for size in self.capacities[bisect_left(self.capacities, total) :]:
            if all(need <= room for need, room in zip(needs, self._room[size], strict=True)):
                return size
        raise ValueError(f"{what}: {needs[1:]} rows stay after the cuts, and there is room for {self._room[size][1:]}; "
                         f"capture with a larger tokens=, {size + images} should do")  # fmt: skip


class CapturedTokens(CapturedList):
    """`RaggedViT.forward_tokens` as CUDA graphs: call it with tokens (total, dim), cu_seqlens, and lengths."""

    what = "tokens"

    def _features(self) -> int:
        return self.model.vit.embed_dim

    def _tokens(self, rows: int, longest: int) -> tuple[Tensor, Tensor]:
        row, cu = torch.arange(rows, device=self.table.device), self.table[:, START].contiguous()
        return self.buffer[:rows], row - cu[image_of_rows(cu, rows).clamp_(max=self.batch - 1)]

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """As `RaggedViT.forward_tokens`: without lengths the offsets are read, which is a wait."""
        lengths = check_packed(tokens, cu_seqlens, None, lengths, self.model.vit, self.model.prefix)
        return self._in_turn(lambda: self._replay(self.fill(tokens, lengths), len(lengths)))

    def fill(self, tokens: Tensor, lengths: Sequence[int]) -> int:
        """Copy tokens (total, dim) of images of `lengths` rows, and answer the capacity that they need."""
        size = self._choose(lengths)
        self.buffer[: tokens.shape[0]].copy_(tokens, non_blocking=True)
        starts = itertools.accumulate(lengths, initial=0)
        lines = [(0, 0, 0, 0, n - self.model.prefix, 0, start) for n, start in zip(lengths, starts, strict=False)]
        return self._send(size, lines, tokens.shape[0])


def _tensors(pending: Pending) -> list[Tensor]:
    """Everything at a cut that the rest of the pass reads."""
    state, chosen = pending.cut.state, pending.cut.selection
    given = (state.tokens, state.more, state.ids, state.cu_seqlens, chosen.index, chosen.counts)
    return [x for x in given if x is not None]


def _copy_of(pending: Pending) -> Pending:
    """The same pass at the same cut, on memory of its own."""
    cut, state, chosen = pending.cut, pending.cut.state, pending.cut.selection
    more = None if state.more is None else state.more.clone()
    state = replace(state, tokens=state.tokens.clone(), more=more, ids=state.ids.clone(),
                    cu_seqlens=state.cu_seqlens.clone(), rows=None, unpruned=None, own=None)  # fmt: skip
    chosen = replace(chosen, index=chosen.index.clone(), counts=chosen.counts.clone())
    return replace(pending, cut=replace(cut, state=state, selection=chosen))


def capture_list(
    model: nn.Module, batch: int, tokens: int | tuple[int, int], longest: int | tuple[int, int] | None, warmup: int,
    between: tuple[int, int] | None, wait: bool | None, embedded: bool,
) -> CapturedList:  # fmt: skip
    """Record `model` for lists of at most `batch` images; warmup, between, wait: as in `capture`.

    tokens: the most tokens a list has in all, prefix tokens included; or the least and the most, which saves recordings
    (a shorter list then takes the smallest).  longest: the largest image, as pixels (height, width) or as tokens;
    None: the size that the model was made for.  between: under a padded backend, the least and most tokens of the
    largest image.  embedded: for packed tokens, as `RaggedViT.forward_tokens` takes them.
    TypeError, ValueError or NotImplementedError, saying what cannot be recorded.
    """
    patch, backend = model.vit.patch_embed, BACKENDS[model.picked]
    if not embedded and not model.survey.each_product:
        raise NotImplementedError("capture: the patch embedding has to be called as it is, image by image; call the "
                                  "model itself with the list")  # fmt: skip
    if not embedded and model.survey.no_list is not None:
        raise ValueError(f"vit: {model.survey.no_list}, so that a list of images cannot be packed")
    if not launch.usable(patch.proj.weight.device):
        raise NotImplementedError("capture: a list of images is read by a Triton kernel, and Triton is not installed")
    if backend.equal_only:
        raise ValueError(f"backend {backend.name!r}: needs equal counts; use 'auto'")
    if longest is None or isinstance(longest, tuple):
        largest = patch.img_size if longest is None else longest
        high, wide = patch.dynamic_feat_size(largest)
        rows, largest = int(high * wide) + model.prefix, f"{largest[0]} x {largest[1]} pixels"
    else:
        rows, largest = longest, "longest="
    least, most = tokens if isinstance(tokens, tuple) else (0, tokens)
    if any(type(n) is not int for n in (least, most, rows)) or not 0 <= least <= most or most <= model.prefix:
        raise ValueError(f"tokens: expected the most tokens of a list, or the least and the most, got {tokens!r}")
    if rows <= model.prefix:
        expected = f"(height, width) or more tokens than the {model.prefix} first"
        raise ValueError(f"longest: expected {expected}, got {longest}")
    rows = min(rows, most)
    most = min(most, batch * rows)
    if wait and backend.pads:
        raise NotImplementedError("capture: for lists of images a padded backend is recorded without waits; leave out "
                                  "wait=, or use 'auto'")  # fmt: skip
    wait = not backend.pads and most > FEW_ROWS if wait is None else wait
    if backend.pads:
        sizes = sorted({*range(2 * WIDTH_STEP, rows, 2 * WIDTH_STEP), rows})
        sizes = sizes[bisect_left(sizes, least // batch) :]  # the longest image has at least the mean
        sizes = sizes if between is None else needed("between", sizes, *between)
    else:
        sizes = needed("tokens", bucket_sizes(most), least, most)
    kind = CapturedTokens if embedded else CapturedList
    captured = kind(model, batch, sizes, most, rows, largest)
    captured.record(warmup, between, wait)
    return captured
