"""pack, repack and unpack: what goes in comes out where it was, and the host asks the device no more than it must."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ragged
from ragged import packing


def tokens(batch=3, n=7, dim=4, seed=0):
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed))


def mask(rows):
    return torch.tensor(rows, dtype=torch.bool)


def some(batch=3, n=7, share=0.5, seed=1):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < share


def assert_packed(packed, x, keep):
    """`packed` holds the rows of x where keep is True, in order, and describes itself correctly."""
    counts = keep.sum(1).tolist()
    assert torch.equal(packed.tokens, x[keep]) and packed.tokens.is_contiguous()
    assert packed.ids.dtype == torch.int64 and packed.ids.tolist() == keep.nonzero()[:, 1].tolist()
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.diff().tolist() == counts
    assert packed.cu_seqlens[0] == 0 and packed.cu_seqlens.shape == (len(counts) + 1,)
    assert type(packed.max_seqlen) is int and packed.max_seqlen == max(1, *counts)
    assert (packed.batch, packed.seqlen) == keep.shape
    assert packed.count in (None, counts[0]) and (packed.count is None or len(set(counts)) == 1)


@st.composite
def masks(draw, at_most=5, longest=8):
    batch, n = draw(st.integers(1, at_most)), draw(st.integers(1, longest))
    return mask(draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=batch, max_size=batch)))


# --- round trips


@given(keep=masks(), dim=st.integers(1, 5))
def test_pack_and_unpack(keep, dim):
    x = tokens(*keep.shape, dim)
    packed = ragged.pack(x, keep)
    assert_packed(packed, x, keep)
    assert torch.equal(ragged.unpack(packed), x * keep[..., None])


@given(keep=masks(), data=st.data())
def test_repack_is_packing_with_both_masks(keep, data):
    x = tokens(*keep.shape)
    packed = ragged.pack(x, keep)
    rows = len(packed.ids)
    second = mask(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    both = keep.clone()
    both[keep] = second
    again = ragged.repack(packed, second)
    assert_packed(again, x, both)
    assert torch.equal(ragged.unpack(again), x * both[..., None])


@given(batch=st.integers(1, 4), n=st.integers(1, 7), data=st.data())
def test_row_numbers_in_any_order(batch, n, data):
    k = data.draw(st.integers(1, n))
    index = torch.tensor([data.draw(st.permutations(range(n)))[:k] for _ in range(batch)])
    x = tokens(batch, n)
    packed = ragged.pack(x, index)
    assert torch.equal(packed.tokens.view(batch, k, -1), x.gather(1, index[..., None].expand(-1, -1, 4)))
    assert torch.equal(packed.ids.view(batch, k), index)
    assert packed.cu_seqlens.tolist() == [k * b for b in range(batch + 1)]
    assert (packed.max_seqlen, packed.batch, packed.seqlen, packed.count) == (k, batch, n, k)
    keep = torch.zeros(batch, n, dtype=torch.bool).scatter_(1, index, True)
    assert torch.equal(ragged.unpack(packed), x * keep[..., None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_numbers_are_copied_exactly(dtype):
    x, keep = tokens().to(dtype), some()
    packed = ragged.pack(x, keep)
    assert packed.tokens.dtype == dtype
    assert_packed(packed, x, keep)


@pytest.mark.parametrize("counts", [[0, 3, 0], [0, 0, 0], [7, 0, 1], [7, 7, 7]], ids=str)
def test_images_that_keep_nothing(counts):
    keep, x = torch.arange(7) < torch.tensor(counts)[:, None], tokens()
    for known in (None, counts):
        packed = ragged.pack(x, keep, counts=known)
        assert_packed(packed, x, keep)
        assert torch.equal(ragged.unpack(packed), x * keep[..., None])
        nothing = ragged.repack(packed, torch.zeros(sum(counts), dtype=torch.bool))
        assert nothing.tokens.shape == (0, 4) and not ragged.unpack(nothing).any()


def test_no_rows_by_number():
    packed = ragged.pack(tokens(), torch.zeros(3, 0, dtype=torch.int64))
    assert packed.tokens.shape == (0, 4) and packed.cu_seqlens.tolist() == [0, 0, 0, 0]
    assert packed.max_seqlen == 1, "as small as attention accepts, like a mask that keeps nothing"


def test_fill_stands_where_rows_were_dropped():
    x, keep = tokens(), some()
    for fill in (-2.5, float("nan"), 7):
        out = ragged.unpack(ragged.pack(x, keep), fill=fill)
        want = torch.where(keep[..., None], x, torch.tensor(float(fill)))
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


def test_fused_tokens_have_no_place():
    x, keep = tokens(), mask([[1] * 7, [1, 0] * 3 + [0], [0] * 6 + [1]])
    packed = ragged.pack(x, keep)
    ids = packed.ids.clone()
    ids[-2] = -1  # the last row of image 1, its patch 4
    out = ragged.unpack(ragged.Packed(packed.tokens, ids, packed.cu_seqlens, 7, 3, 7))
    keep[1, 4] = False
    assert torch.equal(out, x * keep[..., None])


def test_surplus_rows_have_no_place():
    """Under a graph the buffer has capacity to spare, and the rows past the last offset are copies."""
    packed = ragged.pack(tokens(), some())
    more = torch.cat((packed.tokens, torch.full((5, 4), 9.0)))
    ids = torch.cat((packed.ids, torch.zeros(5, dtype=torch.int64)))
    spare = ragged.Packed(more, ids, packed.cu_seqlens, packed.max_seqlen, 3, 7)
    assert torch.equal(ragged.unpack(spare), ragged.unpack(packed))


def test_views_are_read_correctly():
    x, keep = tokens(), some()
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_packed(ragged.pack(view, keep.T.contiguous().T), x, keep)
    packed = ragged.pack(x, keep)
    flags = some(1, 2 * len(packed.ids))[0]
    assert torch.equal(ragged.repack(packed, flags[::2]).tokens, packed.tokens[flags[::2]])


def test_packed_is_frozen_and_its_input_untouched():
    x, keep = tokens(), some()
    before = x.clone(), keep.clone()
    packed = ragged.pack(x, keep)
    packed.tokens.zero_()
    assert torch.equal(x, before[0]) and torch.equal(keep, before[1])
    with pytest.raises(AttributeError):
        packed.batch = 9


# --- the layout's own helpers


def test_grid_and_first_rows():
    x, keep = tokens(), mask([[1] * 7, [1, 0] * 3 + [0], [1] + [0] * 6])
    packed = ragged.pack(x, keep)
    grid = packed.grid(packed.tokens, fill=3.0)
    assert grid.shape == (3, 7, 4) and packed.lengths.tolist() == [7, 3, 1] and packed.starts.tolist() == [0, 7, 10]
    for b, rows in enumerate(x[b][keep[b]] for b in range(3)):
        assert torch.equal(grid[b, : len(rows)], rows) and (grid[b, len(rows) :] == 3).all()
    assert torch.equal(packed.first_rows(1), x[:, :1])


def test_rows_that_would_suffice_by_chance_are_not_taken_for_equal_lengths():
    """Spare rows of a recording, as many as if nothing had been dropped: no kernel may guess equal lengths."""
    x, counts = tokens(), torch.tensor([7, 2, 4], dtype=torch.int32)
    dense = ragged.Padded(x, torch.arange(7).expand(3, 7), 7, count=7)
    chosen = ragged.Selection(torch.rand(3, 7).argsort(1), counts)
    spare = packing.take_packed(dense, chosen, lambda counts: (21, 7))
    assert spare.max_seqlen == 7 and spare.bound == 8 and spare.lengths.tolist() == [7, 2, 4]
    assert dense.flat().bound == 7 and packing.take_packed(dense, chosen).bound == 7


def test_a_selection_from_either_layout():
    """Packed and padded batches answer a selection with the same rows."""
    x = tokens()
    counts, index = torch.tensor([7, 2, 4], dtype=torch.int32), torch.rand(3, 7).argsort(1)
    dense = ragged.Padded(x, torch.arange(7).expand(3, 7), 7, count=7)
    packed = packing.take_packed(dense, ragged.Selection(index, counts))
    padded = packing.take_padded(dense, ragged.Selection(index, counts))
    for b, n in enumerate(counts.tolist()):
        start = int(packed.cu_seqlens[b])
        assert torch.equal(packed.ids[start : start + n], index[b, :n])
        assert torch.equal(padded.ids[b, :n], index[b, :n]) and (padded.ids[b, n:] == -1).all()
        assert torch.equal(packed.tokens[start : start + n], padded.tokens[b, :n])
        assert not padded.tokens[b, n:].any()


# --- waiting for the device. The meta device holds no numbers: whoever wants to read one gets an error.


@pytest.fixture
def waits(monkeypatch):
    """`read_sizes` answers a fixed (8, 5) and writes down that it was asked; nothing else can be read."""
    calls = []
    monkeypatch.setattr(packing, "read_sizes", lambda counts: calls.append(counts) or (8, 5))
    return calls


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_unknown_counts_cost_one_wait(waits):
    packed = ragged.pack(on_meta(3, 7, 4), on_meta(3, 7, dtype=torch.bool))
    assert len(waits) == 1 and packed.tokens.shape == (8, 4) and packed.max_seqlen == 5
    again = ragged.repack(packed, on_meta(8, dtype=torch.bool))
    assert len(waits) == 2
    assert ragged.unpack(again).shape == (3, 7, 4)
    assert len(waits) == 2


def test_known_counts_cost_none(waits):
    x, keep = on_meta(3, 7, 4), on_meta(3, 7, dtype=torch.bool)
    packed = ragged.pack(x, keep, counts=[3, 0, 5])
    again = ragged.repack(packed, on_meta(8, dtype=torch.bool), counts=[2, 0, 2])
    by_number = ragged.pack(x, on_meta(3, 2, dtype=torch.int64))
    assert [p.tokens.shape[0] for p in (packed, again, by_number)] == [8, 4, 6]
    assert [p.max_seqlen for p in (packed, again, by_number)] == [5, 2, 2]
    assert ragged.unpack(again).shape == ragged.unpack(by_number).shape == (3, 7, 4)
    assert not waits


def test_a_selection_with_an_upper_bound_costs_none(waits):
    """What a graph records: sizes from the host instead of from the device."""
    dense = ragged.Padded(on_meta(3, 7, 4), on_meta(3, 7, dtype=torch.int64), 7, count=7)
    selection = ragged.Selection(on_meta(3, 7, dtype=torch.int64), on_meta(3, dtype=torch.int32))
    packed = packing.take_packed(dense, selection, lambda counts: (16, 7))
    assert packed.tokens.shape == (16, 4) and packed.max_seqlen == 7
    assert packing.take_padded(dense, selection, 7).tokens.shape == (3, 7, 4)
    assert not waits
    packing.take_padded(dense, selection)
    assert len(waits) == 1


def test_both_sizes_come_in_one_piece(monkeypatch):
    """`read_sizes` brings one tensor to the host, once."""
    seen, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: seen.append(self) or original(self))
    assert packing.read_sizes(torch.tensor([3, 0, 5], dtype=torch.int32)) == (8, 5)
    assert len(seen) == 1
