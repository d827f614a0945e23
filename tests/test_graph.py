"""Capacities of a recorded pass: what can be checked without a GPU. tests/test_gpu_models.py records and replays."""

import contextlib
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragged.graph import streams
from ragged.graph.parts import SMALLEST, STEP, bucket_sizes, needed


@given(rows=st.integers(1, 300_000))
def test_capacities_rise_gently_up_to_all_rows(rows):
    sizes = bucket_sizes(rows)
    grain = 64 if rows >= 64 * 64 else 8
    assert sizes == sorted(set(sizes)) and sizes[-1] == rows and sizes[0] <= max(grain, SMALLEST * rows + grain)
    assert all(size % grain == 0 for size in sizes[:-1])
    assert all(big <= STEP * small + grain for small, big in zip(sizes, sizes[1:]))


@given(data=st.data(), rows=st.integers(1, 60_000))
def test_a_call_within_the_announced_range_finds_the_same_capacity(data, rows):
    sizes = bucket_sizes(rows)
    least = data.draw(st.integers(0, rows))
    most = data.draw(st.integers(least, 2 * rows))
    found = needed("between", sizes, least, most)
    for call in {least, min(most, rows), (least + min(most, rows)) // 2}:
        assert next(size for size in found if size >= call) == next(size for size in sizes if size >= call)
    assert len(found) == 1 or found[-2] < most


@pytest.mark.parametrize("between", [(5, 3), (-1, 3), (198, 300)])
def test_a_range_without_a_capacity_is_refused(between):
    with pytest.raises(ValueError, match="between: expected 0 <= least <= most, and least <= 197"):
        needed("between", bucket_sizes(197), *between)


class Handed:
    """Streams as PyTorch hands them out: so many, in turn."""

    def __init__(self, number=32):
        self.next, self.number, self.given_back = 0, number, 0

    def __call__(self):
        self.next += 1
        return types.SimpleNamespace(cuda_stream=1000 + (self.next - 1) % self.number)

    def give_back(self):
        self.given_back += 1


@pytest.fixture
def handed(monkeypatch):
    handed = Handed()
    monkeypatch.setattr(torch.cuda, "Stream", handed)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", handed.give_back, raising=False)
    for name, empty in {"_used": set(), "_kept": set(), "_branches": {}}.items():
        monkeypatch.setattr(streams, name, empty)
    for kept in (streams.for_trials, streams._other_branch):
        kept.cache_clear()
    yield handed
    for kept in (streams.for_trials, streams._other_branch):
        kept.cache_clear()


def test_no_two_recordings_share_a_stream_before_they_have_to(handed):
    """Fifteen pairs beside the two that are kept; then all memory is given back, and they begin again."""
    trial = streams.for_trials(0).cuda_stream
    other = streams.branch_of(types.SimpleNamespace(cuda_stream=7)).cuda_stream
    pairs = []
    for _ in range(40):
        stream = streams.for_recording()
        pairs.append((stream.cuda_stream, streams.branch_of(stream).cuda_stream))
    assert not {trial, other} & {one for pair in pairs for one in pair} and trial != other
    for first in range(0, 30, 15):
        those = [one for pair in pairs[first : first + 15] for one in pair]
        assert len(set(those)) == 30, "all different"
    assert handed.given_back == 2 and streams.for_trials(0).cuda_stream == trial


def test_streams_that_somebody_else_draws_do_no_harm(handed):
    seen = []
    for drawn in range(10):
        for _ in range(drawn):
            torch.cuda.Stream()
        stream = streams.for_recording()
        seen += [stream.cuda_stream, streams.branch_of(stream).cuda_stream]
    assert len(set(seen)) == len(seen) and not handed.given_back
