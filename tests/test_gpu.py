"""On a GPU: every backend within the error budget. Prints a table of what it measured."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import LENGTHS, SHORT_K, SHORT_Q, assert_in_budget, assert_lse, inputs, layouts
from gpu_tools import print_table, share_line

import ragged

pytestmark = pytest.mark.gpu
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = {"fp16": HALF, "bf16": BRAIN, "fp32": SINGLE}
KERNELS = ("triton", "paper_triton")
ANY_COUNTS = [name for name, backend in ragged.BACKENDS.items() if not backend.equal_only]
OURS = (*KERNELS, "sdpa_padded", "paper_padded", "reference")
TABLE = {}


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """After the last test: one line for every backend and dtype."""
    yield
    title = "largest error against float64, as a share of the budget (2 x eager + rounding)"
    print_table(request, title, map(share_line, TABLE.items()))


def usable(name, dtype=HALF, dim=64):
    reason = ragged.BACKENDS[name].why_not("cuda", dtype, dim)
    if reason:
        short = next(key for key, value in DTYPES.items() if value == dtype)
        TABLE.setdefault((name, short), f"not run: {reason}")
        pytest.skip(f"{name}: {reason}")


# --- values


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [*ANY_COUNTS, "dense"])  # "gluon": test_gpu_gluon.py
def test_error_budget(backend, dtype, dim):
    usable(backend, DTYPES[dtype], dim)
    shares = TABLE.setdefault((backend, dtype), [])
    for lengths in LENGTHS.values():
        if backend == "dense" and len(set(lengths)) > 1:
            continue
        arguments = inputs(lengths, heads=3, dim=dim, dtype=DTYPES[dtype], device="cuda")
        out = ragged.varlen_attention(*arguments, backend=backend)
        error, allowed = assert_in_budget(out, arguments)
        shares.append(error / allowed if allowed else 0.0)


@pytest.mark.parametrize("dim", [16, 24, 48, 80, 96, 112])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_other_head_dimensions(backend, dtype, dim):
    arguments = inputs(LENGTHS["around_a_tile"], dim=dim, dtype=DTYPES[dtype], device="cuda")
    assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("images", [2, 100])
def test_equal_lengths_and_lengths_that_only_look_equal(images):
    """Lengths at which a piece of keys is just full, and one more: all images that long, and a buffer with room for it
    but shorter images."""
    for n in sorted({1, 5, 90, 197, *range(16, 210, 16), *range(17, 210, 16)}):
        g = torch.Generator().manual_seed(n)
        shorter = torch.randint(0, n + 1, (images,), generator=g).tolist()
        for lengths in ([n] * images, [*shorter[1:], n]):
            q, k, v, *sizes = inputs(lengths, heads=3, dim=64, dtype=HALF, device="cuda", seed=n)
            surplus = q.new_full((n * images - sum(lengths), 3, 64), math.nan)
            wide = [torch.cat((x, surplus)) for x in (q, k, v)]
            out = ragged.varlen_attention(*wide, *sizes, backend="triton")[: len(q)]
            want = ragged.varlen_attention(q, k, v, *sizes, backend="sdpa_padded")
            torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [b for b in ANY_COUNTS if b != "paper_triton"])
def test_separate_query_and_key_lengths(backend, dtype):
    usable(backend, DTYPES[dtype])
    for lengths_q, lengths_k in ((SHORT_Q, SHORT_K), ([70, 1, 197], [197, 130, 64]), ([5], [0])):
        arguments = inputs(lengths_q, dim=64, dtype=DTYPES[dtype], device="cuda", lengths_k=lengths_k)
        assert_in_budget(ragged.varlen_attention(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "flash_attn", "torch_varlen", "sdpa_padded", "reference"])
def test_log_sum_exp(backend, dtype):
    usable(backend, DTYPES[dtype])
    for lengths_q, lengths_k in ((LENGTHS["random"],) * 2, (LENGTHS["with_empty"],) * 2, (SHORT_Q, SHORT_K)):
        arguments = inputs(lengths_q, dim=64, dtype=DTYPES[dtype], device="cuda", lengths_k=lengths_k)
        out, lse = ragged.varlen_attention(*arguments, return_lse=True, backend=backend)
        assert_in_budget(out, arguments)
        assert_lse(lse, arguments)


@pytest.mark.parametrize("backend", ANY_COUNTS)
def test_every_kind_of_strides(backend):
    usable(backend)
    q, k, v, *sizes = inputs([63, 64, 65], dim=64, dtype=HALF, device="cuda")
    for kind in layouts(q):
        if kind == "odd_offset" and backend not in OURS:
            continue  # see below
        strided = (layouts(q)[kind], layouts(k)[kind], layouts(v)[kind], *sizes)
        for _ in range(2):  # the second call may take a shorter way
            assert_in_budget(ragged.varlen_attention(*strided, backend=backend), strided)


ODD = """
import torch
from attention_cases import assert_in_budget, inputs, layouts
import ragged
q, k, v, *sizes = inputs([63, 64, 65], dim=64, dtype=torch.float16, device="cuda")
odd = (layouts(q)["odd_offset"], layouts(k)["odd_offset"], layouts(v)["odd_offset"], *sizes)
assert_in_budget(ragged.varlen_attention(*odd, backend="BACKEND"), odd)
"""


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "nested"])
def test_odd_addresses_do_not_crash(backend):
    """These kernels read 16 bytes at a time. In a process of its own: a misaligned address is the end of one."""
    usable(backend)
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ODD.replace("BACKEND", backend)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-600:]
