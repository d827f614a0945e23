"""On a Hopper GPU: the kernel in Gluon is right for every length it takes, also where its guess is wrong, and no memory
that it did not write can be seen in its results."""

import json
import math

import pytest
import torch
from attention_cases import assert_in_budget, assert_lse, inputs, layouts, offsets, poisoned
from gpu_tools import uncaptured

import ragged
from ragged import launch
from ragged.tiles import GLUON_HEADDIMS, GLUON_LENGTHS, GLUON_WIDTHS

HALF, BRAIN = torch.float16, torch.bfloat16
EDGES = sorted({n + d for w in GLUON_WIDTHS for n in (sum(w[:2]), sum(w)) for d in (-1, 0, 1)} & {*GLUON_LENGTHS})
USUAL = (65, 99, 128, 140, 192, 197)
REASON = ragged.BACKENDS["gluon"].why_not("cuda", HALF, 64)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "")]


def attend(arguments, **options):
    return ragged.varlen_attention(*arguments, backend="gluon", **options)


@pytest.mark.parametrize("dim", GLUON_HEADDIMS)
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_error_budget(dtype, dim):
    for n in EDGES:
        arguments = inputs([n] * 3, heads=3, dim=dim, dtype=dtype, device="cuda", seed=n)
        assert_in_budget(attend(arguments), arguments)
        assert torch.equal(attend(arguments), attend(arguments)), "the first call and the short way to later ones"


@pytest.mark.parametrize("batch", [1, 44, 45, 200, 601])
def test_few_items_and_many(batch):
    """Fewer than there are multiprocessors, as many, a few more, several rounds through the stages."""
    for n in USUAL:
        arguments = inputs([n] * batch, 3, 64, HALF, "cuda", seed=batch)
        want = ragged.varlen_attention(*arguments, backend="triton")
        torch.testing.assert_close(attend(arguments), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_log_sum_exp(dtype):
    for n in USUAL:
        arguments = inputs([n] * 5, heads=3, dim=64, dtype=dtype, device="cuda")
        out, lse = attend(arguments, return_lse=True)
        assert_in_budget(out, arguments)
        assert_lse(lse, arguments)
        assert torch.equal(out, attend(arguments))


WRONG = {  # images of up to 197 in as many rows as if all had that many
    "one_short": [197, 196, 197], "empty": [0, 197, 0], "random": [5, 130, 197], "longest_last": [64, 65, 197],
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_guess_is_found_and_put_right(case):
    lengths = WRONG[case]
    for n in (197, 209 - 12, 208):
        q, k, v, cu, *_ = inputs(lengths, heads=3, dim=64, dtype=HALF, device="cuda")
        surplus = q.new_full((n * len(lengths) - sum(lengths), 3, 64), math.nan)
        wide = [torch.cat((x, surplus)) for x in (q, k, v)]
        for _ in range(2):
            out, lse = attend((*wide, cu, cu, n, n), return_lse=True)
            assert_in_budget(out[: len(q)], (q, k, v, cu, cu, 197, 197))
            assert_lse(lse[:, : len(q)], (q, k, v, cu, cu, 197, 197))
            assert_in_budget(attend((*wide, cu, cu, n, n))[: len(q)], (q, k, v, cu, cu, 197, 197))


def test_queries_and_keys_that_differ():
    """Only one of the two cu_seqlens is as guessed; images without keys."""
    q, k, v, cu, *_ = inputs([99] * 4, heads=3, dim=64, dtype=HALF, device="cuda")
    for counts in ([99, 99, 98, 99], [0, 99, 99, 99], [99, 0, 1, 99], [99] * 4):
        other, rows = offsets(counts, "cuda"), sum(counts)
        arguments = (q, k, v, cu, other, 99, 99)
        out, lse = attend(arguments, return_lse=True)
        assert_in_budget(out, arguments)
        assert_lse(lse, arguments)
        out = attend((q, k, v, other, cu, 99, 99))
        assert_in_budget(out[:rows], (q[:rows], k, v, other, cu, 99, 99))


def test_what_it_does_not_take_is_refused():
    for lengths in ([64] * 3, [209] * 3, [99, 98, 99], [1]):
        for _ in range(2):
            with pytest.raises(ValueError, match="backend 'gluon': expected .* use 'triton' or 'auto'"):
                attend(inputs(lengths, dim=64, dtype=HALF, device="cuda"))
    for dtype, dim, word in ((torch.float32, 64, "float32"), (HALF, 128, "128"), (HALF, 48, "48")):
        with pytest.raises(ValueError, match=f"backend 'gluon' cannot run here: .*{word}.* Use backend='triton'"):
            attend(inputs([99] * 2, dim=dim, dtype=dtype, device="cuda"))


def test_every_kind_of_strides():
    q, k, v, *sizes = inputs([99] * 3, dim=64, dtype=HALF, device="cuda")
    for kind in layouts(q):
        strided = (layouts(q)[kind], layouts(k)[kind], layouts(v)[kind], *sizes)
        for _ in range(2):
            assert_in_budget(attend(strided), strided)
    mixed = (q, k.contiguous(), layouts(v)["head_major"], *sizes)
    assert_in_budget(attend(mixed), mixed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_of_nan_stays_alone(value):
    for n in (65, 99, 140, 197):
        for victim in (0, 1, 4):
            arguments = inputs([n] * 5, heads=3, dim=64, dtype=HALF, device="cuda")
            spoilt, others = poisoned(arguments, victim, value)
            assert torch.equal(attend(spoilt)[others], attend(arguments)[others])


def test_graphs_and_streams():
    arguments = inputs([197] * 8, heads=3, dim=64, dtype=HALF, device="cuda")
    q, want = arguments[0], attend(arguments)
    mine = torch.empty_like(q)
    attend((mine.copy_(q), *arguments[1:]))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        out = attend((mine, *arguments[1:]))
    mine.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        mine.copy_(q)
        graph.replay()
        late = attend((mine, *arguments[1:]))
    torch.cuda.synchronize()
    assert torch.equal(out, want) and torch.equal(late, want)


def test_later_calls_take_the_short_way():
    q, k, v, cu, *_ = inputs([140] * 9, heads=3, dim=64, dtype=BRAIN, device="cuda")
    want = attend((q, k, v, cu, cu, 140, 140))
    got = launch.quick(q, k, v, cu, cu, 140, 140, None, "gluon")
    assert got is not None and torch.equal(got, want) and not launch.fallbacks
    assert launch.quick(q, k, v, cu, cu, 141, 141, None, "gluon") is None


def test_memory_full_of_nan(request):
    import stress

    result = stress.run(calls=1440, seconds=600.0)
    with uncaptured(request):
        print("\n" + json.dumps(result))
    assert not result["wrong"] and result["calls"] >= 1440
