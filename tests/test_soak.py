"""tests/soak.py itself: a short run here, a longer one on a GPU."""

import json

import pytest
import soak
import torch
from gpu_tools import uncaptured

import ragged

SMALL = ["--device", "cpu", "--model", "small", "--images", "12"]


def test_a_short_soak_on_the_cpu():
    result = soak.main([*SMALL, "--batches", "120"])
    assert result["ok"], json.dumps(result, indent=1)
    assert result["batches"]["all"] == 120 and result["checks"]["compared"] >= 10
    assert {"attention", "eager", "compiled"} <= set(result["batches"])


def test_a_soak_notices_wrong_results(monkeypatch):
    real = ragged.varlen_attention
    monkeypatch.setattr(ragged, "varlen_attention", lambda *a, **o: real(*a, **o) + 0.1)
    monkeypatch.setattr(soak.Soak, "warm", soak.Soak.build)
    monkeypatch.setattr(soak, "CHECK_EVERY", 1)
    result = soak.main([*SMALL, "--batches", "9"])
    assert not result["ok"] and any("attention: off by" in failure for failure in result["failures"])


def test_a_soak_notices_what_was_compiled_late(monkeypatch):
    counts = iter(range(1, 100))
    monkeypatch.setattr(soak, "compiled_kernels", lambda: {f"kernel {i}" for i in range(next(counts))})
    monkeypatch.setattr(soak.Soak, "warm", soak.Soak.build)
    result = soak.main([*SMALL, "--batches", "1"])
    assert not result["ok"] and any("compiled after the warm-up: kernel " in f for f in result["failures"])


@pytest.mark.gpu
@pytest.mark.slow
def test_a_soak_on_the_gpu(request):
    result = soak.main(["--batches", "1000", "--seconds", "3600", "--captured", "4"])
    with uncaptured(request):
        print("\n" + json.dumps(result))
    assert result["ok"], json.dumps(result["failures"], indent=1)
    assert result["compiled"]["kernels"] > 30 and result["batches"]["all"] == 1000
    assert result["buckets_missed"] == 0 and torch.cuda.is_available()
