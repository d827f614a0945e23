"""What recordings are made of: buckets, chains of graphs, and what follows the first adaptive cut."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import launch
from ..backends import BACKENDS
from ..blocks.cuts import Pending
from .streams import branch_of, for_recording, for_trials

STEP = 1.025  # a bucket is 2.5 % larger than the one below: about half of that is surplus on average
SMALLEST = 0.1  # share of the unpruned rows in the smallest bucket
WIDTH_STEP = 8  # rows per image between two buckets of a padded batch
FEW_ROWS = 512  # up to here an adaptive pass is recorded for all rows, without a wait (H200: batch 1 and 2, not 4)
# Rows times dim² up to which an MLP for all rows takes no longer than the wait, 80 µs on an H100, which it then hides;
# where a cut has no MLP to do, taking the rows is less.
HIDDEN = 2e9

Result = TypeVar("Result")
Work = Callable[[Callable[[], None]], object]  # what is recorded; it gets a function to call after each block
Behind = Callable[[object], Callable[[], object] | None]  # of what was recorded: what to record behind it, if anything


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


def aside(work: Callable[[], Result], on_gpu: bool) -> Callable[[], Result]:
    """Something to ask for the result of `work` later. While a pass is recorded, the kernels of `work` become a branch
    of the graph, beside whatever is recorded until somebody asks; otherwise work is done when somebody asks. on_gpu:
    whether its tensors are."""
    if not on_gpu or not torch.cuda.is_current_stream_capturing():
        return work
    here = torch.cuda.current_stream()
    branch = branch_of(here)
    branch.wait_stream(here)
    with torch.cuda.stream(branch):
        result = work()

    def joined() -> Result:
        here.wait_stream(branch)
        return result

    return joined


class Chain:
    """Part of a pass as two graphs, the first up to the end of its first block, and perhaps one more behind them.

    The GPU begins with a graph when the host has handed over the whole of it, 10 to 20 µs for a hundred kernels. Cut
    there, the GPU works on the first block while the host hands over the rest.

    work: what to record, on `stream`, its memory in `pool`; it gets a function to call after each block.  behind: says
    of its result what to record as one more graph, or None.  result: what the last of them returned; its tensors are
    filled anew by every replay.
    """

    def __init__(self, work: Work, stream: torch.cuda.Stream, pool: tuple[int, int],
                 behind: Behind | None = None):  # fmt: skip
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.last: torch.cuda.CUDAGraph | None = None  # what `behind` did
        with _no_garbage_collection(), contextlib.ExitStack() as recording:

            def begin() -> torch.cuda.CUDAGraph:
                graph = torch.cuda.CUDAGraph()
                recording.enter_context(torch.cuda.graph(graph, pool=pool, stream=stream))
                return graph

            def cut() -> None:
                if len(self.graphs) == 1:
                    recording.close()
                    self.graphs.append(begin())

            self.graphs.append(begin())
            self.result = work(cut)
            more = None if behind is None else behind(self.result)
            if more is not None:
                recording.close()
                self.last = begin()
                self.result = more()

    def replay(self) -> None:
        """Start it on the current stream, all but what came behind."""
        for graph in self.graphs:
            graph.replay()

    def replay_last(self) -> None:
        """Start what came behind, if anything did."""
        if self.last is not None:
            self.last.replay()


class Recorder:
    """Where a model's graphs are recorded: a stream (streams.py says which) and a memory pool for all of them, which
    take turns. What is tried out runs on another stream, so that the memory in which a matrix product works comes from
    the pool."""

    def __init__(self, model: nn.Module):
        self.model, self.stream, self.pool = model, for_recording(), torch.cuda.graph_pool_handle()
        self.trial = for_trials(torch.cuda.current_device())

    def try_out(self, work: Work) -> object:
        """Run `work` outside any recording: it compiles, tunes cuBLAS and fills caches."""
        self.trial.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.trial):
            result = work(lambda: None)
        torch.cuda.current_stream().wait_stream(self.trial)
        return result

    def record(self, work: Work, behind: Behind | None = None) -> Chain:
        """`work` as graphs, and what comes `behind` it as one more."""
        return Chain(work, self.stream, self.pool, behind)


def to_the_end(result: Tensor | Pending, rows: int | None, cuts: list[Tensor],
               after_block: Callable[[], None] | None = None) -> Tensor:  # fmt: skip
    """Go on with room for `rows` rows in all (None: for every row there was) however often the pass asks. The rows of
    each image after every cut are added to `cuts`."""
    while not isinstance(result, Tensor):
        cuts.append(result.counts)
        most = result.cut.state.batch * result.width
        result = result.resume(most if rows is None else min(rows, most), result.width, after_block)
    return result


class Rest:
    """What follows the first adaptive cut, in a graph for each capacity.

    pending: the pass at the cut, whose tensors the front fills anew.  sizes: capacities, in rows, or under a padded
    backend in rows per image.  front: what leads there; its last graph, if it has one behind the counts, is started
    before the host waits for these.
    """

    def __init__(self, recorder: Recorder, pending: Pending, sizes: list[int], padded: bool,
                 front: Chain | None = None):  # fmt: skip
        self.front = front
        self.counts, self.sizes, self.padded, self.batch = pending.counts, sizes, padded, pending.cut.state.batch
        self._host, self._reader = torch.empty_like(pending.counts, device="cpu").pin_memory(), torch.cuda.Stream()
        self._known, self._read = torch.cuda.Event(), torch.cuda.Event()
        self.buckets: dict[int, Chain] = {}
        self.cuts: dict[int, list[Tensor]] = {}  # rows of each image after every cut, on the device
        self.size = sizes[-1]  # of the last call
        least = int(pending.counts.max() if padded else pending.counts.sum())
        for size in reversed(sizes):
            work = functools.partial(self.work, pending, size)
            if size >= least:  # run once before; but in a smaller bucket these images would reach past its end
                recorder.try_out(work)
            self.buckets[size] = recorder.record(work)

    def work(self, pending: Pending, size: int, after_block: Callable[[], None] | None) -> Tensor:
        """From the cut to the logits with capacity `size`."""
        rows, longest = (self.batch * size, size) if self.padded else (size, pending.width)
        self.cuts[size] = [pending.counts]
        return to_the_end(pending.resume(rows, longest, after_block), rows, self.cuts[size], after_block)

    def __call__(self) -> Tensor:
        """Read how many rows stay, and start what has room for them."""
        self._known.record()
        if self.front is not None:
            self.front.replay_last()  # for the GPU, meanwhile
        self._reader.wait_event(self._known)
        with torch.cuda.stream(self._reader):  # beside it, not in front of it
            self._host.copy_(self.counts, non_blocking=True)
            self._read.record()
        self._read.synchronize()  # the one wait
        self.size = self.capacity_for(int(self._host.max() if self.padded else self._host.sum()))
        self.buckets[self.size].replay()
        return self.buckets[self.size].result

    def capacity_for(self, rows: int) -> int:
        """The capacity to start where so many rows stay. ValueError where there is none."""
        place = bisect_left(self.sizes, rows)
        if place == len(self.sizes):
            raise ValueError(f"images: {rows} rows stay, and only up to {self.sizes[-1]} were recorded: widen between=")
        return self.sizes[place]


def rest_sizes(pending: Pending, padded: bool, between: tuple[int, int] | None, most: int | None = None) -> list[int]:
    """Capacities for what follows `pending`, of `most` rows at most (None: of all): rows, or (padded) rows per image;
    between: as in `capture`."""
    width = pending.width
    rows = pending.cut.state.batch * width if most is None else most
    sizes = [*range(WIDTH_STEP, width, WIDTH_STEP), width] if padded else bucket_sizes(rows)
    return sizes if between is None else needed("between", sizes, *between)


def needed(name: str, sizes: list[int], least: int, most: int) -> list[int]:
    """The buckets that calls needing `least` to `most` rows use. ValueError naming the argument."""
    if not 0 <= least <= most or least > sizes[-1]:
        raise ValueError(f"{name}: expected 0 <= least <= most, and least <= {sizes[-1]}, got {(least, most)}")
    return sizes[bisect_left(sizes, least) : bisect_left(sizes, most) + 1]


class Recorded:
    """What all recordings share: the model as it was, and calls from several streams and threads one behind the other.

    It is the model as it was: what is loaded into its weights takes effect, what is hung on it or replaced later does
    not.
    """

    rest: Rest | None = None

    def __init__(self, model: nn.Module):
        self.model = model  # a graph remembers addresses only: weights and predictors must live as long as it does
        self._weights = [parameter.detach() for parameter in model.parameters()]
        self.padded = BACKENDS[model.picked].pads  # whether sizes are rows per image, for the longest, or rows in all
        self._cuts: list[Tensor] = []  # rows of each image after every cut, where nobody waits, on the device
        self._rows = 0  # computed after each of them
        self._lock = threading.Lock()
        self._device, self._stream = self._weights[0].get_device(), torch.cuda.current_stream()

    @property
    def sizes(self) -> list[int]:
        """Capacities of which one is chosen after the first adaptive cut; none where nobody asks."""
        return [] if self.rest is None else self.rest.sizes

    @property
    def buckets(self) -> dict[int, Chain]:
        """What follows that cut, for each of `sizes`."""
        return {} if self.rest is None else self.rest.buckets

    @property
    def waits(self) -> int:
        """Device-to-host waits per call: 1 where a bucket has to be chosen, else 0."""
        return int(self.rest is not None)

    @property
    def counts(self) -> Tensor | None:
        """Rows of each image after the first adaptive cut, on the device; after the last one where nobody waits."""
        return self.rest.counts if self.rest is not None else self._cuts[-1] if self._cuts else None

    @property
    def capacity_waste(self) -> float:
        """Surplus rows per real row after all adaptive cuts of the last call, padding included; 0.0 where no counts are
        decided on the GPU. To know it, this waits for the GPU."""
        cuts, rows = self._cuts, self._rows
        if self.rest is not None:
            cuts, rows = self.rest.cuts[self.rest.size], self.rest.size * (self.rest.batch if self.padded else 1)
        return rows * len(cuts) / sum(counts.sum().item() for counts in cuts) - 1.0 if cuts else 0.0

    def _in_turn(self, start: Callable[[], Tensor]) -> Tensor:
        """What `start` answers, one call after the other, on the device and after the calls of other streams."""
        if next(self.model.parameters()).data_ptr() != self._weights[0].data_ptr():
            raise RuntimeError("model: its weights were moved or converted after capture; capture it again")
        if self.model.training:
            raise RuntimeError("model: it is in training mode, and a capture is for inference only; call model.eval(), "
                               "or train with the model itself")  # fmt: skip
        if launch.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self._in_turn(start)
        with self._lock, torch.no_grad():
            if launch.current_stream(self._device) != self._stream.cuda_stream:
                before, self._stream = self._stream, torch.cuda.current_stream()
                self._stream.wait_stream(before)  # the buffers belong to the last call there until it is done
            return start()
