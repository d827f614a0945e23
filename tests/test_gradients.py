"""Gradients of `varlen_attention`, on the CPU: every backend against float64, and what is refused."""

import math

import pytest
import torch
from attention_cases import LENGTHS, SHORT, SHORT_K, SHORT_Q, assert_gradients_in_budget, inputs, offsets, poisoned

import ragged
from ragged.gradients import split_projection

HERE = ["sdpa_padded", "reference"]
pytestmark = pytest.mark.usefixtures("recording")


@pytest.fixture
def recording():
    with torch.enable_grad():
        yield


def leaves(arguments):
    """The same call with q, k and v as leaves that want gradients."""
    return *(x.detach().clone().requires_grad_() for x in arguments[:3]), *arguments[3:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_every_list_of_lengths(backend, dtype):
    for lengths in LENGTHS.values():
        assert_gradients_in_budget(backend, inputs([min(n, 66) for n in lengths][:9], dtype=dtype))
    assert_gradients_in_budget(backend, inputs(SHORT_Q, lengths_k=SHORT_K, dtype=dtype))
    assert_gradients_in_budget(backend, inputs([5, 5], dtype=dtype), softmax_scale=0.7)


def test_equal_counts_without_padding():
    assert_gradients_in_budget("dense", inputs([9, 9]))


@pytest.mark.parametrize("backend", HERE)
def test_the_derivative_is_that_of_the_function(backend):
    q, k, v, *sizes = leaves(inputs(SHORT_Q, lengths_k=SHORT_K, dim=4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: ragged.varlen_attention(*x, *sizes, backend=backend), (q, k, v))


def test_the_reference_can_be_differentiated_twice_and_the_others_say_that_they_cannot():
    q, k, v, *sizes = leaves(inputs([3, 0, 4], heads=1, dim=3, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(lambda *x: ragged.varlen_attention_ref(*x, *sizes), (q, k, v))
    for backend in HERE:
        out = ragged.varlen_attention(q, k, v, *sizes, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivatives.*varlen_attention_ref"):
            first.sum().backward()


@pytest.mark.parametrize("backend", HERE)
def test_a_gradient_through_the_log_sum_exp(backend):
    arguments = leaves(inputs(SHORT_Q, lengths_k=SHORT_K, dtype=torch.float64))
    some = [i for i, n in enumerate(torch.tensor(SHORT_K).repeat_interleave(torch.tensor(SHORT_Q)).tolist()) if n]
    found = []
    for function in (ragged.varlen_attention, ragged.varlen_attention_ref):
        out, lse = function(*arguments, return_lse=True, backend=backend)
        found.append(torch.autograd.grad(out.sum() + (3 * lse[:, some]).sum(), arguments[:3]))
        found.append(torch.autograd.grad(function(*arguments, return_lse=True, backend=backend)[1][:, some].sum(),
                                         arguments[:2]))  # fmt: skip
    for got, want in zip(found[0] + found[1], found[2] + found[3]):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [name for name, b in ragged.BACKENDS.items() if b.backward is None])
def test_who_has_no_backward_pass_says_why(backend):
    if reason := ragged.BACKENDS[backend].why_not("cpu", torch.float32, 16):
        pytest.skip(reason)
    with pytest.raises(ValueError, match=f"{backend}.*no backward pass.*gradient.*'sdpa_padded'"):
        ragged.varlen_attention(*leaves(inputs(SHORT)), backend=backend)


def test_a_log_sum_exp_without_a_gradient_is_refused(monkeypatch):
    from dataclasses import replace

    from ragged import attention

    table = {"sdpa_padded": replace(ragged.BACKENDS["sdpa_padded"], lse_gradient=False)}
    monkeypatch.setattr(attention, "BACKENDS", table)
    attention._accepted.clear()
    with pytest.raises(ValueError, match="return_lse.*no gradient of the log-sum-exp"):
        ragged.varlen_attention(*leaves(inputs(SHORT)), return_lse=True, backend="sdpa_padded")
    attention._accepted.clear()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_image_breaks_no_other_image_s_gradient(backend, value):
    arguments = inputs(SHORT)
    bad, others = poisoned(arguments, 3, value)
    clean, dirty = leaves(arguments), leaves(bad)
    for call in (clean, dirty):
        ragged.varlen_attention(*call, backend=backend).square().sum().backward()
    for want, got in zip(clean[:3], dirty[:3]):
        assert torch.equal(got.grad[others], want.grad[others])


@pytest.mark.parametrize("backend", HERE)
def test_rows_of_no_sequence_have_no_gradient(backend):
    q, k, v, *sizes = leaves(inputs(SHORT))
    wide = [torch.cat((x.detach(), x.new_full((5, *x.shape[1:]), math.nan))).requires_grad_() for x in (q, k, v)]
    ragged.varlen_attention(*wide, *sizes, backend=backend).sum().backward()
    ragged.varlen_attention(q, k, v, *sizes, backend=backend).sum().backward()
    for got, want in zip(wide, (q, k, v)):
        assert torch.equal(got.grad[:-5], want.grad) and not got.grad[-5:].any()


def test_only_what_wants_a_gradient_gets_one():
    for wanting in range(3):
        arguments = list(inputs(SHORT))
        arguments[wanting] = arguments[wanting].clone().requires_grad_()
        ragged.varlen_attention(*arguments).sum().backward()
        assert [x.grad is not None for x in arguments[:3]] == [i == wanting for i in range(3)]


def test_one_projection_has_one_gradient():
    qkv = torch.randn(29, 3, 2, 16, requires_grad=True)
    cu, found = offsets(SHORT), []
    for split in (split_projection, lambda x: x.unbind(1)):
        q, k, v = split(qkv)
        loss = ragged.varlen_attention(q, k, v, cu, cu, 18, 18).square().sum() + q[3].sum()  # q is used elsewhere, too
        found.append(torch.autograd.grad(loss, qkv)[0])
    assert torch.equal(*found)
    q, _, _ = split_projection(qkv)
    assert torch.equal(torch.autograd.grad(q.sum(), qkv)[0][:, 0], torch.ones(29, 2, 16))
    for bad in (qkv[0], qkv[:, :2]):
        with pytest.raises(ValueError, match="qkv: expected"):
            split_projection(bad)
    assert not split_projection(qkv.detach())[0].requires_grad


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_compiler_sees_one_operator_and_its_gradient(return_lse):
    arguments = leaves(inputs(SHORT))
    sizes = arguments[3:]

    def loss(q, k, v):
        found = ragged.varlen_attention(q * 2, k, v, *sizes, return_lse=return_lse)
        return (found[0].square().sum() + found[1][:, :3].sum()) if return_lse else found.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(*arguments[:3]), arguments[:3])
    got = torch.autograd.grad(compiled(*arguments[:3]), arguments[:3])
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_the_operators_are_sound():
    q, k, v, *sizes = leaves(inputs(SHORT))
    torch.library.opcheck(torch.ops.ragged.varlen_attention, (q, k, v, *sizes, 0.25, True, "sdpa_padded", True))


def test_the_counter_of_operations_counts_both_ways():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = leaves(inputs(SHORT))
    forward = 4 * sum(n * n for n in SHORT) * 2 * 16
    with FlopCounterMode(display=False) as counter:
        out = ragged.varlen_attention(*arguments)
        assert counter.get_total_flops() == forward
        out.sum().backward()
    assert counter.get_total_flops() == forward * 7 // 2
