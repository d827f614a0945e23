"""The bundled photographs, and the normalisation that networks expect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import check_int
from . import files
from .tables import read_csv

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(size: int = 224) -> tuple[Tensor, list[dict]]:
    """The bundled photographs: float32 tensor (n, 3, size, size) in [0, 1], and a list of n attributions.

    An attribution is a dict with name, title, author, licence, licence_url and source, all text.
    """
    check_int("size", size, 1)
    folder = files.data_dir() / "images"
    attributions = read_csv(folder / "attribution.csv")
    pictures = [Image.open(folder / f"{of['name']}.jpg").convert("RGB") for of in attributions]
    pixels = np.stack([np.asarray(file.resize((size, size), Image.Resampling.BICUBIC)) for file in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous(), attributions


def normalise(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """(images - mean) / std for a float tensor (..., 3, H, W) in [0, 1]: what the network expects.

    Keeps shape, dtype and device. ValueError for anything but floats with three channels.
    """
    tensor = isinstance(images, Tensor)
    if not tensor or not images.is_floating_point() or images.dim() < 3 or images.shape[-3] != 3:
        got = f"{images.dtype} {tuple(images.shape)}" if tensor else type(images).__name__
        raise ValueError(f"images: expected floats (..., 3, H, W) in [0, 1], got {got}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: expected three numbers each, got {mean!r} and {std!r}")
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)
