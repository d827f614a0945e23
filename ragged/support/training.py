"""What is different while a network trains: dropout, and stochastic depth, which leaves out a half-block of an image.

timm's modules do the drawing here too, so that rates, scaling and random numbers are theirs. Dropout treats every
number by itself, so that it may see packed rows. Stochastic depth is drawn once for each image: on a packed buffer all
rows of an image share one factor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from ..kernels.padding import image_of_rows


def refuse_to_train(vit: nn.Module, whole: Container[int]) -> None:
    """ValueError, naming the part, where `vit`, whose blocks are run in pieces but for those in `whole`, does something
    in training mode that the pass does not do: drops of other kinds, and checkpoints of activations."""
    if getattr(vit, "grad_checkpointing", False) and torch.is_grad_enabled():
        raise ValueError("vit: grad_checkpointing is set, and the pass keeps its activations, which are fewer where "
                         "tokens are dropped; call vit.set_grad_checkpointing(False)")  # fmt: skip
    patches = getattr(vit, "patch_drop", None)
    if getattr(patches, "prob", 0.0) and patches.training:
        raise ValueError(f"vit: patch_drop drops {patches.prob:g} of the patches in training, before any pruner sees "
                         "them; set vit.patch_drop = torch.nn.Identity(), or use PRUNERS['random']")  # fmt: skip
    for i, drop in _attention_drops(vit, whole):
        if getattr(drop, "p", 0.0) and drop.training:
            raise ValueError(f"vit: block {i}: attn_drop drops {drop.p:g} of the attention weights while it trains, "
                             "which no kernel here does; set its p to 0")  # fmt: skip


def _attention_drops(vit: nn.Module, whole: Container[int]) -> Iterable[tuple[int, nn.Module]]:
    return ((i, block.attn.attn_drop) for i, block in enumerate(vit.blocks) if i not in whole)


def drop_images(drop: nn.Module, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Stochastic depth `drop` on what a half-block adds: x (batch, n, dim), or, with cu_seqlens int32 (batch + 1,),
    packed (total, dim). All rows of an image share what is drawn for it."""
    if cu_seqlens is None:
        return drop(x)
    if isinstance(drop, nn.Dropout):  # of numbers, not of images
        return drop(x)
    if isinstance(drop, nn.Identity) or not getattr(drop, "drop_prob", 1.0):
        return x
    batch = cu_seqlens.shape[0] - 1
    factor = drop(x.new_ones(batch, 1))  # (batch, 1): 0, or what the rest is scaled by
    return x * factor.index_select(0, image_of_rows(cu_seqlens, x.shape[0]).clamp_(max=batch - 1))
