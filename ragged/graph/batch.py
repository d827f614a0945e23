"""A batch of images of one size as graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from ..blocks.cuts import Pending
from .parts import HIDDEN, Chain, Recorded, Recorder, Rest, rest_sizes, to_the_end


class Captured(Recorded):
    """A model's forward pass for one batch size, as CUDA graphs. Call it with images; it returns logits.

    `capture` makes it: model, the buffer that images are copied into, and the front, whose result is the logits unless
    a bucket has to be chosen, by `rest`. Images are copied into the graphs' own buffer; the logits returned are a copy,
    safe to keep.
    """

    def __init__(self, model: nn.Module, images: Tensor, front: Chain | None = None):
        super().__init__(model)
        self.images, self.front = images, front

    def __call__(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            expected, got = f"a tensor {tuple(self.images.shape)}, as captured", type(images).__name__
            raise TypeError(f"images: expected {expected}, got a {got}; for a list of images give capture tokens=, or "
                            "call the model itself")  # fmt: skip
        if images.shape != self.images.shape or images.dtype != self.images.dtype:
            raise ValueError(
                f"images: captured for {tuple(self.images.shape)} {self.images.dtype}, got {tuple(images.shape)} "
                f"{images.dtype}; capture another batch size with model.capture({images.shape[0]})"
            )
        if images.device != self.images.device:
            raise ValueError(f"images: captured on {self.images.device}, got {images.device}")
        return self._in_turn(lambda: self._start(images))

    def _start(self, images: Tensor) -> Tensor:
        self.images.copy_(images, non_blocking=True)
        self.front.replay()
        return (self.front.result if self.rest is None else self.rest()).clone()


def capture_batch(
    model: nn.Module, images: Tensor, warmup: int, between: tuple[int, int] | None, wait: bool
) -> Captured:
    """Record `model` for batches like images (batch, channels, height, width); warmup, between, wait: as in `capture`.
    """
    recorder, captured = Recorder(model), Captured(model, images)
    captured._rows = images.shape[0] * (model.vit.patch_embed.num_patches + model.prefix)
    hides = not captured.padded and captured._rows * model.vit.embed_dim**2 <= HIDDEN

    def front(wait: bool, after_block: Callable[[], None]) -> Tensor | Pending:
        result = model.begin(images, after_block=after_block)
        if wait and not isinstance(result, Tensor):
            return result
        captured._cuts = []
        return to_the_end(result, None, captured._cuts, after_block)

    def behind(result: Tensor | Pending) -> Callable[[], Pending] | None:
        return result.ahead if hides and isinstance(result, Pending) else None

    for _ in range(warmup):
        recorder.try_out(functools.partial(front, False))
    captured.front = recorder.record(functools.partial(front, wait), behind)
    pending = captured.front.result
    if isinstance(pending, Pending):
        captured.front.replay()
        captured.front.replay_last()
        sizes = rest_sizes(pending, captured.padded, between)
        captured.rest = Rest(recorder, pending, sizes, captured.padded, captured.front)
    return captured
