"""How a compiled kernel is started, and what that costs.

`kernel[grid](...)`, Triton's own way, looks at every argument of every call: its type, whether an integer is 1 or a
multiple of 16, whether a pointer is aligned. From that it makes a key, looks the compiled kernel up, and starts it:
tens of microseconds of host time, at short sequences more than the GPU then computes. But a model calls the same
kernel with the same answers again and again. `start` below asks the questions once per key, which the caller
provides, and keeps the compiled kernel. What is left per call is a dictionary look-up and the driver's own launch.

Nothing here depends on lengths or batch: those travel in the grid and in ordinary arguments.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CHECK_VALUES = os.environ.get("RAGGED_CHECK") == "1"  # look at numbers on CUDA too, at the price of a wait
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # device -> stream as an integer


def may_look(x: torch.Tensor) -> bool:
    """Whether the numbers in x are there to be checked: on CUDA that is a wait, so only with RAGGED_CHECK=1."""
    return CHECK_VALUES or not (x.is_cuda or x.is_meta)


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


def forget() -> None:
    """Drop all kept launchers (for tests and for measuring a first call)."""
    _launchers.clear()
