"""Reading weights from files: safetensors, or `torch.load(weights_only=True)`. Nothing in a file is ever executed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. A dict stored under "model" or "state_dict" is unwrapped.

    Raises FileNotFoundError, or ValueError for a file that is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
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
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return state
