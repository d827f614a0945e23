"""Getting a Vision Transformer: `load_deit`. How a file is read stands in `ragged/data/checkpoints.py`."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn

from .checks import check_int
from .data import checkpoint_path, expand, load_state, verify_sha256
from .data.checkpoints import ROOTS, plain, shown
from .support import check_supported

DEITS = ("deit_tiny", "deit_small", "deit_base")
BUNDLED = {"digits": "_digits", "digits-labels": "_digits_labels"}  # and what follows a model's name in their files
WEIGHTS = (*BUNDLED, "imagenet", "random")
# Parts that are no part of the Vision Transformer: other networks' heads, decoders, scorers, counters.
OTHER_PARTS = ("score_predictor.", "pruner.", "head.mlp.", "head.last_layer.", "dino_head.", "ibot_head.", "decoder_")
HEADS = {"head.weight": 0, "visual.head.proj.weight": 0, "visual.proj": 1}  # key -> which dimension counts the classes
# What keys tell of the model that wrote them, where the one at hand does not have them.
DISTILLED = "a distilled model wrote it: use its name, such as 'deit_tiny_distilled_patch16_224'"
HINTS = {
    "dist_token": DISTILLED,
    "head_dist.": DISTILLED,
    "reg_token": "its model has register tokens: use its name, such as 'vit_small_patch14_reg4_dinov2'",
    "fc_norm.": "it classifies the mean of all patches, where every dropped token would count",
    ".ls1.": "its model has LayerScale: use its name, or pass init_values=1e-5",
}
HEADLESS = "it has no classifier: leave num_classes out, or pass num_classes=0, for features"


class NotAViT(ValueError):
    """The model asked for is no plain Vision Transformer."""


# ---- models ----


def load_deit(
    name: str = "deit_tiny", weights: str | Path = "random", img_size: int | tuple[int, int] = 224, *,
    num_classes: int | None = None, sha256: str | None = None, seed: int = 0, checkpoint_key: str | None = None,
    **options: object,
) -> nn.Module:  # fmt: skip
    """A timm Vision Transformer in eval mode, float32, on the CPU.

    name: deit_tiny, deit_small, deit_base, or a plain ViT by any name that timm accepts: "deit_small_patch16_224" with
    or without a tag, "timm/model", "hf-hub:owner/model", "local-dir:folder".  weights: "digits" (trained here on
    `digit_scenes`, ten classes, deit_tiny only: taught to be prunable), "digits-labels" (the same, taught with nothing
    but labels), "imagenet" (timm's download for the name and tag, or what the hub or
    the folder holds), "random" (from `seed`), or a path to safetensors or a torch checkpoint with the names of timm,
    DeiT, DINO, DINOv2 or MAE (see `load_state`).  num_classes: default what the weights' head has (0, no classifier,
    where there is no head), and 1000 for random ones; 0 leaves the head of a file out.  img_size: pixels a side, or
    (height, width); position embeddings are resized.  sha256: expected hash of a checkpoint given by path.  seed: of
    random weights; the caller's random state is left as it is.  checkpoint_key: which part of a checkpoint given by
    path, such as "model" or "teacher".  options: further arguments of the timm model, such as dynamic_img_size=True.
    Raises ValueError for unknown names and options, wrong keys or a wrong hash, FileNotFoundError, and ConnectionError
    if a download is impossible.
    """
    if not isinstance(weights, (str, Path)):
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)} or a path, got {weights!r}")
    for given, what in ((sha256, "sha256"), (checkpoint_key, "checkpoint_key")):
        if given is not None and str(weights) in WEIGHTS:
            raise ValueError(f"{what}: is for a checkpoint given by its path, got weights={weights!r}")
    if num_classes is not None:
        num_classes = check_int("num_classes", num_classes, 0)
    _check_options(options)
    img_size, timm_name = _check_size(img_size), full_name(name, img_size)
    if weights == "imagenet":
        with private_random(seed):
            return check_supported(_create(timm_name, img_size, num_classes, options, pretrained=True))
    if weights == "random":
        known = num_classes if num_classes is not None or ":" in timm_name else 1000
        with private_random(seed):
            return check_supported(_create(timm_name, img_size, known, options))
    path = checkpoint_path(f"{name}{BUNDLED[weights]}") if weights in BUNDLED else expand(weights)
    if not path.is_file():
        known = f"weights: expected one of {', '.join(WEIGHTS)} or an existing file, got {str(weights)!r}"
        raise (FileNotFoundError if path.suffix or len(path.parts) > 1 else ValueError)(known)
    if sha256 is not None:
        verify_sha256(path, sha256)
    state = vit_part(load_state(path, checkpoint_key), path)
    with private_random(seed):
        vit = _create(timm_name, img_size, _classes(state, path) if num_classes is None else num_classes, options)
    return _fill(check_supported(vit), state, path)


def full_name(name: str, img_size: int | tuple[int, int]) -> str:
    """What timm calls the model `name` at img_size pixels a side. Raises ValueError for a name that it does not have,
    FileNotFoundError for a folder without a model."""
    import timm

    img_size = _check_size(img_size)
    if name in DEITS:
        sized = f"{name}_patch16_{img_size}"
        return sized if timm.is_model(sized) else f"{name}_patch16_224"
    source, colon, rest = str(name).partition(":")
    source = source.lower().replace("_", "-")
    if not colon and source.startswith("timm/"):
        return f"hf-hub:{name}"
    if colon and rest and source == "hf-hub":
        return f"hf-hub:{rest}"
    if colon and rest and source == "local-dir":
        folder = expand(rest)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"name: expected a folder with timm's config.json and weights, got {str(folder)!r}")
        return f"local-dir:{folder}"
    if not timm.is_model(str(name)):
        other = f"; from the hub it is 'hf-hub:{name}'" if "/" in str(name) and not colon else ""
        raise ValueError(f"name: expected one of {', '.join(DEITS)} or a timm model name, got {name!r}{other}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # the model is there, its tag is not
        tags = [full.partition(".")[2] for full in timm.list_pretrained(name.partition(".")[0] + ".*")]
        raise ValueError(f"name: timm has no tag {name.partition('.')[2]!r} of this model, only {tags}") from None
    return name


def _check_size(size: object) -> int | tuple[int, int]:
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or any(not isinstance(n, Integral) or isinstance(n, bool) or n < 16 for n in sides):
        raise ValueError(f"img_size: expected pixels as an int >= 16, or (height, width), got {size!r}")
    return int(sides[0]) if sides[0] == sides[1] else (int(sides[0]), int(sides[1]))


def _check_options(options: dict) -> None:
    better = dict.fromkeys(("pretrained", "checkpoint_path"), "use weights=")
    better |= dict.fromkeys(("device", "dtype"), "the model is made in float32 on the CPU; call .to() on it")
    for option in sorted(better.keys() & options.keys()):
        raise ValueError(f"{option}: is no option of load_deit; {better[option]}")


def _create(timm_name: str, img_size: int | tuple[int, int], num_classes: int | None, options: dict,
            pretrained: bool = False) -> nn.Module:  # fmt: skip
    import timm

    source, _, rest = timm_name.partition(":")
    if pretrained and not rest and not options.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
        found = timm.models.get_pretrained_cfg(timm_name)
        if found is None or not found.has_weights:
            raise ValueError(f"weights='imagenet': timm has no trained weights of {timm_name}; use weights='random'")
    sizes = {"img_size": img_size, "num_classes": num_classes}
    try:
        vit = timm.create_model(timm_name, pretrained=pretrained, **sizes, **options)
    except Exception as error:  # the hub client has many ways to say that there is no network, timm to refuse a value
        why = f"{type(error).__name__}: {plain(str(error))}"
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if isinstance(error, TypeError) and unknown and unknown[1] in options:
            raise ValueError(f"{unknown[1]}: is no option of load_deit or of timm's {timm_name}") from error
        if isinstance(error, TypeError) and unknown:  # models that are no ViT take no img_size
            raise NotAViT(f"name: {timm_name} is not a plain Vision Transformer ({why})") from error
        if source == "hf-hub" or (pretrained and not rest):
            what = "name" if rest else "weights='imagenet'"
            raise ConnectionError(
                f"{what}: timm could not load {timm_name} ({why}). Without a network use weights='random', "
                f"weights='digits', or the path of a checkpoint file{', with a name of timm' if rest else ''}."
            ) from error
        raise ValueError(f"name: timm cannot make {timm_name} of these arguments ({why})") from error
    if getattr(getattr(vit, "patch_embed", None), "num_patches", 1) == 0:
        raise ValueError(f"img_size: no patch of {timm_name} fits into {img_size} pixels")
    return vit.eval()


_RANDOM = threading.RLock()


@contextlib.contextmanager
def private_random(seed: int) -> Iterator[None]:
    """Inside, random numbers come from `seed` and new tensors are float32 on the CPU. Afterwards the caller's random
    states, the GPU's included, and defaults are what they were, also when something was raised. One thread at a time:
    the numbers of another would come in between. Raises ValueError for a seed that is none."""
    if check_int("seed", seed, 0) >= 2**64:
        raise ValueError(f"seed: expected an integer below 2**64, got {seed}")
    with _RANDOM, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would reach the GPUs as well
            yield
        finally:
            torch.set_default_dtype(default)


# ---- weights into a model ----


def vit_part(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What of the checkpoint `state` belongs to the Vision Transformer, under timm's names; path: for messages. Raises
    ValueError where parts lie beside it of which it is unclear whether they belong to it."""
    while True:
        root = next((root for root in ROOTS if any(key.startswith(root + ".") for key in state)), None)
        if root is None:
            break
        inside = {k.removeprefix(root + "."): v for k, v in state.items() if k.startswith(root + ".")}
        beside = [k for k in state if not k.startswith((root + ".", "student.", *OTHER_PARTS))]
        if beside:
            raise ValueError(
                f"weights: {path} holds a model under {root!r}, and beside it {shown(beside[0])}: what that does to "
                f"the result is not known here; pass a file of what is under {root!r} alone"
            )
        if root == "teacher" and any(k.startswith("student.") for k in state):
            message = f"{path} holds weights under 'teacher' and 'student': took 'teacher'; checkpoint_key= chooses"
            warnings.warn(message, stacklevel=3)
        state = inside
    state = {key: value for key, value in state.items() if not key.startswith(OTHER_PARTS)}
    state.pop("mask_token", None)  # of masked pretraining; nothing else uses it
    if "register_tokens" in state or any(".mlp.w12." in key for key in state):
        state["mask_token"] = torch.zeros(1)  # by it timm knows the names of DINOv2, and drops it
    return state


def _classes(state: dict[str, Tensor], path: Path) -> int:
    """How many classes the head has, 0 without one."""
    for key, dim in HEADS.items():
        if key in state and state[key].dim() != 2:
            shape = tuple(state[key].shape)
            raise ValueError(f"weights: {path} does not fit the model: {key!r} is {shape}, expected two dimensions")
        if key in state:
            return state[key].shape[dim]
    return 0


def _fill(vit: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    from timm.models.vision_transformer import checkpoint_filter_fn

    _check_geometry(vit, state, path)
    wanted = vit.state_dict()
    try:  # timm's own converter: older names, and position embeddings of another image size
        state = checkpoint_filter_fn(dict(state), vit, adapt_layer_scale=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # shapes for granted
        why = f"timm cannot convert it ({type(error).__name__}: {plain(str(error))})"
        raise ValueError(f"weights: {path} does not fit the model: {why}") from error
    if vit.num_classes == 0 and "head.weight" in state:
        state = {k: v for k, v in state.items() if not k.startswith(("head.", "head_dist.")) or k in wanted}
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or unknown or wrong:
        first = (unknown + missing + wrong)[0]
        reason = next((f"; {hint}" for part, hint in HINTS.items() if part in first and first in unknown), "")
        if first in missing and first.startswith("head."):
            reason = f"; {HEADLESS}"
        if first in unknown and missing:
            reason = f" (and {missing[0]!r} is missing){reason}"
        if first in wrong:
            reason = f": {tuple(state[first].shape)} in the file, {tuple(wanted[first].shape)} in the model"
        raise ValueError(
            f"weights: {path} does not fit the model: {len(missing)} keys missing, {len(unknown)} unknown, "
            f"{len(wrong)} of another shape, first {shown(first)}{reason}"
        )
    vit.load_state_dict(state)
    return vit


def _check_geometry(vit: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """What timm's converter would resample, drop or stumble over without a word."""
    tokens = {{"register_tokens": "reg_token"}.get(key, key) for key in state if "token" in key}
    for name in ("cls_token", "dist_token", "reg_token"):  # they decide which positions belong to patches
        if (name in tokens) != (getattr(vit, name, None) is not None):
            reason = f"it has {name!r}; {HINTS.get(name)}" if name in tokens else f"it lacks {name!r}"
            raise ValueError(f"weights: {path} does not fit the model: {reason}")
    patch, kernel = state.get("patch_embed.proj.weight"), vit.patch_embed.proj.kernel_size
    if patch is not None and patch.dim() == 4 and tuple(patch.shape[2:]) != tuple(kernel):
        raise ValueError(
            f"weights: {path} does not fit the model: 'patch_embed.proj.weight' is for patches of "
            f"{tuple(patch.shape[2:])} pixels, the model has {tuple(kernel)}; use a name with that patch size"
        )
    shape = tuple(state["pos_embed"].shape) if "pos_embed" in state else None
    if shape is not None and (len(shape) != 3 or shape[0] != 1 or shape[2] != vit.embed_dim):
        wanted = f"(1, tokens, {vit.embed_dim})"
        raise ValueError(f"weights: {path} does not fit the model: 'pos_embed' is {shape}, expected {wanted}")
    if any("pre_logits" in key for key in state):
        raise ValueError(f"weights: {path} has a layer before its head (pre_logits), which timm's models have not")


def load_predictors(modules: nn.ModuleList, path: Path) -> None:
    """Fill `modules` from the file `path` in DynamicViT's format: keys `score_predictor.{stage}...`, alone, among a
    model's, or under `pruner.` as in the state of a `RaggedViT`. Raises ValueError for keys that are missing or of
    another shape."""
    prefix = "score_predictor."
    whole = load_state(path)
    found = {k.removeprefix("pruner."): v for k, v in whole.items()}
    if len(found) != len(whole):
        raise ValueError(f"predictors: {path} holds predictors twice, alone and under 'pruner.'; leave one of them out")
    state = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    wanted = modules.state_dict()
    missing = [k for k in wanted if k not in state]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or wrong:
        what = f"lacks {prefix}{missing[0]}" if missing else f"has {prefix}{wrong[0]} of another shape"
        raise ValueError(f"predictors: {path} {what} ({len(missing)} missing, {len(wrong)} of another shape)")
    modules.load_state_dict({k: state[k] for k in wanted})
