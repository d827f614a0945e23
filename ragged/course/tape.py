"""A CUDA graph for CPU tensors: a tape that notes operations and repeats them, with the same rules and traps."""

from __future__ import annotations

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.nonzero}


class Tape(TorchDispatchMode):
    """`with Tape() as tape:` notes every operation with the memory that it reads and writes; `tape.replay()` repeats
    them in that memory.

    refuse_reads: RuntimeError for a read that the host would have to wait for, as during a capture; what is taped then
    may take other operations to the same result.
    """

    def __init__(self, refuse_reads: bool = False) -> None:
        super().__init__()
        self.steps: list[tuple] = []  # operation, its arguments, its result
        self._guard = _NoReading() if refuse_reads else contextlib.nullcontext()

    def __enter__(self):
        self._guard.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object):
        super().__exit__(*error)
        self._guard.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info for r in func._schema.returns) and not func._schema.is_mutable
        if not is_view:  # a view is another address, and needs no step
            self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """All operations once more, on what their memory holds now."""
        for func, args, kwargs, result in self.steps:
            new = func(*args, **kwargs)
            if not func._schema.is_mutable:  # into the same memory as when it was taped
                for old, fresh in zip(tree_leaves(result), tree_leaves(new)):
                    if isinstance(old, torch.Tensor):
                        old.copy_(fresh)


class _NoReading(TorchFunctionMode):
    """Refuses to read a number, which a GPU would have to compute first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise RuntimeError(f"{func.__name__}: the host would wait for a number and decide by it")
        return func(*args, **(kwargs or {}))
