"""On a GPU: gradients through the small kernels and through whole models against PyTorch's own, and training that
compiles. Run with pytest -m gpu."""

import copy

import pytest
import torch
from attention_cases import by_both_ways
from pruner_cases import build, pictures, small_vit

import ragged
from ragged import rows as row_ops
from ragged.rows import scores as score_ops

pytestmark = [pytest.mark.gpu]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LENGTHS = [120, 0, 1, 197, 64, 33]


def ragged_index(width=200, device="cuda"):
    index = [torch.cat((torch.randperm(n), torch.zeros(width - n, dtype=torch.int64))) for n in LENGTHS]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return torch.stack(index).to(device), torch.tensor([(n + 1) // 2 for n in LENGTHS]).int().to(device), cu.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_taken_rows(dtype, monkeypatch):
    index, counts, cu = ragged_index()
    total, ids = int(counts.sum()) + 3, torch.arange(int(cu[-1]), device="cuda")
    run = lambda x: row_ops.take_rows(x, ids, cu[:-1], index, counts, total, 99)[0]  # noqa: E731
    got, want = by_both_ways(monkeypatch, run, torch.randn(len(ids), 192, device="cuda", dtype=dtype))
    assert torch.equal(*got, *want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_moved_rows(fused, dtype, monkeypatch):
    index = torch.stack([torch.randperm(197)[:98] for _ in range(4)]).cuda()
    starts, ids = torch.arange(0, 4 * 197, 197, device="cuda").int(), torch.arange(4 * 197, device="cuda")
    blend = torch.rand(4, 197, device="cuda").scatter(1, index, 0.0) / 99
    leaves = (torch.randn(4 * 197, 384, device="cuda", dtype=dtype), *([blend] if fused else []))
    run = lambda x, *b: row_ops.move_rows(x, ids, starts, index, b[0] if b else None)[0]  # noqa: E731
    for a, b in zip(*by_both_ways(monkeypatch, run, *leaves)):
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=1e-2, atol=(1e-4 if dtype == torch.float32 else 1e-2) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_row_of_cls(dtype, monkeypatch):
    _, _, cu = ragged_index()
    qkv = torch.randn(int(cu[-1]), 3, 6, 64, device="cuda", dtype=dtype)
    run = lambda x: score_ops.cls_attention(x[:, 0], x[:, 1], cu[:-1], cu.diff(), 197, 0.125)  # noqa: E731
    (got,), (want,) = by_both_ways(monkeypatch, run, qkv)
    scale = float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=1e-2, atol=(1e-5 if dtype == torch.float32 else 1e-2) * scale)


@pytest.mark.parametrize("backend", ["triton", "sdpa_padded", "torch_varlen"])
@pytest.mark.parametrize("name", ["threshold_l2", "tau", "evit", "ats"])
def test_models_in_mixed_precision_learn_what_they_learn_in_full(name, backend):
    """The same selections in float64 are the truth, and a padded network in mixed precision is the measure."""
    from ragged.bench.pipelines import Noted, Replay

    def gradients(vit, pruner, backend, images, half):
        with torch.enable_grad():
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                logits = ragged.RaggedViT(vit, pruner, backend).train()(images)
            weights = torch.linspace(-1, 2, logits.numel(), device=logits.device, dtype=torch.float64)
            (logits.double().flatten() * weights).sum().backward()
        return {n: p.grad.cpu().double() for n, p in vit.named_parameters()}

    noted = Noted(build(name, 0.5, at=(1, 2, 4), **({"fuse": False} if name == "evit" else {})))
    vit, images = copy.deepcopy(small_vit()).cuda(), pictures().cuda()
    got = gradients(copy.deepcopy(vit), noted, backend, images, True)
    again = Replay(noted, noted.taken)
    plain = gradients(copy.deepcopy(vit), again, "sdpa_padded", images, True)
    exact = gradients(copy.deepcopy(vit).double(), again, "sdpa_padded", images.double(), False)
    for n, want in exact.items():
        error, allowed = ((x[n] - want).norm() for x in (got, plain))
        assert error <= 2 * allowed + 2e-2 * want.norm() + 1e-9, n


@pytest.mark.slow
def test_compiled_pieces_train():
    found = []
    for compiled in (False, True):
        vit = copy.deepcopy(small_vit()).cuda()
        model = ragged.RaggedViT(vit, build("evit", 0.5, at=(1, 2, 4)), "triton").train()
        if compiled:
            model.compile(dynamic=True)
        with torch.enable_grad():
            model(pictures().cuda()).square().sum().backward()
        found.append([p.grad for p in vit.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(a.abs().max()))


def test_two_runs_agree_to_the_bit():
    found = []
    for _ in range(2):
        vit = copy.deepcopy(small_vit()).cuda()
        with torch.enable_grad():
            ragged.RaggedViT(vit, build("ats", 0.5, at=(1, 2, 4)), "triton").train()(pictures().cuda()).sum().backward()
        found.append([p.grad for p in vit.blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
