"""How a compiled kernel is started, and what that costs. Every launch cache of the package is here.

`kernel[grid](...)`, Triton's own way, looks at every argument of every call: its type, whether an integer is 1 or a
multiple of 16, whether a pointer is aligned. From that it makes a key, looks the compiled kernel up, and starts it:
tens of microseconds of host time, at short sequences more than the GPU then computes. But a model calls the same
kernel with the same answers again and again. `start` below asks the questions once per key, which the caller
provides, and keeps the compiled kernel. What is left per call is a dictionary look-up and the driver's own launch:
function, grid, threads, shared memory, stream and arguments, which stay the same from one version of Triton to the
next.
`quick` goes one step further for attention: it recognises a whole kind of call and skips its checks.

Nothing here depends on lengths or batch: those travel in the grid and in ordinary arguments.
"""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiles import (
    GLUON_HEADDIMS,
    GLUON_PROVEN,
    Tiles,
    choose_tiles,
    grid_of,
    pipe_tiles,
    prefers_gluon,
    takes_gluon,
)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is what the hardware has
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # device -> stream as an integer

try:  # cuLaunchKernel, as torch.compile calls it: packs the arguments on C's stack, so threads share nothing
    cu_launch_kernel = torch._C._StaticCudaLauncher._launch_kernel
except AttributeError:  # a PyTorch without CUDA, or of another time
    cu_launch_kernel = None
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


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a CUDA device; 1 of any other (-1)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


@functools.cache
def no_gluon(device: torch.device, dtype: torch.dtype, headdim: int) -> str | None:
    """Why the kernel in Gluon cannot run where those in Triton do, or None; headdim: numbers per head."""
    if INTERPRET:
        return "Gluon has no interpreter: start without TRITON_INTERPRET=1"
    if not installed("triton.experimental.gluon.language.nvidia.hopper"):
        return "this Triton has no Gluon for Hopper"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability != (9, 0):
        return f"compute capability {'.'.join(map(str, capability))} is not 9.0: written for Hopper"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {dtype} is not float16 or bfloat16"
    able = " or ".join(map(str, GLUON_HEADDIMS))
    return None if headdim in GLUON_HEADDIMS else f"head dimension {headdim} is not {able}: the tiles would not fit"


@functools.cache
def auto_gluon(device: torch.device, dtype: torch.dtype, headdim: int) -> bool:
    """Whether "auto" may start the kernel in Gluon on a CUDA device: it runs there, and has been proven there."""
    return no_gluon(device, dtype, headdim) is None and torch.cuda.get_device_name(device) in GLUON_PROVEN


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
HIGHEST_INT = 2**31 - 1  # of the integers that our kernels take


def start(kernel: Any, key: tuple, grid: tuple[int, int], tensors: tuple, numbers: tuple, constants: dict,
          options: dict) -> Callable | None:  # fmt: skip
    """Launch `kernel` on the current stream of the tensors' device.

    key: whatever decides `constants` and `options` for the caller; together with the kernel, the device and the
    pointers' alignment it must determine the compiled kernel. tensors, numbers: the leading arguments in order; the
    kernel must not specialise on the numbers. The first call of a key goes through the JIT, which compiles or finds
    the kernel; later calls start it directly. Interpreter runs, unaligned pointers and integers of more than 32 bits
    always take the JIT. Returns the kept launcher, (grid x, grid y, stream, *pointers, *numbers), or None where there
    is none.
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
    pointers, bits = [t.data_ptr() for t in tensors], 0
    for pointer in pointers:
        bits |= pointer
    if bits & 15 or max(numbers, default=0) > HIGHEST_INT:  # compiled kernels assume multiples of 16 bytes, and int32
        kernel[grid](*tensors, *numbers, **constants, **options)
        return None
    place = (id(kernel), device, key)  # its hash is that of its source; the launcher keeps it alive
    launch = _launchers.get(place)
    if launch is None:
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
        launch = _launchers[place] = direct(compiled, tuple(constants.values()), kernel)
    else:
        launch(*grid, current_stream(device), *pointers, *numbers)
    return launch


def direct(compiled: Any, constants: tuple, *keep: Any) -> Callable:
    """A function (grid x, grid y, stream, *pointers, *numbers) that starts an already compiled kernel.

    compiled: what `kernel[grid](...)` returned.  constants: those it was compiled with, in order.  keep: what must live
    as long as the function does. A kernel whose parameters are not as expected is started by Triton's own `run`, with
    one warning.
    """
    try:
        kinds, unused = parameters(compiled)
    except NotImplementedError as reason:
        return _wrapped(compiled, constants, str(reason))
    call, function = cu_launch_kernel, compiled.function
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared

    def launch(x: int, y: int, stream: int, *arguments) -> None:
        call(function, x, y, 1, warps, shared, kinds, arguments + unused, stream)

    launch.keep = (compiled, *keep)  # a compiled kernel that nobody holds is unloaded
    launch.driver = (function, warps, shared, kinds)  # what `kernels.front` starts it with
    return launch


# Triton's name of a type -> how `cu_launch_kernel` calls it, and its bits
KINDS = {"*": ("O", "64"), "i32": ("i", "32"), "i64": ("l", "64"), "fp32": ("f", "32")}


def parameters(compiled: Any) -> tuple[str, tuple]:
    """How a compiled kernel takes its arguments: a letter for each parameter, as `cu_launch_kernel` reads them, and the
    values of those at the end that are no arguments of ours.

    compiled: a kernel of Triton. What Triton says about it (`src.signature`) is compared with what the assembler was
    told (the `.param` lines of its PTX). Behind the arguments stand pointers to scratch memory, whether there is any or
    not. Raises NotImplementedError, saying why, where that is not so or a bare cuLaunchKernel would not do.
    """
    if cu_launch_kernel is None:
        raise NotImplementedError(f"PyTorch {torch.__version__} has no _StaticCudaLauncher")
    try:
        facts = {name: getattr(compiled.metadata, name) for name in compiled.metadata._fields}
        types = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
        entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", compiled.asm["ptx"])[1]
    except (AttributeError, KeyError, TypeError) as error:
        raise NotImplementedError(f"a compiled kernel lacks {error}") from error
    special = ("launch_cooperative_grid", "launch_pdl", "tensordesc_meta")
    asked = [name for name in special if facts.get(name)]
    asked += ["num_ctas"] if facts.get("num_ctas", 1) != 1 else []
    scratch = {name: size for name, size in facts.items() if name.endswith("scratch_size")}
    asked += [name for name, size in scratch.items() if size]
    if asked:
        raise NotImplementedError(f"a compiled kernel asks for {', '.join(asked)}")
    kinds = [KINDS.get(kind[:1] if kind[:1] == "*" else kind) for kind in types] + [KINDS["*"]] * len(scratch)
    found = re.findall(r"\.param\s+\.[a-z]+(\d+)\s", entry)
    if None in kinds or [bits for _, bits in kinds] != found:
        raise NotImplementedError(f"a compiled kernel has parameters of {found} bits for {types} and {[*scratch]}")
    return "".join(letter for letter, _ in kinds), (0,) * len(scratch)


fallbacks: list[str] = []  # why kernels were started through Triton's wrapper, each reason once


def _wrapped(compiled: Any, constants: tuple, reason: str) -> Callable:
    """`direct` by Triton's own `run`, which is what `kernel[grid]` calls in the end: right with any version, and
    dearer. The constants are compiled in, but keep their places in its argument list."""
    if reason not in fallbacks:
        fallbacks.append(reason)
        warnings.warn(f"ragged starts its kernels through Triton's wrapper, which costs microseconds a call: {reason}",
                      RuntimeWarning, stacklevel=2)  # fmt: skip
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def launch(x: int, y: int, stream: int, *arguments) -> None:
        run(x, y, 1, stream, function, packed, None, None, None, *arguments, *constants)

    launch.keep = compiled
    return launch


# ---- attention: a kind of call that is known already ----


class Plan(NamedTuple):
    """A kind of call that went through every check: `same(q, k, v, cu_q[, cu_k])` says whether a later call is of that
    kind (dtypes, devices, strides, heads, head dimension, no gradient; not lengths or batch).

    device, dtype, heads, dim: of that kind.  strides: of its output.  scale: the default one, times LOG2_E.  gluon:
    whether "auto" may start the kernel in Gluon.  launchers: tiles -> launcher.  ways: (longest query, longest key,
    images, whether they can be equal, backend) -> (launcher, grid x, grid y), looked up among the launchers once.
    number: under which `front` keeps it.
    """

    same: Callable[..., bool]
    device: int
    dtype: torch.dtype
    heads: int
    dim: int
    strides: tuple[int, int, int]
    scale: float
    gluon: bool
    launchers: dict[Tiles, Callable]
    ways: dict[tuple, tuple[Callable, int, int]]
    number: int | None = None

    def way(self, max_q: int, max_k: int, images: int, equal: bool, backend: str) -> tuple[Callable, int, int] | None:
        """What `ways` holds, or will, or None: then these lengths have not been through the checks."""
        if not (0 < max_q <= HIGHEST_INT and 0 < max_k <= HIGHEST_INT and images > 0):
            return None
        kind = (max_q, max_k, self.dim, images * self.heads, equal, self.dtype.itemsize)
        gluon = backend == "gluon" and takes_gluon(*kind)
        if gluon or (backend == "auto" and prefers_gluon(*kind) and self.gluon):
            tiles = pipe_tiles(max_q, self.dim, images * self.heads, processors(self.device))
        elif backend == "gluon":
            return None  # which the long way refuses
        else:
            tiles = choose_tiles(*kind)
        if (launcher := self.launchers.get(tiles)) is None:
            return None
        if len(self.ways) >= MOST_WAYS:
            self.ways.clear()
        grid = grid_of(tiles, max_q, self.heads, images, processors(self.device))
        found = self.ways[max_q, max_k, images, equal, backend] = (launcher, *grid)
        if front is not None:
            front.way(self.number, (max_q, max_k, images, equal, backend), *found)
        return found


front: Any = None  # `kernels.front`, once it is built: `quick` in one call into C++
# A model needs one or two. The guard takes every tensor once, so calls whose cu_k is cu_q have plans of their own.
_plans: dict[bool, list[Plan]] = {True: [], False: []}
MOST_PLANS, MOST_WAYS = 16, 4096


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
        same = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        if not same(*tensors):  # q, k and v are not three tensors, say
            return
        heads, dim = q.shape[1:]
        gluon, scale = auto_gluon(q.device, q.dtype, dim), dim**-0.5 * LOG2_E
        number = front.plan(tensors, cu_k is cu_q, scale) if front is not None else None
        plan = Plan(same, q.get_device(), q.dtype, heads, dim, (heads * dim, dim, 1), scale, gluon, {}, {}, number)
        plans = _plans[cu_k is cu_q]
        plans.insert(0, plan)
        del plans[MOST_PLANS:]
    plan.launchers[tiles] = launcher


def quick(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
          scale: float | None, backend: str = "triton") -> Tensor | None:  # fmt: skip
    """`varlen_attention` by "triton", "gluon" or "auto", for a kind of call that went through all checks before, or
    None: then take the long way.

    Nothing is left out: what the long way checks is either compared by a plan or looked at here.
    """
    if front is not None:
        out = front.attend(q, k, v, cu_q, cu_k, max_q, max_k, scale, backend)
        if out is not None:
            return out
    shared = cu_k is cu_q
    for plan in _plans[shared]:
        same, device, dtype, heads, dim, strides, factor, _, _, ways, _ = plan
        if same(q, k, v, cu_q) if shared else same(q, k, v, cu_q, cu_k):
            break
    else:
        return None
    if max_q.__class__ is not int or max_k.__class__ is not int or device != current_device():
        return None
    total, total_k, images = q.shape[0], k.shape[0], cu_q.shape[0] - 1
    equal = total == images * max_q and total_k == images * max_k
    found = ways.get((max_q, max_k, images, equal, backend)) or plan.way(max_q, max_k, images, equal, backend)
    if found is None or total_k != v.shape[0] or not (shared or cu_k.shape[0] == images + 1):
        return None
    if scale is not None:
        if scale.__class__ is not float or not 0.0 < scale < math.inf:
            return None
        factor = scale * LOG2_E
    if _empty_cuda is not None and device >= 0:
        out = _empty_cuda((total, heads, dim), strides, dtype)
    else:
        out = q.new_empty((total, heads, dim))
    a, b, c, d, e = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), cu_q.data_ptr()
    f = e if shared else cu_k.data_ptr()
    if (a | b | c | d | e | f) & 15 or not 0 < total <= HIGHEST_INT:  # as in `start`
        return None
    launcher, x, y = found
    launcher(x, y, current_stream(device), a, b, c, d, d, e, f, factor, total, max_q, max_k)
    return out


def forget() -> None:
    """Drop every kept launcher and plan, so that the next call is a first call (for tests and measurements)."""
    _launchers.clear()
    fallbacks.clear()
    for plans in _plans.values():
        plans.clear()
    if front is not None:
        front.forget()
