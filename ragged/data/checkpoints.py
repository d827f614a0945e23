"""Checkpoints: from a file to tensors by name, without executing anything that stands in it.

Four steps, each a function of its own: bytes become Python objects (`read_file`), of which one dictionary is chosen
(`choose_state`), its keys lose what wrappers added (`clean_keys`), and its tensors are looked at (`check_weights`).
`load_state` does all four."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import threading
import types
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..checks import FLOATS
from .files import expand, sidecar, verify_sha256

# Where training programs put the weights; averaged ones come first, as in timm and DINO.
CONTAINERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
# What wrappers add anywhere in a key: DataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Under what first word a Vision Transformer stands in a larger model; "vit" is `RaggedViT`'s.
ROOTS = ("teacher", "student", "backbone", "vit", "model")


def load_state(path: str | Path, checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """The tensors of the checkpoint `path` by name.

    Dictionaries under "state_dict_ema", "model_ema", "teacher", "state_dict" or "model" are unwrapped; where there are
    several, the first of these is taken, with a warning that says so, unless checkpoint_key names another. Keys lose
    the "module." and "_orig_mod." of wrappers, and a first word "backbone", "teacher", "vit" or "model" that all share.
    Numbers, text and argparse namespaces beside the tensors are left out. A file with a .sha256 beside it is held
    against that before it is read.
    Raises FileNotFoundError, or ValueError for a damaged file, one that is not a checkpoint, one that holds objects
    which only running code could make, and weights that are not finite floating-point numbers.
    """
    path = expand(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if sidecar(path).is_file():
        verify_sha256(path)
    state = clean_keys(choose_state(read_file(path), path, checkpoint_key), path)
    check_weights(state, path)
    return state


def read_file(path: Path) -> object:
    """What the file `path` holds: safetensors by that suffix, else what torch.save wrote, as far as it can be read
    without executing anything. Raises ValueError."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {plain(str(error))}") from error
    try:
        with _READING, torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises several kinds for files that are not its own
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = "torch.save did not write it, or it is damaged (safetensors files are known by their suffix)"
        if found:
            why = f"beside tensors it holds {shown(found[1])}; save model.state_dict() alone"
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {why}") from None


_READING = threading.RLock()  # the list of what is harmless is one for all threads


def _harmless() -> list[tuple[object, str]]:
    """Classes that hold data and do nothing when they are made, under the names that files have for them."""
    import numpy as np

    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    kinds = [argparse.Namespace, types.SimpleNamespace, torch.torch_version.TorchVersion, np.dtype, np.ndarray]
    kinds += [datetime.datetime, datetime.date, datetime.timedelta, int, float, bool, str, list, dict, tuple]
    kinds += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    named = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds]
    named.append((lambda *factory: {}, "collections.defaultdict"))  # what would make missing values is left out
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # NumPy 2's name, and NumPy 1's
        named += [(function, f"{module}.{name}") for name, function in makers.items()]
    for module in ("pathlib", "pathlib._local"):  # a path of another system can be read, not used
        named += [(pathlib.PurePosixPath, f"{module}.{kind}") for kind in ("PosixPath", "PurePosixPath")]
        named += [(pathlib.PureWindowsPath, f"{module}.{kind}") for kind in ("WindowsPath", "PureWindowsPath")]
    return named


def choose_state(content: object, path: Path, checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """The dictionary of tensors in `content`, by the rules of `load_state`; path: for messages. Raises ValueError where
    there is none, or none under checkpoint_key."""
    if checkpoint_key is not None:
        content = _under(content, path, checkpoint_key)
    for _ in range(4):  # a dictionary may hold itself
        found = [key for key in CONTAINERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not found:
            break
        if len(found) > 1:
            others = ", ".join(map(repr, found[1:]))
            message = f"{path} holds weights under {found[0]!r}, {others}: took {found[0]!r}; checkpoint_key= chooses"
            warnings.warn(message, stacklevel=4)
        content = content[found[0]]
    entries = content if isinstance(content, dict) else {}
    state = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if not state or not all(isinstance(key, str) for key in state):
        inside = [shown(key) for key, value in entries.items() if isinstance(value, dict)]
        there = f"; it holds dictionaries under {', '.join(inside[:8])}: checkpoint_key= chooses" if inside else ""
        raise ValueError(f"{path} holds no dictionary of tensors{there}")
    for key, value in entries.items():
        if isinstance(key, str) and "." in key and not isinstance(value, (Tensor, dict, type(None))):
            raise ValueError(f"{path}: expected a tensor under {shown(key)}, got {type(value).__name__}")
    return state


def _under(content: object, path: Path, key: str) -> dict:
    """What stands under `key`: in a dictionary of its own, or under names that begin with it."""
    entries = content if isinstance(content, dict) else {}
    if isinstance(entries.get(key), dict):
        return entries[key]
    named = [k for k in entries if isinstance(k, str) and k.startswith(f"{key}.")]
    inside = {k.removeprefix(f"{key}."): entries[k] for k in named}
    if not inside:
        there = ", ".join(shown(k) for k, v in entries.items() if isinstance(v, dict)) or "none"
        raise ValueError(f"checkpoint_key: {path} holds nothing under {key!r}; dictionaries in it: {there}")
    return inside


def clean_keys(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` without what wrappers add to its keys, as `load_state` says; path: for messages. Raises ValueError where
    two keys become one."""
    cleaned: dict[str, Tensor] = {}
    for key, value in state.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in cleaned:
            raise ValueError(f"{path} holds {shown(name)} twice, with and without what a wrapper adds to its name")
        if name != "n_averaged":  # how many models torch.optim.swa_utils has averaged
            cleaned[name] = value
    for root in ROOTS * 2:
        if cleaned and all(key.startswith(root + ".") for key in cleaned):
            cleaned = {key.removeprefix(root + "."): value for key, value in cleaned.items()}
    return cleaned


def check_weights(state: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError, naming the tensor, unless all of `state` are finite floating-point numbers, each with a place
    of its own in memory; path: for messages."""
    for key, value in state.items():
        what, shape = f"{path}: {shown(key)}", tuple(value.shape)
        if value.layout is not torch.strided or value.is_meta or value.is_nested or value.is_quantized:
            raise ValueError(f"{what} is no plain tensor of numbers (layout {value.layout}, device {value.device})")
        if value.dtype not in FLOATS:
            raise ValueError(f"{what}: expected weights in one of {', '.join(map(str, FLOATS))}, got {value.dtype}")
        there = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > there:
            raise ValueError(f"{what}: claims shape {shape}, for which the file holds {there} bytes")
        if not torch.isfinite(value.float() if value.dtype == torch.float64 else value).all():
            raise ValueError(f"{what}: holds values that are not finite in float32")


def plain(text: str, most: int = 200) -> str:
    """The first line of `text` as far as it is printable, at most `most` characters: what another program says about a
    file may repeat what stands in the file."""
    line = (text.splitlines() or [""])[0]
    return "".join(c if c.isprintable() else "?" for c in line)[:most]


def shown(name: object) -> str:
    """`name`, which a file holds, as it may stand in a message: quoted, escaped and short."""
    text = repr(name)
    return text if len(text) <= 80 else text[:76] + "...'"
