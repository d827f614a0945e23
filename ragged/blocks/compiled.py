"""What `torch.compile` makes of a model, given to it whole or inside something larger."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..support import exporting
from . import compiled_pieces

# `torch.compiler.disable`, which imports the whole compiler, and so would everybody who imports this package
_left_alone = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable


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
    """The model with its pieces compiled: itself, where it is so already, or its double for one call. Whatever options
    `torch.compile` was given do not reach so far, which is said once."""
    if model._compiled is not None:
        return model
    model._look()
    pieces, foreign = model.__dict__.setdefault("_outside", {}), bool(model.survey.tried)
    if foreign not in pieces:
        warnings.warn("torch.compile: a RaggedViT compiles its own pieces, without the options given to torch.compile; "
                      "call model.compile() first, which takes options", RuntimeWarning, stacklevel=4)  # fmt: skip
        pieces[foreign] = compiled_pieces(foreign)
    double = object.__new__(type(model))
    double.__dict__.update(model.__dict__, _compiled={}, _run=pieces[foreign])
    return double
