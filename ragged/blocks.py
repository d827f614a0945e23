"""A transformer block in pieces: four row-wise ones around one attention call.

Row-wise pieces do not care whether they get (batch, n, dim) or (total, dim); only attention does. Every piece is a
plain function of a block and tensors, so that `torch.compile` compiles it once and uses it for all blocks. One more
comes before the first block: `embed`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .attention import varlen_attention
from .padded import masked_sdpa, unfused_softmax


def embed(vit: nn.Module, images: Tensor) -> Tensor:
    """Tokens (batch, n, dim) of images (batch, channels, height, width), prefix tokens and positions included."""
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
    rows = pixels.reshape(batch * high * wide, channels * down * across)
    x = nn.functional.linear(rows, conv.weight.flatten(1), conv.bias)
    return patch.norm(x.unflatten(0, (batch, high * wide)))


def project(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens (..., dim), each (..., nheads, headdim): views of one projection."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def finish_attention(block: nn.Module, x: Tensor, heads: Tensor) -> Tensor:
    """Residual plus projected attention output; heads (..., nheads, headdim)."""
    attn = block.attn
    return x + block.ls1(attn.proj(attn.norm(heads.flatten(-2)) if hasattr(attn, "norm") else heads.flatten(-2)))


def finish_block(block: nn.Module, x: Tensor) -> Tensor:
    """The MLP half of a block."""
    return x + block.ls2(block.mlp(block.norm2(x)))


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
                  backend: str) -> Tensor:  # fmt: skip
    """Attention on the packed (total, nheads, headdim)."""
    return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, backend=backend)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths_k: Tensor | None, scale: float, unfused: bool) -> Tensor:
    """Attention on (batch, n, nheads, headdim); lengths_k (batch,) marks the real keys. unfused: as the paper pads."""
    real = None if lengths_k is None else torch.arange(k.shape[1], device=k.device) < lengths_k[:, None]
    return (unfused_softmax if unfused else masked_sdpa)(q, k, v, real, scale)


def packed_block(block: nn.Module, x: Tensor, cu: Tensor, longest: int, scale: float, backend: str) -> Tensor:
    """One whole block on packed tokens (total, dim)."""
    q, k, v = project(block, x)
    heads = attend_packed(q, k, v, cu, cu, longest, longest, scale, backend)
    return finish_block(block, finish_attention(block, x, heads))


def padded_block(block: nn.Module, x: Tensor, lengths: Tensor | None, scale: float, unfused: bool) -> Tensor:
    """One whole block on (batch, n, dim), of which lengths (batch,) rows are real (None: all)."""
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
