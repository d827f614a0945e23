"""A plain block as an eager pass runs it: what its modules would call, without calling the modules.

At batch 1 the host takes longer than the GPU, and much of its time goes into finding modules and calling them. Whether
a block is plain is known from its `Survey`, which is compared in every call; weights and settings are read when they
are needed, from where their modules keep them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..gradients import split_projection
from .trial import OWN_CALL, replaced

Step = Callable[[Tensor], Tensor]


def plain_norm(module: nn.Module) -> bool:
    """Whether module is a layer norm that nobody changed; it may lack a weight or a bias."""
    from timm.layers import LayerNorm

    kind, own = type(module), module.__dict__
    return (kind is nn.LayerNorm or (kind is LayerNorm and not own["_fast_norm"])) and not _changed(module)


def _changed(module: nn.Module) -> bool:
    own = module.__dict__
    hangs = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hangs) or replaced(module, *OWN_CALL)


def steps_of(module: nn.Module) -> list[Step]:
    """What to call, one behind the other, in place of a module in eval mode; none for one that does nothing then. The
    module itself where something hangs on it, or where it is not known here."""
    from timm.layers import Mlp

    kind, own, weights = type(module), module.__dict__, module._parameters
    if _changed(module):
        return [module]
    if kind in (nn.Identity, nn.Dropout):
        return []
    if kind is nn.GELU:
        return [lambda x: F.gelu(x, approximate=own["approximate"])]
    if kind is Mlp:
        return [step for part in module.children() for step in steps_of(part)]
    if not {"weight", "bias"} <= weights.keys():
        return [module]
    if kind is nn.Linear:
        return [lambda x: F.linear(x, weights["weight"], weights["bias"])]
    if plain_norm(module):
        return [lambda x: F.layer_norm(x, own["normalized_shape"], weights["weight"], weights["bias"], own["eps"])]
    return [module]


def _through(steps: list[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


class Settings:
    """The plain attributes of a module: its very dictionary, without the search that `nn.Module` does."""

    def __init__(self, module: nn.Module):
        self.__dict__ = module.__dict__


class Bare:
    """A plain block in eval mode, with the steps of its parts; attn: settings of its attention. The methods are the
    functions of `blocks` of the same names; they give the same numbers."""

    def __init__(self, block: nn.Module):
        attn, self.attn = block.attn, Settings(block.attn)
        self._project = steps_of(block.norm1) + steps_of(attn.qkv)
        self._q, self._k = steps_of(attn.q_norm), steps_of(attn.k_norm)
        norm = steps_of(attn.norm) if hasattr(attn, "norm") else []
        self._attention = norm + steps_of(attn.proj) + steps_of(block.ls1)
        self._norm, self._rest = steps_of(block.norm2), steps_of(block.mlp) + steps_of(block.ls2)
        self.norm = block.norm2 if plain_norm(block.norm2) else None  # which a cut may compute, too

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `blocks.project`; x (..., dim)."""
        qkv = _through(self._project, x)  # (..., 3 * dim)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.attn.num_heads, self.attn.head_dim)
        q, k, v = split_projection(qkv) if qkv.dim() == 4 and qkv.requires_grad else qkv.unbind(-3)
        return _through(self._q, q), _through(self._k, k), v

    def project_heads(self, heads: Tensor) -> Tensor:
        """See `blocks.project_heads`; heads (..., nheads, headdim)."""
        return _through(self._attention, heads.flatten(-2))

    def run_mlp(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """See `blocks.run_mlp`; x, normed (..., dim)."""
        return _through(self._rest, _through(self._norm, x) if normed is None else normed)
