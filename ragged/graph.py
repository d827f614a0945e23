"""The whole forward pass as CUDA graphs: recorded once, then started with no Python in between.

A graph replays fixed launches on fixed memory. With a fixed number of tokens that is all there is to it. An adaptive
pruner decides on the GPU how many tokens stay, so the pass is recorded in two parts. The front runs up to that
decision. The host then reads two numbers, total and longest (the one wait of the call), and starts the back whose
capacity is the next above. For packed tokens that is a capacity of total rows: the surplus rows are computed and never
looked at, because `cu_seqlens` does not reach them. A padded batch has a capacity of rows per image instead.

While the host reads and starts the back, the GPU is idle. With few rows that costs more than pruning can save, because
a GPU takes as long for 100 rows as for 200. Then nobody asks: one capacity, that of all rows.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import launch
from .backends import BACKENDS

STEP = 1.025  # a bucket is 2.5 % larger than the one below: about half of that is surplus on average
SMALLEST = 0.1  # share of the unpruned rows in the smallest bucket
WIDTH_STEP = 8  # rows per image between two buckets of a padded batch
FEW_ROWS = 512  # up to here an adaptive pass is recorded for all rows, without a wait (H200: batch 1 and 2, not 4)


def bucket_sizes(rows: int) -> list[int]:
    """Capacities in rows, rising geometrically up to `rows`, in multiples of 8 (small batches) or 64."""
    grain = 64 if rows >= 64 * 64 else 8
    sizes, size = {rows}, float(rows)
    while size > rows * SMALLEST:
        size /= STEP
        sizes.add(min(rows, math.ceil(size / grain) * grain))
    return sorted(sizes)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph that is collected while another is being captured takes that one along: CUDA forbids to free it then."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Chain:
    """Part of a pass as two graphs, the first up to the end of its first block.

    The GPU begins with a graph when the host has handed over the whole of it, 10 to 20 µs for a hundred kernels. Cut
    there, the GPU works on the first block while the host hands over the rest.

    work: what to record, on `stream`, its memory in `pool`; it gets a function to call after each block.  result: what
    it returned; its tensors are filled anew by every replay.
    """

    def __init__(self, work: Callable[[Callable[[], None]], object], stream: torch.cuda.Stream, pool: tuple[int, int]):
        self.graphs: list[torch.cuda.CUDAGraph] = []
        with _no_garbage_collection(), contextlib.ExitStack() as recording:

            def begin() -> None:
                self.graphs.append(torch.cuda.CUDAGraph())
                recording.enter_context(torch.cuda.graph(self.graphs[-1], pool=pool, stream=stream))

            def cut() -> None:
                if len(self.graphs) == 1:
                    recording.close()
                    begin()

            begin()
            self.result = work(cut)

    def replay(self) -> None:
        """Start it on the current stream."""
        for graph in self.graphs:
            graph.replay()


class Captured:
    """A model's forward pass for one batch size, as CUDA graphs. Call it with images; it returns logits.

    It is the model as it was: what is loaded into its weights takes effect, what is hung on it or replaced later does
    not.

    `capture` makes it: model, the buffer that images are copied into, and the front, whose result is the logits unless
    a bucket has to be chosen. Images are copied into the graphs' own buffer; the logits returned are a copy, safe to
    keep. Calls from several streams and threads are put one behind the other.
    """

    def __init__(self, model: nn.Module, images: Tensor, front: Chain):
        self.model = model  # a graph remembers addresses only: weights and predictors must live as long as it does
        self._weights = [parameter.detach() for parameter in model.parameters()]
        self.images, self.front = images, front
        self.buckets: dict[int, Chain] = {}
        self.sizes: list[int] = []
        self.padded = False  # whether sizes are rows per image, for the longest, or rows in all
        self.counts: Tensor | None = None  # rows of each image after the last adaptive cut, on the device
        self._host_counts: Tensor | None = None
        self._capacity = 0  # rows computed for them in the last call
        self._lock, self._read = threading.Lock(), torch.cuda.Event()
        self._device, self._stream = images.get_device(), torch.cuda.current_stream()

    @property
    def waits(self) -> int:
        """Device-to-host waits per call: 1 where a bucket has to be chosen, else 0."""
        return int(bool(self.sizes))

    @property
    def capacity_waste(self) -> float:
        """Surplus rows per real row in the last call, padding included; 0.0 for fixed counts. To know it, this waits
        for the GPU."""
        return 0.0 if self.counts is None else self._capacity / self.counts.sum().item() - 1.0

    def __call__(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            expected, got = f"a tensor {tuple(self.images.shape)}, as captured", type(images).__name__
            raise TypeError(f"images: expected {expected}, got a {got}; call the model itself with a list of images")
        if images.shape != self.images.shape or images.dtype != self.images.dtype:
            raise ValueError(
                f"images: captured for {tuple(self.images.shape)} {self.images.dtype}, got {tuple(images.shape)} "
                f"{images.dtype}; capture another batch size with model.capture({images.shape[0]})"
            )
        if images.device != self.images.device:
            raise ValueError(f"images: captured on {self.images.device}, got {images.device}")
        if next(self.model.parameters()).data_ptr() != self._weights[0].data_ptr():
            raise RuntimeError("model: its weights were moved or converted after capture; capture it again")
        if launch.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(images)
        with self._lock, torch.no_grad():
            if launch.current_stream(self._device) != self._stream.cuda_stream:
                before, self._stream = self._stream, torch.cuda.current_stream()
                self._stream.wait_stream(before)  # the buffers belong to the last call there until it is done
            self.images.copy_(images, non_blocking=True)
            self.front.replay()
            return (self._back() if self.sizes else self.front.result).clone()

    def _back(self) -> Tensor:
        self._host_counts.copy_(self.counts, non_blocking=True)
        self._read.record()
        self._read.synchronize()  # the one wait
        rows = int(self._host_counts.max() if self.padded else self._host_counts.sum())
        size = self._bucket(rows)
        self._capacity = size * (self.images.shape[0] if self.padded else 1)
        back = self.buckets[size]
        back.replay()
        return back.result

    def _bucket(self, rows: int) -> int:
        place = bisect_left(self.sizes, rows)
        if place == len(self.sizes):
            raise ValueError(f"images: {rows} rows stay, and only up to {self.sizes[-1]} were recorded: widen between=")
        return self.sizes[place]


def capture(
    model: nn.Module, batch_size: int, *, warmup: int = 2, between: tuple[int, int] | None = None,
    wait: bool | None = None,
) -> Captured:  # fmt: skip
    """Record `model` (a `RaggedViT` on a GPU) for batches of `batch_size` images.

    An adaptive pruner gets a recording per bucket, all in one memory pool: of total tokens (`bucket_sizes`), or for
    padded backends of rows per image, 8 apart. warmup: passes before recording, to compile and fill caches.  between:
    the least and most rows that calls will need, where that is known: other buckets are not recorded, and a call that
    needs a larger one raises ValueError.  wait: what an adaptive pruner gets; True: buckets; False: never a wait, and
    as many rows are computed as if nothing were dropped; None: False up to `FEW_ROWS` rows, else True. Raises
    ValueError or TypeError naming the argument, and NotImplementedError for what cannot be recorded, with the reason.
    """
    weight = model.vit.patch_embed.proj.weight
    if not weight.is_cuda:
        raise ValueError(f"capture: CUDA graphs need a model on a GPU, this one is on {weight.device}")
    if isinstance(batch_size, list | tuple):
        raise NotImplementedError("capture: images of different sizes cannot be recorded; call the model itself with "
                                  "the list of them")  # fmt: skip
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
    if wait is not None and not isinstance(wait, bool):
        raise TypeError(f"wait: expected True, False or None, got {wait!r}")
    model.prepare()
    if model.survey.hooked:
        raise NotImplementedError("capture: hooks hang on the model, and a CUDA graph calls none; remove them")
    pruner, tokens = model.pruner, model.vit.patch_embed.num_patches + model.prefix
    if not BACKENDS[model.picked].recordable:
        raise NotImplementedError(f"capture: backend {model.picked!r} reads from the GPU in the middle of the pass")
    if wait is None:
        wait = batch_size * tokens > FEW_ROWS
    if wait and pruner is not None and pruner.adaptive and len(pruner.at) > 1:
        raise NotImplementedError(
            f"capture: {pruner.name} decides {len(pruner.at)} times how many tokens stay, and every decision would "
            "need a wait and buckets of its own; capture a single cut, at=(3,), a pruner with fixed counts, or with "
            "wait=False, which computes all rows to the end"
        )
    shape = (batch_size, weight.shape[1], *model.vit.patch_embed.img_size)
    with torch.no_grad(), torch.cuda.device(weight.device):
        images = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        return _capture(model, images, warmup, between, wait)


def _capture(model, images: Tensor, warmup: int, between: tuple[int, int] | None, wait: bool) -> Captured:
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    cuts: list = []  # the pass's adaptive cuts: each a `Pending`

    def front(wait: bool, after_block: Callable[[], None]):
        result = model.begin(images, after_block=after_block)
        while not isinstance(result, Tensor):
            cuts.append(result)
            if wait:
                break
            result = result.resume(images.shape[0] * result.width, result.width, after_block)
        return result

    def dry_run(work: Callable[[Callable[[], None]], object]) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work(lambda: None)
        torch.cuda.current_stream().wait_stream(stream)

    for _ in range(warmup):  # compile, tune cuBLAS and fill caches outside the recording
        dry_run(functools.partial(front, False))
    cuts.clear()
    captured = Captured(model, images, Chain(functools.partial(front, wait), stream, pool))
    if not cuts:
        return captured
    pending = cuts[-1]
    rows, width = images.shape[0] * pending.width, pending.width
    captured.counts, captured.padded = pending.counts, BACKENDS[model.picked].pads
    captured._capacity = rows
    if not wait:
        return captured
    captured._host_counts = torch.empty_like(pending.counts, device="cpu").pin_memory()
    sizes = [*range(WIDTH_STEP, width, WIDTH_STEP), width] if captured.padded else bucket_sizes(rows)
    captured.sizes = sizes if between is None else _needed(sizes, *between)
    captured.front.replay()
    least = int(pending.counts.max() if captured.padded else pending.counts.sum())
    for size in reversed(captured.sizes):
        how = (images.shape[0] * size, size) if captured.padded else (size, width)
        back = functools.partial(pending.resume, *how)
        if size >= least:  # run once before; but in a smaller bucket these images would reach past its end
            dry_run(back)
        captured.buckets[size] = Chain(back, stream, pool)
    return captured


def _needed(sizes: list[int], least: int, most: int) -> list[int]:
    """The buckets that calls needing `least` to `most` rows use."""
    if not 0 <= least <= most or least > sizes[-1]:
        raise ValueError(f"between: expected 0 <= least <= most, and least <= {sizes[-1]}, got {(least, most)}")
    return sizes[bisect_left(sizes, least) : bisect_left(sizes, most) + 1]
