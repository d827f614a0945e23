"""The clocks: what each sees, what it does not, and that two ways to the same number agree."""

import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ragged.bench import timing


def spin(us):
    end = time.perf_counter_ns() + us * 1e3
    while time.perf_counter_ns() < end:
        pass


def test_quantiles_interpolate_and_nothing_is_nan():
    assert timing.stats([3.0, 1.0, 2.0]) == (2.0, 1.4, 2.6)
    assert timing.stats([5.0]) == (5.0, 5.0, 5.0)
    assert all(math.isnan(value) for value in timing.stats([]))


def test_inputs_take_turns():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    for call in timing.in_turn(calls, 7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_on_a_cpu_every_host_clock_sees_the_whole_call():
    calls = [lambda: spin(300)]
    for clock in (timing.host_us, timing.wall_us, timing.stream_us):
        start = time.perf_counter_ns()
        median = timing.stats(clock(calls, 9)).median
        took = (time.perf_counter_ns() - start) / 1e3  # however busy the machine: five times the median
        assert 290 < median <= took / 5
    assert timing.syncs(calls) == 0


def test_a_slow_first_call_does_not_keep_the_gpu_asleep(monkeypatch):
    """The first call of a backend may load a library or compile: seconds, which say nothing about the next fifty."""
    slept, now, us = [], [0], iter([200_000])

    def call():
        now[0] += 1000 * next(us, 50)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "wait", lambda: None)
    monkeypatch.setattr(timing, "keep_busy", slept.append)
    assert timing.host_us([call], 10) == [50] * 10
    assert 10 * 50 < slept[0] < 2000


@pytest.fixture
def kernel_of_50_us():
    """Calls of about 50 µs of GPU time on four inputs."""
    x = [torch.randn(1 << 25, device="cuda", dtype=torch.float16) for _ in range(4)]
    out = torch.empty_like(x[0])
    return [lambda a=a: torch.add(a, 1.0, out=out) for a in x]


@pytest.mark.gpu
def test_graph_replay_and_profiler_agree_on_gpu_time(kernel_of_50_us):
    replay = timing.as_graph(kernel_of_50_us, 20)
    graph = timing.stats([us for _ in range(9) for us in timing.gpu_us(replay, 20)]).median
    profiled = timing.stats([us for _ in range(3) for us in timing.gpu_us_profiled(kernel_of_50_us, 20)]).median
    assert 15 < graph < 500
    assert profiled == pytest.approx(graph, rel=0.10)


@pytest.mark.gpu
def test_an_event_pair_does_not_tell_a_slow_host_from_a_slow_gpu():
    x = torch.ones(32, device="cuda")

    def slow_host():
        spin(400)
        x.add_(0)

    def slow_gpu():
        timing.keep_busy(400)
        x.add_(0)

    def median(values):
        return timing.stats(values).median

    for call in (slow_host, slow_gpu):
        call()
    events = [min(timing.event_us([call], 15)) for call in (slow_host, slow_gpu)]  # a busy host makes some longer
    assert min(events) > 250, "the events see something slow in both"
    assert events[0] == pytest.approx(events[1], rel=0.5), "and about the same"
    host = [median(timing.host_us([call], 15)) for call in (slow_host, slow_gpu)]
    assert host[0] > 390 and host[1] < host[0] / 3, "the host clock tells them apart"
    gpu = [median(timing.gpu_us_profiled([call], 5)) for call in (slow_host, slow_gpu)]
    assert gpu[0] < 50 and gpu[1] > 250, "and so does the GPU clock"


@pytest.mark.gpu
def test_host_time_is_not_the_gpu_s():
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    calls = [lambda: torch.mm(x, x)]  # more than a millisecond of GPU time
    calls[0]()
    wall = timing.stats(timing.wall_us(calls, 5)).median
    assert wall > 700 and timing.stats(timing.host_us(calls, 20)).median < wall / 3


@pytest.mark.gpu
def test_waits_are_counted():
    x = torch.ones(32, device="cuda")
    event = torch.cuda.Event()

    def explicit():
        event.record()
        event.synchronize()

    assert timing.syncs([lambda: x.add(1)]) == 0
    assert timing.syncs([lambda: x.sum().item()]) == 1
    assert timing.syncs([lambda: (x.nonzero(), x.tolist())]) >= 2
    assert timing.syncs([explicit]) == 1


@pytest.mark.gpu
def test_a_program_that_ends_with_the_profiler_ends():
    """What the profiler leaves behind must not keep a program from exiting."""
    code = """
import torch
from ragged.bench.timing import gpu_us_profiled
x = torch.randn(2000, 2000, device="cuda")
assert 10 < gpu_us_profiled([lambda: x @ x])[0] < 1e5
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_the_profiler_s_threads_are_waited_for(monkeypatch):
    """CUDA is called until at most one of the threads that came is left, and not for ever."""
    calls = []
    monkeypatch.setattr(timing, "wait", lambda: calls.append(None))
    monkeypatch.setattr(timing, "_threads", lambda: {"1", "2"} if len(calls) < 5 else {"1"})
    timing._let_go(set(), least=0, most=300)
    assert len(calls) == 5
    monkeypatch.setattr(timing, "_threads", lambda: {"1", "2"})
    timing._let_go(set(), least=0, most=0.01)
    assert len(calls) > 5
