"""Capacities of a recorded pass: what can be checked without a GPU. tests/test_gpu_models.py records and replays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
