"""Captured lists without a GPU: which capacity a call takes, and what is refused."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_cases import STAGES, build, small_vit

import ragged
from ragged.graph import bucket_sizes
from ragged.graph.lists import CapturedList, rows_after, stand_ins

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")


@given(st.integers(1, 40), st.integers(2, 800), st.integers(2, 20_000), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_stand_ins_fill_their_rows(batch, longest, size, least):
    size, longest = min(size, batch * longest), max(longest, least)
    lengths = stand_ins(size, batch, longest, least)
    assert len(lengths) == batch and least <= min(lengths) and max(lengths) == lengths[0] <= longest
    assert sum(lengths) >= size - batch


@pytest.mark.parametrize("name, place", [
    ("threshold_l2", {"at": STAGES, "where": "after"}), ("dynamicvit", {"at": STAGES, "where": "before"}),
    ("evit", {"at": STAGES, "where": "inside"}), ("evit", {"at": (2,), "where": "after", "fuse": False}),
])  # fmt: skip
def test_rows_after_every_cut_are_the_pass_s_own(name, place):
    model = ragged.RaggedViT(small_vit("registers"), build(name, 0.7, **place))
    images = [torch.randn(3, 16 * high, 16 * wide) for high, wide in ((7, 7), (1, 1), (2, 5), (1, 3))]
    stages = model.trace(images).stages
    for b, image in enumerate(images):
        length = model.prefix + image.shape[1] * image.shape[2] // 256
        assert rows_after(model, length) == (length, *(stage.counts[b] for stage in stages))


def test_counts_decided_on_the_gpu_are_not_foreseen():
    assert rows_after(ragged.RaggedViT(small_vit(), build("ats", 0.7, at=STAGES)), 50) == (50,)
    assert rows_after(ragged.RaggedViT(small_vit()), 50) == (50,)


@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_call_takes_the_smallest_capacity_with_room(lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda *_: None)
        captured = _planned()
        if sum(lengths) > captured.most:
            with pytest.raises(ValueError, match=f"tokens={sum(lengths)}"):
                captured._choose(lengths)
            return
        size = captured._choose(lengths)
        needs = [sum(rows) for rows in zip(*map(captured._after, lengths), strict=True)]
        fits = [s for s in captured.capacities
                if all(a <= b for a, b in zip(needs, captured._room[s], strict=True))]  # fmt: skip
        assert size == fits[0] and needs[0] <= size


@functools.cache
def _planned():
    captured = CapturedList(ragged.RaggedViT(small_vit(), build("evit", 0.7, at=STAGES)), 8, bucket_sizes(300), 300, 50,
                            "112 x 112 pixels")  # fmt: skip
    captured.padded = False  # without a GPU "auto" pads
    for size in captured.capacities:
        captured.plan(size)
    return captured


def test_what_was_not_foreseen_is_said():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda *_: None)
        captured = _planned()
    for lengths, text in (([10] * 9, "up to 8 images, got 9"), ([60], "up to 50 tokens an image.*60"),
                          ([50] * 7, "up to 300 tokens in all, got 350.*tokens=350")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            captured._choose(lengths)
    with pytest.raises(TypeError, match="list"):
        captured(torch.zeros(1, 3, 32, 32))
