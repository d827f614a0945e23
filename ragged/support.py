"""What a timm model is made of: whether its tokens may be dropped, and how each part has to be run for that.

The pass in model.py takes a block apart and runs its pieces on packed rows. That is exact for a plain block, whose
parts treat every row by itself. Whatever else people do to a model (hooks, adapters, masks, a `forward` of their own)
is looked for here: a part is run as the module that it is, or refused with the reason, and never bypassed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Methods that the pass takes the place of, or calls with the prefix rows alone. Replaced ones are not ours to know.
OWN_PASS = ("forward", "forward_features", "forward_head", "pool")
NOTHING_IN_EVAL = ("Identity", "Dropout", "DropPath")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Survey:
    """What `check_supported` found out about `vit`, and whether it is still true.

    whole: block index -> why that block must be called as it is, on (batch, n, dim).  as_product: whether the patch
    embedding may run as one matrix product, and each_product: also for images of different sizes.  no_list: why such a
    list cannot be packed, or None.  norm: why the final norm must see all tokens, or None.  hooked: whether
    there are hooks at all, which no CUDA graph calls.

    `still_true` compares what people change after wrapping: modules and their types, hooks, replaced methods, pooling.
    It runs at every call, so it compares whole lists at once, without a loop in Python.
    """

    def __init__(self, vit: nn.Module):
        self.modules = list(vit.modules())
        self._dicts = [module.__dict__ for module in self.modules]
        self._children = [m._modules for m in self.modules if m._modules]
        self._settings, self._seen, self._hooks = _settings(vit), self._look(), self._hook_numbers()
        self._last_hook = RemovableHandle.next_id
        self.whole: dict[int, str] = {}
        for i, block in enumerate(vit.blocks):
            if reason := whole_reason(block, vit.embed_dim):
                self.whole[i] = reason
        self.each_product = _is_product(vit.patch_embed, vit.embed_dim)
        plain = vit.patch_embed.flatten and not vit.patch_embed.dynamic_img_pad
        self.as_product = plain and _is_product(vit.patch_embed)
        self.no_list = _no_list(vit)
        self.norm = _hook_reason(vit.norm) or (None if row_wise(vit.norm, vit.embed_dim) else "mixes tokens")
        self.hooked = any(map(_hook_reason, self.modules))

    def still_true(self, vit: nn.Module) -> bool:
        """Whether `vit` is as it was when this was made."""
        if vit is not self.modules[0] or _settings(vit) != self._settings or self._look() != self._seen:
            return False
        if self._last_hook != RemovableHandle.next_id or self._hooks:  # PyTorch numbers all hooks of the process
            self._last_hook = RemovableHandle.next_id
            return self._hook_numbers() == self._hooks
        return True

    def training(self) -> bool:
        """Whether any module is in training mode."""
        return True in map(operator.itemgetter("training"), self._dicts)

    def _look(self) -> tuple:
        children = list(map(tuple, map(dict.values, self._children)))
        # a method replaced on the instance is one entry more in its dictionary
        return list(map(type, self.modules)), children, list(map(len, self._dicts))

    def _hook_numbers(self) -> list[tuple]:
        return [tuple(d[kind]) for d in self._dicts for kind in HOOKS if d[kind]]


def _settings(vit: nn.Module) -> tuple:
    replaced = tuple(name in vit.__dict__ for name in OWN_PASS)
    return vit.global_pool, vit.num_prefix_tokens, vit.attn_pool is None, vit.cls_token is None, replaced


def check_supported(vit: nn.Module) -> nn.Module:
    """`vit` itself, if its tokens may be dropped without changing what the rest computes. Raises ValueError saying
    which part is not handled: better refused than silently wrong."""
    problems = list(_problems(vit))
    if problems:
        raise ValueError(f"vit: this model is not handled: {'; '.join(problems)}")
    return vit


def _problems(vit: nn.Module) -> Iterable[str]:
    from timm.layers import PatchEmbed
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(vit, VisionTransformer):
        inner = next((name for name in ("module", "_orig_mod", "model") if hasattr(vit, name)), None)
        hint = f" (wrap its .{inner}, and compile or distribute afterwards)" if inner else ""
        raise ValueError(f"vit: expected timm's VisionTransformer, got {type(vit).__name__}{hint}")
    for name in OWN_PASS:
        of_timm = [getattr(kind, name) for kind in (VisionTransformer, VisionTransformerDistilled)]
        if name in vit.__dict__ or getattr(type(vit), name) not in of_timm:
            yield f"{type(vit).__name__} has a {name} of its own"
            break
    if not isinstance(vit.patch_embed, PatchEmbed):
        yield f"its patch embedding is a {type(vit.patch_embed).__name__}"
    if vit.cls_token is None or vit.global_pool != "token" or getattr(vit, "attn_pool", None) is not None:
        yield f"it pools {vit.global_pool!r}, not the CLS token, so every dropped token would count"
    for part, name in ((vit, "the model"), (vit.blocks, "model.blocks")):
        if any(map(_is_foreign, _hooks_of(part))):
            yield f"hooks on {name} itself would not fire: put them on the RaggedViT, or on single blocks"
    if type(vit.blocks) is not nn.Sequential or "forward" in vit.blocks.__dict__:
        yield f"its blocks are a {type(vit.blocks).__name__} with a forward of its own"
    for i, block in enumerate(vit.blocks):
        if problem := _block_problem(block):
            yield f"block {i}: {problem}"
            break


def _block_problem(block: nn.Module) -> str | None:
    """Why a block cannot be run at all, or None."""
    from timm.models.vision_transformer import Attention, Block

    if not isinstance(block, Block):
        inner = " (compile after wrapping, with model.compile())" if hasattr(block, "_orig_mod") else ""
        return f"type {type(block).__name__}{inner}"
    if not isinstance(block.attn, Attention):
        return f"attention {type(block.attn).__name__}"
    return None


def whole_reason(block: nn.Module, dim: int) -> str | None:
    """Why a block must be called as the module that it is, on (batch, n, dim), instead of piece by piece on rows; None
    for a plain one."""
    from timm.models.vision_transformer import Attention, Block

    for name, module in block.named_modules():
        if reason := _hook_reason(module):
            return f"{name or 'it'} {reason}"
    if type(block) is not Block or "forward" in block.__dict__:
        return f"type {type(block).__name__} has a forward of its own"
    attn = block.attn
    if type(attn) is not Attention or "forward" in attn.__dict__:
        return f"its attention, {type(attn).__name__}, has a forward of its own"
    if getattr(attn, "gate", None) is not None:
        return "its attention is gated"
    for name in ("q_norm", "k_norm"):
        if not row_wise(getattr(attn, name), dim // attn.num_heads):
            return f"attn.{name}, {type(getattr(attn, name)).__name__}, does not treat every row by itself"
    for name in ("drop_path1", "drop_path2", "attn.attn_drop", "attn.proj_drop"):  # nothing in eval mode, so left out
        part = _part(block, name)
        if part is not None and (type(part).__name__ not in NOTHING_IN_EVAL or "forward" in part.__dict__):
            return f"{name}, {type(part).__name__}, is not timm's own"
    for name in ("norm1", "attn.qkv", "attn.norm", "attn.proj", "ls1", "norm2", "mlp", "ls2"):
        part = _part(block, name)
        if part is not None and not row_wise(part, dim):
            return f"{name}, {type(part).__name__}, does not treat every row by itself"
    return None


def _part(block: nn.Module, name: str) -> nn.Module | None:
    return functools.reduce(lambda part, step: getattr(part, step, None), name.split("."), block)


# ---- hooks ----


def _hooks_of(module: nn.Module) -> Iterable[object]:
    return (hook for kind in HOOKS for hook in module.__dict__[kind].values())


def _is_foreign(hook: object) -> bool:
    """Whether a hook may see or change tokens. PyTorch's own that only make a weight before it is used do not."""
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    return not isinstance(hook, BasePruningMethod | SpectralNorm | WeightNorm)


def _hook_reason(module: nn.Module) -> str | None:
    return "carries hooks, which expect (batch, n, dim)" if any(map(_is_foreign, _hooks_of(module))) else None


# ---- parts that treat every row by itself ----


@functools.cache
def _known() -> frozenset[type]:
    from timm import layers
    from timm.models import vision_transformer

    names = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32", "Mlp", "GluMlp",
             "SwiGLU", "DropPath", "GELU", "GELUTanh", "QuickGELU")  # fmt: skip
    torch_names = ("Linear", "LayerNorm", "RMSNorm", "Identity", "GELU", "ReLU", "SiLU", "Tanh", "Sigmoid", "Dropout")
    found = [getattr(layers, n, None) for n in names] + [getattr(nn, n, None) for n in torch_names]
    return frozenset(filter(None, [*found, getattr(vision_transformer, "LayerScale", None)]))


def row_wise(module: nn.Module, dim: int) -> bool:
    """Whether `module`, on rows of `dim` numbers, treats every row by itself: known from its type, or else tried out.

    Adapters come in all kinds, so an unknown module is run on random rows with random weights (its present ones may be
    the zeros that adapters begin with): all rows at once, some of them, in another order, and in another shape.
    """
    known = _known()
    if all(type(m) in known for m in module.modules()) and not any("forward" in m.__dict__ for m in module.modules()):
        return True
    generator = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)

    weights: Mapping[str, Tensor] = {name: like(p.detach()) for name, p in module.named_parameters()}
    first = next(module.parameters(), torch.empty(0))
    try:
        x = torch.randn(3, 4, dim, generator=generator, dtype=torch.float32).to(first.device, first.dtype)
        order = torch.tensor([2, 0, 1], device=x.device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole, flat, some, other = (
                torch.func.functional_call(module, weights, (given,))
                for given in (x, x.flatten(0, 1), x[:1, :2], x[order].flip(1))
            )
        tries = ((flat, whole.flatten(0, 1)), (some, whole[:1, :2]), (other, whole[order].flip(1)))
        size = whole.float().abs().max().item()
        return all(a.shape == b.shape and (a - b).float().abs().max().item() <= 1e-3 * size for a, b in tries)
    except Exception:  # whatever somebody's module raises for rows: it does not take them
        return False


def _no_list(vit: nn.Module) -> str | None:
    """Why the embedding cannot run on the packed tokens of images of different sizes, or None. What stands before the
    blocks must treat every row by itself, and positions must be timm's, which are made anew for every size."""
    from timm.layers import PatchDropout
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    known = [kind._pos_embed for kind in (VisionTransformer, VisionTransformerDistilled)]
    if "_pos_embed" in vit.__dict__ or type(vit)._pos_embed not in known:
        return f"{type(vit).__name__} has a _pos_embed of its own"
    for name in ("pos_drop", "patch_drop", "norm_pre"):
        part = getattr(vit, name, None)
        if part is None:
            continue
        for module in part.modules():
            if reason := _hook_reason(module):
                return f"{name} {reason}"
        if name == "patch_drop":  # nothing in eval mode, so left out
            if type(part) not in (PatchDropout, nn.Identity) or "forward" in part.__dict__:
                return f"{name}, {type(part).__name__}, is not timm's own"
        elif not row_wise(part, vit.embed_dim):
            return f"{name}, {type(part).__name__}, does not treat every row by itself"
    return None


def _is_product(patch: nn.Module, dim: int | None = None) -> bool:
    """Whether the patch embedding is one matrix product: plain modules, patches that neither overlap nor are padded.
    dim: its width, if its norm is to run on rows of several images."""
    from timm.layers import PatchEmbed

    conv = patch.proj
    if type(patch) is not PatchEmbed or type(conv) is not nn.Conv2d:
        return False
    if any("forward" in m.__dict__ or any(_hooks_of(m)) for m in patch.modules()):
        return False
    plain = conv.stride == conv.kernel_size and set(conv.padding) == {0} and set(conv.dilation) == {1}
    plain = plain and conv.groups == 1 and conv.kernel_size == tuple(patch.patch_size)
    return plain and (dim is None or row_wise(patch.norm, dim))
