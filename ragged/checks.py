"""Argument checks. Every error names the argument, what was expected and what came.

Here too: the dictionary behind `BACKENDS` and `PRUNERS`, and the check that a model is one whose tokens may be dropped.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECK_VALUES = os.environ.get("RAGGED_CHECK") == "1"  # look at numbers on CUDA too, at the price of a wait


def may_look(x: Tensor) -> bool:
    """Whether the numbers in x are there to be checked: on CUDA that is a wait, so only with RAGGED_CHECK=1."""
    return CHECK_VALUES or not (x.is_cuda or x.is_meta)


# ---- names ----


class UnknownName(KeyError, ValueError):
    """A name that a registry does not have; both kinds of error, so that either is caught."""

    __str__ = Exception.__str__  # a KeyError would put the message in quotes


class Registry(dict):
    """An ordinary dict, but `registry["typo"]` raises an error that lists the known names. kind: what they name."""

    def __init__(self, kind: str, entries: dict):
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name):
        raise UnknownName(f"{self.kind}: expected one of {', '.join(self)}, got {name!r}")


# ---- numbers ----


def check_int(name: str, value: int, least: int) -> int:
    """`value` as an int. ValueError unless it is an integer >= least; name is the argument as the caller knows it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return int(value)


def check_positive(name: str, x: float) -> float:
    """`x` as a float. ValueError unless it is a positive finite number."""
    if isinstance(x, bool) or not isinstance(x, Real) or not 0.0 < x < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {x!r}")
    return float(x)


def check_share(name: str, share: float) -> float:
    """`share` as a float. ValueError unless it is in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 < share <= 1.0:
        raise ValueError(f"{name}: expected a share in (0, 1], got {share!r}")
    return float(share)


def check_blocks(at: int | Iterable[int]) -> tuple[int, ...]:
    """`at` as a tuple of rising block indices. TypeError or ValueError for anything else."""
    try:
        stages = (at,) if isinstance(at, Integral) else tuple(operator.index(i) for i in at)
    except TypeError:
        raise TypeError(f"at: expected a block index or several, got {at!r}") from None
    if not stages or min(stages) < 0 or list(stages) != sorted(set(stages)):
        raise ValueError(f"at: expected rising block indices >= 0, got {at!r}")
    return stages


# ---- tensors ----


def check_tensor(name: str, x: Tensor, rank: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """TypeError or ValueError unless x is a tensor of `rank` dimensions and one of the dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {x.dtype}")


def check_attention_tensors(q: object, k: object, v: object, cu_q: object, cu_k: object) -> None:
    """Attention: every one is a tensor."""
    for name, x in (("q", q), ("k", k), ("v", v), ("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_attention_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Attention: what depends only on the model, not on a batch."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise ValueError(f"{name}: expected (total, nheads >= 1, headdim >= 1), got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, FLOATS))}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} like q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} like q, got {x.device}")
        if x.shape[1:] != q.shape[1:]:
            expected, got = tuple(q.shape[1:]), tuple(x.shape[1:])
            raise ValueError(f"{name}: expected (nheads, headdim) = {expected} like q, got {got}")


def check_attention_call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
                         scale: float) -> None:  # fmt: skip
    """Attention: what depends on the batch; nothing that needs a wait for the GPU."""
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"v: expected {k.shape[0]} rows like k, got {v.shape[0]}")
    if type(max_q) is not int or max_q < 1:
        raise ValueError(f"max_seqlen_q: expected an int >= 1, got {max_q!r}")
    if type(max_k) is not int or max_k < 1:
        raise ValueError(f"max_seqlen_k: expected an int >= 1, got {max_k!r}")
    if not isinstance(scale, Real) or not 0.0 < scale < math.inf:
        raise ValueError(f"softmax_scale: expected a positive finite number, got {scale!r}")
    _check_offsets(cu_q, "cu_seqlens_q", q)
    if cu_k is not cu_q:
        _check_offsets(cu_k, "cu_seqlens_k", k)
        if cu_k.shape != cu_q.shape:
            raise ValueError(f"cu_seqlens_k: expected {cu_q.shape[0]} entries like cu_seqlens_q, got {cu_k.shape[0]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: varlen_attention has no backward pass; use torch.no_grad() or detach it")
    if q.device.type == "meta":
        raise ValueError("q: expected tensors that hold numbers, got device 'meta'")
    if may_look(q):
        _check_values(cu_q, "cu_seqlens_q", q.shape[0], max_q)
        _check_values(cu_k, "cu_seqlens_k", k.shape[0], max_k)


def _check_offsets(cu: Tensor, name: str, x: Tensor) -> None:
    if cu.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {cu.dtype}")
    if cu.dim() != 1 or cu.shape[0] < 2 or not cu.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous vector of batch + 1 >= 2 offsets, got shape {tuple(cu.shape)}")
    if cu.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like its tokens, got {cu.device}")


def _check_values(cu: Tensor, name: str, total: int, longest: int) -> None:
    values = cu.tolist()
    lengths = [b - a for a, b in zip(values, values[1:], strict=False)]
    if values[0] != 0 or min(lengths) < 0 or values[-1] > total:
        shown = f"{values[:8]}{'...' if len(values) > 8 else ''}"
        raise ValueError(f"{name}: expected offsets rising from 0 to at most {total}, got {shown}")
    if max(lengths) > longest:
        of = name.removeprefix("cu_seqlens_")
        raise ValueError(f"max_seqlen_{of}: expected at least the longest sequence, {max(lengths)}, got {longest}")


# ---- models ----


def check_supported(vit: nn.Module) -> nn.Module:
    """`vit` itself, if its tokens may be dropped without changing what the rest computes. Raises ValueError saying
    which part is not handled: better refused than silently wrong."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"vit: expected timm's VisionTransformer, got {type(vit).__name__}")
    problems = []
    if any(getattr(type(vit), f) is not getattr(VisionTransformer, f) for f in ("forward", "forward_features")):
        problems.append(f"{type(vit).__name__} has a forward pass of its own")
    if not isinstance(vit.patch_embed, PatchEmbed):
        problems.append(f"its patch embedding is a {type(vit.patch_embed).__name__}")
    if vit.cls_token is None or vit.global_pool != "token" or getattr(vit, "attn_pool", None) is not None:
        problems.append(f"it pools {vit.global_pool!r}, not the CLS token, so every dropped token would count")
    if not isinstance(getattr(vit, "patch_drop", nn.Identity()), nn.Identity):
        problems.append("it drops patches on its own (patch_drop)")
    for i, block in enumerate(vit.blocks):
        problem = f"type {type(block).__name__}" if type(block) is not Block else _block_problem(block)
        if problem:
            problems.append(f"block {i}: {problem}")
            break
    if problems:
        raise ValueError(f"vit: this model is not handled: {'; '.join(problems)}")
    return vit


def _block_problem(block: nn.Module) -> str | None:
    """Why a block is not made of row-wise parts and one ordinary attention, or None."""
    from timm import layers
    from timm.models.vision_transformer import Attention

    if type(block.attn) is not Attention:
        return f"attention {type(block.attn).__name__}"
    if getattr(block.attn, "gate", None) is not None:
        return "gated attention"
    if not isinstance(block.mlp, (layers.Mlp, layers.GluMlp, layers.SwiGLU)):
        return f"MLP {type(block.mlp).__name__}"
    norms = (nn.LayerNorm, nn.Identity, getattr(nn, "RMSNorm", nn.LayerNorm), getattr(layers, "RmsNorm", nn.LayerNorm))
    for part in (block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm):
        if not isinstance(part, norms):
            return f"normalisation {type(part).__name__}"
    return None
