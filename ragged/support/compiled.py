"""What `torch.compile` makes of a model, given to it whole or inside something larger."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# `torch.compiler.disable`, which imports the whole compiler, and so would everybody who imports this package
_left_alone = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable


def exporting() -> bool:
    """Whether `torch.export` traces. Under `torch.compile` PyTorch 2.11's own function answers yes, too; the flag that
    it returns elsewhere does not."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def pieces_under_a_compiler(method: Callable) -> Callable:
    """A method of `RaggedViT` that runs a pass, as it shall run inside of what `torch.compile` traces: as it is, with
    the pieces that `RaggedViT.compile` makes. A pass looks at hooks, at streams and at the kernels it has started
    before, which is nothing to trace. `torch.export` traces it all the same."""

    @functools.wraps(method)
    def called(self: Any, *given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() and not exporting():
            return _apart(method, self, given, named)
        return method(self, *given, **named)

    return called


@_left_alone
def _apart(method: Callable, model: Any, given: tuple, named: dict) -> Any:
    return method(_in_pieces(model), *given, **named)


def _in_pieces(model: Any) -> Any:
    """The model with its pieces compiled: itself, where it is so already, or a twin that shares everything else."""
    if model._compiled is not None:
        return model
    model._look()
    twin = model.__dict__.get("_twin")
    same = twin is not None and twin.vit is model.vit and twin.pruner is model.pruner and twin.backend == model.backend
    if not same:
        twin = model.__dict__["_twin"] = model.with_pruner(model.pruner).compile()  # not as a module within the model
    twin.training = model.training
    return twin
