"""From paths to tensors: which files there are, and their pixels as the network wants them, read ahead of the GPU.

What cannot be read is a row with the reason, and never a stop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..bench.folder import picture_config
from ..data import read_picture

OK = "ok"
MOST_PIXELS = 64_000_000  # of a picture whose shorter side has become the network's


def find(places: Sequence[str | Path]) -> list[str]:
    """Paths of all images in `places`, files or folders, in order, each once.

    A file is taken whatever it is called; of a folder, and of folders in it, those with the suffix of an image, sorted
    by name. Hidden files and folders do not count, a folder that links reach twice counts once.
    FileNotFoundError for a place that is not there, ValueError where no place holds an image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: dict[str, None] = {}  # an ordered set
    seen: set[str] = set()

    def new(path: str) -> bool:
        real = os.path.realpath(path)
        return real not in seen and not seen.add(real)

    def unlisted(error: OSError) -> None:  # a folder that may not be listed is a row, as a file that may not be read
        found.setdefault(error.filename)

    for place in map(str, places):
        if not os.path.exists(place):
            raise FileNotFoundError(f"images: there is no file or folder {place}")
        if not os.path.isdir(place):
            found[place] = None
        elif new(place):
            for here, inside, files in os.walk(place, followlinks=True, onerror=unlisted):
                inside[:] = [f for f in sorted(inside) if not f.startswith(".") and new(os.path.join(here, f))]
                names = sorted(f for f in files if not f.startswith("."))
                found |= {os.path.join(here, f): None for f in names if f.lower().endswith(IMG_EXTENSIONS)}
    if not found:
        raise ValueError(f"images: {' '.join(map(str, places))} holds no images ({' '.join(IMG_EXTENSIONS)})")
    return list(found)


class Read:
    """Image files as the network `vit` wants them, uint8 (3, height, width): resized and cropped as its timm
    configuration says. `Classify` does the rest on its device; bytes are a quarter of floats on the way there.

    Call it with a batch of Ray Data: a dictionary with a column "path", to which it adds "image" and "status", which is
    "ok" or why the file cannot be read; such an image is black. ValueError for a network that wants no RGB pictures.
    """

    def __init__(self, vit: nn.Module):
        from timm.data import create_transform

        channels = vit.patch_embed.proj.in_channels
        if channels != 3:
            raise ValueError(f"vit: expected a network for pictures of 3 channels, this one takes {channels}")
        config = picture_config(vit)
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.transform = create_transform(**config, is_training=False, use_prefetcher=True)  # ends in bytes

    def one(self, path: str) -> tuple[Tensor, str]:
        """The image in the file `path`, uint8 (3, height, width), and its status."""
        try:
            picture = read_picture(path)
            short, long = sorted(picture.size)
            if long * max(self.size) ** 2 > short * MOST_PIXELS:
                raise ValueError(f"{path} is too narrow, {picture.width} x {picture.height} pixels: its shorter side "
                                 f"cannot become {max(self.size)}")  # fmt: skip
            return torch.as_tensor(self.transform(picture)), OK
        except (OSError, ValueError, MemoryError) as error:
            why = f"{path}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
            return torch.zeros(3, *self.size, dtype=torch.uint8), " ".join(why.split()) or type(error).__name__

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images, status = zip(*(self.one(path) for path in batch["path"]))
        return batch | {"image": torch.stack(images).numpy(), "status": np.array(status, dtype=object)}


class Batch(NamedTuple):
    """paths: of n images.  images: uint8 (n, 3, height, width).  status: of each."""

    paths: list[str]
    images: Tensor
    status: list[str]


class Files(torch.utils.data.Dataset):
    """(path, image, status) of each of `paths`, by `read`."""

    def __init__(self, paths: Sequence[str], read: Read):
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[str, Tensor, str]:
        return self.paths[i], *self.read.one(self.paths[i])


def together(rows: list[tuple[str, Tensor, str]]) -> Batch:
    """Rows of `Files` as one batch. rows: a (path, image, status) for each."""
    paths, images, status = zip(*rows)
    return Batch(list(paths), torch.stack(images), list(status))


def ahead(paths: Sequence[str], read: Read, batch: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches of `batch` of the `paths`, made with `read` by `workers` processes ahead of whoever asks; 0 reads here.
    pin: in pinned memory, for copies to a GPU. OSError if one of the processes is ended from outside."""
    loader = torch.utils.data.DataLoader(
        Files(paths, read), batch, num_workers=workers, collate_fn=together, pin_memory=pin
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError("a process that reads images was ended from outside, most often for want of memory; run again "
                      "with fewer --workers or a smaller --batch") from error  # fmt: skip
