"""Which vision transformers can be pruned: a clear refusal or the right answer, never a wrong answer."""

import pytest
import torch
from pruner_cases import DIM, SIDE, assert_logits, pictures, with_variance
from timm.layers import SwiGLUPacked
from timm.models import create_model
from timm.models import vision_transformer as tv

import ragged
from ragged.blocks import embed
from ragged.support import Survey

REFUSAL = (ValueError, NotImplementedError, TypeError)


class GatedAttention(tv.Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, gated=True, **kwargs)


class ReversedBlocks(tv.VisionTransformer):
    """A model with a forward pass of its own."""

    def forward_features(self, x, **kwargs):
        return super().forward_features(x.flip(-1), **kwargs) * 2


def odd_vit(cls=tv.VisionTransformer, **extra):
    settings = {"img_size": SIDE, "embed_dim": DIM, "depth": 2, "num_heads": 3, "num_classes": 10} | extra
    try:
        return with_variance(cls(**settings))
    except TypeError:
        pytest.skip("this timm has no such option")


REFUSED = {
    "avg_without_cls": {"class_token": False, "global_pool": "avg"},
    "map_without_cls": {"class_token": False, "global_pool": "map"},
    "parallel_scaling": {"block_fn": tv.ParallelScalingBlock},
    "parallel_things": {"block_fn": tv.ParallelThingsBlock},
    "post_norm": {"block_fn": tv.ResPostBlock, "init_values": 0.5},
    "differential": {"attn_layer": "diff", "num_heads": 3},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_refused(kind):
    vit = odd_vit(**REFUSED[kind])
    with pytest.raises((ValueError, NotImplementedError)) as refusal:
        ragged.RaggedViT(vit, ragged.PRUNERS["threshold_l2"](at=(1,)))
    assert len(str(refusal.value)) > 20


OTHERS = {
    "resnet10t": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1)},
    "eva02_tiny_patch14_224": {"depth": 1},
    "vit_tiny_r_s16_p8_224": {"depth": 1},  # patches from a convolutional network
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused(name):
    with pytest.raises(REFUSAL, match=r"(?i)vit|vision ?transformer"):
        ragged.RaggedViT(create_model(name, **OTHERS[name]))


# Models at the edge of the scope.
ODD = {
    "final_norm": {"final_norm": False}, "fc_norm": {"fc_norm": True}, "pre_norm": {"pre_norm": True},
    "no_embed_class": {"no_embed_class": True}, "no_pos_embed": {"pos_embed": ""}, "no_head": {"num_classes": 0},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True}, "dynamic_size": {"dynamic_img_size": True},
    "no_bias": {"qkv_bias": False, "proj_bias": False}, "swiglu": {"mlp_layer": SwiGLUPacked},
    "gated": {"attn_layer": GatedAttention}, "pool_none": {"global_pool": ""}, "pool_avg": {"global_pool": "avg"},
    "pool_map": {"global_pool": "map"}, "pool_max": {"global_pool": "max"}, "own_forward": {"cls": ReversedBlocks},
    "dropout": {"attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1, "pos_drop_rate": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
@torch.no_grad()
def test_odd_models_are_right_or_refused(kind):
    vit = odd_vit(**ODD[kind])
    for pruner in (None, ragged.PRUNERS["threshold_l2"](keep=1.0, at=(1,))):
        try:
            model = ragged.RaggedViT(vit, pruner)
        except (ValueError, NotImplementedError) as refusal:
            assert len(str(refusal)) > 20
        else:
            assert_logits(model(pictures()), vit(pictures()))


PATCHES = {}, {"img_size": (64, 96)}, {"in_chans": 1, "patch_size": 8}, {"dynamic_img_size": True}


@pytest.mark.parametrize("options", [*PATCHES, {"dynamic_img_pad": True}], ids=str)
def test_the_embedding_is_the_networks_own(options):
    """As a matrix product where the patches neither overlap nor are padded, else as the network does it."""
    vit = odd_vit(**options)
    images = torch.randn(2, options.get("in_chans", 3), *vit.patch_embed.img_size)
    want = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    as_product = Survey(vit).as_product
    assert as_product == (options not in ({"dynamic_img_size": True}, {"dynamic_img_pad": True}))
    torch.testing.assert_close(embed(vit, images, as_product), want)
    torch._dynamo.reset()  # other tests compiled it for other networks
    product = torch.compile(embed, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(product(vit, images, as_product), want)
