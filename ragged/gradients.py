"""How gradients find their way back through attention, whoever computed it.

Every `backward` takes (dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, packed): the gradient of the
output and that of the log-sum-exp or None; then what the forward pass took and gave, lse only where `Backend.saves_lse`
says so. It returns dq, dk and dv, zero in rows that belong to no sequence. packed: where q, k and v are views of one
projection, the three may be views of one buffer too, which `split_projection` then hands on without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .kernels.padding import image_of_rows

Gradients = tuple[Tensor, Tensor, Tensor]


def by_kernel(*arguments: object) -> Gradients:
    """Of this collection's kernels; arguments: those of every `backward`."""
    from .kernels.backward import attend_backward  # imported here: Triton is optional

    return attend_backward(*arguments)


def by_autograd(run: Callable, always_lse: bool = False, leaves_gaps: bool = False) -> Callable[..., Gradients]:
    """The backward pass that PyTorch finds for a backend's `run`: it runs once more and is recorded this time. That
    costs a second forward pass, and nothing of the first has to be kept. always_lse: `run` is differentiable only while
    it computes the log-sum-exp.  leaves_gaps: where no query meets a key it leaves the gradient unwritten."""

    def backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, packed) -> Gradients:
        own = torch.arange(q.shape[0], device=q.device) < cu_q[-1]  # what stands in other rows has no gradient
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        with _recording(q.device.type):
            out, lse = run(*given, cu_q, cu_k, max_q, max_k, scale, always_lse or dlse is not None)
            pairs = [(out, torch.where(own[:, None, None], dout, 0))]
            if dlse is not None:
                pairs.append((lse, torch.where(own, dlse, 0)))
            pairs = [(x, dx.to(x)) for x, dx in pairs if x.requires_grad]  # without any row nothing depends on anything
            outputs, grads = zip(*pairs, strict=True) if pairs else ((), ())
            found = torch.autograd.grad(outputs, given, grads, allow_unused=True) if pairs else (None, None, None)
        found = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(given, found, strict=True)]
        if leaves_gaps:
            met = (cu_q.diff() > 0) & (cu_k.diff() > 0)
            found = [_only_rows_of(met, cu, dx) for cu, dx in zip((cu_q, cu_k, cu_k), found, strict=True)]
        return tuple(found)

    return backward


def _only_rows_of(met: Tensor, cu: Tensor, dx: Tensor) -> Tensor:
    """dx (total, nheads, headdim) with zeros in rows of other sequences than those marked by met, bool (batch,)."""
    image = image_of_rows(cu, dx.shape[0])
    owned, image = image < met.shape[0], image.clamp_max(met.shape[0] - 1)
    return torch.where((met[image] & owned)[:, None, None], dx, 0)


@contextmanager
def _recording(device: str) -> Iterator[None]:
    """Autograd records, even inside a custom operator, where PyTorch has switched it off twice: by the mode, and by
    hiding its dispatch keys from the thread. Autocast had its say when the inputs were made."""
    hidden = torch._C._dispatch_tls_local_exclude_set()
    with (
        torch.enable_grad(),
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden - hidden),
        torch.autocast(device, enabled=False),
    ):
        yield


# ---- one projection, one gradient ----


def split_projection(qkv: Tensor) -> Gradients:
    """q, k and v, each (total, nheads, headdim), as views of qkv (total, 3, nheads, headdim).

    The same as `qkv.unbind(1)`, whose gradient is made by copying three gradients into a fourth buffer. Here it is that
    buffer: `varlen_attention` writes dq, dk and dv side by side, and this hands them on as one. Where they come from
    elsewhere, they are copied. Raises ValueError for another shape.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected (total, 3, nheads, headdim), got shape {tuple(qkv.shape)}")
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and qkv.requires_grad):
        return qkv.unbind(1)
    return _Split.apply(qkv)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(qkv: Tensor) -> Gradients:
        return qkv.unbind(1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.like = inputs[0].shape, inputs[0].dtype, inputs[0].device

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> Tensor:
        (shape, dtype, device) = ctx.like
        whole = None if grads[0] is None or torch.is_grad_enabled() else grads[0]._base
        if whole is not None and whole.shape == shape and are_parts(whole, grads):
            return whole
        return torch.stack([torch.zeros(shape[:1] + shape[2:], dtype=dtype, device=device) if dx is None else dx
                            for dx in grads], 1)  # fmt: skip


def are_parts(whole: Tensor, parts: tuple) -> bool:
    """Whether parts are `whole.unbind(1)`, for whole (total, 3, nheads, headdim)."""
    strides, step = (whole.stride(0), *whole.stride()[2:]), whole.stride(1) * whole.element_size()
    first, shape = whole.data_ptr(), (whole.shape[0], *whole.shape[2:])
    return all(
        x is not None and x._base is whole and x.shape == shape and x.stride() == strides
        and x.data_ptr() == first + i * step for i, x in enumerate(parts)
    )  # fmt: skip
