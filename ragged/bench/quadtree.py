"""Patches whose size follows the pixels: a front that somebody else could have written.

A patch of sky says as much at 32 pixels as its four quarters at 16. So every square of 32 pixels is looked at: where
its brightness hardly varies it becomes one token, its pixels averaged down to 16 x 16; elsewhere its quarters become
four. All tokens go through the network's own patch embedding. A large patch gets the mean of the positions of its
quarters. What comes out is packed, so `RaggedViT.forward_tokens` takes it as it is, with or without a pruner:

    tokens, cu_seqlens, lengths = quadtree_tokens(vit, normalise(photographs()[0]), threshold=0.5)
    logits = RaggedViT(vit, PRUNERS["evit"](keep=0.7)).forward_tokens(tokens, cu_seqlens, lengths=lengths)

The idea is that of adaptive patch transformers (APT, ICLR 2026). Networks there are trained for it; here none is, so
take it for what it shows, the shape of the computation, not for accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_images


def quadtree_tokens(vit: nn.Module, images: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens of patches of one or two sizes, chosen from the pixels.

    vit: a timm ViT with class token, an even grid of patches that do not overlap, and a position for every token.
    images: (batch, channels, height, width) as vit takes them.  threshold: a square of four patches stays whole if its
    brightness, the mean of the channels, has at most this variance; below 0 none does, and the tokens are vit's own.
    Returns tokens (total, dim), large patches first in each image, cu_seqlens int32 (batch + 1,), and the lengths as
    a list; they are read from the device, which is one wait. ValueError for other models and sizes.
    """
    patch, prefix = vit.patch_embed, vit.num_prefix_tokens
    (high, wide), (down, across) = patch.grid_size, patch.patch_size
    check_images(images, vit)
    if tuple(images.shape[2:]) != (high * down, wide * across) or high % 2 or wide % 2 or vit.no_embed_class:
        raise ValueError(f"images: expected an even grid of whole patches with positions for every token, got grid "
                         f"{(high, wide)} of {(down, across)} pixels for {tuple(images.shape)}")  # fmt: skip
    shrunk = nn.functional.avg_pool2d(images, 2)  # a square of 32 pixels as a patch of 16
    where = vit.pos_embed[0, prefix:].unflatten(0, (high, wide))
    small = _embedded(patch, images) + where.flatten(0, 1)  # (batch, high * wide, dim)
    large = _embedded(patch, shrunk) + _quarters(where[None]).mean(2)[0]  # (batch, squares, dim)
    brightness = images.mean(1).unflatten(1, (high // 2, 2 * down)).unflatten(3, (wide // 2, 2 * across))
    whole = brightness.float().var((2, 4)).flatten(1) <= threshold  # (batch, squares)
    small = _quarters(small.unflatten(1, (high, wide))).flatten(1, 2)  # the quarters of a square side by side
    first = vit._pos_embed(patch(images[:1]))[:, :prefix].expand(len(images), -1, -1)
    rows = torch.cat((first, large, small), 1)  # (batch, prefix + 5 * squares, dim)
    keep = torch.cat((whole.new_ones(len(images), prefix), whole, ~whole.repeat_interleave(4, 1)), 1)
    lengths = keep.sum(1)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return vit.norm_pre(rows[keep]), cu_seqlens, lengths.tolist()


def _embedded(patch: nn.Module, images: Tensor) -> Tensor:
    """The patch embedding of images of any size: (batch, patches, dim)."""
    return patch.norm(patch.proj(images).flatten(2).transpose(1, 2))


def _quarters(x: Tensor) -> Tensor:
    """x (batch, high, wide, dim) as squares of four: (batch, squares, 4, dim)."""
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (batch, high / 2, 2, wide / 2, 2, dim)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
