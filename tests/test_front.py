"""Images of different sizes in one call, and tokens from outside: each gives what it gives alone."""

import functools
import math

import pytest
import torch
from pruner_cases import DIM, MODELS, SIDE, STAGES, build, small_vit, with_variance
from torch import nn
from torch.profiler import profile

import ragged
from ragged.bench.quadtree import quadtree_tokens
from ragged.blocks import embed
from ragged.data import normalise, photographs

SIZES = ((112, 112), (64, 96), (16, 16), (160, 48), (128, 176), (64, 96))
BACKENDS = ("auto", "reference", "sdpa_padded", "paper_padded")
CASES = {
    **{name: {} for name in MODELS},
    "dinov2": {"reg_tokens": 4, "init_values": 0.5, "no_embed_class": True},
    "pre_norm": {"pre_norm": True},
}
PLANS = (
    ("threshold_l2", {"at": STAGES, "where": "after"}), ("tau", {"at": (1, 3), "where": "after"}),
    ("dynamicvit", {"at": STAGES, "where": "before"}), ("evit", {"at": STAGES, "where": "inside"}),
    ("evit", {"at": (2,), "where": "after", "fuse": False}), ("ats", {"at": STAGES, "where": "inside"}),
    ("threshold_l2", {"at": (0, 2), "where": "before"}), ("ats", {"at": (1, 4), "where": "after"}),
)  # fmt: skip


@functools.cache
def network(case="plain", dynamic=False):
    cls, extra = MODELS.get(case, MODELS["plain"])
    sizes = {"img_size": SIDE, "embed_dim": DIM, "depth": 6, "num_heads": 3, "num_classes": 10}
    return with_variance(cls(**sizes, **extra, **CASES[case], dynamic_img_size=dynamic))


def twin(vit, case="plain", **more):
    """timm's own reference: the same network with dynamic_img_size=True."""
    cls, extra = MODELS.get(case, MODELS["plain"])
    other = cls(img_size=SIDE, embed_dim=DIM, depth=6, num_heads=3, num_classes=10, dynamic_img_size=True,
                **extra, **CASES[case], **more)  # fmt: skip
    other.load_state_dict(vit.state_dict())
    return other.eval()


@functools.cache
def mixed(sizes=SIZES, seed=3):
    """Noise of another contrast in every patch."""
    g, images = torch.Generator().manual_seed(seed), []
    for high, wide in sizes:
        contrast = torch.rand(1, -(-high // 16), -(-wide // 16), generator=g).mul(1.5).exp()
        contrast = contrast.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :high, :wide]
        images.append(torch.randn(3, high, wide, generator=g) * contrast)
    return images


def one_by_one(model, images):
    return torch.cat([model(image[None]) for image in images])


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4 * max(1.0, want.abs().max())


# ---- a list of images


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unpruned_equals_timm_image_by_image(case, dynamic, backend):
    vit, images = network(case, dynamic), mixed()
    close(ragged.RaggedViT(vit, None, backend)(images), one_by_one(twin(vit, case), images))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, place", PLANS)
@pytest.mark.parametrize("case", ["plain", "distilled", "dinov2"])
def test_pruned_equals_each_image_alone(case, name, place, backend):
    vit, images = network(case), mixed()
    pruner = build(name, 0.7, **place)
    trace = ragged.RaggedViT(vit, pruner, backend).trace(tuple(images))
    alone = ragged.RaggedViT(twin(vit, case), pruner, "sdpa_padded")
    single = [alone.trace(image[None]) for image in images]
    close(trace.logits, torch.cat([one.logits for one in single]))
    for s, stage in enumerate(trace.stages):
        for b, one in enumerate(single):
            want = one.stages[s].ids[0]
            assert stage.counts[b] == len(want) == len(stage.ids[b])
            assert stage.ids[b].sort().values.equal(want.sort().values)
    assert all(a.equal(one.kept[0]) for a, one in zip(trace.kept, single, strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_a_list_of_equal_sizes_is_the_batch(backend):
    for name in ("evit", "dynamicvit"):
        model = ragged.RaggedViT(network(), build(name, 0.6, at=STAGES), backend)
        images = torch.stack(mixed(((112, 112),) * 3))
        close(model(list(images)), model(images))


def test_equal_counts_of_unequal_shapes():
    images, vit = mixed(((32, 64), (64, 32), (128, 16))), network()
    model = ragged.RaggedViT(vit, build("evit", 0.5, at=(1, 3)), "dense")
    close(model(images), one_by_one(ragged.RaggedViT(twin(vit), model.pruner), images))


def test_dense_refuses_unequal_sizes():
    with pytest.raises(ValueError, match="dense.*equal counts.*2 to 89 tokens"):
        ragged.RaggedViT(network(), None, "dense")(mixed())


@pytest.mark.parametrize("pad", [False, True])
def test_sides_that_are_no_multiple(pad):
    """As timm: refused, or with dynamic_img_pad filled up."""
    images, vit = mixed(((100, 70), (9, 33), (64, 64))), network()
    if pad:
        other = twin(vit, dynamic_img_pad=True)
        close(ragged.RaggedViT(other)(images), one_by_one(other, images))
    else:
        with pytest.raises(ValueError, match=r"images\[0\].*multiples of the patch"):
            ragged.RaggedViT(vit)(images[:1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_patch_product_for_all_sizes(dynamic):
    with profile(record_shapes=True) as seen:
        ragged.RaggedViT(network("plain", dynamic))(mixed())
    shapes = [e.input_shapes for e in seen.events() if e.name == "aten::linear"]
    assert [s[1] for s in shapes].count([DIM, 3 * 256]) == 1
    assert not any(e.name == "aten::conv2d" for e in seen.events())


def test_hooks_on_the_patch_embedding_see_single_images():
    vit, seen = twin(network()), []
    vit.patch_embed.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)) or 2 * out)
    images = mixed()
    got = ragged.RaggedViT(vit)(images)
    assert seen == [(1, *image.shape) for image in images]
    close(got, one_by_one(vit, images))
    fixed = with_variance(type(vit)(img_size=SIDE, embed_dim=DIM, depth=2, num_heads=3, num_classes=10))
    fixed.patch_embed.register_forward_hook(lambda m, args, out: None)
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        ragged.RaggedViT(fixed)(images[1:])


def test_hooks_before_the_blocks_are_refused():
    for name in ("pos_drop", "norm_pre", "patch_drop"):
        vit = twin(network())
        getattr(vit, name).register_forward_hook(lambda m, args, out: None)
        with pytest.raises(ValueError, match=f"{name} carries hooks.*list"):
            ragged.RaggedViT(vit)(mixed())


@pytest.mark.parametrize("change", ["load", "in_place", "data", "module", "double", "grid"])
def test_positions_follow_the_weights(change):
    vit, images = twin(network()), mixed()
    model = ragged.RaggedViT(vit)
    before = model(images)
    assert model(images).equal(before)
    if change == "load":
        model.load_state_dict({k: 2 * v if "pos_embed" in k else v for k, v in model.state_dict().items()})
    elif change == "in_place":
        vit.pos_embed.mul_(2.0)
    elif change == "data":
        vit.pos_embed.data = vit.pos_embed.data * 3
    elif change == "module":
        vit.pos_embed = nn.Parameter(vit.pos_embed.detach() * 0.5)
    elif change == "double":
        model.double()
        images = [image.double() for image in images]
    else:
        vit.set_input_size(img_size=(64, 128))
    after = model(images)
    close(after, one_by_one(vit, images))
    if change != "double":
        assert (after - before).abs().max() > 1e-3


def test_gradients_reach_positions_and_pixels():
    vit = twin(network())
    model, images = ragged.RaggedViT(vit, None, "sdpa_padded"), [image.clone().requires_grad_() for image in mixed()]
    model(mixed())  # what is kept here has no gradient
    with torch.enable_grad():
        model(images).square().sum().backward()
        got, pixels = vit.pos_embed.grad.clone(), [image.grad.clone() for image in images]
        vit.zero_grad()
        for image in images:
            image.grad = None
        one_by_one(vit, images).square().sum().backward()
    assert torch.allclose(got, vit.pos_embed.grad, rtol=1e-3, atol=1e-4 * vit.pos_embed.grad.abs().max())
    for a, image in zip(pixels, images, strict=True):
        assert torch.allclose(a, image.grad, rtol=1e-3, atol=1e-4 * image.grad.abs().max())


def test_the_order_of_images_does_not_matter():
    images = mixed()
    model = ragged.RaggedViT(network(), build("evit", 0.6, at=STAGES), "sdpa_padded")
    close(model(images[::-1]).flip(0), model(images))


# ---- tokens from outside


def packed_tokens(vit, images):
    tokens = [embed(vit, image[None], False)[0] for image in images]
    lengths = [len(x) for x in tokens]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return torch.cat(tokens), cu, lengths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, place", PLANS)
def test_tokens_from_outside_equal_the_pass(name, place, backend):
    vit, images = twin(network("registers"), "registers"), mixed()
    model = ragged.RaggedViT(vit, build(name, 0.7, **place), backend)
    tokens, cu, lengths = packed_tokens(vit, images)
    ids = torch.cat([torch.arange(n) for n in lengths])
    want = model(images)
    for more in ({}, {"ids": ids}, {"lengths": lengths}):
        close(model.forward_tokens(tokens, cu, **more), want)


# ---- bad input


def test_bad_lists():
    model, good = ragged.RaggedViT(network()), torch.zeros(3, 32, 32)
    for bad, error, text in (
        ([], ValueError, "empty list"), (["a"], TypeError, r"images\[0\].*tensor"),
        ([good, torch.zeros(1, 32, 32)], ValueError, r"images\[1\].*\(3, height, width\)"),
        ([good[None]], ValueError, r"images\[0\]"), ([good[:, :8]], ValueError, "at least one patch"),
        ([good[:, :, :0]], ValueError, "at least one patch"), ([good.half()], ValueError, "float16"),
        ([good.to("meta")], ValueError, "meta"), ([good, good.to(torch.uint8)], ValueError, r"images\[1\].*uint8"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            model(bad)
        with pytest.raises(error, match=text):
            model.trace(bad)


def test_features_of_a_list_are_refused():
    with pytest.raises(TypeError, match="trace"):
        ragged.RaggedViT(network()).forward_features(mixed())


def test_capture_refuses_lists():
    model = ragged.RaggedViT(network())
    with pytest.raises((ValueError, NotImplementedError), match="GPU|list"):
        model.capture([(112, 112), (64, 64)])


def test_bad_tokens():
    model, x = ragged.RaggedViT(network("distilled")), torch.zeros(10, DIM)
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    offsets = functools.partial(torch.tensor, dtype=torch.int32)
    for tokens, given, more, error, text in (
        (x[None], cu, {}, ValueError, "tokens: expected 2 dim"), (x[:, :8], cu, {}, ValueError, "tokens.*48"),
        (x.half(), cu, {}, ValueError, "float16"), ([1], cu, {}, TypeError, "tokens"),
        (x, cu.long(), {}, TypeError, "cu_seqlens.*int32"), (x, [0, 4, 10], {}, TypeError, "cu_seqlens"),
        (x, offsets([0, 12, 10]), {}, ValueError, "rising"), (x, offsets([0, 4, 9]), {}, ValueError, "rising.*10"),
        (x, offsets([1, 4, 10]), {}, ValueError, "rising"), (x, offsets([0, 1, 10]), {}, ValueError, "2 prefix"),
        (x, offsets([0]), {}, ValueError, "cu_seqlens"), (x, cu, {"ids": torch.arange(9)}, ValueError, "ids.*10"),
        (x, cu, {"ids": torch.arange(10).int()}, TypeError, "ids"),
        (x, cu, {"lengths": [4]}, ValueError, "lengths"), (x, cu, {"lengths": [5, 5]}, ValueError, "lengths"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            model.forward_tokens(tokens, given, **more)


def test_counts_are_of_each_image_s_own_patches():
    trace = ragged.RaggedViT(network(), build("evit", 0.7, at=(1,))).trace(mixed())
    patches = [high * wide // 256 for high, wide in SIZES]
    want = [1 + n if math.ceil(0.7 * n) == n else 2 + math.ceil(0.7 * n) for n in patches]
    assert trace.stages[0].counts == want


def test_a_bundle_of_one_network_is_left_as_it_was():
    assert small_vit().patch_embed.strict_img_size and not small_vit().dynamic_img_size


# ---- a front of one's own


def test_quadtree_of_small_patches_is_the_ordinary_pass():
    vit = with_variance(MODELS["registers"][0](img_size=64, embed_dim=DIM, depth=3, num_heads=3, num_classes=10))
    images = torch.stack(mixed(((64, 64),) * 2))
    tokens, cu_seqlens, lengths = quadtree_tokens(vit, images, threshold=-1.0)
    assert lengths == [17, 17] and cu_seqlens.tolist() == [0, 17, 34]
    close(ragged.RaggedViT(vit).forward_tokens(tokens, cu_seqlens), vit(images))


def test_quadtree_of_the_photographs():
    vit = ragged.load_deit("deit_tiny", weights="random")
    images = normalise(photographs()[0])
    images[0] = 0.3  # nothing to see: 49 squares
    tokens, cu_seqlens, lengths = quadtree_tokens(vit, images, threshold=0.2)
    assert lengths[0] == 50 and max(lengths) > 100 and len(set(lengths)) > 2
    assert cu_seqlens.diff().tolist() == lengths and len(tokens) == sum(lengths)
    pruned = ragged.RaggedViT(vit, ragged.PRUNERS["evit"](keep=0.7))
    logits = pruned.forward_tokens(tokens, cu_seqlens, lengths=lengths)
    for b in (0, len(images) - 1):
        alone = quadtree_tokens(vit, images[b : b + 1], threshold=0.2)
        close(logits[b : b + 1], pruned.forward_tokens(*alone[:2]))


def test_quadtree_refuses_odd_grids():
    with pytest.raises(ValueError, match="even grid"):
        quadtree_tokens(network(), torch.zeros(1, 3, 112, 112))
