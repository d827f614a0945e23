"""`varlen_attention` on the CPU: every backend there is, against the float64 reference."""

import math

import pytest
import torch
from attention_cases import (
    LENGTHS,
    SHORT,
    SHORT_K,
    SHORT_Q,
    assert_in_budget,
    assert_lse,
    inputs,
    layouts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import ragged

CPU = [name for name, b in ragged.BACKENDS.items() if b.why_not("cpu", torch.float32, 16) is None and name != "dense"]
WITH_LSE = ("sdpa_padded", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_what_runs_on_a_cpu():
    assert {"sdpa_padded", "paper_padded", "reference"} <= set(CPU)
    assert ragged.BACKENDS["dense"].why_not("cpu", torch.float32, 16) is None


# --- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", ["auto", *CPU])
def test_error_budget(backend, lengths, dtype):
    arguments = inputs(LENGTHS[lengths], dtype=dtype)
    assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("backend", CPU)
def test_head_dimensions(backend, dim):
    arguments = inputs(SHORT, heads=3, dim=dim)
    assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_separate_query_and_key_lengths(backend, dtype):
    arguments = inputs(SHORT_Q, lengths_k=SHORT_K, dtype=dtype)
    out = ragged.varlen_attention(*arguments, backend=backend)
    assert_in_budget(out, arguments)
    assert not out[3:10].any(), "an image without keys gets zeros"


@pytest.mark.parametrize("lengths_k", [[0, 0], [0, 4]], ids=str)
@pytest.mark.parametrize("lengths_q", [[0, 0], [2, 3]], ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_hardly_anything_there(backend, lengths_q, lengths_k):
    arguments = inputs(lengths_q, lengths_k=lengths_k)
    assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("backend", CPU)
def test_every_kind_of_strides(backend):
    q, k, v, *sizes = inputs(SHORT)
    want = ragged.varlen_attention(q, k, v, *sizes, backend=backend)
    for kind in layouts(q):
        out = ragged.varlen_attention(*(layouts(x)[kind] for x in (q, k, v)), *sizes, backend=backend)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6, msg=lambda m, kind=kind: f"{kind}: {m}")


def test_dense_takes_equal_lengths_only():
    arguments = inputs([9, 9])
    assert_in_budget(ragged.varlen_attention(*arguments, backend="dense"), arguments)
    arguments = inputs([9, 9], lengths_k=[4, 4])
    assert_in_budget(ragged.varlen_attention(*arguments, backend="dense"), arguments)
    with pytest.raises(ValueError, match="equal length"):
        ragged.varlen_attention(*inputs([9, 8]), backend="dense")


@pytest.mark.parametrize("backend", CPU)
def test_scale(backend):
    arguments = inputs(SHORT)
    out = ragged.varlen_attention(*arguments, softmax_scale=0.5, backend=backend)
    assert_in_budget(out, arguments, softmax_scale=0.5)
    explicit = ragged.varlen_attention(*arguments, softmax_scale=1 / math.sqrt(16), backend=backend)
    assert torch.equal(explicit, ragged.varlen_attention(*arguments, backend=backend))


@pytest.mark.parametrize("backend", CPU)
def test_a_generous_maximum_changes_nothing(backend):
    q, k, v, cu_q, cu_k, *_ = inputs(SHORT)
    out = ragged.varlen_attention(q, k, v, cu_q, cu_k, 300, 400, backend=backend)
    assert_in_budget(out, (q, k, v, cu_q, cu_k, 300, 400))


@pytest.mark.parametrize("backend", ["auto", *CPU])
def test_rows_past_the_last_offset_belong_to_nobody(backend):
    """A buffer with capacity to spare: what it holds there must not matter, nor stop the call."""
    q, k, v, *sizes = inputs(SHORT)
    spare = lambda x: torch.cat((x, torch.full((4, 2, 16), math.nan)))  # noqa: E731
    out = ragged.varlen_attention(spare(q), spare(k), spare(v), *sizes, backend=backend)
    assert out.shape[0] == q.shape[0] + 4
    assert_in_budget(out[:-4], (q, k, v, *sizes))


@settings(max_examples=25)
@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), heads=st.integers(1, 3))
def test_any_lengths(pairs, heads):
    arguments = inputs([q for q, _ in pairs], lengths_k=[k for _, k in pairs], heads=heads)
    out, lse = ragged.varlen_attention(*arguments, return_lse=True)
    assert_in_budget(out, arguments)
    assert_lse(lse, arguments)


# --- log-sum-exp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", WITH_LSE)
def test_log_sum_exp(backend, dtype):
    for arguments in (inputs(SHORT, dtype=dtype), inputs(SHORT_Q, lengths_k=SHORT_K, dtype=dtype)):
        out, lse = ragged.varlen_attention(*arguments, return_lse=True, backend=backend)
        assert_in_budget(out, arguments)
        assert_lse(lse, arguments)
    assert (lse[:, 3:10] == -math.inf).all() and not out[3:10].any(), "no keys: the sum of nothing"


def test_log_sum_exp_of_one_key_is_its_score():
    q, k, v, *sizes = inputs([1, 1], heads=1)
    _, lse = ragged.varlen_attention(q, k, v, *sizes, return_lse=True)
    torch.testing.assert_close(lse[0], (q * k).sum(-1)[:, 0] / 4)


@pytest.mark.parametrize("backend", sorted(set(CPU) - set(WITH_LSE)) + ["dense"])
def test_no_log_sum_exp_is_said(backend):
    with pytest.raises(ValueError, match="return_lse"):
        ragged.varlen_attention(*inputs([4, 4]), return_lse=True, backend=backend)


def test_the_reference_is_in_double_precision():
    arguments = inputs(SHORT, dtype=torch.bfloat16)
    out, lse = ragged.varlen_attention_ref(*arguments, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    assert not out.isnan().any()


# --- torch.compile


def one_graph(**options):
    """`varlen_attention` compiled whole, and the list in which its graphs are collected."""
    torch.compiler.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    return torch.compile(lambda *a: ragged.varlen_attention(*a, **options), fullgraph=True, backend=keep), graphs


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled_it_stays_one_operator(return_lse):
    compiled, graphs = one_graph(return_lse=return_lse)
    arguments = inputs(SHORT)
    got, want = compiled(*arguments), ragged.varlen_attention(*arguments, return_lse=return_lse)
    for a, b in zip(got, want) if return_lse else [(got, want)]:
        assert torch.equal(a, b)
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and sum("varlen_attention" in str(target) for target in calls) == 1
    assert not any("softmax" in str(target) or "scaled_dot" in str(target) for target in calls)


def test_new_lengths_need_no_new_graphs_for_ever():
    compiled, graphs = one_graph()
    for lengths in ([3, 5], [4, 6], [9, 2, 7], [1, 1, 20, 3], [8], [2, 30]):
        arguments = inputs(lengths)
        assert torch.equal(compiled(*arguments), ragged.varlen_attention(*arguments))
    assert len(graphs) <= 3, f"{len(graphs)} graphs for six batches"


def test_bad_input_under_compile_is_refused_too():
    compiled, _ = one_graph()
    q, k, v, cu_q, cu_k, *longest = inputs(SHORT)
    with pytest.raises(Exception, match="cu_seqlens_q"):
        compiled(q, k, v, cu_q.long(), cu_k, *longest)


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_operator_keeps_its_promises(return_lse):
    q, k, v, *sizes = inputs(SHORT_Q, lengths_k=SHORT_K)
    operator = torch.ops.ragged.varlen_attention.default
    torch.library.opcheck(operator, (q, k, v, *sizes, 0.25, return_lse, "sdpa_padded"))


# --- the choice


def test_auto_picks_the_fused_padded_path_on_a_cpu():
    assert ragged.pick_backend("cpu", torch.float32, 64) == "sdpa_padded"
    arguments = inputs(SHORT)
    assert torch.equal(ragged.varlen_attention(*arguments), ragged.varlen_attention(*arguments, backend="sdpa_padded"))


@pytest.mark.parametrize("name", ragged.BACKENDS)
def test_why_not_is_none_or_a_reason(name):
    for device in ("cpu", torch.device("cpu"), "meta"):
        for dtype in (torch.float32, torch.float16, torch.float64, torch.int32):
            reason = ragged.BACKENDS[name].why_not(device, dtype, 64)
            assert reason is None or len(reason) > 10
    assert ragged.BACKENDS[name].why_not("cpu", torch.int32, 64), "integers are no tokens"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["triton", "flash_attn", "torch_varlen", "nested", "paper_triton"])
def test_asking_about_a_gpu_that_is_not_there(name):
    assert ragged.BACKENDS[name].why_not("cuda", torch.float16, 64)


@pytest.mark.parametrize("name", [n for n in ragged.BACKENDS if n not in CPU and n != "dense"])
def test_an_explicit_request_is_refused_with_the_reason(name):
    reason = ragged.BACKENDS[name].why_not("cpu", torch.float32, 16)
    with pytest.raises(ValueError) as refusal:
        ragged.varlen_attention(*inputs(SHORT), backend=name)
    assert name in str(refusal.value) and reason in str(refusal.value) and "sdpa_padded" in str(refusal.value)
