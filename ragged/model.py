"""The pruned model: images -> blocks -> pruner -> pack -> attend -> classify, in one loop.

First a transformer block in pieces: four row-wise ones around one attention call. Row-wise pieces do not care whether
they get (batch, n, dim) or (total, dim); only attention does. Every piece is a plain function of a block and tensors,
so that `torch.compile` compiles it once and uses it for all blocks. Then `RaggedViT`, which runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import resolve_backend, varlen_attention
from .backends import BACKENDS, Backend, masked_sdpa, unfused_softmax
from .checks import check_supported
from .graph import Captured, capture
from .packing import Packed, Padded, Selection, read_sizes, take_by_loop, take_packed, take_padded
from .pruners import Pruner, View, row_norms
from .rows import cls_attention

State = Packed | Padded


# ---- the pieces of a block ----


def embed(vit: nn.Module, images: Tensor) -> Tensor:
    """Tokens (batch, n, dim) of images (batch, channels, height, width), with vit's prefix tokens and positions."""
    patch = vit.patch_embed
    x = _patch_rows(patch, images) if _is_product(patch) else patch(images)
    return vit.norm_pre(vit._pos_embed(x))


def _is_product(patch: nn.Module) -> bool:
    """Whether the patch embedding is one matrix product: patches that neither overlap nor are padded."""
    conv = patch.proj
    plain = conv.stride == conv.kernel_size and set(conv.padding) == {0} and set(conv.dilation) == {1}
    return plain and conv.groups == 1 and patch.flatten and not patch.dynamic_img_pad


def _patch_rows(patch: nn.Module, images: Tensor) -> Tensor:
    """The patch embedding as the matrix product that it is. As a convolution with stride 16 it runs in kernels made
    for overlapping windows: a fifth of a DeiT-S forward pass, and the same however many tokens are pruned."""
    conv, batch = patch.proj, images.shape[0]
    (high, wide), (down, across), channels = patch.grid_size, conv.kernel_size, conv.in_channels
    images = images[..., : high * down, : wide * across]  # what is left over at the edge is in no patch
    pixels = images.reshape(batch, channels, high, down, wide, across).permute(0, 2, 4, 1, 3, 5)
    rows = pixels.reshape(batch * high * wide, channels * down * across)  # one row a patch
    x = nn.functional.linear(rows, conv.weight.flatten(1), conv.bias)  # (batch * patches, dim)
    return patch.norm(x.unflatten(0, (batch, high * wide)))  # (batch, patches, dim)


def project(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block for tokens x (..., dim), each (..., nheads, headdim): views of one
    projection."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))  # (..., 3, nheads, headdim)
    q, k, v = qkv.unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def finish_attention(block: nn.Module, x: Tensor, heads: Tensor) -> Tensor:
    """The residual x (..., dim) plus the attention output of a block, projected; heads (..., nheads, headdim)."""
    attn, out = block.attn, heads.flatten(-2)  # (..., dim)
    return x + block.ls1(attn.proj(attn.norm(out) if hasattr(attn, "norm") else out))


def finish_block(block: nn.Module, x: Tensor) -> Tensor:
    """The MLP half of a block on x (..., dim)."""
    return x + block.ls2(block.mlp(block.norm2(x)))


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
                  backend: str) -> Tensor:  # fmt: skip
    """Attention on packed q, k, v (total, nheads, headdim); cu_q, cu_k, max_q, max_k, scale, backend: as
    `varlen_attention` takes them."""
    return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, backend=backend)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths_k: Tensor | None, scale: float, unfused: bool) -> Tensor:
    """Attention on q, k, v (batch, n, nheads, headdim) times scale; lengths_k (batch,) marks the real keys. unfused: as
    the paper pads."""
    real = None if lengths_k is None else torch.arange(k.shape[1], device=k.device) < lengths_k[:, None]
    return (unfused_softmax if unfused else masked_sdpa)(q, k, v, real, scale)


def packed_block(block: nn.Module, x: Tensor, cu: Tensor, longest: int, scale: float, backend: str) -> Tensor:
    """One whole block on packed tokens x (total, dim); cu (batch + 1,), longest, scale, backend: as in
    `attend_packed`."""
    q, k, v = project(block, x)
    heads = attend_packed(q, k, v, cu, cu, longest, longest, scale, backend)
    return finish_block(block, finish_attention(block, x, heads))


def padded_block(block: nn.Module, x: Tensor, lengths: Tensor | None, scale: float, unfused: bool) -> Tensor:
    """One whole block on x (batch, n, dim), of which lengths (batch,) rows are real (None: all); scale, unfused: as in
    `attend_padded`."""
    q, k, v = project(block, x)
    return finish_block(block, finish_attention(block, x, attend_padded(q, k, v, lengths, scale, unfused)))


PIECES = (
    embed, project, finish_attention, finish_block, attend_packed, attend_padded, packed_block, padded_block,
)  # fmt: skip

# Fixed block sizes for row-wise kernels. By itself the compiler times two, on the first batch that comes by, and keeps
# the winner of that moment: a pass becomes up to a tenth slower, and another one every time.
STEADY = {"triton.autotune_pointwise": False}


def compiled_pieces(**options: object) -> dict[str, Callable]:
    """Every piece, by name, compiled with options for `torch.compile`; with `STEADY`, unless they name a mode, options
    or a backend of their own."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if not {"mode", "options", "backend"} & options.keys():
        options["options"] = STEADY
    return {piece.__name__: torch.compile(piece, fullgraph=True, **options) for piece in PIECES}


# ---- what a pass leaves behind ----


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


def _nothing() -> None:
    pass


class Pass(NamedTuple):
    """What stays the same during a pass. backend: who attends.  stages: where cuts are noted, or None.
    after_block: called after every block without a cut (a recording begins its second graph there)."""

    backend: Backend
    stages: list[Stage] | None = None
    after_block: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Cut:
    """A block that has run as far as its cut. state: its tokens there.  selection: which rows stay, None for all.
    block: index, -1 for the embedding.  remains: what of the block is still to do, nothing, its "mlp" or its
    "attention" and MLP; then `state.tokens` holds tokens and queries side by side, and keys, values are (rows, nheads,
    headdim) of all rows before the cut."""

    state: State
    selection: Selection | None
    block: int
    remains: str = ""
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def waits(self) -> bool:
        """Whether only the GPU knows how many rows stay."""
        return self.selection is not None and isinstance(self.selection.counts, Tensor)


@dataclass(frozen=True)
class Pending:
    """A pass that cannot go on before somebody says how many rows stay: call `resume(total, longest)`. It may be
    resumed more than once, which is how one front serves several CUDA graphs."""

    model: RaggedViT = field(repr=False)
    cut: Cut
    run: Pass

    @property
    def counts(self) -> Tensor:
        """Rows of each image after the cut, int32 (batch,), on the device."""
        return self.cut.selection.counts

    @property
    def width(self) -> int:
        """Rows per image before the cut: no count is larger."""
        return self.cut.state.width

    def resume(self, total: int, longest: int, after_block: Callable[[], None] = _nothing) -> Tensor | Pending:
        """Go on with room for `total` rows, at most `longest` in one image; after_block: as in `Pass`."""
        run = self.run._replace(after_block=after_block)
        return self.model._blocks(self.model._leave(self.cut, run, (total, longest)), self.cut.block + 1, run)


# ---- the model ----


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
        if backend != "auto" and BACKENDS[backend].equal_only and pruner is not None and pruner.adaptive:
            raise ValueError(f"backend {backend!r}: needs equal counts, and {pruner.name} keeps what each image needs")
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

    def begin(self, images: Tensor, stages: list[Stage] | None = None,
              after_block: Callable[[], None] = _nothing) -> Tensor | Pending:  # fmt: skip
        """Run images until the logits, or until a cut whose size only the GPU knows; every cut is added to `stages`;
        after_block: as in `Pass`."""
        self._check_images(images)
        run = Pass(BACKENDS[self.picked], stages, after_block)  # asked once: to find it out takes microseconds
        x = self._run["embed"](self.vit, images)  # (batch, n, dim)
        batch, n, _ = x.shape
        state = Padded(x, torch.arange(n, device=x.device).expand(batch, n), n, count=n)
        if self.pruner is not None and run.backend.packs_first:
            state = state.flat()  # our kernel is ahead of dense SDPA too, so the early blocks use it as well
        return self._blocks(state, -1, run)

    def _finish(self, result: Tensor | Pending) -> Tensor:
        while isinstance(result, Pending):
            result = result.resume(*read_sizes(result.counts))
        return result

    def _blocks(self, state: State, first: int, run: Pass) -> Tensor | Pending:
        """The loop: every block up to its cut, the cut, and what remains of the block. Block -1 is the embedding."""
        for i in range(first, len(self.vit.blocks)):
            if i not in self._cuts:
                if i >= 0:
                    state = self._whole_block(state, self.vit.blocks[i], run)
                    run.after_block()
                continue
            cut = self._reach(state, i, run)
            if cut.waits and not run.backend.paper_padding:  # the paper's loop asks by itself
                return Pending(self, cut, run)
            state = self._leave(cut, run)
        return self.vit.forward_head(self.vit.norm(state.first_rows(self.prefix)))

    def _whole_block(self, state: State, block: nn.Module, run: Pass) -> State:
        scale, backend = block.attn.scale, run.backend
        if isinstance(state, Packed):
            sizes = (state.cu_seqlens, state.max_seqlen)
            x = self._run["packed_block"](block, state.tokens, *sizes, scale, backend.name)
        else:
            x = self._run["padded_block"](block, state.tokens, state.lengths, scale, _unfused(state, backend))
        return replace(state, tokens=x)

    def _reach(self, state: State, i: int, run: Pass) -> Cut:
        """Run block i as far as its cut, and ask the pruner which rows stay."""
        if i < 0:
            return Cut(state, self.pruner.select(View(state, self.prefix, self._cuts[i])), i)
        block, x = self.vit.blocks[i], state.tokens
        q, k, v = self._run["project"](block, x)  # (..., nheads, headdim)
        if self.pruner.where == "inside" and self.pruner.rows_only:
            selection = self._select(state, i, q, k, v)
            queries_too = replace(state, tokens=torch.cat((x, q.flatten(-2)), -1))  # (..., 2 * dim)
            return Cut(queries_too, selection, i, "attention", k, v)
        x = self._run["finish_attention"](block, x, self._attend(state, state, q, k, v, block, run))
        if self.pruner.where == "inside":
            state = replace(state, tokens=x)
            return Cut(state, self._select(state, i, q, k, v), i, "mlp")
        state = replace(state, tokens=self._run["finish_block"](block, x))
        return Cut(state, self._select(state, i, q, k, v), i)

    def _leave(self, cut: Cut, run: Pass, sizes: tuple[int, int] | None = None) -> State:
        """Take the rows that stay, and do what remains of the block. sizes: total and longest, where a cut waits."""
        new = _take(cut, run.backend, sizes)
        if run.stages is not None:
            run.stages.append(_stage(new, self.pruner.at[self._cuts[cut.block]], self.pruner.where))
        if not cut.remains:
            return new
        block, x = self.vit.blocks[cut.block], new.tokens
        if cut.remains == "attention":
            heads, dim = cut.keys.shape[-2:]
            x, q = x[..., : -heads * dim], x[..., -heads * dim :].unflatten(-1, (heads, dim))
            out = self._attend(new, cut.state, q, cut.keys, cut.values, block, run)
            x = self._run["finish_attention"](block, x, out)
        return replace(new, tokens=self._run["finish_block"](block, x))

    def _attend(self, state_q: State, state_k: State, q: Tensor, k: Tensor, v: Tensor, block: nn.Module,
                run: Pass) -> Tensor:  # fmt: skip
        scale = block.attn.scale
        if isinstance(state_q, Padded):
            return self._run["attend_padded"](q, k, v, state_k.lengths, scale, _unfused(state_k, run.backend))
        k, v = (x.flatten(0, -3) for x in (k, v))  # (total, nheads, headdim), also where keys are still dense
        sizes = (state_q.cu_seqlens, state_k.cu_seqlens, state_q.max_seqlen, state_k.width)
        return self._run["attend_packed"](q, k, v, *sizes, scale, run.backend.name)

    def _select(self, state: State, i: int, q: Tensor, k: Tensor, v: Tensor) -> Selection | None:
        """Ask the pruner, with the scores it needs from block i's q, k, v (..., nheads, headdim)."""
        view = View(state, self.prefix, self._cuts[i])
        if "attention" in self.pruner.needs:
            lead, lengths = state.tokens.shape[:-1], state.lengths
            if lengths is None:
                lengths = torch.full((state.batch,), state.width, dtype=torch.int32, device=q.device)
            rows = (x.flatten(0, -3) for x in (q, k))  # (rows, nheads, headdim)
            probs = cls_attention(*rows, state.starts, lengths, state.width, self.vit.blocks[i].attn.scale)
            view = replace(view, cls_attention=state.grid(probs.view(*lead, -1)))  # (batch, n, nheads)
        if "values" in self.pruner.needs:
            view = replace(view, value_norm=state.grid(row_norms(v.flatten(-2))))  # (batch, n)
        return self.pruner.select(view)

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

    @property
    def picked(self) -> str:
        """The backend that runs, with "auto" decided for the model's present device and dtype."""
        weight, head_dim = self.vit.patch_embed.proj.weight, self.vit.embed_dim // self.vit.blocks[0].attn.num_heads
        return resolve_backend(self.backend, weight.device, weight.dtype, head_dim)


def _take(cut: Cut, backend: Backend, sizes: tuple[int, int] | None) -> State:
    """The rows that stay, in the layout of the backend."""
    if cut.selection is None:
        return cut.state
    if backend.paper_padding:  # the paper pads to the original length, always
        return take_by_loop(cut.state, cut.selection)
    if backend.pads:
        return take_padded(cut.state, cut.selection, sizes and sizes[1])
    return take_packed(cut.state, cut.selection, lambda counts: sizes)


def _unfused(state: Padded, backend: Backend) -> bool:
    """The paper's padded baseline leaves the fused kernels once there is padding; before the first cut it is dense."""
    return backend.paper_padding and state.lengths is not None


def _stage(state: State, block: int, where: str) -> Stage:
    if isinstance(state, Packed):
        counts = state.lengths.tolist()
        return Stage(block, where, counts, list(state.ids[: sum(counts)].split(counts)))
    counts = [state.width] * state.batch if state.lengths is None else state.lengths.tolist()
    return Stage(block, where, counts, [ids[:n] for ids, n in zip(state.ids, counts, strict=True)])
