"""A transformer block in pieces: four row-wise ones around one attention call.

Row-wise pieces do not care whether they get (batch, n, dim) or (total, dim); only attention does. Every piece is a
plain function of a block and tensors, so that `torch.compile` compiles it once and uses it for all blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import varlen_attention
from .backends import masked_sdpa, unfused_softmax


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


def attend_packed(q, k, v, cu_q, cu_k, max_q: int, max_k: int, scale: float, backend: str) -> Tensor:
    return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, backend=backend)


def attend_padded(q, k, v, lengths_k: Tensor | None, scale: float, backend: str) -> Tensor:
    real = None if lengths_k is None else torch.arange(k.shape[1], device=k.device) < lengths_k[:, None]
    core = unfused_softmax if backend == "paper_padded" and real is not None else masked_sdpa
    return core(q, k, v, real, scale)


def run_block(block: nn.Module, x: Tensor, where: tuple, scale: float, backend: str) -> Tensor:
    """One whole block. where: (cu_seqlens, max_seqlen) for x (total, dim), (lengths or None,) for x (batch, n, dim)."""
    q, k, v = project(block, x)
    if len(where) == 2:
        heads = attend_packed(q, k, v, where[0], where[0], where[1], where[1], scale, backend)
    else:
        heads = attend_padded(q, k, v, where[0], scale, backend)
    return finish_block(block, finish_attention(block, x, heads))


PIECES = (project, finish_attention, finish_block, attend_packed, attend_padded, run_block)
