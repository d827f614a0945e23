"""`load_deit`: names, sizes, seeds, files good and bad, and no network."""

import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

import ragged

TINY = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}
timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def tiny():
    return ragged.load_deit("deit_tiny", weights="random", seed=1, num_classes=5)


@pytest.fixture(scope="module")
def state(tiny):
    return {k: v.clone() for k, v in tiny.state_dict().items()}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_message(refusal, *words):
    for word in words:
        assert word in str(refusal.value), f"{word!r} is not in {refusal.value}"


# --- names and sizes


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small"])
def test_names(name):
    vit = ragged.load_deit(name)
    dim, heads = TINY[name]
    assert (vit.embed_dim, vit.blocks[0].attn.num_heads, len(vit.blocks)) == (dim, heads, 12)
    assert not vit.training and {p.dtype for p in vit.parameters()} == {torch.float32}
    assert vit.num_classes == 1000 and vit.patch_embed.num_patches == 196


def test_384_pixels():
    vit = ragged.load_deit("deit_tiny", img_size=384, num_classes=3)
    assert vit.patch_embed.num_patches == 576 and vit.pos_embed.shape[1] == 577
    with torch.no_grad():
        images = torch.randn(1, 3, 384, 384)
        torch.testing.assert_close(ragged.RaggedViT(vit)(images), vit(images), rtol=1e-4, atol=1e-5)


def test_any_plain_vit():
    vit = ragged.load_deit("vit_tiny_patch16_224", num_classes=2)
    assert vit.embed_dim == 192 and vit.head.out_features == 2
    distilled = ragged.load_deit("deit_tiny_distilled_patch16_224", num_classes=2)
    assert distilled.num_prefix_tokens == 2


@pytest.mark.parametrize("name", ["deit_huge", "", None, 3, "DeiT_tiny"])
def test_unknown_names(name):
    with pytest.raises(ValueError) as refusal:
        ragged.load_deit(name)
    assert_message(refusal, "name:", *TINY, repr(name))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "mixer_s32_224"])
def test_networks_of_another_kind(name):
    with pytest.raises(ValueError, match="Vision ?Transformer"):
        ragged.load_deit(name)


@pytest.mark.parametrize("size", [0, -224, 224.0, "224", None, (224, 224)], ids=str)
def test_impossible_image_sizes(size):
    with pytest.raises(ValueError, match="img_size:"):
        ragged.load_deit("deit_tiny", img_size=size)


# --- random weights


def test_random_weights_come_from_the_seed_alone(tiny):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = ragged.load_deit("deit_tiny", weights="random", seed=1, num_classes=5)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are the caller's"
    assert same(again, tiny)
    assert not same(ragged.load_deit("deit_tiny", weights="random", seed=2, num_classes=5), tiny)


# --- files


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, str(path))
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["plain.safetensors", "plain.pth", "model.pth", "state_dict.pth"])
def test_files_of_every_kind(kind, state, tiny, tmp_path):
    wrapper = kind.split(".")[0]
    path = write(state if wrapper == "plain" else {wrapper: state}, tmp_path / kind)
    for form in (path, str(path)):
        assert same(ragged.load_deit("deit_tiny", weights=form), tiny)


def test_the_head_says_how_many_classes(state, tmp_path):
    path = write(state, tmp_path / "five.safetensors")
    assert ragged.load_deit("deit_tiny", weights=path).num_classes == 5
    with pytest.raises(ValueError, match="head"):
        ragged.load_deit("deit_tiny", weights=path, num_classes=7)


def test_positions_of_another_image_size_are_resampled(state, tmp_path):
    path = write(state, tmp_path / "five.safetensors")
    vit = ragged.load_deit("deit_tiny", weights=path, img_size=384)
    assert vit.pos_embed.shape[1] == 577 and torch.equal(vit.cls_token, state["cls_token"])


def test_predictors_in_the_file_are_no_obstacle(state, tiny, tmp_path):
    extra = state | {"score_predictor.0.in_conv.0.weight": torch.ones(192)}
    assert same(ragged.load_deit("deit_tiny", weights=write(extra, tmp_path / "dynamic.pth")), tiny)


def test_missing_files(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", "nowhere/weights.pth", tmp_path):
        with pytest.raises(FileNotFoundError) as refusal:
            ragged.load_deit("deit_tiny", weights=path)
        assert_message(refusal, str(path))


@pytest.mark.parametrize("weights", ["imagnet", "", None, 3])
def test_unknown_weights(weights):
    with pytest.raises(ValueError) as refusal:
        ragged.load_deit("deit_tiny", weights=weights)
    assert_message(refusal, "weights:", "digits", "imagenet", "random")


def test_wrong_keys(state, tmp_path):
    gone = {k: v for k, v in state.items() if k != "blocks.4.attn.qkv.bias"}
    cases = {
        "blocks.4.attn.qkv.bias": gone,
        "blocks.99.attn.qkv.bias": state | {"blocks.99.attn.qkv.bias": torch.ones(3)},
        "norm.weight": state | {"norm.weight": torch.ones(191)},
    }
    for i, (key, bad) in enumerate(cases.items()):
        with pytest.raises(ValueError) as refusal:
            ragged.load_deit("deit_tiny", weights=write(bad, tmp_path / f"{i}.pth"))
        assert_message(refusal, "weights:", key, f"{i}.pth")


MISFITS = {
    "head of no dimension": {"head.weight": torch.tensor(1.0)},
    "positions of no square": {"pos_embed": torch.randn(1, 190, 192)},
    "positions of no dimension": {"pos_embed": torch.tensor(1.0)},
    "patches of two dimensions": {"patch_embed.proj.weight": torch.randn(192, 100)},
}


@pytest.mark.parametrize("what", MISFITS)
def test_shapes_that_timm_takes_for_granted(what, state, tmp_path):
    with pytest.raises(ValueError, match=r"weights: .*misfit\.pth does not fit the model"):
        ragged.load_deit("deit_tiny", weights=write(state | MISFITS[what], tmp_path / "misfit.pth"))


@pytest.mark.parametrize("name, value", [
    ("num_classes", "10"), ("num_classes", 10.0), ("num_classes", True), ("num_classes", -1), ("seed", "x"),
])  # fmt: skip
def test_numbers_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an integer"):
        ragged.load_deit("deit_tiny", **{name: value})


def test_an_image_size_that_patches_do_not_fill():
    """timm's convolution leaves the surplus at the edge out, and so do we."""
    vit = ragged.load_deit("deit_tiny", img_size=100, num_classes=10)
    images = torch.randn(2, 3, 100, 100)
    with torch.no_grad():
        torch.testing.assert_close(ragged.RaggedViT(vit)(images), vit(images))


def test_a_file_of_another_model(state, tmp_path):
    with pytest.raises(ValueError, match="weights:"):
        ragged.load_deit("deit_small", weights=write(state, tmp_path / "tiny.safetensors"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04N."], ids=["empty", "text", "pickled_none"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_files_that_are_no_checkpoints(content, suffix, tmp_path):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad"):
        ragged.load_deit("deit_tiny", weights=path)


def test_a_file_whose_names_are_no_names(tmp_path):
    torch.save({1: torch.zeros(1)}, tmp_path / "numbered.pth")
    with pytest.raises(ValueError, match="holds no dictionary of tensors"):
        ragged.load_deit("deit_tiny", weights=tmp_path / "numbered.pth")


def test_a_file_that_holds_no_tensors(tmp_path):
    for content in ([1, 2], {"model": 3}, {"epoch": 3}):
        with pytest.raises(ValueError):
            ragged.load_deit("deit_tiny", weights=write(content, tmp_path / "odd.pth"))


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_file_is_executed(tmp_path):
    mark = tmp_path / "intruder was here"
    torch.save({"model": Intruder(mark)}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Intruder(mark)))
    mark.unlink(missing_ok=True)
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match=name):
            ragged.load_deit("deit_tiny", weights=tmp_path / name)
    assert not mark.exists()


def test_hashes(state, tiny, tmp_path):
    path = write(state, tmp_path / "five.safetensors")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(ragged.load_deit("deit_tiny", weights=path, sha256=right), tiny)
    for wrong in ("0" * 64, "short"):
        with pytest.raises(ValueError) as refusal:
            ragged.load_deit("deit_tiny", weights=path, sha256=wrong)
        assert_message(refusal, wrong)


@pytest.mark.parametrize("weights", ["random", "imagenet"])
def test_a_hash_of_no_file_is_refused(weights, monkeypatch):
    """It would otherwise look as if something had been checked."""
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("nothing to load"))
    with pytest.raises(ValueError, match="sha256:"):
        ragged.load_deit("deit_tiny", weights=weights, sha256="0" * 64)


# --- the network


@pytest.mark.parametrize("kind", ["connection", "hub", "old_hub"])
def test_without_a_network_the_alternatives_are_named(kind, monkeypatch):
    class OldHub(FileNotFoundError, ValueError):
        """What hubs before version 1 raised was a ValueError, too."""

    error = {"connection": OSError("no route"), "hub": FileNotFoundError("no file"), "old_hub": OldHub("no file")}[kind]
    create = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise error
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError) as refusal:
        ragged.load_deit("deit_tiny", weights="imagenet")
    assert_message(refusal, "digits", "random", "path", "deit_tiny_patch16_224")


def test_digits_are_there_or_say_why_not():
    try:
        vit = ragged.load_deit("deit_tiny", weights="digits")
    except FileNotFoundError as refusal:
        assert "digits" in str(refusal) and "random" in str(refusal)
    else:
        assert vit.head.out_features == 10
