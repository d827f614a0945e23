"""Arithmetic is counted from the modules that are there: what PyTorch's counter sees in timm's own forward pass, or a
refusal that names the part."""

import subprocess
import sys

import pytest
import timm
import torch
from pruner_cases import MODELS, SIDE, small_vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ragged
from ragged.bench.flops import block_flops, block_sizes, forward_flops


def counted(vit, batch=1):
    """What PyTorch counts in one forward pass; nothing is computed on the meta device. Attention runs as two products:
    not every fused one has a formula in every version of PyTorch."""
    size = vit.patch_embed.img_size
    for block in vit.blocks:
        block.attn.fused_attn = False
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vit.eval()(torch.empty(batch, vit.patch_embed.proj.in_channels, *size))
    return counter.get_total_flops()


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


EQUAL = {
    "deit_tiny_patch16_224": {}, "deit_tiny_distilled_patch16_224": {}, "deit3_small_patch16_224": {},
    "vit_small_patch32_224": {"img_size": (96, 160)}, "vit_tiny_patch16_224": {"num_classes": 0},
    "vit_small_patch14_dinov2": {"img_size": 140}, "vit_small_patch14_reg4_dinov2": {"img_size": 140},
    "vit_giant_patch14_dinov2": {"img_size": 140, "depth": 2}, "vit_base_patch16_clip_224": {"depth": 2},
    "vit_small_r26_s32_224": None, "vit_base_patch16_224_miil": {"depth": 2}, "vit_base_patch8_224": {"img_size": 64},
    "vit_wee_patch16_reg1_gap_256": {}, "vit_base_patch16_rpn_224": None, "vit_base_patch16_siglip_224": None,
    "vit_little_patch16_reg4_gap_256": {}, "vit_small_patch16_18x2_224": None, "vit_base_patch16_xp_224": None,
    "vit_huge_patch14_gap_224": {"depth": 2}, "test_vit": {}, "test_vit2": {}, "test_vit3": None,
    "eva02_tiny_patch14_224": None, "swin_tiny_patch4_window7_224": None, "mixer_s32_224": None,
    "vit_7b_patch16_dinov3": None, "deit_tiny_patch16_224.fb_in1k": {"in_chans": 1, "qkv_bias": False},
    "vit_medium_patch16_rope_reg1_gap_256": None, "beit_base_patch16_224": None, "cait_xxs24_224": None,
    "aimv2_large_patch14_224": {"depth": 2}, "vit_dlittle_patch16_reg1_gap_256": None,
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_timm_s_models_are_counted_or_refused(name):
    """None: refused."""
    if not timm.is_model(name):
        pytest.skip("timm has no such model here")
    options = EQUAL[name]
    vit = on_meta(name, **options or {})
    if options is None:
        with pytest.raises(ValueError, match=r"(?s)^\w+(\.\w+)?: \w+"):
            forward_flops(vit)
    else:
        assert forward_flops(vit, batch=3) == counted(vit, 3) == 3 * forward_flops(vit)


@pytest.mark.parametrize("layer", ["Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked"])
@pytest.mark.parametrize("extra", [{}, {"scale_mlp_norm": True}, {"qk_norm": True, "scale_attn_norm": True},
                                   {"init_values": 1e-5, "qkv_bias": False}, {"pre_norm": True, "reg_tokens": 3}],
                         ids=str)  # fmt: skip
def test_every_mlp(layer, extra):
    kind = getattr(timm.layers, layer)
    vit = on_meta("vit_tiny_patch16_224", mlp_layer=kind, mlp_ratio=2.5, depth=2, **extra)
    assert forward_flops(vit) == counted(vit)


@pytest.mark.parametrize("name", MODELS)
def test_the_small_models(name):
    assert forward_flops(small_vit(name)) == counted(on_meta_copy(name))


def on_meta_copy(name):
    cls, extra = MODELS[name]
    with torch.device("meta"):
        return cls(img_size=SIDE, embed_dim=48, depth=6, num_heads=3, num_classes=10, **extra)


class Adapter(nn.Linear):
    """As LoRA's: a linear layer that multiplies more than its weight."""


@pytest.mark.parametrize("where", ["blocks.1.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc2", "head"])
def test_adapters_are_refused_by_name(where):
    vit = on_meta_copy("plain")
    parent, _, name = where.rpartition(".")
    old = vit.get_submodule(where)
    setattr(vit.get_submodule(parent), name, Adapter(old.in_features, old.out_features, device="meta"))
    with pytest.raises(ValueError, match=f"{'.'.join(where.split('.')[-2:])}: expected nn.Linear, got Adapter"):
        forward_flops(vit)


def test_other_parts_are_refused_by_name():
    class Own(nn.Module):
        pass

    for where, words in {"blocks.0.mlp": "an MLP of", "blocks.1.attn": "Attention", "blocks.1": "Block",
                         "patch_embed": "patch_embed: ", "patch_embed.proj": "patch_embed: "}.items():  # fmt: skip
        vit = on_meta_copy("plain")
        parent, _, name = where.rpartition(".")
        setattr(vit.get_submodule(parent), name, Own())
        with pytest.raises(ValueError, match=f"{words}.* got Own"):
            forward_flops(vit)


def test_the_formula_of_an_ordinary_block():
    vit = small_vit()
    assert block_sizes(vit.blocks[0]) == {"qkv": 3 * 48 * 48, "scores": 48, "proj": 48 * 48, "mlp": 2 * 48 * 192}
    ends = forward_flops(vit) - len(vit.blocks) * block_flops(50, 48, 192)
    assert ends == 2 * (49 * 48 * 3 * 16 * 16 + 48 * 10)


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_cuts_are_counted_as_they_are_computed(where):
    """The padded road on equal counts runs nothing but what is counted."""
    vit = small_vit()
    model = ragged.RaggedViT(vit, ragged.PRUNERS["evit"](keep=0.5, at=(1, 3), where=where), backend="sdpa_padded")
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stages = model.trace(images).stages
    own = forward_flops(vit, stages)
    assert own <= counter.get_total_flops() <= 1.02 * own  # CLS scores and the fused token are the pruner's


# ---- the attention operator ----


def packed(lengths_q, lengths_k, device="cpu"):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(n), 3, 16, generator=g).to(device) for n in (lengths_q, lengths_k, lengths_k))
    cu = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lengths_q, lengths_k)]
    return q, k, v, *cu, max(lengths_q), max(lengths_k)


def run_op(arguments):
    with FlopCounterMode(display=False) as counter:
        torch.ops.ragged.varlen_attention(*arguments, 0.25, False, "reference")
    return counter.get_total_flops()


@pytest.mark.parametrize("lengths_q, lengths_k", [([5, 1, 7], [5, 1, 7]), ([1, 1, 1], [9, 2, 4]), ([0, 3], [4, 0])])
def test_the_operator_counts_what_each_sequence_needs(lengths_q, lengths_k):
    want = sum(4 * a * b for a, b in zip(lengths_q, lengths_k, strict=True)) * 3 * 16
    assert run_op(packed(lengths_q, lengths_k)) == want


@pytest.mark.parametrize("backend", ["auto", "sdpa_padded", "reference"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_plain_call_is_counted_like_the_operator(backend, return_lse):
    arguments = packed([5, 1, 7], [5, 1, 7])
    if return_lse and not ragged.BACKENDS[backend if backend != "auto" else "reference"].has_lse:
        pytest.skip("no log-sum-exp")
    with FlopCounterMode(display=False) as counter:
        ragged.varlen_attention(*arguments, backend=backend, return_lse=return_lse)
    assert counter.get_total_flops() == 4 * (25 + 1 + 49) * 3 * 16


def test_an_upper_bound_where_lengths_are_not_there_to_be_read():
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = packed([5, 1, 7], [5, 1, 7])
    exact, bound = 4 * (25 + 1 + 49) * 3 * 16, 4 * 13 * 7 * 3 * 16
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        assert exact <= run_op(fake) == bound
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    assert run_op(meta) == bound


@pytest.mark.gpu
def test_the_gpu_is_not_waited_for():
    arguments = packed([5, 1, 7], [5, 1, 7], "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with FlopCounterMode(display=False) as counter:
            torch.ops.ragged.varlen_attention(*arguments, 0.25, False, "auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counter.get_total_flops() == 4 * 13 * 7 * 3 * 16


@pytest.mark.parametrize("first", ["ragged", "torch.utils.flop_counter"])
def test_the_formula_is_there_whichever_comes_first(first):
    """And `import ragged` alone does not import the counter."""
    code = f"""
import sys, torch, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "ragged")
import ragged
from torch.utils.flop_counter import flop_registry
assert torch.ops.ragged.varlen_attention in flop_registry
import importlib.util
assert importlib.util.find_spec("torch.utils.flop_counter") is not None
assert not [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("ragged")], sys.meta_path
"""
    subprocess.run([sys.executable, "-c", code], check=True)
