"""What a timm model is made of: whether its tokens may be dropped, and how each part has to be run for that.

The pass in model.py takes a block apart and runs its pieces on packed rows. That is exact for a plain block, whose
parts treat every row by itself. Whatever else people do to a model (hooks, adapters, masks, a `forward` of their own)
is looked for here: a part is run as the module that it is, or refused with the reason, and never bypassed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_torch
from torch.utils.hooks import RemovableHandle

from .bare import Bare
from .trial import OWN_CALL, known, replaced, row_wise, structure, switches

# Methods that the pass takes the place of, or calls with the prefix rows alone. Replaced ones are not ours to know.
OWN_PASS = (*OWN_CALL, "forward_features", "forward_head", "forward_intermediates", "pool")
NOTHING_IN_EVAL = ("Identity", "Dropout", "DropPath")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What decides whether the patch embedding is one matrix product, besides modules and hooks.
PATCH_SETTINGS = ("flatten", "output_fmt", "dynamic_img_pad", "strict_img_size", "img_size", "patch_size", "grid_size")
CONV_SETTINGS = ("padding", "stride", "dilation", "groups", "kernel_size", "in_channels")


class Survey:
    """What `check_supported` found out about `vit`, and whether it is still true.

    whole: block index -> why that block must be called as it is, on (batch, n, dim).  bare: the others, for eager
    passes; of compiled ones a cut reads their `norm`.  as_product: whether the patch embedding may run as one matrix
    product, and each_product: also for images of different sizes.  no_list: why such a list cannot be packed, or None.
    norm: why the final norm must see all tokens, or None.  hooked: whether there are hooks at all, which no CUDA graph
    calls.

    `still_true` compares what people change after wrapping: modules and their types, hooks, replaced methods (of an
    object or of a class), pooling, how patches are cut; of modules that were tried out also their switches.
    It runs at every call, so it compares whole lists at once, without a loop in Python.
    """

    def __init__(self, vit: nn.Module):
        self.modules = list(vit.modules())
        self._dicts = [module.__dict__ for module in self.modules]
        self._children = [m._modules for m in self.modules if m._modules]
        self._childless = [m._modules for m in self.modules if not m._modules]
        self.tried = [m for m in self.modules if type(m) not in known() and type(m) not in structure()]
        self._kinds = list(dict.fromkeys(map(type, self.modules)))
        self._settings, self._seen, self._hooks = _settings(vit), self._look(), self._hook_numbers()
        self._last_hook = RemovableHandle.next_id
        self.whole: dict[int, str] = {}
        rows = vit.num_prefix_tokens + (vit.patch_embed.num_patches or 196)
        for i, block in enumerate(vit.blocks):
            if reason := whole_reason(block, rows):
                self.whole[i] = reason
        self.bare = [None if i in self.whole else Bare(block) for i, block in enumerate(vit.blocks)]
        self.each_product = _is_product(vit.patch_embed) and row_wise(vit.patch_embed.norm, vit.embed_dim, rows)
        plain = vit.patch_embed.flatten and not vit.patch_embed.dynamic_img_pad
        self.as_product = plain and _is_product(vit.patch_embed)
        self.no_list = _no_list(vit, rows)
        self.norm = _hook_reason(vit.norm) or (None if row_wise(vit.norm, vit.embed_dim, rows) else "mixes tokens")
        self.hooked = any(map(_hook_reason, self.modules))

    def still_true(self, vit: nn.Module) -> bool:
        """Whether `vit` is as it was when this was made. ValueError for hooks on all modules of the process."""
        refuse_hooks_on_everything()
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
        inner = list(map(switches, self.tried))
        return (list(map(type, self.modules)), children, any(self._childless), list(map(len, self._dicts)),
                list(map(operator.attrgetter(*OWN_CALL), self._kinds)), inner)  # fmt: skip

    def _hook_numbers(self) -> list[tuple]:
        return [tuple(d[kind]) for d in self._dicts for kind in HOOKS if d[kind]]


def _settings(vit: nn.Module) -> tuple:
    kind, patch, conv = type(vit), vit.patch_embed.__dict__, vit.patch_embed.proj.__dict__
    methods = (kind.forward_features, kind.forward_head, kind.forward_intermediates, kind.pool, kind._pos_embed,
               nn.Conv2d._conv_forward)  # fmt: skip
    own = [name in vit.__dict__ for name in OWN_PASS]
    return (vit.global_pool, vit.num_prefix_tokens, vit.attn_pool is None, vit.cls_token is None, methods, own,
            list(map(patch.get, PATCH_SETTINGS)), list(map(conv.get, CONV_SETTINGS)))  # fmt: skip


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
        if replaced(vit, name) or getattr(type(vit), name) not in of_timm:
            yield f"{type(vit).__name__} has a {name} of its own"
            break
    yield from _fixed_parts(vit)
    if not isinstance(vit.patch_embed, PatchEmbed):
        yield f"its patch embedding is a {type(vit.patch_embed).__name__}"
    if vit.cls_token is None or vit.global_pool != "token" or getattr(vit, "attn_pool", None) is not None:
        yield f"it pools {vit.global_pool!r}, not the CLS token, so every dropped token would count"
    for part, name in ((vit, "the model"), (vit.blocks, "model.blocks")):
        if any(map(_is_foreign, _hooks_of(part))):
            yield f"hooks on {name} itself would not fire: put them on the RaggedViT, or on single blocks"
        elif any(_hooks_of(part)):
            yield (f"a mask or norm on weights of {name} itself (pos_embed, cls_token) hangs on a hook that would not "
                   "fire: make it permanent (torch.nn.utils.prune.remove), or use a parametrization")  # fmt: skip
    if type(vit.blocks) is not nn.Sequential or replaced(vit.blocks, *OWN_CALL):
        yield f"its blocks are a {type(vit.blocks).__name__} with a forward of its own"
    for i, block in enumerate(vit.blocks):
        if problem := _block_problem(block):
            yield f"block {i}: {problem}"
            break


def _fixed_parts(vit: nn.Module) -> Iterable[str]:
    """Parts that are programs and no longer modules, and numbers that do not agree."""
    for name, module in vit.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{name} is a scripted or traced program, which fixes its shapes: wrap the model as it was before"
            break
        if name and hasattr(module, "_orig_mod") and not name.startswith("blocks."):
            yield f"{name} is compiled: compile after wrapping, with model.compile()"
            break
    if len(vit.blocks) == 0:
        yield "it has no blocks"
    for name in ("norm", "norm_pre", "fc_norm", "head", "pos_drop"):
        if not isinstance(getattr(vit, name, None), nn.Module):
            yield f"its {name} is no module"
    own = sum(t.shape[1] for n in ("cls_token", "dist_token", "reg_token") if (t := getattr(vit, n, None)) is not None)
    if vit.num_prefix_tokens != own:
        yield f"its num_prefix_tokens is {vit.num_prefix_tokens}, and it has {own} such tokens"


def _block_problem(block: nn.Module) -> str | None:
    """Why a block cannot be run at all, or None."""
    from timm.models.vision_transformer import Attention, Block

    if not isinstance(block, Block):
        inner = " (compile after wrapping, with model.compile())" if hasattr(block, "_orig_mod") else ""
        return f"type {type(block).__name__}{inner}"
    if not isinstance(block.attn, Attention):
        return f"attention {type(block.attn).__name__}"
    compiled = next((name for name, part in block.named_modules() if hasattr(part, "_orig_mod")), None)
    return compiled and f"{compiled} is compiled: compile after wrapping, with model.compile()"


def whole_reason(block: nn.Module, rows: int) -> str | None:
    """Why a block must be called as the module that it is, on (batch, n, dim), instead of piece by piece on rows; None
    for a plain one. rows: so many tokens an image usually has."""
    from timm.models.vision_transformer import Attention, Block

    for name, module in block.named_modules():
        if reason := _hook_reason(module):
            return f"{name or 'it'} {reason}"
    if type(block) is not Block or replaced(block, *OWN_CALL):
        return f"type {type(block).__name__} has a forward of its own"
    attn = block.attn
    if type(attn) is not Attention or replaced(attn, *OWN_CALL):
        return f"its attention, {type(attn).__name__}, has a forward of its own"
    if getattr(attn, "gate", None) is not None:
        return "its attention is gated"
    for name in ("q_norm", "k_norm"):
        if not row_wise(getattr(attn, name), attn.head_dim, rows):
            return f"attn.{name}, {type(getattr(attn, name)).__name__}, does not treat every row by itself"
    for name in ("drop_path1", "drop_path2", "attn.attn_drop", "attn.proj_drop"):  # in eval mode left out
        part = _part(block, name)
        if part is None:
            return f"{name} is missing"
        if (type(part).__name__ not in NOTHING_IN_EVAL or replaced(part, *OWN_CALL)):
            return f"{name}, {type(part).__name__}, is not timm's own"
    inner, outer = attn.num_heads * attn.head_dim, getattr(attn.qkv, "in_features", attn.num_heads * attn.head_dim)
    for name in ("norm1", "attn.qkv", "attn.norm", "attn.proj", "ls1", "norm2", "mlp", "ls2"):
        part = _part(block, name)
        if part is not None and not row_wise(part, inner if name in ("attn.norm", "attn.proj") else outer, rows):
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


def refuse_hooks_on_everything() -> None:
    """RuntimeError while hooks on all modules of the process are registered: they would see few modules of a pass.
    PyTorch's own, which only note where a program is, may stay."""
    kinds = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks",
             "_global_backward_hooks")  # fmt: skip
    for kind in kinds:
        for hook in (registered.values() if (registered := getattr(of_torch, kind)) else ()):
            if not type(getattr(hook, "__self__", None)).__module__.startswith("torch."):
                raise RuntimeError(
                    "RaggedViT: hooks on all modules are registered (torch.nn.modules.module.register_module_...), and "
                    "most modules here are not called one by one; remove them, or hook single blocks"
                )


def exporting() -> bool:
    """Whether `torch.export` traces. Under `torch.compile` PyTorch 2.11's own function answers yes, too; the flag that
    it returns elsewhere does not."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def refuse_fixed_programs(pruner: Any, images: object) -> None:
    """RuntimeError or NotImplementedError while a program is traced or exported that cannot hold what `pruner`, or the
    pass itself, does with images."""
    if isinstance(images, torch.fx.Proxy):
        raise NotImplementedError(
            "torch.fx.symbolic_trace: a trace cannot hold what is decided in Python while the model runs; use "
            "model.compile(), or torch.export"
        )
    if pruner is not None and torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace: a traced program keeps the counts of the images it was traced with; use "
            "model.capture(batch_size) on a GPU, model.compile(), or torch.export for pruners with fixed counts"
        )
    if pruner is not None and pruner.adaptive and exporting():
        raise NotImplementedError(
            f"torch.export: {pruner.name} decides on the data how many tokens stay, and an exported program "
            "has no sizes that depend on data; export a pruner with fixed counts, or use model.capture(batch_size)"
        )


# ---- what stands before the blocks ----


def convolves_as_usual() -> bool:
    """Whether convolutions and products are PyTorch's own, and nobody looks at every function that is called."""
    if torch.compiler.is_compiling():
        return True
    if nn.functional.conv2d is not torch.conv2d or nn.functional.linear is not torch._C._nn.linear:
        return False
    modes = torch.overrides._get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return all(type(mode).__module__.startswith("torch.") for mode in modes)


def _no_list(vit: nn.Module, rows: int) -> str | None:
    """Why the embedding cannot run on the packed tokens of images of different sizes, or None. What stands before the
    blocks must treat every row by itself, and positions must be timm's, which are made anew for every size."""
    from timm.layers import PatchDropout
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    known = [kind._pos_embed for kind in (VisionTransformer, VisionTransformerDistilled)]
    if replaced(vit, "_pos_embed") or type(vit)._pos_embed not in known:
        return f"{type(vit).__name__} has a _pos_embed of its own"
    for name in ("pos_drop", "patch_drop", "norm_pre"):
        part = getattr(vit, name, None)
        if part is None:
            continue
        for module in part.modules():
            if reason := _hook_reason(module):
                return f"{name} {reason}"
        if name == "patch_drop":  # nothing in eval mode, so left out
            if type(part) not in (PatchDropout, nn.Identity) or replaced(part, *OWN_CALL):
                return f"{name}, {type(part).__name__}, is not timm's own"
        elif not row_wise(part, vit.embed_dim, rows):
            return f"{name}, {type(part).__name__}, does not treat every row by itself"
    return None


def _is_product(patch: nn.Module) -> bool:
    """Whether the patch embedding is one matrix product: plain modules, patches that neither overlap nor are padded."""
    from timm.layers import PatchEmbed

    conv = patch.proj
    if type(patch) is not PatchEmbed or type(conv) is not nn.Conv2d or replaced(conv, "_conv_forward"):
        return False
    if any(replaced(m, *OWN_CALL) or any(_hooks_of(m)) for m in patch.modules()):
        return False
    plain = conv.stride == conv.kernel_size and set(conv.padding) == {0} and set(conv.dilation) == {1}
    return plain and conv.groups == 1 and conv.kernel_size == tuple(patch.patch_size)
