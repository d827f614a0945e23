"""Argument checks. Every error names the argument, what was expected and what came.

Here too: the dictionary behind `BACKENDS` and `PRUNERS`. Which models are handled stands in support/.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECK_VALUES = os.environ.get("RAGGED_CHECK") == "1"  # look at numbers on CUDA too, at the price of a wait


def may_look(x: Tensor) -> bool:
    """Whether the numbers in x are there to be checked: on CUDA that is a wait, so only with RAGGED_CHECK=1; while a
    program is compiled or exported there are none."""
    return (CHECK_VALUES or not x.is_cuda) and not (x.is_meta or torch.compiler.is_compiling())


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


# ---- images, and what a pruner answers ----


def check_images(images: Tensor, vit: nn.Module) -> None:
    """Images as `vit` takes them: (batch, channels, height, width), its size unless it has dynamic_img_size, its dtype
    unless autocast is on, its device. ValueError otherwise."""
    patch, dynamic = vit.patch_embed, vit.dynamic_img_size
    channels = getattr(patch.proj, "in_channels", 3)
    sides = ("height", "width") if dynamic else patch.img_size
    if isinstance(images, Tensor) and images.is_nested:
        raise TypeError("images: expected a dense tensor or a list, got a nested one; images.unbind() makes a list")
    good = isinstance(images, Tensor) and images.dim() == 4 and images.shape[1] == channels
    if not good or not (dynamic or tuple(images.shape[2:]) == tuple(sides)):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected (batch, {channels}, {sides[0]}, {sides[1]}), got {shape}")
    if images.shape[0] == 0:
        raise ValueError("images: expected at least one image, got an empty batch")
    if any(side < least for side, least in zip(images.shape[2:], patch.patch_size)) and not patch.dynamic_img_pad:
        raise ValueError(f"images: expected sides of at least one patch, {patch.patch_size}, got {tuple(images.shape)}")
    _check_like_model("images", images, weight_of(vit))


def _under_vmap() -> bool:
    """Whether torch.vmap is going on. A compiler cannot look at that, and is not asked."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(level.key() == vmap for level in torch._C._functorch.get_interpreter_stack())


def _check_like_model(name: str, x: Tensor, weight: Tensor) -> None:
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")
    if _under_vmap():
        raise NotImplementedError(f"{name}: torch.vmap is not supported; give the whole batch in one call")
    mixed = torch.is_autocast_enabled(weight.device.type) and x.dtype in FLOATS[:3]  # float64 is left alone by it
    if (x.dtype != weight.dtype and not mixed) or x.device != weight.device:
        expected, got = f"{weight.dtype} on {weight.device}", f"{x.dtype} on {x.device}"
        raise ValueError(f"{name}: expected {expected} like the model, got {got}")


def check_image_list(images: Sequence[Tensor], vit: nn.Module, as_product: bool) -> None:
    """A list of images of different sizes as `vit` takes them: (channels, height, width), at least a patch, sides that
    timm takes, dtype and device as in `check_images`. as_product: whether the patch embedding itself is not called.
    TypeError or ValueError otherwise."""
    patch = vit.patch_embed
    weight, channels, (down, across) = weight_of(vit), getattr(patch.proj, "in_channels", 3), patch.patch_size
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError("images: lists are not supported under transforms of torch.func; give a batch")
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got an empty list")
    for i, image in enumerate(images):
        name = f"images[{i}]"
        if not isinstance(image, Tensor):
            expected = f"a tensor ({channels}, height, width)"
            raise TypeError(f"images: {name}: expected {expected}, got {type(image).__name__}")
        shape = tuple(image.shape)
        if image.dim() != 3 or shape[0] != channels:
            raise ValueError(f"{name}: expected ({channels}, height, width), got {shape}")
        if 0 in shape or (not patch.dynamic_img_pad and (shape[1] < down or shape[2] < across)):
            raise ValueError(f"{name}: expected sides of at least one patch, {patch.patch_size}, got {shape}")
        own_size = shape[1:] == tuple(patch.img_size)
        if not (patch.dynamic_img_pad or own_size) and (shape[1] % down or shape[2] % across):
            expected = f"expected sides that are multiples of the patch, {patch.patch_size}, got {shape}"
            raise ValueError(f"{name}: {expected}; crop or pad it, or make the network with dynamic_img_pad=True")
        if not as_product and patch.strict_img_size and not own_size:
            why = "the network's patch embedding has to be called as it is (hooks, parts of another type)"
            only = f"takes {patch.img_size} only, got {shape}"
            raise ValueError(f"{name}: {why}, and {only}; make the network with dynamic_img_size=True")
        _check_like_model(name, image, weight)


def check_packed(tokens: Tensor, cu_seqlens: Tensor, ids: Tensor | None, lengths: Sequence[int] | None,
                 vit: nn.Module, prefix: int) -> list[int]:  # fmt: skip
    """Packed tokens (total, dim) as the blocks of `vit` take them, at least `prefix` of each image, with cu_seqlens
    int32 (batch + 1,), ids int64 (total,) or None, and lengths, the rows of each image, or None. Returns the lengths;
    on CUDA they are read, which is a wait, unless they were given. TypeError or ValueError otherwise."""
    check_tensor("tokens", tokens, 2, FLOATS)
    if tokens.shape[1] != vit.embed_dim or tokens.shape[0] == 0:
        raise ValueError(f"tokens: expected (total >= 1, {vit.embed_dim}), got {tuple(tokens.shape)}")
    _check_like_model("tokens", tokens, weight_of(vit))
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected an int32 tensor, got {type(cu_seqlens).__name__}")
    _check_offsets(cu_seqlens, "cu_seqlens", tokens)
    total, batch = tokens.shape[0], cu_seqlens.shape[0] - 1
    if ids is not None:
        check_tensor("ids", ids, 1, (torch.int64,))
        if ids.shape[0] != total or ids.device != tokens.device:
            expected, got = f"{total} numbers on {tokens.device}", f"{ids.shape[0]} on {ids.device}"
            raise ValueError(f"ids: expected {expected}, one per token, got {got}")
    if lengths is not None:
        good = isinstance(lengths, Sequence) and all(isinstance(n, Integral) for n in lengths)
        if not good or len(lengths) != batch or sum(lengths) != total:
            raise ValueError(f"lengths: expected {batch} ints, {total} in all like the tokens, got {lengths!r}")
        lengths = [int(n) for n in lengths]
    if lengths is None or may_look(cu_seqlens):
        values = cu_seqlens.tolist()
        read = [b - a for a, b in zip(values, values[1:], strict=False)]
        if values[0] != 0 or values[-1] != total or min(read) < 0:
            shown = f"{values[:8]}{'...' if len(values) > 8 else ''}"
            raise ValueError(f"cu_seqlens: expected offsets rising from 0 to {total}, as many as tokens, got {shown}")
        if lengths is not None and read != lengths:
            raise ValueError("lengths: they do not agree with cu_seqlens")
        lengths = read
    if min(lengths) < max(prefix, 1):
        raise ValueError(f"cu_seqlens: expected at least the {prefix} prefix tokens (CLS first) of every image, got an "
                         f"image of {min(lengths)}")  # fmt: skip
    return lengths


def check_intermediates(x: object, indices: int | Iterable[int] | None, output_fmt: str, fill: str,
                        fills: Sequence[str], depth: int) -> tuple[list[int], int]:  # fmt: skip
    """What `forward_intermediates` of `depth` blocks is asked for: the blocks that are wanted, and the last of them.
    x: images, one batch.  indices: a number, the last so many; None, all; or which, from the end if negative.
    output_fmt: "NCHW" or "NLC".  fill: one of `fills`. TypeError or ValueError otherwise."""
    from timm.models._features import feature_take_indices

    if isinstance(x, list | tuple):
        raise TypeError("images: expected a batch: features are laid out on one grid; a list has logits and `trace`")
    if fill not in fills:
        raise ValueError(f"fill: expected one of {', '.join(fills)}, got {fill!r}")
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
    try:
        given = depth if indices is None else indices
        given = int(given) if isinstance(given, Integral) else [operator.index(i) for i in given]
        inside = 1 <= given <= depth if isinstance(given, int) else all(-depth <= i < depth for i in given)
    except TypeError:
        inside = False
    if not inside:
        raise ValueError(f"indices: expected blocks of {depth}, or how many of the last, got {indices!r}")
    return feature_take_indices(depth, given) if given else ([], depth - 1)


def weight_of(vit: nn.Module) -> Tensor:
    """The weight whose dtype and device stand for those of the model: the patch embedding's, or its first."""
    weight = getattr(vit.patch_embed.proj, "weight", None)
    return weight if isinstance(weight, Tensor) else next(vit.patch_embed.parameters())


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """In which dtype the products with a model's `weight` run, autocast considered. ValueError on the meta device."""
    kind = weight.device.type
    if kind == "meta":
        raise ValueError("RaggedViT: the model is on the meta device, where there are no numbers; load weights first")
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def wants_gradients(model: nn.Module, images: Tensor | Sequence[Tensor]) -> bool:
    """Whether anybody wants gradients of a call of `model` on images."""
    if not torch.is_grad_enabled():
        return False
    given = images if isinstance(images, list | tuple) else [images]
    return any(isinstance(x, Tensor) and x.requires_grad for x in itertools.chain(given, model.parameters()))


def check_selection(selection: object, name: str, state: Any, prefix: int, adaptive: bool) -> None:
    """What the pruner `name` answered: a Selection from the rows of `state` (`Packed` or `Padded`), whose first
    `prefix` rows stay. adaptive: counts may vary. TypeError or ValueError otherwise. Values are looked at where that
    costs no wait."""
    batch, width, device = state.batch, state.width, state.tokens.device
    least = state.count if state.rows is None else min(state.rows.host)  # of the shortest image; None: the device knows
    index, counts, blend = (getattr(selection, part, None) for part in ("index", "counts", "blend"))
    most = width if least is None else least
    known = getattr(counts, "host", None)  # a `Counts`
    if known is not None:
        counts, adaptive = counts.device, True
        if len(known) != batch:
            raise ValueError(f"{name}.select: counts: expected {batch} numbers on the host, got {len(known)}")
    if not isinstance(index, Tensor) or counts is None:
        raise TypeError(f"{name}.select: expected a Selection or None, got {type(selection).__name__}")
    if index.dtype != torch.int64 or index.device != device or index.dim() != 2 or index.shape[0] != batch:
        raise ValueError(f"{name}.select: index: expected int64 ({batch}, k) on {device}, got {_said(index)}")
    if isinstance(counts, Tensor):
        if counts.dtype != torch.int32 or counts.device != device or counts.shape != (batch,):
            raise ValueError(f"{name}.select: counts: expected int32 ({batch},) on {device}, got {_said(counts)}")
        if not adaptive:
            raise ValueError(f"{name}.select: counts: a tensor of counts needs a pruner with adaptive = True")
    elif type(counts) is not int:
        raise TypeError(f"{name}.select: counts: expected an int or an int32 tensor, got {type(counts).__name__}")
    elif least is None and counts > prefix and not may_look(index):
        raise ValueError(
            f"{name}.select: counts: one int for images of different lengths that only the GPU knows; answer with an "
            "int32 tensor, and set adaptive = True"
        )
    elif not prefix <= counts <= min(index.shape[1], most):
        expected = f"{prefix} (the prefix rows) to {min(index.shape[1], most)}"
        raise ValueError(f"{name}.select: counts: expected {expected} rows, got {counts}")
    if blend is not None and not (
        isinstance(blend, Tensor) and blend.is_floating_point() and blend.device == device and blend.dim() == 2
        and blend.shape[0] == batch and blend.shape[1] <= width
    ):  # fmt: skip
        expected = f"floats ({batch}, up to {width}) on {device}"
        raise ValueError(f"{name}.select: blend: expected {expected}, got {_said(blend)}")
    if blend is not None and isinstance(counts, Tensor) and known is None:
        raise ValueError(f"{name}.select: blend: a fused token needs the same count in every image, an int")
    if may_look(index):  # only here: the lengths of packed images are a launch
        lengths = state.lengths if state.count is None else state.count
        _check_selected(index, counts, name, prefix, width if lengths is None else lengths)


def _check_selected(index: Tensor, counts: Tensor | int, name: str, prefix: int, lengths: Tensor | int) -> None:
    rows = index.cpu().numpy()  # (batch, k); in NumPy, so that whoever records PyTorch's operations sees none here
    batch, width = rows.shape
    counts, lengths = (x.cpu().numpy() if isinstance(x, Tensor) else x for x in (counts, lengths))
    counts, lengths = np.broadcast_to(counts, batch), np.broadcast_to(lengths, batch)
    if (counts < prefix).any() or (counts > np.minimum(lengths, width)).any():
        raise ValueError(f"{name}.select: counts: expected {prefix} to an image's own rows, got {counts.tolist()}")
    column = np.arange(width)
    taken = column < counts[:, None]
    absent = taken & ((rows < 0) | (rows >= lengths[:, None]))
    if absent.any():
        raise ValueError(f"{name}.select: index: there is no row {rows[absent][0]} in an image of {lengths.max()} rows")
    if (rows[:, :prefix] != column[:prefix]).any():
        raise ValueError(f"{name}.select: index: expected the {prefix} prefix rows (CLS first) first, in order")
    ranked = np.sort(np.where(taken, rows, -1 - column), 1)  # every row that is not taken gets a number of its own
    if (ranked[:, 1:] == ranked[:, :-1]).any():
        raise ValueError(f"{name}.select: index: a row is selected twice")


def _said(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def per_stage(name: str, value: object, stages: int, check: Callable[[str, object], Any]) -> Any:
    """One setting for all stages of a pruner, or a sequence of one each, every one checked; as it was given, a sequence
    as a tuple. ValueError for another number of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return check(name, value)
    if len(value) != stages:
        raise ValueError(f"{name}: expected one value, or one for each of {stages} stages, got {len(value)}: {value!r}")
    return tuple(check(name, one) for one in value)
