"""Whether a module treats every row of its input by itself: known from its type, or tried out on a copy.

Here too: what an unknown module might decide by, and whether a method is the one that stands in its class.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

OWN_CALL = ("forward", "__call__", "_call_impl")
MODULE_PARTS = frozenset(nn.Module().__dict__)
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def switches(module: nn.Module) -> list:
    """What an unknown module might decide by: its own attributes, by value where they are plain and as deep as they
    go, and how often its weights and buffers were written."""
    own = [(name, _signature(value)) for name, value in module.__dict__.items() if name not in MODULE_PARTS]
    return own + [_signature(x) for held in (module._parameters, module._buffers) for x in held.values()]


def _signature(value: object, depth: int = 4) -> object:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_signature(v, depth - 1) for v in value]
    inner = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if depth and isinstance(inner, dict) and not isinstance(value, nn.Module | type) and not callable(value):
        return [(str(k), _signature(v, depth - 1)) for k, v in inner.items()]
    return id(value)


@functools.cache
def known() -> frozenset[type]:
    """Types that treat every row by itself."""
    from timm import layers
    from timm.models import vision_transformer

    names = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32", "Mlp", "GluMlp",
             "SwiGLU", "DropPath", "GELU", "GELUTanh", "QuickGELU")  # fmt: skip
    torch_names = ("Linear", "LayerNorm", "RMSNorm", "Identity", "GELU", "ReLU", "SiLU", "Tanh", "Sigmoid", "Dropout")
    found = [getattr(layers, n, None) for n in names] + [getattr(nn, n, None) for n in torch_names]
    return frozenset(filter(None, [*found, getattr(vision_transformer, "LayerScale", None)]))


@functools.cache
def structure() -> frozenset[type]:
    """Types that hold parts, and are looked at by themselves."""
    from timm.layers import PatchDropout, PatchEmbed
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    return frozenset((PatchDropout, PatchEmbed, Attention, Block, VisionTransformer, VisionTransformerDistilled,
                      nn.Sequential, nn.ModuleList, nn.Conv2d))  # fmt: skip


def row_wise(module: nn.Module, dim: int, rows: int) -> bool:
    """Whether `module`, on rows of `dim` numbers, treats every row by itself: known from its type, or else tried out on
    images of `rows` rows.

    Adapters come in all kinds, so a copy of an unknown module is run on random rows with random weights (its present
    ones may be the zeros that adapters begin with): all rows at once, some of them, in another order, and in another
    shape; switched on and off, where it has buffers. One that changes itself meanwhile is refused. What it decides by
    something outside itself, a global variable, say, cannot be seen.
    """
    types = known()
    if all(type(m) in types and not replaced(m, *OWN_CALL) and _one_dim(m) for m in module.modules()):
        return True
    try:
        twin = copy.deepcopy(module)
        tries = [_weights(twin, on) for on in (True, False, None)[:: 1 if any(True for _ in twin.buffers()) else 2]]
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _no_cache():
            return all(_treats_rows_alike(twin, weights, dim, rows) for weights in tries)
    except Exception:  # whatever somebody's module raises for rows: it does not take them
        return False


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Without the cache of parametrized weights, which would keep those of a trial."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


def _one_dim(module: nn.Module) -> bool:
    return len(getattr(module, "normalized_shape", (0,))) == 1


def _weights(module: nn.Module, on: bool | None) -> dict[str, Tensor]:
    """Weights and buffers to try `module` with: random, Booleans as `on` says; None: the present ones."""
    generator = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        if on is None or not (x.is_floating_point() or x.dtype == torch.bool):
            return x.detach().clone()
        if x.dtype == torch.bool:
            return torch.full_like(x, on)
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)

    return {name: like(x) for name, x in (*module.named_parameters(), *module.named_buffers())}


def _treats_rows_alike(module: nn.Module, weights: dict[str, Tensor], dim: int, rows: int) -> bool:
    first = next(iter(module.parameters()), torch.empty(0))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, rows, dim, generator=generator, dtype=torch.float32).to(first.device, first.dtype)
    order = torch.randperm(rows, generator=generator).to(x.device)
    before, kept = list(map(switches, module.modules())), {name: w.clone() for name, w in weights.items()}
    some = (slice(1), slice(rows // 2 + 1))
    whole, flat, fewer, other = (
        torch.func.functional_call(module, weights, (given,))
        for given in (x, x.flatten(0, 1), x[some], x.flip(0)[:, order])
    )
    if before != list(map(switches, module.modules())) or not all(torch.equal(kept[n], weights[n]) for n in kept):
        return False
    pairs = ((flat, whole.flatten(0, 1)), (fewer, whole[some]), (other, whole.flip(0)[:, order]))
    size = whole.float().abs().max().item()
    return all(a.shape == b.shape and (a - b).float().abs().max().item() <= 1e-3 * size for a, b in pairs)


def replaced(module: nn.Module, *names: str) -> bool:
    """Whether any of these methods is another than the one in the file of the class that defines it: replaced on this
    object, or on the class."""
    return any(name in module.__dict__ or not as_written(type(module), name) for name in names)


def as_written(kind: type, name: str) -> bool:
    """Whether the method `name` of `kind` is the one that stands in the file of its class."""
    owner = next(k for k in kind.__mro__ if name in k.__dict__)
    code = getattr(owner.__dict__[name], "__code__", None)
    return code is not None and code.co_filename == sys.modules[owner.__module__].__file__
