"""What the tests of attention share: lengths, inputs, and the error budget."""

import math

import pytest
import torch

import ragged
from ragged import launch

LENGTHS = {
    "one": [1],
    "one_and_many": [1, 197],
    "around_a_tile": [63, 64, 65],
    "with_empty": [0, 5, 0],
    "equal": [577, 577],
    "random": torch.randint(1, 198, (64,), generator=torch.Generator().manual_seed(3)).tolist(),
}
SHORT = [3, 0, 1, 18, 7]
# Queries and keys of different lengths; image 1 has no queries, image 2 no keys.
SHORT_Q, SHORT_K = [3, 0, 7, 2, 33], [5, 4, 0, 1, 20]


def places(names):
    """(device, backend): what runs on this CPU, and every backend on CUDA, marked so, but those for equal counts alone.
    Interpreted: the kernels only."""
    names = [n for n in names if not ragged.BACKENDS[n].equal_only]
    here = [n for n in names if ragged.BACKENDS[n].why_not("cpu", torch.float32, 16) is None]
    if launch.INTERPRET:
        here = [n for n in here if n.endswith("triton")]
    on_gpu = [pytest.param("cuda", n, marks=pytest.mark.gpu) for n in names]
    return [("cpu", n) for n in here] + on_gpu


everywhere = pytest.mark.parametrize("device, backend", places(ragged.BACKENDS))


def skip_unless_usable(device, backend, dtype=None, dim=64):
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    if reason := ragged.BACKENDS[backend].why_not(device, dtype, dim):
        pytest.skip(reason)


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def inputs(lengths, heads=2, dim=16, dtype=torch.float32, device="cpu", lengths_k=None, seed=0):
    """q, k, v as views of fused projections, as a model makes them, and the four sizes."""
    g = torch.Generator().manual_seed(seed)
    lengths_k = lengths if lengths_k is None else lengths_k
    draw = lambda total: torch.randn(total, 3, heads, dim, generator=g).to(device, dtype)  # noqa: E731
    q, k, v = draw(sum(lengths)).unbind(1)
    if lengths_k is not lengths:
        _, k, v = draw(sum(lengths_k)).unbind(1)
    cu_q = offsets(lengths, device)
    cu_k = cu_q if lengths_k is lengths else offsets(lengths_k, device)
    return q, k, v, cu_q, cu_k, max(1, *lengths), max(1, *lengths_k)


def eager(q, k, v, cu_q, cu_k, max_q, max_k, scale=None):
    """Attention as one would write it down, every step rounded to the inputs' dtype."""
    out, scale = torch.zeros_like(q), q.shape[-1] ** -0.5 if scale is None else scale
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        if keys.start < keys.stop and rows.start < rows.stop:
            one = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))
            a, b_, c = one
            out[rows] = (((a @ b_.transpose(1, 2)) * scale).softmax(-1) @ c).transpose(0, 1)
    return out


def errors(out, arguments, **options):
    """Largest error of `out` against float64, and what the budget allows: twice the error of plain operations in the
    same precision, plus what rounding alone may cost, in units in the last place of the largest result. That is half
    a unit where sums are kept in float32 and rounded once, and four where every step rounds to the result's precision.
    """
    want = ragged.varlen_attention_ref(*arguments, **options)
    plain = eager(*arguments, scale=options.get("softmax_scale"))
    if want.numel() == 0:
        return 0.0, 0.0
    units = 0.5 if out.dtype.itemsize == 2 else 4.0
    allowed = 2 * (plain.cpu().double() - want).abs().max() + units * torch.finfo(out.dtype).eps * want.abs().max()
    return float((out.cpu().double() - want).abs().max()), float(allowed)


def assert_in_budget(out, arguments, **options):
    q = arguments[0]
    assert out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
    error, allowed = errors(out, arguments, **options)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # False for NaN too
    return error, allowed


def gradients(function, arguments, dout, **options):
    """dq, dk, dv of `function` on the same numbers, for a gradient `dout` of its output."""
    with torch.enable_grad():
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in arguments[:3]]
        out = function(*leaves, *arguments[3:], **options)
        if not out.requires_grad:  # no row has a key: nothing depends on anything
            return [torch.zeros_like(x) for x in leaves]
        found = torch.autograd.grad(out, leaves, dout.to(out), allow_unused=True)
        return [torch.zeros_like(x) if dx is None else dx for x, dx in zip(leaves, found)]


def assert_gradients_in_budget(backend, arguments, got=None, **options):
    """dq, dk and dv against float64: each may err by twice what plain operations in the same precision do, plus
    rounding, as outputs may. Returns the largest share of the budget that was used. got: gradients made already, for
    the output's gradient of `dout_like`."""
    q, dout = arguments[0], dout_like(arguments[0])
    if got is None:
        got = gradients(ragged.varlen_attention, arguments, dout, backend=backend, **options)
    want = gradients(ragged.varlen_attention_ref, arguments, dout, **options)
    plain = gradients(eager, arguments, dout, scale=options.get("softmax_scale"))
    # A gradient is a difference of products that may cancel, and rounds like them: with one key it is nothing else.
    terms, units = 1.0, 0.5
    if q.dtype.itemsize > 2 and q.numel() and arguments[2].numel():
        terms, units = float(max(x.abs().max() for x in arguments[:3]) * (dout.flatten(1).norm(dim=1).max())), 4.0
    worst = 0.0
    for name, x, mine, exact, other in zip("qkv", arguments, got, want, plain):
        assert mine.shape == x.shape and mine.dtype == x.dtype and mine.device == x.device
        if not x.numel():
            continue
        exact = exact.cpu().double()
        rounding = units * torch.finfo(x.dtype).eps * max(float(exact.abs().max()), terms)
        allowed = 2 * float((other.cpu().double() - exact).abs().max()) + rounding
        error = float((mine.cpu().double() - exact).abs().max())
        assert error <= allowed, f"d{name}: error {error:.3g}, allowed {allowed:.3g}"
        worst = max(worst, error / allowed)
    return worst


def dout_like(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype).to(x.device)


def assert_right(out, arguments, rounding=1.0):
    """The budget, and beside it so many roundings of the largest value: with two keys and one query plain operations
    can be exact by luck, and a budget made from their error is then nothing at all."""
    error, allowed = errors(out, arguments)
    v = arguments[2]
    slack = rounding * torch.finfo(out.dtype).eps * (float(v.abs().max()) if v.numel() else 0.0)
    assert error <= allowed + slack, f"error {error:.3g}, allowed {allowed + slack:.3g}"


def assert_lse(lse, arguments, **options):
    """Natural log-sum-exp, float32 (nheads, total_q): inputs are exact, so the dtype hardly matters."""
    q = arguments[0]
    want = ragged.varlen_attention_ref(*arguments, return_lse=True, **options)[1]
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32 and lse.device == q.device
    torch.testing.assert_close(lse.cpu().double(), want, rtol=1e-5, atol=1e-4)


def layouts(x):
    """The same numbers (total, nheads, headdim) behind every kind of strides."""
    total, heads, dim = x.shape
    wide = x.new_full((total, heads, 2 * dim), math.nan)
    wide[..., ::2] = x
    padded = x.new_full((total + 1, heads + 1, dim + 3), math.nan)
    padded[1:, 1:, 1:-2] = x
    return {
        "contiguous": x.contiguous(),
        "head_major": x.transpose(0, 1).contiguous().transpose(0, 1),
        "dim_major": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every_other_number": wide[..., ::2],
        "odd_offset": padded[1:, 1:, 1:-2],
    }


def poisoned(arguments, victim, value):
    """The arguments with q, k and v of one image filled with `value`, and which rows belong to other images."""
    q, k, v, cu_q, cu_k, *longest = arguments
    q, k, v = q.clone(), k.clone(), v.clone()
    rows, keys = slice(*cu_q[victim : victim + 2].tolist()), slice(*cu_k[victim : victim + 2].tolist())
    q[rows], k[keys], v[keys] = value, value, value
    others = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    others[rows] = False
    return (q, k, v, cu_q, cu_k, *longest), others


def assert_gradients_written(lengths, monkeypatch, **kind):
    """Memory full of NaN before, and rows that belong to no sequence: what is not written would show. kind: as `inputs`
    takes it."""
    monkeypatch.setattr(launch, "new_output", lambda q, *shape: q.new_full(shape, math.nan))
    q, k, v, *sizes = inputs(lengths, **kind)
    with torch.enable_grad():
        wide = [torch.cat((x, x.new_full((21, *x.shape[1:]), math.nan))).requires_grad_() for x in (q, k, v)]
        out = ragged.varlen_attention(*wide, *sizes, backend="triton")
        dout = torch.cat((dout_like(q), q.new_full((21, *q.shape[1:]), math.nan)))
        got = torch.autograd.grad(out, wide, dout)
    assert not any(x[-21:].any() for x in got)
    assert_gradients_in_budget("triton", (q, k, v, *sizes), [x[:-21] for x in got])


def by_both_ways(monkeypatch, run, *leaves):
    """Gradients of `run` by the small kernels, and by PyTorch's operations in their place."""
    found = []
    for by_kernels in (True, False):
        with monkeypatch.context() as patch, torch.enable_grad():
            if not by_kernels:
                patch.setattr(launch, "usable", lambda device: False)
            mine = [x.detach().clone().requires_grad_() for x in leaves]
            out = run(*mine)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.device)
            found.append(torch.autograd.grad((out.float() * weights).sum(), mine))
    return found
