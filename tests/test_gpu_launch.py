"""On a GPU: the launcher, the copies, and batches large enough for 64-bit offsets."""

import pytest
import torch
from attention_cases import LENGTHS, assert_in_budget, assert_lse, inputs, offsets
from gpu_tools import compiled_kernels, waits

import ragged
from ragged import launch
from ragged.kernels import front

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["Python", "C++"], autouse=True)
def way(request):
    """Everything here holds for both ways to a launch."""
    if request.param == "C++":
        try:
            front.build()
        except RuntimeError as error:
            pytest.skip(str(error))
        yield
        front.leave()
    else:
        yield


HALF = torch.float16
KERNELS = ("triton", "paper_triton")


# --- the launcher


def test_the_first_call_decides_nothing():
    """Kernels first met with a total of 1, then a multiple of 16, then neither: the same kernels, and right."""
    for first in (1, 16, 17):
        launch.forget()
        counts = []
        for n in (first, 1, 16, 17, 48, 197):
            arguments = inputs([n], heads=5 + first, dim=16, dtype=HALF, device="cuda")
            arguments = (*arguments[:-2], 200, 200)
            out, lse = ragged.varlen_attention(*arguments, return_lse=True, backend="triton")
            assert_in_budget(out, arguments)
            assert_lse(lse, arguments)
            assert_in_budget(ragged.varlen_attention(*arguments, backend="triton"), arguments)
            x = torch.randn(1, n, 8 * (70 + first), device="cuda", dtype=HALF)
            assert torch.equal(ragged.pack(x, torch.ones(1, n, dtype=torch.bool, device="cuda")).tokens, x[0])
            index = torch.arange(n, device="cuda").flip(0)[None]
            assert torch.equal(ragged.pack(x, index).tokens, x[0].flip(0))
            counts.append(len(compiled_kernels()))
        assert len(set(counts)) == 1, f"compiled again: {counts}"


def test_streams():
    """Work goes to the current stream: behind what is already there, and beside what is elsewhere."""
    arguments = inputs(LENGTHS["random"], dim=64, dtype=HALF, device="cuda")
    want = ragged.varlen_attention(*arguments, backend="triton")
    q = arguments[0]
    for want_lse in (False, True):
        results, streams, late = [], [torch.cuda.Stream() for _ in range(2)], [torch.zeros_like(q) for _ in range(2)]
        torch.cuda.synchronize()
        for stream, mine in zip(streams, late):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                mine.copy_(q)
                out = ragged.varlen_attention(mine, *arguments[1:], backend="triton", return_lse=want_lse)
                results.append(out[0] if want_lse else out)
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in results)


def test_pointers_at_odd_addresses_after_even_ones():
    """Kernels compiled for multiples of 16 bytes must not be started on anything else."""
    q, k, v, *sizes = inputs([63, 64, 65], heads=4, dim=64, dtype=HALF, device="cuda")
    want = ragged.varlen_attention(q, k, v, *sizes, backend="triton")
    for shift in (1, 2, 4, 8, 0):
        moved = []
        for x in (q, k, v):
            room = torch.empty(192 * 3 * 4 * 64 + 16, device="cuda", dtype=HALF)[shift:]
            moved.append(room.as_strided(x.shape, x.stride()).copy_(x))
        assert torch.equal(ragged.varlen_attention(*moved, *sizes, backend="triton"), want), shift
        assert torch.equal(ragged.varlen_attention(q, *moved[1:], *sizes, backend="triton"), want), shift
        cu = torch.zeros(9, device="cuda", dtype=torch.int32)[shift % 4 :][:4].copy_(sizes[0])
        assert torch.equal(ragged.varlen_attention(q, k, v, cu, cu, 65, 65, backend="triton"), want), shift


@torch.enable_grad()
def test_refusals_hold_on_later_calls_too():
    """A short way past the checks must not let anything through that the first call would refuse."""
    q, k, v, cu_q, cu_k, *longest = inputs([5, 9], dim=64, dtype=HALF, device="cuda")
    for _ in range(2):
        ragged.varlen_attention(q, k, v, cu_q, cu_k, *longest)
    bad = [
        (q, k, v, cu_q.long(), cu_k, *longest), (q, k, v, cu_q, cu_k.cpu(), *longest), (q, k, v, cu_q, cu_k, 0, 9),
        (q, k, v[:-1], cu_q, cu_k, *longest), (q, k, v, cu_q, cu_k[:-1], *longest), (q, k, v, cu_q[:1], cu_k[:1], 9, 9),
        (q, k, v, cu_q, cu_k, 9.0, 9), (q, k, v.float(), cu_q, cu_k, *longest),
        (q, k, v, cu_q, cu_k, 9, None), (q, k, v, cu_q, cu_k, 9, "9"), (q, k, v, cu_q, cu_k, True, 9),
    ]  # fmt: skip
    for i, arguments in enumerate(bad):
        with pytest.raises((TypeError, ValueError), match=r"^(q|k|v|cu_seqlens_[qk]|max_seqlen_[qk]):"):
            pytest.fail(f"case {i} was accepted: {ragged.varlen_attention(*arguments).shape}")
    with pytest.raises(ValueError, match="softmax_scale"):
        ragged.varlen_attention(q, k, v, cu_q, cu_k, *longest, softmax_scale=-1.0)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device():
    arguments = inputs(LENGTHS["random"], dim=64, dtype=HALF, device="cuda:1")
    for backend in ("triton", "paper_triton", "triton"):
        assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


# --- large batches


def test_offsets_past_two_to_the_31():
    images, tokens, heads, dim = 1900, 197, 16, 128
    qkv = torch.empty(images * tokens, 3, heads, dim, device="cuda", dtype=HALF).normal_()
    assert qkv.numel() > 2**31
    q, k, v = qkv.unbind(1)
    cu, one = offsets([tokens] * images, "cuda"), offsets([tokens], "cuda")
    out, lse = ragged.varlen_attention(q, k, v, cu, cu, tokens, tokens, backend="triton", return_lse=True)
    for image in (0, 1776, images - 1):
        rows = slice(image * tokens, (image + 1) * tokens)
        arguments = (q[rows], k[rows], v[rows], one, one, tokens, tokens)
        assert_in_budget(out[rows], arguments)
        assert_lse(lse[:, rows], arguments)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_images_than_a_grid_is_high(backend):
    arguments = inputs([1, 2, 0] * 25_000, heads=1, dim=16, dtype=HALF, device="cuda")
    out = ragged.varlen_attention(*arguments, backend=backend)
    assert torch.equal(out[::3], arguments[2][::3]), "an image of one token sees itself alone"


# --- packing


def test_packing_waits_once_or_never():
    x = torch.randn(8, 197, 384, device="cuda", dtype=HALF)
    keep = torch.rand(8, 197, device="cuda") < 0.5
    counts, index = keep.sum(1).tolist(), torch.rand(8, 197, device="cuda").argsort(1)[:, :50]
    again, fewer = torch.ones(sum(counts), dtype=torch.bool, device="cuda"), torch.randn(sum(counts), device="cuda") < 0
    cases = {
        1: (lambda: ragged.pack(x, keep), lambda: ragged.repack(packed, fewer)),
        0: (lambda: ragged.pack(x, keep, counts=counts), lambda: ragged.pack(x, index), lambda: ragged.unpack(packed),
            lambda: ragged.repack(packed, again, counts=counts)),
    }  # fmt: skip
    packed = ragged.pack(x, keep)
    assert torch.equal(packed.tokens, x[keep]) and torch.equal(ragged.unpack(packed), x * keep[..., None])
    for expected, calls in cases.items():
        for call in calls:
            call()
            with waits() as seen:
                call()
            assert len(seen) == expected, [str(w.message) for w in seen]


def test_packing_past_two_to_the_31():
    x = torch.empty(1100, 1000, 2048, device="cuda", dtype=HALF)
    x.copy_(torch.arange(1000, device="cuda")[None, :, None] - torch.arange(1100, device="cuda")[:, None, None])
    keep = torch.arange(1000, device="cuda").expand(1100, 1000) % 50 != 0
    packed = ragged.pack(x, keep)
    assert torch.equal(packed.tokens[-980:], x[-1][keep[-1]]) and torch.equal(packed.tokens[:980], x[0][keep[0]])
    index = torch.arange(999, 899, -1, device="cuda").expand(1100, 100).contiguous()
    assert torch.equal(ragged.pack(x, index).tokens[-100:], x[-1].flip(0)[:100])
