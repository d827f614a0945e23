"""What a kernel touches: it runs in Triton's interpreter, and every address that it loads from or stores to is kept.

That works on CPU tensors, whatever Triton was imported for: on a machine with a GPU kernels are compiled as before and
after. Addresses outside every tensor are kept too, but not followed: a wrong answer costs a sentence, not the session.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import launch

GUARD = 4096  # numbers before and behind every tensor that are nobody's: what lands there is told by its tensor


class NoTriton(RuntimeError):
    """Triton is not installed, so nothing can be interpreted."""


@dataclass(frozen=True, eq=False)
class Touch:
    """One load or store of one program.

    program: its place in the grid.  kind: "load" or "store".  name: of the tensor, "" where the address is in none.
    places: numbers counted from the tensor's beginning, in the order of the tile; below zero or past the end where the
    address is a little outside.  shape: of the tile.  taken: which of them the mask let through.
    """

    program: tuple[int, ...]
    kind: str
    name: str
    places: np.ndarray
    shape: tuple[int, ...]
    taken: np.ndarray

    @property
    def touched(self) -> np.ndarray:
        """The places that were really read or written."""
        return self.places[self.taken]


def trace(kernel: Callable, grid: tuple[int, ...], *arguments: object) -> list[Touch]:
    """Run a kernel over a grid in the interpreter; what it touched, in order.

    kernel: a function of Triton, with or without `@triton.jit`.  grid: one to three numbers of programs.  arguments: in
    the kernel's order; tensors are contiguous, on the CPU, and are written to. NoTriton without Triton; what the
    kernel's own code raises is raised.
    """
    raw = plain(kernel)
    names = [*inspect.signature(raw).parameters]
    room = {name: _Room(x) for name, x in zip(names, arguments) if isinstance(x, Tensor)}
    inner = [room[name].inner if name in room else x for name, x in zip(names, arguments)]
    with _interpreting(room) as (interpreted, touches), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy would comment on every NaN
        try:
            interpreted(raw)[grid](*inner)
        except Exception as error:
            raise _own(error) from None
    for name, x in zip(names, arguments):
        if name in room:
            x.copy_(room[name].inner)
    return touches


def plain(function: Callable) -> Callable:
    """The Python function behind one that `@triton.jit` has wrapped."""
    return getattr(function, "fn", function)


def device(function: Callable) -> Callable:
    """A function of Triton to be called from a kernel that `trace` runs."""
    return _interpreter().InterpretedFunction(plain(function))


# ---- parts ----


class _Room:
    """A tensor's numbers with nobody's land on both sides: NaN, or the largest whole number."""

    def __init__(self, x: Tensor):
        nothing = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
        self.size, self.item = x.numel(), x.element_size()
        self.all = torch.full((self.size + 2 * GUARD,), nothing, dtype=x.dtype)
        self.inner = self.all[GUARD : GUARD + self.size].view(x.shape)
        self.inner.copy_(x)
        self.first = self.inner.data_ptr() if self.size else self.all.data_ptr() + GUARD * self.item

    def places(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places in the tensor, whether they are there or next to it)."""
        places = (addresses.astype(np.int64) - self.first) // self.item
        return places, (places >= -GUARD) & (places < self.size + GUARD)


def _interpreter() -> Any:
    if not launch.installed("triton"):
        raise NoTriton("Triton is not installed here (it exists for Linux only)")
    from triton.runtime import interpreter

    return interpreter


def _own(error: BaseException) -> BaseException:
    """What the kernel's own code raised, out of the wrappings of the interpreter."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _interpreting(room: dict[str, _Room]) -> Iterator[tuple[type, list[Touch]]]:
    """The interpreter's class of functions, and a list that fills; afterwards Triton is as it was."""
    interpreter = _interpreter()
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    from ..kernels import attention

    builder, touches = interpreter.interpreter_builder, []
    load, store = builder.create_masked_load, builder.create_masked_store

    def kept(kind, addresses, mask):
        """Keep a load or store; which of its addresses may be followed."""
        at, taken = np.asarray(addresses.data), np.broadcast_to(mask.data, np.shape(addresses.data)).astype(bool)
        found = {name: space.places(at) for name, space in room.items()}
        inside = {name: int((near & taken).sum()) for name, (_, near) in found.items()}
        name = max(inside, key=inside.get, default="")
        if not inside.get(name):  # in no tensor, or nothing is taken
            name = ""
        places, near = found.get(name, (at.astype(np.int64), np.zeros_like(taken)))
        touches.append(Touch(tuple(builder.grid_idx), kind, name, places.ravel(), at.shape, taken.ravel()))
        return interpreter.TensorHandle(taken & near, tl.int1)

    def masked_load(ptrs, mask, other, *rest):
        return load(ptrs, kept("load", ptrs, mask), other, *rest)

    def masked_store(ptrs, value, mask, *rest):
        return store(ptrs, value, kept("store", ptrs, mask), *rest)

    called, bound = JITFunction.__call__, attention.INTERPRETED
    before = [(thing, dict(vars(thing))) for thing in (tl, tl.core, tl.math, tl.tensor, tl.dtype)]
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    JITFunction.__call__ = lambda self, *args, **kwargs: device(self)(*args, **kwargs)
    attention.INTERPRETED = tl.constexpr(True)  # `number`, which kernels of the lessons use for the bounds of loops
    try:
        yield interpreter.InterpretedFunction, touches
    finally:
        del builder.create_masked_load, builder.create_masked_store
        JITFunction.__call__, attention.INTERPRETED = called, bound
        for thing, members in before:  # Triton up to 3.6 leaves its language interpreted behind
            for name in {*vars(thing)} - {*members}:
                delattr(thing, name)
            for name, value in members.items():
                if vars(thing).get(name) is not value:
                    setattr(thing, name, value)
