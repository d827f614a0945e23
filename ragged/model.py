"""The pruned model: images -> early blocks -> pruner -> pack -> attend -> classify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import resolve_backend
from .backends import BACKENDS
from .blocks import PIECES, compiled_pieces
from .fused import cls_attention
from .graph import Captured, between_blocks, capture
from .layout import Packed, Padded, Selection, read_sizes, take_by_loop, take_packed, take_padded
from .loading import check_supported
from .pruners import Pruner
from .selection import View, row_norms

State = Packed | Padded


class Stage(NamedTuple):
    """What one cut left. block: index.  where: place in it.  counts: rows of each image.  ids: for each image the kept
    row numbers of the unpruned sequence in order, 0 for CLS, -1 for a fused token."""

    block: int
    where: str
    counts: list[int]
    ids: list[Tensor]


class Trace(NamedTuple):
    """logits (batch, classes), and one `Stage` per cut."""

    logits: Tensor
    stages: list[Stage]


@dataclass(frozen=True)
class Pending:
    """A forward pass that cannot go on before somebody says how many rows stay: call `resume(total, longest)`.
    It may be resumed more than once, which is how one front serves several CUDA graphs."""

    counts: Tensor
    width: int  # no count is larger
    resume: Callable[[int, int], Tensor | Pending]


class RaggedViT(nn.Module):
    """A timm Vision Transformer that drops tokens on its way.

    vit: a model `check_supported` accepts; its weights are used as they are, and it is set to eval mode.
    pruner: a pruner from `PRUNERS`, or None for the unpruned model.  backend: a name in `BACKENDS` or "auto";
    backends of layout "padded" run the pruned blocks on (batch, n, dim), the others on the packed buffer. Inference
    only.
    """

    def __init__(self, vit: nn.Module, pruner: Pruner | None = None, backend: str = "auto"):
        super().__init__()
        if pruner is not None and not isinstance(pruner, Pruner):
            raise TypeError(f"pruner: expected a pruner such as PRUNERS['evit'](keep=0.7) or None, got {pruner!r}")
        self.vit, self.pruner = check_supported(vit).eval(), pruner
        if backend != "auto" and (not isinstance(backend, str) or backend not in BACKENDS):
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend == "dense" and pruner is not None and pruner.adaptive:
            raise ValueError(f"backend 'dense': needs equal counts, and {pruner.name} keeps what each image needs")
        self.backend, self.prefix = backend, vit.num_prefix_tokens
        if pruner is not None:
            pruner.bind(vit.embed_dim, len(vit.blocks))
            pruner.to(vit.patch_embed.proj.weight)
        # a cut before block i is a cut after block i - 1, and -1 is the embedding
        before = pruner is not None and pruner.where == "before"
        self._cuts = {} if pruner is None else {i - before: stage for stage, i in enumerate(pruner.at)}
        self._run: dict[str, Callable] = {piece.__name__: piece for piece in PIECES}

    def compile(self, **options: object) -> RaggedViT:
        """Compile the pieces of the pass with `torch.compile`, once for all blocks; token counts become dynamic when
        they change. Returns self. options go to `torch.compile`."""
        self._run = compiled_pieces(**options)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        return self._finish(self.begin(images))

    @torch.no_grad()
    def trace(self, images: Tensor) -> Trace:
        """`forward` of images (batch, channels, height, width), and what every cut left."""
        stages: list[Stage] = []
        return Trace(self._finish(self.begin(images, stages)), stages)

    def capture(self, batch_size: int, **options: object) -> Captured:
        """The whole forward as CUDA graphs for `batch_size` images; options and errors: see `ragged.graph.capture`."""
        return capture(self, batch_size, **options)

    def begin(self, images: Tensor, stages: list[Stage] | None = None) -> Tensor | Pending:
        """Run images until the logits, or until a cut whose size only the GPU knows; every cut is added to `stages`."""
        self._check_images(images)
        x, prefix = self._run["embed"](self.vit, images), self.prefix
        n = x.shape[1]
        state = Padded(x, torch.arange(n, device=x.device).expand(x.shape[0], n), n, count=n)
        if self.pruner is not None and self.picked == "triton":
            state = state.flat()  # our kernel is ahead of dense SDPA too, so the early blocks use it as well
        if -1 in self._cuts:
            selection = self.pruner.select(View(state, prefix, self._cuts[-1]))
            return self._cut(state, selection, -1, stages, lambda new: self._blocks(new, 0, stages))
        return self._blocks(state, 0, stages)

    def _finish(self, result: Tensor | Pending) -> Tensor:
        while isinstance(result, Pending):
            result = result.resume(*read_sizes(result.counts))
        return result

    def _check_images(self, images: Tensor) -> None:
        weight = self.vit.patch_embed.proj.weight
        expected = (weight.shape[1], *self.vit.patch_embed.img_size)
        if not isinstance(images, Tensor) or images.dim() != 4 or tuple(images.shape[1:]) != expected:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected (batch, {', '.join(map(str, expected))}), got {shape}")
        if images.shape[0] == 0:
            raise ValueError("images: expected at least one image, got an empty batch")
        if images.dtype != weight.dtype or images.device != weight.device:
            raise ValueError(
                f"images: expected {weight.dtype} on {weight.device} like the model, "
                f"got {images.dtype} on {images.device}"
            )

    def _blocks(self, state: State, first: int, stages: list | None) -> Tensor | Pending:
        blocks, backend = self.vit.blocks, self.picked  # asked once: to find it out takes microseconds
        for i in range(first, len(blocks)):
            if i not in self._cuts:
                state = replace(state, tokens=self._whole_block(state, blocks[i], backend))
                between_blocks.get()()
            elif self.pruner.where == "inside":
                return self._inside(state, i, stages)
            else:
                return self._after(state, i, stages)
        return self.vit.forward_head(self.vit.norm(state.first_rows(self.prefix)))

    def _after(self, state: State, i: int, stages: list | None) -> Tensor | Pending:
        block = self.vit.blocks[i]
        q, k, v = self._run["project"](block, state.tokens)
        x = self._run["finish_attention"](block, state.tokens, self._attend(state, state, q, k, v, block))
        new = replace(state, tokens=self._run["finish_block"](block, x))
        selection = self.pruner.select(self._view(new, i, q, k, v, block))
        return self._cut(new, selection, i, stages, lambda cut: self._blocks(cut, i + 1, stages))

    def _inside(self, state: State, i: int, stages: list | None) -> Tensor | Pending:
        block = self.vit.blocks[i]
        q, k, v = self._run["project"](block, state.tokens)
        if not self.pruner.rows_only:
            x = self._run["finish_attention"](block, state.tokens, self._attend(state, state, q, k, v, block))
            state = replace(state, tokens=x)

            def rest(cut: State) -> Tensor | Pending:
                return self._blocks(replace(cut, tokens=self._run["finish_block"](block, cut.tokens)), i + 1, stages)

            return self._cut(state, self.pruner.select(self._view(state, i, q, k, v, block)), i, stages, rest)

        def rows(cut: State) -> Tensor | Pending:
            # tokens and queries went through the cut side by side; keys and values of all rows are still here
            dim = state.tokens.shape[-1]
            x, new_q = cut.tokens[..., :dim], cut.tokens[..., dim:].unflatten(-1, q.shape[-2:])
            heads = self._attend(cut, state, new_q, k, v, block)
            x = self._run["finish_block"](block, self._run["finish_attention"](block, x, heads))
            return self._blocks(replace(cut, tokens=x), i + 1, stages)

        selection = self.pruner.select(self._view(state, i, q, k, v, block))
        both = replace(state, tokens=torch.cat((state.tokens, q.flatten(-2)), -1))
        return self._cut(both, selection, i, stages, rows)

    def _cut(self, state: State, selection: Selection | None, block: int, stages: list | None,
             then: Callable[[State], Tensor | Pending]) -> Tensor | Pending:  # fmt: skip
        def go(new: State) -> Tensor | Pending:
            if stages is not None:
                stage = self._cuts[block]
                stages.append(_record(new, self.pruner.at[stage], self.pruner.where))
            return then(new)

        if selection is None:
            return go(state)
        backend = BACKENDS[self.picked]
        if backend.name == "paper_padded":  # the paper pads to the original length, always
            return go(take_by_loop(state, selection))
        known = isinstance(selection.counts, int)
        if backend.layout == "padded":
            if known:
                return go(take_padded(state, selection))
            return Pending(
                selection.counts, state.width, lambda total, longest: go(take_padded(state, selection, longest))
            )
        if known:
            return go(take_packed(state, selection))
        return Pending(
            selection.counts, state.width,
            lambda total, longest: go(take_packed(state, selection, lambda counts: (total, longest))),
        )  # fmt: skip

    def _attend(self, state_q: State, state_k: State, q: Tensor, k: Tensor, v: Tensor, block: nn.Module) -> Tensor:
        scale, backend = block.attn.scale, self.picked
        if isinstance(state_q, Padded):
            return self._run["attend_padded"](q, k, v, state_k.lengths, scale, _unfused(state_k, backend))
        k, v = (x.flatten(0, -3) for x in (k, v))
        arguments = (state_q.cu_seqlens, state_k.cu_seqlens, state_q.max_seqlen, state_k.width, scale, backend)
        return self._run["attend_packed"](q, k, v, *arguments)

    def _whole_block(self, state: State, block: nn.Module, backend: str) -> Tensor:
        scale = block.attn.scale
        if isinstance(state, Packed):
            return self._run["packed_block"](block, state.tokens, state.cu_seqlens, state.max_seqlen, scale, backend)
        return self._run["padded_block"](block, state.tokens, state.lengths, scale, _unfused(state, backend))

    def _view(self, state: State, i: int, q: Tensor, k: Tensor, v: Tensor, block: nn.Module) -> View:
        view = View(state, self.prefix, self._cuts[i])
        if "attention" in self.pruner.needs:
            lead, lengths = state.tokens.shape[:-1], state.lengths
            if lengths is None:
                lengths = torch.full((state.batch,), state.width, dtype=torch.int32, device=q.device)
            rows = (x.flatten(0, -3) for x in (q, k))
            probs = cls_attention(*rows, state.starts, lengths, state.width, block.attn.scale)
            view = replace(view, cls_attention=state.grid(probs.view(*lead, -1)))
        if "values" in self.pruner.needs:
            view = replace(view, value_norm=state.grid(row_norms(v.flatten(-2))))
        return view

    @property
    def picked(self) -> str:
        """The backend that runs, with "auto" decided for the model's present device and dtype."""
        weight, head_dim = self.vit.patch_embed.proj.weight, self.vit.embed_dim // self.vit.blocks[0].attn.num_heads
        return resolve_backend(self.backend, weight.device, weight.dtype, head_dim)


def _unfused(state: Padded, backend: str) -> bool:
    """The paper's padded baseline leaves the fused kernels once there is padding; before the first cut it is dense."""
    return backend == "paper_padded" and state.lengths is not None


def _record(state: State, block: int, where: str) -> Stage:
    if isinstance(state, Packed):
        counts = state.lengths.tolist()
        return Stage(block, where, counts, list(state.ids[: sum(counts)].split(counts)))
    counts = [state.width] * state.batch if state.lengths is None else state.lengths.tolist()
    return Stage(block, where, counts, [ids[:n] for ids, n in zip(state.ids, counts, strict=True)])
