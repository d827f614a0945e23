"""The providers of variable-length attention: one function and one reason not to, for each. A new one goes here only.

Every `run` takes checked arguments (q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse), with q (total_q, nheads,
headdim) and k, v (total_k, nheads, headdim), and returns the output like q and the log-sum-exp (nheads, total_q) or
None.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch
from .checks import FLOATS, Registry, may_look
from .gradients import Gradients, by_autograd, by_kernel
from .kernels.padding import masked_sdpa, pad_rows, unfused_softmax, unpad_rows
from .tiles import GLUON_LENGTHS, prefers_gluon, takes_gluon

HALF = (torch.float16, torch.bfloat16)
Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Backend:
    """One provider, and every fact that the rest of the package needs to know about it.

    run: as this file's beginning says.  why_not: (device, dtype, headdim) -> the reason why it cannot run, or None.
    layout: how a model's late blocks run under it, "packed" on the flat buffer or "padded" as (batch, n, dim).
    packs_first: the blocks before the first cut run on the flat buffer too.  equal_only: refuses unequal counts.
    recordable: does not read from the GPU in the middle of a pass, so that the pass can be a CUDA graph.
    has_lse: computes the log-sum-exp.  auto: "auto" may pick it; the first one that runs is taken.
    backward: computes the gradients as `gradients.py` says, or None; no_backward: then the reason.
    saves_lse: `backward` reads the log-sum-exp.  lse_gradient: a gradient finds its way through the log-sum-exp, too.
    paper_padding: pads as the paper's baseline does, rows by a loop to the original length, attention unfused.
    """

    name: str
    run: Callable[..., Result]
    why_not: Callable[[torch.device | str, torch.dtype, int], str | None]
    about: str = ""
    layout: str = "packed"
    packs_first: bool = False
    equal_only: bool = False
    recordable: bool = True
    has_lse: bool = False
    auto: bool = False
    paper_padding: bool = False
    backward: Callable[..., Gradients] | None = None
    no_backward: str = "it computes the output only"
    saves_lse: bool = False
    lse_gradient: bool = False

    @property
    def pads(self) -> bool:
        """Whether a model's late blocks run on a padded batch."""
        return self.layout == "padded"


# ---- the providers ----


def _triton(*arguments) -> Result:
    from .kernels.attention import attend  # imported here: Triton is optional

    return attend(*arguments)


def _kind(q, k, cu_q, max_q, max_k) -> tuple:
    """A call as the tables in `tiles` know it."""
    images = cu_q.shape[0] - 1
    equal = q.shape[0] == images * max_q and k.shape[0] == images * max_k
    return max_q, max_k, q.shape[2], images * q.shape[1], equal, q.element_size()


def _gluon(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    if not takes_gluon(*_kind(q, k, cu_q, max_q, max_k)):
        raise ValueError(
            f"backend 'gluon': expected {cu_q.shape[0] - 1} sequences of equal length, {GLUON_LENGTHS[0]} to "
            f"{GLUON_LENGTHS[-1]} queries and as many keys, got {q.shape[0]} queries, at most {max_q} each, and "
            f"{k.shape[0]} keys, at most {max_k} each; use 'triton' or 'auto'"
        )
    from .kernels.hopper import attend

    return attend(*_sixteen(q, k, v), cu_q, cu_k, max_q, scale, want_lse)


def gluon_or_triton(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: object) -> Result:
    """What "auto" runs where both kernels can, by shape. rest: what every `run` takes, from max_q on."""
    run = _gluon if prefers_gluon(*_kind(q, k, cu_q, *rest[:2])) else _triton
    return run(q, k, v, cu_q, cu_k, *rest)


def _padded(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    if q.shape[0] == 0:
        return torch.empty_like(q), q.new_zeros((q.shape[1], 0), dtype=torch.float32) if want_lse else None
    qp, _ = pad_rows(q, cu_q, max_q)
    kp, real = pad_rows(k, cu_k, max_k)
    vp, _ = pad_rows(v, cu_k, max_k)
    out = unpad_rows(masked_sdpa(qp, kp, vp, real, scale), cu_q, q.shape[0])
    if not want_lse:
        return out, None
    scores = torch.einsum("bqhd,bkhd->bqhk", qp.float(), kp.float()) * scale  # SDPA keeps its log-sum-exp to itself
    lse = scores.masked_fill(~real[:, None, None], -math.inf).logsumexp(-1)
    return out, unpad_rows(lse, cu_q, q.shape[0]).T.contiguous()


def _paper_padded(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    """As published, kept faithfully slow: one Python loop per image to pad, unfused attention, one to take it out."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    batch = len(starts_q) - 1
    qp, kp, vp = (x.new_zeros((batch, n, *x.shape[1:])) for x, n in ((q, max_q), (k, max_k), (v, max_k)))
    real = torch.zeros((batch, max_k), dtype=torch.bool, device=q.device)
    for b in range(batch):
        n_q, n_k = starts_q[b + 1] - starts_q[b], starts_k[b + 1] - starts_k[b]
        qp[b, :n_q] = q[starts_q[b] : starts_q[b + 1]]
        kp[b, :n_k] = k[starts_k[b] : starts_k[b + 1]]
        vp[b, :n_k] = v[starts_k[b] : starts_k[b + 1]]
        real[b, :n_k] = True
    padded = unfused_softmax(qp, kp, vp, real, scale)
    out = torch.zeros_like(q)  # an image without keys gets zeros, not the softmax of nothing
    for b in range(batch):
        if starts_k[b + 1] > starts_k[b]:
            out[starts_q[b] : starts_q[b + 1]] = padded[b, : starts_q[b + 1] - starts_q[b]]
    return out, None


def _dense(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    batch = cu_q.shape[0] - 1
    equal = q.shape[0] == batch * max_q and k.shape[0] == batch * max_k
    if equal and may_look(q):
        equal = all(bool((cu.diff() == longest).all()) for cu, longest in ((cu_q, max_q), (cu_k, max_k)))
    if not equal:
        raise ValueError(
            f"backend 'dense': expected {batch} sequences of equal length, {max_q} queries and {max_k} keys each, got "
            f"others, {q.shape[0]} queries and {k.shape[0]} keys in all; use 'triton' or 'sdpa_padded'"
        )
    shaped = (x.unflatten(0, (batch, n)) for x, n in ((q, max_q), (k, max_k), (v, max_k)))
    return masked_sdpa(*shaped, None, scale).flatten(0, 1), None


def _sixteen(*tensors: Tensor) -> list[Tensor]:
    """The tensors as libraries want them: dense last dimension, rows and start on multiples of 16 bytes. Views of an
    ordinary qkv projection are passed on as they are, others are copied: a misaligned one would stop the whole GPU
    context with an error."""
    return [x if _on_sixteen(x) else x.contiguous().clone() for x in tensors]


def _on_sixteen(x: Tensor) -> bool:
    numbers = 16 // x.element_size()
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % numbers == 0 for s in x.stride()[:-1])


def _minus_inf(lse: Tensor) -> Tensor:
    """FlashAttention marks a sequence without keys by +inf; the logarithm of an empty sum is -inf."""
    return lse.masked_fill(lse == math.inf, -math.inf)


def _nested(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    """NestedTensor SDPA, with the zero-copy constructor."""
    q, k, v = _sixteen(q, k, v)
    make = torch.nested.nested_tensor_from_jagged
    nq = make(q, cu_q.long(), min_seqlen=1, max_seqlen=max_q)
    nk, nv = (make(x, cu_k.long(), min_seqlen=1, max_seqlen=max_k) for x in (k, v))
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (nq, nk, nv)), scale=scale)
    return out.transpose(1, 2).values(), None


def _flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    from flash_attn import flash_attn_varlen_func

    sizes = (cu_q, cu_k, max_q, max_k)
    out = flash_attn_varlen_func(*_sixteen(q, k, v), *sizes, softmax_scale=scale, return_attn_probs=want_lse)
    return (out[0], _minus_inf(out[1])) if want_lse else (out, None)


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    arguments = (*_sixteen(q, k, v), cu_q, cu_k, max_q, max_k)
    if not want_lse:
        return varlen_attn(*arguments, scale=scale), None
    out, lse = varlen_attn(*arguments, scale=scale, return_aux=AuxRequest(lse=True))
    return out, _minus_inf(lse)


def _efficient_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    if 0 in (q.shape[0], k.shape[0]):  # the operator takes no empty tensors
        lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
        return q.new_zeros(q.shape), lse if want_lse else None
    q, k, v = (x[None] for x in _sixteen(q, k, v))
    sizes = (None, cu_q, cu_k, max_q, max_k, 0.0, 0, want_lse)  # no bias, no dropout, no mask
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(q, k, v, *sizes, scale=scale)
    if not want_lse:
        return out[0], None
    rows = lse.masked_fill((cu_k.diff() == 0)[:, None, None], -math.inf)  # (batch, nheads, at least max_q)
    return out[0], unpad_rows(rows.transpose(1, 2), cu_q, q.shape[1]).T.contiguous()


FLASH_3 = {"flash_attn_interface": "flash_attn_config", "fa3_fwd_interface": "fa3_fwd_config"}


@functools.cache
def _flash_3() -> tuple[Callable | None, dict, str]:
    """FlashAttention-3's function, what its build leaves out, and why there is none."""
    for name, config in FLASH_3.items():
        if launch.installed(name):
            try:
                function = importlib.import_module(name).flash_attn_varlen_func
                return function, importlib.import_module(config).CONFIG["build_flags"], ""
            except Exception as error:  # a build for another PyTorch fails in its own way
                return None, {}, f"{name} cannot be imported: {error}"
    return None, {}, "FlashAttention-3 is not installed (pip install --no-deps fa3-fwd, bfloat16 only)"


def _flash_attn_3(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    function = _flash_3()[0]
    sizes = (cu_q, cu_k, max_q, max_k)
    out = function(*_sixteen(q, k, v), *sizes, softmax_scale=scale, return_attn_probs=want_lse)
    return (out[0], _minus_inf(out[1])) if want_lse else (out, None)


def _paper_triton(q, k, v, cu_q, cu_k, max_q, max_k, scale, want_lse) -> Result:
    if cu_q is not cu_k and not (cu_q.shape == cu_k.shape and torch.equal(cu_q, cu_k)):
        raise ValueError("backend 'paper_triton': Algorithm 1 has one cu_seqlens, queries and keys must agree")
    from .kernels.attention import paper_attend

    return paper_attend(q, k, v, cu_q, max_q, scale), None


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, want_lse: bool
) -> Result:
    """The one reference: a loop over sequences in float64 on the CPU. Returns float64 CPU tensors."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float64)
    for b in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        if starts_k[b] == starts_k[b + 1]:
            continue  # no keys: zeros, and a log-sum-exp of minus infinity
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys])
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse if want_lse else None


def _reference_like(q, *arguments) -> Result:
    out, lse = reference(q, *arguments)
    return out.to(q), None if lse is None else lse.to(q.device, torch.float32)


def _anywhere(device, dtype, headdim) -> str | None:
    if torch.device(device).type == "meta":
        return "device 'meta' holds no numbers"
    if torch.device(device).type == "cuda" and (reason := _no_cuda(device)):
        return reason
    return None if dtype in FLOATS else f"dtype {dtype} is not one of float16, bfloat16, float32, float64"


def _no_cuda(device: torch.device | str) -> str | None:
    """Why nothing can run on CUDA for this device, or None."""
    if torch.device(device).type != "cuda":
        return f"device {torch.device(device).type!r} is not CUDA"
    return None if torch.cuda.is_available() else "PyTorch finds no usable CUDA device or driver here"


def _why_not_nested(device, dtype, headdim) -> str | None:
    return _no_cuda(device) or _anywhere(device, dtype, headdim)


def _why_not_triton(device, dtype, headdim) -> str | None:
    device = torch.device(device)
    if not launch.installed("triton"):
        return "Triton is not installed (it exists for Linux only)"
    if not (device.type == "cpu" and launch.INTERPRET) and (reason := _no_cuda(device)):
        return f"{reason}; set TRITON_INTERPRET=1 before importing to interpret it on CPU tensors"
    if device.type == "cuda" and _capability(device) < (8, 0):
        return (
            f"compute capability {'.'.join(map(str, _capability(device)))} has no tensor-core path in Triton "
            "(needs 8.0): use 'sdpa_padded'"
        )
    if dtype not in (*HALF, torch.float32):
        return f"dtype {dtype} is not one of float16, bfloat16, float32"
    if launch.INTERPRET and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 tiles as if they were integers"
    if not 16 <= headdim <= 128:
        return f"head dimension {headdim} is outside 16 to 128"
    return None


def _why_not_gluon(device, dtype, headdim) -> str | None:
    return _why_not_triton(device, dtype, headdim) or launch.no_gluon(torch.device(device), dtype, headdim)


def _why_not_flash_package(device, dtype, headdim) -> str | None:
    if not launch.installed("flash_attn"):
        return "the flash-attn package is not installed (pip install flash-attn --no-build-isolation)"
    return _why_not_flash(device, dtype, headdim)


def _why_not_flash(device, dtype, headdim) -> str | None:
    if reason := _no_cuda(device):
        return reason
    if _capability(torch.device(device)) < (8, 0):
        return "needs compute capability 8.0"
    if dtype not in HALF:
        return f"dtype {dtype} is not float16 or bfloat16"
    return None if headdim <= 256 and headdim % 8 == 0 else f"head dimension {headdim} is not a multiple of 8 up to 256"


def _why_not_torch_varlen(device, dtype, headdim) -> str | None:
    if not launch.installed("torch.nn.attention.varlen"):
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen (2.10 brought it)"
    return _why_not_flash(device, dtype, headdim)


def _why_not_flash_3(device, dtype, headdim) -> str | None:
    if reason := _flash_3()[2] or _why_not_flash(device, dtype, headdim):
        return reason
    if _capability(torch.device(device)) != (9, 0):
        return "needs compute capability 9.0"
    without_half = _flash_3()[1].get("FLASHATTENTION_DISABLE_FP16")
    return "this build of FlashAttention-3 has no float16" if dtype == torch.float16 and without_half else None


def _why_not_efficient(device, dtype, headdim) -> str | None:
    if reason := _no_cuda(device):
        return reason
    if dtype not in (*HALF, torch.float32):
        return f"dtype {dtype} is not one of float16, bfloat16, float32"
    needed = (8, 0) if dtype == torch.bfloat16 else (5, 0)
    if _capability(torch.device(device)) < needed:
        return f"needs compute capability {needed[0]}.{needed[1]} for {dtype}"
    grain = 16 // dtype.itemsize
    return f"head dimension {headdim} is not a multiple of {grain}" if headdim % grain else None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_ALL = (  # in the order in which "auto" tries them
    Backend("triton", _triton, _why_not_triton, "this collection's kernel", packs_first=True, has_lse=True, auto=True,
            backward=by_kernel, saves_lse=True, lse_gradient=True),
    Backend("flash_attn", _flash_attn, _why_not_flash_package, "FlashAttention-2", has_lse=True, auto=True,
            backward=by_autograd(_flash_attn)),
    Backend("torch_varlen", _torch_varlen, _why_not_torch_varlen, "PyTorch's varlen_attn", has_lse=True, auto=True,
            backward=by_autograd(_torch_varlen)),
    Backend("efficient_varlen", _efficient_varlen, _why_not_efficient, "PyTorch's memory-efficient kernel, ragged",
            has_lse=True, auto=True, backward=by_autograd(_efficient_varlen, always_lse=True, leaves_gaps=True)),
    Backend("gluon", _gluon, _why_not_gluon, f"for Hopper: images of one length, {GLUON_LENGTHS[0]} to "
            f"{GLUON_LENGTHS[-1]}", packs_first=True, equal_only=True, has_lse=True,
            no_backward="it is for inference; backend 'triton' has one"),
    Backend("flash_attn_3", _flash_attn_3, _why_not_flash_3, "FlashAttention-3", has_lse=True,
            no_backward="its package fa3-fwd holds the forward pass only"),
    Backend("nested", _nested, _why_not_nested, "NestedTensor SDPA, zero-copy construction", recordable=False,
            no_backward="here it is compared forward only"),
    Backend("sdpa_padded", _padded, _anywhere, "fused SDPA, padded to the longest, vectorised", layout="padded",
            has_lse=True, auto=True, backward=by_autograd(_padded), lse_gradient=True),
    Backend("reference", _reference_like, _anywhere, "float64 loop on the CPU", recordable=False, has_lse=True,
            backward=by_autograd(_reference_like), lse_gradient=True),
    Backend("paper_triton", _paper_triton, _why_not_triton, "Algorithm 1 of the paper, launched its way",
            no_backward="the paper's Algorithm 1 is a forward pass"),
    Backend("paper_padded", _paper_padded, _anywhere, "the paper's padded baseline: loops, unfused", layout="padded",
            recordable=False, paper_padding=True, no_backward="the paper's baseline is a forward pass"),
    Backend("dense", _dense, _anywhere, "fused SDPA, equal counts only", layout="padded", equal_only=True,
            backward=by_autograd(_dense)),
)  # fmt: skip
BACKENDS: Registry[str, Backend] = Registry("backend", {backend.name: backend for backend in _ALL})
