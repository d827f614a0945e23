"""The suite `training`: what is timed is a step, and its gradients were looked at before."""

import pytest
import torch

from ragged import RaggedViT, blocks
from ragged.bench.runner import Options, Skip, Wrong
from ragged.bench.suites import training


@pytest.fixture(scope="module")
def bench():
    return training.Bench("deit_tiny", 2, "cpu")


def test_every_provider_in_every_mode_and_at_every_share():
    (case,) = training.training(Options(device="cpu", models=("deit_small",), batches=(8,)))
    columns = [candidate.columns for candidate in case.candidates]
    assert len({tuple(sorted(c.items())) for c in columns}) == len(columns)
    others = {"triton", "dense", "sdpa_padded", "torch_varlen", "flash_attn"}
    assert {c["backend"] for c in columns} == {"unpruned", *others}
    assert {c["keep"] for c in columns} == {1.0, 0.7, 0.5, 0.3} and {c["mode"] for c in columns} == {"eager", "compile"}
    assert "U(30,168)" in {c["tokens"] for c in columns}


def test_a_step_trains_and_says_what_it_saved(bench):
    columns = {"backend": "dense", "mode": "eager", "keep": 0.5}
    step = training.Step(lambda: bench, lambda images: training._equal(0.5, images), columns)
    subject = step.build()
    before = [p.clone() for p in bench.vit.parameters()]
    with subject.around():
        assert bench.vit.training and torch.is_grad_enabled()
        subject.calls[0]()
    assert not bench.vit.training
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.vit.parameters()))
    values = step.values(subject)
    assert values["kept_tokens"] == 99 and 1.4 < values["flops_ratio"] < 1.6


def test_wrong_gradients_are_not_timed(bench):
    def careless(block, x, *rest):
        return blocks.padded_block(block, x.detach() + 0 * x, *rest)  # right on the way there, nothing on the way back

    model = RaggedViT(bench.vit, None, "sdpa_padded")
    bench.check(model, None)
    model._run = model._run | {"padded_block": careless}
    with pytest.raises(Wrong, match="gradient"):
        bench.check(model, None)


def test_what_cannot_run_here_has_its_reason(bench):
    for columns in ({"backend": "torch_varlen", "mode": "eager"}, {"backend": "dense", "mode": "compile"}):
        with pytest.raises(Skip):
            training.Step(lambda: bench, lambda images: training._equal(0.5, images), columns).build()
