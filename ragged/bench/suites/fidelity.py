"""Suite `fidelity`: how far pruning moves a network from itself, on pictures without labels.

tokens          the schedule: published, or the paper's single cut
keep            as in `accuracy`
feature_cosine  cosine of the pooled features with and without pruning, mean over the pictures, 20 and 80 % quantiles
top1_agreement  share of the pictures whose first class stays the same
images          how many pictures

Any network that `load_deit` takes, over any folder of pictures: nobody needs to have asked the network to be prunable,
and nobody needs labels. A network over a folder of its own stands under "NAME on FOLDER".
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import data
from ...loading import load_deit
from ...model import RaggedViT
from ...pruners import PRUNERS
from ..accuracy import KEEPS, SCHEDULES, Setting, settings
from ..networks import NETWORKS, network, predictors_of
from ..rounds import Subject
from ..runner import Candidate, Case, Options
from ..timing import Stats
from .accuracy import distinct

METRICS = ("feature_cosine", "top1_agreement", "images", "kept_tokens")
BATCH = 64
# Photographs that scikit-image's wheel carries and data/images does not. Drawings, text and chessboards are left out.
SKIMAGE = ("brick.png", "cell.png", "clock_motion.png", "coins.png", "grass.png", "gravel.png", "ihc.png",
           "microaneurysms.png", "moon.png", "motorcycle_left.png", "retina.jpg")  # fmt: skip


def fidelity(options: Options) -> list[Case]:
    """All pruners and their random rival, in both schedules, at keep 0.9 to 0.1, against the same network unpruned."""
    paths = pictures_in(options.images) if options.images else bundled_pictures()
    cases, keeps = [], KEEPS[1:] if not options.quick else (0.5,)
    for name in options.models_or(NETWORKS):
        study = Study(name, options, paths[:4] if options.quick else paths)
        for schedule, how in SCHEDULES.items():
            found = []
            for keep in keeps:
                untrained = functools.partial(PRUNERS["dynamicvit"], keep=keep, **how)
                found += settings(schedule, keep, predictors_of(name))
                found.append(Setting("dynamicvit:untrained", schedule, keep, untrained))
            every = [study.candidate(setting) for setting in found]
            cases.append(Case(study.columns | {"tokens": schedule}, every, distinct))
    return cases


def bundled_pictures() -> list[Path]:
    """The bundled photographs, and scikit-image's where it is installed; what is missing is said on stderr."""
    found, spec = sorted((data.data_dir() / "images").glob("*.jpg")), find_spec("skimage")
    if spec is None:
        print(f"fidelity: scikit-image is not installed, only the {len(found)} bundled photographs count; with it "
              f"{len(SKIMAGE)} more would", file=sys.stderr)  # fmt: skip
        return found
    folder = Path(spec.origin).parent / "data"
    return found + [folder / name for name in SKIMAGE if (folder / name).is_file()]


def pictures_in(folder: Path) -> list[Path]:
    """All images under a folder, sorted; hidden files do not count. FileNotFoundError without a folder, ValueError
    without an image in it."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise FileNotFoundError(f"--images: no such folder: {folder}")
    found = []
    for here, inside, files in os.walk(folder):
        inside[:] = sorted(f for f in inside if not f.startswith("."))
        pictures = (f for f in sorted(files) if not f.startswith("."))
        found += [Path(here, f) for f in pictures if os.path.splitext(f)[1].lower() in IMG_EXTENSIONS]
    if not found:
        raise ValueError(f"--images: {folder} holds no images ({', '.join(e[1:] for e in IMG_EXTENSIONS)})")
    return found


class Study:
    """One network over all pictures, which are read once and stay in memory: 0.3 MB each in half precision."""

    def __init__(self, name: str, options: Options, paths: list[Path]):
        self.name, self.options, self.paths = name, options, paths
        self.batch = options.batches_or((BATCH,))[0]
        model = f"{name} on {options.images.resolve().name}" if options.images else name
        self.columns = {"suite": "fidelity", "model": model, "backend": "auto", "mode": "eager", "batch": self.batch,
                        "dtype": str(options.dtype).removeprefix("torch.")}  # fmt: skip

    @functools.cached_property
    def vit(self) -> nn.Module:
        """The bundled network of that name, or the weights asked for, or else timm's."""
        options = self.options
        if options.weights is not None:
            return load_deit(self.name, weights=options.weights).to(options.device, options.dtype)
        return network(self.name, 224, options.dtype, options.device, other="imagenet")

    @functools.cached_property
    def pictures(self) -> Tensor:
        """(n, 3, height, width), prepared as the network's timm configuration says, on the CPU."""
        from timm.data import create_transform, resolve_model_data_config

        config = resolve_model_data_config(self.vit)
        config["input_size"] = (3, *self.vit.patch_embed.img_size)
        transform = create_transform(**config, is_training=False)
        return torch.stack([transform(data.read_picture(path)).to(self.options.dtype) for path in self.paths])

    @functools.cached_property
    def unpruned(self) -> tuple[Tensor, Tensor]:
        return self.answers(RaggedViT(self.vit))[:2]

    def answers(self, model: RaggedViT) -> tuple[Tensor, Tensor, list[int]]:
        """Pooled features (n, dim) and logits (n, classes) in float32, and the rows that stayed in each picture."""
        pooled, logits, kept = [], [], []
        model = model.to(self.options.device, self.options.dtype)
        for images in self.pictures.split(self.batch):
            images = images.to(self.options.device)
            tokens = model.forward_features(images)
            pooled.append(self.vit.forward_head(tokens, pre_logits=True).float())
            logits.append(self.vit.forward_head(tokens).float())
            stages = model.trace(images).stages
            kept += stages[-1].counts if stages else [tokens.shape[1]] * len(images)
        return torch.cat(pooled), torch.cat(logits), kept

    def candidate(self, setting: Setting) -> Candidate:
        own: dict[str, float] = {}
        patches, prefix = self.vit.patch_embed.num_patches, self.vit.num_prefix_tokens

        def build() -> Subject:
            pooled, logits, kept = self.answers(RaggedViT(self.vit, setting.make()))
            want, classes = self.unpruned
            rows = np.array(kept)
            if setting.keep is None:
                own["keep"] = round((rows.mean() - prefix) / patches, 2)
            near = F.cosine_similarity(pooled, want).cpu().numpy()
            found = {"feature_cosine": _mean(near), "kept_tokens": _mean(rows), "images": len(rows)}
            if self.vit.num_classes:
                found["top1_agreement"] = (logits.argmax(1) == classes.argmax(1)).float().mean().item()
            return Subject([], clocks=(), found=found)

        metrics = METRICS if self.vit.num_classes else tuple(m for m in METRICS if m != "top1_agreement")
        columns = {"pruner": setting.pruner, "keep": setting.keep}
        return Candidate(columns, build, metrics, found_columns=lambda: own)


def _mean(values: np.ndarray) -> Stats:
    return Stats(float(values.mean()), *np.quantile(values, (0.2, 0.8)).tolist())
