"""Labels for images that are read: one model on one device, captured as CUDA graphs where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..bench.folder import picture_config
from ..blocks.cuts import Stage
from ..checks import check_int
from ..model import RaggedViT
from .reading import OK

BATCH = {"cuda": 256, "cpu": 16}


class Labels(NamedTuple):
    """Of n images, on the host. classes: int64 (n,).  probabilities: float32 (n,), of that class.  tokens: int64
    (n, cuts), rows that stayed after each cut, CLS included."""

    classes: Tensor
    probabilities: Tensor
    tokens: Tensor


class Classify:
    """A model that labels images on one device.

    model: a `RaggedViT`, or a function that makes one, which an actor of Ray calls for itself.  batch: images at once,
    256 on a GPU and 16 on a CPU if None; a last one may hold fewer.  device: "cuda" or "cpu", by default what is there.
    names: what the classes are called, in order; None leaves the column out.

    On a GPU the pass is captured for `batch` images. Where that is not possible it runs eagerly, and `eager` says why.
    Call it with a batch of Ray Data as `Read` leaves it, for a table of the columns `columns`.
    TypeError or ValueError, naming the argument, for what does not fit.
    """

    def __init__(self, model: RaggedViT | Callable[[], RaggedViT], batch: int | None = None,
                 device: str | None = None, names: Sequence[str] | None = None):  # fmt: skip
        made = model if isinstance(model, nn.Module) or not callable(model) else model()
        if not isinstance(made, RaggedViT):
            raise TypeError(f"model: expected a RaggedViT or a function that makes one, got {type(made).__name__}")
        if made.vit.num_classes < 1:
            raise ValueError("model: it has no classifier (num_classes=0), so that there are no labels")
        if names is not None and len(names) != made.vit.num_classes:
            raise ValueError(f"names: expected {made.vit.num_classes}, one for each class, got {len(names)}")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r}: PyTorch finds no CUDA device here; use device='cpu'")
        self.batch = BATCH[self.device.partition(":")[0]] if batch is None else check_int("batch", batch, 1)
        self.names = names
        config, cuda = picture_config(made.vit), self.device.startswith("cuda")
        self.model = made.to(self.device, torch.float16 if cuda else torch.float32)
        self.size = tuple(config["input_size"])
        self.mean, self.std = (torch.tensor(config[k], device=self.device).view(3, 1, 1) for k in ("mean", "std"))
        pruner = made.pruner
        self.cuts: tuple[int, ...] = () if pruner is None else tuple(pruner.at)
        self.columns = ["path", "class", *(["name"] if names is not None else []), "probability",
                        *(f"tokens_block_{i}" for i in self.cuts), "status"]  # fmt: skip
        self.fast, self.fixed, self.eager = None, None, "there is no GPU here"
        if cuda:
            self.capture()

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the pass, or note in `eager` why not."""
        pruner = self.model.pruner
        if pruner is not None and pruner.adaptive and len(self.cuts) > 1:
            self.eager = f"{pruner.name} decides {len(self.cuts)} times how many tokens stay, and all are to be told"
            return
        try:
            self.fast = self.model.capture(self.batch)
        except NotImplementedError as error:
            self.eager = str(error)
            return
        self.eager = ""
        if pruner is None or not pruner.adaptive:  # counts are the same for all images
            stages = self.model.trace(torch.zeros_like(self.fast.images[:1])).stages
            self.fixed = self.counts(stages, 1)

    def counts(self, stages: list[Stage], n: int) -> Tensor:
        """Rows after each cut, int64 (n, cuts), of the `stages` of n images; a cut that drops nothing has none."""
        left = {stage.block: stage.counts for stage in stages}
        patches = self.model.vit.patch_embed.num_patches
        columns, last = [], [patches + self.model.prefix] * n
        for block in self.cuts:
            last = left.get(block, last)
            columns.append(torch.tensor(last))
        return torch.stack(columns, 1) if columns else torch.zeros(n, 0, dtype=torch.int64)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images (n, 3, height, width) as the network takes them, on its device."""
        x = images.to(self.device, non_blocking=True).float().div_(255)
        return x.sub_(self.mean).div_(self.std).to(self.model.vit.patch_embed.proj.weight.dtype)

    @torch.no_grad()
    def run(self, images: Tensor) -> Labels:
        """Labels of uint8 images (n, 3, height, width), any n. ValueError for another type or size, and where a
        batch does not fit on the GPU."""
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.size:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: expected torch.uint8 (n, {', '.join(map(str, self.size))}), got {got}")
        try:
            parts = [self._part(part) for part in images.split(self.batch)] if len(images) else []
        except torch.OutOfMemoryError as error:
            raise ValueError(f"batch: {self.batch} images at once do not fit on the GPU; take fewer") from error
        if not parts:
            return Labels(torch.zeros(0, dtype=torch.int64), torch.zeros(0), self.counts([], 0))
        return Labels(*(torch.cat(column) for column in zip(*parts)))

    def _part(self, images: Tensor) -> Labels:
        n, x = len(images), self.prepare(images)
        if self.fast is None:
            logits, stages = self.model.trace(x)
            tokens = self.counts(stages, n)
        else:
            if n < self.batch:  # the graph takes whole batches: black images fill it up, and nobody looks at theirs
                x = torch.cat((x, x.new_zeros(self.batch - n, *x.shape[1:])))
            logits = self.fast(x)[:n]
            tokens = self.fast.counts[:n, None] if self.fixed is None else self.fixed.expand(n, -1)
        probabilities, classes = logits.float().softmax(1).max(1)
        return Labels(classes.cpu(), probabilities.cpu(), tokens.cpu().long())

    def table(self, paths: Sequence[str], images: Tensor, status: Sequence[str]) -> pd.DataFrame:
        """A row for each of n images, with `columns`; all but path and status are empty where the status is not "ok".
        paths, status: of each.  images: uint8 (n, 3, height, width)."""
        labels, good = self.run(images), np.array([s == OK for s in status], dtype=bool)
        whole = lambda column: pd.array(column, dtype="Int64")  # noqa: E731
        text = lambda column: pd.Series(list(column), dtype=object)  # noqa: E731  a name may hold bytes that are no text
        found: dict = {"path": text(paths), "class": whole(labels.classes.numpy())}
        if self.names is not None:
            found["name"] = [self.names[i] for i in labels.classes]
        found["probability"] = pd.array(labels.probabilities.numpy(), dtype="Float32")
        found |= {f"tokens_block_{b}": whole(labels.tokens[:, i].numpy()) for i, b in enumerate(self.cuts)}
        frame = pd.DataFrame(found)
        frame.loc[~good, frame.columns[1:]] = None
        return frame.assign(status=text(status))

    def __call__(self, batch: dict[str, np.ndarray]) -> pd.DataFrame:
        return self.table(list(batch["path"]), torch.from_numpy(np.ascontiguousarray(batch["image"])),
                          list(batch["status"]))  # fmt: skip
