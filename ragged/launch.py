"""How a compiled kernel is started, and what that costs. Every launch cache of the package is here.

`kernel[grid](...)`, Triton's own way, looks at every argument of every call: its type, whether an integer is 1 or a
multiple of 16, whether a pointer is aligned. From that it makes a key, looks the compiled kernel up, and starts it:
tens of microseconds of host time, at short sequences more than the GPU then computes. But a model calls the same
kernel with the same answers again and again. `start` below asks the questions once per key, which the caller
provides, and keeps the compiled kernel. What is left per call is a dictionary look-up and the driver's own launch.
`quick` goes one step further for attention: it recognises a whole kind of call and skips its checks.

Nothing here depends on lengths or batch: those travel in the grid and in ordinary arguments.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiles import Tiles, choose_tiles, grid_of

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is what the hardware has
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # device -> stream as an integer

try:  # the allocator's own entry, without the argument parsing of torch.empty: half the time
    _empty_cuda = torch._C._dynamo.guards._empty_strided_cuda
except AttributeError:
    _empty_cuda = None
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then every call takes the long way
    TensorGuards = None


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a parent package is missing, or somebody blocks the import
        return False


def usable(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device: CUDA, or the CPU when TRITON_INTERPRET=1."""
    return installed("triton") and (device.type == "cuda" or (device.type == "cpu" and INTERPRET))


def new_output(q: Tensor, total: int, heads: int, dim: int) -> Tensor:
    """An uninitialised contiguous tensor like q, whose shape (total, heads, dim) the caller has already read."""
    if _empty_cuda is not None and q.is_cuda:
        return _empty_cuda((total, heads, dim), (heads * dim, dim, 1), q.dtype)
    return q.new_empty((total, heads, dim))


def strides_of(**strides: tuple) -> dict:
    """Q=(token, head, dim), ... as the kernels' constants Q_TOKEN, Q_HEAD, Q_DIM, ..."""
    return {f"{x}_{part}": n for x, s in strides.items() for part, n in zip(("TOKEN", "HEAD", "DIM"), s, strict=True)}


def head_of(heads: int, dim: int) -> dict:
    """A tile's last dimension is a power of two, and at least the 16 that a tensor core takes."""
    return {"HEADS": heads, "D": dim, "BLOCK_D": max(16, 1 << (dim - 1).bit_length())}


# ---- one launch ----

_launchers: dict[tuple, Callable] = {}


def start(kernel: Any, key: tuple, grid: tuple[int, int], tensors: tuple, numbers: tuple, constants: dict,
          options: dict) -> Callable | None:  # fmt: skip
    """Launch `kernel` on the current stream of the tensors' device.

    key: whatever decides `constants` and `options` for the caller; together with the kernel, the device and the
    pointers' alignment it must determine the compiled kernel. tensors, numbers: the leading arguments in order; the
    kernel must not specialise on the numbers. The first call of a key goes through the JIT, which compiles or finds
    the kernel; later calls start it directly. Interpreter runs and unaligned pointers always take the JIT.
    Returns the kept launcher, (grid x, grid y, stream, *pointers, *numbers), or None where there is none.
    """
    if 0 in grid:
        return None
    if INTERPRET:
        kernel[grid](*tensors, *numbers, **constants)
        return None
    device = tensors[0].get_device()
    if device != current_device():
        with torch.cuda.device(device):
            return start(kernel, key, grid, tensors, numbers, constants, options)
    pointers = [t.data_ptr() for t in tensors]
    if functools.reduce(operator.or_, pointers) & 15:  # compiled kernels assume multiples of 16 bytes
        kernel[grid](*tensors, *numbers, **constants, **options)
        return None
    launch = _launchers.get((kernel, device, key))
    if launch is None:
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
        launch = _launchers[kernel, device, key] = direct(compiled, tuple(constants.values()))
    else:
        launch(*grid, current_stream(device), *pointers, *numbers)
    return launch


def direct(compiled: Any, constants: tuple) -> Callable:
    """A function (grid x, grid y, stream, *pointers, *numbers) that starts an already compiled kernel.

    `CompiledKernel.run` is what `kernel[grid]` calls in the end. Pointers go in as plain integers, so Triton does not
    ask the driver about each of them. The constants are compiled in, but keep their places in the argument list.
    Where the C function behind `run` is laid out as we know it (Triton 3.5 and 3.6), it is called without the wrapper
    around it.
    """
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if _triton_version() in ((3, 5), (3, 6)) and not scratch:
        call, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)

        def launch(x: int, y: int, stream: int, *arguments) -> None:
            call(x, y, 1, stream, function, *flags, packed, None, None, None, *arguments, *constants)
    else:

        def launch(x: int, y: int, stream: int, *arguments) -> None:
            run(x, y, 1, stream, function, packed, None, None, None, *arguments, *constants)

    return launch


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


# ---- attention: a kind of call that is known already ----


class Plan(NamedTuple):
    """A kind of call that went through every check: `same(q, k, v, cu_q[, cu_k])` says whether a later call is of that
    kind (dtypes, devices, strides, heads, head dimension, no gradient; not lengths or batch), tiles -> launcher."""

    same: Callable[..., bool]
    launchers: dict[Tiles, Callable]


# A model needs one or two. The guard takes every tensor once, so calls whose cu_k is cu_q have plans of their own.
_plans: dict[bool, list[Plan]] = {True: [], False: []}
MOST_PLANS = 16


def plan_of(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Plan | None:
    """The plan for calls of this kind, if there was one."""
    tensors = (q, k, v, cu_q) if cu_k is cu_q else (q, k, v, cu_q, cu_k)
    return next((plan for plan in _plans[cu_k is cu_q] if plan.same(*tensors)), None)


def remember(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, tiles: Tiles, launcher: Callable) -> None:
    """Note for `quick` how a call was launched. The comparison is the one torch.compile guards its graphs with: one
    call into C++ looks at all the tensors, in the time that Python needs to look at one."""
    if TensorGuards is None or q.requires_grad or k.requires_grad or v.requires_grad:
        return
    plan = plan_of(q, k, v, cu_q, cu_k)
    if plan is None:
        tensors = (q, k, v, cu_q) if cu_k is cu_q else (q, k, v, cu_q, cu_k)
        sizes = [[None, *x.shape[1:]] for x in tensors]
        strides = [list(x.stride()) for x in tensors]
        plan = Plan(TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check, {})
        if not plan.same(*tensors):  # q, k and v are not three tensors, say
            return
        plans = _plans[cu_k is cu_q]
        plans.insert(0, plan)
        del plans[MOST_PLANS:]
    plan.launchers[tiles] = launcher


def quick(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
          scale: float | None) -> Tensor | None:  # fmt: skip
    """`kernels.attention.attend` for a kind of call that went through all checks before, or None: then take the long
    way.

    Nothing is left out: what the long way checks is either compared by a plan or looked at here.
    """
    shared = cu_k is cu_q
    for plan in _plans[shared]:
        if plan.same(q, k, v, cu_q) if shared else plan.same(q, k, v, cu_q, cu_k):
            break
    else:
        return None
    if not (max_q.__class__ is int and max_q > 0 and max_k.__class__ is int and max_k > 0):
        return None
    total, heads, dim = q.shape
    total_k, images, device = k.shape[0], cu_q.shape[0] - 1, q.get_device()
    equal = total == images * max_q and total_k == images * max_k
    tiles = choose_tiles(max_q, max_k, dim, images * heads, equal, q.element_size())
    launcher = plan.launchers.get(tiles)
    if launcher is None or device != current_device() or total == 0 or images < 1:
        return None
    if total_k != v.shape[0] or not (shared or cu_k.shape[0] == images + 1):
        return None
    if scale is None:
        scale = dim**-0.5
    elif scale.__class__ is not float or not 0.0 < scale < math.inf:
        return None
    out = new_output(q, total, heads, dim)
    a, b, c, d, e, f = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), cu_q.data_ptr(), cu_k.data_ptr()
    if (a | b | c | d | e | f) & 15:  # compiled kernels assume multiples of 16 bytes
        return None
    stream = current_stream(device)
    grid = grid_of(tiles, max_q, heads, images)
    launcher(*grid, stream, a, b, c, d, d, e, f, scale * LOG2_E, total, max_q, max_k)
    return out


def forget() -> None:
    """Drop every kept launcher and plan, so that the next call is a first call (for tests and measurements)."""
    _launchers.clear()
    for plans in _plans.values():
        plans.clear()
