"""Captured lists without a GPU: which capacity a call takes, and what is refused."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_cases import STAGES, build, small_vit

import ragged
from ragged import blocks
from ragged.backends import BACKENDS
from ragged.blocks.cuts import Pass
from ragged.graph import bucket_sizes
from ragged.graph.lists import CapturedList, rows_after, stand_ins
from ragged.packing import Counts, Packed
from ragged.rules import top_k

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


def test_a_pruner_of_fixed_shares_may_rank_by_importance():
    class Important(ragged.PRUNERS["evit"]):
        needs = frozenset({"importance"})

        def select(self, view):
            return top_k(view.importance, view.prefix, view.share("important", 0.5), real=view.real())

    model, images = ragged.RaggedViT(small_vit(), Important(at=(1,))), [torch.randn(3, 32, 32), torch.randn(3, 32, 64)]
    size = model.vit.patch_embed.dynamic_feat_size
    lengths = [model.prefix + math.prod(size(tuple(image.shape[1:]))) for image in images]
    (stage,) = model.trace(images).stages
    assert [rows_after(model, n)[1] for n in lengths] == stage.counts


@pytest.mark.parametrize("name, options", [
    ("ats", {"samples": 400}), ("threshold_l2", {"tau": 0.01}), ("random", {"keep": 0.9, "adaptive": True}),
], ids=["ats", "tau", "random"])  # fmt: skip
@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_an_image_without_rows_keeps_none(name, options, kind):
    """Lines of the table that a short list leaves empty: else more rows would stay than there is room for."""
    model = ragged.RaggedViT(small_vit(kind), ragged.PRUNERS[name](at=(1, 2), **options), backend="reference")
    longest = model.prefix + 49
    lengths = (longest, *[0] * 7)
    cu = torch.tensor([0, *[longest] * 8], dtype=torch.int32)
    counts = Counts(cu.diff(), (longest, *[1] * 7))  # what the host was told when this capacity was recorded
    state = Packed(torch.randn(longest, 48), torch.arange(longest), cu, longest, 8, longest, None, counts, counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragged.model.check_selection", lambda *_: None)  # on a GPU values are not looked at
        pending = model._blocks(state, -1, Pass(BACKENDS["reference"]))
        for _ in range(2):
            assert (pending.counts <= torch.tensor(lengths)).all() and pending.counts[0] > model.prefix
            pending = pending.resume(longest, longest)
    assert pending.shape[0] == 8 and pending[0].isfinite().all()


def test_attention_in_spare_rooms_is_told_more_rows_than_would_make_equal_lengths(monkeypatch):
    """A recording without a wait: as many rows as before the cut, and lengths that only the GPU knows."""
    told = []
    real = blocks.varlen_attention
    monkeypatch.setattr(blocks, "varlen_attention", lambda *a, **k: told.append((len(a[0]), a[5])) or real(*a, **k))
    model = ragged.RaggedViT(small_vit(), ragged.PRUNERS["ats"](samples=20, at=(1,)), backend="reference")
    pending = model.begin(torch.randn(3, 3, 112, 112))
    told.clear()
    pending.resume(3 * pending.width, pending.width)
    assert set(told) == {(3 * pending.width, pending.width + 1)}
