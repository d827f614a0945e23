"""A transformer block in pieces: four row-wise ones around one attention call.

Row-wise pieces do not care whether they get (batch, n, dim) or (total, dim); only attention does. Every piece is a
plain function of a block and tensors, so that `torch.compile` compiles it once and uses it for all blocks. One more
comes before the first block: `embed`. They take the place of timm's `forward` methods where a block is plain;
support.py decides that.

Then the records of a pass through the blocks: where it stands, and what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import varlen_attention
from .backends import Backend, masked_sdpa, unfused_softmax
from .packing import Canvas, Packed, Padded, Selection

State = Packed | Padded


def embed(vit: nn.Module, images: Tensor, as_product: bool) -> Tensor:
    """Tokens (batch, n, dim) of images (batch, channels, height, width), with vit's prefix tokens and positions.
    as_product: the patch embedding is one matrix product (see `Survey`)."""
    x = _patch_rows(vit.patch_embed, images) if as_product else vit.patch_embed(images)
    x = vit._pos_embed(x)
    return vit.norm_pre(vit.patch_drop(x) if hasattr(vit, "patch_drop") else x)


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
    `varlen_attention` takes them. Under autocast in its dtype, as `scaled_dot_product_attention`."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
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


class _Traced(NamedTuple):
    logits: Tensor
    stages: list[Stage]


class Trace(_Traced):
    """logits (batch, classes), and one `Stage` per cut: both by unpacking, too. kept: bool (batch, n), the rows of the
    unpruned sequence that stayed to the end."""

    kept: Tensor


class Pass(NamedTuple):
    """What stays the same during a pass. backend: who attends.  stages: where cuts are noted, or None.
    after_block: called after every block without a cut (a recording begins its second graph there).
    canvas: where every token is put back, if features are wanted.  wanted: blocks after which `taken` gets a copy."""

    backend: Backend
    stages: list[Stage] | None = None
    after_block: Callable[[], None] | None = None
    canvas: Canvas | None = None
    wanted: frozenset[int] = frozenset()
    taken: list[Canvas] | None = None


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
