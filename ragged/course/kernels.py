"""Triton as a lesson finds it: compiled where a GPU takes it, interpreted on a CPU, and only to be read elsewhere."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import launch
from ..backends import BACKENDS


class Language(NamedTuple):
    """What kernels of a lesson are written with, and where they run.

    triton, tl: the modules.  number: a computed number, fit to be the bound of a loop.  device, dtype: of the lesson's
    tensors.  why_not: why no kernel runs here, or None.  place: where they run, in words.
    """

    triton: Any
    tl: Any
    number: Any
    device: torch.device
    dtype: torch.dtype
    why_not: str | None
    place: str


def language(interpret: bool = True) -> Language:
    """Import Triton for this machine.

    interpret: without a GPU that Triton compiles for, kernels of this session run in its interpreter. That is decided
    once, when Triton is imported; NumPy, with which it computes, then no longer comments on infinities.
    """
    ready = torch.cuda.is_available() and BACKENDS["triton"].why_not("cuda", torch.float16, 64) is None
    there = launch.installed("triton")
    if interpret and there and not ready and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported
        launch.INTERPRET = True  # the package asked when it was imported
        np.seterr(all="ignore")
    device = torch.device("cuda" if ready else "cpu")
    dtype = torch.float16 if ready else torch.float32
    why_not = BACKENDS["triton"].why_not(device, dtype, 64)
    place = "compiled, on the GPU" if ready else "in Triton's interpreter, on the CPU" if why_not is None else "nowhere"
    if not there:
        silent = SimpleNamespace(jit=lambda function: function), SimpleNamespace(constexpr=int)
        return Language(*silent, int, device, dtype, why_not, place)
    import triton
    import triton.language as tl

    from ..kernels.attention import number

    return Language(triton, tl, number, device, dtype, why_not, place)
