"""Getting a Vision Transformer: `load_deit`, and the reading of weights from files.

Files are safetensors, or read by `torch.load(weights_only=True)`: nothing in a file is ever executed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .checks import check_int
from .data import checkpoint_path, sidecar, verify_sha256
from .support import check_supported

DEITS = ("deit_tiny", "deit_small", "deit_base")
WEIGHTS = ("digits", "imagenet", "random")


class NotAViT(ValueError):
    """The model asked for is no plain Vision Transformer."""


def load_deit(
    name: str = "deit_tiny", weights: str | Path = "random", img_size: int = 224, *, num_classes: int | None = None,
    sha256: str | None = None, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A timm Vision Transformer in eval mode, float32, on the CPU.

    name: deit_tiny, deit_small, deit_base, or any plain timm ViT name.  weights: "digits" (trained here on
    `digit_scenes`, ten classes, deit_tiny only), "imagenet" (timm's download), "random" (from `seed`), or a path to
    safetensors or a torch checkpoint with timm's names.  num_classes: default 1000, or what the checkpoint's head has.
    img_size: pixels a side (position embeddings are resized).  sha256: expected hash of a checkpoint given by path.
    seed: of random weights.
    Raises ValueError for unknown names, wrong keys or a wrong hash, FileNotFoundError, and ConnectionError if a
    download is impossible.
    """
    if not isinstance(weights, (str, Path)):
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)} or a path, got {weights!r}")
    if sha256 is not None and str(weights) in WEIGHTS:
        raise ValueError(f"sha256: is for a checkpoint given by its path, got weights={weights!r}")
    if num_classes is not None:
        check_int("num_classes", num_classes, 0)
    check_int("seed", seed, 0)
    timm_name = full_name(name, img_size)
    if weights == "imagenet":
        return check_supported(_download(timm_name, img_size, num_classes))
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU one only: GPUs keep theirs
            return check_supported(_create(timm_name, img_size, 1000 if num_classes is None else num_classes))
    path = checkpoint_path(f"{name}_digits") if weights == "digits" else Path(weights)
    if not path.is_file():
        known = f"weights: expected one of {', '.join(WEIGHTS)} or an existing file, got {str(weights)!r}"
        raise (FileNotFoundError if path.suffix or len(path.parts) > 1 else ValueError)(known)
    if sha256 is not None:
        verify_sha256(path, sha256)
    state = load_state(path)
    head = state.get("head.weight")
    found = head.shape[0] if head is not None and head.dim() else 1000
    classes = found if num_classes is None else num_classes
    return check_supported(_fill(_create(timm_name, img_size, classes), state, path))


def full_name(name: str, img_size: int) -> str:
    """What timm calls the model `name` at img_size pixels a side. Raises ValueError for a name that it does not
    have."""
    import timm

    if not isinstance(img_size, int) or img_size < 16:
        raise ValueError(f"img_size: expected pixels as an int >= 16, got {img_size!r}")
    if name in DEITS:
        sized = f"{name}_patch16_{img_size}"
        return sized if timm.is_model(sized) else f"{name}_patch16_224"
    if not timm.is_model(str(name)):
        raise ValueError(f"name: expected one of {', '.join(DEITS)} or a timm model name, got {name!r}")
    return name


def _create(timm_name: str, img_size: int, num_classes: int, pretrained: bool = False) -> nn.Module:
    import timm

    try:
        return timm.create_model(timm_name, pretrained=pretrained, img_size=img_size, num_classes=num_classes).eval()
    except TypeError as error:  # models that are no ViT take no img_size
        raise NotAViT(f"name: {timm_name} is not a plain Vision Transformer ({error})") from error


def _download(timm_name: str, img_size: int, num_classes: int | None) -> nn.Module:
    try:
        return _create(timm_name, img_size, 1000 if num_classes is None else num_classes, pretrained=True)
    except NotAViT:
        raise
    except Exception as error:  # the hub client has many ways to say that there is no network
        why = str(error).partition("\n")[0]
        raise ConnectionError(
            f"weights='imagenet': timm could not load {timm_name} ({type(error).__name__}: {why}). Without a network "
            "use weights='random', weights='digits', or the path of a checkpoint file."
        ) from error


def _fill(vit: nn.Module, state: dict, path: Path) -> nn.Module:
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = {k: v for k, v in state.items() if not k.startswith("score_predictor.")}
    try:  # timm's own converter: older names, and position embeddings of another image size
        state = checkpoint_filter_fn(dict(state), vit)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # it takes shapes for granted
        why = str(error).partition("\n")[0]
        raise ValueError(f"weights: {path} does not fit the model: {why}") from error
    wanted = vit.state_dict()
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or unknown or wrong:
        first = (missing + unknown + wrong)[0]
        raise ValueError(
            f"weights: {path} does not fit the model: {len(missing)} keys missing, {len(unknown)} unknown, "
            f"{len(wrong)} of another shape, first {first!r}"
        )
    vit.load_state_dict(state)
    return vit


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint `path` by name. A dict stored under "model" or "state_dict" is unwrapped.

    A file with a .sha256 beside it is held against that before it is read.
    Raises FileNotFoundError, or ValueError for a damaged file and for one that is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if sidecar(path).is_file():
        verify_sha256(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for files that are not its own
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {why}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return state
