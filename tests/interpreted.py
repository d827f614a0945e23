"""The Triton kernels on the CPU, through Triton's interpreter, against plain PyTorch.

Not collected by itself: the interpreter must be chosen before the package is imported, so tests/test_interpreter.py
runs this file in a process of its own. By hand: TRITON_INTERPRET=1 pytest tests/interpreted.py
"""

import itertools
import math
import re

import pytest
import sanitize
import torch
from attention_cases import (
    SHORT_K,
    SHORT_Q,
    assert_gradients_in_budget,
    assert_gradients_written,
    assert_in_budget,
    assert_lse,
    by_both_ways,
    dout_like,
    inputs,
    layouts,
)

import ragged
from ragged import launch, packing, tiles
from ragged import rows as row_ops
from ragged.gradients import split_projection
from ragged.kernels import attention as kernels
from ragged.pruners import Predictor
from ragged.rows import scores as score_ops
from ragged.rules import View
from ragged.speculation.trees import Plan, Tree, attend_trees

TINY = [3, 0, 1, 18]
HALF_AND_SINGLE = (torch.float32, torch.float16)


def test_the_interpreter_is_on():
    assert launch.INTERPRET and launch.usable(torch.device("cpu"))
    assert ragged.BACKENDS["triton"].why_not("cpu", torch.float32, 64) is None
    assert ragged.pick_backend("cpu", torch.float32, 64) == "triton"
    assert ragged.BACKENDS["triton"].why_not("cpu", torch.bfloat16, 64), "the interpreter has no bfloat16 product"


# --- attention


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("lengths", [[1], [1, 37], [15, 16, 17], [63, 64, 65], [0, 5, 0], [130], [0, 0]], ids=str)
@pytest.mark.parametrize("backend", ["triton", "paper_triton"])
def test_lengths(backend, lengths, dtype):
    arguments = inputs(lengths, heads=2, dtype=dtype)
    assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dim", [16, 24, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("backend", ["triton", "paper_triton"])
def test_head_dimensions(backend, dim, dtype):
    arguments = inputs(TINY, heads=2, dim=dim, dtype=dtype)
    assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("dim", [8, 15, 129, 256])
def test_other_head_dimensions_are_refused(dim):
    with pytest.raises(ValueError, match="head dimension"):
        ragged.varlen_attention(*inputs(TINY, dim=dim), backend="triton")


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_separate_lengths_and_log_sum_exp(dtype):
    for sizes in ({"lengths": TINY}, {"lengths": SHORT_Q, "lengths_k": SHORT_K}):
        arguments = inputs(**sizes, dtype=dtype)
        out, lse = ragged.varlen_attention(*arguments, return_lse=True, backend="triton")
        assert_in_budget(out, arguments)
        assert_lse(lse, arguments)
        assert torch.equal(out, ragged.varlen_attention(*arguments, backend="triton"))
    assert (lse[:, 3:10] == -math.inf).all() and not out[3:10].any()


def test_more_keys_than_the_short_tiles_take():
    """Both branches of the tile choice, with and without a rest."""
    for lengths, keys in (([70, 4], [4, 128]), ([2, 66], [133, 64])):
        arguments = inputs(lengths, heads=1, lengths_k=keys, dtype=torch.float16)
        out, lse = ragged.varlen_attention(*arguments, return_lse=True, backend="triton")
        assert_in_budget(out, arguments)
        assert_lse(lse, arguments)


# Lengths around those at which a tile or a piece of keys is just full; in a large batch and in a small one.
STEPS = [(n, True) for n in (1, 16, 17, 33, 64, 65, 81, 97, 129, 161, 197)] + [(n, False) for n in (5, 48, 96, 128)]


@pytest.mark.parametrize("n, many", STEPS)
def test_equal_lengths_and_lengths_that_only_look_equal(n, many, monkeypatch):
    """A buffer with room for equal lengths, whatever the offsets say: from them alone an image knows its keys."""
    if many:  # choose as for a large batch
        monkeypatch.setattr(tiles, "FEW", 0)
    kernels.choose_tiles.cache_clear()
    for lengths in ([n, n], [n // 3, n]):
        q, k, v, *sizes = inputs(lengths, heads=1, dtype=torch.float16)
        surplus = torch.full((2 * n - sum(lengths), 1, 16), math.nan, dtype=torch.float16)
        wide = (torch.cat((x, surplus)) for x in (q, k, v))
        out, lse = ragged.varlen_attention(*wide, *sizes, return_lse=True, backend="triton")
        assert_in_budget(out[: len(q)], (q, k, v, *sizes))
        assert_lse(lse[:, : len(q)], (q, k, v, *sizes))
    kernels.choose_tiles.cache_clear()


@pytest.mark.parametrize("backend", ["triton", "paper_triton"])
def test_every_kind_of_strides(backend):
    q, k, v, *sizes = inputs(TINY, dim=24)
    want = ragged.varlen_attention(q, k, v, *sizes, backend=backend)
    for kind in layouts(q):
        out = ragged.varlen_attention(*(layouts(x)[kind] for x in (q, k, v)), *sizes, backend=backend)
        assert torch.equal(out, want), kind
    mixed = layouts(q)["head_major"], layouts(k)["every_other_number"], layouts(v)["odd_offset"]
    assert torch.equal(ragged.varlen_attention(*mixed, *sizes, backend=backend), want)


# --- gradients


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("lengths", [[1], [1, 37], [15, 16, 17], [63, 64, 65], [0, 5, 0], [130], [0, 0]], ids=str)
def test_gradients(lengths, dtype):
    assert_gradients_in_budget("triton", inputs(lengths, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dim", [24, 64, 80, 128])
def test_gradients_of_other_head_dimensions(dim, dtype):
    assert_gradients_in_budget("triton", inputs(TINY, dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_gradients_of_separate_lengths_and_beyond_one_program(dtype):
    for lengths, keys in ((SHORT_Q, SHORT_K), ([5], [0]), ([300, 2], [7, 66])):
        assert_gradients_in_budget("triton", inputs(lengths, heads=1, lengths_k=keys, dtype=dtype))


def test_gradients_of_every_kind_of_strides():
    q, k, v, *sizes = inputs(TINY, dim=24)
    for kind in layouts(q):
        with torch.enable_grad():
            strided = [layouts(x)[kind].detach().requires_grad_() for x in (q, k, v)]
            out = ragged.varlen_attention(*strided, *sizes, backend="triton")
            assert_gradients_in_budget("triton", (q, k, v, *sizes), torch.autograd.grad(out, strided, dout_like(q)))


@pytest.mark.parametrize("lengths", [[3, 0, 18], [0, 0], [300, 1, 0]], ids=str)
def test_every_number_of_a_gradient_is_written(lengths, monkeypatch):
    assert_gradients_written(lengths, monkeypatch, heads=1, dtype=torch.float16)


def test_a_gradient_of_the_log_sum_exp():
    for lengths in (TINY, [260, 1]):
        q, k, v, *sizes = inputs(lengths, heads=1)
        found = []
        for function in (ragged.varlen_attention, ragged.varlen_attention_ref):
            with torch.enable_grad():
                leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
                out, lse = function(*leaves, *sizes, return_lse=True, backend="triton")
                found.append(torch.autograd.grad(out.square().sum() + 3 * lse.sum(), leaves))
        for got, want in zip(*found):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_projection_has_one_gradient():
    qkv, cu = torch.randn(22, 3, 2, 16).requires_grad_(), torch.tensor([0, 3, 22], dtype=torch.int32)
    with torch.enable_grad():
        parts, seen = split_projection(qkv), []
        parts[0].register_hook(seen.append)
        out = ragged.varlen_attention(*parts, cu, cu, 19, 19, backend="triton")
        (whole,) = torch.autograd.grad(out, qkv, dout_like(out.detach()))
    assert whole.data_ptr() == seen[0].data_ptr(), "dq stands in the gradient of the projection"
    assert_gradients_in_budget("triton", (*qkv.detach().unbind(1), cu, cu, 19, 19), whole.unbind(1))


# --- trees of guesses


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dim", [5, 48, 130])
@pytest.mark.parametrize("total, longest", [(12, 6), (9, 6), (4, 2)])
def test_rows_are_taken_and_normed_in_one_launch(total, longest, dim, dtype):
    """With and without something to add, surplus rows, and a capacity that is too small."""
    norm = torch.nn.LayerNorm(dim, eps=1e-3, dtype=dtype)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    x, more, ids = torch.randn(20, dim).to(dtype), torch.randn(20, dim).to(dtype), torch.arange(20)
    starts, counts = torch.tensor([0, 7, 14], dtype=torch.int32), torch.tensor([3, 0, 6], dtype=torch.int32)
    index = torch.stack([torch.randperm(6) for _ in range(3)])
    for added in (None, more):
        assert row_ops.norms_rows(x, added, total, norm)
        given = (x, ids, starts, index, counts, total, longest, added)
        *got, normed = row_ops.take_normed_rows(*given, norm)
        for a, b in zip(got, row_ops.take_rows(*given), strict=True):
            assert torch.equal(a, b)
        want = torch.nn.functional.layer_norm(got[0].float(), (dim,), norm.weight.float(), norm.bias.float(), norm.eps)
        torch.testing.assert_close(normed, want.to(dtype))
    for other in (torch.nn.LayerNorm(dim, dtype=torch.float64), torch.nn.LayerNorm(dim + 1, dtype=dtype)):
        assert not row_ops.norms_rows(x, None, total, other)
    assert not row_ops.norms_rows(x, None, row_ops.MOST_NORMED // dim + 1, norm)
    with torch.enable_grad():
        assert not row_ops.norms_rows(x.clone().requires_grad_(), None, total, norm)
    with torch.autocast("cpu", torch.bfloat16):
        assert not row_ops.norms_rows(x, None, total, norm)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("heads, kv_heads, dim", [(2, 2, 16), (6, 2, 24), (9, 3, 64)])
@pytest.mark.parametrize("piece, length", [(None, 3), (4, 3), (None, 40)])
def test_a_tree_s_rows_are_joined_as_in_pytorch(dtype, heads, kv_heads, dim, piece, length, monkeypatch):
    past, capacity, trees = [9, 0, 14], 64, [Tree((2, 2)), Tree((3,)), Tree((1,) * length)]
    plan = Plan(past, capacity, [t.sees for t in trees], heads, kv_heads, "cpu", piece)
    q = torch.randn(sum(t.nodes for t in trees), heads, dim).to(dtype)
    k, v = torch.randn(2, 3 * capacity, kv_heads, dim).to(dtype)
    out = attend_trees(q, k, v, plan, "reference")
    monkeypatch.setattr(launch, "usable", lambda device: False)
    want = attend_trees(q.double(), k.double(), v.double(), plan, "reference")
    torch.testing.assert_close(out.double(), want, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


# --- the row of CLS


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dim", [16, 48])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 1, 18], [70, 129]], ids=str)
def test_attention_of_cls(lengths, dim, dtype):
    q, k, _, cu, *_ = inputs(lengths, heads=3, dim=dim, dtype=dtype)
    sizes = (cu[:-1], cu.diff(), max(lengths), dim**-0.5)
    probs = score_ops.cls_attention(q, k, *sizes)
    assert probs.shape == q.shape[:2] and probs.dtype == torch.float32
    torch.testing.assert_close(probs, score_ops._cls_attention_torch(q, k, *sizes), rtol=1e-4, atol=1e-6)
    for b, length in enumerate(lengths):
        if length:
            torch.testing.assert_close(probs[cu[b] : cu[b + 1]].sum(0), torch.ones(3))


def test_attention_of_cls_leaves_padding_alone():
    """Images that own only a part of their slots: rows nobody owns are zero, whatever stands there."""
    q, k, *_ = inputs([20], heads=2)
    lengths, starts = torch.tensor([4, 10], dtype=torch.int32), torch.tensor([0, 10], dtype=torch.int32)
    k = k.clone()
    k[4:10] = math.nan
    probs = score_ops.cls_attention(q, k, starts, lengths, 10, 0.25)
    assert not probs[4:10].any() and probs.isfinite().all()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dim", [16, 48])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 1, 18], [17, 17], [70, 129], [3, 300]], ids=str)
def test_importance(lengths, dim, dtype, monkeypatch):
    q, k, v, cu, *_ = inputs(lengths, heads=3, dim=dim, dtype=dtype)
    known = lengths[0] if len(set(lengths)) == 1 else cu.diff()
    places = (cu[:-1], known, max(lengths))
    parts = score_ops.importance(q, k, v, *places, 0.3)
    assert parts.squares is not None and torch.equal(parts.probs.t(), score_ops.cls_attention(q, k, *places, 0.3))
    found = parts.grid()
    assert found.shape == (len(lengths), max(lengths)) and found.dtype == torch.float32
    for b, n in enumerate(lengths):
        rows = slice(cu[b], cu[b + 1])
        want = parts.probs[:, rows].sum(0) * v[rows].float().flatten(1).norm(dim=1)
        torch.testing.assert_close(found[b, :n], want)
        assert not found[b, n:].any()
    if max(lengths) > 1:  # the kernel that samples adds the parts up itself
        index, counts = score_ops.sampled_rows(parts, 1, 7, known)
        want, want_counts = score_ops.sampled_rows(found, 1, 7, known)
        assert torch.equal(counts, want_counts)
        for n, got, all_rows in zip(counts.tolist(), index, want, strict=True):
            assert torch.equal(got[:n].sort().values, all_rows[:n].sort().values)
    monkeypatch.setattr(score_ops.launch, "usable", lambda device: False)
    torch.testing.assert_close(score_ops.importance(q, k, v, *places, 0.3).grid(), found, rtol=1e-4, atol=1e-6)


def test_scores_are_not_launched_as_for_values_of_another_dtype(monkeypatch):
    """Under autocast normed queries and keys may be float32, and values half as wide."""
    q, k, v, cu, *_ = inputs([5, 3], heads=2, dim=16, dtype=torch.float32)
    keys, real = [], launch.start
    monkeypatch.setattr(launch, "start", lambda kernel, key, *rest: keys.append(key) or real(kernel, key, *rest))
    for values in (v, v.bfloat16()):
        parts = score_ops.importance(q, k, values, cu[:-1], cu.diff(), 5, 0.25)
        torch.testing.assert_close(parts.squares.sum(0), values.float().flatten(1).square().sum(1))
    assert keys[0] != keys[1]


# --- copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 5, 128, 130])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_move(dim, dtype, fused, monkeypatch):
    g = torch.Generator().manual_seed(dim)
    lengths = [13, 11, 1]
    cu = row_ops.offsets(torch.tensor(lengths, dtype=torch.int32))
    x, ids = torch.randn(25, dim, generator=g).to(dtype), torch.arange(25) * 10
    x[5] = math.nan  # a row of weight zero, which nobody asked for
    blend = torch.rand(3, 11, generator=g)
    blend[:, 5], blend[1, 2:], blend[2, 1:] = 0.0, 0.0, 0.0
    for rows in ([[]] * 3, [[12], [10], [0]], [[3, 3, 0, 12, 7, 4, 4, 2, 1], [10] * 9, [0] * 9]):
        index = torch.tensor(rows, dtype=torch.int64).view(3, -1)
        given = (x, ids, cu[:-1], torch.cat((index, index), 1)[:, : index.shape[1]], blend if fused else None)
        got, got_ids, got_cu = row_ops.move_rows(*given)
        count = index.shape[1]
        assert got_cu.dtype == torch.int32 and got_cu.tolist() == [b * (count + fused) for b in range(4)]
        got, got_ids = got.view(3, count + fused, dim), got_ids.view(3, count + fused)
        place = cu[:-1, None] + index
        assert torch.equal(got[:, :count], x[place]) and torch.equal(got_ids[:, :count], ids[place])
        if fused:
            assert (got_ids[:, count] == -1).all() and got[:, count].isfinite().all()
            for b, start in enumerate(cu[:-1].tolist()):
                own = x[start : start + 11].double().nan_to_num(0.0)
                want = blend[b, : len(own)].to(dtype).double() @ own
                torch.testing.assert_close(got[b, count].double(), want, rtol=5e-3, atol=5e-3)
        with monkeypatch.context() as without:
            without.setattr(launch, "usable", lambda device: False)
            for a, b in zip(row_ops.move_rows(*given), (got.flatten(0, 1), got_ids.flatten(), got_cu)):
                torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [5, 130])
def test_a_sum_is_moved_as_if_it_had_been_written_down(dim, dtype):
    """Bit for bit; a row that nobody asks for, or that weighs nothing, may hold anything."""
    x, more = (torch.randn(25, dim, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    more[5] = math.nan
    cu, ids = torch.tensor([0, 13, 24, 25], dtype=torch.int32), torch.arange(25)
    index, counts = torch.tensor([[12, 0, 3], [10, 2, 1], [0, 0, 0]]), torch.tensor([3, 2, 1], dtype=torch.int32)
    blend = torch.rand(3, 11)
    blend[:, 5], blend[2, 1:] = 0.0, 0.0
    for given in (None, blend):
        pairs = zip(row_ops.move_rows(x, ids, cu[:-1], index, given, more),
                    row_ops.move_rows(x + more, ids, cu[:-1], index, given), strict=True)  # fmt: skip
        assert all(torch.equal(a, b) and (a.isfinite().all() or a.dtype != dtype) for a, b in pairs)
    pairs = zip(row_ops.take_rows(x, ids, cu[:-1], index, counts, 8, 3, more),
                row_ops.take_rows(x + more, ids, cu[:-1], index, counts, 8, 3), strict=True)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 130])
@pytest.mark.parametrize("count", [1, 2])
def test_the_first_rows(count, dim, dtype, monkeypatch):
    x, starts = torch.randn(9, dim).to(dtype), torch.tensor([0, 3, 8, 9], dtype=torch.int32)
    got = row_ops.first_rows(x, starts, count)
    assert got.shape == (4, count, dim) and torch.equal(got[:, 0], x[[0, 3, 8, 8]])
    monkeypatch.setattr(launch, "usable", lambda device: False)
    assert torch.equal(got, row_ops.first_rows(x, starts, count))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_a_mask_as_an_index(prefix, monkeypatch):
    """More rows than a program looks at at a time, images of several lengths, and the same answer as PyTorch's."""
    lengths = torch.tensor([0, 1, 300, 29], dtype=torch.int32)
    cu = row_ops.offsets(lengths)
    for keep in (torch.zeros(330), torch.ones(330), torch.arange(330) % 3 == 1, torch.arange(330) == 329):
        keep = keep.bool()
        index, counts = row_ops.kept_rows(keep, cu, 300, prefix)
        with monkeypatch.context() as without:
            without.setattr(row_ops.launch, "usable", lambda device: False)
            want, want_counts = row_ops.kept_rows(keep, cu, 300, prefix)
        assert torch.equal(index, want) and torch.equal(counts, want_counts)
        own = keep[1:301].clone()
        own[:prefix] = True
        assert torch.equal(index[2, : counts[2]], own.nonzero()[:, 0])


@pytest.mark.parametrize("shape", [(), (3,), (130,)], ids=str)
def test_packed_numbers_as_a_grid(shape, monkeypatch):
    cu = torch.tensor([0, 3, 3, 20, 21], dtype=torch.int32)
    x = torch.randn(25, *shape)
    x[21:] = math.nan  # rows that no image owns
    for fill in (0.0, -math.inf):
        got = row_ops.grid_rows(x, cu, 17, fill)
        with monkeypatch.context() as without:
            without.setattr(launch, "usable", lambda device: False)
            assert torch.equal(got, row_ops.grid_rows(x, cu, 17, fill))
        assert torch.equal(got[2], x[3:20]) and torch.equal(got[0, :3], x[:3]) and (got[1] == fill).all()


@pytest.mark.parametrize("prefix, n, samples", [(1, 197, 196), (2, 30, 7), (0, 9, 1), (1, 578, 60), (1, 2, 5)])
def test_adaptive_sampling(prefix, n, samples, monkeypatch):
    """As PyTorch's, image by image; sums of another order may move a height that lies in the middle of two steps."""
    from ragged.rules import inverse_cdf

    scores = torch.rand(6, n, generator=torch.Generator().manual_seed(n)) ** 4
    scores[1], scores[2, prefix:] = 0.0, 1.0  # nothing, and all alike
    scores[3, prefix:] = torch.arange(n - prefix).remainder(3).float()
    lengths = torch.tensor([n, n, n, n, max(prefix, n // 2), prefix], dtype=torch.int32)
    scores[4, n // 2 :], scores[5, prefix:] = math.nan, math.nan  # padding
    for given in (lengths, n):
        rows = scores if given is lengths else scores[:4]
        got = inverse_cdf(rows, prefix, samples, given)
        with monkeypatch.context() as without:
            without.setattr(launch, "usable", lambda device: False)
            want = inverse_cdf(rows, prefix, samples, given)
        for b, (mine, theirs) in enumerate(zip(got.counts.tolist(), want.counts.tolist())):
            ours, those = got.index[b, :mine].tolist(), want.index[b, :theirs].tolist()
            assert ours[:prefix] == list(range(prefix)) and len(set(ours)) == mine
            values = [rows[b, i].item() for i in ours[prefix:]]
            assert values == sorted(values) and max(ours, default=-1) < (lengths[b] if given is lengths else n)
            assert len(set(ours) ^ set(those)) <= (0 if b in (1, 2, 3) else 2), (b, set(ours) ^ set(those))
        assert 0 <= got.index.min() and got.index.max() < n


def test_nan_scores_stay_in_their_image():
    from ragged.rules import inverse_cdf

    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    clean = inverse_cdf(scores, 1, 20, 50)
    scores[1, 7] = math.nan
    got = inverse_cdf(scores, 1, 20, 50)
    for b in (0, 2):
        n = clean.counts[b]
        assert got.counts[b] == n and torch.equal(got.index[b, :n], clean.index[b, :n])
    n = int(got.counts[1])
    assert 1 <= n <= 21 and len(set(got.index[1, :n].tolist())) == n and got.index.max() < 50


TAKEN = [*itertools.product((1, 3), (1, 5, 130)), (140, 5)]  # 140: more counts than are added up at once


@pytest.mark.parametrize("surplus", [0, 13, -3], ids=["exact", "surplus", "too small"])
@pytest.mark.parametrize("batch, dim", TAKEN, ids=str)
def test_take(batch, dim, surplus, monkeypatch):
    g = torch.Generator().manual_seed(batch)
    n = 11 if batch < 100 else 3  # the interpreter takes one program after the other
    x, ids = torch.randn(batch * n, dim, generator=g), torch.arange(batch * n) * 10
    starts = torch.arange(0, batch * n, n, dtype=torch.int32)
    index = torch.stack([torch.randperm(n, generator=g) for _ in range(batch)])
    counts = torch.randint(0, n + 1, (batch,), generator=g, dtype=torch.int32)
    counts[0] = 3
    total = int(counts.sum()) + surplus
    rows = torch.cat([b * n + index[b, :c] for b, c in enumerate(counts.tolist())])[:total]
    for longest in (n, 1):  # whoever says so: every row arrives
        tokens, new_ids, cu = row_ops.take_rows(x, ids, starts, index, counts, total, longest)
        assert torch.equal(tokens[: len(rows)], x[rows]) and torch.equal(new_ids[: len(rows)], ids[rows])
        assert not tokens[len(rows) :].any() and (new_ids[len(rows) :] == -1).all() and len(tokens) == total
        assert cu.dtype == torch.int32 and torch.equal(cu, row_ops.offsets(counts).clamp(max=total))
    monkeypatch.setattr(launch, "usable", lambda device: False)
    for got, want in zip(row_ops.take_rows(x, ids, starts, index, counts, total, n), (tokens, new_ids, cu)):
        assert torch.equal(got, want)


def test_what_a_norm_loses_after_wrapping_is_seen():
    from pruner_cases import pictures, small_vit

    model = ragged.RaggedViT(small_vit(), ragged.PRUNERS["ats"](at=(1,), samples=20), "triton")
    before = model(pictures(2))
    model.vit.blocks[1].norm2.bias = None
    got = model(pictures(2))
    torch.testing.assert_close(got, model.with_pruner(model.pruner, "sdpa_padded")(pictures(2)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, before)


def test_a_backend_that_was_named_runs_without_a_pruner_too():
    from pruner_cases import pictures, small_vit

    model, images = ragged.RaggedViT(small_vit(), None, "triton"), pictures(2)
    asked, real = [], model._run["packed_block"]
    model._run["packed_block"] = lambda *given: asked.append(given[-2]) or real(*given)
    torch.testing.assert_close(model(images), model.vit(images), rtol=1e-4, atol=1e-5)
    assert asked == ["triton"] * len(model.vit.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, prefix, count", [(197, 1, 98), (21, 2, 19), (20, 0, 20), (9, 1, 0), (578, 2, 100)])
def test_ranking(n, prefix, count, dtype, monkeypatch):
    scores = torch.randn(5, 2 * n, generator=torch.Generator().manual_seed(n)).to(dtype)[:, :n]
    scores[1] = (scores[1] * 2).round() / 2  # many equal ones
    scores[2] = 0.0
    scores[3, 5::3], scores[3, 6], scores[3, 7] = -0.0, 0.0, -math.inf
    scores[4, 3], scores[4, 4], scores[4, 8] = math.nan, math.inf, math.nan
    order = scores[:, prefix:].sort(dim=1, descending=True, stable=True).indices[:, :count] + prefix
    first = torch.arange(prefix).expand(5, prefix)
    beside = scores[:, prefix:].repeat_interleave(2, 1)[:, ::2]  # every other number
    given = {"rest": True}, {"patches_only": True, "rest": True}

    def both():
        for in_place in (False, True):
            for x, words in zip((scores, beside), given):
                yield in_place, *score_ops.best_rows(x, prefix, count, in_place=in_place, **words)

    ours = list(both())
    for in_place, index, rest in ours:
        assert torch.equal(index, torch.cat((first, order.sort(1).values if in_place else order), 1))
        want = torch.nn.functional.pad(scores[:, prefix:].float(), (prefix, 0)).scatter(1, index, 0.0)
        torch.testing.assert_close(rest, want, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(launch, "usable", lambda device: False)
    for (_, index, rest), (_, want, want_rest) in zip(ours, both()):
        assert torch.equal(index, want)
        torch.testing.assert_close(rest, want_rest, rtol=0, atol=0, equal_nan=True)
    assert score_ops.best_rows(scores, prefix, count)[1] is None


def test_ranking_by_the_mean_of_heads(monkeypatch):
    scores = torch.randn(3, 60, 6, generator=torch.Generator().manual_seed(0))[:, :50]
    want = score_ops.best_rows(scores.mean(-1), 1, 20, rest=True)
    for given in (scores, scores.transpose(0, 2).contiguous().transpose(0, 2)):
        got = score_ops.best_rows(given, 1, 20, rest=True)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])
    monkeypatch.setattr(launch, "usable", lambda device: False)
    assert torch.equal(score_ops.best_rows(scores, 1, 20, rest=True)[0], want[0])


def test_pack_repack_unpack():
    g = torch.Generator().manual_seed(0)
    x, keep = torch.randn(3, 11, 6, generator=g), torch.rand(3, 11, generator=g) < 0.6
    packed = ragged.pack(x, keep)
    assert torch.equal(packed.tokens, x[keep]) and packed.ids.tolist() == keep.nonzero()[:, 1].tolist()
    flags = torch.rand(2 * len(packed.ids), generator=g) < 0.5
    for flag in (flags[: len(packed.ids)], flags[::2]):  # a strided mask, too
        again = ragged.repack(packed, flag)
        assert torch.equal(again.tokens, packed.tokens[flag]) and torch.equal(again.ids, packed.ids[flag])
        back = keep.clone()
        back[keep] = flag
        assert torch.equal(ragged.unpack(again), x * back[..., None])
    strided = ragged.pack(x.transpose(1, 2), torch.ones(3, 12, dtype=torch.bool)[:, ::2])
    assert torch.equal(strided.tokens, x.transpose(1, 2).reshape(-1, 11))


@pytest.mark.parametrize("name", ["threshold_l2", "evit", "ats"])
def test_a_whole_model(name):
    from pruner_cases import pictures, small_vit

    kwargs = {"samples": 30} if name == "ats" else {"keep": 0.6}
    pruner = ragged.PRUNERS[name](at=(1, 2), **kwargs)
    with_kernels, without = (ragged.RaggedViT(small_vit(), pruner, backend=b) for b in ("triton", "reference"))
    a, b = with_kernels.trace(pictures(2)), without.trace(pictures(2))
    assert [stage.counts for stage in a.stages] == [stage.counts for stage in b.stages]
    assert (a.logits - b.logits).abs().max() <= 1e-4 * b.logits.abs().max()


def test_the_sanitizers_cases():
    """tests/sanitize.py is for a GPU; here it shows that it still runs, and that its results are right: of every kind
    of case the first that has more than one query."""
    kinds = {}
    for name, run, arguments in [*sanitize.attention_cases(), *sanitize.special_cases()]:
        if "q=1 " not in name:
            kinds.setdefault((run, re.sub(r"\w+=\d+|\d+", "", name)), arguments)
    assert len(kinds) >= 15 and len({run for run, _ in kinds}) == 8
    for (run, _), arguments in kinds.items():
        run("cpu", *arguments)


# --- gradients through the small kernels


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dim", [5, 130])
def test_rows_return_to_where_they_were(dim, dtype, monkeypatch):
    lengths = [9, 0, 1, 18]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    index = torch.stack([torch.cat((torch.randperm(n), torch.zeros(18 - n, dtype=torch.int64))) for n in lengths])
    counts, ids = torch.tensor([4, 0, 1, 11]).int(), torch.arange(28)
    run = lambda x: row_ops.take_rows(x, ids, cu[:-1], index, counts, 18, 11)[0]  # noqa: E731
    got, want = by_both_ways(monkeypatch, run, torch.randn(28, dim, dtype=dtype))
    assert torch.equal(*got, *want) and got[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_moved_rows_and_the_fused_token_have_gradients(dense, fused, dtype, monkeypatch):
    batch, width, dim = 3, 7, 130
    starts = torch.tensor([0, 7, 14] if dense else [0, 8, 15]).int()
    index = torch.stack([torch.randperm(width)[:4] for _ in range(batch)])
    blend = torch.rand(batch, width).scatter(1, index, 0.0)
    x, ids = torch.randn(21 if dense else 23, dim, dtype=dtype), torch.arange(23)
    ids = ids[: len(x)]
    leaves = (x, blend) if fused else (x,)
    run = lambda x, *b: row_ops.move_rows(x, ids, starts, index, b[0] if b else None)[0]  # noqa: E731
    got, want = by_both_ways(monkeypatch, run, *leaves)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("lengths", [[3, 0, 1, 18], [70, 129], 9], ids=str)
def test_the_row_of_cls_has_gradients(lengths, dtype, monkeypatch):
    cu = torch.tensor([0, *([9, 9] if lengths == 9 else lengths)]).cumsum(0).int()
    sizes = (cu[:-1], 9 if lengths == 9 else cu.diff(), int(cu.diff().max()), 0.3)
    qkv = torch.randn(int(cu[-1]), 3, 2, 20, dtype=dtype)
    run = lambda qkv: score_ops.cls_attention(qkv[:, 0], qkv[:, 1], *sizes)  # noqa: E731
    (got,), (want,) = by_both_ways(monkeypatch, run, qkv)
    torch.testing.assert_close(got, want, rtol=2e-3 if dtype == torch.float16 else 1e-4, atol=1e-5)
    assert got[:, 1].abs().sum() > 0


def test_a_nan_of_one_image_reaches_no_other_gradient(monkeypatch):
    x = torch.randn(14, 5)
    x[3] = math.nan
    index, blend = torch.tensor([[0, 2], [0, 4]]), torch.rand(2, 7)
    with torch.enable_grad():
        x.requires_grad_(), blend.requires_grad_()
        out = row_ops.move_rows(x, torch.arange(14), torch.tensor([0, 7]).int(), index, blend)[0]
        of_x, of_blend = torch.autograd.grad(out[3:].square().sum() + out[:2].nan_to_num().sum(), (x, blend))
    assert of_x[7:].isfinite().all() and of_blend[1].isfinite().all()


# --- the network of DynamicViT


@pytest.mark.parametrize("dim", [48, 192])
def test_scores_of_a_predictor(dim):
    torch.manual_seed(dim)
    predictor, x = Predictor(dim).half().eval(), torch.randn(3, 70, dim).half()
    dense = packing.Padded(x, torch.arange(70).expand(3, 70), 70, count=70)
    counts = [70, 7, 2]
    chosen = packing.Selection(dense.ids, torch.tensor(counts, dtype=torch.int32))
    for state in (dense, dense.flat(), packing.take_packed(dense, chosen), packing.take_padded(dense, chosen)):
        found = predictor.scores(View(state, 2, 0))
        for b, n in enumerate([70] * 3 if state.count else counts):
            want = predictor(x[b : b + 1, 2:n])[0, :, 0].float()
            torch.testing.assert_close(found[b, : n - 2], want, rtol=2e-3, atol=2e-3)
            assert (found[b, n - 2 :] == -math.inf).all()


def test_a_predictor_that_is_not_plain_is_called():
    state = packing.Padded(torch.randn(1, 9, 48).half(), torch.arange(9)[None], 9, count=9)
    predictor = Predictor(48).half()
    assert predictor.scores(View(state, 1, 0)) is not None
    handle = predictor.out_conv[2].register_forward_hook(lambda *a: None)
    assert predictor.scores(View(state, 1, 0)) is None
    handle.remove()
    predictor.in_conv[1] = torch.nn.Sequential(predictor.in_conv[1])
    assert predictor.scores(View(state, 1, 0)) is None
    assert Predictor(48).scores(View(state, 1, 0)) is None, "other weights than tokens"
