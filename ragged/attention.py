"""`varlen_attention`: one public function over every backend, checked, and whole under torch.compile."""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from . import checks, launch
from .backends import BACKENDS, Backend, gluon_or_triton, reference
from .kernels import flow

OURS = ("auto", "triton", "gluon")  # what `launch.quick` knows


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float | None = None, return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Bidirectional attention inside each sequence of a packed batch, with a backward pass.

    q: (total_q, nheads, headdim); k, v: (total_k, nheads, headdim); float16, bfloat16, float32 or (not every backend)
    float64, one dtype and device, any strides: views of a fused qkv projection are read in place.
    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), exclusive prefix sums of the lengths; a length may be 0.
    max_seqlen_q, max_seqlen_k: no sequence is longer.  softmax_scale: positive, default 1 / sqrt(headdim).
    backend: a name in `BACKENDS`, which is used or refused with the reason, or "auto" (see `pick_backend`).

    Returns (total_q, nheads, headdim), and with return_lse also the natural log of the softmax sums, float32 (nheads,
    total_q). A sequence without keys gets zeros and -inf. Rows past cu_seqlens_q[-1] belong to no sequence, and what is
    returned for them is undefined; their gradients are zero. Gradients are those of the backend (`Backend.backward`),
    once: there are no second derivatives. Raises TypeError or ValueError naming the argument; whether cu_seqlens is
    sound is checked on the CPU always and on CUDA when RAGGED_CHECK=1, since there it costs a wait.
    """
    # One operator for the compiler, and for whoever watches operators (a FLOP counter, fake tensors): 60 ns to ask
    compiling = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if backend in OURS and not (return_lse or compiling or checks.CHECK_VALUES):
        out = launch.quick(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, backend)
        if out is not None:
            return out
    if softmax_scale is None:
        softmax_scale = _default_scale(q)
    if compiling:
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _op(q, k, v, *sizes, softmax_scale, return_lse, backend, flow.wanted(q, k, v))
        return (out, lse) if return_lse else out
    checks.check_attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if not isinstance(backend, str):
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    max_seqlen_q, max_seqlen_k = _plain_int(max_seqlen_q), _plain_int(max_seqlen_k)
    shapes = (q.shape[1:], k.shape[1:], v.shape[1:])
    gradient = flow.wanted(q, k, v)
    key = (backend, bool(return_lse), gradient, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, shapes)
    picked = _accepted.get(key)
    if picked is None:
        picked = _accepted[key] = _accept(q, k, v, return_lse, backend, gradient)
    checks.check_attention_call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    out, lse = _Attention.apply(*arguments, return_lse, picked) if gradient else picked.run(*arguments, return_lse)
    return (out, lse) if return_lse else out


_accepted: dict[tuple, Backend] = {}  # argument kinds that passed `_accept` -> the backend


def varlen_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float | None = None, return_lse: bool = False, backend: str = "reference",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The truth: `varlen_attention` as a loop over sequences in float64 on the CPU.

    The same arguments and errors: q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
    return_lse; `backend` is accepted and ignored. Returns float64 on the CPU.
    """
    scale = _default_scale(q) if softmax_scale is None else softmax_scale
    checks.check_attention_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    checks.check_attention_kinds(q, k, v)
    checks.check_attention_call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    out, lse = reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, return_lse)
    return (out, lse) if return_lse else out


@functools.cache
def pick_backend(device: torch.device | str, dtype: torch.dtype, headdim: int) -> str:
    """The backend that "auto" stands for: the first of `BACKENDS` that may be picked by itself (`Backend.auto`) and has
    no reason against tensors on `device` of this dtype and headdim (numbers per head). Where that is "triton", a single
    call may still go to "gluon": `tiles.prefers_gluon` says which. Raises ValueError with all reasons where none is
    left."""
    reasons = {name: b.why_not(device, dtype, headdim) for name, b in BACKENDS.items() if b.auto}
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


def _accept(q: Tensor, k: Tensor, v: Tensor, return_lse: bool, backend: str, gradient: bool) -> Backend:
    """Checks that depend only on what a model is, not on a batch; done once per kind of call."""
    checks.check_attention_kinds(q, k, v)
    picked = _resolve(backend, q, gradient)
    if return_lse and not picked.has_lse:
        raise ValueError(f"return_lse: backend {picked.name!r} does not compute it; use one of {_able('has_lse')}")
    if gradient and picked.backward is None:
        raise ValueError(
            f"backend {picked.name!r} has no backward pass ({picked.no_backward}), and a gradient is wanted: use "
            f"torch.no_grad(), or one of {_able('backward')}"
        )
    if gradient and return_lse and not picked.lse_gradient:
        raise ValueError(
            f"return_lse: backend {picked.name!r} has no gradient of the log-sum-exp, and one is wanted: use "
            f"torch.no_grad(), or one of {_able('lse_gradient')}"
        )
    if backend == "auto" and picked.name == "triton" and not gradient:
        if launch.auto_gluon(q.device, q.dtype, q.shape[2]):
            return replace(picked, run=gluon_or_triton)
    return picked


def _resolve(backend: str, q: Tensor, gradient: bool) -> Backend:
    """The backend of that name, or what "auto" stands for; where a gradient is wanted, the first that has one."""
    of = (q.device, q.dtype, int(q.shape[2]))  # while compiling, the last may be a symbol
    if backend == "auto" and gradient:
        for other in BACKENDS.values():
            if other.auto and other.backward is not None and other.why_not(*of) is None:
                return other
    return BACKENDS[resolve_backend(backend, *of)]


def _able(fact: str) -> str:
    return ", ".join(repr(name) for name, backend in BACKENDS.items() if getattr(backend, fact))


def _default_scale(q: Tensor) -> float:
    try:
        return q.shape[-1] ** -0.5
    except (AttributeError, IndexError, ZeroDivisionError):
        return 1.0  # q is no (total, nheads, headdim), which the checks will say


def _plain_int(n):
    """NumPy's integers as Python's; anything else, tensors above all, is left for the checks to refuse."""
    return int(n) if isinstance(n, Integral) and not isinstance(n, bool) else n


# ---- gradients ----


class _Attention(torch.autograd.Function):
    """A backend's forward pass, and its backward pass when somebody asks."""

    @staticmethod
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, return_lse, backend) -> tuple[Tensor, Tensor | None]:
        return backend.run(q, k, v, cu_q, cu_k, max_q, max_k, scale, return_lse or backend.saves_lse)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.max_q, ctx.max_k, ctx.scale, return_lse, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        if not return_lse and output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dout, dlse) -> tuple[Tensor | None, ...]:
        q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
        if dout is None:  # only the log-sum-exp was used, or nothing
            dout = torch.zeros_like(out)
        numbers = (cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.scale)
        if torch.is_grad_enabled():  # somebody may want second derivatives; the operator knows what to say
            grads = _op_backward(dout, dlse, q, k, v, out, lse, *numbers, ctx.backend.name)
        else:
            grads = ctx.backend.backward(dout, dlse, q, k, v, out, lse, *numbers, True)
        return *grads, *[None] * 7


# Under torch.compile the call is one opaque operator: the compiler neither looks inside nor breaks its graph there.
@torch.library.custom_op("ragged::varlen_attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, return_lse: bool, backend: str, gradient: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if gradient:
        picked = _accept(q, k, v, return_lse, backend, gradient)
        return_lse, backend = return_lse or picked.saves_lse, picked.name
    with torch.no_grad():  # gradients are registered below
        result = varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale=softmax_scale, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    if return_lse:
        return result[0].contiguous(), result[1]
    return result.contiguous(), q.new_empty(0, dtype=torch.float32)


@_op.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, scale, return_lse, backend, gradient=False):
    has_lse = return_lse or (gradient and _resolve(backend, q, True).saves_lse)
    lse = q.new_empty((q.shape[1], q.shape[0]) if has_lse else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("ragged::varlen_attention_backward", mutates_args=())
def _op_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    dq, dk, dv = BACKENDS[backend].backward(dout, dlse, q, k, v, out, lse, *numbers, False)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_op_backward.register_fake
def _(dout, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _op_setup(ctx, inputs, output) -> None:
    *tensors, ctx.max_q, ctx.max_k, ctx.scale, ctx.return_lse, backend, gradient = inputs
    if not gradient:  # called by its own name: what the backward pass reads may not be there
        gradient = _resolve(backend, tensors[0], True).saves_lse <= ctx.return_lse
    ctx.backend = _resolve(backend, tensors[0], True) if gradient else None
    ctx.save_for_backward(*tensors, *output)


def _op_gradients(ctx, dout, dlse):
    if ctx.backend is None:
        raise RuntimeError("ragged::varlen_attention was called without gradient=True, which its backward pass needs")
    numbers = (ctx.max_q, ctx.max_k, ctx.scale, ctx.backend.name)
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    dlse = dlse if ctx.return_lse else None
    return *_op_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, *numbers), *[None] * 8


def _no_second(ctx, *grads):
    raise NotImplementedError(
        "varlen_attention has no second derivatives: its backward pass cannot be differentiated again. Where they are "
        "needed, use varlen_attention_ref, whose every step PyTorch records."
    )


_op.register_autograd(_op_gradients, setup_context=_op_setup)
_op_backward.register_autograd(_no_second)


# What `torch.utils.flop_counter` counts for the operator. The counter takes a tenth of a second to import, so the
# formula is handed over when somebody else has imported it, or does.
def _flops(q, k, v, cu_q, cu_k, max_q, max_k, *_, out_val=None, **__) -> int:
    """4 * sum(len_q * len_k) * nheads * headdim: q k^T, and the weights times v. Where the lengths cannot be read, in
    fake and meta tensors, or only by waiting for the GPU, an upper bound: as many rows as there are, each meeting the
    longest sequence that there may be."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(cu_q, FakeTensor) or not checks.may_look(cu_q):
        batch = cu_q.shape[0] - 1
        pairs = min(q.shape[0] * max_k, k.shape[0] * max_q, batch * max_q * max_k)
    else:
        pairs = int((cu_q.diff().long() * cu_k.diff().long()).sum())
    return 4 * pairs * q.shape[1] * q.shape[2]


def _flops_backward(dout, dlse, q, k, v, out, lse, *sizes, out_val=None, **__) -> int:
    """Two and a half times the forward pass: its scores once more, and four gradients of the two products."""
    return _flops(q, k, v, *sizes) * 5 // 2


class _WhenImported:
    """Stands in `sys.meta_path` until the counter is imported, and hands the formula over then."""

    name = "torch.utils.flop_counter"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Called by every import that finds nothing loaded; only the counter's is of interest."""
        if name != cls.name or cls not in sys.meta_path:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def then_register(module):
            execute(module)
            cls.register(module)

        spec.loader.exec_module = then_register
        return spec

    @staticmethod
    def register(counter):
        counter.register_flop_formula(torch.ops.ragged.varlen_attention, get_raw=True)(_flops)
        counter.register_flop_formula(torch.ops.ragged.varlen_attention_backward, get_raw=True)(_flops_backward)


if _WhenImported.name in sys.modules:
    _WhenImported.register(sys.modules[_WhenImported.name])
else:
    sys.meta_path.insert(0, _WhenImported)
