"""How a compiled kernel is started, and what that costs.

`kernel[grid](...)`, Triton's own way, looks at every argument of every call: its type, whether an integer is 1 or a
multiple of 16, whether a pointer is aligned. From that it makes a key, looks the compiled kernel up, and starts it:
near 20 µs of host time, more than the GPU then computes. But a model calls the same kernel with the same answers
again and again.
`start` below asks the questions once per key, which the caller provides, and keeps the compiled kernel. What is left
per call is a dictionary look-up and the driver's own launch.

Nothing here depends on lengths or batch: those travel in the grid and in ordinary arguments.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


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


_started: dict[tuple, Callable] = {}


def start(kernel, key: tuple, grid: tuple[int, int, int], tensors: tuple, numbers: tuple,
          constants: dict, options: dict) -> None:  # fmt: skip
    """Launch `kernel` on the current stream of the tensors' device.

    key: whatever decides `constants` and `options` for the caller; with the kernel, the device and the pointers'
    alignment it must determine the compiled kernel. tensors, numbers: the leading arguments in order (numbers are
    floats or integers that the kernel does not specialise on). The first call of a key goes through the JIT, which
    compiles or finds the kernel; later calls start it directly. Interpreter runs and unaligned pointers always take
    the JIT.
    """
    if 0 in grid:
        return
    if INTERPRET:
        kernel[grid](*tensors, *numbers, **constants)
        return
    device = tensors[0].device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return start(kernel, key, grid, tensors, numbers, constants, options)
    pointers = [t.data_ptr() for t in tensors]
    aligned = not functools.reduce(int.__or__, pointers) & 15
    launch = _started.get((kernel, device, aligned, key))
    if launch is None:
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
        if aligned:
            _started[kernel, device, aligned, key] = direct(compiled, tuple(constants.values()))
        return
    launch(grid, torch._C._cuda_getCurrentRawStream(device), *pointers, *numbers)


def direct(compiled, constants: tuple) -> Callable:
    """A function (grid, stream, *pointers and numbers) that starts an already compiled kernel.

    `CompiledKernel.run` is what `kernel[grid]` calls in the end. Pointers go in as plain integers, so Triton does not
    ask the driver about each of them. The constants are compiled in, but keep their places in the argument list.
    """
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def launch(grid: tuple[int, int, int], stream: int, *arguments) -> None:
        run(*grid, stream, function, packed, None, None, None, *arguments, *constants)

    return launch


def forget() -> None:
    """Drop all kept launchers (for tests and for measuring a first call)."""
    _started.clear()
