"""`load_deit`: names, sizes, seeds, files good and bad, and no network."""

import concurrent.futures
import contextlib
import hashlib
import json
import pickle
import random

import numpy as np
import pytest
import torch
from pruner_cases import with_variance
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


@pytest.mark.parametrize("size", [
    0, -224, 224.0, "224", None, True, (), (224,), (224, 0), (224, 224.0), (224, 224, 3), "ab",
    {224: 1, 384: 1}, [None] * 2,
], ids=str)  # fmt: skip
def test_impossible_image_sizes(size):
    with pytest.raises(ValueError, match="img_size:"):
        ragged.load_deit("deit_tiny", img_size=size)


@pytest.mark.parametrize("size, grid", [((384, 224), (24, 14)), ([224, 384], (14, 24)), ((96, 96), (6, 6))], ids=str)
def test_rectangles(size, grid, state, tmp_path):
    vit = ragged.load_deit("deit_tiny", img_size=size, num_classes=5)
    assert vit.patch_embed.grid_size == grid and vit.pos_embed.shape[1] == 1 + grid[0] * grid[1]
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ragged.RaggedViT(vit)(images), vit(images), rtol=1e-4, atol=1e-5)
    # weights of a square are resampled as timm resamples them
    path = write(state, tmp_path / "square.pth")
    theirs = timm.create_model("deit_tiny_patch16_224", img_size=size, num_classes=5, pretrained=True,
                               pretrained_cfg_overlay={"file": str(path), "num_classes": 5}).eval()  # fmt: skip
    assert same(ragged.load_deit("deit_tiny", path, size), theirs)


def test_a_size_without_a_single_patch():
    with pytest.raises(ValueError, match="img_size: no patch of vit_small_patch32_224 fits"):
        ragged.load_deit("vit_small_patch32_224", img_size=16)


# --- options


def test_options_reach_timm(state, tiny, tmp_path):
    path = write(state, tmp_path / "five.pth")
    for weights in ("random", path):
        vit = ragged.load_deit("deit_tiny", weights, num_classes=5, seed=1, dynamic_img_size=True)
        assert vit.dynamic_img_size and same(vit, tiny)
    assert ragged.load_deit("deit_tiny", reg_tokens=4, depth=2).num_prefix_tokens == 5


@pytest.mark.parametrize("option, value, words", [
    ("dynamic_image_size", True, ["dynamic_image_size:", "no option"]),
    ("pretrained", True, ["pretrained:", "weights="]),
    ("checkpoint_path", "weights.pth", ["checkpoint_path:", "weights="]),
    ("device", "cuda", ["device:", ".to()"]),
    ("dtype", torch.float16, ["dtype:", ".to()"]),
    ("embed_dim", 100, ["deit_tiny", "divisible"]),
    ("depth", "twelve", ["deit_tiny"]),
])  # fmt: skip
@pytest.mark.parametrize("weights", ["random", "imagenet"])
def test_options_that_are_none(option, value, words, weights):
    if weights == "imagenet" and option in ("embed_dim", "depth"):
        pytest.skip("timm may ask for the weights first")
    with pytest.raises(ValueError) as refusal:
        ragged.load_deit("deit_tiny", weights, **{option: value})
    assert_message(refusal, *words)


# --- names that timm has


def test_names_with_a_tag():
    vit = ragged.load_deit("deit_tiny_patch16_224.fb_in1k", num_classes=5, seed=1)
    assert vit.pretrained_cfg["tag"] == "fb_in1k"
    with pytest.raises(ValueError, match=r"name: timm has no tag 'nonsense' .*fb_in1k"):
        ragged.load_deit("deit_tiny_patch16_224.nonsense")
    with pytest.raises(ValueError, match="hf-hub:facebook/deit-tiny"):
        ragged.load_deit("facebook/deit-tiny")


def published(folder):
    """A folder as timm's push_to_hf_hub writes it. Returns the model in it."""
    vit = with_variance(timm.create_model("deit_tiny_patch16_224", num_classes=7, depth=2))
    cfg = {"input_size": [3, 224, 224], "classifier": "head", "first_conv": "patch_embed.proj", "num_classes": 7}
    config = {"architecture": "deit_tiny_patch16_224", "num_classes": 7, "model_args": {"depth": 2},
              "pretrained_cfg": cfg | {"fixed_input_size": True}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), str(folder / "model.safetensors"))
    return vit


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client, with one repository, somebody/model or timm/model, on this disk."""
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(repo_id, filename, **_):
        path = tmp_path / filename
        if repo_id not in ("somebody/model", "timm/model"):
            raise OSError("no route\nto the \x1b[31mhost")
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    return published(tmp_path)


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "hf_hub:somebody/model", "HF-HUB:timm/model", "timm/model"])
def test_names_on_the_hub(name, hub, tmp_path):
    assert same(ragged.load_deit(name, "imagenet"), hub)
    assert ragged.load_deit(name, "imagenet", num_classes=3).num_classes == 3
    assert ragged.load_deit(name).num_classes == 7 and not same(ragged.load_deit(name), hub)
    assert same(ragged.load_deit(name, tmp_path / "model.safetensors"), hub)


@pytest.mark.parametrize("weights", ["imagenet", "random"])
def test_the_hub_without_a_network(weights, hub):
    with pytest.raises(ConnectionError) as refusal:
        ragged.load_deit("hf-hub:nobody/model", weights)
    assert_message(refusal, "hf-hub:nobody/model", "no route", "path")
    assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value)


def test_folders(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    vit = published(tmp_path / "models")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in (f"local-dir:{tmp_path}/models", "local-dir:~/models"):
        assert same(ragged.load_deit(name, "imagenet"), vit)
    with pytest.raises(FileNotFoundError, match="name: .*config.json"):
        ragged.load_deit(f"local-dir:{tmp_path}", "imagenet")
    (tmp_path / "models" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="local-dir:"):
        ragged.load_deit("local-dir:~/models", "imagenet")


def test_weights_that_nobody_trained():
    with pytest.raises(ValueError, match="timm has no trained weights of vit_small_patch16_36x1_224"):
        ragged.load_deit("vit_small_patch16_36x1_224", "imagenet")


# --- random weights


def test_random_weights_come_from_the_seed_alone(tiny):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = ragged.load_deit("deit_tiny", weights="random", seed=1, num_classes=5)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are the caller's"
    assert same(again, tiny)
    assert not same(ragged.load_deit("deit_tiny", weights="random", seed=2, num_classes=5), tiny)


def random_states():
    return torch.random.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def uses(folder, state):
    """(name, call) of whatever loads or makes a network, and of some that are refused on the way."""
    good, bad = write(state, folder / "good.pth"), write(state | {"norm.weight": torch.ones(3)}, folder / "bad.pth")
    dynamic = ragged.PRUNERS["dynamicvit"]
    yield "random", lambda: ragged.load_deit("deit_tiny")
    yield "digits", lambda: ragged.load_deit("deit_tiny", "digits")
    yield "a file", lambda: ragged.load_deit("deit_tiny", good)
    yield "another model's file", lambda: ragged.load_deit("deit_small", good)
    yield "a damaged file", lambda: ragged.load_deit("deit_tiny", bad)
    yield "no ViT", lambda: ragged.load_deit("mixer_s32_224")
    yield "a bad option", lambda: ragged.load_deit("deit_tiny", embed_dim=100)
    yield "predictors", lambda: dynamic(at=(1,)).bind(48, 3)
    yield "predictors of a file without any", lambda: dynamic(at=(1,), predictors=good).bind(48, 3)
    yield "an impossible seed", lambda: dynamic(at=(1,), seed=2**64).bind(48, 3)


def test_the_caller_s_random_state_is_the_caller_s(state, tmp_path, monkeypatch):
    """Also on GPUs, which torch.manual_seed would reach, and also when something is raised."""
    for module in (torch.cuda, torch.mps, torch.xpu):
        for seeder in {"manual_seed", "manual_seed_all", "seed", "seed_all"} & set(vars(module)):
            monkeypatch.setattr(module, seeder, lambda *_: pytest.fail("a GPU was seeded"))
    for name, use in uses(tmp_path, state):
        before = random_states()
        with contextlib.suppress(ValueError, RuntimeError):
            use()
        assert random_states() == before, name
        assert torch.get_default_dtype() == torch.float32


def test_the_caller_s_defaults_do_not_matter(tiny):
    """Another default dtype or device neither changes the weights nor is changed."""
    predictors = [ragged.PRUNERS["dynamicvit"](at=(1,)) for _ in range(2)]
    predictors[0].bind(48, 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = ragged.load_deit("deit_tiny", weights="random", seed=1, num_classes=5)
            digits = ragged.load_deit("deit_tiny", "digits")
            predictors[1].bind(48, 3)
            assert torch.empty(1).is_meta and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(again, tiny) and same(*predictors)
    assert {(p.dtype, p.device.type) for p in digits.parameters()} == {(torch.float32, "cpu")}


def test_threads_do_not_mix_their_random_numbers():
    wanted = [ragged.load_deit("deit_tiny", depth=1, num_classes=5, seed=s) for s in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda s: ragged.load_deit("deit_tiny", depth=1, num_classes=5, seed=s), [0, 1, 2, 3] * 4))
    assert all(same(vit, wanted[i % 4]) for i, vit in enumerate(made))


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
    ("seed", 2**64),
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
