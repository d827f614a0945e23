"""The bundled photographs, reading a picture from a file, and the normalisation that networks expect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    pictures = [read_picture(folder / f"{of['name']}.jpg") for of in attributions]
    pixels = np.stack([np.asarray(file.resize((size, size), Image.Resampling.BICUBIC)) for file in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous(), attributions


def read_picture(path: str | Path) -> Image.Image:
    """The image file `path` as an RGB picture of 8 bits a channel.

    As torchvision's and timm's loaders read it: grey values three times, palettes and CMYK resolved, an alpha channel
    dropped, no turning by EXIF orientation. Unlike them, 16-bit grey is scaled from its own range (they clip it to
    white), and 32-bit integers and floats, whose range no file says, are refused.
    Raises ValueError, naming the file, for those, for what is not an image or is damaged, and for so many pixels that
    Pillow suspects an attack; OSError if there is no file to read.
    """
    with Path(path).open("rb") as file:
        try:
            with Image.open(file) as image:
                return _rgb(image)
        except _Unscaled as error:
            raise ValueError(f"{path} {error}") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path} is too large to be opened safely ({error})") from None
        except Exception as error:  # Pillow's decoders raise several kinds for damaged files
            raise ValueError(f"{path} is not an image that can be read ({error})") from error


class _Unscaled(Exception):
    """Pixels of which nobody can say what is black and what is white."""


def _rgb(image: Image.Image) -> Image.Image:
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if wide:  # PNG and PPM have 16 bits at most, in whatever mode Pillow hands them over
        grey = (np.asarray(image).astype(np.int64) + 128) // 257  # 65535 is white
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise _Unscaled(f"has pixels that are {kind}, whose range is not known: save it with 8 or 16 bits a channel")
    return image.convert("RGB")


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
