"""What the tests of the pruners share: small models, pictures, predictors, the comparison with the dense programs."""

import functools
import math

import dense_reference as dense
import torch
from safetensors.torch import save_file
from timm.models import vision_transformer as tv
from timm.models.deit import VisionTransformerDistilled

import ragged

BATCH, SIDE, PATCHES, DEPTH, DIM = 4, 112, 49, 6, 48
STAGES = (1, 2, 4)  # the three-stage schedule of a six-block model
RATES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
CPU_BACKENDS = ("auto", "sdpa_padded", "reference")
MARGIN = 1e-5  # decisions closer than this (relative) may fall either way in fp32; such images are left out

MODELS = {
    "plain": (tv.VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (tv.VisionTransformer, {"reg_tokens": 4}),
    "layerscale": (tv.VisionTransformer, {"init_values": 0.5}),
    "qk_norm": (tv.VisionTransformer, {"qk_norm": True}),
}
PUBLISHED = {"threshold_l2": "after", "dynamicvit": "before", "evit": "inside", "ats": "inside",
             "random": "before", "random_adaptive": "before"}  # fmt: skip
ALL = ("threshold_l2", "tau", "dynamicvit", "evit", "ats", "random", "random_adaptive")
ADAPTIVE = ("tau", "ats", "random_adaptive")  # counts differ between images
VARIANTS = {"tau": "threshold_l2", "random_adaptive": "random"}  # and the pruner of which they are a setting


def with_variance(module, seed=0):
    """Random weights large enough that attention is far from uniform and scores differ between images."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        if p.ndim == 1:
            p.data = 0.2 * noise if name.endswith("bias") else p.data + 0.2 * noise
        elif name.endswith(("pos_embed", "token")):
            p.data = 0.5 * noise
        else:
            p.data = noise * (1.5 if "qkv" in name else 1.0) / math.sqrt(p[0].numel())
    return module.eval()


@functools.cache
def small_vit(name="plain"):
    cls, extra = MODELS[name]
    return with_variance(cls(img_size=SIDE, embed_dim=DIM, depth=DEPTH, num_heads=3, num_classes=10, **extra))


@functools.cache
def pictures(batch=BATCH, side=SIDE, seed=1):
    """Noise whose contrast differs between places and images, so that images keep different numbers of patches."""
    g = torch.Generator().manual_seed(seed)
    contrast = torch.rand(batch, 1, side // 16, side // 16, generator=g).mul(1.5).exp()
    return torch.randn(batch, 3, side, side, generator=g) * contrast.repeat_interleave(16, 2).repeat_interleave(16, 3)


@functools.cache
def predictor_weights(dim=DIM):
    """The 30 tensors of three score predictors, under their published names."""
    stages = with_variance(torch.nn.ModuleList(dense.Predictor(dim) for _ in range(3)), seed=2)
    return {f"score_predictor.{key}": value.clone() for key, value in stages.state_dict().items()}


def save_predictors(folder):
    """A file as users have it: flat keys, safetensors. Returns its path."""
    path = str(folder / "stages.safetensors")
    save_file(predictor_weights(), path)
    return path


def arguments(name, rate):
    if name == "ats":
        return {"samples": max(2, int(rate * PATCHES))}
    if name == "tau":
        return {"tau": 1.13 - rate / 3}
    if name == "random_adaptive":
        return {"keep": rate, "adaptive": True}
    return {"keep": rate}


def build(name, rate, predictors=None, **place):
    """The package's pruner."""
    kwargs = arguments(name, rate) | place
    if name == "dynamicvit":
        kwargs["predictors"] = predictors
    return ragged.PRUNERS[VARIANTS.get(name, name)](**kwargs)


@functools.cache
def expected(vit_name, name, rate, **place):
    """The dense program's answer for the same pruner."""
    kwargs = arguments(name, rate) | place
    if name == "dynamicvit":
        kwargs["predictors"] = dense.load_predictors(predictor_weights(), DIM)
    function = getattr(dense, VARIANTS.get(name, name))
    return function(small_vit(vit_name), pictures(), **kwargs)


def assert_logits(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def assert_same(trace, want, where=None, ordered=True):
    """Kept rows per stage and image, and logits. Images with a decision too close to call are left out."""
    assert [s.block for s in trace.stages] == [s.block for s in want.stages]
    assert all(where in (None, s.where) for s in trace.stages)
    sure = [b for b, margin in enumerate(want.set_margin) if margin > MARGIN]
    assert len(sure) >= len(want.set_margin) / 2, "too few clear-cut images: the comparison would be empty"
    for got_stage, want_stage in zip(trace.stages, want.stages, strict=True):
        for b in sure:
            got, ids = got_stage.ids[b].tolist(), want_stage.ids[b]
            assert got_stage.counts[b] == want_stage.counts[b] == len(got)
            in_order = ordered and want.order_margin[b] > MARGIN
            assert got == ids if in_order else sorted(got) == sorted(ids)
    assert_logits(trace.logits[sure], want.logits[sure])


def check(vit_name, name, rate, predictor_file, backend="auto", **place):
    pruner = build(name, rate, predictor_file, **place)
    trace = ragged.RaggedViT(small_vit(vit_name), pruner, backend=backend).trace(pictures())
    # DynamicViT sorts even what it keeps whole; nobody needs that.
    ordered = name != "dynamicvit" or rate < 1
    assert_same(trace, expected(vit_name, name, rate, **place), place["where"], ordered)
    return trace
