"""The whole forward pass as CUDA graphs: recorded once, then started with one call and no Python in between.

A graph replays fixed launches on fixed memory. With a fixed number of tokens that is all there is to it. An adaptive
pruner decides on the GPU how many tokens stay, so the pass is recorded in two parts. The front runs up to that
decision. The host then reads two numbers, total and longest (the one wait of the call), and starts the back whose
capacity is the next above. For packed tokens that is a capacity of total rows: the surplus rows are computed and never
looked at, because `cu_seqlens` does not reach them. A padded batch has a capacity of rows per image instead.
"""

from __future__ import annotations

import threading
from bisect import bisect_left

import torch
from torch import Tensor, nn

from .backends import BACKENDS

STEP = 1.025  # a bucket is 2.5 % larger than the one below: about half of that is surplus on average
SMALLEST = 0.1  # share of the unpruned rows in the smallest bucket
WIDTH_STEP = 8  # rows per image between two buckets of a padded batch


def bucket_sizes(rows: int) -> list[int]:
    """Capacities in rows, rising geometrically up to `rows`, in multiples of 8 (small batches) or 64."""
    grain = 64 if rows >= 64 * 64 else 8
    sizes, size = {rows}, float(rows)
    while size > rows * SMALLEST:
        size /= STEP
        sizes.add(min(rows, -(-int(size) // grain) * grain))
    return sorted(sizes)


class Captured:
    """A model's forward pass for one batch size, as CUDA graphs. Call it with images; it returns logits.

    `capture` makes it: model, the buffer that images are copied into, the front, and its output if there is no back.
    Images are copied into the graph's own buffer; the logits returned are a copy, safe to keep. Calls from several
    streams and threads are put one behind the other. `waits` is the number of device-to-host waits per call: 0 when the
    pruner keeps fixed counts, 1 when it is adaptive. `capacity_waste`: surplus rows per real row in the last call,
    padding included.
    """

    def __init__(self, model: nn.Module, images: Tensor, front: torch.cuda.CUDAGraph, output: Tensor | None):
        self.model = model  # a graph remembers addresses only: weights and predictors must live as long as it does
        self.images, self.front, self.output = images, front, output
        self.waits = 0 if output is not None else 1
        self.buckets: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.sizes: list[int] = []
        self.need: Tensor | None = None  # int64 (2,) on the device, written by the front: total and longest
        self.padded = False  # whether sizes are rows per image, for the longest, or rows in all
        self.capacity_waste = 0.0
        self._host_need = torch.empty(2, dtype=torch.int64, pin_memory=True)
        self._lock, self._done, self._read = threading.Lock(), torch.cuda.Event(), torch.cuda.Event()

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape != self.images.shape or images.dtype != self.images.dtype:
            raise ValueError(
                f"images: captured for {tuple(self.images.shape)} {self.images.dtype}, got {tuple(images.shape)} "
                f"{images.dtype}; capture another batch size with model.capture({images.shape[0]})"
            )
        if images.device != self.images.device:
            raise ValueError(f"images: captured on {self.images.device}, got {images.device}")
        with self._lock, torch.no_grad(), torch.cuda.device(self.images.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # an earlier call on another stream still owns the buffers until then
            try:
                self.images.copy_(images, non_blocking=True)
                self.front.replay()
                output = self.output if self.output is not None else self._back(stream)
                return output.clone()
            finally:  # even where memory for the copy is wanting, the replay is under way
                self._done.record(stream)

    def _back(self, stream: torch.cuda.Stream) -> Tensor:
        self._host_need.copy_(self.need, non_blocking=True)
        self._read.record(stream)
        self._read.synchronize()  # the one wait
        total, longest = self._host_need.tolist()
        size = self._bucket(longest if self.padded else total)
        self.capacity_waste = size * (self.images.shape[0] if self.padded else 1) / total - 1.0
        graph, output = self.buckets[size]
        graph.replay()
        return output

    def _bucket(self, rows: int) -> int:
        place = bisect_left(self.sizes, rows)
        if place == len(self.sizes):
            raise ValueError(f"images: {rows} rows stay, and only up to {self.sizes[-1]} were recorded: widen between=")
        return self.sizes[place]


def capture(model: nn.Module, batch_size: int, *, warmup: int = 2, between: tuple[int, int] | None = None) -> Captured:
    """Record `model` (a `RaggedViT` on a GPU) for batches of `batch_size` images.

    An adaptive pruner gets one graph per bucket, all in one memory pool: of total tokens (`bucket_sizes`), or for
    padded backends of rows per image, 8 apart. warmup: passes before recording, to compile and fill caches.  between:
    the least and most rows that calls will need, where that is known: other buckets are not recorded, and a call that
    needs a larger one raises ValueError. Raises ValueError for a model on the CPU, and NotImplementedError for what
    cannot be recorded, with the reason.
    """
    weight = model.vit.patch_embed.proj.weight
    if not weight.is_cuda:
        raise ValueError(f"capture: CUDA graphs need a model on a GPU, this one is on {weight.device}")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
    pruner = model.pruner
    if model.backend in ("paper_padded", "reference", "nested"):
        raise NotImplementedError(f"capture: backend {model.backend!r} reads from the GPU in the middle of the pass")
    if pruner is not None and pruner.adaptive and len(pruner.at) > 1:
        raise NotImplementedError(
            f"capture: {pruner.name} decides {len(pruner.at)} times how many tokens stay, and every decision would "
            "need a wait and buckets of its own; capture a single cut, at=(3,), or a pruner with fixed counts"
        )
    shape = (batch_size, weight.shape[1], *model.vit.patch_embed.img_size)
    with torch.no_grad(), torch.cuda.device(weight.device):
        return _record(model, torch.randn(shape, device=weight.device, dtype=weight.dtype), warmup, between)


def _record(model, images: Tensor, warmup: int, between: tuple[int, int] | None) -> Captured:
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, tune cuBLAS and fill caches outside the recording
        for _ in range(warmup):
            result = model.begin(images)
            if not isinstance(result, Tensor):
                rows = images.shape[0] * result.width
                result.resume(rows, result.width)
    torch.cuda.current_stream().wait_stream(stream)
    front = torch.cuda.CUDAGraph()
    with torch.cuda.graph(front, pool=pool, stream=stream):
        result = model.begin(images)
        need = None if isinstance(result, Tensor) else torch.stack((result.counts.sum(), result.counts.max()))
    if need is None:
        return Captured(model, images, front, result)
    captured = Captured(model, images, front, None)
    captured.need, captured.padded = need, _is_padded(model)
    front.replay()
    rows, width = images.shape[0] * result.width, result.width
    sizes = [*range(WIDTH_STEP, width, WIDTH_STEP), width] if captured.padded else bucket_sizes(rows)
    captured.sizes = sizes if between is None else _needed(sizes, *between)
    total, longest = need.tolist()
    for size in reversed(captured.sizes):
        how = (images.shape[0] * size, size) if captured.padded else (size, width)
        # run once before recording; but a bucket that these images overflow would read and write past its end
        dry = size >= (longest if captured.padded else total)
        captured.buckets[size] = _record_back(result, how, stream, pool, dry)
    return captured


def _is_padded(model) -> bool:
    return BACKENDS[model.picked].layout == "padded"


def _needed(sizes: list[int], least: int, most: int) -> list[int]:
    """The buckets that calls needing `least` to `most` rows use."""
    return sizes[bisect_left(sizes, least) : bisect_left(sizes, most) + 1]


def _record_back(
    pending, how: tuple[int, int], stream: torch.cuda.Stream, pool, dry: bool
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    if dry:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            pending.resume(*how)
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        output = pending.resume(*how)
    return graph, output
