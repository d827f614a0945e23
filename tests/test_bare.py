"""A plain block without the calls of its modules: the same numbers, and what is not plain is still called."""

import pytest
import timm
import torch
from torch import nn

from ragged import RaggedViT, blocks
from ragged.support.bare import Bare, steps_of

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def vit(**more):
    torch.manual_seed(0)
    made = timm.models.vision_transformer.VisionTransformer(**SMALL, **more).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def pieces(block, x):
    q, k, v = blocks.project(block, x)
    return q, k, v, blocks.finish_attention(block, x, v), blocks.finish_block(block, x)


VARIANTS = {
    "as DeiT": {}, "norms of queries and keys": {"qk_norm": True}, "scaled": {"init_values": 0.1},
    "no bias": {"qkv_bias": False, "proj_bias": False}, "another norm": {"norm_layer": nn.LayerNorm},
    "another activation": {"act_layer": nn.SiLU}, "gated MLP": {"mlp_layer": timm.layers.SwiGLU},
    "dropout": {"proj_drop_rate": 0.5, "drop_path_rate": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_numbers_in_both_layouts(name):
    block = vit(**VARIANTS[name]).blocks[1]
    for x in (torch.randn(2, 7, 32), torch.randn(9, 32)):
        for got, want in zip(pieces(Bare(block), x), pieces(block, x), strict=True):
            assert torch.equal(got, want)


def test_settings_and_weights_are_those_of_the_moment():
    block, x = vit().blocks[0], torch.randn(9, 32)
    bare = Bare(block)
    block.norm1.eps, block.mlp.act.approximate = 0.5, "tanh"
    block.attn.proj.bias = None
    block.attn.num_heads, block.attn.head_dim = 4, 8
    block.mlp.fc2.weight = nn.Parameter(torch.randn(32, 128))
    for got, want in zip(pieces(bare, x), pieces(block, x), strict=True):
        assert torch.equal(got, want)
    assert blocks.scale_of(bare) == 8**-0.5
    block.attn.fused_attn, block.attn.scale = False, 3.0
    assert blocks.scale_of(bare) == 3.0


def test_a_plain_block_calls_no_module():
    bare = RaggedViT(vit()).survey.bare[0]
    steps = [*bare._project, *bare._attention, *bare._norm, *bare._rest, *bare._q, *bare._k]
    assert len(steps) == 7 and not any(isinstance(step, nn.Module) for step in steps)


def test_what_hangs_on_a_module_is_not_left_out(monkeypatch):
    plain = nn.Linear(3, 3)
    assert not isinstance(steps_of(plain)[0], nn.Module)
    plain.register_forward_hook(lambda *a: None)
    assert steps_of(plain) == [plain]
    own = nn.Linear(3, 3)
    own.forward = lambda x: x
    assert steps_of(own) == [own]
    norm = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert steps_of(norm) == [norm]
    fresh = nn.GELU()
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x)
    assert steps_of(fresh) == [fresh]


def test_only_an_eager_pass_in_eval_mode_leaves_the_modules_out():
    model, x = RaggedViT(vit(proj_drop_rate=0.5)), torch.randn(2, 3, 32, 32)
    calls = []
    for name in ("begin_block", "finish_attention", "end_block", "padded_block"):
        piece = model._run[name]
        model._run[name] = lambda block, *a, piece=piece: calls.append(type(block)) or piece(block, *a)
    model(x)
    assert calls and set(calls) == {Bare}
    calls.clear()
    model.train()(x)
    assert calls and Bare not in calls
