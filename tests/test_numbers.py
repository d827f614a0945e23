"""Numbers at the edge: large scores, constant rows, nothing at all, NaN in one image, the ends of float16, and tensors
of more than 2**31 elements. On the CPU, in Triton's interpreter (tests/test_interpreter.py), and marked `gpu` on CUDA.

Two limits are everybody's who keeps unnormalised sums, and are not tested away: values within one rounding of the
largest float16 may come out as inf, and so may values whose sum over an image's keys passes the largest float32.
"""

import math

import pytest
import torch
from attention_cases import (
    SHORT,
    SHORT_K,
    SHORT_Q,
    assert_in_budget,
    assert_lse,
    assert_right,
    everywhere,
    inputs,
    offsets,
    places,
    poisoned,
    skip_unless_usable,
)
from pruner_cases import ALL, VARIANTS, pictures, small_vit
from pruner_cases import arguments as settings_for

import ragged
from ragged import launch
from ragged import rows as row_ops
from ragged.pruners import GivenLengths
from ragged.rows import scores as score_ops

gpu = pytest.mark.gpu
HALF, SINGLE = torch.float16, torch.float32
DTYPES = {"fp16": HALF, "fp32": SINGLE}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
WITH_LSE = [p for p in places(ragged.BACKENDS) if (p[1] if isinstance(p, tuple) else p.values[1]) in
            ("triton", "flash_attn", "torch_varlen", "sdpa_padded", "reference")]  # fmt: skip
COUNTS = [16, 1, 0, 7, 2]


def attend(q, k, v, counts, backend, **options):
    cu, longest = offsets(counts, q.device), max(1, *counts)
    return ragged.varlen_attention(q, k, v, cu, cu, longest, longest, backend=backend, **options)


def basis(counts, device, dtype, height, dim=16):
    """q and k whose scores are known: in every image query i meets key i with height**2 / 4, all others with 0."""
    eye = torch.eye(dim)[:, None] * height
    return torch.cat([eye[:n] for n in counts]).to(device, dtype)


def values(counts, device, dtype, dim=16):
    return torch.randn(sum(counts), 1, dim, generator=torch.Generator().manual_seed(5)).to(device, dtype)


def images_of(x, counts):
    return x.split(counts)


def assert_close(got, want, scale=1.0, roundings=4):
    """Within so many roundings of numbers up to `scale` times as large as the result."""
    allowed = roundings * torch.finfo(got.dtype).eps * scale * max(1.0, float(want.abs().max()) if len(want) else 0.0)
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=0, atol=allowed)


# --- large scores


@dtypes
@everywhere
def test_scores_of_plus_and_minus_ten_thousand(device, backend, dtype):
    """200 * 200 / 4: with plus the own key takes all, with minus it gets nothing unless it is the only one."""
    skip_unless_usable(device, backend, dtype, 16)
    q, v = basis(COUNTS, device, dtype, 200.0), values(COUNTS, device, dtype)
    assert_close(attend(q, q, v, COUNTS, backend), v)
    out = attend(q, -q, v, COUNTS, backend)
    for got, own in zip(images_of(out, COUNTS), images_of(v, COUNTS)):
        n = len(own)
        want = own if n == 1 else (own.double().sum(0, keepdim=True) - own.double()) / max(1, n - 1)
        assert_close(got, want)


@pytest.mark.parametrize("device, backend", WITH_LSE)
def test_log_sum_exp_of_large_scores(device, backend):
    dtype = SINGLE if device == "cpu" else HALF
    skip_unless_usable(device, backend, dtype, 16)
    q, v = basis(COUNTS, device, dtype, 200.0), values(COUNTS, device, dtype)
    for sign, want in ((1, lambda n: 1e4), (-1, lambda n: -1e4 if n == 1 else math.log(n - 1))):
        _, lse = attend(q, sign * q, v, COUNTS, backend, return_lse=True)
        wanted = torch.tensor([want(n) for n in COUNTS for _ in range(n)])
        torch.testing.assert_close(lse[0].cpu(), wanted, rtol=1e-6, atol=1e-5)


@dtypes
@everywhere
def test_random_scores_up_to_ten_thousand(device, backend, dtype):
    """A float32 score of 10,000 is known to 0.0005, and so is every weight: that much, and not more, may be lost."""
    skip_unless_usable(device, backend, dtype, 16)
    if backend == "paper_padded" and dtype == HALF:
        pytest.skip("unfused, the scores themselves are rounded to half precision")
    q, k, v, *sizes = inputs(SHORT, heads=2, dtype=SINGLE, device=device)
    q, k = (x.mul(50).to(dtype) for x in (q, k))
    arguments = (q, k, v.to(dtype), *sizes)
    out = ragged.varlen_attention(*arguments, backend=backend)
    want = ragged.varlen_attention_ref(*arguments)
    scores = torch.einsum("qhd,khd->hqk", q[:3].double(), k[:3].double()) / 4
    assert 2e3 < scores.abs().max() < 2e4
    error = (out.cpu().double() - want).abs().max()
    assert error <= (1e-2 + 2 * torch.finfo(dtype).eps) * want.abs().max()


@dtypes
@pytest.mark.parametrize("score", [1e4, 100.0, 0.0, -100.0, -1e4])
@everywhere
def test_constant_rows(device, backend, dtype, score):
    """All keys alike: the mean of the values, and the value itself where these are alike too."""
    skip_unless_usable(device, backend, dtype, 16)
    side = math.sqrt(abs(score) / 4)  # 16 products of side * side, over 4
    q = torch.full((sum(COUNTS), 1, 16), side, device=device, dtype=dtype)
    k, v = q if score >= 0 else -q, values(COUNTS, device, dtype)
    for got, own in zip(images_of(attend(q, k, v, COUNTS, backend), COUNTS), images_of(v, COUNTS)):
        if len(own):
            assert_close(got, own.double().mean(0, keepdim=True).expand(got.shape), float(own.abs().max()))
    same = torch.full_like(v, 1.5)
    assert_close(attend(q, k, same, COUNTS, backend), same)


# --- the ends of float16


@everywhere
def test_scores_past_the_largest_float16(device, backend):
    """q . k reaches 1.4 million, 20 times the largest float16, and is nobody's result: sums are kept in float32."""
    skip_unless_usable(device, backend, HALF, 16)
    if backend == "paper_padded":
        pytest.skip("unfused, q . k is stored in half precision, overflows and turns into NaN: as published")
    if (device, backend) == ("cuda", "sdpa_padded"):
        pytest.skip("PyTorch's SDPA with a mask loses such scores on CUDA: off by up to 1.5 here on an H200")
    q, v = torch.full((sum(COUNTS), 1, 16), 300.0, device=device, dtype=HALF), values(COUNTS, device, HALF)
    for k in (q, -q, q * torch.linspace(-1, 1, len(q), device=device, dtype=HALF)[:, None, None]):
        sizes = (offsets(COUNTS, device),) * 2
        arguments = (q, k, v, *sizes, 16, 16)
        out = ragged.varlen_attention(*arguments, backend=backend)
        want = ragged.varlen_attention_ref(*arguments)
        assert out.isfinite().all()
        assert_close(out, want, float(v.abs().max()))


@everywhere
def test_values_near_the_largest_float16(device, backend):
    """Sums of 16 such values would overflow; weighted means do not, and come out as the reference has them."""
    skip_unless_usable(device, backend, HALF, 16)
    q = inputs(COUNTS, heads=1, dtype=HALF, device=device)[0]
    for v in (torch.full_like(q, 60_000.0), values(COUNTS, device, HALF).sign() * 60_000.0):
        arguments = (q, q, v, *(offsets(COUNTS, device),) * 2, 16, 16)
        out = ragged.varlen_attention(*arguments, backend=backend)
        want = ragged.varlen_attention_ref(*arguments)
        assert out.isfinite().all()
        assert_right(out, arguments, rounding=2)
        assert want.abs().max() > 59_000


# --- nothing at all


@pytest.mark.parametrize("device, backend", WITH_LSE)
def test_empty_images_bring_no_nan(device, backend):
    """Wherever the empty ones stand, without queries, without keys or without both."""
    skip_unless_usable(device, backend)
    dtype = SINGLE if device == "cpu" else HALF
    for counts_q, counts_k in (([0, 0, 3], [0, 4, 0]), ([2, 0, 0], [0, 0, 0]), ([0, 5, 1, 0], [0, 5, 0, 0]),
                               ([1], [0]), ([3, 2], [0, 7])):  # fmt: skip
        arguments = inputs(counts_q, heads=2, dim=64, dtype=dtype, device=device, lengths_k=counts_k)
        out, lse = ragged.varlen_attention(*arguments, return_lse=True, backend=backend)
        assert_right(out, arguments)
        assert_lse(lse, arguments)
        keyless = torch.repeat_interleave(torch.tensor(counts_k) == 0, torch.tensor(counts_q))
        assert not out.cpu()[keyless].any() and (lse.cpu()[:, keyless] == -math.inf).all()
        assert lse.cpu()[:, ~keyless].isfinite().all()


# --- one bad image


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65504.0])
@everywhere
def test_a_broken_image_stays_alone(device, backend, value):
    skip_unless_usable(device, backend)
    dtype, dim = (SINGLE, 16) if device == "cpu" else (HALF, 64)
    cases = [inputs(SHORT, dim=dim, dtype=dtype, device=device)]
    if device == "cuda":
        cases = [inputs([63, 1, 130, 64, 5], dim=dim, dtype=dtype, device=device)]
    if backend != "paper_triton":
        cases.append(inputs(SHORT_Q, lengths_k=SHORT_K, dim=dim, dtype=dtype, device=device))
    for arguments in cases:
        want = ragged.varlen_attention(*arguments, backend=backend)
        for victim in range(0, 5, 2 if launch.INTERPRET else 1):
            broken, others = poisoned(arguments, victim, value)
            out = ragged.varlen_attention(*broken, backend=backend)
            same = torch.equal(out[others], want[others])
            assert same or (backend.endswith("padded") and device == "cpu"), (backend, victim)
            torch.testing.assert_close(out[others], want[others], rtol=0, atol=1e-6)
            if math.isnan(value) and arguments[4].diff()[victim] > 0:
                assert out[~others].isnan().all(), "what is broken looks broken"


@devices
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_image_s_scores_stay_alone(device, value):
    q, k, _, cu, *_ = inputs([5, 1, 18, 3], heads=3, device=device)
    sizes = (cu[:-1], cu.diff(), 18, 0.25)
    want = score_ops.cls_attention(q, k, *sizes)
    for victim in range(4):
        broken, others = poisoned((q, k, q, cu, cu, 18, 18), victim, value)
        assert torch.equal(score_ops.cls_attention(*broken[:2], *sizes)[others], want[others])


@devices
def test_packing_carries_broken_numbers_and_spreads_none(device):
    x = torch.randn(3, 20, 130, generator=torch.Generator().manual_seed(0))
    x[1], x[2, 3, 4] = math.nan, -math.inf
    keep = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    x, keep = x.to(device), keep.to(device)
    packed = ragged.pack(x, keep)
    torch.testing.assert_close(packed.tokens, x[keep], rtol=0, atol=0, equal_nan=True)
    want = torch.where(keep[..., None], x, 0.0)  # not x * keep: NaN times nothing is NaN
    torch.testing.assert_close(ragged.unpack(packed), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("device, backend", places(ragged.BACKENDS))
def test_a_broken_picture_stays_alone(device, backend, name, value):
    """Through a pruner that ranks, counts and samples, with a different number of rows in the broken image."""
    skip_unless_usable(device, backend, SINGLE, 16)
    kwargs = {"ats": {"samples": 25}, "tau": {"tau": 1.0}}.get(name, settings_for(name, 0.6))
    pruner = ragged.PRUNERS[VARIANTS.get(name, name)](**kwargs, at=(1, 3))
    vit = small_vit() if device == "cpu" else _on_cuda()
    model = ragged.RaggedViT(vit, pruner, backend=backend)
    images = pictures().to(device)
    want = model.trace(images)
    for victim in (0, 3):
        broken = images.clone()
        broken[victim] = value
        got = model.trace(broken)
        others = [b for b in range(4) if b != victim]
        for mine, other in zip(got.stages, want.stages):
            assert all(torch.equal(mine.ids[b], other.ids[b]) for b in others)
            assert mine.ids[victim][0] == 0
        torch.testing.assert_close(got.logits[others], want.logits[others], rtol=1e-4, atol=1e-4)
        assert got.logits[victim].isnan().all()


def _on_cuda():
    import copy

    return copy.deepcopy(small_vit()).cuda()


@gpu
@pytest.mark.parametrize("name", ["tau", "given_lengths", "evit"])
def test_a_broken_picture_stays_alone_in_a_graph(name):
    """The rows past the real total are copies of real ones, and nobody's."""
    vit = ragged.load_deit("deit_tiny", weights="random").to("cuda", HALF)
    pruner = {"tau": lambda: ragged.PRUNERS["threshold_l2"](tau=1.0), "given_lengths": lambda: GivenLengths([90] * 4),
              "evit": lambda: ragged.PRUNERS["evit"](keep=0.5)}[name]()  # fmt: skip
    captured = ragged.RaggedViT(vit, pruner).to("cuda").capture(4)
    images = pictures(4, 224).to("cuda", HALF)
    want = captured(images)
    for victim in range(4):
        broken = images.clone()
        broken[victim] = math.nan
        got = captured(broken)
        others = [b for b in range(4) if b != victim]
        assert (got[others] - want[others]).abs().max() < 0.007 and got[victim].isnan().all()
        assert torch.equal(captured(images), want), "and nothing stays behind for the next call"


# --- buffers are taken as they come


@pytest.fixture
def dirty(monkeypatch):
    """Uninitialised memory holds NaN (integers: their largest), so that whatever is not written shows."""
    monkeypatch.setattr(launch, "_empty_cuda", None)  # it takes memory past PyTorch's own filling
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.zeros(3).new_empty(5).isnan().all() and torch.empty(3, dtype=torch.int64).min() == 2**63 - 1
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@dtypes
@everywhere
def test_every_number_is_written(dirty, device, backend, dtype):
    dims = (64, 80) if device == "cuda" else (16, 24)
    cases = [([70, 4, 1], None), ([0, 5, 0], None)]
    if backend != "paper_triton":
        cases += [(SHORT_Q, SHORT_K), ([9], [0])]
    for dim in dims:
        skip_unless_usable(device, backend, dtype, dim)
        for counts, counts_k in cases:
            arguments = inputs(counts, dim=dim, dtype=dtype, device=device, lengths_k=counts_k)
            for _ in range(1 if launch.INTERPRET else 2):  # the second call may take a shorter way
                assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)
            if backend == "triton":
                out, lse = ragged.varlen_attention(*arguments, backend=backend, return_lse=True)
                assert_in_budget(out, arguments)
                assert_lse(lse, arguments)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@devices
def test_every_copied_and_scored_number_is_written(dirty, device):
    for dim in (1, 5, 130):
        x, ids = torch.randn(29, dim, device=device), torch.arange(29, device=device)
        rows = torch.tensor([3, 3, 0, 28, 7], device=device)
        first, blend = torch.zeros(1, dtype=torch.int32, device=device), torch.full((1, 29), 0.5, device=device)
        got, got_ids, cu = row_ops.move_rows(x, ids, first, rows[None], blend)
        assert torch.equal(got[:-1], x[rows]) and got_ids.tolist() == [*rows.tolist(), -1] and cu.tolist() == [0, 6]
        torch.testing.assert_close(got[-1], 0.5 * x.sum(0))
        keep = torch.arange(29, device=device) % 3 == 1
        packed = ragged.pack(x[None], keep[None])
        assert torch.equal(packed.tokens, x[keep]) and torch.equal(packed.ids, ids[keep])
        starts, counts, index = (torch.tensor(t, device=device) for t in ([0, 20], [3, 2], [[2, 0, 1], [8, 4, 0]]))
        got, got_ids, cu = row_ops.take_rows(x, ids, starts.int(), index, counts.int(), 9, 3)
        rows = torch.tensor([2, 0, 1, 28, 24], device=device)
        assert torch.equal(got[:5], x[rows]) and not got[5:].any() and cu.tolist() == [0, 3, 5]
        assert got_ids.tolist() == [*rows.tolist(), -1, -1, -1, -1]
    scores = torch.arange(40, device=device).float().remainder(7).view(2, 20)
    want = scores[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, :12] + 1
    assert torch.equal(score_ops.best_rows(scores, 1, 12)[0], torch.nn.functional.pad(want, (1, 0)))
    q, k, _, cu, *_ = inputs([70, 1, 5], heads=3, device=device)
    probs = score_ops.cls_attention(q, k, cu[:-1], cu.diff(), 70, 0.25)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs[:70].sum(0), torch.ones(3, device=device))


# --- more than 2**31 elements


def _room(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


@gpu
@pytest.mark.parametrize("backend", ["triton", "paper_triton"])
@pytest.mark.parametrize("ragged_lengths", [False, True], ids=["equal", "ragged"])
def test_more_than_two_to_the_31_elements(backend, ragged_lengths):
    """q, k, v and the output have 2.2 billion elements each, 18 GB in all; equal lengths take the resident kernel,
    others the stream kernel. Images are looked at in the beginning, across the 2**31st element, and at the end."""
    _room(26)
    heads, dim, images = 32, 64, 5400
    counts = [197] * images if not ragged_lengths else [197 + (b % 7) - 3 for b in range(images)]
    longest, total = max(counts), sum(counts)
    assert total * heads * dim > 2**31
    q, k, v = (torch.empty(total, heads, dim, device="cuda", dtype=HALF).normal_() for _ in range(3))
    cu = offsets(counts, "cuda")
    result = ragged.varlen_attention(q, k, v, cu, cu, longest, longest, backend=backend, return_lse=backend == "triton")
    out = result[0] if backend == "triton" else result
    starts = cu.tolist()
    across = next(b for b in range(images) if starts[b + 1] * heads * dim > 2**31)
    for b in (0, 1, across - 1, across, across + 1, images - 1):
        rows, one = slice(starts[b], starts[b + 1]), offsets(counts[b : b + 1], "cuda")
        arguments = (q[rows], k[rows], v[rows], one, one, counts[b], counts[b])
        assert_in_budget(out[rows], arguments)
        if backend == "triton":
            assert_lse(result[1][:, rows], arguments)
    if backend == "triton":
        _check_cls(q, k, cu, counts, (0, across, images - 1))


def _check_cls(q, k, cu, counts, images):
    """The row of CLS on the same tensors."""
    lengths = cu.diff()
    probs = score_ops.cls_attention(q, k, cu[:-1], lengths, max(counts), 0.125)
    for b in images:
        rows = slice(*cu[b : b + 2].tolist())
        want = torch.einsum("hd,nhd->nh", q[rows.start].double(), k[rows].double()).mul(0.125).softmax(0)
        torch.testing.assert_close(probs[rows].double(), want, rtol=1e-3, atol=1e-6)


@gpu
def test_copies_of_more_than_two_to_the_31_elements():
    _room(14)
    n, dim = 1_060_000, 2048
    assert n * dim > 2**31
    x, ids = torch.empty(n, dim, device="cuda", dtype=HALF).normal_(), torch.arange(n, device="cuda")
    keep = ids % 100 != 0
    total = int(keep.sum())
    packed = ragged.pack(x[None], keep[None])
    first = torch.zeros(1, dtype=torch.int32, device="cuda")
    moved = row_ops.move_rows(x, ids, first, keep.nonzero()[None, :, 0], None)[:2]
    for got, got_ids in ((packed.tokens, packed.ids), moved):
        assert torch.equal(got_ids, ids[keep])
        for rows in (slice(0, 1000), slice(total - 1000, total), slice(1_045_000, 1_046_000)):
            assert torch.equal(got[rows], x[got_ids[rows]])
        del got
    del got_ids
    starts, counts = torch.tensor([0, n // 2], device="cuda").int(), torch.tensor([n // 2, n // 2], device="cuda").int()
    index = torch.arange(n // 2, device="cuda").flip(0).expand(2, -1).contiguous()
    got, got_ids, cu = row_ops.take_rows(x, ids, starts, index, counts, n, n // 2)
    assert cu.tolist() == [0, n // 2, n] and torch.equal(got_ids, torch.cat((index[0], index[0] + n // 2)))
    for rows in (slice(0, 1000), slice(n - 1000, n)):
        assert torch.equal(got[rows], x[got_ids[rows]])
