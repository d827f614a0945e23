"""Checkpoints as the world writes them: every layout gives exactly the logits of the model that was saved, or a
sentence that names the file, the tensor and what to do. Nothing in a file is executed."""

import argparse
import collections
import datetime
import pathlib
import pickle
import re
import types
import warnings

import numpy as np
import pytest
import torch
from pruner_cases import DEPTH, DIM, SIDE, pictures, predictor_weights, small_vit, with_variance
from safetensors.torch import save_file
from timm.layers import GluMlp, SwiGLUPacked
from timm.models import vision_transformer as tv
from torch import nn

import ragged
from ragged.data.checkpoints import check_weights, choose_state, clean_keys
from ragged.loading import load_state

SMALL = {"img_size": SIDE, "embed_dim": DIM, "depth": DEPTH, "num_heads": 3}
SIZE = {key: value for key, value in SMALL.items() if key != "img_size"}


def make(seed=0, **extra):
    return with_variance(tv.VisionTransformer(**SMALL | {"num_classes": 10} | extra), seed)


def save(content, path):
    torch.save(content, path)
    return path


def weights_of(vit, **changes):
    return {k: v.clone() for k, v in vit.state_dict().items()} | changes


def load(path, name="deit_tiny", **options):
    return ragged.load_deit(name, path, SIDE, **SIZE | options)


def assert_loads(path, vit, name="deit_tiny", **options):
    """The loaded model is `vit`, to the last bit."""
    with torch.no_grad():
        assert torch.equal(load(path, name, **options)(pictures()), vit(pictures()))


def refusal(path, *words, read=load, **options):
    with pytest.raises(ValueError) as caught:
        read(path, **options)
    message = str(caught.value)
    for word in (pathlib.Path(path).name, *words):
        assert word in message, f"{word!r} is not in {message}"
    assert message.isprintable(), "a control code or a line break"
    assert "weights_only" not in message and "add_safe_globals" not in message
    return message


# ---- wrappers and containers ----

PREFIXES = ["module.", "_orig_mod.", "backbone.", "teacher.", "module._orig_mod.", "_orig_mod.module.", "model.",
            "teacher.backbone.", "module.backbone.", "backbone.module.", "model._orig_mod.vit.",
            "_fsdp_wrapped_module."]  # fmt: skip
CONTAINERS = ["model", "state_dict", "model_ema", "state_dict_ema", "teacher"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_prefixes(prefix, suffix, tmp_path):
    vit, path = small_vit(), tmp_path / f"wrapped.{suffix}"
    state = {prefix + key: value for key, value in weights_of(vit).items()}
    save(state, path) if suffix == "pth" else save_file(state, str(path))
    assert_loads(path, vit)
    assert load_state(path).keys() == vit.state_dict().keys()


def test_what_pytorch_s_own_wrappers_write(tmp_path):
    vit = small_vit()
    averaged = torch.optim.swa_utils.AveragedModel(vit)
    for name, wrapped in {"parallel": nn.DataParallel(vit), "compiled": torch.compile(vit), "swa": averaged}.items():
        assert_loads(save(wrapped.state_dict(), tmp_path / f"{name}.pth"), vit)
    one_block = {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in weights_of(vit).items()}
    assert_loads(save(one_block, tmp_path / "one.pth"), vit)


def test_two_keys_that_become_one(tmp_path):
    state = weights_of(small_vit())
    state["module.norm.weight"] = state["norm.weight"]
    refusal(save(state, tmp_path / "twice.pth"), "'norm.weight' twice")


@pytest.mark.parametrize("key", CONTAINERS)
@pytest.mark.parametrize("inner", [None, "model", "state_dict"])
def test_containers(key, inner, tmp_path):
    state = weights_of(small_vit())
    content = {key: state if inner is None else {inner: state}, "epoch": 3, "optimizer": {"state": {}}}
    assert_loads(save(content, tmp_path / "held.pth"), small_vit())


def test_several_containers(tmp_path):
    """Which one is taken is said, and an argument chooses."""
    vits = {key: make(seed=i) for i, key in enumerate(CONTAINERS)}
    content = {key: vit.state_dict() for key, vit in vits.items()}
    for first, second in [("model_ema", "model"), ("state_dict_ema", "state_dict"), ("teacher", "model")]:
        path = save({second: content[second], first: content[first]}, tmp_path / f"{first}.pth")
        with pytest.warns(UserWarning, match=f"took '{first}'; checkpoint_key= chooses"):
            assert_loads(path, vits[first])
        for key in (first, second):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert_loads(path, vits[key], checkpoint_key=key)
                assert torch.equal(load_state(path, key)["norm.bias"], vits[key].norm.bias)


def test_keys_that_are_chosen(tmp_path):
    vit = small_vit()
    path = save({"net": weights_of(vit), "optimizer": {"state": {}}}, tmp_path / "net.pth")
    assert_loads(path, vit, checkpoint_key="net")
    refusal(path, "holds no dictionary of tensors", "'net'", "checkpoint_key=")
    refusal(path, "checkpoint_key:", "'model'", "'net', 'optimizer'", checkpoint_key="model")
    other = make(seed=5)
    both = {f"student.{k}": v for k, v in weights_of(vit).items()}
    both |= {f"teacher.{k}": v for k, v in weights_of(other).items()}
    path = save(both, tmp_path / "both.pth")
    assert_loads(path, vit, checkpoint_key="student")
    with pytest.warns(UserWarning, match="took 'teacher'"):
        assert_loads(path, other)
    for weights in ("random", "imagenet", "digits"):
        with pytest.raises(ValueError, match="checkpoint_key: is for a checkpoint given by its path"):
            ragged.load_deit("deit_tiny", weights, checkpoint_key="model")


def test_a_dictionary_that_holds_itself(tmp_path):
    content = {}
    content["model"] = content
    refusal(save(content, tmp_path / "round.pth"), "holds no dictionary of tensors")


# ---- what stands beside the tensors ----

BESIDE = {
    "namespace": argparse.Namespace(lr=0.1, model="deit", nested=argparse.Namespace(x=[1, None])),
    "simple namespace": types.SimpleNamespace(lr=0.1),
    "path": pathlib.Path("/data/imagenet"),
    "pure path": pathlib.PurePosixPath("a/b"),
    "windows path": pathlib.PureWindowsPath("C:/data"),
    "numpy float": np.float64(0.8), "numpy int": np.int64(3), "numpy bool": np.bool_(True), "numpy half": np.float16(1),
    "numpy dtype": np.dtype("float32"), "numpy array": np.arange(6).reshape(2, 3), "numpy text": np.array(["a"]),
    "ordered": collections.OrderedDict(a=1), "default": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"), "set": {1, 2}, "complex": 1j, "bytes": b"abc", "none": None,
    "date": datetime.datetime(2024, 1, 2), "version": torch.__version__, "dtype": torch.float16,
    "size": torch.Size([2]),
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
def test_harmless_objects_beside_the_tensors(what, tmp_path):
    path = save({"model": weights_of(small_vit()), "args": BESIDE[what]}, tmp_path / "beside.pth")
    assert_loads(path, small_vit())
    flat = weights_of(small_vit()) | {"args": BESIDE[what]}
    assert_loads(save(flat, tmp_path / "flat.pth"), small_vit())


def test_numpy_s_older_names(tmp_path):
    path = save({"model": weights_of(small_vit()), "best": np.float64(0.8)}, tmp_path / "new.pth")
    import zipfile

    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "old.pth", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            new.writestr(name, content)
    assert_loads(tmp_path / "old.pth", small_vit())


def test_the_list_of_what_is_harmless_is_as_the_caller_left_it(tmp_path):
    path = save({"model": weights_of(small_vit()), "args": BESIDE["namespace"]}, tmp_path / "args.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        load_state(path)
        assert set(torch.serialization.get_safe_globals()) == before


class Stranger:
    pass


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("make", [
    lambda mark: Stranger(), lambda mark: small_vit(), lambda mark: Runs(open, str(mark), "w"),
    lambda mark: Runs(pathlib.Path.touch, mark), lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    lambda mark: Runs(getattr, argparse.Namespace(), "__class__"), lambda mark: Runs(np.save, str(mark), 1),
    lambda mark: collections.defaultdict(Stranger),
], ids=["stranger", "model", "open", "touch", "eval", "getattr", "numpy", "factory"])  # fmt: skip
def test_other_objects_are_refused_by_name(make, tmp_path):
    mark = tmp_path / "mark"
    path = save({"model": weights_of(small_vit()), "args": make(mark)}, tmp_path / "odd.pth")
    mark.unlink(missing_ok=True)
    message = refusal(path, "read safely", "save model.state_dict() alone")
    assert re.search(r"holds '[\w.]+'", message)
    assert not mark.exists()


def test_messages_hold_nothing_of_the_file_that_a_terminal_obeys(tmp_path):
    evil = "\x1b[2J\n\r\x07\u202e" + "x" * 500
    state = weights_of(small_vit())
    length = []
    for i, content in enumerate([
        state | {evil: torch.ones(1)}, state | {f"a.{evil}": 3}, {evil: {"a": 1}}, state | {evil: torch.tensor(1)},
        {"model": state, "args": Stranger()}, {f"backbone.{k}": v for k, v in state.items()} | {evil: torch.ones(1)},
    ]):  # fmt: skip
        length.append(len(refusal(save(content, tmp_path / f"{i}.pth"))))
    hostile = b"\x80\x02c\x1b[2J\x1b[31m\nevil\x07\n."
    (tmp_path / "hostile.pth").write_bytes(hostile)
    (tmp_path / "hostile.safetensors").write_bytes((30).to_bytes(8, "little") + b'{"\x1b[2J\n": {"dtype": "\x1b[31m"}}')
    for suffix in ("pth", "safetensors"):
        length.append(len(refusal(tmp_path / f"hostile.{suffix}")))
    assert max(length) < 700
    for key in ("model", "nothing"):
        with pytest.raises(ValueError) as caught:
            load_state(save({evil: {"a": 1}}, tmp_path / "k.pth"), key)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(protocol, tmp_path):
    path = tmp_path / "bare.pkl"
    path.write_bytes(pickle.dumps(Runs(print, "weights_only"), protocol=protocol))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal(path)


# ---- weights that are none ----


def overlapping(shape):
    return torch.ones(1).expand(shape)


NO_WEIGHTS = {
    "int": torch.ones(DIM, dtype=torch.int64), "uint8": torch.ones(DIM, dtype=torch.uint8),
    "bool": torch.ones(DIM, dtype=torch.bool), "complex": torch.ones(DIM, dtype=torch.complex64),
    "float8": torch.ones(DIM).to(torch.float8_e4m3fn), "nan": torch.full((DIM,), torch.nan),
    "inf": torch.full((DIM,), -torch.inf), "too large": torch.full((DIM,), 1e300, dtype=torch.float64),
    "giant": overlapping((1 << 20, 1 << 20)), "the right shape of one": overlapping((DIM,)),
    "meta": torch.ones(DIM, device="meta"), "sparse": torch.ones(DIM).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.ones(DIM), 0.1, 0, torch.qint8),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_weights_that_are_none(what, tmp_path):
    for i, key in enumerate(["norm.weight", "pos_embed", "patch_embed.proj.weight"]):
        path = save(weights_of(small_vit(), **{key: NO_WEIGHTS[what]}), tmp_path / f"{i}.pth")
        refusal(path, repr(key))
        refusal(path, repr(key), read=load_state)


def test_weights_that_are_no_tensors(tmp_path):
    for value in (3, 0.5, [1.0], "x", np.ones(DIM)):
        refusal(save(weights_of(small_vit(), **{"norm.weight": value}), tmp_path / "number.pth"),
                "'norm.weight'", type(value).__name__)  # fmt: skip


@pytest.mark.parametrize("key", ["blocks.1.mlp.fc1.weight", "patch_embed.proj.weight", "head.weight", "pos_embed"])
def test_transposed_weights(key, tmp_path):
    turned = weights_of(small_vit())
    turned[key] = turned[key].transpose(-1, -2) if key == "pos_embed" else turned[key].transpose(0, 1)
    path = save(turned, tmp_path / "turned.pth")
    message = refusal(path, repr(key), num_classes=10)
    assert str(tuple(turned[key].shape)) in message


def test_half_precision_is_taken(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = save({k: v.to(dtype) for k, v in weights_of(small_vit()).items()}, tmp_path / "half.pth")
        vit = load(path)
        assert {p.dtype for p in vit.parameters()} == {torch.float32}
        assert torch.equal(vit.norm.weight, small_vit().norm.weight.to(dtype).float())


# ---- layouts ----


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save(weights_of(small_vit()), tmp_path / "small.pth")
    assert_loads("~/small.pth", small_vit())
    assert load_state("~/small.pth").keys() == small_vit().state_dict().keys()
    with pytest.raises(FileNotFoundError):
        load("~nobody_of_this_name/small.pth")


def test_deit_and_evit(tmp_path):
    """Official files: {"model": ...}, EViT's with the arguments of the run."""
    arguments = argparse.Namespace(keep_rate=0.7, output_dir=pathlib.Path("out"))
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    content = {"model": weights_of(small_vit()), "optimizer": optimizer, "epoch": 299, "args": arguments}
    assert_loads(save(content, tmp_path / "deit.pth"), small_vit())


def test_distilled(tmp_path):
    vit, name = small_vit("distilled"), "deit_tiny_distilled_patch16_224"
    path = save({"model": weights_of(vit)}, tmp_path / "distilled.pth")
    assert_loads(path, vit, name)
    refusal(path, "deit_tiny_distilled_patch16_224")
    refusal(save(weights_of(small_vit()), tmp_path / "plain.pth"), "lacks 'dist_token'", name=name)
    headless = load(path, name, num_classes=0)
    with torch.no_grad():
        want = vit.forward_features(pictures())[:, :2].mean(1)
        torch.testing.assert_close(headless(pictures()), want, rtol=1e-6, atol=1e-6)


def test_deit_3(tmp_path):
    vit = small_vit("layerscale")
    old = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", k): v for k, v in weights_of(vit).items()}
    assert any("gamma_1" in key for key in old)
    assert_loads(save({"model": old}, tmp_path / "deit3.pth"), vit, init_values=1e-6)
    for state, name in ((old, "old"), (weights_of(vit), "new")):
        refusal(save(state, tmp_path / f"{name}.pth"), "LayerScale", "init_values")


def test_dino(tmp_path):
    """The backbone alone, and the file of a training run: student and teacher with their projectors."""
    vit, student = make(num_classes=0), make(num_classes=0, seed=7)
    projector = {"head.mlp.0.weight": torch.ones(8, DIM), "head.last_layer.weight_g": torch.ones(16, 1)}
    assert_loads(save(weights_of(vit), tmp_path / "backbone.pth"), vit)
    teacher = {f"backbone.{k}": v for k, v in weights_of(vit).items()} | projector
    of_student = {f"module.backbone.{k}": v for k, v in weights_of(student).items()}
    of_student |= {f"module.{k}": v for k, v in projector.items()}
    content = {"student": of_student, "teacher": teacher, "epoch": 100, "args": argparse.Namespace(arch="vit_small"),
               "dino_loss": {"center": torch.ones(1, 16)}, "optimizer": {}}  # fmt: skip
    path = save(content, tmp_path / "run.pth")
    assert_loads(path, vit)
    assert_loads(path, student, checkpoint_key="student")
    refusal(path, "no classifier", "num_classes=0", num_classes=10)


def test_dino_v2(tmp_path):
    vit = make(num_classes=0, init_values=1e-5)
    official = weights_of(vit, mask_token=torch.zeros(1, DIM))
    assert_loads(save(official, tmp_path / "v2.pth"), vit, init_values=1e-5)
    trained = {f"backbone.{k}": v for k, v in official.items()} | {"dino_head.last.weight": torch.ones(2, 2)}
    assert_loads(save({"teacher": trained}, tmp_path / "run.pth"), vit, init_values=1e-5)


@pytest.mark.parametrize("mask", [True, False])
def test_dino_v2_with_registers(mask, tmp_path):
    """There the positions hold one for CLS, and timm adds it to CLS once and for all."""
    extra = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    vit = make(num_classes=0, **extra)
    state = weights_of(vit)
    positions = torch.cat((0.25 * torch.ones(1, 1, DIM), state["pos_embed"]), 1)
    cls = (state["cls_token"] - 0.25).clone()
    vit.cls_token.data = cls + 0.25
    official = {k: v for k, v in state.items() if k != "reg_token"}
    official |= {"register_tokens": state["reg_token"], "pos_embed": positions, "cls_token": cls}
    if mask:
        official["mask_token"] = torch.zeros(1, DIM)
    path = save(official, tmp_path / "reg.pth")
    assert_loads(path, vit, **extra)
    refusal(path, "register tokens", init_values=1e-5)
    refusal(save(weights_of(vit), tmp_path / "timm.pth"), "register tokens", init_values=1e-5)


def test_dino_v2_giant_s_mlp(tmp_path):
    extra = {"mlp_layer": SwiGLUPacked, "mlp_ratio": 4.0, "init_values": 1e-5}
    vit = make(num_classes=0, **extra)
    assert isinstance(vit.blocks[0].mlp, GluMlp)
    official = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in weights_of(vit).items()}
    for i, state in enumerate((official, official | {"mask_token": torch.zeros(1, DIM)})):
        assert_loads(save(state, tmp_path / f"{i}.pth"), vit, **extra)


def test_mae(tmp_path):
    """The encoder alone and with its decoder; a fine-tuned one pools the mean and is refused."""
    vit = make(num_classes=0)
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 50, 32),
               "decoder_blocks.0.norm1.weight": torch.ones(32), "decoder_pred.weight": torch.ones(8, 32)}  # fmt: skip
    for i, state in enumerate((weights_of(vit), weights_of(vit, **decoder))):
        assert_loads(save({"model": state}, tmp_path / f"{i}.pth"), vit)
    mean = make(global_pool="avg")
    message = refusal(save({"model": weights_of(mean)}, tmp_path / "tuned.pth"), "fc_norm", "mean of all patches")
    assert "norm.weight" in message


@pytest.mark.parametrize("name", ["plain", "distilled", "registers", "layerscale", "qk_norm"])
def test_timm_s_own_files(name, tmp_path):
    extra = {"registers": {"reg_tokens": 4}, "layerscale": {"init_values": 0.5}, "qk_norm": {"qk_norm": True}}
    model = "deit_tiny_distilled_patch16_224" if name == "distilled" else "deit_tiny"
    path = save({"state_dict": weights_of(small_vit(name)), "arch": "vit", "metric": 80.1}, tmp_path / "timm.pth.tar")
    assert_loads(path, small_vit(name), model, **extra.get(name, {}))
    if name in ("registers", "layerscale", "qk_norm"):
        refusal(path, name="deit_tiny")


def test_files_without_their_head(tmp_path):
    vit = small_vit()
    with_head = save(weights_of(vit), tmp_path / "head.pth")
    headless = save({k: v for k, v in weights_of(vit).items() if "head" not in k}, tmp_path / "none.pth")
    features = load(headless)
    assert features.num_classes == 0
    with torch.no_grad():
        want = vit.forward_head(vit.forward_features(pictures()), pre_logits=True)
        assert torch.equal(features(pictures()), want)
        assert torch.equal(load(with_head, num_classes=0)(pictures()), want)
    refusal(headless, "head.weight", "num_classes=0", num_classes=10)
    refusal(with_head, "head.weight", "(10, 48)", "(7, 48)", num_classes=7)
    refusal(save({k: v for k, v in weights_of(vit).items() if k != "head.weight"}, tmp_path / "half.pth"), "head.bias")


def test_models_under_something_else(tmp_path):
    """What lies beside a backbone may do anything to its result."""
    state = {f"backbone.{k}": v for k, v in weights_of(small_vit()).items()}
    for key in ("fc.weight", "head.weight", "neck.0.bias"):
        refusal(save(state | {key: torch.ones(3)}, tmp_path / "more.pth"), "'backbone'", repr(key))


def test_other_patches(tmp_path):
    """timm would resample them without a word."""
    path = save(weights_of(make(patch_size=8, img_size=SIDE // 2)), tmp_path / "eight.pth")
    refusal(path, "(8, 8)", "(16, 16)", "patch size")
    layered = weights_of(small_vit(), **{"pre_logits.fc.weight": torch.ones(DIM, DIM)})
    refusal(save(layered, tmp_path / "pre.pth"), "pre_logits")


# ---- our own ----


@pytest.mark.parametrize("compiled", [False, True])
def test_our_own_model_s_state(compiled, tmp_path):
    vit, stages = small_vit(), save(predictor_weights(), tmp_path / "stages.pth")

    def pruner(path):
        return ragged.PRUNERS["dynamicvit"](keep=0.5, at=(1, 2, 4), predictors=path)

    model = ragged.RaggedViT(vit, pruner(stages))
    state = torch.compile(model).state_dict() if compiled else model.state_dict()
    path = save({"model": state}, tmp_path / "ours.pth")
    assert_loads(path, vit)
    again = ragged.RaggedViT(load(path), pruner(path))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(pictures()), model(pictures()))
    for name in ("evit", "ats"):
        other = ragged.RaggedViT(vit, ragged.PRUNERS[name](at=(1,)))
        assert_loads(save(other.state_dict(), tmp_path / f"{name}.pth"), vit)
    flat = weights_of(vit, **predictor_weights())  # DynamicViT's own layout
    assert_loads(save({"model": flat}, tmp_path / "flat.pth"), vit)


def test_predictors_that_stand_there_twice(tmp_path):
    state = predictor_weights() | {f"pruner.{k}": v for k, v in predictor_weights().items()}
    made = ragged.PRUNERS["dynamicvit"](at=(1,), predictors=save(state, tmp_path / "twice.pth"))
    with pytest.raises(ValueError, match=r"predictors: .*twice\.pth holds predictors twice"):
        made.bind(DIM, DEPTH)


def test_predictors_that_are_refused_once_are_refused_again(tmp_path):
    made = ragged.PRUNERS["dynamicvit"](at=(1,), predictors=save(weights_of(small_vit()), tmp_path / "none.pth"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"predictors: .*none\.pth lacks"):
            made.bind(DIM, DEPTH)
    assert len(made.score_predictor) == 0


# ---- the steps by themselves ----


def test_the_steps_by_themselves():
    here, x = pathlib.Path("here.pth"), torch.ones(2)
    assert choose_state({"model": {"a": x}, "epoch": 1}, here).keys() == {"a"}
    assert clean_keys({"module.backbone.a": x, "module.backbone.b": x}, here).keys() == {"a", "b"}
    assert clean_keys({"backbone.a": x, "fc.b": x}, here).keys() == {"backbone.a", "fc.b"}
    check_weights({"a": x, "empty": torch.empty(0), "view": torch.ones(4, 4)[:, 1]}, here)
    for content in (None, [x], x, {}, {"a": 1}, {1: x}, {"model": [x]}):
        with pytest.raises(ValueError, match=r"here\.pth holds no dictionary of tensors"):
            choose_state(content, here)
