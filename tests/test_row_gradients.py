"""Gradients through the small kernels, against finite differences in float64 and against plain indexing."""

import pytest
import torch

import ragged
from ragged import packing, rows
from ragged.packing import Padded, Selection
from ragged.rows import scores

LENGTHS = [4, 0, 1, 6, 3]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def some_rows(lengths, width, seed=1):
    """Of every image a few rows, in any order, and how many: index (batch, width), counts (batch,)."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.cat((torch.randperm(n, generator=g), torch.zeros(width - n, dtype=torch.int64)))
                         for n in lengths])  # fmt: skip
    return index, torch.tensor([(n + 1) // 2 for n in lengths], dtype=torch.int32)


@torch.enable_grad()
@pytest.mark.parametrize("surplus", [0, 2])
def test_rows_that_are_taken(surplus):
    index, counts = some_rows(LENGTHS, 6)
    x, cu = random(sum(LENGTHS) + 1, 3), offsets(LENGTHS)
    ids, total = torch.arange(len(x)), int(counts.sum()) + surplus
    take = lambda x: rows.take_rows(x, ids, cu[:-1], index, counts, total, 6)[0]  # noqa: E731
    assert torch.autograd.gradcheck(take, (x,))
    both = lambda x, more: rows.take_rows(x, ids, cu[:-1], index, counts, total, 6, more)[0]  # noqa: E731
    assert torch.autograd.gradcheck(both, (x.detach(), random(len(x), 3, seed=5)))
    weights = torch.randn(total, 3, dtype=torch.float64)
    (take(x) * weights).sum().backward()
    taken = [int(cu[b]) + int(r) for b in range(5) for r in index[b, : counts[b]]]
    assert torch.equal(x.grad[taken], weights[: len(taken)])
    assert x.grad.abs().sum(1).count_nonzero() == len(taken)
    ids_of = rows.take_rows(x, ids, cu[:-1], index, counts, total, 6)[1]
    assert ids_of[: len(taken)].tolist() == taken and not ids_of.requires_grad


@torch.enable_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_are_moved(fused, shared):
    """shared: between the images stand rows that belong to none."""
    starts = torch.tensor([0, 5, 11] if shared else [0, 5, 10], dtype=torch.int32)
    x, index = random(17 if shared else 15, 4), torch.tensor([[0, 3, 1], [0, 1, 4], [2, 0, 3]])
    blend, stays = random(3, 5, seed=2), torch.zeros(3, 5, dtype=torch.bool).scatter(1, index, True)
    ids = torch.arange(len(x))
    move = lambda x, *b: rows.move_rows(x, ids, starts, index, b[0].masked_fill(stays, 0) if b else None)[0]  # noqa: E731
    arguments = (x, blend) if fused else (x,)
    assert torch.autograd.gradcheck(move, arguments)
    both = lambda more: rows.move_rows(x, ids, starts, index, blend.detach() if fused else None, more)[0]  # noqa: E731
    assert torch.autograd.gradcheck(both, (random(len(x), 4, seed=6),))
    weights = torch.randn(3 * (3 + fused), 4, dtype=torch.float64)
    got = torch.autograd.grad((move(*arguments) * weights).sum(), arguments)
    plain, _ = rows._move_rows_torch(x, ids, starts, index, blend.masked_fill(stays, 0) if fused else None)
    want = torch.autograd.grad((plain * weights).sum(), arguments)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    if fused:
        assert (got[1][stays] == 0).all() and (got[1][~stays] != 0).all()


@torch.enable_grad()
@pytest.mark.parametrize("lengths", [LENGTHS, 4], ids=["ragged", "equal"])
def test_attention_of_cls(lengths):
    batch, longest = (5, 6) if lengths is LENGTHS else (3, 4)
    cu = offsets(LENGTHS if lengths is LENGTHS else [4] * 3)
    q, k = random(int(cu[-1]), 2, 3), random(int(cu[-1]), 2, 3, seed=3)
    sizes = (cu[:-1], cu.diff() if lengths is LENGTHS else 4, longest, 0.7)
    look = lambda q, k: scores.cls_attention(q, k, *sizes)  # noqa: E731
    assert look(q, k).dtype == torch.float64 and torch.autograd.gradcheck(look, (q, k))
    assert scores.cls_attention(q.float(), k.float(), *sizes).dtype == torch.float32


@torch.enable_grad()
def test_grids_and_picked_rows():
    x, cu = random(sum(LENGTHS) + 2, 3), offsets(LENGTHS)
    assert torch.autograd.gradcheck(lambda x: rows.grid_rows(x, cu, 6, 0.5), (x,))
    wanted, real = torch.tensor([[0, 4, 0], [5, 9, 2]]), torch.tensor([[1, 1, 0], [1, 1, 1]]) > 0
    assert torch.autograd.gradcheck(lambda x: rows.picked_rows(x, wanted, real), (x,))
    assert torch.autograd.gradcheck(lambda x: rows.picked_rows(x, wanted[1]), (x,))


@torch.enable_grad()
def test_pack_and_unpack():
    x, keep = random(3, 5, 2), torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]) > 0
    assert torch.autograd.gradcheck(lambda x: ragged.pack(x, keep).tokens, (x,))
    assert torch.autograd.gradcheck(lambda x: ragged.unpack(ragged.pack(x, keep), 0.5), (x,))
    again = lambda x: ragged.packing.repack(ragged.pack(x, keep), torch.arange(9) % 2 == 0).tokens  # noqa: E731
    assert torch.autograd.gradcheck(again, (x,))
    x.grad = None
    ragged.unpack(ragged.pack(x, keep)).sum().backward()
    assert torch.equal(x.grad[..., 0], keep.double())


@torch.enable_grad()
def test_a_row_that_is_packed_twice_gets_both_gradients():
    x, index = random(2, 4, 3), torch.tensor([[0, 2, 2], [3, 3, 3]])
    packed = ragged.pack(x, index)
    with torch.no_grad():
        plain = ragged.pack(x, index)
    for name in ("tokens", "ids", "cu_seqlens"):
        assert torch.equal(getattr(packed, name), getattr(plain, name))
    assert (packed.count, packed.max_seqlen, packed.seqlen) == (plain.count, plain.max_seqlen, plain.seqlen)
    packed.tokens.sum().backward()
    assert x.grad[..., 0].tolist() == [[1, 0, 2, 0], [0, 0, 0, 3]]


@torch.enable_grad()
@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("counts", [3, torch.tensor([2, 3, 1], dtype=torch.int32)], ids=["equal", "ragged"])
def test_rows_of_a_padded_batch(counts, width):
    x, (index, _), ids = random(3, 5, 2), some_rows([5] * 3, 5), torch.arange(5).expand(3, 5)
    take = lambda x: packing.take_padded(Padded(x, ids, 5, count=5), Selection(index, counts), width).tokens  # noqa: E731
    assert torch.autograd.gradcheck(take, (x,))


@torch.enable_grad()
def test_a_gradient_of_a_gradient_is_refused_in_words():
    x, cu = random(4, 3), offsets([4])
    out = rows.take_rows(x, torch.arange(4), cu[:-1], torch.tensor([[0, 2]]), torch.tensor([2]).int(), 2, 2)[0]
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
