"""What users change behind a wrapped model's back: classes, the whole process, switches inside adapters, settings.

The answer is timm's own under the same circumstances, or a sentence says what is not supported.
"""

import copy
import functools
import threading
import warnings

import numpy as np
import pytest
import torch
from pruner_cases import assert_logits, build, pictures, small_vit
from test_hands import KEEP_ALL, REFUSALS, LoRA, scaled, vit
from timm.models import vision_transformer as tv
from torch import nn
from torch.nn.modules import module as of_torch
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import ragged
from ragged.bench.pipelines import Noted
from ragged.blocks import compiled
from ragged.support import Survey
from ragged.support.trial import as_written

EVERY = pytest.mark.parametrize("pruner", KEEP_ALL)
LATE = pytest.mark.parametrize("late", [False, True], ids=["before", "after"])


def as_timm_or_refused(do, pruner, late, images=None, undo=lambda: None):
    """Do something to the network of a wrapped model, before or after; True where it was refused."""
    images = pictures() if images is None else images
    mine, theirs = vit(), vit()
    try:
        if late:
            model = ragged.RaggedViT(mine, KEEP_ALL[pruner]())
            model(images)
        do(mine)
        do(theirs)
        want = theirs(images)
        try:
            if not late:
                model = ragged.RaggedViT(mine, KEEP_ALL[pruner]())
            got = model(images)
        except REFUSALS as refusal:
            assert len(str(refusal)) > 20 and "object has no attribute" not in str(refusal), refusal
            return True
        assert_logits(got, want)
        return False
    finally:
        undo()


# ---- classes and the process


PATCHED = [(tv.Attention, "forward"), (tv.Block, "forward"), (tv.PatchEmbed, "forward"), (nn.Conv2d, "forward"),
           (nn.Conv2d, "_conv_forward"), (tv.VisionTransformer, "forward"), (tv.VisionTransformer, "forward_features"),
           (tv.VisionTransformer, "pool"), (tv.VisionTransformer, "forward_head"), (tv.VisionTransformer, "_pos_embed"),
           (nn.Linear, "forward"), (nn.LayerNorm, "forward"), (tv.Mlp, "forward"), (nn.Dropout, "forward"),
           (nn.Sequential, "forward")]  # fmt: skip


@pytest.mark.parametrize("kind, name", PATCHED, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("mixes", [False, True], ids=["scales", "mixes"])
@LATE
@EVERY
def test_a_patched_class_counts_or_is_refused(monkeypatch, kind, name, mixes, late, pruner):
    original = getattr(kind, name)

    def patched(self, *arguments, **words):
        out = original(self, *arguments, **words)
        return out * 0.9 + 0.1 * out.mean(1, keepdim=True) if mixes and out.dim() > 2 else out * 1.1

    as_timm_or_refused(lambda network: monkeypatch.setattr(kind, name, patched), pruner, late, undo=monkeypatch.undo)


def test_methods_of_timm_and_pytorch_are_as_written():
    for kind, name in PATCHED:
        assert as_written(kind, name)
    assert not Survey(vit()).whole


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_on_all_modules_are_refused_while_they_are_there(register):
    model, hook = ragged.RaggedViT(vit()), {"forward_hook": scaled}.get(register, lambda *arguments: None)
    plain = model(pictures())
    handle = getattr(of_torch, f"register_module_{register}")(hook)
    try:
        with pytest.raises(RuntimeError, match="hooks on all modules"):
            model(pictures())
    finally:
        handle.remove()
    assert torch.equal(model(pictures()), plain)
    with FlopCounterMode(display=False):  # has hooks on all modules, which only note names
        assert torch.equal(model(pictures()), plain)


# ---- weights of the model itself


@pytest.mark.parametrize("name", ["pos_embed", "cls_token"])
@LATE
def test_a_mask_on_the_model_s_own_weights_is_refused(name, late):
    def masked(network):
        torch.manual_seed(5)
        prune.random_unstructured(network, name, amount=0.4)
        getattr(network, f"{name}_orig").data.mul_(1.5)

    assert as_timm_or_refused(masked, "evit", late)
    assert not as_timm_or_refused(lambda n: (masked(n), n(pictures()), prune.remove(n, name)), "evit", late)


@LATE
def test_a_parametrization_of_the_model_s_own_weights_counts(late):
    assert not as_timm_or_refused(lambda n: parametrizations.orthogonal(n, "cls_token") and n.eval(), "evit", late)


# ---- adapters with switches


class Switched(nn.Module):
    """Mixes tokens once something says so: an attribute, a buffer, a Boolean buffer, a dictionary, its own history."""

    def __init__(self, base, how):
        super().__init__()
        self.base, self.how, self.on, self.settings, self.calls = base, how, False, {"on": False}, 0
        self.register_buffer("gate", torch.zeros(()))
        self.register_buffer("flag", torch.tensor(False))

    def forward(self, x):
        out, self.calls = self.base(x), self.calls + (self.how == "history")
        on = {"attribute": self.on, "buffer": bool(self.gate), "flag": bool(self.flag), "length": x.shape[-2] > 8,
              "dictionary": self.settings["on"], "history": self.calls > 1, "three dimensions": x.dim() == 3}[self.how]
        return out + out.mean(-2, keepdim=True) if on else out

    def switch(self):
        self.on, self.settings["on"] = True, True
        self.gate.fill_(1.0)
        self.flag.fill_(True)


SWITCHES = ["attribute", "buffer", "flag", "length", "dictionary", "history", "three dimensions"]


@pytest.mark.parametrize("how", SWITCHES)
@pytest.mark.parametrize("name", ["mlp", "attn.qkv", "norm1"])
@EVERY
def test_an_adapter_that_is_switched_counts(how, name, pruner):
    networks = vit(), vit()
    for network in networks:
        network.blocks[2].set_submodule(name, Switched(network.blocks[2].get_submodule(name), how).eval())
    model = ragged.RaggedViT(networks[0], KEEP_ALL[pruner]())
    for switched in (False, True):
        for network in networks if switched else ():
            network.blocks[2].get_submodule(name).switch()
        for _ in range(2):
            try:
                assert_logits(model(pictures()), networks[1](pictures()))
            except ValueError as refusal:
                assert "block 2" in str(refusal)


def test_an_adapter_is_tried_out_on_a_copy_and_stays_in_the_pieces():
    network = vit()
    network.blocks[1].attn.qkv = LoRA(network.blocks[1].attn.qkv, zero=True)
    before = copy.deepcopy(network.state_dict())
    survey = Survey(network)
    assert not survey.whole and survey.still_true(network)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_norm_over_all_tokens_is_no_norm_of_rows():
    network = vit()
    n = network.patch_embed.num_patches + 1
    network.blocks[1].norm1 = nn.LayerNorm((n, network.embed_dim))
    assert "norm1" in Survey(network).whole[1]
    assert_logits(ragged.RaggedViT(network)(pictures()), network(pictures()))


# ---- settings, and changes in the middle of a call


@pytest.mark.parametrize("change", [
    lambda p: setattr(p.proj, "padding", (1, 1)), lambda p: setattr(p.proj, "stride", (4, 4)),
    lambda p: setattr(p.proj, "dilation", (2, 2)), lambda p: setattr(p, "flatten", False),
    lambda p: setattr(p, "strict_img_size", False), lambda p: setattr(p, "dynamic_img_pad", True),
    lambda p: setattr(p.proj, "padding_mode", "circular"),
], ids=["padding", "stride", "dilation", "flatten", "strict", "pad", "mode"])  # fmt: skip
@LATE
def test_settings_of_the_patch_embedding_count(change, late):
    mine, theirs = vit(), vit()
    model = ragged.RaggedViT(mine) if late else None
    if late:
        model(pictures())
    for network in (mine, theirs):
        change(network.patch_embed)
    try:
        want = theirs(pictures())
    except Exception:
        want = None
    try:
        got = (model or ragged.RaggedViT(mine))(pictures())
    except Exception:
        return
    assert want is not None
    assert_logits(got, want)


def test_another_number_of_heads_is_refused_as_by_timm():
    network = vit()
    model = ragged.RaggedViT(network)
    network.blocks[1].attn.num_heads = 1
    for run in (network, model):
        with pytest.raises(RuntimeError):
            run(pictures())


@pytest.mark.parametrize("place", ["patch_embed", "norm_pre", "blocks.0", "blocks.0.mlp"])
@pytest.mark.parametrize("what", ["block", "hook", "norm"])
def test_what_a_hook_changes_further_on_counts_at_once(place, what):
    def hang(network):
        other = copy.deepcopy(network.blocks[1])
        other.ls2.gamma.data.mul_(-2)

        def change(module, inputs, output):
            if what == "block":
                network.blocks[2] = other
            elif what == "norm":
                network.norm = nn.LayerNorm(network.embed_dim, eps=1.0)
            else:
                network.blocks[2].register_forward_hook(scaled)

        network.get_submodule(place).register_forward_hook(change)

    mine, theirs = vit(), vit()
    hang(mine)
    hang(theirs)
    assert_logits(ragged.RaggedViT(mine)(pictures()), theirs(pictures()))


# ---- the whole model under torch.compile


@pytest.fixture
def under_a_compiler(monkeypatch):
    """torch.compile as users call it, which here writes no C++: neither outside nor for the pieces of a model."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "compiled_pieces", functools.partial(compiled.compiled_pieces, backend="eager"))
    return functools.partial(torch.compile, backend="eager")


OWN_PIECES = pytest.mark.filterwarnings("ignore:torch.compile. a RaggedViT:RuntimeWarning")


@OWN_PIECES
@pytest.mark.parametrize("name", [None, "evit", "ats"])
def test_the_whole_model_may_be_compiled(name, under_a_compiler):
    """By its user, from outside; a batch, and a list of images of different sizes. It is left as it was."""
    model = ragged.RaggedViT(small_vit(), name and build(name, 0.5, at=(1,)))
    lists, before = [torch.randn(3, 32, 32), torch.randn(3, 32, 64)], list(model.state_dict())
    fast = under_a_compiler(model)
    for images in (pictures(2), lists):
        torch.testing.assert_close(fast(images), model(images), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == before and model._compiled is None
    (pieces,) = model._outside.values()
    assert all(hasattr(piece, "_torchdynamo_orig_callable") for piece in pieces.values()), "its pieces are"
    model.pruner = build("threshold_l2", 0.5, at=(0,))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(fast(pictures(2)), copied(pictures(2)), rtol=1e-5, atol=1e-5)


def test_options_that_do_not_reach_the_pieces_are_mentioned(under_a_compiler):
    model = ragged.RaggedViT(small_vit())
    with pytest.warns(RuntimeWarning, match=r"model\.compile\(\) first"):
        under_a_compiler(model)(pictures(2))
    before = ragged.RaggedViT(small_vit()).compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        under_a_compiler(before)(pictures(2))
    assert "_outside" not in vars(before)


@OWN_PIECES
def test_a_compiled_model_of_another_class_stays_one(under_a_compiler):
    class Doubled(ragged.RaggedViT):
        def begin(self, images, *given):
            return self.factor * super().begin(images, *given)

    model = Doubled(small_vit())
    fast = under_a_compiler(model)
    for factor in (2, 3):
        model.factor = factor
        assert_logits(fast(pictures(2)), factor * ragged.RaggedViT(small_vit())(pictures(2)))


@OWN_PIECES
def test_inside_something_compiled_a_model_learns_and_is_hooked(under_a_compiler, request):
    model, x = ragged.RaggedViT(small_vit(), build("evit", 0.5, at=(1,))), pictures(2)
    larger, seen = nn.Sequential(nn.Identity(), model, nn.Linear(model.num_classes, 2)), []
    hook = model.vit.blocks[2].register_forward_hook(lambda *_: seen.append(1))
    request.addfinalizer(hook.remove)  # the network is everybody's
    for step in (under_a_compiler(larger), larger):
        larger.zero_grad()
        with torch.enable_grad():
            step(x).square().sum().backward()
        seen.append([p.grad.clone() for p in larger.parameters() if p.grad is not None])
    assert seen[0] == seen[2] == 1
    for mine, theirs in zip(seen[1], seen[3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="_apart"):
        under_a_compiler(model, fullgraph=True)(x)


def test_a_model_compiled_in_one_thread_runs_in_another():
    """Newer versions of PyTorch keep some settings for each thread."""
    torch._dynamo.reset()
    model, seen = ragged.RaggedViT(small_vit()).compile(backend="eager", dynamic=False), []

    def serve():
        with torch.no_grad():
            seen.extend(model(pictures(2)[:1].repeat(batch, 1, 1, 1)).shape[0] for batch in range(1, 12))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert seen == list(range(1, 12))


# ---- what cannot be run


def test_programs_and_compiled_parts_are_refused_by_name():
    x = torch.zeros(1, 5, vit().embed_dim)
    for name in ("norm", "blocks.1.mlp", "blocks.1.norm1", "head"):
        for make in (torch.jit.script, lambda m: torch.jit.trace(m, x), lambda m: torch.compile(m, backend="eager")):
            network = vit()
            network.set_submodule(name, make(network.get_submodule(name)))
            with pytest.raises(ValueError, match=rf"{name.split('.')[-1]} is"):
                ragged.RaggedViT(network)


def test_models_that_are_none():
    with pytest.raises(ValueError, match="no blocks"):
        ragged.RaggedViT(vit(depth=0))
    network = vit()
    network.num_prefix_tokens = 0
    with pytest.raises(ValueError, match="num_prefix_tokens is 0"):
        ragged.RaggedViT(network)


def test_a_model_on_meta_can_be_wrapped_and_not_called():
    with torch.device("meta"):
        network = tv.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    model = ragged.RaggedViT(network, KEEP_ALL["evit"]())
    with pytest.raises(ValueError, match="meta"):
        model(torch.zeros(1, 3, 32, 32, device="meta"))


def test_vmap_is_refused():
    for pruner in KEEP_ALL:
        model = ragged.RaggedViT(vit(), KEEP_ALL[pruner]())
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(model)(pictures()[:, None])
        stacked = {name: torch.stack([w, w]) for name, w in model.named_parameters()}
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(lambda w, m=model: torch.func.functional_call(m, w, (pictures(),)))(stacked)


@pytest.mark.parametrize("make", [lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor(list(x)),
                                  lambda x: x.to_mkldnn()], ids=["sparse", "nested", "mkldnn"])  # fmt: skip
def test_odd_tensors_are_refused(make):
    with pytest.raises(TypeError, match="images: expected a dense tensor"):
        ragged.RaggedViT(vit())(make(pictures()))


def test_double_pictures_under_autocast_are_as_in_timm():
    network, images = vit(), pictures().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            want = network(images)
        except RuntimeError:
            want = None
        try:
            got = ragged.RaggedViT(network)(images)
        except ValueError as refusal:
            assert "images" in str(refusal)
        else:
            assert_logits(got.float(), want.float(), 2e-2)


# ---- features


@pytest.mark.parametrize("words", [
    {"indices": [0, 1], "stop_early": True}, {"indices": 2, "stop_early": True}, {"indices": np.array([0, 2])},
    {"indices": (np.int64(1),)}, {"indices": np.int64(2)}, {"indices": [-1]}, {"output_dict": True},
    {"output_dict": True, "return_prefix_tokens": True, "norm": True, "output_fmt": "NLC"},
    {"output_dict": True, "intermediates_only": True, "indices": [1], "stop_early": True},
], ids=str)  # fmt: skip
def test_intermediates_are_timm_s_with_every_option(words):
    network = vit()
    plain = {k: [int(i) for i in v] if k == "indices" and np.ndim(v) else v for k, v in words.items()}
    plain = {k: int(v) if isinstance(v, np.integer) else v for k, v in plain.items()}
    want = network.forward_intermediates(pictures(), **plain)
    got = ragged.RaggedViT(network).forward_intermediates(pictures(), **words)
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
    torch.utils._pytree.tree_map(assert_logits, got, want)


@pytest.mark.parametrize("indices", [[3], [-4], 0, 4, "all", [0.5], 1.5], ids=str)
def test_indices_that_are_none(indices):
    with pytest.raises(ValueError, match="indices"):
        ragged.RaggedViT(vit()).forward_intermediates(pictures(), indices)


def test_no_block_after_the_last_one_wanted_runs():
    model, ran = ragged.RaggedViT(vit()), []
    for i, block in enumerate(model.vit.blocks):
        block.register_forward_hook(lambda *a, i=i: ran.append(i))
    model.forward_intermediates(pictures(), [1], stop_early=True)
    assert ran == [0, 1]


# ---- a pruner that several models use


def test_a_shared_pruner_is_not_rounded():
    pruner, network = KEEP_ALL["dynamicvit"](), vit()
    full = ragged.RaggedViT(network, pruner)
    want = {name: w.clone() for name, w in pruner.state_dict().items()}
    half = ragged.RaggedViT(copy.deepcopy(network).to(torch.bfloat16), pruner)
    assert next(half.pruner.parameters()).dtype == torch.bfloat16
    half(pictures().bfloat16())
    inner = ragged.RaggedViT(copy.deepcopy(network), pruner)
    inner.vit.to(torch.bfloat16)
    inner(pictures().bfloat16())
    assert full.pruner is pruner and all(torch.equal(w, want[name]) for name, w in pruner.state_dict().items())
    assert all(w.dtype == torch.float32 for w in full.pruner.parameters())


def test_a_copy_of_a_pruner_shares_what_it_noted():
    pruner = KEEP_ALL["dynamicvit"]()
    ragged.RaggedViT(vit(), pruner)
    noted = Noted(pruner)
    ragged.RaggedViT(vit().to(torch.bfloat16), noted)(pictures().bfloat16())
    assert len(noted.taken) == 2


def test_a_pruner_of_its_own_stays_the_caller_s_object():
    pruner = ragged.PRUNERS["dynamicvit"](keep=0.7, at=(1,))
    assert ragged.RaggedViT(vit().to(torch.bfloat16), pruner).pruner is pruner


# ---- a second round of hostile hands


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_the_cache_of_parametrized_weights_holds_none_of_a_trial(late):
    network = vit()
    model = ragged.RaggedViT(network) if late else None
    for name in ("norm", "blocks.1.norm1", "blocks.1.attn.qkv"):
        parametrizations_of = nn.utils.parametrize.register_parametrization
        parametrizations_of(network.get_submodule(name), "weight", Doubled())
    network.eval()
    want = network(pictures())
    with nn.utils.parametrize.cached():
        assert_logits((model or ragged.RaggedViT(network))(pictures()), want)
        assert_logits(network(pictures()), want)


def grad_cam(network):
    network.blocks[1].register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())


def plain_bias(network):
    bias = network.blocks[1].attn.qkv.bias.detach().clone().requires_grad_()
    del network.blocks[1].attn.qkv.bias
    network.blocks[1].attn.qkv.bias = bias


@pytest.mark.parametrize("do", [grad_cam, plain_bias])
@LATE
@EVERY
def test_gradients_of_a_frozen_network_reach_what_asks_for_them(do, late, pruner):
    mine, theirs = (vit().requires_grad_(False) for _ in range(2))
    with torch.enable_grad():
        try:
            if late:
                model = ragged.RaggedViT(mine, KEEP_ALL[pruner](), "sdpa_padded")
            do(mine)
            do(theirs)
            if not late:
                model = ragged.RaggedViT(mine, KEEP_ALL[pruner](), "sdpa_padded")
            got = model(pictures())
        except ValueError as refusal:  # EViT and DynamicViT cut where the hook hangs
            assert "block 1" in str(refusal)
        else:
            want = theirs(pictures())
            assert got.requires_grad and want.requires_grad
            assert_logits(got, want)


def test_packed_attention_has_gradients_that_nobody_foresaw():
    network = vit().requires_grad_(False)
    plain_bias(network)
    with torch.enable_grad():
        model = ragged.RaggedViT(network, ragged.PRUNERS["threshold_l2"](keep=0.5, at=(0,)), "reference")
        model(pictures()).sum().backward()
    assert network.blocks[1].attn.qkv.bias.grad.any()


class Mixing(nn.Module):
    def forward(self, x):
        return x + x.mean(-2, keepdim=True)


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleDict])
def test_a_part_that_comes_late_into_an_empty_container_counts(container):
    class Holding(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.parts = base, container()

        def forward(self, x):
            x = self.base(x)
            for part in self.parts.values() if container is nn.ModuleDict else self.parts:
                x = part(x)
            return x

    mine, theirs = vit(), vit()
    for network in (mine, theirs):
        network.norm = Holding(network.norm).eval()
    model = ragged.RaggedViT(mine)
    model(pictures())
    for network in (mine, theirs):
        parts = network.norm.parts
        parts.append(Mixing()) if container is nn.Sequential else parts.update({"late": Mixing()})
    theirs.eval(), mine.eval()
    assert_logits(model(pictures()), theirs(pictures()))


class Deep(nn.Module):
    class Config:
        on = False

    def __init__(self, base, how):
        super().__init__()
        self.base, self.how, self.config, self.nest = base, how, Deep.Config(), {"a": {"on": False}}
        self.items, self.tensor, self.gate = [[False]], torch.tensor(False), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        out = self.base(x)
        on = {"config": self.config.on, "nest": self.nest["a"]["on"], "list": self.items[0][0],
              "tensor": bool(self.tensor), "weight": float(self.gate) > 3}[self.how]  # fmt: skip
        return out + out.mean(-2, keepdim=True) if on else out

    def switch(self):
        self.config.on = self.nest["a"]["on"] = self.items[0][0] = True
        self.tensor.fill_(True)
        self.gate.data = torch.tensor(5.0)


@pytest.mark.parametrize("how", ["config", "nest", "list", "tensor", "weight"])
@pytest.mark.parametrize("name", ["norm", "blocks.2.mlp"])
@LATE
def test_a_switch_that_lies_deep_counts(how, name, late):
    def switched(network):
        network.get_submodule(name).switch()

    mine, theirs = vit(), vit()
    for network in (mine, theirs):
        network.set_submodule(name, Deep(network.get_submodule(name), how).eval())
    if not late:
        switched(mine)
    model = ragged.RaggedViT(mine, KEEP_ALL["threshold_l2"]())
    if late:
        model(pictures())
        switched(mine)
    switched(theirs)
    assert_logits(model(pictures()), theirs(pictures()))


CALLED = [(kind, name) for kind in (tv.Block, tv.Attention, tv.PatchEmbed, nn.Conv2d, tv.VisionTransformer)
          for name in ("__call__", "_call_impl")]  # fmt: skip


@pytest.mark.parametrize("kind, name", CALLED, ids=lambda x: getattr(x, "__name__", x))
@LATE
def test_a_call_that_was_replaced_counts_or_is_refused(monkeypatch, kind, name, late):
    original = getattr(kind, name)

    def replaced(self, *arguments, **words):
        return original(self, *arguments, **words) * 1.1

    as_timm_or_refused(lambda network: monkeypatch.setattr(kind, name, replaced, raising=False), "evit", late,
                       undo=monkeypatch.undo)  # fmt: skip


@pytest.mark.parametrize("place", ["", "blocks.1", "blocks.1.attn", "blocks.1.mlp", "patch_embed", "patch_embed.proj"])
@LATE
def test_a_call_replaced_on_an_object_counts_or_is_refused(place, late):
    def replace(network):
        module = network.get_submodule(place)
        original = module._call_impl
        module._call_impl = lambda *arguments, **words: original(*arguments, **words) * 1.1

    as_timm_or_refused(replace, "threshold_l2", late)


def test_a_network_s_own_intermediates_are_refused():
    network = vit()
    network.forward_intermediates = lambda *arguments, **words: (torch.ones(1), [])
    with pytest.raises(ValueError, match="forward_intermediates of its own"):
        ragged.RaggedViT(network)


def test_patched_functions_and_modes_reach_the_patch_embedding(monkeypatch):
    for name in ("conv2d", "linear"):
        original = getattr(nn.functional, name)
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, name, lambda *a, original=original, **k: original(*a, **k) * 1.1)
            assert not as_timm_or_refused(lambda network: None, "evit", True)

    class Scaled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), words=None):
            out = function(*arguments, **(words or {}))
            return out * 1.1 if function is nn.functional.conv2d else out

    with Scaled():
        assert not as_timm_or_refused(lambda network: None, "evit", True)


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 1.1


@pytest.mark.parametrize("make", [Wrapped, lambda conv: nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))])
@LATE
@EVERY
def test_a_patch_embedding_without_a_weight_of_its_own(make, late, pruner):
    def replace(network):
        network.patch_embed.proj = make(network.patch_embed.proj).eval()

    assert not as_timm_or_refused(replace, pruner, late)


def test_parts_that_are_missing_fail_as_in_timm():
    for name in ("drop_path1", "attn.proj_drop"):
        network = vit()
        owner, _, leaf = f"blocks.1.{name}".rpartition(".")
        setattr(network.get_submodule(owner), leaf, None)
        with pytest.raises(TypeError):
            network(pictures())
        with pytest.raises(TypeError):
            ragged.RaggedViT(network)(pictures())


def test_lists_under_a_device_context_and_without_blocks():
    model = ragged.RaggedViT(vit())
    want = model(list(pictures()))
    with torch.device("meta"):
        assert torch.equal(model(list(pictures())), want)
    model.vit.pos_embed.data.mul_(1.0)
    torch.utils.swap_tensors(model.vit.pos_embed, nn.Parameter(3 * model.vit.pos_embed.detach()))
    assert_logits(model(list(pictures())), model.vit(pictures()))
    while len(model.vit.blocks):
        model.vit.blocks.pop(0)
    with pytest.raises(ValueError, match="no blocks"):
        model(pictures())


def test_transforms_are_refused_in_words():
    model = ragged.RaggedViT(vit(), KEEP_ALL["evit"]())
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(pictures())
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.jvp(lambda x: model(list(x)), (pictures(),), (pictures(),))
    with pytest.raises(NotImplementedError, match="symbolic_trace"):
        torch.fx.symbolic_trace(model)


def test_unfused_attention_has_the_derivatives_timm_s_has():
    mine, theirs = vit(), vit()
    for network in (mine, theirs):
        for block in network.blocks:
            block.attn.fused_attn = False
    model, x = ragged.RaggedViT(mine, None, "sdpa_padded"), pictures()[:1]
    got, want = (torch.func.jvp(run, (x,), (torch.ones_like(x),))[1] for run in (model, theirs))
    assert_logits(got, want)


@pytest.mark.parametrize("breaks", [lambda x: torch._dynamo.graph_break(), lambda x: float(x.abs().max())])
def test_an_adapter_that_breaks_a_graph_compiles_all_the_same(breaks):
    class Breaking(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            breaks(x)
            return self.base(x)

    network = vit()
    network.blocks[1].mlp = Breaking(network.blocks[1].mlp).eval()
    model = ragged.RaggedViT(network).compile(backend="eager")
    assert_logits(model(pictures()), network(pictures()))


def test_a_network_whose_parts_are_no_modules_is_refused():
    class Odd(tv.VisionTransformer):
        def __getattr__(self, name):
            return (lambda x: x) if name == "norm" else super().__getattr__(name)

    network = vit()
    del network.norm
    network.__class__ = Odd
    with pytest.raises(ValueError, match="norm is no module"):
        ragged.RaggedViT(network)
