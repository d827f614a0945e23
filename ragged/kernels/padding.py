"""Padding, what every ragged method is compared with: rows to a rectangle and back, and attention on it, in PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def image_of_rows(cu: Tensor, total: int) -> Tensor:
    """Which image each of `total` packed rows belongs to, int64 (total,), by the offsets cu (batch + 1,); batch for
    those behind the last image. No wait."""
    return torch.searchsorted(cu[1:], torch.arange(total, device=cu.device), right=True)


def pad_rows(x: Tensor, cu: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows x (total, ...) as (batch, width, ...), and which entries are real, bool (batch, width). No wait."""
    column = torch.arange(width, device=x.device)
    real = column < (cu[1:] - cu[:-1])[:, None]
    if x.shape[0] == 0:
        return x.new_zeros((real.shape[0], width, *x.shape[1:])), real
    padded = x[torch.where(real, cu[:-1, None] + column, 0)]
    return torch.where(real.view(*real.shape, *[1] * (x.dim() - 1)), padded, 0), real


def unpad_rows(x: Tensor, cu: Tensor, total: int) -> Tensor:
    """The inverse of `pad_rows`: (batch, width, ...) to (total, ...). Rows past the last offset belong to nobody and
    get some other row's values. No wait."""
    row, image = torch.arange(total, device=x.device), image_of_rows(cu, total).clamp_(max=x.shape[0] - 1)
    return x[image, (row - cu[image]).clamp_(max=x.shape[1] - 1)]


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, real_k: Tensor | None, scale: float) -> Tensor:
    """Fused SDPA on (batch, n, nheads, headdim); real_k bool (batch, n_k) marks the keys that exist (None: all).
    An image without any key gets zeros."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if real_k is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    some = real_k.any(1)
    mask = (real_k | ~some[:, None])[:, None, None]  # softmax over nothing is NaN: let such an image see its zeros
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def unfused_softmax(q: Tensor, k: Tensor, v: Tensor, real_k: Tensor | None, scale: float) -> Tensor:
    """softmax(q kᵀ) v in three separate operations on (batch, n, nheads, headdim): the paper's padded baseline."""
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * scale
    if real_k is not None:
        scores = scores.masked_fill(~real_k[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
