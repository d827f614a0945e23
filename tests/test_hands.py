"""What users hang on a ViT, or change about it: the answer is timm's own, or a sentence says what is not supported.

Every entry of `HANGING` is done to one of two equal networks before it is wrapped, and to another after it was wrapped
and used. The pruner drops nothing, so that timm's model under the same hands is the right answer.
"""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from pruner_cases import DIM, SIDE, assert_logits, pictures, with_variance
from timm.models import vision_transformer as tv
from torch import nn
from torch.nn.utils import parametrizations, prune

import ragged
from ragged.bench.pipelines import Noted, Replay
from ragged.pruners import Pruner

REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError)
KEEP_ALL = {
    "unpruned": lambda: None,
    "threshold_l2": lambda: ragged.PRUNERS["threshold_l2"](keep=1.0, at=(1,)),
    "evit": lambda: ragged.PRUNERS["evit"](keep=1.0, at=(1,)),
    "dynamicvit": lambda: ragged.PRUNERS["dynamicvit"](keep=1.0, at=(1, 2)),
}


def vit(**more):
    settings = {"img_size": SIDE, "embed_dim": DIM, "depth": 3, "num_heads": 3, "num_classes": 10, "init_values": 0.5}
    return with_variance(tv.VisionTransformer(**settings | more))


def part(model, name):
    return model.get_submodule(name)


# ---- what is hung on


def scaled(module, inputs, output):
    return output * 1.1


def marks_the_first(module, inputs, output):
    """Sees more than one row: on packed rows it would do something else."""
    output = output.clone()
    output[:, 0] = output.mean(1) if output.dim() > 2 else output[:, 0] * 2
    return output


def before(module, inputs):
    return (inputs[0] * 0.9, *inputs[1:])


def before_with_words(module, inputs, words):
    return (inputs[0] * 0.9, *inputs[1:]), words


def hook(name, function=scaled):
    return lambda model: part(model, name).register_forward_hook(function)


def pre_hook(name, function=before, **options):
    return lambda model: part(model, name).register_forward_pre_hook(function, **options)


def replaced(name, method="forward"):
    """A method replaced on the instance."""

    def do(model):
        owner = part(model, name)
        original = getattr(owner, method)
        setattr(owner, method, lambda *a, **k: original(*a, **k) * 1.1)

    return do


class LoRA(nn.Module):
    def __init__(self, base, zero=False):
        super().__init__()
        width_in, width_out = (base.in_features, base.out_features)
        self.base, self.down, self.up = base, nn.Linear(width_in, 2), nn.Linear(2, width_out)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class ConvLoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.side = nn.Conv2d(base.in_channels, base.out_channels, base.kernel_size, base.stride)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x):
        return self.base(x) + self.side(x)


class MixesTokens(nn.Module):
    """An adapter over all tokens, which may begin as nothing."""

    def __init__(self, base, strength=0.5):
        super().__init__()
        self.base, self.gain = base, nn.Parameter(torch.tensor(float(strength)))

    def forward(self, x):
        return self.base(x) + self.gain * x.mean(1, keepdim=True)


def wrapped_in(name, make):
    def do(model):
        owner, _, leaf = name.rpartition(".")
        torch.manual_seed(3)
        setattr(part(model, owner), leaf, make(part(model, name)).eval())

    return do


def masked(name):
    def do(model):
        torch.manual_seed(5)
        prune.random_unstructured(part(model, name), "weight", amount=0.4)
        part(model, name).weight_orig.data.mul_(1.5)  # what the mask is applied to changes, as in training

    return do


def parametrized(name, how=parametrizations.weight_norm):
    def do(model):
        torch.manual_seed(6)
        how(part(model, name))
        model.eval()

    return do


class OwnBlock(tv.Block):
    def forward(self, x, *arguments, **words):
        return super().forward(x, *arguments, **words) + 0.1 * x.mean(1, keepdim=True)


class OwnAttention(tv.Attention):
    def forward(self, x, *arguments, **words):
        return super().forward(x, *arguments, **words) * 1.2


class OwnPool(tv.VisionTransformer):
    def pool(self, x, pool_type=None):
        return x.mean(1)


class OwnHead(tv.VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) * 2 + x.mean()


class OwnPositions(tv.VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x) * 1.1


class OwnPass(tv.VisionTransformer):
    def forward(self, x, *arguments, **words):
        return super().forward(x.flip(-1), *arguments, **words)


def of_class(name, kind):
    return lambda model: setattr(part(model, name) if name else model, "__class__", kind)


def another_block(model):
    model.blocks[1] = copy.deepcopy(model.blocks[2])


def a_dropped_block(model):
    model.blocks[1] = nn.Identity()


def a_longer_model(model):
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def another_head(model):
    torch.manual_seed(7)
    model.reset_classifier(7)


def dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5


def stochastic_depth(model):
    from timm.layers import DropPath

    model.blocks[1].drop_path1, model.blocks[1].drop_path2 = DropPath(0.5).eval(), DropPath(0.5).eval()


NAMES = (
    "blocks.1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.attn.q_norm", "blocks.1.norm1",
    "blocks.1.ls1", "blocks.1.drop_path1", "blocks.1.mlp", "blocks.1.mlp.fc1", "patch_embed", "patch_embed.proj",
    "pos_drop", "patch_drop", "norm_pre", "norm", "fc_norm", "head_drop", "head", "blocks", "",
)  # fmt: skip
HANGING = {
    **{f"hook on {name or 'the model'}": hook(name) for name in NAMES},
    **{f"pre-hook on {name or 'the model'}": pre_hook(name) for name in NAMES},
    **{f"forward of {name or 'the model'}": replaced(name) for name in NAMES},
    **{f"hook that mixes, on {name}": hook(name, marks_the_first) for name in NAMES[1:12] if "patch" not in name},
    "pre-hook with keywords": pre_hook("blocks.1.attn", before_with_words, with_kwargs=True),
    "forward_features": replaced("", "forward_features"), "forward_head": replaced("", "forward_head"),
    "pool": replaced("", "pool"), "_pos_embed": replaced("", "_pos_embed"),
    "lora on qkv": wrapped_in("blocks.1.attn.qkv", LoRA), "lora on proj": wrapped_in("blocks.1.attn.proj", LoRA),
    "lora on fc1": wrapped_in("blocks.1.mlp.fc1", LoRA), "lora on the head": wrapped_in("head", LoRA),
    "lora on patches": wrapped_in("patch_embed.proj", ConvLoRA),
    "mixing mlp": wrapped_in("blocks.1.mlp", MixesTokens), "mixing norm": wrapped_in("norm", MixesTokens),
    "mixing qkv": wrapped_in("blocks.1.norm1", MixesTokens),
    "mask on patches": masked("patch_embed.proj"), "mask on qkv": masked("blocks.1.attn.qkv"),
    "mask on fc2": masked("blocks.1.mlp.fc2"),
    "weight norm": parametrized("blocks.1.attn.qkv"), "weight norm on patches": parametrized("patch_embed.proj"),
    "spectral norm": parametrized("blocks.1.mlp.fc1", parametrizations.spectral_norm),
    "old weight norm": parametrized("blocks.1.attn.proj", nn.utils.weight_norm),
    "own block": of_class("blocks.1", OwnBlock), "own attention": of_class("blocks.1.attn", OwnAttention),
    "own pool": of_class("", OwnPool), "own head": of_class("", OwnHead), "own positions": of_class("", OwnPositions),
    "own pass": of_class("", OwnPass),
    "another block": another_block, "a dropped block": a_dropped_block, "a longer model": a_longer_model,
    "another head": another_head, "another pooling": lambda m: m.reset_classifier(7, "avg"),
    "dropout": dropout, "stochastic depth": stochastic_depth,
    "a compiled block": lambda m: m.blocks.__setitem__(1, torch.compile(m.blocks[1], backend="eager")),
}  # fmt: skip
# What has to be exact under every pruner, and may not be refused.
ALWAYS = (
    "lora on qkv", "lora on proj", "lora on fc1", "lora on patches", "mask on patches", "mask on qkv", "mask on fc2",
    "weight norm", "weight norm on patches", "spectral norm", "old weight norm", "own positions", "another block",
    "a longer model", "another head", "dropout", "stochastic depth", "lora on the head", "hook on patch_embed",
    "hook on patch_embed.proj", "hook on norm_pre", "hook on norm", "hook on head", "_pos_embed",
)  # fmt: skip
UNPRUNED_TOO = ("hook on blocks.1", "pre-hook on blocks.1", "hook on blocks.1.attn", "hook on blocks.1.attn.qkv",
                "hook on blocks.1.drop_path1", "forward of blocks.1", "forward of blocks.1.attn", "own block",
                "own attention", "mixing mlp", "hook that mixes, on blocks.1.mlp")  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", HANGING)
def test_what_hangs_on_a_model_counts_or_is_refused(kind, late):
    for pruner in KEEP_ALL:
        mine, theirs = vit(), vit()
        hang = HANGING[kind]
        hang(theirs)
        want = theirs(pictures())
        try:
            if not late:
                hang(mine)
            model = ragged.RaggedViT(mine, KEEP_ALL[pruner]())
            if late:
                model(pictures())
                hang(mine)
            got = model(pictures())
        except REFUSALS as refusal:
            assert len(str(refusal)) > 20 and "object has no attribute" not in str(refusal)
            assert kind not in ALWAYS, refusal
            assert kind not in UNPRUNED_TOO or pruner in ("evit", "dynamicvit"), refusal
        else:
            assert_logits(got, want)


@pytest.mark.parametrize("kind", ["hook on blocks.2", "hook on blocks.2.mlp", "mixing mlp", "hook on norm"])
def test_different_counts_refuse_what_expects_one(kind):
    model = vit()
    {**HANGING, "hook on blocks.2": hook("blocks.2"), "hook on blocks.2.mlp": hook("blocks.2.mlp"),
     "mixing mlp": wrapped_in("blocks.2.mlp", MixesTokens)}[kind](model)  # fmt: skip
    for backend in ("sdpa_padded", "reference"):
        pruner = ragged.PRUNERS["threshold_l2"](tau=1.0, at=(1,))
        with pytest.raises(ValueError, match="different counts"):
            ragged.RaggedViT(model, pruner, backend)(pictures())


def test_hooks_fire_as_often_and_on_the_same_shapes():
    def seen_by(run):
        seen = []
        for name in NAMES[:-2]:
            part(model, name).register_forward_hook(lambda m, i, o, name=name: seen.append((name, tuple(o.shape))))
        run(pictures())
        return seen

    model = vit()
    want = seen_by(model)
    model = vit()
    got = seen_by(ragged.RaggedViT(model))
    assert [s for s in got if s[0] != "norm"] == [s for s in want if s[0] != "norm"] and len(got) == len(want)


def test_hooks_come_and_go():
    model = ragged.RaggedViT(vit(), ragged.PRUNERS["threshold_l2"](tau=1.0, at=(1,)))
    plain = model(pictures())
    handle = model.vit.blocks[2].register_forward_hook(scaled)
    with pytest.raises(ValueError, match="block 2"):
        model(pictures())
    handle.remove()
    assert torch.equal(model(pictures()), plain)


def test_a_hook_that_moves_on_is_followed():
    model, seen = ragged.RaggedViT(vit()), []
    for block in model.vit.blocks:
        handle = block.register_forward_hook(lambda *arguments: seen.append(1))
        model(pictures())
        handle.remove()
    assert len(seen) == len(model.vit.blocks)


@pytest.mark.parametrize("name", ["drop_path1", "drop_path2", "attn.proj_drop"])
def test_what_stands_in_a_dropout_s_place_counts(name):
    network = vit()
    network.blocks[1].set_submodule(name, nn.ReLU().eval())
    assert_logits(ragged.RaggedViT(network)(pictures()), network(pictures()))


@pytest.mark.parametrize("fused", [True, False])
def test_another_scale_counts_as_in_timm(fused):
    network = vit()
    for block in network.blocks:
        block.attn.scale, block.attn.fused_attn = 1.0, fused
    assert_logits(ragged.RaggedViT(network)(pictures()), network(pictures()))


# ---- 120 of timm's models


def families():
    """Names and options, small: every plain family, and others that have to be refused."""
    plain = [
        "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_small_patch32_224", "vit_small_patch8_224",
        "vit_base_patch16_224", "vit_base_patch32_224", "vit_base_patch16_224_miil", "vit_base_patch16_clip_224",
        "vit_base_patch32_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_medium_patch16_clip_224",
        "vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
        "vit_base_patch14_reg4_dinov2", "vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2",
        "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_base_patch16_384",
        "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224", "deit_base_distilled_patch16_224",
        "deit3_small_patch16_224", "deit3_medium_patch16_224", "deit3_base_patch16_224", "deit3_large_patch16_384",
        "flexivit_small", "flexivit_base", "vit_base_patch16_rpn_224", "vit_small_patch16_18x2_224",
        "vit_small_patch16_36x1_224", "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224",
        "vit_wee_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256",
        "vit_dpwee_patch16_reg1_gap_256", "vit_little_patch16_reg4_gap_256", "vit_medium_patch16_gap_256",
        "vit_mediumd_patch16_reg4_gap_256", "vit_betwixt_patch16_gap_256", "vit_betwixt_patch16_reg1_gap_256",
        "vit_base_patch16_reg4_gap_256", "vit_so150m_patch16_reg4_gap_256", "vit_base_patch16_xp_224",
        "test_vit", "test_vit2", "test_vit3", "test_vit4", "vit_base_mci_224", "vit_base_patch16_plus_240",
        "vit_base_patch16_18x2_224", "vit_xsmall_patch16_clip_224",
    ]  # fmt: skip
    others = [
        "eva02_tiny_patch14_224", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224", "test_vit_relpos",
        "beit_base_patch16_224", "beitv2_base_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
        "naflexvit_base_patch16_gap", "samvit_base_patch16", "vit_small_patch16_rope_224",
        "vit_small_patch16_dinov3", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224",
    ]  # fmt: skip
    base = "vit_tiny_patch16_224"
    options = [
        {"init_values": 0.1}, {"qk_norm": True}, {"scale_attn_norm": True}, {"scale_mlp_norm": True},
        {"pre_norm": True}, {"final_norm": False}, {"fc_norm": True}, {"no_embed_class": True}, {"reg_tokens": 1},
        {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}, {"qkv_bias": False}, {"proj_bias": False},
        {"pos_embed": "none"}, {"pos_embed": ""}, {"dynamic_img_size": True}, {"dynamic_img_pad": True},
        {"dynamic_img_size": True, "dynamic_img_pad": True}, {"img_size": (64, 96)}, {"img_size": (96, 32)},
        {"in_chans": 1}, {"in_chans": 5}, {"num_classes": 0}, {"num_classes": 3}, {"global_pool": "avg"},
        {"global_pool": "map"}, {"global_pool": "max"}, {"global_pool": "avgmax"}, {"global_pool": ""},
        {"class_token": False, "global_pool": "avg"}, {"class_token": False, "global_pool": "map"},
        {"drop_rate": 0.5}, {"pos_drop_rate": 0.5}, {"patch_drop_rate": 0.5}, {"proj_drop_rate": 0.5},
        {"attn_drop_rate": 0.5}, {"drop_path_rate": 0.5}, {"norm_layer": "rmsnorm"}, {"norm_layer": "layernorm"},
        {"act_layer": "relu"}, {"act_layer": "silu"}, {"act_layer": "quick_gelu"}, {"act_layer": "gelu_tanh"},
        {"mlp_layer": "swiglu"}, {"mlp_layer": "swiglupacked"}, {"mlp_layer": "glu"}, {"mlp_layer": "grn"},
        {"block_fn": "respost"}, {"block_fn": "parallel"}, {"block_fn": "things"}, {"attn_layer": "diff"},
        {"attn_layer": "gated"}, {"embed_norm_layer": "layernorm"}, {"weight_init": "skip"}, {"patch_size": 8},
        {"mlp_ratio": 1.0}, {"num_heads": 1}, {"num_heads": 6}, {"pool_include_prefix": True},
    ]  # fmt: skip
    return [*((name, {}) for name in plain + others), *((base, option) for option in options)]


CLASSES = {
    "swiglu": lambda: __import__("timm").layers.SwiGLU, "swiglupacked": lambda: __import__("timm").layers.SwiGLUPacked,
    "glu": lambda: __import__("timm").layers.GluMlp, "grn": lambda: __import__("timm").layers.GlobalResponseNormMlp,
    "respost": lambda: tv.ResPostBlock, "parallel": lambda: tv.ParallelScalingBlock,
    "things": lambda: tv.ParallelThingsBlock, "layernorm": lambda: nn.LayerNorm,
}  # fmt: skip
SMALL = ({"depth": 2, "embed_dim": DIM, "num_heads": 3}, {"depth": 2, "embed_dim": DIM}, {"depth": 1}, {})


def made(name, option):
    import timm

    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    option = {k: CLASSES[v]() if v in CLASSES and k in ("mlp_layer", "block_fn", "embed_norm_layer") else v
              for k, v in option.items()}  # fmt: skip
    patch = next((p for p in (8, 14, 32) if f"patch{p}" in name), 16)
    for small in SMALL:
        for size in ({"img_size": 4 * patch}, {}):
            try:
                return with_variance(timm.create_model(name, **{"num_classes": 10} | small | size | option))
            except (TypeError, AssertionError, RuntimeError, ValueError, AttributeError, NotImplementedError):
                continue
    pytest.skip("this timm has no such option")


TABLE: dict[str, str] = {}


@pytest.mark.parametrize("name, option", families(), ids=str)
def test_timm_s_models_are_exact_or_refused(name, option):
    model = made(name, option)
    images = None
    for pruner in ("unpruned", "threshold_l2"):
        cut = None if pruner == "unpruned" else ragged.PRUNERS["threshold_l2"](keep=1.0, at=(0,))
        try:
            mine = ragged.RaggedViT(model, cut)
        except (ValueError, NotImplementedError) as refusal:
            assert len(str(refusal)) > 20
            TABLE[f"{name} {option}"] = "refused"
            return
        size = model.patch_embed.img_size or (64, 64)
        if images is None:
            images = torch.randn(2, model.patch_embed.proj.in_channels, *size, generator=torch.manual_seed(2))
        assert_logits(mine(images), model(images))
        assert_logits(mine.forward_features(images), model.forward_features(images))
    TABLE[f"{name} {option}"] = "exact"


def test_the_table_is_large_and_mostly_exact():
    """Runs after the table above in the same process; alone it has nothing to say."""
    if len(TABLE) < 100:
        pytest.skip("the table was not run here")
    exact = sum(verdict == "exact" for verdict in TABLE.values())
    print(f"{len(TABLE)} models and options: {exact} exact, {len(TABLE) - exact} refused")
    assert len(families()) >= 120 and exact >= 60


# ---- settings, modes, precisions


@pytest.mark.parametrize("name, setting, value", [
    ("evit", "keep", 0.5), ("evit", "at", (1,)), ("evit", "where", "after"), ("evit", "fuse", False),
    ("ats", "samples", 4), ("threshold_l2", "keep", 0.1), ("threshold_l2", "tau", 1.0), ("dynamicvit", "keep", 0.5),
])  # fmt: skip
def test_settings_of_a_pruner_are_fixed(name, setting, value):
    pruner = ragged.PRUNERS[name]()
    with pytest.raises(AttributeError, match=f"{setting}: .*fixed"):
        setattr(pruner, setting, value)


def test_another_pruner_takes_effect():
    model = ragged.RaggedViT(vit(), ragged.PRUNERS["evit"](keep=0.5, at=(1,)))
    model(pictures())
    model.pruner = ragged.PRUNERS["threshold_l2"](keep=0.3, at=(2,))
    fresh = ragged.RaggedViT(vit(), ragged.PRUNERS["threshold_l2"](keep=0.3, at=(2,)))
    assert torch.equal(model(pictures()), fresh(pictures()))
    assert [(s.block, s.where) for s in model.trace(pictures()).stages] == [(2, "after")]
    model.pruner = None
    assert_logits(model(pictures()), model.vit(pictures()))
    model.pruner = ragged.PRUNERS["threshold_l2"](at=(9,))
    with pytest.raises(ValueError, match="at: the model has blocks 0 to 2"):
        model(pictures())


def test_another_backend_takes_effect():
    model = ragged.RaggedViT(vit(), ragged.PRUNERS["ats"](at=(1,)))
    model(pictures())
    for backend, words in (("dense", "equal counts"), ("fastest", "backend")):
        model.backend = backend
        with pytest.raises(ValueError, match=words):
            model(pictures())


@torch.enable_grad()
@pytest.mark.parametrize("pruner", [None, "evit", "dynamicvit", "ats"])
def test_gradients_flow_or_are_refused(pruner, monkeypatch):
    network = vit()
    made = None if pruner is None else ragged.PRUNERS[pruner](at=(1,), **({} if pruner == "ats" else {"keep": 1.0}))
    logits = ragged.RaggedViT(network, made, "sdpa_padded")(pictures())
    logits.sum().backward()
    got = [p.grad.clone() for p in network.parameters()]
    if pruner != "ats":
        network.zero_grad()
        network(pictures()).sum().backward()
        for mine, parameter in zip(got, network.parameters()):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.abs().max()))
    monkeypatch.setitem(ragged.BACKENDS, "reference", replace(ragged.BACKENDS["reference"], backward=None))
    with pytest.raises(RuntimeError, match="no backward pass.*no_grad.*sdpa_padded"):
        ragged.RaggedViT(vit(), made, "reference")(pictures())
    with torch.no_grad():
        assert not ragged.RaggedViT(network, made)(pictures()).requires_grad
    frozen = vit().requires_grad_(False)
    assert not ragged.RaggedViT(frozen, None, "reference")(pictures()).requires_grad


PRUNED = {"evit": {}, "ats": {}, "threshold_l2": {"tau": 1.0}, "dynamicvit": {}}


@pytest.mark.parametrize("backend", ["sdpa_padded", "reference"])
@pytest.mark.parametrize("name", [None, *PRUNED])
def test_autocast_gives_what_timm_gives(name, backend):
    network = vit()
    noted = None if name is None else Noted(ragged.PRUNERS[name](at=(1,), **PRUNED[name]))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = network(pictures())
        got = ragged.RaggedViT(network, noted, backend)(pictures())
    # in full precision with the same selections: near ties may fall either way
    again = None if name is None else Replay(noted, noted.taken)
    exact = ragged.RaggedViT(network, again, "sdpa_padded")(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        half_images = ragged.RaggedViT(network, again, backend)(pictures().bfloat16())
    assert got.dtype == half_images.dtype == theirs.dtype
    off = (theirs.float() - network(pictures())).abs().max()
    assert (got.float() - exact).abs().max() <= 4 * off and (half_images.float() - exact).abs().max() <= 8 * off


@pytest.mark.parametrize("name", PRUNED)
def test_nothing_depends_on_the_default_dtype(name):
    model = ragged.RaggedViT(vit(), ragged.PRUNERS[name](at=(1,), **PRUNED[name]))
    want = [model.trace(pictures()), ragged.RaggedViT(model.vit, model.pruner, "reference").trace(pictures())]
    pictures()
    torch.set_default_dtype(torch.float64)
    try:
        got = [model.trace(pictures()), ragged.RaggedViT(model.vit, model.pruner, "reference").trace(pictures())]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want):
        assert a.logits.dtype == b.logits.dtype and torch.equal(a.logits, b.logits)
        assert [s.counts for s in a.stages] == [s.counts for s in b.stages]


@pytest.mark.parametrize("whose", ["model", "vit"])
def test_another_precision_reaches_the_pruner(whose):
    model = ragged.RaggedViT(vit(), ragged.PRUNERS["dynamicvit"](at=(1,)))
    (model if whose == "model" else model.vit).to(torch.bfloat16)
    assert model(pictures().bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- copies, tracing, exporting


@pytest.mark.parametrize("compiled", [False, True])
def test_copies(compiled, tmp_path):
    model = ragged.RaggedViT(vit(), ragged.PRUNERS["evit"](at=(1,)))
    if compiled:
        model.compile(backend="eager", dynamic=True)
        model(pictures())
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(pictures()), model(pictures())) and (other._compiled is not None) == compiled
        other.vit.head.bias.data.add_(1)
        assert not torch.equal(other(pictures()), model(pictures()))


def test_jit_trace_is_refused_for_pruned_models():
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(ragged.RaggedViT(vit(), ragged.PRUNERS["evit"](at=(1,))), (pictures(),))


@pytest.mark.parametrize(
    "name, options", [(None, {}), ("threshold_l2", {"keep": 0.5}), ("dynamicvit", {}), ("evit", {})]
)
def test_export_with_a_dynamic_batch(name, options):
    model = ragged.RaggedViT(vit(), None if name is None else ragged.PRUNERS[name](at=(1,), **options))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (pictures(),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 3, 7):
        images = pictures(count, seed=count)
        assert_logits(program(images), model(images))


def test_export_of_adaptive_pruners_says_what_works():
    model = ragged.RaggedViT(vit(), ragged.PRUNERS["ats"](at=(1,)))
    with pytest.raises(Exception, match=r"torch\.export: ats .*model\.capture"):
        torch.export.export(model, (pictures(),))


# ---- the wrapper is a ViT


def test_what_timm_asks_a_model_for():
    from timm.data import resolve_model_data_config

    network = ragged.load_deit("deit_tiny")
    model = ragged.RaggedViT(network, ragged.PRUNERS["evit"]())
    for name in ("num_classes", "embed_dim", "num_features", "num_prefix_tokens", "pretrained_cfg", "default_cfg"):
        assert getattr(model, name) == getattr(network, name)
    assert resolve_model_data_config(model) == resolve_model_data_config(network)
    assert model.get_classifier() is network.head
    model.reset_classifier(5)
    assert model.num_classes == 5 and model(torch.randn(1, 3, 224, 224)).shape == (1, 5)
    with pytest.raises(AttributeError, match="no attribute 'anything'"):
        _ = model.anything


@pytest.mark.parametrize("fill", ["zero", "last", "nearest"])
@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("backend", ["sdpa_padded", "reference"])
def test_features_in_place(name, fill, backend):
    model = ragged.RaggedViT(vit(), ragged.PRUNERS[name](at=(0, 1), **PRUNED[name]), backend)
    images, trace = pictures(), model.trace(pictures())
    features = model.forward_features(images, fill)
    n = 1 + (SIDE // 16) ** 2
    assert features.shape == (len(images), n, DIM) and trace.kept.shape == (len(images), n)
    assert trace.kept.sum(1).tolist() == [int((ids >= 0).sum()) for ids in trace.stages[-1].ids]
    assert_logits(model.forward_head(features), trace.logits)
    again = model.forward_features(images, "zero")
    assert torch.equal(features[trace.kept], again[trace.kept]) and not again[~trace.kept].any()
    if fill == "nearest":
        side = SIDE // 16
        for b, i in (~trace.kept[:, 1:]).nonzero().tolist():
            kept = trace.kept[b, 1:].nonzero()[:, 0]
            far = (kept // side - i // side) ** 2 + (kept % side - i % side) ** 2
            assert torch.equal(features[b, 1 + i], features[b, 1 + kept[far.argmin()]])
    if fill == "last":
        assert features[~trace.kept].abs().sum(-1).min() > 0


def test_the_last_value_of_a_token_is_the_one_it_was_dropped_with():
    """One cut after block 0: the others go on, a dropped token stays as block 0 left it."""
    network = vit()
    model = ragged.RaggedViT(network, ragged.PRUNERS["threshold_l2"](keep=0.5, at=(0,)))
    kept = model.trace(pictures()).kept
    after = network.norm(network.forward_intermediates(
        pictures(), [0], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True)[0][0])  # fmt: skip
    torch.testing.assert_close(model.forward_features(pictures(), "last")[:, 1:][~kept[:, 1:]], after[~kept[:, 1:]])


@pytest.mark.parametrize("name", ["evit", "ats"])
def test_the_last_value_of_a_token_that_a_block_drops_inside(name):
    """What attention made of it, before the MLP: the dropped tokens of both methods are left at the same place."""
    network, pruner = vit(), ragged.PRUNERS[name](**({"keep": 0.5} if name == "evit" else {"samples": 5}), at=(0,))
    model = ragged.RaggedViT(network, pruner)
    kept, block = model.trace(pictures()).kept, network.blocks[0]
    x = network.norm_pre(network._pos_embed(network.patch_embed(pictures())))
    after = network.norm(x + block.ls1(block.attn(block.norm1(x))))
    assert not kept.all()
    torch.testing.assert_close(model.forward_features(pictures(), "last")[~kept], after[~kept])


@pytest.mark.parametrize("options", [
    {}, {"indices": 2}, {"indices": [0, 2]}, {"norm": True}, {"output_fmt": "NLC"}, {"return_prefix_tokens": True},
    {"intermediates_only": True, "indices": 1}, {"stop_early": True, "indices": [0], "intermediates_only": True},
], ids=str)  # fmt: skip
def test_intermediates_are_timm_s(options):
    network = vit(reg_tokens=2)
    got = ragged.RaggedViT(network).forward_intermediates(pictures(), **options)
    want = network.forward_intermediates(pictures(), **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_intermediates_of_a_pruned_model():
    model = ragged.RaggedViT(vit(), ragged.PRUNERS["evit"](keep=0.5, at=(1,)))
    last, (first, second, third) = model.forward_intermediates(pictures(), output_fmt="NLC", norm=True)
    gone = ~model.trace(pictures()).kept[:, 1:]
    assert first.abs().sum(-1).min() > 0 and not second[gone].any() and not third[gone].any()
    assert torch.equal(third, last[:, 1:])
    for bad in ({"fill": "mean"}, {"output_fmt": "NHWC"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
            model.forward_intermediates(pictures(), **bad)


# ---- a share for every stage, any image size


def test_a_share_for_every_stage():
    images, patches = pictures(), (SIDE // 16) ** 2
    at = (0, 1, 2)

    def counts(name, **options):
        stages = ragged.RaggedViT(vit(), ragged.PRUNERS[name](at=at, **options)).trace(images).stages
        return [stage.counts[0] - 1 for stage in stages]

    shares = (0.9, 0.7, 0.5)
    assert counts("dynamicvit", keep=shares) == [int(patches * share) for share in shares]
    left, expected = patches, []
    for share in shares:
        left = int(left * share)
        expected.append(left)
    assert counts("threshold_l2", keep=list(shares), where="after") == expected
    assert counts("evit", keep=shares, fuse=False) == [45, 32, 16]
    assert counts("evit", keep=(1.0, 0.5, 1.0), fuse=False) == [49, 25, 25]
    fewer = ragged.RaggedViT(vit(), ragged.PRUNERS["ats"](at=at, samples=(40, 20, 5))).trace(images).stages
    assert all(max(s.counts) <= most + 1 for s, most in zip(fewer, (40, 20, 5)))
    for name, bad in (("evit", (0.5, 0.5)), ("evit", (0.5, 0.5, 1.5)), ("dynamicvit", (0.5, 0.7, 0.3))):
        with pytest.raises(ValueError, match="keep: "):
            ragged.PRUNERS[name](at=at, keep=bad)


@pytest.mark.parametrize("size", [(112, 112), (96, 160), (64, 48), (224, 224)])
def test_any_image_size(size):
    network = vit(dynamic_img_size=True)
    images = torch.randn(2, 3, *size, generator=torch.manual_seed(4))
    assert_logits(ragged.RaggedViT(network)(images), network(images))
    for name in PRUNED:
        pruner = ragged.PRUNERS[name](at=(1,), **PRUNED[name])
        trace = ragged.RaggedViT(network, pruner).trace(images)
        assert trace.kept.shape[1] == 1 + (size[0] // 16) * (size[1] // 16)
        other = ragged.RaggedViT(network, pruner, "reference").trace(images)
        assert [s.counts for s in trace.stages] == [s.counts for s in other.stages]
        assert_logits(trace.logits, other.logits)
    with pytest.raises(ValueError, match="images: expected sides of at least one patch"):
        ragged.RaggedViT(network)(torch.randn(1, 3, 8, 64))


# ---- a user's own pruner


class Mistaken(Pruner):
    """Selects whatever it is told to."""

    def __init__(self, make, adaptive=False):
        super().__init__("mine", (1,), "after")
        self.make, self.adaptive = make, adaptive

    def select(self, view):
        index = torch.arange(view.state.width).expand(view.state.batch, -1)
        return self.make(index, view)


def chosen(index, counts, blend=None):
    return ragged.Selection(index, counts, blend)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


MISTAKES = {
    "no selection": lambda i, v: i, "a tuple": lambda i, v: (i, 5), "a list": lambda i, v: chosen(i.tolist(), 5),
    "a mask": lambda i, v: i > 3, "a number": lambda i, v: 5,
    "no cls": lambda i, v: chosen(i[:, 1:], 5), "cls later": lambda i, v: chosen(i.flip(1), 5),
    "a row twice": lambda i, v: chosen(i[:, [0, 1, 1, 2]], 4), "cls twice": lambda i, v: chosen(i[:, [0, 0, 1]], 3),
    "a row that is not there": lambda i, v: chosen(i + (i > 0) * 100, 5),
    "a negative row": lambda i, v: chosen(i - 4 * (i == 3), 5),
    "row 50 of 50": lambda i, v: chosen(i + (i == 4) * 46, 5),
    "a batch of one": lambda i, v: chosen(i[:1], 5), "a batch too many": lambda i, v: chosen(i.repeat(2, 1), 5),
    "one dimension": lambda i, v: chosen(i[0], 5), "three dimensions": lambda i, v: chosen(i[..., None], 5),
    "int32 rows": lambda i, v: chosen(i.int(), 5), "float rows": lambda i, v: chosen(i.float(), 5),
    "bool rows": lambda i, v: chosen(i.bool(), 5), "meta rows": lambda i, v: chosen(i.to("meta"), 5),
    "more than there are": lambda i, v: chosen(i.repeat(1, 2), 60), "more than named": lambda i, v: chosen(i[:, :4], 5),
    "none": lambda i, v: chosen(i, 0), "a negative count": lambda i, v: chosen(i, -1),
    "a float count": lambda i, v: chosen(i, 5.0), "a bool count": lambda i, v: chosen(i, True),
    "no count": lambda i, v: chosen(i, None), "a list of counts": lambda i, v: chosen(i, [5] * len(i)),
    "a tensor of one count": lambda i, v: chosen(i, torch.tensor(5)),
    "a blend of one image": lambda i, v: chosen(i, 5, torch.ones(1, 50)),
    "a blend too wide": lambda i, v: chosen(i, 5, torch.ones(len(i), 51)),
    "a whole blend": lambda i, v: chosen(i, 5, torch.ones(len(i), 50, dtype=torch.int64)),
    "a blend of a list": lambda i, v: chosen(i, 5, [1.0]),
}  # fmt: skip
ADAPTIVE_MISTAKES = {
    "counts of int64": lambda i, v: chosen(i, torch.full((len(i),), 5)),
    "counts of one image": lambda i, v: chosen(i, int32(5)),
    "counts in a column": lambda i, v: chosen(i, int32(*[5] * len(i))[:, None]),
    "a count of 0": lambda i, v: chosen(i, int32(0, *[5] * (len(i) - 1))),
    "a negative count": lambda i, v: chosen(i, int32(-1, *[5] * (len(i) - 1))),
    "a count too large": lambda i, v: chosen(i, int32(51, *[5] * (len(i) - 1))),
    "more than named": lambda i, v: chosen(i[:, :4], int32(*[5] * len(i))),
    "no cls": lambda i, v: chosen(i.roll(-1, 1), int32(*[5] * len(i))),
    "a row twice": lambda i, v: chosen(i // 2, int32(*[5] * len(i))),
    "a row that is not there": lambda i, v: chosen(i * 20, int32(*[5] * len(i))),
    "a blend": lambda i, v: chosen(i, int32(*[5] * len(i)), torch.ones(len(i), 50)),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa_padded", "reference", "paper_padded"])
@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_of_a_pruner_are_named(kind, backend):
    model = ragged.RaggedViT(vit(), Mistaken(MISTAKES[kind]), backend)
    with pytest.raises((ValueError, TypeError), match=r"mine\.select: "):
        model(pictures())


@pytest.mark.parametrize("backend", ["sdpa_padded", "reference", "paper_padded"])
@pytest.mark.parametrize("kind", ADAPTIVE_MISTAKES)
def test_mistakes_of_an_adaptive_pruner_are_named(kind, backend):
    model = ragged.RaggedViT(vit(), Mistaken(ADAPTIVE_MISTAKES[kind], adaptive=True), backend)
    with pytest.raises((ValueError, TypeError), match=r"mine\.select: "):
        model(pictures())


def test_counts_in_a_tensor_need_a_pruner_that_says_so():
    model = ragged.RaggedViT(vit(), Mistaken(lambda i, v: chosen(i, int32(*[5] * len(i)))), "dense")
    with pytest.raises(ValueError, match="adaptive = True"):
        model(pictures())


# ---- on a GPU


@pytest.mark.gpu
def test_a_capture_refuses_hooks_and_notices_other_weights():
    model = ragged.RaggedViT(vit().to("cuda", torch.float16), ragged.PRUNERS["evit"](at=(1,)))
    images = pictures().to("cuda", torch.float16)
    handle = model.vit.head.register_forward_hook(scaled)
    with pytest.raises(NotImplementedError, match="hooks"):
        model.capture(len(images))
    handle.remove()
    fast = model.capture(len(images))
    assert torch.equal(fast(images), model(images))
    model.vit.head.bias.add_(1)  # in place: what a checkpoint does that is loaded later
    assert torch.equal(fast(images), model(images))
    model.float()
    with pytest.raises(RuntimeError, match="after capture"):
        fast(images)


@pytest.mark.gpu
def test_old_captures_do_not_disturb_a_new_one():
    """Garbage with a graph in it waits for the collector, which must not come while another graph is captured."""
    model = ragged.RaggedViT(vit().to("cuda", torch.float16), ragged.PRUNERS["threshold_l2"](tau=1.0, at=(1,)))
    images = pictures(12).to("cuda", torch.float16)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(3):
            fast = model.capture(12, wait=True)
            assert torch.equal(fast(images), fast(images))
            fast.itself = fast  # a cycle
    finally:
        gc.set_threshold(*threshold)


@pytest.mark.gpu
def test_a_capture_is_gone_with_its_last_name():
    model = ragged.RaggedViT(vit().to("cuda", torch.float16), ragged.PRUNERS["threshold_l2"](tau=1.0, at=(1,)))
    gc.collect()
    gc.disable()
    try:
        fast = model.capture(12, wait=True)
        alive = weakref.ref(fast)
        del fast
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [None, *PRUNED])
def test_autocast_on_a_gpu(name):
    network, images = vit().cuda(), pictures().cuda()
    noted = None if name is None else Noted(ragged.PRUNERS[name](at=(1,), **PRUNED[name]))
    with torch.autocast("cuda", torch.float16):
        theirs, model = network(images), ragged.RaggedViT(network, noted)
        got = model(images)
        assert model.picked == "triton" and got.dtype == theirs.dtype
    exact = ragged.RaggedViT(network, None if name is None else Replay(noted, noted.taken), "sdpa_padded")(images)
    assert (got.float() - exact).abs().max() <= 4 * (theirs.float() - network(images)).abs().max() + 1e-3


@pytest.mark.gpu
@torch.enable_grad()
@pytest.mark.parametrize("name", PRUNED)
def test_gradients_on_a_gpu_are_those_of_the_cpu(name):
    found = []
    for device, backend in (("cpu", "sdpa_padded"), ("cuda", "sdpa_padded"), ("cuda", "auto")):
        network = vit().to(device)
        pruner = ragged.PRUNERS[name](at=(1,), **PRUNED[name])
        ragged.RaggedViT(network, pruner, backend).train()(pictures().to(device)).sum().backward()
        found.append([p.grad.cpu() for p in network.parameters()])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()) + 1e-6)
    with pytest.raises(RuntimeError, match="no backward pass"):
        ragged.RaggedViT(vit().cuda(), ragged.PRUNERS[name](at=(1,)), "paper_triton")(pictures().cuda())
