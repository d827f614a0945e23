"""On a GPU: the backward pass of every backend within the error budget, and what training needs beside it."""

import math

import pytest
import torch
from attention_cases import (
    LENGTHS,
    SHORT,
    SHORT_K,
    SHORT_Q,
    assert_gradients_in_budget,
    assert_gradients_written,
    dout_like,
    gradients,
    inputs,
    layouts,
    offsets,
    poisoned,
)
from gpu_tools import print_table, share_line, waits

import ragged
from ragged.gradients import are_parts, split_projection

pytestmark = pytest.mark.gpu
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = {"fp16": HALF, "bf16": BRAIN, "fp32": SINGLE}
ABLE = [name for name, backend in ragged.BACKENDS.items() if backend.backward is not None]
TABLE = {}


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """After the last test: one line for every backend and dtype."""
    yield
    title = "largest error of a gradient against float64, as a share of the budget (2 x eager + rounding)"
    print_table(request, title, map(share_line, TABLE.items()))


@pytest.fixture(autouse=True)
def recording():
    with torch.enable_grad():
        yield


def usable(name, dtype=HALF, dim=64):
    if reason := ragged.BACKENDS[name].why_not("cuda", dtype, dim):
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ABLE)
def test_error_budget(backend, dtype, dim):
    usable(backend, DTYPES[dtype], dim)
    shares = TABLE.setdefault((backend, dtype), [])
    for lengths in LENGTHS.values():
        if backend == "dense" and len(set(lengths)) > 1:
            continue
        arguments = inputs(lengths, heads=3, dim=dim, dtype=DTYPES[dtype], device="cuda")
        shares.append(assert_gradients_in_budget(backend, arguments))


@pytest.mark.parametrize("dim", [16, 24, 48, 80, 96, 112])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_head_dimensions(dtype, dim):
    for lengths in (LENGTHS["around_a_tile"], [300, 2]):
        assert_gradients_in_budget("triton", inputs(lengths, dim=dim, dtype=DTYPES[dtype], device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [name for name in ABLE if name != "dense"])
def test_separate_query_and_key_lengths(backend, dtype):
    usable(backend, DTYPES[dtype])
    for lengths_q, lengths_k in ((SHORT_Q, SHORT_K), ([70, 1, 197], [197, 130, 64]), ([5], [0]), ([400, 3], [7, 500])):
        arguments = inputs(lengths_q, dim=64, dtype=DTYPES[dtype], device="cuda", lengths_k=lengths_k)
        assert_gradients_in_budget(backend, arguments)


@pytest.mark.parametrize("images", [1, 2, 40])
def test_every_length_up_to_a_tile_and_beyond(images):
    """Lengths at which a tile is just full, and one more, in few and in many programs."""
    for n in (1, 2, 15, 16, 17, 31, 33, 39, 48, 63, 65, 96, 99, 127, 129, 160, 193, 197, 208, 209, 255, 256, 257, 320):
        lengths = [n, *torch.randint(0, n + 1, (images - 1,), generator=torch.Generator().manual_seed(n)).tolist()]
        arguments = inputs(lengths, heads=4, dim=64, dtype=HALF, device="cuda", seed=n)
        assert_gradients_in_budget("triton", arguments)


@pytest.mark.parametrize("lengths", [[63, 64, 65], [300, 5]], ids=str)
def test_every_kind_of_strides(lengths):
    q, k, v, *sizes = inputs(lengths, dim=64, dtype=HALF, device="cuda")
    for kind in layouts(q):
        strided = [layouts(x)[kind].detach().requires_grad_() for x in (q, k, v)]
        for _ in range(2):  # the second start takes a shorter way
            out = ragged.varlen_attention(*strided, *sizes, backend="triton")
            got = torch.autograd.grad(out, strided, dout_like(q))
            assert_gradients_in_budget("triton", (q, k, v, *sizes), got)
    out = ragged.varlen_attention(*strided, *sizes, backend="triton")
    expanded = torch.autograd.grad(out.sum(), strided)  # a gradient whose strides are all zero
    out = ragged.varlen_attention(*strided, *sizes, backend="triton")
    want = torch.autograd.grad(out, strided, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, want))


@pytest.mark.parametrize("lengths", [SHORT, [197] * 4, [577, 3]], ids=str)
def test_the_same_bits_every_time(lengths):
    arguments = inputs(lengths, heads=6, dim=64, dtype=HALF, device="cuda")
    dout = dout_like(arguments[0])
    first = gradients(ragged.varlen_attention, arguments, dout, backend="triton")
    for _ in range(5):
        again = gradients(ragged.varlen_attention, arguments, dout, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("lengths", [SHORT, [99, 1, 0, 197], [300, 7, 0, 2]], ids=str)
def test_a_broken_image_breaks_no_other_image_s_gradient(lengths, value):
    arguments = inputs(lengths, dim=64, dtype=HALF, device="cuda")
    dout = dout_like(arguments[0])
    want = gradients(ragged.varlen_attention, arguments, dout, backend="triton")
    for victim in range(len(lengths)):
        bad, others = poisoned(arguments, victim, value)
        got = gradients(ragged.varlen_attention, bad, dout, backend="triton")
        assert all(torch.equal(a[others], b[others]) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[3, 0, 18], [0, 0], [0, 197, 1], [577, 0]], ids=str)
def test_every_number_is_written(lengths, dtype, monkeypatch):
    assert_gradients_written(lengths, monkeypatch, dim=64, dtype=DTYPES[dtype], device="cuda")


@pytest.mark.parametrize("backend", ["triton", "sdpa_padded", "reference"])
def test_a_gradient_through_the_log_sum_exp(backend):
    for lengths, keys in ((SHORT, SHORT), ([70, 1], [33, 300]), ([577, 5], [577, 5])):
        q, k, v, *sizes = inputs(lengths, dim=64, dtype=SINGLE, device="cuda", lengths_k=keys)
        some = (sizes[1].diff() > 0).repeat_interleave(sizes[0].diff())
        found = []
        for function in (ragged.varlen_attention, ragged.varlen_attention_ref):
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            out, lse = function(*leaves, *sizes, return_lse=True, backend=backend)
            loss = out.square().sum() + (lse[:, some.to(lse.device)] * 3).sum()
            found.append(torch.autograd.grad(loss, leaves))
        for got, want in zip(*found):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_one_projection_has_one_gradient_and_no_copy():
    for lengths in (SHORT, [300, 7]):
        qkv = torch.randn(sum(lengths), 3, 4, 64, device="cuda", dtype=HALF, requires_grad=True)
        cu, longest, found, seen = offsets(lengths, "cuda"), max(lengths), [], []
        dout = dout_like(qkv[:, 0].detach())
        for split in (split_projection, lambda x: x.unbind(1)):
            parts = split(qkv)
            for i, x in enumerate(parts):
                x.register_hook(lambda dx, i=i, seen=seen: seen.append((i, dx)))
            out = ragged.varlen_attention(*parts, cu, cu, longest, longest, backend="triton")
            found.append(torch.autograd.grad(out, qkv, dout)[0])
        assert torch.equal(*found)
        parts = [dx for _, dx in sorted(seen[:3], key=lambda pair: pair[0])]
        assert are_parts(found[0], tuple(parts)) and found[0].data_ptr() == parts[0].data_ptr()


def test_nothing_waits_and_both_directions_can_be_captured():
    for lengths in (SHORT, [577, 20]):
        q, k, v, *sizes = inputs(lengths, heads=4, dim=64, dtype=HALF, device="cuda")
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        dout = dout_like(q)

        def step(leaves=leaves, sizes=sizes, dout=dout):
            out = ragged.varlen_attention(*leaves, *sizes, backend="triton")
            return torch.autograd.grad(out, leaves, dout)

        want = step()
        with waits() as seen:
            step()
        assert not seen
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        for x in got:
            x.detach().fill_(math.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_keeps_both_directions_whole(dynamic):
    weight = torch.randn(3 * 128, 128, device="cuda", dtype=HALF, requires_grad=True)

    def layer(x, cu, longest):
        q, k, v = split_projection((x @ weight.T * 0.1).view(-1, 3, 2, 64))
        return ragged.varlen_attention(q, k, v, cu, cu, longest, longest, backend="triton").float().square().mean()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for lengths in (SHORT, [40, 2], [300, 1]):
        x = torch.randn(sum(lengths), 128, device="cuda", dtype=HALF, requires_grad=True)
        arguments = (x, offsets(lengths, "cuda"), max(lengths))
        want = torch.autograd.grad(layer(*arguments), (x, weight))
        got = torch.autograd.grad(compiled(*arguments), (x, weight))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


def test_under_autocast_as_a_model_trains():
    """Weights in float32, products in float16: the gradient comes back in the weights' precision."""
    weight = torch.randn(3 * 64, 64, device="cuda", requires_grad=True)
    x, cu = torch.randn(29, 64, device="cuda"), offsets(SHORT, "cuda")
    found = []
    for backend in ("triton", "sdpa_padded"):
        with torch.autocast("cuda", dtype=HALF):
            q, k, v = split_projection((x @ weight.T * 0.1).view(-1, 3, 1, 64))
            out = ragged.varlen_attention(q, k, v, cu, cu, 18, 18, backend=backend)
        found.append(torch.autograd.grad(out.float().square().sum(), weight)[0])
    assert found[0].dtype == SINGLE
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
