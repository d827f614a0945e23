"""Trained networks by the names that rows have for them: a model's name and how its weights came about."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch
from torch import nn

from .. import data
from ..loading import BUNDLED, load_deit

# What the suites with bundled weights run, side by side. The first was taught to be prunable, the second was not.
NETWORKS = ("deit_tiny_digits", "deit_tiny_digits_labels")


def weights_of(name: str, other: str = "random") -> tuple[str, str]:
    """The model and the weights, as `load_deit` takes them, of `name`: deit_tiny_digits is ("deit_tiny", "digits").
    other: the weights of names without such an ending."""
    for weights, ending in sorted(BUNDLED.items(), key=lambda item: -len(item[1])):
        if name.endswith(ending):
            return name.removesuffix(ending), weights
    return name, other


@functools.lru_cache(6)
def network(name: str, img_size: int, dtype: torch.dtype, device: str, other: str = "random") -> nn.Module:
    """A network kept between cases. name, other: as for `weights_of`."""
    if dtype == torch.float32:
        model, weights = weights_of(name, other)
        return load_deit(model, weights=weights, img_size=img_size).to(device)
    return copy.deepcopy(network(name, img_size, torch.float32, device, other)).to(dtype)


def predictors_of(name: str) -> Path | None:
    """The file of DynamicViT predictors that were trained for the bundled network `name`; None for other networks, and
    for those that have none: their rows say dynamicvit:untrained."""
    own = f"{name}_dynamicvit"
    there = name in NETWORKS and (data.data_dir() / "checkpoints" / f"{own}.safetensors").is_file()
    return data.checkpoint_path(own) if there else None
