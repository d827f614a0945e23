"""A toy compiler and a toy driver for lesson 03: programs for the CPU, started as a GPU's driver starts kernels."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .. import launch

KINDS = {torch.float32: "c_float", torch.int32: "c_int32"}


class Facts(NamedTuple):
    """What a driver must be told beside the function."""

    num_warps: int = 1
    shared: int = 0


def compile_variant(dtype: torch.dtype, COLUMNS: int, ROW: int, COLUMN: int) -> SimpleNamespace:
    """A program that sums the rows of matrices of this type, width and strides, handed out as Triton hands out its own.

    dtype: float32 or int32.  COLUMNS: how many.  ROW, COLUMN: strides, in numbers. Returns `function` (pointer x,
    pointer out, rows), its `source`, `metadata` for its `driver`, and in `asm["ptx"]` the list of its parameters.
    """
    terms = " + ".join(f"x[i * {ROW} + {j * COLUMN}]" for j in range(COLUMNS))
    source = f"""def function(x, out, rows):
    x, out = cast(x, POINTER({KINDS[dtype]})), cast(out, POINTER({KINDS[dtype]}))
    for i in range(rows):
        out[i] = {terms}"""
    names = dict(vars(ctypes))
    exec(source, names)
    listed = {"ptx": ".entry function(.param .u64 x, .param .u64 out, .param .u32 rows)"}
    signature = SimpleNamespace(signature={"x": "*fp32", "out": "*fp32", "rows": "i32"})
    return SimpleNamespace(function=names["function"], metadata=Facts(), src=signature, asm=listed, source=source,
                           driver=driver)  # fmt: skip


def driver(function: Any, x: int, y: int, z: int, warps: int, shared: int, letters: str, arguments: tuple,
           stream: int) -> None:  # fmt: skip
    """cuLaunchKernel of the toy: one program, started at once.

    function: of `compile_variant`.  x, y, z: the grid.  warps, shared: from its metadata.  letters: one for each
    argument, "O" for a pointer, "i" for an integer.  arguments: addresses and numbers.  stream: not used.
    """
    if len(letters) != len(arguments):
        raise ValueError(f"letters: expected one for each of {len(arguments)} arguments, got {letters!r}")
    function(*arguments)


@contextlib.contextmanager
def instead_of_cuda() -> Iterator[None]:
    """While it lasts, the package's launcher asks nobody for device and stream, and starts kernels with `driver`. What
    it kept before is forgotten, and so is what it keeps meanwhile."""
    stand_ins = dict(current_device=lambda: -1, current_stream=lambda device: 0, cu_launch_kernel=driver)
    kept = {name: getattr(launch, name) for name in stand_ins}
    launch.forget()
    try:
        for name, value in stand_ins.items():
            setattr(launch, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(launch, name, value)
        launch.forget()
