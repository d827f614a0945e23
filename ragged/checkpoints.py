"""Reading weights from files: safetensors, or `torch.load(weights_only=True)`. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported where a file is read: data.py needs only the hashes
    from torch import Tensor


def verify_sha256(path: str | Path, expected: str | None = None) -> None:
    """Check a file against a SHA-256 (64 hex digits), by default the first word of <path>.sha256.

    ValueError if they differ, FileNotFoundError without a file to read the expected one from.
    """
    path = Path(path)
    if expected is None:
        if not sidecar(path).is_file():
            raise FileNotFoundError(f"no checksum for {path.name}: expected it in {sidecar(path)}")
        expected = (sidecar(path).read_text(encoding="utf-8").split() or [""])[0]
    if not isinstance(expected, str) or not re.fullmatch("[0-9a-fA-F]{64}", expected):
        raise ValueError(f"expected: a SHA-256 is 64 hex digits, got {expected!r}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected.lower():
        raise ValueError(f"{path} is damaged or another file: SHA-256 is {found}, expected {expected.lower()}")


def sidecar(path: Path) -> Path:
    """Where the SHA-256 of the file `path` stands: beside it, with .sha256 after its whole name."""
    return path.with_name(path.name + ".sha256")


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint `path` by name. A dict stored under "model" or "state_dict" is unwrapped.

    A file with a .sha256 beside it is held against that before it is read.
    Raises FileNotFoundError, or ValueError for a damaged file and for one that is not a checkpoint.
    """
    import torch

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
