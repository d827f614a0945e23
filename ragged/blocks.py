"""A transformer block in pieces: four row-wise ones around one attention call.

Row-wise pieces do not care whether they get (batch, n, dim) or (total, dim); only attention does. Every piece is a
plain function of a block and tensors, so that `torch.compile` compiles it once and uses it for all blocks; an eager
pass gives it a `Bare` block. One more comes before the first block: `embed`. They take the place of timm's `forward`
methods where a block is plain; support/ decides that.

Then the records of a pass through the blocks: where it stands, and what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import packing
from .attention import varlen_attention
from .backends import Backend, masked_sdpa, unfused_softmax
from .gradients import split_projection
from .packing import Packed, Padded, Selection, packed_state, padded_state, put_back
from .rows import host_offsets
from .rules import run_module
from .support.bare import Bare
from .support.training import drop_images

State = Packed | Padded


def embed(vit: nn.Module, images: Tensor, as_product: bool) -> Tensor:
    """Tokens (batch, n, dim) of images (batch, channels, height, width), with vit's prefix tokens and positions.
    as_product: the patch embedding is one matrix product (see `Survey`)."""
    x = vit._pos_embed(_patch_rows(vit.patch_embed, images) if as_product else vit.patch_embed(images))
    return vit.norm_pre(vit.patch_drop(x))


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


def scale_of(block: nn.Module | Bare) -> float:
    """What the scores of a block are multiplied by. timm's fused attention does not ask `attn.scale`."""
    return block.attn.head_dim**-0.5 if block.attn.fused_attn else block.attn.scale


def project(block: nn.Module | Bare, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block for tokens x (..., dim), each (..., nheads, headdim): views of one
    projection."""
    if isinstance(block, Bare):
        return block.project(x)
    attn = block.attn
    qkv = attn.qkv(block.norm1(x))  # (..., 3 * dim)
    qkv = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim))  # (..., 3, nheads, headdim)
    q, k, v = split_projection(qkv) if qkv.dim() == 4 and qkv.requires_grad else qkv.unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def project_heads(block: nn.Module | Bare, heads: Tensor, cu: Tensor | None = None, drops: bool = False) -> Tensor:
    """What attention adds to the residual stream (..., dim), made of heads (..., nheads, headdim). drops: with what is
    dropped in training; cu: then the offsets of packed rows."""
    if isinstance(block, Bare):
        return block.project_heads(heads)
    attn, out = block.attn, heads.flatten(-2)  # (..., dim)
    out = attn.proj(attn.norm(out) if hasattr(attn, "norm") else out)
    if drops:
        return drop_images(block.drop_path1, block.ls1(attn.proj_drop(out)), cu)
    return block.ls1(out)


def finish_attention(block: nn.Module | Bare, x: Tensor, heads: Tensor, cu: Tensor | None = None,
                     drops: bool = False) -> Tensor:  # fmt: skip
    """The residual x (..., dim) plus the attention output of a block; heads, cu, drops: as in `project_heads`."""
    return x + project_heads(block, heads, cu, drops)


def finish_block(block: nn.Module | Bare, x: Tensor, cu: Tensor | None = None, drops: bool = False) -> Tensor:
    """The MLP half of a block on x (..., dim); cu, drops: as in `finish_attention`."""
    if isinstance(block, Bare):
        return block.finish_block(x)
    out = block.ls2(block.mlp(block.norm2(x)))
    return x + (drop_images(block.drop_path2, out, cu) if drops else out)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, backend: str) -> Tensor:
    """Attention on packed q, k, v (total, nheads, headdim); cu (batch + 1,), longest, scale, backend: as
    `varlen_attention` takes them. Under autocast in its dtype, as `scaled_dot_product_attention`."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return varlen_attention(q, k, v, cu, cu, longest, longest, softmax_scale=scale, backend=backend)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths_k: Tensor | None, scale: float, unfused: bool) -> Tensor:
    """Attention on q, k, v (batch, n, nheads, headdim) times scale; lengths_k (batch,) marks the real keys. unfused: as
    the paper pads."""
    real = None if lengths_k is None else torch.arange(k.shape[1], device=k.device) < lengths_k[:, None]
    return (unfused_softmax if unfused else masked_sdpa)(q, k, v, real, scale)


def packed_block(block: nn.Module | Bare, x: Tensor, cu: Tensor, longest: int, scale: float, backend: str,
                 drops: bool = False) -> Tensor:  # fmt: skip
    """One whole block on packed tokens x (total, dim); cu (batch + 1,), longest, scale, backend: as in
    `attend_packed`; drops: as in `finish_attention`."""
    q, k, v = project(block, x)
    heads = attend_packed(q, k, v, cu, longest, scale, backend)
    return finish_block(block, finish_attention(block, x, heads, cu, drops), cu, drops)


def padded_block(block: nn.Module | Bare, x: Tensor, lengths: Tensor | None, scale: float, unfused: bool,
                 drops: bool = False) -> Tensor:  # fmt: skip
    """One whole block on x (batch, n, dim), of which lengths (batch,) rows are real (None: all); scale, unfused: as in
    `attend_padded`; drops: as in `finish_attention`."""
    q, k, v = project(block, x)
    x = finish_attention(block, x, attend_padded(q, k, v, lengths, scale, unfused), None, drops)
    return finish_block(block, x, None, drops)


PIECES = (embed, project, project_heads, finish_attention, finish_block, attend_packed, attend_padded, packed_block,
          padded_block, run_module)  # fmt: skip

# Fixed block sizes for row-wise kernels. By itself the compiler times two, on the first batch that comes by, and keeps
# the winner of that moment: a pass becomes up to a tenth slower, and another one every time.
STEADY = {"triton.autotune_pointwise": False}


def compiled_pieces(foreign: bool = False, **options: object) -> dict[str, Callable]:
    """Every piece, by name, compiled with options for `torch.compile`; with `STEADY`, unless they name a mode, options
    or a backend of their own. foreign: modules of unknown types are in there, which may break a graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if not {"mode", "options", "backend"} & options.keys():
        options["options"] = STEADY
    return {piece.__name__: torch.compile(piece, fullgraph=not foreign, **options) for piece in PIECES}


# ---- the front: images of any sizes, packed from the first token on ----


class Positions:
    """The positions of a network's patches on grids of any size, resampled as timm does, and kept by size.

    They are made anew once the network has others: another tensor, memory, or version, which every way of changing
    weights leaves behind but writing through `.data`; after that call `RaggedViT.prepare`."""

    MOST = 64  # sizes kept

    def __init__(self):
        self._kept: dict[tuple[int, int], tuple[tuple, torch.UntypedStorage, Tensor]] = {}

    def __call__(self, vit: nn.Module, grid: tuple[int, int]) -> Tensor:
        """Positions (n, dim) for the prefix tokens and the patches of grid (rows, columns); zero for prefix tokens
        that have none."""
        own = vit.pos_embed
        if own.is_inference() or (own.requires_grad and torch.is_grad_enabled()):  # no version, or a graph behind it
            return self._resampled(vit, grid)
        state = (id(own), own._version, own.data_ptr(), own.dtype, own.device, vit.no_embed_class,
                 vit.patch_embed.grid_size)  # fmt: skip
        then, _, table = self._kept.get(grid, (None, None, None))
        if then != state:
            table = self._resampled(vit, grid).clone()  # for its own grid it is the network's parameter itself
            if len(self._kept) >= self.MOST:
                self._kept = {}
            self._kept[grid] = (state, own.untyped_storage(), table)  # held, so that nothing else gets this memory
        return table

    @staticmethod
    def _resampled(vit: nn.Module, grid: tuple[int, int]) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        prefix = vit.num_prefix_tokens
        with_prefix = 0 if vit.no_embed_class else prefix
        table = resample_abs_pos_embed(vit.pos_embed, list(grid), vit.patch_embed.grid_size, with_prefix)[0]
        return table if with_prefix else nn.functional.pad(table, (0, 0, prefix, 0))


def embed_each(vit: nn.Module, images: Sequence[Tensor], as_product: bool, positions: Positions) -> Packed:
    """The tokens of images (channels, height, width) of any sizes, one image behind the other, with vit's prefix tokens
    and positions as timm has them with dynamic_img_size=True. as_product: one matrix product makes all patches; else
    vit's patch embedding is called image by image."""
    patch, prefix = vit.patch_embed, vit.num_prefix_tokens
    grids = [tuple(patch.dynamic_feat_size(tuple(image.shape[-2:]))) for image in images]
    if as_product:
        rows = torch.cat([_pixel_rows(patch, image, grid) for image, grid in zip(images, grids, strict=True)])
        x = patch.norm(nn.functional.linear(rows, patch.proj.weight.flatten(1), patch.proj.bias))
    else:
        x = torch.cat([patch(image[None]).flatten(0, -2) for image in images])  # (all patches, dim)
    lengths = [prefix + high * wide for high, wide in grids]
    own = (getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    first = torch.cat([token[0] for token in own if token is not None])  # (prefix, dim)
    x = torch.cat([part for patches in x.split([n - prefix for n in lengths]) for part in (first, patches)])
    if vit.pos_embed is not None:
        x = x + torch.cat([positions(vit, grid) for grid in grids])
    return packed_state(vit.norm_pre(vit.pos_drop(x)), host_offsets(lengths, x.device), lengths)


def _pixel_rows(patch: nn.Module, image: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of an image (channels, height, width), a row a patch: (patches, channels * pixels of a patch)."""
    (high, wide), (down, across) = grid, patch.proj.kernel_size
    if patch.dynamic_img_pad:
        image = nn.functional.pad(image, (0, wide * across - image.shape[2], 0, high * down - image.shape[1]))
    image = image[:, : high * down, : wide * across]
    return image.reshape(-1, high, down, wide, across).permute(1, 3, 0, 2, 4).reshape(high * wide, -1)


# ---- what a pass leaves behind ----


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

    def update(self, state: Packed | Padded, tokens: Tensor) -> None:
        """The rows of `state` have the values `tokens` now, and the others are gone."""
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
    block: index, -1 for the embedding.  within: its MLP is still to do.  more: what attention has yet to add."""

    state: State
    selection: Selection | None
    block: int
    within: bool = False
    more: Tensor | None = None

    @property
    def summed(self) -> State:
        """`state`, and `more` added."""
        return self.state if self.more is None else self.state.having(self.state.tokens + self.more)

    @property
    def waits(self) -> bool:
        """Whether only the GPU knows how many rows stay."""
        return self.selection is not None and isinstance(self.selection.counts, Tensor)


@dataclass(frozen=True)
class Pending:
    """A pass that cannot go on before somebody says how many rows stay: call `resume(total, longest)`. It may be
    resumed more than once, which is how one front serves several CUDA graphs."""

    model: nn.Module = field(repr=False)
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

    def resume(self, total: int, longest: int, after_block: Callable[[], None] | None = None) -> Tensor | Pending:
        """Go on with room for `total` rows, at most `longest` in one image; after_block: as in `Pass`."""
        run = self.run._replace(after_block=after_block)
        return self.model._blocks(self.model._leave(self.cut, run, (total, longest)), self.cut.block + 1, run)


# ---- steps of the loop ----


def as_dense(state: State, reason: str) -> Tensor:
    """The tokens as (batch, n, dim), where all images have the same count."""
    if state.count is None:
        raise ValueError(
            f"vit: {reason}, and the images here keep different counts; take it off, or use a pruner with fixed counts"
        )
    return state.tokens if isinstance(state, Padded) else state.tokens.unflatten(0, (state.batch, state.count))


def rows_kept(lengths: Sequence[int], stages: Sequence[Stage], device: torch.device) -> list[Tensor]:
    """bool (n,) for each image of `lengths` rows: which are there after all `stages`, on `device`."""
    kept = [torch.full((n,), not stages, device=device) for n in lengths]
    for mine, ids in zip(kept, stages[-1].ids if stages else (), strict=False):
        mine[ids[ids >= 0]] = True
    return kept


def laid_out(state: Packed, backend: Backend, pruned: bool) -> State:
    """The packed tokens of `state` as the first block takes them under the backend. pruned: whether cuts follow."""
    if state.count is not None and not (pruned and backend.packs_first):
        return padded_state(state)  # a dense batch
    if state.count is None and backend.equal_only:
        least, most = min(state.rows.host), max(state.rows.host)
        raise ValueError(f"backend {backend.name!r}: needs equal counts, and the images here have {least} to {most} "
                         "tokens; use 'auto'")  # fmt: skip
    return padded_state(state) if backend.pads else state


def take_copy(state: State, i: int, run: Pass) -> None:
    """What block i left, where somebody wants it."""
    if i in run.wanted:
        copied = Canvas(run.canvas.tokens)
        copied.update(state, state.tokens)
        run.taken.append(copied)


def take(cut: Cut, backend: Backend, sizes: tuple[int, int] | None) -> State:
    """The rows that stay, in the layout of the backend."""
    if cut.selection is None:
        return cut.summed
    if backend.paper_padding:  # the paper pads to the original length, always
        return packing.take_by_loop(cut.summed, cut.selection)
    if backend.pads:
        return packing.take_padded(cut.summed, cut.selection, sizes and sizes[1])
    return packing.take_packed(cut.state, cut.selection, lambda counts: sizes, cut.more)


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
