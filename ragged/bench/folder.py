"""A validation folder, one folder of images per class: which class is which, and which files are its images.

The rules are torchvision's `ImageFolder`'s where they are safe: the same kinds of files, subfolders and links followed,
sorted by name. Beyond it: folders named by numbers are in the order of the numbers; names on whose order torchvision
and timm disagree are refused; hidden files and folders do not count; a folder that links reach twice counts once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import read_picture


@dataclass
class Listing:
    """What was found. classes: names of the class folders.  labels: the class of the model for each.  samples: (path,
    label) of every image.  order: how labels were given.  others: files that are no images, by suffix.  again: folders
    that a link reached once more, and that were left out there."""

    folder: Path
    classes: list[str]
    labels: dict[str, int]
    order: str
    samples: list[tuple[str, int]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    again: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The mapping and the counts, for a reader to see whether they are what was meant."""
        ranked = sorted(self.labels.items(), key=lambda item: item[1])
        shown = ranked if len(ranked) <= 4 else [*ranked[:2], *ranked[-2:]]
        pairs = [f"{label} = {name}" for name, label in shown]
        pairs[2:2] = ["…"] * (len(ranked) > 4)
        text = f"{len(self.samples)} images in {len(self.classes)} class folders, {self.order}: {', '.join(pairs)}"
        if self.others:
            kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in self.others.most_common(4))
            text += f"\n{sum(self.others.values())} files are no images and were left out ({kinds})"
        if self.again:
            text += f"\n{len(self.again)} links lead to a folder that is counted already and were not followed, "
            text += f"the first {self.again[0]}"
        return text

    def fingerprint(self) -> str:
        """A hash of the names, sizes and labels of all images: another one means that the folder has changed."""
        found = hashlib.sha256()
        for path, label in self.samples:
            name = os.path.relpath(path, self.folder)
            found.update(f"{name}\0{os.stat(path).st_size}\0{label}\n".encode(errors="surrogateescape"))
        return found.hexdigest()


def find(folder: Path, num_classes: int, class_map: Path | None = None) -> Listing:
    """The classes and images of a validation `folder` for a model of `num_classes` classes. class_map: a text file with
    the names of the class folders, one a line, in the order of the model's classes.

    ValueError naming the file or folder: other classes than the model has, an order that is not clear, a class without
    images, a folder in two classes. OSError for what cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--imagenet: no such folder: {folder}")
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if class_map is None:
        if len(names) != num_classes:
            raise ValueError(f"--imagenet: {folder} has {len(names)} class folders, the model {num_classes} classes")
        names, order = in_order(names, folder)
        labels = {name: label for label, name in enumerate(names)}
    else:
        labels, order = _from_map(class_map, names, num_classes), f"in the order of {class_map}"
        names = sorted(names, key=labels.__getitem__)
    listing = Listing(folder, names, {name: labels[name] for name in names}, order)
    owners: dict[str, str] = {}
    for name in names:
        twin = owners.setdefault(os.path.realpath(folder / name), name)
        if twin != name:
            raise ValueError(f"--imagenet: the class folders {twin} and {name} of {folder} are the same folder")
    for name in names:
        _add_class(listing, name, owners)
    return listing


def in_order(names: list[str], folder: Path) -> tuple[list[str], str]:
    """Names of class folders in the order of the classes, and how that order came about. ValueError where torchvision
    and timm would not agree, and for two spellings of one number."""
    from timm.utils.misc import natural_key

    if all(re.fullmatch("[0-9]+", name) for name in names):
        numbers = sorted(names, key=int)
        for one, other in zip(numbers, numbers[1:]):
            if int(one) == int(other):
                raise ValueError(f"--imagenet: the class folders {one} and {other} of {folder} are the same number")
        return numbers, "sorted as numbers"
    text, natural = sorted(names), sorted(names, key=natural_key)
    if text != natural:
        one, other = next((a, b) for a, b in zip(text, natural) if a != b)
        raise ValueError(
            f"--imagenet: the order of the class folders of {folder} is not clear: by text (torchvision) {one} comes "
            f"before {other}, by number and without case (timm) {other} before {one}; say it with --class-map FILE"
        )
    return text, "sorted by name"


def _from_map(path: Path, names: list[str], num_classes: int) -> dict[str, int]:
    """The label of each name by a class map. Not every class needs a folder, but every folder its class."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").rstrip().splitlines()]
    if len(lines) != num_classes or len(set(lines)) != len(lines):
        found = f"{len(lines)} lines, {len(set(lines))} of them different"
        raise ValueError(f"--class-map: expected {num_classes} names, one a line; {path} has {found}")
    labels = {name: label for label, name in enumerate(lines)}
    unknown = sorted(set(names) - set(labels))
    if unknown or not names:
        what = f"the class folder {unknown[0]} is not in {path}" if unknown else "there are no class folders"
        raise ValueError(f"--class-map: {what} ({len(unknown)} of {len(names)} folders)")
    return labels


def _add_class(listing: Listing, name: str, owners: dict[str, str]) -> None:
    """Add the images under a class folder. owners: the class of every folder seen, by its real path."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    root, before = listing.folder.resolve(), len(listing.samples)

    def new(path: str) -> bool:
        real = os.path.realpath(path)
        if root.is_relative_to(real) or owners.get(real) == name:  # up and round again
            listing.again.append(path)
            return False
        if owners.setdefault(real, name) != name:
            raise ValueError(f"--imagenet: {path} leads to {real}, which belongs to the class {owners[real]} as well")
        return True

    def stop(error: OSError) -> None:  # os.walk would pass over what it cannot list
        raise error

    for here, inside, files in os.walk(listing.folder / name, followlinks=True, onerror=stop):
        inside[:] = [f for f in sorted(inside) if not f.startswith(".") and new(os.path.join(here, f))]
        for file in sorted(f for f in files if not f.startswith(".")):
            path, suffix = os.path.join(here, file), os.path.splitext(file)[1].lower()
            if suffix not in IMG_EXTENSIONS:
                listing.others[suffix] += 1
            elif not os.path.isfile(path):
                raise ValueError(f"--imagenet: {path} is no file, or a link to one that is not there")
            else:
                listing.samples.append((path, listing.labels[name]))
    if len(listing.samples) == before:
        kinds = ", ".join(suffix[1:] for suffix in IMG_EXTENSIONS)
        what = "is empty" if not any((listing.folder / name).iterdir()) else f"holds no images ({kinds})"
        raise ValueError(f"--imagenet: the class folder {listing.folder / name} {what}")


class Pictures(torch.utils.data.Dataset):
    """Images of a listing as the model takes them, with their labels. A broken image raises ValueError, naming it, when
    its turn comes."""

    def __init__(self, listing: Listing, transform: Callable):
        self.listing, self.transform = listing, transform

    def __len__(self) -> int:
        return len(self.listing.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.listing.samples[i]
        return self.transform(read_picture(path)), label


def image_folder(folder: Path, vit: nn.Module, batch: int, workers: int,
                 class_map: Path | None = None) -> torch.utils.data.DataLoader:  # fmt: skip
    """Batches (images, labels) of a validation folder, prepared the way the model's timm configuration says: its size,
    crop, interpolation, mean and standard deviation. The dataset's `listing` says what was found.

    Raises what `find` raises; a broken image raises ValueError, naming it, when its turn comes.
    """
    from timm.data import create_transform

    transform = create_transform(**picture_config(vit), is_training=False)
    pictures = Pictures(find(folder, vit.num_classes, class_map), transform)
    return torch.utils.data.DataLoader(pictures, batch, num_workers=workers)


def picture_config(vit: nn.Module) -> dict:
    """How the network `vit` wants its pictures: size, crop, interpolation, mean and deviation, under timm's names."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(vit)
    size = getattr(vit.patch_embed, "img_size", None)
    if size is not None:  # what the network was made for, which may be another size than its weights were trained at
        config["input_size"] = (3, *size)
    return config
