"""The whole forward pass as CUDA graphs: recorded once, then started with no Python in between.

A graph replays fixed launches on fixed memory. With a fixed number of tokens that is all there is to it. An adaptive
pruner decides on the GPU how many tokens stay, so the pass is recorded in two parts. The front runs up to that
decision. The host then reads two numbers, total and longest (the one wait of the call), and starts the rest whose
capacity is the next above. For packed tokens that is a capacity of total rows: the surplus rows are computed and never
looked at, because `cu_seqlens` does not reach them. A padded batch has a capacity of rows per image instead.

A pruner that decides several times is read once all the same: no later cut leaves more rows than the first did, so what
had room then has room to the end.

While the host reads and starts the rest, the GPU would be idle. So it goes on with the block of the cut, with room for
all rows, where that is no more work than the wait is long. With few rows nothing is long enough, and a wait costs more
than pruning can save, because a GPU takes as long for 100 rows as for 200. Then nobody asks: one capacity, that of all
rows.

Images of many sizes are recorded for capacities of tokens. The host knows their sizes, so it knows without a wait which
capacity a call needs, and with fixed shares also how many rows every cut leaves. What it sends is one small table.
"""

from __future__ import annotations

import torch
from torch import nn

from ..backends import BACKENDS
from ..checks import weight_of
from .batch import Captured, capture_batch
from .lists import CapturedList, CapturedTokens, capture_list
from .parts import FEW_ROWS, SMALLEST, STEP, WIDTH_STEP, aside, bucket_sizes

__all__ = ["FEW_ROWS", "SMALLEST", "STEP", "WIDTH_STEP", "Captured", "CapturedList", "CapturedTokens", "aside",
           "bucket_sizes", "capture"]  # fmt: skip


def capture(
    model: nn.Module, batch_size: int, *, warmup: int = 2, between: tuple[int, int] | None = None,
    wait: bool | None = None, tokens: int | tuple[int, int] | None = None,
    longest: int | tuple[int, int] | None = None, embedded: bool = False,
) -> Captured | CapturedList:  # fmt: skip
    """Record `model` (a `RaggedViT` on a GPU) for batches of `batch_size` images, or for lists of images. For inference
    only: what a recording returns has no gradients, and a model in training mode is refused.

    An adaptive pruner gets a recording per bucket, all in one memory pool: of total tokens (`bucket_sizes`), or for
    padded backends of rows per image, 8 apart. warmup: passes before recording, to compile and fill caches.  between:
    the least and most rows that calls will need after the first adaptive cut, where that is known: other buckets are
    not recorded, and a call that needs a larger one raises ValueError.  wait: what an adaptive pruner gets; True:
    buckets; False: never a wait, and as many rows are computed as if nothing were dropped; None: False up to `FEW_ROWS`
    rows, else True.  tokens, longest, embedded: for lists of at most `batch_size` images of any sizes, see
    `lists.capture_list`.
    Raises ValueError or TypeError naming the argument, RuntimeError in training mode, and NotImplementedError for what
    cannot be recorded, with the reason.
    """
    if model.training or model.survey.training():
        raise RuntimeError("capture: a recording is for inference only, and the model is in training mode: call "
                           "model.eval() first, and train with the model itself")  # fmt: skip
    weight = weight_of(model.vit)
    if not weight.is_cuda:
        raise ValueError(f"capture: CUDA graphs need a model on a GPU, this one is on {weight.device}")
    if type(batch_size) is not int or batch_size < 1:
        hint = "; for a list of images give the most images and tokens=" if isinstance(batch_size, list | tuple) else ""
        raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}{hint}")
    if wait is not None and not isinstance(wait, bool):
        raise TypeError(f"wait: expected True, False or None, got {wait!r}")
    model.prepare()
    if model.survey.hooked:
        raise NotImplementedError("capture: hooks hang on the model, and a CUDA graph calls none; remove them")
    if not BACKENDS[model.picked].recordable:
        raise NotImplementedError(f"capture: backend {model.picked!r} reads from the GPU in the middle of the pass")
    with torch.no_grad(), torch.cuda.device(weight.device):
        if tokens is not None:
            return capture_list(model, batch_size, tokens, longest, warmup, between, wait, embedded)
        if longest is not None or embedded:
            raise ValueError("longest, embedded: are for lists of images, which tokens= asks for")
        shape = (batch_size, weight.shape[1], *model.vit.patch_embed.img_size)
        if wait is None:
            wait = batch_size * (model.vit.patch_embed.num_patches + model.prefix) > FEW_ROWS
        return capture_batch(model, torch.randn(shape, device=weight.device, dtype=weight.dtype), warmup, between, wait)
