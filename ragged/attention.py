"""`varlen_attention`: one public function over every backend, checked, and whole under torch.compile."""

from __future__ import annotations

import functools
import math
from numbers import Integral, Real

import torch
from torch import Tensor

from . import fused, launch
from .backends import BACKENDS, reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUTO = ("triton", "flash_attn", "torch_varlen", "sdpa_padded")


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float | None = None, return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Bidirectional attention inside each sequence of a packed batch (forward only).

    q: (total_q, nheads, headdim); k, v: (total_k, nheads, headdim); float16, bfloat16, float32 or (not every backend)
    float64, one dtype and device, any strides: views of a fused qkv projection are read in place.
    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), exclusive prefix sums of the lengths; a length may be 0.
    max_seqlen_q, max_seqlen_k: no sequence is longer.  softmax_scale: positive, default 1 / sqrt(headdim).
    backend: a name in `BACKENDS`, which is used or refused with the reason, or "auto" (see `pick_backend`).

    Returns (total_q, nheads, headdim), and with return_lse also the natural log of the softmax sums, float32 (nheads,
    total_q). A sequence without keys gets zeros and -inf. Rows past cu_seqlens_q[-1] belong to no sequence, and what is
    returned for them is undefined. Raises TypeError or ValueError naming the argument; whether
    cu_seqlens is sound is checked on the CPU always and on CUDA when RAGGED_CHECK=1, since there it costs a wait.
    """
    compiling = torch.compiler.is_compiling()
    if (backend == "auto" or backend == "triton") and not (return_lse or compiling or launch.CHECK_VALUES):
        out = fused.quick(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        if out is not None:
            return out
    if softmax_scale is None:
        softmax_scale = _default_scale(q)
    if compiling:
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _op(q, k, v, *sizes, softmax_scale, return_lse, backend)
        return (out, lse) if return_lse else out
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if not isinstance(backend, str):
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    max_seqlen_q, max_seqlen_k = _plain_int(max_seqlen_q), _plain_int(max_seqlen_k)
    key = (backend, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.shape[1:], k.shape[1:], v.shape[1:])
    run = _accepted.get(key)
    if run is None:
        run = _accepted[key] = _accept(q, k, v, backend)
    _check_call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    out, lse = run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, return_lse)
    return (out, lse) if return_lse else out


_accepted: dict[tuple, object] = {}  # argument kinds that passed `_accept` -> the backend's function


def varlen_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float | None = None, return_lse: bool = False, backend: str = "reference",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The truth: `varlen_attention` as a loop over sequences in float64 on the CPU.

    The same arguments and errors: q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
    return_lse; `backend` is accepted and ignored. Returns float64 on the CPU.
    """
    scale = _default_scale(q) if softmax_scale is None else softmax_scale
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_kinds(q, k, v)
    _check_call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    out, lse = reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, return_lse)
    return (out, lse) if return_lse else out


@functools.cache
def pick_backend(device: torch.device | str, dtype: torch.dtype, headdim: int) -> str:
    """The backend that "auto" stands for: the first of `AUTO` that has no reason against tensors on `device` of this
    dtype and headdim (numbers per head). Raises ValueError with all reasons where none is left."""
    reasons = {name: BACKENDS[name].why_not(device, dtype, headdim) for name in AUTO}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise ValueError(f"no backend runs here: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")


@functools.cache
def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, headdim: int) -> str:
    """`name`, or what "auto" stands for on this device, dtype and headdim. Raises ValueError for an unknown name or one
    that cannot run here, saying why and what to use instead."""
    if name == "auto":
        return pick_backend(device, dtype, headdim)
    if name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")
    reason = BACKENDS[name].why_not(device, dtype, headdim)
    if reason is not None:
        other = pick_backend(device, dtype, headdim)
        raise ValueError(f"backend {name!r} cannot run here: {reason}. Use backend={other!r} or 'auto'.")
    return name


def _accept(q: Tensor, k: Tensor, v: Tensor, backend: str):
    """Checks that depend only on what a model is, not on a batch; done once per kind of call."""
    _check_kinds(q, k, v)
    return BACKENDS[resolve_backend(backend, q.device, q.dtype, q.shape[2])].run


def _default_scale(q: Tensor) -> float:
    try:
        return q.shape[-1] ** -0.5
    except (AttributeError, IndexError, ZeroDivisionError):
        return 1.0  # q is no (total, nheads, headdim), which the checks will say


def _plain_int(n):
    """NumPy's integers as Python's; anything else, tensors above all, is left for the checks to refuse."""
    return int(n) if isinstance(n, Integral) and not isinstance(n, bool) else n


def _check_tensors(q, k, v, cu_q, cu_k) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise ValueError(f"{name}: expected (total, nheads >= 1, headdim >= 1), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} like q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} like q, got {x.device}")
        if x.shape[1:] != q.shape[1:]:
            expected, got = tuple(q.shape[1:]), tuple(x.shape[1:])
            raise ValueError(f"{name}: expected (nheads, headdim) = {expected} like q, got {got}")


def _check_call(q, k, v, cu_q, cu_k, max_q, max_k, scale) -> None:
    """Checks of one call that need no wait for the GPU."""
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
    if launch.may_look(q):
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


# Under torch.compile the call is one opaque operator: the compiler neither looks inside nor breaks its graph there.
@torch.library.custom_op("ragged::varlen_attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    result = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    if return_lse:
        return result[0].contiguous(), result[1]
    return result.contiguous(), q.new_empty(0, dtype=torch.float32)


@_op.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, scale, return_lse, backend):
    lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), lse
