"""The clocks. No single one says where the time of a call went; several side by side do.

    clock       sees                                            does not see
    host_us     what the caller pays to get a call enqueued     the GPU, as long as the call does not wait for it
    gpu_us      what the GPU needs for the call's kernels       the host, which is kept out of the way
    wall_us     one call and its answer, from an idle GPU       which of the two it waited for
    stream_us   calls one behind the other, one wait at the end which of the two was slower
    event_us    what a pair of CUDA events sees                 host and GPU apart: a gap between the events counts
    syncs       device-to-host waits inside a call              how long they take

`wall_us` and `event_us` are the clocks of arXiv 2604.15408 (v1 and v2). All take `calls`, functions without arguments
of one and the same operation on different inputs, used in turn so that inputs do not simply sit in the cache, and
return a list of times in µs per call.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

# A profiler that has run once stays attached to the driver, and every later launch of the process pays for it: 1 µs
# here, 7 µs for flash-attention. This makes it let go.
os.environ.setdefault("TEARDOWN_CUPTI", "1")

Call = Callable[[], object]
CYCLES_PER_US = 2000  # no GPU of the last years clocks far above 2 GHz; a slower one just sleeps longer


class Stats(NamedTuple):
    """Median and 20/80 % quantiles of a list of times."""

    median: float
    q20: float
    q80: float


def stats(values: Sequence[float]) -> Stats:
    """Quantiles of values, linearly interpolated; NaN for none."""
    if not len(values):
        return Stats(math.nan, math.nan, math.nan)
    return Stats(*np.quantile(values, (0.5, 0.2, 0.8)).tolist())


def in_turn(calls: Sequence[Call], n: int) -> Iterator[Call]:
    """n calls, the inputs used in turn."""
    return (calls[i % len(calls)] for i in range(n))


def wait() -> None:
    """Until the GPU is idle; nothing where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def keep_busy(us: float) -> None:
    """Put a kernel that does nothing for about `us` µs on the stream: what follows is enqueued while it runs."""
    torch.cuda._sleep(int(us * CYCLES_PER_US))


def host_us(calls: Sequence[Call], n: int = 50, waits: float = 0) -> list[float]:
    """Time until each of n `calls` has returned, the stream kept busy, so that nothing in it waits for a result or
    room.

    The GPU's part does not count. Keep n times the launches of a call under about 1000, the depth of the launch queue.
    A call that itself waits for the GPU (waits > 0) is started on an idle stream instead, and its waits are included.
    On the CPU a call returns when it is done: the same as `wall_us`.
    """
    if waits or not torch.cuda.is_available():
        return _timed(in_turn(calls, n), before=wait)
    one = stats(_timed(in_turn(calls, 3), before=wait)).median  # of three: the first may load or compile something
    wait()
    keep_busy(1.3 * n * one)
    times = _timed(in_turn(calls, n))
    wait()
    return times


def wall_us(calls: Sequence[Call], n: int = 20) -> list[float]:
    """Call and synchronize, n of `calls` in turn, each from an idle GPU: the paper's first clock. Host and GPU time one
    behind the other, as far as they do not overlap."""
    return _timed(in_turn(calls, n), before=wait, after=wait)


def stream_us(calls: Sequence[Call], n: int = 20) -> list[float]:
    """n calls one behind the other and one synchronize, over n: a server under load. Near the larger of host_us and
    gpu_us. One value."""
    wait()
    start = time.perf_counter_ns()
    for call in in_turn(calls, n):
        call()
    wait()
    return [(time.perf_counter_ns() - start) / 1e3 / n]


def event_us(calls: Sequence[Call], n: int = 20) -> list[float]:
    """A pair of CUDA events round each of n `calls`: the paper's second clock. The first event passes an idle GPU at
    once, the second after the last kernel: with a slow host it measures the host. Needs CUDA."""
    times = []
    for call in in_turn(calls, n):
        wait()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def as_graph(calls: Sequence[Call], n: int = 20) -> Call:
    """A CUDA graph of n calls; the function returned enqueues all of them at once. Raises for calls that wait.

    The function keeps `calls` alive: a graph reads the memory that its calls read, whoever owns it by then.
    """
    graph = torch.cuda.CUDAGraph()
    wait()
    with torch.cuda.graph(graph):
        for call in in_turn(calls, n):
            call()

    def replay(alive=tuple(calls)) -> None:
        graph.replay()

    replay()
    wait()
    return replay


def gpu_us(replay: Call, n: int = 20, sleep_us: float = 300) -> list[float]:
    """GPU time of a call, from one replay of n captured ones (see `as_graph`) between two events. One value.

    A sleep of sleep_us in front lets the replay be enqueued before the first event passes, so no host time gets in; the
    idle moments between two kernels, about 1 µs each, do. Needs CUDA.
    """
    wait()
    keep_busy(sleep_us)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return [start.elapsed_time(end) * 1e3 / n]


def gpu_us_profiled(calls: Sequence[Call], n: int = 3) -> list[float]:
    """GPU time of a call, of n, as the sum of its kernels, copies and fills in PyTorch's profiler, for calls that
    cannot be captured. One value. Idle moments between kernels are left out, kernels side by side count twice. Needs
    CUDA."""
    from torch.profiler import ProfilerActivity, profile

    wait()
    before = _threads()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in in_turn(calls, n):
            call()
        wait()
    _let_go(before)
    on_gpu = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [sum(event.time_range.elapsed_us() for event in on_gpu) / n]


def _let_go(before: set[str], least: float = 0.02, most: float = 0.5) -> None:
    """Call CUDA until the profiler has let go of the driver. before: threads that ran before it.  least, most: seconds.

    PyTorch's profiler lets go inside a later CUDA call, and a thread of its own sleeps until then. Where no call comes,
    because the program ends here, it sleeps for ever, and the program with it: at exit C++ destroys what that thread
    sleeps on, and waits for it to wake. The threads of the driver's profiler end with it; one that watches for settings
    stays.
    """
    start = time.monotonic()
    while (spent := time.monotonic() - start) < least or (len(_threads() - before) > 1 and spent < most):
        wait()
        time.sleep(1e-3)


def _threads() -> set[str]:
    """This process's threads; none where the system does not list them."""
    try:
        return set(os.listdir("/proc/self/task"))
    except OSError:
        return set()


def syncs(calls: Sequence[Call], n: int = 2) -> float:
    """Device-to-host waits per call, over n of `calls`: what PyTorch reports about its own operations (`.item()`,
    `nonzero`, copies to the host), and explicit waits for events, streams and devices. Waits inside a C++ extension are
    not seen."""
    if not torch.cuda.is_available():
        return 0.0
    explicit = [0]
    places = [(torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda, "synchronize")]
    before = torch.cuda.get_sync_debug_mode()
    with contextlib.ExitStack() as stack:
        reported = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        for owner, name in places:
            stack.enter_context(_counted(owner, name, explicit))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for call in in_turn(calls, n):
                call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return (explicit[0] + sum("synchronizing CUDA operation" in str(w.message) for w in reported)) / n


@contextlib.contextmanager
def _counted(owner: object, name: str, tally: list[int]) -> Iterator[None]:
    """While this lasts, every call of owner.name adds one to tally[0]."""
    original = getattr(owner, name)

    def method(*arguments, **options):
        tally[0] += 1
        return original(*arguments, **options)

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _timed(calls, before: Call | None = None, after: Call | None = None) -> list[float]:
    times = []
    for call in calls:
        if before is not None:
            before()
        start = time.perf_counter_ns()
        call()
        if after is not None:
            after()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times
