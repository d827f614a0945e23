"""Backends that are measured against ours: what they say where they cannot run, and when "auto" takes them."""

import dataclasses

import pytest
import torch
from attention_cases import inputs

import ragged
from ragged import attention

RIVALS = ("efficient_varlen", "flash_attn_3")


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_says_why_it_cannot_run_on_a_cpu(name):
    q, k, v, cu, *_ = inputs([5, 3], heads=2, device="cpu")
    with pytest.raises(ValueError, match=f"backend '{name}' cannot run here: .+ Use backend="):
        ragged.varlen_attention(q, k, v, cu, cu, 5, 5, backend=name)
    assert ragged.pick_backend("cpu", torch.float32, 64) not in RIVALS


def test_flash_attn_3_is_never_picked_by_itself():
    assert not ragged.BACKENDS["flash_attn_3"].auto


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_auto_takes_the_efficient_kernel_before_padding(monkeypatch, dtype):
    """A T4 without Triton: no FlashAttention for compute capability 7.5."""
    runs = ("efficient_varlen", "sdpa_padded", "dense", "reference", "paper_padded")
    table = {name: dataclasses.replace(backend, why_not=lambda *a, here=name in runs: None if here else "not here")
             for name, backend in ragged.BACKENDS.items()}  # fmt: skip
    monkeypatch.setattr(attention, "BACKENDS", table)
    assert attention.pick_backend(torch.device("cuda"), dtype, 64) == "efficient_varlen"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_images_without_keys_get_zeros(dtype):
    if reason := ragged.BACKENDS["efficient_varlen"].why_not(torch.device("cuda"), dtype, 64):
        pytest.skip(reason)
    q, k, v, cu, *_ = inputs([5, 3, 4], heads=2, device="cuda")
    q, k, v = (x.to(dtype) for x in (q, k[:9], v[:9]))
    cu_k = torch.tensor([0, 5, 5, 9], dtype=torch.int32, device="cuda")
    out, lse = ragged.varlen_attention(q, k, v, cu, cu_k, 5, 5, backend="efficient_varlen", return_lse=True)
    assert not out[5:8].any() and out.isfinite().all() and (lse[:, 5:8] == -torch.inf).all()
