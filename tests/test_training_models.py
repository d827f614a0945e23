"""Gradients of whole pruned models against those of the dense programs in dense_reference.py, in float64; dropout and
stochastic depth against timm's own."""

import copy
import functools

import dense_reference as dense
import pytest
import torch
from pruner_cases import (
    ALL,
    DIM,
    PUBLISHED,
    STAGES,
    VARIANTS,
    arguments,
    build,
    pictures,
    predictor_weights,
    save_predictors,
    small_vit,
)
from timm.models import vision_transformer as tv
from torch import nn

import ragged
from ragged.support.training import drop_images

TRUTH = {"rtol": 1e-8, "atol": 1e-11}
BACKENDS = ("sdpa_padded", "paper_padded", "reference")


@pytest.fixture(scope="module")
def predictors(tmp_path_factory):
    return save_predictors(tmp_path_factory.mktemp("predictors"))


def exact(name="plain"):
    return copy.deepcopy(small_vit(name)).double()


def place_of(name, where=None):
    return {"at": STAGES, "where": where or PUBLISHED[VARIANTS.get(name, name)]}


def gradients(parameters, images, logits):
    """Of a loss in which every logit of every image has a weight of its own."""
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits).cos()
    (logits * weights).sum().backward()
    found = {name: p.grad for name, p in parameters if p.grad is not None}
    return found | {"pixels": images.grad}


@functools.cache
def truth(vit_name, name, rate, where):
    """Logits and gradients of the dense program."""
    vit, images = exact(vit_name), pictures().double().requires_grad_()
    kwargs = arguments(name, rate) | place_of(name, where)
    if name == "dynamicvit":
        kwargs["predictors"] = [p.double() for p in dense.load_predictors(predictor_weights(), DIM)]
    with torch.enable_grad():
        found = getattr(dense, VARIANTS.get(name, name))(vit, images, **kwargs)
        return found.logits.detach(), gradients(vit.named_parameters(), images, found.logits)


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = float(expected.abs().max())
        assert scale > 0 or "head" in name or "bias" in name, f"{name}: the comparison would be empty"
        torch.testing.assert_close(got[name], expected, rtol=TRUTH["rtol"], atol=max(scale, 1) * TRUTH["atol"],
                                   msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip


def check(vit_name, name, rate, backend, predictors, where=None):
    want, wanted = truth(vit_name, name, rate, where)
    vit, images = exact(vit_name), pictures().double().requires_grad_()
    model = ragged.RaggedViT(vit, build(name, rate, predictors, **place_of(name, where)), backend)
    with torch.enable_grad():
        logits = model.train()(images)  # nothing is dropped by these networks but tokens
        got = gradients(vit.named_parameters(), images, logits)
    torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-10)
    assert_same_gradients(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [0.7, 0.3])
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_the_dense_program(name, rate, backend, predictors):
    check("plain", name, rate, backend, predictors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vit_name", ["distilled", "registers", "layerscale", "qk_norm"])
@pytest.mark.parametrize("name", ["evit", "ats"])
def test_gradients_of_other_networks(name, vit_name, backend, predictors):
    check(vit_name, name, 0.5, backend, predictors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["before", "inside", "after"])
@pytest.mark.parametrize("name", ["threshold_l2", "dynamicvit", "evit", "ats"])
def test_gradients_of_every_place_of_a_cut(name, where, backend, predictors):
    check("plain", name, 0.5, backend, predictors, where)


# ---- what is dropped in training ----


def dropping(**rates):
    """A network that drops, and its twin."""
    torch.manual_seed(3)
    vit = tv.VisionTransformer(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=10, **rates)
    return vit, copy.deepcopy(vit)


RATES = ({"drop_path_rate": 0.5}, {"proj_drop_rate": 0.3}, {"pos_drop_rate": 0.3}, {"drop_rate": 0.4},
         {"drop_path_rate": 0.4, "proj_drop_rate": 0.2, "pos_drop_rate": 0.1, "init_values": 0.5})  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pruner", [None, "evit", "threshold_l2"])
@pytest.mark.parametrize("rates", RATES, ids=str)
def test_without_a_cut_the_same_seed_drops_the_same_as_timm(rates, pruner, backend):
    """Draws, scaling and their order are timm's: nothing is kept from it but tokens that a pruner drops."""
    mine, theirs = dropping(**rates)
    kept = None if pruner is None else ragged.PRUNERS[pruner](keep=1.0, at=(1, 2))
    model, images = ragged.RaggedViT(mine, kept, backend).train(), torch.randn(5, 3, 64, 64)
    theirs.train()
    found = []
    for run in (model, theirs):
        torch.manual_seed(11)
        with torch.enable_grad():
            logits = run(images)
            logits.square().sum().backward()
        found.append(logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], model.eval()(images), rtol=1e-2, atol=1e-3)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters()):
        scale = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scale", [True, False])
def test_stochastic_depth_is_one_draw_for_each_image(scale):
    from timm.layers import DropPath

    lengths = [3, 0, 1, 7, 4] * 40
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.rand(int(cu[-1]), 6) + 0.5
    ratio = drop_images(DropPath(0.25, scale).train(), x, cu) / x
    value, seen = (1 / 0.75 if scale else 1.0), []
    for begin, end in zip(cu, cu[1:]):
        own = ratio[begin:end]
        if len(own):
            assert (own == own[0, 0]).all() or torch.allclose(own, own[0, 0].expand_as(own))
            seen.append(float(own[0, 0]))
    kept = [s for s in seen if s > 0]
    assert all(abs(s - value) < 1e-6 for s in kept) and 0.6 < len(kept) / len(seen) < 0.9
    assert torch.equal(drop_images(DropPath(0.25, scale).eval(), x, cu), x)
    assert torch.equal(drop_images(nn.Identity(), x, cu), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["evit", "ats", "tau", "dynamicvit"])
def test_stochastic_depth_under_a_cut_leaves_out_whole_images(name, backend, predictors):
    """With every half-block left out in each image, or none, an image is that of a network without the block."""
    vit = copy.deepcopy(small_vit())
    for block in vit.blocks:
        block.drop_path1, block.drop_path2 = (LeaveOut((0, 2)) for _ in range(2))
    pruner = build(name, 0.6, predictors, at=(2,), where="after")
    model, images = ragged.RaggedViT(vit, pruner, backend).train(), pictures()
    got = model(images)
    whole = ragged.RaggedViT(small_vit(), pruner, backend)(images)
    shell = copy.deepcopy(small_vit())
    for block in shell.blocks:
        block.attn.proj, block.mlp = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        for part in (block.attn.proj, block.mlp):
            nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    empty = ragged.RaggedViT(shell, pruner, backend)(images)
    for b in range(len(images)):
        torch.testing.assert_close(got[b], (empty if b in (0, 2) else whole)[b], rtol=1e-4, atol=1e-4)




class LeaveOut(tv.DropPath):
    """Stochastic depth that is not left to chance: the images `gone` lose the half-block."""

    def __init__(self, gone):
        super().__init__(0.5)
        self.gone = gone

    def forward(self, x):
        factor = x.new_ones(len(x))
        factor[list(self.gone)] = 0 if self.training else 1
        return x * factor.view(-1, *[1] * (x.dim() - 1))


LeaveOut.__name__ = "DropPath"  # by its name a part of a block is known to do nothing in eval mode


@pytest.mark.parametrize("part", ["attn_drop", "patch_drop"])
def test_what_cannot_be_dropped_is_refused_by_name(part):
    vit, theirs = dropping(**{f"{part}_rate": 0.2})
    model, images = ragged.RaggedViT(vit, backend="sdpa_padded"), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=part):
        model.train()(images)
    torch.testing.assert_close(model.eval()(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_checkpoints_of_activations_are_refused_where_they_would_be_made():
    vit, _ = dropping()
    model, images = ragged.RaggedViT(vit, backend="sdpa_padded").train(), torch.randn(2, 3, 64, 64)
    vit.set_grad_checkpointing(True)
    assert model(images).shape == (2, 10)
    with torch.enable_grad(), pytest.raises(ValueError, match="grad_checkpointing"):
        model(images)


def test_another_pruner_leaves_the_mode_as_it_is():
    model = ragged.RaggedViT(dropping(drop_path_rate=0.5)[0], None, "sdpa_padded").train()
    model.vit.blocks[1].eval()
    twin = model.with_pruner(ragged.PRUNERS["evit"](keep=0.5, at=(1,)))
    assert twin.training and model.vit.training and not model.vit.blocks[1].training


@pytest.mark.parametrize("whose", ["model", "vit", "block"])
def test_each_module_is_in_the_mode_that_it_is_in(whose):
    """As in timm: what is set to train drops, and nothing else."""
    mine, theirs = dropping(drop_path_rate=0.5, proj_drop_rate=0.2)
    model, images = ragged.RaggedViT(mine, None, "sdpa_padded"), torch.randn(3, 3, 64, 64)
    theirs.eval()
    {"model": model, "vit": mine, "block": mine.blocks[2]}[whose].train()
    (theirs.blocks[2] if whose == "block" else theirs).train()
    found = []
    for run in (model, theirs):
        torch.manual_seed(1)
        found.append(run(images))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_capture_is_for_inference_only():
    model = ragged.RaggedViT(small_vit(), None, "sdpa_padded")
    try:
        for part in (model, model.vit.blocks[2]):
            part.train()
            with pytest.raises(RuntimeError, match=r"inference only.*model\.eval\(\)"):
                model.capture(2)
            model.eval()
    finally:
        small_vit().eval()
